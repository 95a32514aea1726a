"""Training under a mask: pruned weights stay at zero or at the base's values, their gradients at zero."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from threading import RLock
from types import TracebackType
from typing import Any
from weakref import WeakSet

import torch
from flwr.app import Context
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from autoflip_flwr.client.context import subspace_and_layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.subspace import Subspace
from autoflip_flwr.torch.names import Names
from autoflip_flwr.torch.pruned import Pruned, pruned_of
from autoflip_flwr.torch.targets import Holder, Key, Model, Parameters, target_of


class _Masking:
    """A target that is kept in a mask's subspace, until it is ended."""

    def __init__(self, target: Model | Parameters, subspace: Subspace) -> None:
        self._target, self._subspace = target, subspace
        self._pruned: dict[int, tuple[Holder, Pruned]] = {}
        self._known: WeakSet[torch.optim.Optimizer] = WeakSet()
        self._handles: list[RemovableHandle] = []
        self._ended = False
        self.bind()

    def bind(self) -> None:
        """Take hold of the parameters that the target has now.

        Raises
        ------
        ValueError
            If they are not those that the server sent; then nothing is changed.
        """
        pruned = pruned_of(self._target, self._subspace)
        self.release()
        for parameter, own in pruned.items():
            if parameter.requires_grad:
                # torch.utils.swap_tensors takes the hooks along, but not what calls them
                parameter._post_accumulate_grad_hooks = parameter._post_accumulate_grad_hooks
                handle = parameter.register_post_accumulate_grad_hook(own.zero_grad)  # type: ignore[no-untyped-call]
                self._handles.append(handle)
        self._target.watch(pruned.keys())
        self._pruned = {id(parameter): (self._target.hold(parameter), own) for parameter, own in pruned.items()}
        self._known = WeakSet()
        self.after_step()

    def may_go_on(self) -> bool:
        """Whether it has neither been ended nor lost its target."""
        return self._target.alive() and not self._ended

    def end(self) -> None:
        """Let go of the parameters for good."""
        self._ended = True
        self.release()

    def release(self) -> None:
        """Let go of the parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._pruned = [], {}

    def trained_by(self, parameters: set[int]) -> bool:
        """Whether an optimizer of parameters with these ids trains the target."""
        return not parameters.isdisjoint(self._pruned)

    def follow(self, parameters: set[int]) -> None:
        """Bind again if parameters were replaced and an optimizer of these trains the target."""
        if not self._target.replaced():
            return
        if self.trained_by(parameters) or not parameters.isdisjoint(self._target.now()):
            try:
                with _lock:  # of one model, several threads may step
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

    def after_step(self) -> None:
        """Set the pruned weights to what stands there."""
        for parameter, own in self._bound():
            own.restore(parameter.data)  # no change in autograd's books: another loss may still go back through it

    def _bound(self) -> Iterator[tuple[torch.Tensor, Pruned]]:
        for hold, own in self._pruned.values():
            if (parameter := hold()) is not None:
                yield parameter, own


class MaskedTraining:
    """A model that is kept in a mask's subspace, until :meth:`remove` or the end of a ``with`` block.

    After the block the mask is in force that was so before it.
    """

    def __init__(self, key: Key, masking: _Masking | None, outer: _Masking | None) -> None:
        self._key, self._masking, self._outer = key, masking, outer

    def remove(self) -> None:
        """Let go of the model; it then trains dense."""
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
            ours = _in_force.get(self._key) is self._masking  # a call in the block may have taken its place
            self.remove()
            if ours and self._outer is not None and self._outer.may_go_on():
                self._outer.bind()
                _in_force[self._key] = self._outer


# one model trains under one mask: a second call takes the place of the first
_in_force: dict[Key, _Masking] = {}
_lock = RLock()  # threads may train models of their own


def _gone(key: Key, in_force: dict[Key, _Masking] = _in_force) -> None:
    # without the lock, since Python may collect a model at any time; at exit, after it has emptied this module
    in_force.pop(key, None)


def _maskings(optimizer: torch.optim.Optimizer) -> tuple[list[_Masking], set[int]]:
    """Those in force, and the ids of the optimizer's parameters."""
    with _lock:
        maskings = list(_in_force.values())
    return maskings, {id(p) for group in optimizer.param_groups for p in group["params"]} if maskings else set()


def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    maskings, parameters = _maskings(optimizer)
    for masking in maskings:
        masking.follow(parameters)
        if masking.trained_by(parameters):
            masking.before_step(optimizer)


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    maskings, parameters = _maskings(optimizer)
    for masking in maskings:
        if masking.trained_by(parameters):
            masking.after_step()


# of all optimizers: the one that will train the model need not exist yet
register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)


def apply_mask(
    model: nn.Module | Mapping[str, torch.Tensor],
    mask: Mask | Subspace | Context | None,
    *,
    names: Names | None = None,
) -> None:
    """Set the pruned parameters of a model to what stands outside the mask, in place: zero, or the base's values.

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

    Pruned weights are set to zero, or to the base's values, now and after every step of any optimizer; their gradients
    are set to zero as soon as they are there, so that moments stay at zero (but for what weight decay adds beside a
    base) and clipping sees what is kept alone. Nothing is added to the model or its state
    dict, and a copy of the model is free. Parameters that are replaced later on (``load_state_dict(assign=True)``) are
    bound by the next step of an optimizer.

    Call it once before the training loop; the mask then holds until the next call for the same model. In a ``with``
    block it ends with the block, after which the mask is in force that was so before.

    Parameters
    ----------
    model : Module | Mapping[str, Tensor]
        The model whose ``state_dict`` (or whose parameters) the server sent, compiled or wrapped for data-parallel
        training or not; where a list was sent, in that order. Or parameters under the names that the server sent.
    mask : Mask | Subspace | Context | None
        The context of the Flower client: then it is its current subspace. Or a subspace; or a mask alone, outside of
        which all is zero. ``None`` trains dense. So do explorers, but from their context the names are checked already.
    names : Mapping[str, str | Tensor] | None
        The server's name of an array -> the model's own name of the parameter, or the parameter, where they differ.
        Components that ``torch.compile``, ``DataParallel`` or PEFT (``lora_A.default.weight``) put in need none.

    Raises
    ------
    ValueError
        If the model lacks a prunable array that the server sent, or has it in another shape; from an optimizer's step
        if that is so of parameters that were replaced.

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
        masking = None if subspace is None else _Masking(target, subspace)
        outer = _in_force.pop(target.key, None)
        if outer is not None:
            outer.release()
        if masking is not None:
            _in_force[target.key] = masking
    return MaskedTraining(target.key, masking, outer)
