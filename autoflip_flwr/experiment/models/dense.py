"""Fully connected networks, for inputs of any shape."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import nn


def mlp(input_shape: tuple[int, ...], classes: int, *, text: bool = False) -> nn.Module:
    """Make two hidden layers of 200 units (McMahan et al., 2017, arXiv 1602.05629: their "2NN") on flat inputs.

    Text becomes one-hot vectors first. The initialisation is PyTorch's own.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if text:
        layers["onehot"] = _OneHot(classes)
    layers["flatten"] = nn.Flatten()
    layers["fc1"] = nn.Linear(math.prod(input_shape) * (classes if text else 1), 200)
    layers["relu1"] = nn.ReLU()
    layers["fc2"] = nn.Linear(200, 200)
    layers["relu2"] = nn.ReLU()
    layers["fc3"] = nn.Linear(200, classes)
    return nn.Sequential(layers)


class _OneHot(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self._classes = classes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return float32 (n, length, classes) of int64 (n, length)."""
        return nn.functional.one_hot(x, self._classes).float()
