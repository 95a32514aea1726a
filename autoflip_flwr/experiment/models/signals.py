"""Networks for signals (channels, length)."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


def har_cnn(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Make two 1-D convolutions of 5 samples (32 and 64 channels), each pooled by 2, and 128 hidden units.

    The layout is ours. The initialisation is PyTorch's own.
    """
    channels, length = input_shape
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, wide in enumerate((32, 64), 1):
        layers[f"conv{number}"] = nn.Conv1d(channels, wide, 5, padding=2)
        layers[f"relu{number}"] = nn.ReLU()
        channels = wide
        if length >= 2:
            layers[f"pool{number}"] = nn.MaxPool1d(2)
            length //= 2
    layers["flatten"] = nn.Flatten()
    layers["fc1"] = nn.Linear(channels * length, 128)
    layers["relu3"] = nn.ReLU()
    layers["fc2"] = nn.Linear(128, classes)
    return nn.Sequential(layers)
