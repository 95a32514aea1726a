"""Train under a mask: pruned weights stay at zero or at the base's values, and learning rates follow the density."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from threading import RLock
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from flwr.app import Context
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from autoflip_flwr.client.context import current_rate, subspace_and_layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.subspace import Subspace
from autoflip_flwr.torch.names import Names
from autoflip_flwr.torch.pruned import Pruned, pruned_of
from autoflip_flwr.torch.targets import Holder, Key, Model, Parameters, target_of


class _Masking:
    """Keeps a target in a mask's subspace until it is ended."""

    def __init__(self, target: Model | Parameters, subspace: Subspace, rate: float) -> None:
        self._target, self._subspace, self._rate = target, subspace, rate
        self._rates: WeakKeyDictionary[torch.optim.Optimizer, list[Any]] = WeakKeyDictionary()
        self._pruned: dict[int, tuple[Holder, Pruned]] = {}
        self._known: WeakSet[torch.optim.Optimizer] = WeakSet()
        self._handles: list[RemovableHandle] = []
        self._ended = False
        self.bind()

    def bind(self) -> None:
        """Bind to the parameters that the target has now.

        Raises
        ------
        ValueError
            If they differ from those that the server sent; then nothing is changed.
        """
        pruned = pruned_of(self._target, self._subspace)
        self.release()
        for parameter, own in pruned.items():
            if parameter.requires_grad:
                # torch.utils.swap_tensors moves the hooks, but not the code that calls them
                parameter._post_accumulate_grad_hooks = parameter._post_accumulate_grad_hooks
                handle = parameter.register_post_accumulate_grad_hook(own.zero_grad)  # type: ignore[no-untyped-call]
                self._handles.append(handle)
        self._target.watch(pruned.keys())
        self._pruned = {id(parameter): (self._target.hold(parameter), own) for parameter, own in pruned.items()}
        self._known = WeakSet()
        self.after_step()

    def may_go_on(self) -> bool:
        """Return whether it has neither been ended nor lost its target."""
        return self._target.alive() and not self._ended

    def end(self) -> None:
        """Release the parameters for good."""
        self._ended = True
        self.release()

    def release(self) -> None:
        """Remove the hooks from the parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._pruned = [], {}

    def trained_by(self, parameters: set[int]) -> bool:
        """Return whether an optimizer of parameters with these ids trains the target."""
        return not parameters.isdisjoint(self._pruned)

    def follow(self, parameters: set[int]) -> None:
        """Bind again if parameters were replaced and an optimizer of parameters with these ids trains the target."""
        if not self._target.replaced():
            return
        if self.trained_by(parameters) or not parameters.isdisjoint(self._target.now()):
            try:
                with _lock:  # several threads may step the same model
                    if self._target.replaced():
                        self.bind()
            except ValueError as error:
                raise ValueError(
                    f"parameters that were replaced after masked_training no longer fit: {error}"
                ) from error

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Zero pruned gradients again before each step, and pruned optimiser state the first time."""
        new = optimizer not in self._known
        self._known.add(optimizer)
        if new:
            self.after_step()
        for parameter, own in self._bound():
            own.zero_grad(parameter)
            for value in optimizer.state.get(parameter, {}).values() if new else ():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    own.zero(value)

    def raise_rates(self, optimizer: torch.optim.Optimizer) -> None:
        """Multiply the learning rates of all groups for the step that follows."""
        if self._rate != 1:
            self.restore_rates(optimizer)  # a step that failed has left them raised
            self._rates[optimizer] = [group["lr"] for group in optimizer.param_groups if "lr" in group]
            for group in optimizer.param_groups:
                if "lr" in group:
                    group["lr"] = group["lr"] * self._rate

    def restore_rates(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the learning rates to what they were before the step: schedulers and users see only those."""
        rates = self._rates.pop(optimizer, None)
        if rates is not None:
            for group in optimizer.param_groups:
                if "lr" in group:
                    group["lr"] = rates.pop(0)

    def after_step(self) -> None:
        """Set the pruned weights to zero or to the base's values."""
        for parameter, own in self._bound():
            own.restore(parameter.data)  # unseen by autograd: another backward may still use it

    def _bound(self) -> Iterator[tuple[torch.Tensor, Pruned]]:
        for hold, own in self._pruned.values():
            if (parameter := hold()) is not None:
                yield parameter, own


class MaskedTraining:
    """A model that is kept in a mask's subspace, until :meth:`remove` or the end of a ``with`` block.

    After the block, the mask from before it is in force again.
    """

    def __init__(self, key: Key, masking: _Masking | None, outer: _Masking | None) -> None:
        self._key, self._masking, self._outer = key, masking, outer

    def remove(self) -> None:
        """Release the model; it then trains dense."""
        with _lock:
            if self._masking is not None:
                self._masking.end()
                if _in_force.get(self._key) is self._masking:
                    del _in_force[self._key]
        self._masking = None

    def __enter__(self) -> MaskedTraining:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _lock:
            ours = _in_force.get(self._key) is self._masking  # a call in the block may have replaced it
            self.remove()
            if ours and self._outer is not None and self._outer.may_go_on():
                self._outer.bind()
                _in_force[self._key] = self._outer


# one model trains under one mask: a second call replaces the first
_in_force: dict[Key, _Masking] = {}
_lock = RLock()  # several threads may train their own models


def _gone(key: Key, in_force: dict[Key, _Masking] = _in_force) -> None:
    # without the lock, since Python may collect a model at any time (at exit even after emptying this module)
    in_force.pop(key, None)


def _maskings(optimizer: torch.optim.Optimizer) -> tuple[list[_Masking], set[int]]:
    """Return the maskings in force, and the ids of the optimizer's parameters."""
    with _lock:
        maskings = list(_in_force.values())
    return maskings, {id(p) for group in optimizer.param_groups for p in group["params"]} if maskings else set()


def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    maskings, parameters = _maskings(optimizer)
    for masking in maskings:
        masking.follow(parameters)
        if masking.trained_by(parameters):
            masking.before_step(optimizer)
            masking.raise_rates(optimizer)


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    maskings, parameters = _maskings(optimizer)
    for masking in maskings:
        masking.restore_rates(optimizer)
        if masking.trained_by(parameters):
            masking.after_step()


# for all optimizers, since the one that will train the model need not exist yet
register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)


def apply_mask(
    model: nn.Module | Mapping[str, torch.Tensor],
    mask: Mask | Subspace | Context | None,
    *,
    names: Names | None = None,
) -> None:
    """Set the pruned entries of a model, in place, to the values outside the mask: zero, or the base's values.

    The parameters and the errors are those of :func:`masked_training`.
    """
    target = target_of(model, names, _gone)
    subspace, layout = subspace_and_layout(mask)
    if subspace is not None:
        for parameter, own in pruned_of(target, subspace).items():
            own.restore(parameter)
    elif layout is not None:
        target.find(layout)


def masked_training(
    model: nn.Module | Mapping[str, torch.Tensor],
    mask: Mask | Subspace | Context | None,
    *,
    names: Names | None = None,
) -> MaskedTraining:
    """Keep a model in a mask's subspace, whatever trains it.

    Pruned weights are set to zero, or to the base's values, now and after every step of any optimizer. Their gradients
    are set to zero as soon as they are computed. So moments stay at zero (except for what weight decay adds with a
    base), and gradient clipping sees the kept entries only. Nothing is added to the model or its state dict. Copies of
    the model are not masked. Parameters that are replaced later (``load_state_dict(assign=True)``) are bound at the
    next optimizer step.

    With the context, each step is made with the optimizer's learning rates times
    :func:`~autoflip_flwr.client.context.current_rate`, which the server sets (``lr_power``).

    Call it once before the training loop. The mask then holds until the next call for the same model. In a ``with``
    statement it holds until the end of the block; then the mask from before is in force again.

    Parameters
    ----------
    model : Module | Mapping[str, Tensor]
        The model whose ``state_dict`` (or parameters) the server sent; if a list was sent, in that order. It may be
        compiled or wrapped for data-parallel training. Or parameters under the names that the server sent.
    mask : Mask | Subspace | Context | None
        The context of the Flower client, which holds its current subspace. Or a subspace, or a mask, outside of which
        all is zero. ``None`` trains dense. So does an explorer's context, but then the names are checked.
    names : Mapping[str, str | Tensor] | None
        The server's name of an array -> the model's name of the parameter, or the parameter itself, if they differ.
        Name parts added by ``torch.compile``, ``DataParallel`` or PEFT (``lora_A.default.weight``) need no entry.

    Raises
    ------
    ValueError
        If the model lacks a prunable array that the server sent, or has it in another shape. If this is true of
        replaced parameters, the optimizer's step raises it.

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
    target = target_of(model, names, _gone)
    subspace, layout = subspace_and_layout(mask)
    if subspace is None and layout is not None:
        target.find(layout)
    with _lock:
        rate = current_rate(mask) if isinstance(mask, Context) else 1.0
        masking = None if subspace is None else _Masking(target, subspace, rate)
        outer = _in_force.pop(target.key, None)
        if outer is not None:
            outer.release()
        if masking is not None:
            _in_force[target.key] = masking
    return MaskedTraining(target.key, masking, outer)
