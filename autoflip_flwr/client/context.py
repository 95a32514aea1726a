"""What a client's own code asks of its context: the mask in force, and the layout of the model that was sent."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

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
"""Record of an explorer's state: the layout of the model that it was sent."""


def current_mask(context: Context) -> Mask | None:
    """The mask in force for the message that is being handled, or ``None`` (exploration, or no AutoFLIP).

    A client trains under it by setting the pruned weights back after every step, to zero, or to what
    :func:`current_subspace` says: :func:`apply_mask` does so for NumPy arrays,
    :func:`autoflip_flwr.torch.masked_training` for a PyTorch model. ``mask.keep[name]`` is a boolean array in the shape
    of the weight of that name.
    """
    state = context.state.get(HEADER)
    if state is None or MASK_RECORD not in context.state or state.get("phase") != TRAIN:
        return None
    return mask_record.decode_mask(context.state[MASK_RECORD])


def current_subspace(context: Context) -> Subspace | None:
    """The mask in force for the message that is being handled, and what stands outside it; ``None`` as there.

    Its ``base`` is None where the server prunes to zero (``outside="zero"``), else the prunable arrays by name,
    read-only: pruned entries stand at its values.
    """
    mask = current_mask(context)
    return None if mask is None else Subspace(mask, base_in_force(context, mask.layout))


def subspace_and_layout(mask: Mask | Subspace | Context | None) -> tuple[Subspace | None, Layout | None]:
    """The subspace in force, and the layout of the model that the server sent; a mask alone: zero outside it.

    While a client explores there is a layout without a mask: names can be checked before the exploration is spent.
    """
    if isinstance(mask, Context):
        phase = mask.state.get(HEADER, ConfigRecord()).get("phase")
        if phase == EXPLORE and LAYOUT in mask.state:
            return None, mask_record.decode_layout(mask.state.config_records[LAYOUT])
        mask = current_subspace(mask)
    subspace = Subspace(mask) if isinstance(mask, Mask) else mask
    return subspace, None if subspace is None else subspace.mask.layout


def sent_array(layout: Layout, name: str, shape: tuple[int, ...]) -> ArraySpec:
    """The array of this name and shape that the server sent.

    Raises
    ------
    ValueError
        If there is none. The text says what was sent, and which of it fits.
    """
    if name not in layout:
        sent = [spec.name for spec in layout.specs][:5]
        fits = get_close_matches(name, [spec.name for spec in layout.specs if spec.shape == shape], 1, cutoff=0)
        raise ValueError(f"the server sent no {name!r}; it sent {sent}" + "".join(f", {fit!r} fits" for fit in fits))
    if shape != layout[name].shape:
        raise ValueError(f"array {name!r} has shape {shape}, the mask {layout[name].shape}")
    return layout[name]


def apply_mask(arrays: Mapping[str, NDArray[np.generic]], mask: Mask | Subspace | Context | None) -> None:
    """Set the pruned entries of NumPy arrays to what stands outside the mask, in place: zero, or the base's values.

    A client calls it after each step of its training: ``apply_mask({"coef": model.coef_}, context)``. While it explores
    nothing is changed, and names and shapes are checked.

    Parameters
    ----------
    arrays : Mapping[str, ndarray]
        Some or all of the model's arrays, under the names that the server sent them by.
    mask : Mask | Subspace | Context | None
        The context of the Flower client: then it is :func:`current_subspace` of it. Or a subspace; or a mask alone,
        outside of which all is zero. ``None`` changes nothing.

    Raises
    ------
    ValueError
        If a name or shape is not that of an array that the server sent; then nothing is changed.
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
