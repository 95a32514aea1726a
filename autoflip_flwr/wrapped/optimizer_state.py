"""Carry the state of Flower's own server optimisers from one mask to the next."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import (
    Strategy,
)
from numpy.typing import NDArray

from autoflip_flwr.core.layout import Arrays
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.subspace import Subspace
from autoflip_flwr.wrapped.traits import layers

_MOMENTS = ("momentum_vector", "m_t", "v_t")
_WEIGHTS = "current_arrays"


def carry_state(
    strategy: Strategy,
    names: list[str],
    old: Mask,
    subspace: Subspace,
    shadow: Arrays,
    *,
    packed: bool,
    was_packed: bool | None = None,
) -> None:
    """Carry the state of Flower's own server optimisers from one mask to the next.

    ``names`` are the names of the arrays that the strategy sees, in its order. Weights that a strategy keeps
    (``current_arrays``) are read from the dense shadow; outside the new mask they get the subspace's values. Moments
    are zero there, and start at zero where an entry has grown again. ``was_packed`` says whether the strategy saw
    packed arrays before; ``None``: as ``packed`` says.
    """
    new = subspace.mask

    def move(name: str, values: NDArray[np.generic], weights: bool) -> NDArray[np.generic]:
        full = np.array(shadow[name], values.dtype) if weights else np.zeros(new.layout[name].shape, values.dtype)
        if was_packed and old.layout[name].prunable:
            full.reshape(-1)[old.indices[name]] = values
        else:
            np.copyto(full, values, where=old.keep.get(name, np.True_))
        if packed and new.layout[name].prunable:
            return full.reshape(-1)[new.indices[name]]
        if new.layout[name].prunable:
            pruned = ~new.keep[name]
            full[pruned] = subspace.base[name][pruned] if weights and subspace.base is not None else 0
        return full

    def carried(state: Any, weights: bool) -> Any:
        if isinstance(state, ArrayRecord) and list(state) == names:
            return ArrayRecord({name: Array(move(name, array.numpy(), weights)) for name, array in state.items()})
        if isinstance(state, dict) and set(state) <= set(names):
            return {name: move(name, values, weights) for name, values in state.items()}
        if isinstance(state, list) and len(state) == len(names):
            return [move(name, values, weights) for name, values in zip(names, state, strict=True)]
        if packed or was_packed:
            raise TypeError(
                f"state of type {type(state).__name__} cannot follow a change of the mask: use coordinates='dense'"
            )
        return state

    was_packed = packed if was_packed is None else was_packed
    if old.digest == new.digest and packed == was_packed:
        return
    for layer in layers(strategy):
        for attribute in (*_MOMENTS, _WEIGHTS):
            state = getattr(layer, attribute, None)
            if state is not None and not (isinstance(state, Sized) and len(state) == 0):
                setattr(layer, attribute, carried(state, weights=attribute == _WEIGHTS))
