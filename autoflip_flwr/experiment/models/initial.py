"""The initialisation of the AutoFLIP paper's models."""

from __future__ import annotations

from torch import nn


def xavier(model: nn.Module) -> nn.Module:
    """Set the weights of convolutions, linear layers and LSTMs to Xavier-uniform values, and their biases to zero.

    The gates of an LSTM's layer are one matrix, as PyTorch stores them (our reading). Returns the same model.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.LSTM):
            for parameter in layer.parameters(recurse=False):
                if parameter.ndim > 1:
                    nn.init.xavier_uniform_(parameter)
                else:
                    nn.init.zeros_(parameter)
    return model
