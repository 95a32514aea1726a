"""Error feedback: send quantised updates, and add the rounding error to the next update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context
from numpy.typing import NDArray

from autoflip_flwr.core.mask import Mask
from autoflip_flwr.wire import mask_record
from autoflip_flwr.wire.keys import MASK_RECORD
from autoflip_flwr.wire.messages import flatten, kept_and_size, pack_values, split_vectors
from autoflip_flwr.wire.records import WireError, make_array
from autoflip_flwr.wire.values import Coded, coded_size, encode, is_coded

RESIDUAL = "autoflip.residual"


def pack_reply(
    context: Context, mask: Mask, kind: str, packed: Mapping[str, NDArray[Any]], start: Mapping[str, NDArray[Any]]
) -> ArrayRecord:
    """Pack a client's reply; 8-bit values use error feedback from the node's state.

    If values are quantised, the reply holds the update (returned values minus sent values), since the rounding error is
    relative to what is quantised. The rounding error of int8 is kept in ``context.state``, itself in int8, and added to
    the node's next update. A node that loses its state loses only this remainder.

    Parameters
    ----------
    context : Context
        Context of the Flower client.
    mask : Mask
        The mask under which the reply is packed.
    kind : str
        Encoding of the values, one of :data:`~autoflip_flwr.core.choices.VALUES`.
    packed : Mapping[str, ndarray]
        The packed arrays that the client returns.
    start : Mapping[str, ndarray]
        The flat vectors that the client was sent, by dtype.

    Raises
    ------
    WireError
        If an update that is to be quantised is not finite.
    """
    if kind == "float32":
        return pack_values(mask, packed)
    vectors = flatten(mask, packed)
    lost = ConfigRecord({"digest": mask.digest})
    before = context.state.get(RESIDUAL, ConfigRecord())
    for dtype, specs in mask.layout.by_dtype.items():
        if not is_coded(kind, dtype):
            continue
        kept, size = kept_and_size(mask, specs)
        update = np.subtract(vectors[dtype], start[dtype], dtype=np.promote_types(dtype, np.float32))
        if not np.isfinite(update).all():
            raise WireError(f"the client returned {dtype} values with NaN or infinity")
        if kind == "int8":
            update += _remainder(before, mask, dtype, kept, size)
        vectors[dtype] = coded = encode(kind, update, kept)
        if kind == "int8":
            update -= Coded(coded, kind, kept, size).read(0, size)
            lost[dtype] = encode(kind, update, kept).tobytes()
    if kind == "int8":
        context.state[RESIDUAL] = lost
    return ArrayRecord({dtype: make_array([vector]) for dtype, vector in vectors.items()})


def follow_mask(context: Context, new: Mask) -> None:
    """Carry the rounding error of the last reply over to a new mask, before the node's state gets it.

    What the new mask no longer keeps is lost, and what it keeps anew has no error yet. Without this, a mask that
    changes in every round would switch error feedback off.
    """
    before, known = context.state.get(RESIDUAL), context.state.get(MASK_RECORD)
    if before is None or known is None:
        return
    old = mask_record.decode_mask(known)
    if old.digest == new.digest or before.get("digest") != old.digest or old.layout.specs != new.layout.specs:
        return
    moved = ConfigRecord({"digest": new.digest})
    for dtype, specs in old.layout.by_dtype.items():
        remainder = _remainder(before, old, dtype, *kept_and_size(old, specs))
        if isinstance(remainder, float):
            continue
        parts = split_vectors(old, {dtype: remainder})
        for spec in specs:
            if spec.prunable:
                full = np.zeros(spec.size, np.float32)
                full[old.indices[spec.name]] = parts[spec.name]
                parts[spec.name] = full[new.indices[spec.name]]
        flat = np.concatenate([parts[spec.name].reshape(-1) for spec in specs])
        moved[dtype] = encode("int8", flat, kept_and_size(new, specs)[0]).tobytes()
    context.state[RESIDUAL] = moved


def _remainder(before: Any, mask: Mask, dtype: str, kept: int, size: int) -> NDArray[np.float32] | float:
    """Return the rounding error of the last reply under this mask; 0 if there was none."""
    data = before.get(dtype, b"")
    if before.get("digest") != mask.digest or len(data) != coded_size("int8", kept, size):
        return 0.0
    return Coded(np.frombuffer(data, np.uint8), "int8", kept, size).read(0, size)
