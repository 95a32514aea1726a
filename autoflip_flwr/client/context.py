"""What a client's own code asks of its context: the mask in force, and the layout of the model that was sent."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

import numpy as np
from flwr.app import ConfigRecord, Context
from numpy.typing import NDArray

from autoflip_flwr.core.layout import ArraySpec, Layout
from autoflip_flwr.core.mask import Mask
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

    A client trains under it by keeping the pruned weights at zero after every step: :func:`apply_mask` does so for
    NumPy arrays, :func:`autoflip_flwr.torch.masked_training` for a PyTorch model. ``mask.keep[name]`` is a boolean
    array in the shape of the weight of that name.
    """
    state = context.state.get(HEADER)
    if state is None or MASK_RECORD not in context.state or state.get("phase") != TRAIN:
        return None
    return mask_record.decode_mask(context.state[MASK_RECORD])


def mask_and_layout(mask: Mask | Context | None) -> tuple[Mask | None, Layout | None]:
    """The mask in force, and the layout of the model that the server sent.

    While a client explores there is a layout without a mask: names can be checked before the exploration is spent.
    """
    if isinstance(mask, Context):
        context, mask = mask, current_mask(mask)
        phase = context.state.get(HEADER, ConfigRecord()).get("phase")
        if phase == EXPLORE and LAYOUT in context.state:
            return None, mask_record.decode_layout(context.state.config_records[LAYOUT])
    return mask, None if mask is None else mask.layout


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


def apply_mask(arrays: Mapping[str, NDArray[np.generic]], mask: Mask | Context | None) -> None:
    """Set the pruned entries of NumPy arrays to zero, in place.

    A client calls it after each step of its training: ``apply_mask({"coef": model.coef_}, context)``. While it explores
    nothing is changed, and names and shapes are checked.

    Parameters
    ----------
    arrays : Mapping[str, ndarray]
        Some or all of the model's arrays, under the names that the server sent them by.
    mask : Mask | Context | None
        The mask, or the context of the Flower client: then it is :func:`current_mask` of it. ``None`` changes nothing.

    Raises
    ------
    ValueError
        If a name or shape is not that of an array that the server sent; then nothing is changed.
    """
    mask, layout = mask_and_layout(mask)
    if layout is None:
        return
    for name, array in arrays.items():
        sent_array(layout, name, array.shape)
    keep = {} if mask is None else mask.keep
    for name in arrays.keys() & keep.keys():
        arrays[name][~keep[name]] = 0
