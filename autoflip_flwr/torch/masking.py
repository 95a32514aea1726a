"""Training under a mask: pruned weights, their gradients and the optimizer's moments stay at zero."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from autoflip_flwr.mask import Mask


def _dropped(model: torch.nn.Module, mask: Mask) -> dict[torch.Tensor, torch.Tensor]:
    """For each parameter that loses entries a boolean tensor of its shape on its device, True where it is pruned."""
    names = model.state_dict().keys()
    unknown = [name for name in mask.keep if name not in names]
    if unknown:
        raise ValueError(f"the model has no {unknown[:3]}: the mask's names are those of the model's state dict")
    dropped: dict[torch.Tensor, torch.Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        keep = mask.keep.get(name)
        if keep is None:
            continue
        if keep.shape != tuple(parameter.shape):
            raise ValueError(f"parameter {name!r} has shape {tuple(parameter.shape)}, the mask {keep.shape}")
        if not keep.all():
            drop = torch.from_numpy(~keep).to(parameter.device)
            # tied weights go by several names: what one of them prunes is pruned
            dropped[parameter] = drop | dropped[parameter] if parameter in dropped else drop
    return dropped


@torch.no_grad()
def apply_mask(model: torch.nn.Module, mask: Mask) -> None:
    """Set the pruned parameters of a model to zero, in place.

    Raises
    ------
    ValueError
        If the model lacks a name of the mask, or a parameter's shape is not the mask's.
    """
    for parameter, drop in _dropped(model, mask).items():
        parameter.masked_fill_(drop, 0)


@contextmanager
def masked_training(model: torch.nn.Module, optimizer: torch.optim.Optimizer, mask: Mask | None) -> Iterator[None]:
    """Keep the model in the mask's subspace after every step of the optimizer.

    The optimizer's state of pruned parameters is set to zero at the start; before each step their gradients are, so
    that it stays at zero, and after each step they are themselves. Nothing is added to the model or its state dict.

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
    >>> import numpy as np
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
    dropped = _dropped(model, mask)

    def before(*_: Any) -> None:
        for parameter in dropped:
            accumulated(parameter)

    def accumulated(parameter: torch.Tensor) -> None:
        # zero gradients and zero weights keep moments that are zero at zero, whatever is decayed
        if parameter.grad is not None:
            parameter.grad.masked_fill_(dropped[parameter], 0)

    @torch.no_grad()
    def after(*_: Any) -> None:
        for parameter, drop in dropped.items():
            parameter.masked_fill_(drop, 0)

    apply_mask(model, mask)
    for parameter, drop in dropped.items():
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                value.masked_fill_(drop, 0)
    handles = [p.register_post_accumulate_grad_hook(accumulated) for p in dropped]  # type: ignore[no-untyped-call]
    handles += [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
