"""The wire format: (mask, packed arrays) <-> Flower records. ``docs/wire.md`` specifies it.

A message of AutoFLIP is a Flower message whose content holds, beside the records that the wrapped strategy and the
client's own code know,

- the ``ArrayRecord``, packed: one flat vector for each dtype of the model (key: the dtype's name), first the kept
  values of the arrays that are pruned, in the model's order, then the other arrays; as they are, or coded
  (:mod:`autoflip_flwr.values`); an explorer's reply holds its coded moves instead (:mod:`autoflip_flwr.moves`);
- ``HEADER``, a small ``ConfigRecord``: format version, phase, round, mask digest, how the values are coded; in replies
  also the values' fingerprint;
- ``MASK``, a ``ConfigRecord`` with the model's layout and the mask's bits, only where the node may lack them
  (:mod:`autoflip_flwr.maskrecord`).

Nothing is unpickled or evaluated, every size is checked against what the receiver expects before anything is
allocated, and the one error that comes out is :class:`WireError`.
"""

from __future__ import annotations

import io
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from autoflip_flwr.core.layout import Arrays, ArraySpec
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.moves import decode_moves, encode_moves
from autoflip_flwr.values import KINDS, Coded, Vector, coded_size, encode, is_coded

FORMAT = 3
HEADER = "autoflip"
MASK = "autoflip.mask"
LOG8 = "log8"

HELLO, EXPLORE, TRAIN, EVALUATE = "hello", "explore", "train", "evaluate"
MASK_MISSING = "mask-missing"
MOD_REFUSED = 6
"""Flower's error code of a mod that refuses a message."""
PHASES = (HELLO, EXPLORE, TRAIN, EVALUATE)

SAMPLE_BYTES = 4096

_NPY = re.compile(rb"\{'descr': '([<>|=]?[a-z][0-9]+)', 'fortran_order': False, 'shape': \(([0-9]{1,19}),\), \} *\n")


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


def kinds(**chosen: str) -> dict[str, str]:
    """What a header says of the coding of values (``values``: these, ``reply``: the reply's); nothing of float32."""
    return {key: kind for key, kind in chosen.items() if kind != "float32"}


def read_header(content: RecordDict) -> ConfigRecord | None:
    """The header of a message, checked; ``None`` if the message is not one of AutoFLIP's."""
    record = content.get(HEADER)
    if record is None:
        return None
    if not isinstance(record, ConfigRecord):
        raise WireError(f"record {HEADER!r} must be a ConfigRecord")
    if record.get("format") != FORMAT or type(record["format"]) is not int:
        raise WireError(
            f"wire format {record.get('format')!r}, this side speaks {FORMAT}: "
            "install the same autoflip-flwr on both sides"
        )
    if record.get("phase") not in PHASES:
        raise WireError(f"phase {record.get('phase')!r}: must be one of {', '.join(PHASES)}")
    if type(record.get("round")) is not int:
        raise WireError("the header lacks the round")
    for key in ("values", "reply"):
        if record.get(key, "float32") not in (*KINDS, LOG8):
            raise WireError(f"{key} {record.get(key)!r}: must be one of {', '.join(KINDS)}, {LOG8}")
    return record


def kept_and_size(mask: Mask, specs: list[ArraySpec]) -> tuple[int, int]:
    """Of a flat vector of these arrays: how many values are kept ones of pruned arrays, and how many there are."""
    kept = sum(mask.kept_by_name[spec.name] for spec in specs if spec.prunable)
    return kept, kept + sum(spec.size for spec in specs if not spec.prunable)


def flatten(mask: Mask, packed: Mapping[str, NDArray[Any]]) -> Arrays:
    """Packed arrays -> one flat vector for each dtype, cast to the model's dtypes."""
    return {dtype: np.concatenate(parts) for dtype, parts in _parts(mask, packed).items()}


def split(mask: Mask, flat: Mapping[str, NDArray[Any]]) -> Arrays:
    """Flat vectors -> the packed arrays of their dtypes (views), in the model's order."""
    packed: Arrays = {}
    for dtype, values in flat.items():
        start = 0
        for spec in mask.layout.by_dtype[dtype]:
            shape = mask.packed_shape(spec.name)
            stop = start + math.prod(shape)
            packed[spec.name] = values[start:stop].reshape(shape)
            start = stop
    return {spec.name: packed[spec.name] for spec in mask.layout.specs if spec.name in packed}


def arrays_of(mask: Mask, found: Mapping[str, Vector]) -> Arrays:
    """Flat vectors as a message holds them -> the packed arrays of their dtypes, read whole."""
    return split(mask, {dtype: vector.whole() for dtype, vector in found.items()})


def pack(mask: Mask, packed: Mapping[str, NDArray[Any]], kind: str = "float32") -> ArrayRecord:
    """Packed arrays -> the record of a message, its values coded as ``kind`` says (one copy where they are not)."""
    record = {}
    for dtype, parts in _parts(mask, packed).items():
        if is_coded(kind, dtype):
            kept, _ = kept_and_size(mask, mask.layout.by_dtype[dtype])
            parts = [encode(kind, np.concatenate(parts), kept)]
        record[dtype] = array(parts)
    return ArrayRecord(record)


def unpack(mask: Mask, record: object, kind: str = "float32") -> Arrays:
    """The packed arrays of a record; where nothing is coded, read-only views of the message's own bytes."""
    return arrays_of(mask, vectors(mask, record, kind))


def vectors(
    mask: Mask, record: object, kind: str = "float32", base: Mapping[str, NDArray[Any]] | None = None
) -> dict[str, Vector]:
    """The flat vectors of a record, to be read in parts.

    Parameters
    ----------
    mask : Mask
        The mask under which they are packed.
    record : ArrayRecord
        From a message.
    kind : str
        How they are coded.
    base : Mapping[str, ndarray] | None
        Flat vectors of the floating dtypes that the record's are added to.

    Raises
    ------
    WireError
        If the record lacks a dtype, has another one, a length is not what the mask says, or a coded value is not
        finite.
    """
    if not isinstance(record, ArrayRecord):
        raise WireError("the packed values must be an ArrayRecord")
    expected = mask.layout.by_dtype
    if set(record) != set(expected):
        raise WireError(f"packed values have the keys {sorted(record)[:5]}, expected {sorted(expected)}")
    found = {}
    for dtype, specs in expected.items():
        kept, size = kept_and_size(mask, specs)
        source: NDArray[Any] | Callable[[int, int], NDArray[Any]]
        if is_coded(kind, dtype):
            data = _view(record[dtype], "uint8", coded_size(kind, kept, size))
            try:
                source = Coded(data, kind, kept, size).read
            except ValueError as error:
                raise WireError(f"the {dtype} values: {error}") from error
        else:
            source = _view(record[dtype], dtype, size)
        found[dtype] = Vector(dtype, size, source, None if base is None else base.get(dtype))
    return found


def pack_moves(mask: Mask, moves: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """An explorer's moves, under a mask that keeps everything -> the record of its reply.

    It has the keys of the message, as Flower's mods expect; under those of integers, the code of no arrays.
    """
    try:
        coded = {
            dtype: encode_moves([spec for spec in specs if spec.floating], moves)
            for dtype, specs in mask.layout.by_dtype.items()
        }
    except ValueError as error:
        raise WireError(str(error)) from error
    return ArrayRecord({dtype: array([data]) for dtype, data in coded.items()})


def unpack_moves(mask: Mask, record: ArrayRecord) -> Arrays:
    """The moves of an explorer's reply: of each floating array, float32, in its shape."""
    expected = mask.layout.by_dtype
    if set(record) != set(expected):
        raise WireError(f"an explorer's moves have the keys {sorted(record)[:5]}, expected {sorted(expected)}")
    moves: Arrays = {}
    try:
        for dtype, specs in expected.items():
            data = bytes(_view(record[dtype], "uint8").data)
            moves |= decode_moves([spec for spec in specs if spec.floating], data)
    except ValueError as error:
        raise WireError(str(error)) from error
    return moves


def array(parts: Sequence[NDArray[Any]], shape: tuple[int, ...] | None = None) -> Array:
    """Flower's array of contiguous parts one after another, flat by default: as its own constructor, in one copy."""
    dtype = parts[0].dtype
    shape = (sum(part.size for part in parts),) if shape is None else shape
    start = io.BytesIO()
    np.lib.format.write_array_header_1_0(start, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    data = b"".join([start.getvalue(), *(part.data for part in parts)])
    return Array(dtype=str(dtype), shape=shape, stype="numpy.ndarray", data=data)


def carried(content: RecordDict) -> int:
    """Bytes of the arrays of a message."""
    return sum(len(array.data) for record in content.array_records.values() for array in record.values())


def fingerprint(record: ArrayRecord) -> int:
    """CRC-32 of a sample of the packed bytes: it tells whether another mod changed them on their way, at no cost.

    Flower's differential-privacy mods change every value. It is no protection against a client that lies.
    """
    found = 0
    for array in record.values():
        data = np.frombuffer(array.data, np.uint8)
        found = zlib.crc32(data[:: data.size // SAMPLE_BYTES | 1].tobytes(), found)  # odd: all bytes of a float
    return found


def _parts(mask: Mask, packed: Mapping[str, NDArray[Any]]) -> dict[str, list[NDArray[Any]]]:
    parts: dict[str, list[NDArray[Any]]] = {}
    for dtype, specs in mask.layout.by_dtype.items():
        parts[dtype] = []
        for spec in specs:
            values = np.asarray(packed[spec.name])
            if values.shape != mask.packed_shape(spec.name):
                raise WireError(
                    f"packed array {spec.name!r} has shape {values.shape}, expected {mask.packed_shape(spec.name)}"
                )
            parts[dtype].append(np.ascontiguousarray(values, dtype).reshape(-1))
    return parts


def _view(array: Array, dtype: str, size: int | None = None) -> NDArray[Any]:
    """The values of a 1-D ``numpy.save`` image, after its header has been compared with what is expected."""
    data = array.data
    start = 10 + int.from_bytes(data[8:10], "little")
    match = _NPY.fullmatch(data[10:start]) if data[:8] == b"\x93NUMPY\x01\x00" else None
    if match is None:
        raise WireError(f"the {dtype} values are not a one-dimensional NumPy array")
    expected, found = np.dtype(dtype), int(match[2])
    size = found if size is None else size
    if match[1].decode() != expected.str or found != size or len(data) - start != size * expected.itemsize:
        raise WireError(
            f"the {dtype} values are {found} of type {match[1].decode()} in {len(data) - start} bytes, "
            f"expected {size} of type {expected.str}"
        )
    if dtype == "bool" and (np.frombuffer(data, np.uint8, offset=start) > 1).any():
        raise WireError("the bool values are not all 0 or 1")
    return np.frombuffer(data, expected, offset=start)
