"""The app's models by name, initialised from their own seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn

from autoflip_flwr.experiment.inputs import kind_of, misfit
from autoflip_flwr.experiment.models.convolutional import cnn, twocnn
from autoflip_flwr.experiment.models.dense import mlp
from autoflip_flwr.experiment.models.own import own_model
from autoflip_flwr.experiment.models.recurrent import lstm
from autoflip_flwr.experiment.models.residual import resnet8_gn, resnet18, resnet18_gn
from autoflip_flwr.experiment.models.signals import har_cnn
from autoflip_flwr.experiment.models.torchvisions import efficientnet_b3, mobilenetv2
from autoflip_flwr.experiment.rules import ConfigError, shown

SMALL = ("cnn", "har-cnn", "mlp")
"""Models whose layers take less than a few milliseconds each: several threads would wait more than they compute."""

_MAKERS: Mapping[str, Callable[[tuple[int, ...], int], nn.Module]] = {
    "cnn": cnn,
    "twocnn": twocnn,
    "twocnn-128": partial(twocnn, width=128),
    "femnistcnn": partial(twocnn, width=64, hidden=2048),
    "resnet8-gn": resnet8_gn,
    "resnet18": resnet18,
    "resnet18-gn": resnet18_gn,
    "mobilenetv2": mobilenetv2,
    "efficientnet-b3": efficientnet_b3,
    "lstm": lstm,
    "lstm-128": partial(lstm, hidden=128, layers=1),
    "har-cnn": har_cnn,
    "mlp": mlp,
}


def build(model: str, input_shape: tuple[int, ...], classes: int, seed: int, *, kind: str | None = None) -> nn.Module:
    """Build a model on the CPU; the same arguments give the same parameters.

    Parameters
    ----------
    model : str
        A name in :data:`~autoflip_flwr.core.choices.MODELS` (docs/models.md has a table of them), or the user's own as
        `module:callable`.
    input_shape : tuple of int
        Shape of one example: (C, H, W) of an image, (channels, length) of signals, (length,) of text.
    classes : int
        Number of logits. For text it is the size of the vocabulary, too.
    seed : int
        Seed of the initial parameters. Torch's global random state is left as it is.
    kind : str | None (None)
        What the data set says that an example is: `image`, `signal` or `text`. None: the number of dimensions says it.

    Returns
    -------
    Module
        From (n, *input_shape), int64 for text and else float32, to logits (n, classes), in training mode. The app's own
        models are float32.

    Raises
    ------
    ConfigError
        If there is no such model, if it does not take this kind of input, or if the user's own does not work.
    """
    make = _maker(model, input_shape, kind_of(input_shape, kind))
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would reseed the accelerators as well, which fork_rng does not restore here.
        torch.default_generator.manual_seed(seed)
        return make(input_shape, classes)


def _maker(model: str, input_shape: tuple[int, ...], kind: str) -> Callable[[tuple[int, ...], int], nn.Module]:
    if ":" in model:
        return partial(own_model, model, kind)
    if model not in _MAKERS:
        known = ", ".join(_MAKERS)
        raise ConfigError(f"model = {shown(model)}: must be one of {known}, or your own as module:callable")
    if reason := misfit(model, kind, f"{kind} of shape {input_shape}", input_shape):
        raise ConfigError(f"model = {shown(model)}: {reason}")
    return partial(mlp, text=True) if model == "mlp" and kind == "text" else _MAKERS[model]
