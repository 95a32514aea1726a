"""The pruned entries of parameters, and what stands there: zero, or the base's values."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray

from autoflip_flwr.core.subspace import Subspace
from autoflip_flwr.torch.targets import Model, Parameters


class Pruned:
    """The pruned entries of one parameter, and what stands there.

    It holds no parameter: Python cannot collect a cycle through a gradient hook, nor the model with it.

    Parameters
    ----------
    entries : Tensor
        Booleans in the parameter's shape, True where it is pruned.
    base : Tensor | None
        Values in the parameter's shape, of which those of the pruned entries matter; ``None``: zero.
    """

    def __init__(self, entries: torch.Tensor, base: torch.Tensor | None) -> None:
        self._entries, self._base = entries, base
        self._cast = base  # as the parameter is now

    def __or__(self, other: Pruned) -> Pruned:
        """What either prunes; where both do, this one's base."""
        base = self._base
        if base is not None and other._base is not None:
            base = torch.where(self._entries, base, other._base)
        return Pruned(self._entries | other._entries, base)

    def entries(self, device: torch.device) -> torch.Tensor:
        """Booleans in the parameter's shape, True where it is pruned, on the device to which it has been moved."""
        if self._entries.device != device:
            self._entries = self._entries.to(device)
        return self._entries

    @torch.no_grad()
    def zero(self, values: torch.Tensor) -> None:
        """Set them to zero, in the parameter itself or in what has its shape."""
        values.masked_fill_(self.entries(values.device), 0)

    @torch.no_grad()
    def restore(self, values: torch.Tensor) -> None:
        """Set them to what stands there, in the parameter itself; rounded, where it is of fewer digits."""
        if self._base is None or self._cast is None:
            self.zero(values)
            return
        if (self._cast.device, self._cast.dtype) != (values.device, values.dtype):
            self._cast = self._base.to(values.device, values.dtype)
        torch.where(self.entries(values.device), self._cast, values, out=values)

    def zero_grad(self, parameter: torch.Tensor) -> None:
        """Set the gradient's to zero: with zero weights, moments that are zero stay so, whatever is decayed."""
        grad = parameter.grad
        if grad is not None and grad.is_sparse:  # rows of an embedding
            parameter.grad = grad = grad.coalesce()
            grad.values().masked_fill_(self.entries(grad.device)[grad.indices()[0]], 0)
        elif grad is not None:
            self.zero(grad)


def pruned_of(target: Model | Parameters, subspace: Subspace) -> dict[torch.Tensor, Pruned]:
    """The parameters that lose entries, with those."""
    found: dict[torch.Tensor, Pruned] = {}
    for name, parameter in target.find(subspace.mask.layout).items():
        keep = subspace.mask.keep[name]
        if not keep.all():
            base = None if subspace.base is None else _tensor(subspace.base[name], parameter.device)
            pruned = Pruned(_tensor(~keep, parameter.device), base)
            # tied weights go by several names: what one of them prunes is pruned
            found[parameter] = pruned | found[parameter] if parameter in found else pruned
    return found


def _tensor(values: NDArray[Any], device: torch.device) -> torch.Tensor:
    """A tensor of its own: the array may be read-only."""
    return torch.from_numpy(values if values.flags.writeable else values.copy()).to(device)
