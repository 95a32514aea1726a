"""Training under a mask: pruned weights, their gradients and the optimizer's moments stay at zero."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from flwr.app import Context

from autoflip_flwr.mask import Mask
from autoflip_flwr.mod import current_mask

Dropped = dict[torch.Tensor, torch.Tensor]
"""For each parameter that loses entries a boolean tensor of its shape on its device, True where it is pruned."""


class _Handle(Protocol):
    def remove(self) -> None: ...


class MaskedTraining:
    """Hooks that keep a model in a mask's subspace, until :meth:`remove` or the end of a ``with`` block."""

    def __init__(self, handles: list[_Handle]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Take the hooks away; the model then trains dense."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> MaskedTraining:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


# one model trains under one mask: a second call takes the place of the first, whose optimizer may still be alive
_in_force: WeakKeyDictionary[torch.nn.Module, MaskedTraining] = WeakKeyDictionary()


@torch.no_grad()
def apply_mask(model: torch.nn.Module, mask: Mask) -> None:
    """Set the pruned parameters of a model to zero, in place.

    Raises
    ------
    ValueError
        If the model lacks a name of the mask, or a parameter's shape is not the mask's.
    """
    _zero(_dropped(model, mask))


def masked_training(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, mask: Mask | Context | None
) -> MaskedTraining:
    """Keep the model in the mask's subspace after every step of the optimizer.

    The optimizer's state of pruned parameters is set to zero at the start; their gradients are as soon as they are
    there, so that it stays at zero and clipping sees what is kept alone; after each step they are themselves. Nothing
    is added to the model or its state dict, and a copy of the model is free.

    Call it once before the training loop, where model and optimizer are ready; the mask then holds until the next call
    for the same model. In a ``with`` block it ends with the block.

    Parameters
    ----------
    model : torch.nn.Module
        Its ``state_dict`` (or its parameters) has the names of the model that the server sent; where those are
        positions (``"0"``, ``"1"``, ..., as ``ArrayRecord`` names a list), its order.
    optimizer : torch.optim.Optimizer
        Any optimizer that runs step hooks (all of ``torch.optim`` do).
    mask : Mask | Context | None
        The mask, or the context of the Flower client: then it is :func:`~autoflip_flwr.mod.current_mask` of it.
        ``None`` trains dense, as explorers do.

    Raises
    ------
    ValueError
        If the model lacks a name of the mask, or a parameter's shape is not the mask's.

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
    if isinstance(mask, Context):
        mask = current_mask(mask)
    dropped = {} if mask is None else _dropped(model, mask)
    if model in _in_force:
        _in_force.pop(model).remove()
    training = MaskedTraining(_hooks(dropped, optimizer) if dropped else [])
    _in_force[model] = training
    return training


def _hooks(dropped: Dropped, optimizer: torch.optim.Optimizer) -> list[_Handle]:
    def accumulated(parameter: torch.Tensor) -> None:
        # zero gradients and zero weights keep moments that are zero at zero, whatever is decayed
        grad, drop = parameter.grad, dropped[parameter]
        if grad is not None and grad.is_sparse:  # rows of an embedding
            parameter.grad = grad = grad.coalesce()
            grad.values().masked_fill_(drop[grad.indices()[0]], 0)
        elif grad is not None:
            grad.masked_fill_(drop, 0)

    def before(*_: Any) -> None:
        for parameter in dropped:
            accumulated(parameter)

    def after(*_: Any) -> None:
        _zero(dropped)

    _zero(dropped)
    for parameter, drop in dropped.items():
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                value.masked_fill_(drop, 0)
    trained = [parameter for parameter in dropped if parameter.requires_grad]
    handles = [p.register_post_accumulate_grad_hook(accumulated) for p in trained]  # type: ignore[no-untyped-call]
    return [*handles, optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]


@torch.no_grad()
def _zero(dropped: Dropped) -> None:
    for parameter, drop in dropped.items():
        parameter.masked_fill_(drop, 0)


def _dropped(model: torch.nn.Module, mask: Mask) -> Dropped:
    names = _names(model, mask)
    unknown = [name for name in mask.keep if name not in names.values()]
    if unknown:
        raise ValueError(f"the model has no {unknown[:3]}: the mask's names are those of the model's state dict")
    dropped: Dropped = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        keep = mask.keep.get(names.get(name, ""))
        if keep is None:
            continue
        if keep.shape != tuple(parameter.shape):
            raise ValueError(f"parameter {name!r} has shape {tuple(parameter.shape)}, the mask {keep.shape}")
        if not keep.all():
            drop = torch.from_numpy(~keep).to(parameter.device)
            # tied weights go by several names: what one of them prunes is pruned
            dropped[parameter] = drop | dropped[parameter] if parameter in dropped else drop
    return dropped


def _names(model: torch.nn.Module, mask: Mask) -> dict[str, str]:
    """The model's names of its arrays -> the mask's, which are positions where a list of arrays was sent."""
    state = list(model.state_dict())
    given = [spec.name for spec in mask.layout.specs]
    if given == [str(position) for position in range(len(given))]:
        for own in (state, [name for name, _ in model.named_parameters()]):
            if len(own) == len(given):
                return dict(zip(own, given, strict=True))
    return dict(zip(state, state, strict=True))
