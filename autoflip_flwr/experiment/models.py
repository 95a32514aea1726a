"""The models of the app, initialised from their own seed, and the cost of a training step."""

import copy
from collections import OrderedDict
from functools import partial

import torch
from torch import nn

from autoflip_flwr.experiment.config import ConfigError
from autoflip_flwr.experiment.startup import light_imports

SMALL = ("cnn",)
"""Models whose training steps are too short for several threads, which would wait more than they compute."""

_TWOCNN_WIDTH = 32


def build(model: str, input_shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
    """Build a model on the CPU; the same arguments give the same parameters.

    Parameters
    ----------
    model : str
        `cnn` (two 3x3 convolutions, 128 hidden units), `twocnn` (TwoCNN(h=32) of the AutoFLIP paper, Xavier-uniform
        weights, zero biases), `resnet18` (torchvision's, with a 3x3 stem of stride 1 and no first pooling, as for
        CIFAR) or `resnet18-gn` (the same with GroupNorm(32) for batch normalisation).
    input_shape : tuple of int
        (C, H, W) of one example.
    classes : int
        Number of logits.
    seed : int
        Seed of the initial parameters. Torch's global random state is left as it is.

    Returns
    -------
    Module
        float32, from (n, C, H, W) to logits (n, classes), in training mode.

    Raises
    ------
    ConfigError
        If there is no such model.
    """
    makers = {"cnn": _cnn, "twocnn": _twocnn, "resnet18": _resnet18, "resnet18-gn": _resnet18_gn}
    if model not in makers:
        raise ConfigError(f"model = {model!r}: must be one of {', '.join(makers)}")
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would reseed the accelerators as well, which fork_rng does not restore here.
        torch.default_generator.manual_seed(seed)
        return makers[model](input_shape, classes)


def flops_per_example(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Count the floating-point operations of one training example, forward and backward.

    Convolutions and matrix products are counted, a multiply-add as 2. Element-wise layers and the gradient with respect
    to the input are not. Only a copy without storage is run; the model itself is neither changed nor kept.

    Parameters
    ----------
    model : Module
        The model. Frozen parameters count as trained.
    input_shape : tuple of int
        (C, H, W) of one example.

    Returns
    -------
    int
        FLOPs, forward plus backward.
    """
    # Evaluation mode costs the same, and lets batch normalisation accept a single example.
    shadow = copy.deepcopy(model).to("meta").eval().requires_grad_(True)
    from torch.utils.flop_counter import FlopCounterMode  # here, not above: it loads a compiler clients do without

    counter = FlopCounterMode(display=False)
    with counter:
        shadow(torch.empty(1, *input_shape, device="meta")).sum().backward()
    return int(counter.get_total_flops())


def _cnn(input_shape: tuple[int, ...], classes: int) -> nn.Module:
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


def _twocnn(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    wide = _TWOCNN_WIDTH
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(input_shape[0], wide, 5, padding=1),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2, padding=1),
        conv2=nn.Conv2d(wide, 2 * wide, 5, padding=1),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2, padding=1),
        pool3=nn.AdaptiveAvgPool2d(7),
        flatten=nn.Flatten(),
        fc1=nn.Linear(2 * wide * 7 * 7, 512),
        relu3=nn.ReLU(),
        fc2=nn.Linear(512, classes),
    )
    for layer in layers.values():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return nn.Sequential(layers)


def _resnet18(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    return _cifar_resnet18(input_shape, classes, nn.BatchNorm2d)


def _resnet18_gn(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    return _cifar_resnet18(input_shape, classes, partial(nn.GroupNorm, 32))


def _cifar_resnet18(
    input_shape: tuple[int, ...], classes: int, norm: type[nn.BatchNorm2d] | partial[nn.GroupNorm]
) -> nn.Module:
    with light_imports():  # here, not above: torchvision is slow to import, and the other models do not need it
        from torchvision.models import resnet18

    net: nn.Module = resnet18(num_classes=classes, norm_layer=norm)
    stem = nn.Conv2d(input_shape[0], 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    net.conv1, net.maxpool = stem, nn.Identity()
    return net
