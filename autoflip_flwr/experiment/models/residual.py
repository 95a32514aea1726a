"""Residual networks for images (C, H, W), with BatchNorm or GroupNorm."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

import torch
from torch import nn

from autoflip_flwr.experiment.startup import light_imports

_GROUPS = 8  # of resnet8-gn: 4 channels a group in its narrowest stage


def resnet18(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Make torchvision's ResNet-18 with a 3x3 stem of stride 1 and no first pooling, as is usual for CIFAR."""
    return _cifar_resnet18(input_shape, classes, nn.BatchNorm2d)


def resnet18_gn(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Make the same ResNet-18 with GroupNorm(32) for batch normalisation."""
    return _cifar_resnet18(input_shape, classes, partial(nn.GroupNorm, 32))


def _cifar_resnet18(
    input_shape: tuple[int, ...], classes: int, norm: type[nn.BatchNorm2d] | partial[nn.GroupNorm]
) -> nn.Module:
    with light_imports():  # here, not above: torchvision is slow to import, and most models do not need it
        from torchvision.models import resnet18

    net: nn.Module = resnet18(num_classes=classes, norm_layer=norm)
    stem = nn.Conv2d(input_shape[0], 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    net.conv1, net.maxpool = stem, nn.Identity()
    return net


def resnet8_gn(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Make a ResNet-8 of widths 32, 64 and 128 with GroupNorm(8), small enough to train on two cores.

    A 3x3 stem of stride 1, three stages of one basic block each (strides 1, 2, 2), global average pooling, one linear
    layer. Where a block changes the shape, its shortcut is a 1x1 convolution with a norm of its own. Convolutions begin
    with He's normal values (fan-out), as in torchvision's ResNets. The layout is ours, after CIFAR's ResNet-8.
    """
    net = nn.Sequential(
        OrderedDict(
            conv1=_conv(input_shape[0], 32, 3),
            norm1=nn.GroupNorm(_GROUPS, 32),
            relu1=nn.ReLU(),
            stage1=_Block(32, 32, 1),
            stage2=_Block(32, 64, 2),
            stage3=_Block(64, 128, 2),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(128, classes),
        )
    )
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


class _Block(nn.Module):
    """The basic block of a ResNet: two 3x3 convolutions beside a shortcut."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(channels, width, 3, stride), nn.GroupNorm(_GROUPS, width)
        self.conv2, self.norm2 = _conv(width, width, 3), nn.GroupNorm(_GROUPS, width)
        self.shortcut = nn.Sequential()
        if channels != width or stride != 1:
            self.shortcut = nn.Sequential(_conv(channels, width, 1, stride), nn.GroupNorm(_GROUPS, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (n, width, H / stride, W / stride) of (n, channels, H, W)."""
        found = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return torch.relu(found + self.shortcut(x))


def _conv(channels: int, width: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, width, size, stride, padding=size // 2, bias=False)
