"""Record of a mask: the model's layout and the mask's bits, or the change from a mask that the node has."""

from __future__ import annotations

import json
import math
import zlib
from functools import lru_cache
from typing import cast

from flwr.app import ConfigRecord

from autoflip_flwr.core.layout import ArraySpec, Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.wire import mask_bits, mask_change
from autoflip_flwr.wire.keys import MASK_RECORD
from autoflip_flwr.wire.records import WireError

MAX_LAYOUT_BYTES = 16 * 2**20
MAX_ENTRIES = 2**33
MAX_DIMENSIONS = 32

# A compressed layout or mask can expand to far more bytes than it has. Memory for them is therefore limited by the size
# of the message: a fixed free amount, plus an amount per byte of the message.
FREE_LAYOUT_BYTES, LAYOUT_BYTES_A_BYTE = 2**18, 64
FREE_ENTRIES, ENTRIES_A_BYTE = 2**20, 2**11

_DTYPES = ("float16", "float32", "float64", *(f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64)), "bool")


def encode_mask(mask: Mask, base: Mask | None = None) -> ConfigRecord:
    """Make the record of a mask: its layout and bits, or its change from ``base``, of the same layout."""
    if base is not None:
        encoding, data = mask_change.encode_change(mask, base)
        return ConfigRecord({"encoding": encoding, "base": base.digest, "bits": data, "version": mask.version})
    encoding, data = mask_bits.encode(mask)
    record = ConfigRecord({"layout": _encode_layout(mask.layout), "encoding": encoding, "version": mask.version})
    if data:  # Flower's message_size_mod fails on empty values
        record["bits"] = data
    return record


def base_of(record: object) -> str:
    """Return the digest of the mask from which the record tells the change; "" if it holds a whole mask."""
    return str(record.get("base", "")) if isinstance(record, ConfigRecord) else ""


def decode_mask(record: object, base: Mask | None = None, *, carried: int | None = None) -> Mask:
    """Decode a record of :func:`encode_mask` (the last few masks are cached by content).

    Parameters
    ----------
    record : ConfigRecord
        Record of a message or of the node's own state.
    base : Mask | None
        The mask that the node has.
    carried : int | None
        Bytes of the arrays in the same message; they limit the number of entries of the mask. ``None`` for a record of
        the node's own state, which was checked on arrival.

    Raises
    ------
    WireError
        If the record does not follow the format.
    """
    if not isinstance(record, ConfigRecord):
        raise WireError(f"record {MASK_RECORD!r} must be a ConfigRecord")
    layout, encoding, version = (record.get(key) for key in ("layout", "encoding", "version"))
    data = record.get("bits", b"")
    changed = encoding in mask_change.CHANGES
    if changed:
        if base is None or base.digest != base_of(record):
            raise WireError("the mask is the change from one that is not here")
        layout = b""  # the base has the layout
    if not (
        isinstance(layout, bytes) and isinstance(data, bytes) and isinstance(encoding, str) and type(version) is int
    ):
        raise WireError("the mask record must hold layout and bits (bytes), encoding (str) and version (int)")
    try:
        if base is not None and changed:
            return Mask(base.layout, mask_change.decode_change(base, encoding, data), version)
        if carried is not None:
            check_entries(_decode_layout(layout).prunable_size, carried, full=encoding == "full")
        return _decode_mask(layout, encoding, data, version)
    except ValueError as error:
        raise WireError(str(error)) from error


def check_entries(entries: int, carried: int, *, full: bool) -> None:
    """Raise ``WireError`` if a mask has more entries than ``carried`` bytes of values allow."""
    # with a full mask, all values are sent, with at least one byte per value
    if entries > FREE_ENTRIES + carried * (1 if full else ENTRIES_A_BYTE):
        raise WireError(
            f"a mask of {entries} prunable entries with {carried} bytes of values: a client takes {FREE_ENTRIES}, and "
            f"{1 if full else ENTRIES_A_BYTE} more for each byte"
        )


@lru_cache(maxsize=4)
def _decode_mask(layout_bytes: bytes, encoding: str, data: bytes, version: int) -> Mask:
    layout = _decode_layout(layout_bytes)
    return Mask(layout, mask_bits.decode(layout, encoding, data), version)


def encode_layout(layout: Layout) -> ConfigRecord:
    """Make the record of a layout alone; an explorer's state keeps it instead of a full mask."""
    return ConfigRecord({"layout": _encode_layout(layout)})


def decode_layout(record: ConfigRecord) -> Layout:
    """Decode a record of :func:`encode_layout` from the node's own state."""
    return _decode_layout(cast(bytes, record["layout"]))


def _encode_layout(layout: Layout) -> bytes:
    specs = [[s.name, list(s.shape), s.dtype, int(s.prunable)] for s in layout.specs]
    return zlib.compress(json.dumps(specs, separators=(",", ":")).encode(), 9)


@lru_cache(maxsize=4)
def _decode_layout(data: bytes) -> Layout:
    limit = min(MAX_LAYOUT_BYTES, FREE_LAYOUT_BYTES + LAYOUT_BYTES_A_BYTE * len(data))
    try:
        rows = json.loads(mask_bits.inflate(data, limit, "the layout", exact=False).decode())
        layout = Layout(tuple(_spec(*row) for row in rows))
    except (ValueError, TypeError, RecursionError) as error:
        raise WireError(f"the layout cannot be read: {error}") from error
    if layout.size > MAX_ENTRIES:
        raise WireError(f"a model of {layout.size} entries is more than the {MAX_ENTRIES} allowed")
    return layout


def _spec(name: object, shape: object, dtype: object, prunable: object) -> ArraySpec:
    """Check a row of the layout, and return it as an :class:`ArraySpec`."""
    if isinstance(name, str) and isinstance(shape, list) and isinstance(dtype, str) and isinstance(prunable, int):
        sizes = all(type(n) is int and 0 <= n <= MAX_ENTRIES for n in shape) and len(shape) <= MAX_DIMENSIONS
        known = dtype in _DTYPES and prunable in (0, dtype.startswith("float"))
        if sizes and known and math.prod(n or 1 for n in shape) <= MAX_ENTRIES:
            return ArraySpec(name, tuple(shape), dtype, bool(prunable))
    raise ValueError(f"it holds an impossible array: {str((name, shape, dtype, prunable))[:200]}")
