"""Powerpropagation: train theta, and compute with the weights ``w = sign(theta) |theta|^a``.

Large weights then get larger gradients than small ones, so that more of the small ones stay near zero (Schwarz et al.
2021; on federated data: SparsyFed, Guastella et al. 2025). Theta is what clients and server store, average, mask and
send. Only parameters of two or more dimensions are meant: biases and normalisation are as ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

OFF = (0.0, 1.0)
"""Exponents with which theta is the weight."""


@torch.no_grad()
def to_theta(model: nn.Module, exponent: float) -> None:
    """Replace the weights ``w`` of a model by ``theta = sign(w) |w|^(1 / exponent)``, in place."""
    if exponent in OFF:
        return
    for parameter in _weights(model):
        parameter.copy_(parameter.sign() * parameter.abs().pow(1 / exponent))


@contextmanager
def as_weights(model: nn.Module, exponent: float) -> Iterator[None]:
    """Let a model that holds theta compute with its weights ``w`` in this block.

    After the block it holds theta again, bit for bit, and its gradients are those by theta:
    ``exponent |theta|^(exponent - 1)`` times those by ``w``. Steps of an optimizer belong outside the block. With an
    exponent in :data:`OFF` nothing is done.
    """
    if exponent in OFF:
        yield
        return
    held = [(parameter, parameter.detach().clone()) for parameter in _weights(model)]
    for parameter, theta in held:
        parameter.data.copy_(theta.sign() * theta.abs().pow(exponent))
    try:
        yield
    finally:
        for parameter, theta in held:
            parameter.data.copy_(theta)  # unseen by autograd, as backward is over
            if parameter.grad is not None:
                parameter.grad.mul_(theta.abs().pow_(exponent - 1).mul_(exponent))


def _weights(model: nn.Module) -> list[nn.Parameter]:
    return [each for each in model.parameters() if each.ndim > 1 and each.is_floating_point()]
