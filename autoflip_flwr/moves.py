"""How an explorer's moves are coded on the wire: one byte for each parameter, its sign and the logarithm of its size.

Only the ranks of the scores matter for the mask, and they are those of squares or products: a relative error of the
same size everywhere is the right one, which is what a logarithmic code has. Each array has a range of its own.

    moves = for each floating array: top (float32), step (float32); then a byte a parameter, coded by Huffman (zlib)

Code 0 is no move; code +-k, k from 1 to 127, is +-top * exp((k - 127) * step). The smallest twentieth of an array's
moves is not told apart: it gets code 1, or 0 below half of that.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.bits import inflate
from autoflip_flwr.layout import Arrays, ArraySpec

LEVELS = 127
LARGEST = 1e36

_BLURRED = 0.05


def encode_moves(specs: Sequence[ArraySpec], moves: Mapping[str, NDArray[Any]]) -> NDArray[np.uint8]:
    """Code the moves of these arrays, in their order.

    Parameters
    ----------
    specs : Sequence[ArraySpec]
        The floating arrays of the model.
    moves : Mapping[str, ndarray]
        For each its ``Delta_k``, in its shape.

    Returns
    -------
    ndarray
        uint8, 1-D.

    Raises
    ------
    ValueError
        If a move is not finite, or larger than ``LARGEST``.
    """
    ranges = np.zeros((len(specs), 2), "<f4")
    codes = []
    for number, spec in enumerate(specs):
        values = moves[spec.name].reshape(-1)
        with np.errstate(over="ignore"):  # found below
            size = np.abs(values).astype(np.float32, copy=False)
        if not (size <= LARGEST).all():
            raise ValueError(f"array {spec.name!r} has moved by NaN, infinity or more than {LARGEST:g}")
        moved = size[size > 0]
        code = np.zeros(size.size, np.int8)
        if moved.size:
            top = moved.max()
            low = np.partition(moved, int(_BLURRED * moved.size))[int(_BLURRED * moved.size)]
            step = (np.log(top) - np.log(low)) / np.float32(LEVELS - 1)
            with np.errstate(divide="ignore"):
                levels = LEVELS + (np.log(size) - np.log(top)) / (step if step > 0 else np.float32(1))
            code[:] = np.where(size > low / 2, np.clip(np.rint(levels), 1, LEVELS), 0)
            code[values < 0] *= -1
            ranges[number] = top, step
        codes.append(code)
    packer = zlib.compressobj(6, strategy=zlib.Z_HUFFMAN_ONLY)
    parts = [packer.compress(code.data) for code in codes] + [packer.flush()]
    return np.frombuffer(b"".join([ranges.tobytes(), *parts]), np.uint8)


def decode_moves(specs: Sequence[ArraySpec], data: bytes) -> Arrays:
    """The moves that :func:`encode_moves` has coded, float32, in the arrays' shapes.

    Raises
    ------
    ValueError
        If ``data`` is not what it gives for these arrays.
    """
    head = 8 * len(specs)
    if len(data) < head:
        raise ValueError(f"{len(data)} bytes of moves do not hold the ranges of {len(specs)} arrays")
    ranges = np.frombuffer(data[:head], "<f4").reshape(-1, 2)
    if not ((ranges >= 0) & (ranges <= LARGEST)).all():
        raise ValueError(f"the range of an array's moves is not a number in [0, {LARGEST:g}]")
    codes = np.frombuffer(inflate(data[head:], sum(spec.size for spec in specs), "the moves", exact=True), np.uint8)
    moves: Arrays = {}
    start = 0
    levels = np.arange(1, LEVELS + 1, dtype=np.float64)
    for spec, (top, step) in zip(specs, ranges.astype(np.float64), strict=True):
        sizes = top * np.exp((levels - LEVELS) * step)
        table = np.concatenate([[0], sizes, [0], -sizes[::-1]]).astype(np.float32)  # by code, as an unsigned byte
        moves[spec.name] = table[codes[start : start + spec.size]].reshape(spec.shape)
        start += spec.size
    return moves
