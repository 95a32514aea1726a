"""Compute in float32 or in bfloat16 autocast, and say where the latter is slow or impossible."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from autoflip_flwr.experiment.rules import ConfigError


def output(model: nn.Module, x: torch.Tensor, precision: str) -> torch.Tensor:
    """Return a model's logits for x.

    In ``"bfloat16"`` PyTorch's autocast computes convolutions and matrix products in that format, forward and backward.
    Parameters and their gradients stay float32. The logits become float32 too, so that the loss is computed in it.
    """
    if precision == "float32":
        logits: torch.Tensor = model(x)
        return logits
    with torch.autocast(x.device.type, torch.bfloat16):
        return model(x).float()  # type: ignore[no-any-return]


def check_precision(model: nn.Module, x: torch.Tensor, precision: str) -> str:
    """Check that a model can be trained in a precision, by one forward pass.

    Parameters
    ----------
    model : Module
        The model, on the device to train on. It is in training mode afterwards.
    x : Tensor
        One example or more, on the same device.
    precision : str
        `float32` or `bfloat16`.

    Returns
    -------
    str
        A warning if the precision is slower here than float32, else "".

    Raises
    ------
    ConfigError
        If PyTorch cannot compute the model in this precision. On CPUs with neither bfloat16 nor AVX-512 instructions
        it cannot compute an LSTM.
    """
    if precision == "float32":
        return ""
    try:
        with torch.no_grad():
            output(model.eval(), x, precision)
    except RuntimeError as error:
        reason = re.split(r"[.\n]", str(error), maxsplit=1)[0]
        raise ConfigError(
            f"precision = '{precision}': PyTorch cannot compute this model in it on this machine's {x.device.type} "
            f"({reason}); take float32"
        ) from error
    finally:
        model.train()
    if x.device.type == "cpu" and has_bfloat16() is False:
        return (
            f"precision = '{precision}': this machine's CPU has no instructions for it, so training takes 3 to 13 "
            "times as long as in float32 (docs/models.md)"
        )
    return ""


@lru_cache(maxsize=1)
def has_bfloat16() -> bool | None:
    """Return whether this machine's CPU has bfloat16 instructions; None where that is unknown (not on Linux)."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return None
    return re.search(r"^(?:flags|Features)\s*:.*\b(?:avx512_bf16|amx_bf16|bf16)\b", flags, re.MULTILINE) is not None
