"""Training under a mask: pruned weights, their gradients and the optimizer's moments stay at zero."""

from __future__ import annotations

from collections.abc import Mapping
from threading import Lock
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from flwr.app import Context
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from autoflip_flwr.mask import Mask
from autoflip_flwr.mod import current_mask


class _Drop:
    """The pruned entries of one parameter.

    It holds no parameter: Python cannot collect a cycle through a gradient hook, nor the model with it.
    """

    def __init__(self, drop: torch.Tensor) -> None:
        self._drop = drop

    def entries(self, device: torch.device) -> torch.Tensor:
        """Booleans in the parameter's shape, True where it is pruned, on the device to which it has been moved."""
        if self._drop.device != device:
            self._drop = self._drop.to(device)
        return self._drop

    @torch.no_grad()
    def zero(self, values: torch.Tensor) -> None:
        """Set them to zero, in the parameter itself or in what has its shape."""
        values.masked_fill_(self.entries(values.device), 0)

    def zero_grad(self, parameter: torch.Tensor) -> None:
        """Set the gradient's to zero: with zero weights, moments that are zero stay so, whatever is decayed."""
        grad = parameter.grad
        if grad is not None and grad.is_sparse:  # rows of an embedding
            parameter.grad = grad = grad.coalesce()
            grad.values().masked_fill_(self.entries(grad.device)[grad.indices()[0]], 0)
        elif grad is not None:
            self.zero(grad)


class MaskedTraining:
    """A model that is kept in a mask's subspace, until :meth:`remove` or the end of a ``with`` block."""

    def __init__(self, dropped: Mapping[torch.Tensor, _Drop]) -> None:
        self._dropped = dict(dropped)
        self._known: WeakSet[torch.optim.Optimizer] = WeakSet()
        self._handles = [
            parameter.register_post_accumulate_grad_hook(drop.zero_grad)  # type: ignore[no-untyped-call]
            for parameter, drop in dropped.items()
            if parameter.requires_grad
        ]
        self._after_step()

    def remove(self) -> None:
        """Let go of the model; it then trains dense."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._dropped = [], {}

    def _trained_by(self, optimizer: torch.optim.Optimizer) -> bool:
        return any(parameter in self._dropped for group in optimizer.param_groups for parameter in group["params"])

    def _before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """What was done to the gradients by hand is undone, and moments from before the mask are dropped."""
        new = optimizer not in self._known
        self._known.add(optimizer)
        for parameter, drop in self._dropped.items():
            drop.zero_grad(parameter)
            for value in optimizer.state.get(parameter, {}).values() if new else ():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    drop.zero(value)

    def _after_step(self) -> None:
        for parameter, drop in self._dropped.items():
            drop.zero(parameter.data)  # no change in autograd's books: another loss may still go back through it

    def __enter__(self) -> MaskedTraining:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


# one model trains under one mask: a second call takes the place of the first
_in_force: WeakKeyDictionary[torch.nn.Module, MaskedTraining] = WeakKeyDictionary()
_lock = Lock()  # threads may train models of their own


def _trainings(optimizer: torch.optim.Optimizer) -> list[MaskedTraining]:
    with _lock:
        trainings = list(_in_force.values())
    return [training for training in trainings if training._trained_by(optimizer)]


def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for training in _trainings(optimizer):
        training._before_step(optimizer)


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for training in _trainings(optimizer):
        training._after_step()


# of all optimizers: the one that will train the model need not exist yet
register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)


def apply_mask(model: torch.nn.Module, mask: Mask | Context | None) -> None:
    """Set the pruned parameters of a model to zero, in place.

    ``mask`` and the errors are those of :func:`masked_training`.
    """
    for parameter, drop in _dropped(model, mask).items():
        drop.zero(parameter)


def masked_training(model: torch.nn.Module, mask: Mask | Context | None) -> MaskedTraining:
    """Keep a model in a mask's subspace, whatever trains it.

    Pruned weights are set to zero now and after every step of any optimizer; their gradients are as soon as they are
    there, so that moments stay at zero and clipping sees what is kept alone. Nothing is added to the model or its state
    dict, and a copy of the model is free.

    Call it once before the training loop; the mask then holds until the next call for the same model. In a ``with``
    block it ends with the block.

    Parameters
    ----------
    model : torch.nn.Module
        Its ``state_dict`` (or its parameters) has the names of the model that the server sent; where those are
        positions (``"0"``, ``"1"``, ..., as ``ArrayRecord`` names a list), its order.
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
    >>> with masked_training(model, mask):
    ...     model(torch.ones(1, 2)).sum().backward()
    ...     optimizer.step()
    >>> model.weight[0, 1].item()
    0.0
    """
    dropped = _dropped(model, mask)
    with _lock:
        earlier = _in_force.pop(model, None)
        if earlier is not None:
            earlier.remove()
        training = MaskedTraining(dropped)
        if dropped:
            _in_force[model] = training
    return training


def _dropped(model: torch.nn.Module, mask: Mask | Context | None) -> dict[torch.Tensor, _Drop]:
    """The parameters that lose entries."""
    if isinstance(mask, Context):
        mask = current_mask(mask)
    if mask is None:
        return {}
    names = _names(model, mask)
    unknown = [name for name in mask.keep if name not in names.values()]
    if unknown:
        raise ValueError(f"the model has no {unknown[:3]}: the mask's names are those of the model's state dict")
    dropped: dict[torch.Tensor, torch.Tensor] = {}
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
    return {parameter: _Drop(drop) for parameter, drop in dropped.items()}


def _names(model: torch.nn.Module, mask: Mask) -> dict[str, str]:
    """The model's names of its arrays -> the mask's, which are positions where a list of arrays was sent."""
    state = list(model.state_dict())
    given = [spec.name for spec in mask.layout.specs]
    if given == [str(position) for position in range(len(given))]:
        shapes = [spec.shape for spec in mask.layout.specs]
        parameters, buffers = list(model.named_parameters()), list(model.named_buffers())
        for own in (list(model.state_dict().items()), parameters, [*parameters, *buffers]):
            if [tuple(tensor.shape) for _, tensor in own] == shapes:
                return dict(zip([name for name, _ in own], given, strict=True))
    return dict(zip(state, state, strict=True))
