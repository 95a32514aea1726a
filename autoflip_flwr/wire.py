"""The wire format: (mask, packed arrays) <-> Flower records.

A message of AutoFLIP is a Flower message whose content holds, beside the records that the wrapped strategy and the
client's own code know,

- the ``ArrayRecord``, packed: one flat 1-D array for each dtype of the model (key: the dtype's name), the values of the
  packed arrays one after another in the model's order;
- ``HEADER``, a small ``ConfigRecord``: format version, phase, round, mask digest; in replies also the values'
  fingerprint;
- ``MASK``, a ``ConfigRecord`` with the model's layout and the mask's bits, only where the node may lack them.

Nothing is unpickled or evaluated, every size is checked against what the receiver expects before anything is
allocated, and the one error that comes out is :class:`WireError`.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from autoflip_flwr.layout import Arrays, ArraySpec, Layout
from autoflip_flwr.mask import Mask

FORMAT = 1
HEADER = "autoflip"
MASK = "autoflip.mask"

HELLO, EXPLORE, TRAIN, EVALUATE = "hello", "explore", "train", "evaluate"
MASK_MISSING = "mask-missing"
MOD_REFUSED = 6
"""Flower's error code of a mod that refuses a message."""
PHASES = (HELLO, EXPLORE, TRAIN, EVALUATE)

MAX_LAYOUT_BYTES = 16 * 2**20
MAX_ENTRIES = 2**33
MAX_DIMENSIONS = 32
SAMPLE_BYTES = 4096

_NPY = re.compile(rb"\{'descr': '([<>|=]?[a-z][0-9]+)', 'fortran_order': False, 'shape': \(([0-9]{1,19}),\), \} *\n")
_DTYPES = ("float16", "float32", "float64", *(f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64)), "bool")


class WireError(ValueError):
    """A message does not keep to the wire format; the text is cut at 500 characters, since it may quote the message."""

    def __init__(self, text: str) -> None:
        super().__init__(text[:500])


def header(phase: str, round_: int, mask: Mask | None = None, **extra: int | str) -> ConfigRecord:
    """Make the header record of a message or reply."""
    values: dict[str, Any] = {"format": FORMAT, "phase": phase, "round": round_, **extra}
    if mask is not None:
        values |= {"digest": mask.digest, "version": mask.version}
    return ConfigRecord(values)


def weight_key(name: str) -> dict[str, str]:
    """What a message's header says of the metric by which replies are weighed; nothing where there is none."""
    return {"weight-key": name} if name else {}


def read_header(content: RecordDict) -> ConfigRecord | None:
    """The header of a message, checked; ``None`` if the message is not one of AutoFLIP's."""
    record = content.get(HEADER)
    if record is None:
        return None
    if not isinstance(record, ConfigRecord):
        raise WireError(f"record {HEADER!r} must be a ConfigRecord")
    if record.get("format") != FORMAT:
        raise WireError(
            f"wire format {record.get('format')!r}, this side speaks {FORMAT}: "
            "install the same autoflip-flwr on both sides"
        )
    if record.get("phase") not in PHASES:
        raise WireError(f"phase {record.get('phase')!r}: must be one of {', '.join(PHASES)}")
    if type(record.get("round")) is not int:
        raise WireError("the header lacks the round")
    return record


def encode_mask(mask: Mask) -> ConfigRecord:
    """Layout and bits: zlib where that is smaller, nothing at all for a mask that keeps everything."""
    record = ConfigRecord({"layout": _encode_layout(mask.layout), "encoding": "full", "version": mask.version})
    if not mask.is_full:
        packed = zlib.compress(mask.bits, 9)
        smaller = len(packed) < len(mask.bits)
        record["encoding"], record["bits"] = ("zlib", packed) if smaller else ("raw", mask.bits)
    return record


def decode_mask(record: object) -> Mask:
    """The mask of an ``encode_mask`` record (the last few are cached by content)."""
    if not isinstance(record, ConfigRecord):
        raise WireError(f"record {MASK!r} must be a ConfigRecord")
    layout, encoding, version = (record.get(key) for key in ("layout", "encoding", "version"))
    bits = record.get("bits", b"")
    if not (
        isinstance(layout, bytes) and isinstance(bits, bytes) and isinstance(encoding, str) and type(version) is int
    ):
        raise WireError("the mask record must hold layout and bits (bytes), encoding (str) and version (int)")
    return _decode_mask(layout, encoding, bits, version)


@lru_cache(maxsize=4)
def _decode_mask(layout_bytes: bytes, encoding: str, bits: bytes, version: int) -> Mask:
    layout = _decode_layout(layout_bytes)
    if encoding == "full" and not bits:
        return Mask.full(layout, version)
    if encoding == "zlib":
        bits = _inflate(bits, (layout.prunable_size + 7) // 8, "the mask's bits")
    elif encoding != "raw":
        raise WireError(f"mask encoding {encoding!r}: must be full, raw or zlib")
    try:
        return Mask(layout, bits, version)
    except ValueError as error:
        raise WireError(str(error)) from error


def pack(mask: Mask, packed: Mapping[str, NDArray[np.generic]]) -> ArrayRecord:
    """Packed arrays -> one flat array for each dtype, cast to the model's dtypes."""
    parts: dict[str, list[NDArray[np.generic]]] = {}
    for spec in mask.layout.specs:
        values = np.asarray(packed[spec.name])
        if values.shape != mask.packed_shape(spec.name):
            raise WireError(
                f"packed array {spec.name!r} has shape {values.shape}, expected {mask.packed_shape(spec.name)}"
            )
        parts.setdefault(spec.dtype, []).append(values.astype(spec.dtype, copy=False).reshape(-1))
    return ArrayRecord({dtype: Array(np.concatenate(values)) for dtype, values in parts.items()})


def unpack(mask: Mask, record: object) -> Arrays:
    """Flat arrays -> packed arrays: read-only views of the message's own bytes, nothing is copied.

    Raises
    ------
    WireError
        If the record lacks a dtype, has another one, or a length is not what the mask says.
    """
    if not isinstance(record, ArrayRecord):
        raise WireError("the packed values must be an ArrayRecord")
    sizes: dict[str, int] = {}
    for spec in mask.layout.specs:
        sizes[spec.dtype] = sizes.get(spec.dtype, 0) + _packed_size(mask, spec)
    if set(record) != set(sizes):
        raise WireError(f"packed values have the keys {sorted(record)[:5]}, expected {sorted(sizes)}")
    flat = {dtype: _view(record[dtype], dtype, size) for dtype, size in sizes.items()}
    starts = dict.fromkeys(sizes, 0)
    packed: Arrays = {}
    for spec in mask.layout.specs:
        start, size = starts[spec.dtype], _packed_size(mask, spec)
        packed[spec.name] = flat[spec.dtype][start : start + size].reshape(mask.packed_shape(spec.name))
        starts[spec.dtype] += size
    return packed


def fingerprint(record: ArrayRecord) -> int:
    """CRC-32 of a sample of the packed bytes: it tells whether another mod changed them on their way, at no cost.

    Flower's differential-privacy mods change every value. It is no protection against a client that lies.
    """
    found = 0
    for array in record.values():
        data = np.frombuffer(array.data, np.uint8)
        found = zlib.crc32(data[:: data.size // SAMPLE_BYTES | 1].tobytes(), found)  # odd: all bytes of a float
    return found


def _packed_size(mask: Mask, spec: ArraySpec) -> int:
    return mask.kept_by_name[spec.name] if spec.prunable else spec.size


def _view(array: Array, dtype: str, size: int) -> NDArray[np.generic]:
    """The values of a 1-D ``numpy.save`` image, after its header has been compared with what is expected."""
    data = array.data
    start = 10 + int.from_bytes(data[8:10], "little")
    match = _NPY.fullmatch(data[10:start]) if data[:8] == b"\x93NUMPY\x01\x00" else None
    if match is None:
        raise WireError(f"the {dtype} values are not a one-dimensional NumPy array")
    expected = np.dtype(dtype)
    if match[1].decode() != expected.str or int(match[2]) != size or len(data) - start != size * expected.itemsize:
        raise WireError(
            f"the {dtype} values are {int(match[2])} of type {match[1].decode()} in {len(data) - start} bytes, "
            f"expected {size} of type {expected.str}"
        )
    if dtype == "bool" and (np.frombuffer(data, np.uint8, offset=start) > 1).any():
        raise WireError("the bool values are not all 0 or 1")
    return np.frombuffer(data, expected, offset=start)


def _encode_layout(layout: Layout) -> bytes:
    specs = [[s.name, list(s.shape), s.dtype, int(s.prunable)] for s in layout.specs]
    return zlib.compress(json.dumps(specs, separators=(",", ":")).encode(), 9)


def _decode_layout(data: bytes) -> Layout:
    try:
        rows = json.loads(_inflate(data, None, "the layout"))
        specs = tuple(ArraySpec(name, tuple(shape), dtype, bool(prunable)) for name, shape, dtype, prunable in rows)
    except WireError:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise WireError(f"the layout cannot be read: {error}") from error
    for spec in specs:
        sound = isinstance(spec.name, str) and spec.dtype in _DTYPES and (spec.floating or not spec.prunable)
        sizes = all(type(n) is int and 0 <= n <= MAX_ENTRIES for n in spec.shape) and len(spec.shape) <= MAX_DIMENSIONS
        if not sound or not sizes or math.prod(n or 1 for n in spec.shape) > MAX_ENTRIES:
            raise WireError(f"the layout holds an impossible array: {str(spec)[:200]}")
    try:
        layout = Layout(specs)
    except ValueError as error:
        raise WireError(f"the layout cannot be read: {error}") from error
    if layout.size > MAX_ENTRIES:
        raise WireError(f"a model of {layout.size} entries is more than the {MAX_ENTRIES} allowed")
    return layout


def _inflate(data: bytes, size: int | None, what: str) -> bytes:
    """Decompress, never beyond ``size`` bytes (exact) or ``MAX_LAYOUT_BYTES`` where the size is not known."""
    limit = MAX_LAYOUT_BYTES if size is None else size
    stream = zlib.decompressobj()
    try:
        result = stream.decompress(data, limit + 1)
    except zlib.error as error:
        raise WireError(f"{what}: {error}") from error
    if not stream.eof or stream.unused_data or len(result) > limit or (size is not None and len(result) != size):
        raise WireError(f"{what}: {len(data)} compressed bytes do not hold what is expected")
    return result
