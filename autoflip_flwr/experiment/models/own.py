"""Models of the user's own, named as `module:callable`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from autoflip_flwr.experiment.imported import find, in_words
from autoflip_flwr.experiment.models.blank import blank
from autoflip_flwr.experiment.rules import ConfigError, shown


def own_model(name: str, kind: str, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Make a user's model, and try it with two examples of zeros.

    Parameters
    ----------
    name : str
        `module:callable`, found in the environment or the current folder. It is called with `input_shape` and
        `classes`, by keyword, as far as it takes them. It may be a class.
    kind : str
        `image`, `signal` or `text`.
    input_shape : tuple of int
        Shape of one example.
    classes : int
        Number of logits.

    Returns
    -------
    Module
        In training mode. It has been tried in evaluation mode.

    Raises
    ------
    ConfigError
        If there is no such callable, if it does not return an `nn.Module`, or if that cannot be run or returns anything
        but floating-point logits (2, classes).
    """
    setting = f"model = {shown(name)}"
    make = find("model", name)
    try:
        model = make(**_wanted(make, input_shape=input_shape, classes=classes))
    except Exception as error:  # whatever the user's code raises
        raise ConfigError(f"{setting}: calling it failed: {in_words(error)}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{setting}: must return an nn.Module, not a {type(model).__name__}")
    examples = blank(2, input_shape, kind)
    told = f"{str(examples.dtype).removeprefix('torch.')} {tuple(examples.shape)}"
    try:
        with torch.no_grad():
            logits = model.eval()(examples)
    except Exception as error:
        raise ConfigError(f"{setting}: a forward pass of {told} failed: {in_words(error)}") from error
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point() or logits.shape != (2, classes):
        found = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else type(logits).__name__
        wanted = f"logits float32 (2, {classes})"
        raise ConfigError(f"{setting}: must return {wanted} for {told}, not {found.removeprefix('torch.')}")
    if not any(True for _ in model.parameters()):
        raise ConfigError(f"{setting}: has no parameters to train")
    return model.train()


def _wanted(make: Callable[..., Any], **offered: Any) -> dict[str, Any]:
    """Return those of the offered arguments that a callable takes by keyword."""
    try:
        parameters = inspect.signature(make).parameters.values()
    except ValueError:  # some callables of C have no signature
        return {}
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return offered
    names = {each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
    return {name: value for name, value in offered.items() if name in names}
