"""MobileNetV2 and EfficientNet-B3 as torchvision makes them, for small images. No weights are downloaded."""

from __future__ import annotations

from typing import Any

from torch import nn

from autoflip_flwr.experiment.startup import light_imports


def mobilenetv2(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Make torchvision's MobileNetV2 with a stem of stride 1, so that 32x32 images end as 2x2 features."""
    return _small_stem("mobilenet_v2", input_shape, classes)


def efficientnet_b3(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Make torchvision's EfficientNet-B3 with a stem of stride 1, so that 32x32 images end as 2x2 features."""
    return _small_stem("efficientnet_b3", input_shape, classes)


def _small_stem(name: str, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    with light_imports():  # here, not above: torchvision is slow to import, and most models do not need it
        from torchvision import models

    net: Any = getattr(models, name)(weights=None, num_classes=classes)
    wide = net.features[0][0].out_channels
    stem = nn.Conv2d(input_shape[0], wide, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out")
    net.features[0][0] = stem
    return net  # type: ignore[no-any-return]
