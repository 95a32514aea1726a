"""Quantise an explorer's deltas for the wire: one byte per prunable parameter, for its sign and logarithmic size.

Only the ranks of the scores matter for the mask, and scores are squares or products of deltas. They need the same
relative error everywhere, which a logarithmic code gives. Each array has its own range.

    deltas = for each prunable array: top (float32), step (float32); then, in one zlib stream, for each floating array:
             one byte per parameter if it is prunable, else its deltas unquantised

Code 0 is a delta of 0. Code +-k, with k from 1 to 127, is +-top * exp((k - 127) * step). The smallest 5 % of an array's
deltas share code 1; those below half of the smallest level get code 0.

Deltas of arrays that are never pruned are not quantised. The mean of exact deltas stays within the range of the
explorers' values, so that a running variance that starts from it cannot be negative.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.core.layout import Arrays, ArraySpec
from autoflip_flwr.wire.mask_bits import inflate

LEVELS = 127
LARGEST = 1e36

_BLURRED = 0.05


def encode_deltas(specs: Sequence[ArraySpec], deltas: Mapping[str, NDArray[Any]]) -> NDArray[np.uint8]:
    """Quantise and compress the deltas of these arrays, in their order.

    Parameters
    ----------
    specs : Sequence[ArraySpec]
        The floating arrays of the model.
    deltas : Mapping[str, ndarray]
        ``Delta_k`` of each array, in its shape.

    Returns
    -------
    ndarray
        uint8, 1-D.

    Raises
    ------
    ValueError
        If a delta is not finite, or that of a prunable parameter is larger than ``LARGEST``.
    """
    ranges, parts = [], []
    for spec in specs:
        values = deltas[spec.name].reshape(-1)
        if spec.prunable:
            top, step, codes = _encode(spec.name, values)
            ranges += [top, step]
            parts.append(codes.tobytes())
        elif np.isfinite(values).all():
            parts.append(values.astype(np.dtype(spec.dtype).newbyteorder("<"), copy=False).tobytes())
        else:
            raise ValueError(f"array {spec.name!r} has moved by NaN or infinity")
    packer = zlib.compressobj(6, strategy=zlib.Z_RLE)  # runs of zero deltas take almost no bytes
    packed = [packer.compress(part) for part in parts] + [packer.flush()]
    return np.frombuffer(b"".join([np.array(ranges, "<f4").tobytes(), *packed]), np.uint8)


def _encode(name: str, values: NDArray[Any]) -> tuple[float, float, NDArray[np.int8]]:
    """Return top, step and codes of one array's deltas."""
    with np.errstate(over="ignore"):  # infinity is rejected below
        size = np.abs(values).astype(np.float32, copy=False)
    if not (size <= LARGEST).all():
        raise ValueError(f"array {name!r} has moved by NaN, infinity or more than {LARGEST:g}")
    moved = size[size > 0]
    codes = np.zeros(size.size, np.int8)
    if not moved.size:
        return 0.0, 0.0, codes
    top = moved.max()
    low = np.partition(moved, int(_BLURRED * moved.size))[int(_BLURRED * moved.size)]
    step = (np.log(top) - np.log(low)) / np.float32(LEVELS - 1)
    with np.errstate(divide="ignore"):
        levels = LEVELS + (np.log(size) - np.log(top)) / (step if step > 0 else np.float32(1))
    codes[:] = np.where(size > low / 2, np.clip(np.rint(levels), 1, LEVELS), 0)
    codes[values < 0] *= -1
    return float(top), float(step), codes


def decode_deltas(specs: Sequence[ArraySpec], data: bytes) -> Arrays:
    """Return the deltas that :func:`encode_deltas` encoded, in the arrays' shapes.

    Those of prunable arrays are float32, the others have the arrays' own dtypes.

    Raises
    ------
    ValueError
        If ``data`` is not a result of :func:`encode_deltas` for these arrays.
    """
    coded = [spec for spec in specs if spec.prunable]
    head = 8 * len(coded)
    if len(data) < head:
        raise ValueError(f"{len(data)} bytes of deltas do not hold the ranges of {len(coded)} arrays")
    ranges = np.frombuffer(data[:head], "<f4").reshape(-1, 2)
    if not ((ranges >= 0) & (ranges <= LARGEST)).all():
        raise ValueError(f"the range of an array's deltas is not a number in [0, {LARGEST:g}]")
    tables = dict(zip((spec.name for spec in coded), map(_table, ranges.astype(np.float64)), strict=True))
    whole = inflate(data[head:], sum(map(_bytes, specs)), "the deltas", exact=True)
    deltas: Arrays = {}
    start = 0
    for spec in specs:
        part = whole[start : start + _bytes(spec)]
        if spec.prunable:
            values = tables[spec.name][np.frombuffer(part, np.uint8)]
        else:
            values = np.frombuffer(part, np.dtype(spec.dtype).newbyteorder("<"))
            if not np.isfinite(values).all():
                raise ValueError(f"array {spec.name!r} has moved by NaN or infinity")
        deltas[spec.name] = values.reshape(spec.shape)
        start += len(part)
    return deltas


def _table(range_: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return a table of an array's deltas, indexed by the code as an unsigned byte."""
    top, step = range_
    sizes = top * np.exp((np.arange(1, LEVELS + 1) - LEVELS) * step)
    return np.concatenate([[0], sizes, [0], -sizes[::-1]]).astype(np.float32)


def _bytes(spec: ArraySpec) -> int:
    """Return the number of bytes of an array's deltas before compression."""
    return spec.size * (1 if spec.prunable else np.dtype(spec.dtype).itemsize)
