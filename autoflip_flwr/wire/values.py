"""Quantise values for the wire: to 16 bits, or to 8 bits with one scale per block.

A quantised vector is a string of bytes, little-endian. Its first ``kept`` values belong to prunable arrays. The others
(biases, normalisation: few values of any magnitude) are always quantised to bfloat16. The encodings of kept values are

- ``bfloat16``: 2 bytes per value, the upper half of its float32, rounded to nearest, ties to even.
- ``float16``: 2 bytes per value, IEEE half precision.
- ``int8``: one float32 scale per block of 256 kept values, then the bfloat16 values, then 1 byte per kept value:
  value = scale * code, with codes from -127 to 127, rounded to nearest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 256
CHUNK = 2**18
"""Number of values processed at once; small enough for a core's cache."""

DISTANCE_CHUNK = 2**16

LARGEST = {"bfloat16": 3.0e38, "float16": 65504.0, "int8": 3.0e38}
_SMALLEST_PEAK = 1e-30  # of a block; below it, 1 / scale may overflow, and the values are negligible

Floats = NDArray[np.float32]


def is_coded(kind: str, dtype: str) -> bool:
    """Return whether values of this dtype are quantised: floating ones, if that makes them smaller."""
    found = np.dtype(dtype)
    return kind != "float32" and found.kind == "f" and (kind == "int8" or found.itemsize > 2)


def coded_size(kind: str, kept: int, size: int) -> int:
    """Return the bytes of a quantised vector of ``size`` values, the first ``kept`` of them of prunable arrays."""
    if kind == "int8":
        return 4 * _blocks(kept) + 2 * (size - kept) + kept
    return 2 * size


def encode(kind: str, values: NDArray[np.floating[Any]], kept: int) -> NDArray[np.uint8]:
    """Quantise a 1-D vector; values beyond the largest of the encoding are clipped to it.

    Returns
    -------
    ndarray
        uint8, :func:`coded_size` bytes.

    Raises
    ------
    ValueError
        If a value is NaN or infinity.
    """
    coded = np.empty(coded_size(kind, kept, values.size), np.uint8)
    scales, rest, codes = _sections(coded, kind, kept, values.size)
    for start, stop in _chunks(kept):
        part = _cut(values[start:stop], kind)
        if kind == "int8":
            blocks = slice(start // BLOCK, _blocks(stop))
            codes[start:stop], scales[blocks] = _to_blocks(part)
        elif kind == "float16":
            codes[start:stop] = part
        else:
            codes[start:stop] = _to_bfloat16(part)
    rest[:] = _to_bfloat16(_cut(values[kept:], "bfloat16"))
    return coded


class Coded:
    """A quantised vector that is read in parts.

    Raises
    ------
    ValueError
        If it holds a value that is not finite, or a scale that is too large, negative or not finite.
    """

    def __init__(self, data: NDArray[np.uint8], kind: str, kept: int, size: int) -> None:
        self._kind, self._kept, self._size = kind, kept, size
        self._scales, self._rest, self._codes = _sections(data, kind, kept, size)
        halves = [(self._rest, 0x7F80)]
        if kind == "int8":
            if not ((self._scales >= 0) & (self._scales <= LARGEST["int8"] / 127)).all():
                raise ValueError("a scale is not a number in [0, 2.4e36]")
        else:
            halves.append((self._codes.view(np.uint16), 0x7F80 if kind == "bfloat16" else 0x7C00))
        for values, exponent in halves:
            for start, stop in _chunks(values.size):
                if ((values[start:stop] & exponent) == exponent).any():
                    raise ValueError("it holds NaN or infinity")

    def read(self, start: int, stop: int) -> Floats:
        """Return values ``start`` to ``stop``, float32 (a new array)."""
        result = np.empty(stop - start, np.float32)
        middle = min(max(self._kept, start), stop)
        if start < middle:
            kept = result[: middle - start]
            if self._kind == "int8":
                kept[:] = self._codes[start:middle]
                first = start // BLOCK
                scales = np.repeat(self._scales[first : _blocks(middle)], BLOCK)
                kept *= scales[start - first * BLOCK : middle - first * BLOCK]
            elif self._kind == "float16":
                kept[:] = self._codes[start:middle]
            else:
                kept[:] = _from_bfloat16(self._codes[start:middle])
        if middle < stop:
            result[middle - start :] = _from_bfloat16(self._rest[middle - self._kept : stop - self._kept])
        return result


@dataclass(frozen=True)
class Vector:
    """A flat vector of a message, which is read in parts and copied whole only by :meth:`whole`.

    Parameters
    ----------
    dtype : str
        The model's dtype.
    size : int
        Number of values.
    source : ndarray | Callable[[int, int], ndarray]
        A view of the message, or a function that decodes the values from start to stop.
    base : ndarray | None
        1-D, in the model's dtype: the values to which those of the source are added.
    """

    dtype: str
    size: int
    source: NDArray[Any] | Callable[[int, int], NDArray[Any]]
    base: NDArray[Any] | None = None

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return values ``start`` to ``stop`` in the model's dtype; a read-only view if not quantised or added."""
        part = self.source[start:stop] if isinstance(self.source, np.ndarray) else self.source(start, stop)
        if self.base is not None:
            with np.errstate(over="ignore", invalid="ignore"):  # `is_finite` detects an overflow
                part = self.base[start:stop] + part
        return part if part.dtype == self.dtype else part.astype(self.dtype)

    def whole(self) -> NDArray[Any]:
        """Return all values."""
        return self.read(0, self.size)

    def distance(self, other: NDArray[Any], first: int = 0, last: int | None = None) -> float:
        """Return the L2 distance to another vector of its dtype, over values ``first`` to ``last`` (default: all).

        It is infinity or NaN if a value is not finite.
        """
        end = self.size if last is None else last
        wide = np.promote_types(self.dtype, np.float32)
        difference = np.empty(min(end - first, DISTANCE_CHUNK), wide)
        total = 0.0
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(first, end, DISTANCE_CHUNK):
                stop = min(start + DISTANCE_CHUNK, end)
                part = np.subtract(self.read(start, stop), other[start:stop], difference[: stop - start], dtype=wide)
                total += float(part @ part)
        return math.sqrt(total) if total >= 0 else math.nan

    def is_finite(self) -> bool:
        """Return whether all values are finite."""
        with np.errstate(over="ignore"):
            return all(np.isfinite(self.read(start, stop)).all() for start, stop in _chunks(self.size))


def _sections(data: NDArray[np.uint8], kind: str, kept: int, size: int) -> tuple[Floats, NDArray[Any], NDArray[Any]]:
    """Return views of a quantised vector: block scales, values that are never pruned, kept values."""
    if kind == "int8":
        first, second = 4 * _blocks(kept), 4 * _blocks(kept) + 2 * (size - kept)
        return data[:first].view("<f4"), data[first:second].view("<u2"), data[second:].view(np.int8)
    codes = data[: 2 * kept].view("<f2" if kind == "float16" else "<u2")
    return np.empty(0, np.float32), data[2 * kept :].view("<u2"), codes


def _cut(values: NDArray[np.floating[Any]], kind: str) -> Floats:
    if not np.isfinite(values).all():
        raise ValueError(f"NaN or infinity cannot be coded as {kind}")
    wide = values.astype(np.promote_types(values.dtype, np.float32), copy=False)
    cut: NDArray[np.floating[Any]] = np.clip(wide, -LARGEST[kind], LARGEST[kind])
    return cut.astype(np.float32, copy=False)


def _blocks(count: int) -> int:
    return -(-count // BLOCK)


def _chunks(size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + CHUNK, size)) for start in range(0, size, CHUNK))


def _to_blocks(values: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Return codes and block scales; ``values`` must begin at the start of a block."""
    padded = np.zeros(_blocks(values.size) * BLOCK, np.float32)
    padded[: values.size] = values
    rows = padded.reshape(-1, BLOCK)
    peak = np.abs(rows).max(axis=1)
    peak[peak < _SMALLEST_PEAK] = 0
    scales = peak / np.float32(127)
    inverse = np.divide(np.float32(127), peak, out=np.zeros_like(peak), where=peak > 0)
    rows *= inverse[:, None]
    np.rint(rows, out=rows)
    return padded[: values.size].astype(np.int8), scales


def _to_bfloat16(values: Floats) -> NDArray[np.uint16]:
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _from_bfloat16(halves: NDArray[np.uint16]) -> Floats:
    return (halves.astype(np.uint32) << 16).view(np.float32)
