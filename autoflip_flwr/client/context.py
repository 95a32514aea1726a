"""What a client's own code can get from its context: the current mask, and the layout of the model that was sent."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import cast

import numpy as np
from flwr.app import ConfigRecord, Context
from numpy.typing import NDArray

from autoflip_flwr.client.held import base_in_force
from autoflip_flwr.core.layout import ArraySpec, Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.subspace import Subspace
from autoflip_flwr.wire import mask_record
from autoflip_flwr.wire.keys import (
    EXPLORE,
    HEADER,
    MASK_RECORD,
    TRAIN,
)

LAYOUT = "autoflip.layout"
"""Name of the record of an explorer's state with the layout of the model that it was sent."""


def current_mask(context: Context) -> Mask | None:
    """Return the mask for the current message, or ``None`` (exploration, or no AutoFLIP).

    To train under the mask, a client resets the pruned weights after every step, to zero or to the values of
    :func:`current_subspace`. :func:`apply_mask` does so for NumPy arrays,
    :func:`autoflip_flwr.torch.masked_training` for a PyTorch model. ``mask.keep[name]`` is a boolean array in the shape
    of the weight of that name.
    """
    state = context.state.get(HEADER)
    if state is None or MASK_RECORD not in context.state or state.get("phase") != TRAIN:
        return None
    return mask_record.decode_mask(context.state[MASK_RECORD])


def current_subspace(context: Context) -> Subspace | None:
    """Return the mask for the current message with the values of pruned entries; ``None`` if there is no mask.

    Its ``base`` is None if the server prunes to zero (``outside="zero"``). Otherwise it holds the prunable arrays by
    name, read-only, with the values of the pruned entries.
    """
    mask = current_mask(context)
    return None if mask is None else Subspace(mask, base_in_force(context, mask.layout))


def current_rate(context: Context) -> float:
    """Return the factor for the client's learning rate in the current message; 1.0 if there is none.

    A sparse model changes less in a step than a dense one at the same learning rate. So the server asks for a larger
    one where it prunes much (``lr_power`` of :class:`~autoflip_flwr.server.strategy.Pruned`).
    :func:`autoflip_flwr.torch.masked_training` applies it when it is given the context; other clients multiply.
    """
    state = context.state.get(HEADER)
    if state is None or MASK_RECORD not in context.state or state.get("phase") != TRAIN:
        return 1.0
    return float(cast(float, state.get("rate", 1.0)))


def subspace_and_layout(mask: Mask | Subspace | Context | None) -> tuple[Subspace | None, Layout | None]:
    """Return the current subspace, and the layout of the model that the server sent; for a mask, zero is its base.

    During exploration there is a layout without a mask, so that names are checked before the client spends its effort.
    """
    if isinstance(mask, Context):
        phase = mask.state.get(HEADER, ConfigRecord()).get("phase")
        if phase == EXPLORE and LAYOUT in mask.state:
            return None, mask_record.decode_layout(mask.state.config_records[LAYOUT])
        mask = current_subspace(mask)
    subspace = Subspace(mask) if isinstance(mask, Mask) else mask
    return subspace, None if subspace is None else subspace.mask.layout


def sent_array(layout: Layout, name: str, shape: tuple[int, ...]) -> ArraySpec:
    """Return the spec of the array of this name and shape that the server sent.

    Raises
    ------
    ValueError
        If there is none. The text lists what was sent, and which array fits.
    """
    if name not in layout:
        sent = [spec.name for spec in layout.specs][:5]
        fits = get_close_matches(name, [spec.name for spec in layout.specs if spec.shape == shape], 1, cutoff=0)
        raise ValueError(f"the server sent no {name!r}; it sent {sent}" + "".join(f", {fit!r} fits" for fit in fits))
    if shape != layout[name].shape:
        raise ValueError(f"array {name!r} has shape {shape}, the mask {layout[name].shape}")
    return layout[name]


def apply_mask(arrays: Mapping[str, NDArray[np.generic]], mask: Mask | Subspace | Context | None) -> None:
    """Reset the pruned entries of NumPy arrays in place, to zero or to the base's values.

    A client calls it after each training step: ``apply_mask({"coef": model.coef_}, context)``. During exploration,
    nothing is changed, but names and shapes are checked.

    Parameters
    ----------
    arrays : Mapping[str, ndarray]
        Some or all of the model's arrays, under the server's names.
    mask : Mask | Subspace | Context | None
        The context of the Flower client, to use its :func:`current_subspace`; or a subspace; or a mask, to set pruned
        entries to zero. ``None`` changes nothing.

    Raises
    ------
    ValueError
        If a name or shape is not that of an array that the server sent; nothing is changed in that case.
    """
    subspace, layout = subspace_and_layout(mask)
    if layout is None:
        return
    for name, array in arrays.items():
        sent_array(layout, name, array.shape)
    if subspace is None:
        return
    for name in arrays.keys() & subspace.mask.keep.keys():
        pruned = ~subspace.mask.keep[name]
        arrays[name][pruned] = 0 if subspace.base is None else subspace.base[name][pruned]
