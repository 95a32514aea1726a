"""Extrusion: before entries are dropped, training draws them to zero (FedMef, Huang et al., CVPR 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from autoflip_flwr.core.mask import Mask
from autoflip_flwr.wire.keys import EXTRUDE_BELOW_KEY, EXTRUSION_KEY


class Extrusion:
    """Adds the gradient of ``strength * ||w||^2``, over the kept entries that are smaller than a threshold now.

    Parameters
    ----------
    model : nn.Module
        The model as the message brought it.
    mask : Mask
        The mask in force. Its names are those of the model's parameters.
    below : float
        The threshold of the magnitude, > 0.
    strength : float
        The factor, > 0.
    """

    def __init__(self, model: nn.Module, mask: Mask, below: float, strength: float) -> None:
        self._strength = strength
        self._low: list[tuple[nn.Parameter, torch.Tensor]] = []
        for name, parameter in model.named_parameters():
            if name in mask.keep:
                kept = torch.from_numpy(mask.keep[name]).to(parameter.device)
                self._low.append((parameter, kept & (parameter.detach().abs() < below)))

    @classmethod
    def asked(cls, config: Mapping[str, Any], model: nn.Module, mask: Mask | None) -> Extrusion | None:
        """Return what the config of a message asks for; ``None`` if it asks for none."""
        if mask is None or EXTRUDE_BELOW_KEY not in config:
            return None
        return cls(model, mask, float(config[EXTRUDE_BELOW_KEY]), float(config[EXTRUSION_KEY]))

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add the gradients to those that the parameters have."""
        for parameter, low in self._low:
            if parameter.grad is not None:
                parameter.grad.add_(parameter * low, alpha=2 * self._strength)
