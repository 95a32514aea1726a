"""Write and read Flower's array records, without a copy where possible."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict
from numpy.typing import NDArray

from autoflip_flwr.core.layout import Arrays

SAMPLE_BYTES = 4096

_NPY = re.compile(rb"\{'descr': '([<>|=]?[a-z][0-9]+)', 'fortran_order': False, 'shape': \(([0-9]{1,19}),\), \} *\n")


class WireError(ValueError):
    """Violation of the wire format by a message. The text may quote the message, and is cut at 500 characters."""

    def __init__(self, text: str) -> None:
        super().__init__(text[:500])


def make_array(parts: Sequence[NDArray[Any]], shape: tuple[int, ...] | None = None) -> Array:
    """Make a Flower ``Array`` from contiguous parts in one copy; flat by default, equal to the constructor's result."""
    dtype = parts[0].dtype
    shape = (sum(part.size for part in parts),) if shape is None else shape
    start = io.BytesIO()
    np.lib.format.write_array_header_1_0(start, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    data = b"".join([start.getvalue(), *(part.data for part in parts)])
    return Array(dtype=str(dtype), shape=shape, stype="numpy.ndarray", data=data)


def array_bytes(content: RecordDict) -> int:
    """Return the number of bytes of the arrays of a message."""
    return sum(len(array.data) for record in content.array_records.values() for array in record.values())


def fingerprint(record: ArrayRecord) -> int:
    """Return the CRC-32 of a sample of the packed bytes, to detect cheaply whether another mod changed them.

    Flower's differential-privacy mods change every value. It does not protect against a dishonest client.
    """
    found = 0
    for array in record.values():
        data = np.frombuffer(array.data, np.uint8)
        found = zlib.crc32(data[:: data.size // SAMPLE_BYTES | 1].tobytes(), found)  # odd: hits all bytes of floats
    return found


def view_of(array: Array, dtype: str, size: int | None = None) -> NDArray[Any]:
    """Return a view of the values of a 1-D array in ``numpy.save`` format, after checking its header."""
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


def to_record(arrays: Mapping[str, NDArray[np.generic]]) -> ArrayRecord:
    """Make a Flower record from arrays by name."""
    return ArrayRecord({name: make_array([np.ascontiguousarray(array)], array.shape) for name, array in arrays.items()})


def to_arrays(record: ArrayRecord) -> Arrays:
    """Return the arrays of a Flower record by name (copies)."""
    return {name: array.numpy() for name, array in record.items()}
