"""The pruned entries of parameters, and their values: zero, or the base's."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray

from autoflip_flwr.core.subspace import Subspace
from autoflip_flwr.torch.targets import Model, Parameters

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by their size in bytes."""


class Pruned:
    """The pruned entries of one parameter, and their values.

    It does not hold the parameter, since Python cannot collect a cycle through a gradient hook (nor the model in it).

    Parameters
    ----------
    entries : Tensor
        Booleans in the parameter's shape, True where it is pruned.
    base : Tensor | None
        Values in the parameter's shape; only those of the pruned entries are used. ``None``: zero.
    """

    def __init__(self, entries: torch.Tensor, base: torch.Tensor | None) -> None:
        self._entries, self._base = entries, base
        self._bits: dict[tuple[torch.device, torch.dtype], tuple[torch.Tensor, torch.Tensor | None]] = {}

    def __or__(self, other: Pruned) -> Pruned:
        """Return the union of the pruned entries. Where both prune, this one's base holds."""
        base = self._base
        if base is not None and other._base is not None:
            base = torch.where(self._entries, base, other._base)
        return Pruned(self._entries | other._entries, base)

    def entries(self, device: torch.device) -> torch.Tensor:
        """Return booleans in the parameter's shape, True where it is pruned, on the given device."""
        if self._entries.device != device:
            self._entries = self._entries.to(device)
        return self._entries

    @torch.no_grad()
    def zero(self, values: torch.Tensor) -> None:
        """Set the pruned entries to zero, in the parameter or in a tensor of its shape."""
        values.view(_INTEGERS[values.itemsize]).bitwise_and_(self._bits_for(values)[0])

    @torch.no_grad()
    def restore(self, values: torch.Tensor) -> None:
        """Set the pruned entries of the parameter to their values, rounded to the parameter's dtype."""
        kept, base = self._bits_for(values)
        bits = values.view(kept.dtype).bitwise_and_(kept)
        if base is not None:
            bits.bitwise_or_(base)

    def _bits_for(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return integers for tensors like ``values``: all bits of the kept entries, and the bits of the base outside.

        Filling by booleans takes some ten times as long on a CPU. Multiplying by 0 would leave NaN and negative zeros.
        """
        device, dtype = values.device, values.dtype
        if (device, dtype) not in self._bits:
            integer, pruned = _INTEGERS[values.itemsize], self.entries(device)
            kept = pruned.to(integer) - 1  # -1 has all bits
            base = None
            if self._base is not None:
                base = self._base.to(device, dtype, copy=True).view(integer) * pruned
            self._bits = {(device, dtype): (kept, base)}
        return self._bits[device, dtype]

    def zero_grad(self, parameter: torch.Tensor) -> None:
        """Set the pruned entries of the gradient to zero. If the weights are zero, zero moments then stay zero."""
        grad = parameter.grad
        if grad is not None and grad.is_sparse:  # rows of an embedding
            parameter.grad = grad = grad.coalesce()
            grad.values().masked_fill_(self.entries(grad.device)[grad.indices()[0]], 0)
        elif grad is not None:
            self.zero(grad)


def pruned_of(target: Model | Parameters, subspace: Subspace) -> dict[torch.Tensor, Pruned]:
    """Return the parameters that have pruned entries, with these entries."""
    found: dict[torch.Tensor, Pruned] = {}
    for name, parameter in target.find(subspace.mask.layout).items():
        keep = subspace.mask.keep[name]
        if not keep.all():
            base = None if subspace.base is None else _tensor(subspace.base[name], parameter.device)
            pruned = Pruned(_tensor(~keep, parameter.device), base)
            # tied weights have several names: an entry is pruned if it is under any of them
            found[parameter] = pruned | found[parameter] if parameter in found else pruned
    return found


def _tensor(values: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Return a copy as a tensor, since the array may be read-only."""
    return torch.from_numpy(values if values.flags.writeable else values.copy()).to(device)
