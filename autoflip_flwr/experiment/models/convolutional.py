"""Plain convolutional networks for images (C, H, W)."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from autoflip_flwr.experiment.models.initial import xavier


def cnn(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Make two 3x3 convolutions and a hidden layer of 128 units, with PyTorch's own initialisation (our choice)."""
    channels, height, width = input_shape
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, wide in enumerate((16 if min(height, width) < 16 else 32, 64), 1):
        layers[f"conv{number}"] = nn.Conv2d(channels, wide, 3, padding=1)
        layers[f"relu{number}"] = nn.ReLU()
        channels = wide
        if min(height, width) >= 2:
            layers[f"pool{number}"] = nn.MaxPool2d(2)
            height, width = height // 2, width // 2
    layers["flatten"] = nn.Flatten()
    layers["fc1"] = nn.Linear(channels * height * width, 128)
    layers["relu3"] = nn.ReLU()
    layers["fc2"] = nn.Linear(128, classes)
    return nn.Sequential(layers)


def twocnn(input_shape: tuple[int, ...], classes: int, *, width: int = 32, hidden: int = 512) -> nn.Module:
    """Make TwoCNN(h=`width`) of the AutoFLIP paper, with Xavier-uniform weights and zero biases.

    With `width` 64 and `hidden` 2048 it is the paper's FEMNISTCNN. A last pooling to 7x7 makes every image size fit.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(input_shape[0], width, 5, padding=1),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2, padding=1),
        conv2=nn.Conv2d(width, 2 * width, 5, padding=1),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2, padding=1),
        pool3=nn.AdaptiveAvgPool2d(7),
        flatten=nn.Flatten(),
        fc1=nn.Linear(2 * width * 7 * 7, hidden),
        relu3=nn.ReLU(),
        fc2=nn.Linear(hidden, classes),
    )
    return xavier(nn.Sequential(layers))
