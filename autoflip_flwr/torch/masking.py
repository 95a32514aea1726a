"""Training under a mask: pruned weights, their gradients and the optimizer's moments stay at zero."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from autoflip_flwr.mask import Mask


def _factors(model: torch.nn.Module, mask: Mask) -> dict[torch.nn.Parameter, torch.Tensor]:
    """For each pruned parameter a boolean tensor of its shape on its device, True where it is kept."""
    factors = {}
    for name, parameter in model.named_parameters():
        keep = mask.keep.get(name)
        if keep is None or keep.all():
            continue
        if keep.shape != tuple(parameter.shape):
            raise ValueError(f"parameter {name!r} has shape {tuple(parameter.shape)}, the mask {keep.shape}")
        factors[parameter] = torch.from_numpy(np.array(keep)).to(parameter.device)
    return factors


@torch.no_grad()
def apply_mask(model: torch.nn.Module, mask: Mask) -> None:
    """Set the pruned parameters of a model to zero, in place.

    Raises
    ------
    ValueError
        If a parameter's shape is not the mask's.
    """
    for parameter, keep in _factors(model, mask).items():
        parameter.mul_(keep)


@contextmanager
def masked_training(model: torch.nn.Module, optimizer: torch.optim.Optimizer, mask: Mask | None) -> Iterator[None]:
    """Keep the model in the mask's subspace after every step of the optimizer.

    Before a step the pruned gradients are set to zero (so that nothing pruned enters a gradient-driven moment), after
    it the pruned parameters and the optimizer's state of them. Nothing is added to the model or its state dict.

    Parameters
    ----------
    model : torch.nn.Module
        Its parameters carry the names that the mask knows them by (``state_dict`` names).
    optimizer : torch.optim.Optimizer
        Any optimizer that runs step hooks (all of ``torch.optim`` do).
    mask : Mask | None
        ``None`` trains dense.

    Examples
    --------
    >>> from autoflip_flwr import Layout, Mask
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> layout = Layout.of({"weight": model.weight.detach().numpy()})
    >>> mask = Mask.from_bool(layout, {"weight": np.array([[True, False]])})
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with masked_training(model, optimizer, mask):
    ...     model(torch.ones(1, 2)).sum().backward()
    ...     optimizer.step()
    >>> model.weight[0, 1].item()
    0.0
    """
    if mask is None:
        yield
        return
    factors = _factors(model, mask)

    def before(*_: Any) -> None:
        for parameter, keep in factors.items():
            if parameter.grad is not None:
                parameter.grad.mul_(keep)

    @torch.no_grad()
    def after(*_: Any) -> None:
        for parameter, keep in factors.items():
            parameter.mul_(keep)
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    value.mul_(keep)

    apply_mask(model, mask)
    handles = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
