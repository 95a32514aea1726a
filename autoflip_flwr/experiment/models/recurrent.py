"""Recurrent networks for text (length,): integers below the number of classes, which is the vocabulary too."""

from __future__ import annotations

import torch
from torch import nn

from autoflip_flwr.experiment.models.initial import xavier


class NextCharLSTM(nn.Module):
    """NextCharLSTM of the AutoFLIP paper: the next character after the last one.

    An embedding of 8 values, an LSTM of `layers` layers with `hidden` units each, and a linear layer on its last step.
    The paper has two layers with 256 units.
    """

    def __init__(self, classes: int, *, hidden: int = 256, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, 8)
        self.lstm = nn.LSTM(8, hidden, num_layers=layers, batch_first=True)
        self.fc = nn.Linear(hidden, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits, float32 (n, classes), of text, int64 (n, length)."""
        steps, _ = self.lstm(self.embedding(x))
        logits: torch.Tensor = self.fc(steps[:, -1])
        return logits


def lstm(_: tuple[int, ...], classes: int, *, hidden: int = 256, layers: int = 2) -> nn.Module:
    """Make NextCharLSTM with Xavier-uniform weights, zero biases, and PyTorch's own embedding."""
    return xavier(NextCharLSTM(classes, hidden=hidden, layers=layers))
