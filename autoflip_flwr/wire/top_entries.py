"""Encode the top entries of a statistic: which entries they are, then their values.

    data = length of the places (uint32); places; values

The places are the gaps between the top entries among all requested ones, arrays in the layout's order
(:mod:`autoflip_flwr.wire.mask_bits`). The values are those of the top entries alone, in the same order: quantised like
deltas, as float32, or omitted. The number of top entries of each array is known to both sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.core.choices import LOG8, PLACES
from autoflip_flwr.core.layout import Arrays, ArraySpec, split
from autoflip_flwr.wire.deltas import LARGEST, decode_deltas, encode_deltas
from autoflip_flwr.wire.mask_bits import decode_flags, encode_flags

_LENGTH = 4


def encode_top(
    specs: Sequence[ArraySpec], values: Mapping[str, NDArray[np.float32]], counts: Mapping[str, int], code: str
) -> NDArray[np.uint8]:
    """Encode the entries of the largest magnitude; of equal ones, the earlier are taken.

    Parameters
    ----------
    specs : Sequence[ArraySpec]
        The requested entries of each array, as a 1-D float32 array.
    values : Mapping[str, ndarray]
        Their values, float32.
    counts : Mapping[str, int]
        Number of top entries of each array.
    code : str
        One of :data:`~autoflip_flwr.core.choices.CODES`.

    Raises
    ------
    ValueError
        If a value is not finite, or too large.
    """
    flags, top = [], {}
    for spec in specs:
        size = np.abs(values[spec.name])
        if not (size <= LARGEST).all():
            raise ValueError(f"array {spec.name!r} holds NaN, infinity or more than {LARGEST:g}")
        flags.append(_largest(size, counts[spec.name]))
        top[spec.name] = values[spec.name][flags[-1]]
    places = encode_flags(np.concatenate([*flags, np.empty(0, bool)]))
    if code == PLACES:
        coded = b""
    elif code == LOG8:
        coded = encode_deltas(_tops(specs, counts), top).tobytes()
    else:
        coded = np.concatenate([*top.values(), np.empty(0, np.float32)]).astype("<f4").tobytes()
    return np.frombuffer(np.array(len(places), "<u4").tobytes() + places + coded, np.uint8)


def decode_top(specs: Sequence[ArraySpec], counts: Mapping[str, int], code: str, data: bytes) -> Arrays:
    """Return the requested entries of each array, float32: 0 where they are not among the top ones.

    Raises
    ------
    ValueError
        If ``data`` is not a result of :func:`encode_top` for these arrays and counts.
    """
    length = int(np.frombuffer(data[:_LENGTH], "<u4")[0]) if len(data) >= _LENGTH else len(data)
    places, coded = data[_LENGTH : _LENGTH + length], data[_LENGTH + length :]
    if len(places) < length:
        raise ValueError(f"{len(data)} bytes do not hold the places of the top entries")
    shapes = {spec.name: spec.shape for spec in specs}
    flags = split(decode_flags(places, sum(spec.size for spec in specs)), shapes)
    for name, own in flags.items():
        if np.count_nonzero(own) != counts[name]:
            raise ValueError(f"array {name!r} has {np.count_nonzero(own)} top entries, expected {counts[name]}")
    total = sum(counts[spec.name] for spec in specs)
    if code == LOG8:
        top = decode_deltas(_tops(specs, counts), coded)
    elif len(coded) != (0 if code == PLACES else 4 * total):
        raise ValueError(f"{len(coded)} bytes do not hold the values of {total} top entries")
    else:
        whole = np.ones(total, np.float32) if code == PLACES else np.frombuffer(coded, "<f4")
        if not (np.abs(whole) <= LARGEST).all():
            raise ValueError(f"a value is NaN, infinity or more than {LARGEST:g}")
        top = split(whole, {spec.name: (counts[spec.name],) for spec in specs})
    found: Arrays = {}
    for spec in specs:
        full = np.zeros(spec.size, np.float32)
        full[flags[spec.name]] = top.get(spec.name, 0)
        found[spec.name] = full
    return found


def _tops(specs: Sequence[ArraySpec], counts: Mapping[str, int]) -> list[ArraySpec]:
    return [ArraySpec(spec.name, (counts[spec.name],), "float32", True) for spec in specs if counts[spec.name]]


def _largest(size: NDArray[np.float32], count: int) -> NDArray[np.bool_]:
    """Return flags of the ``count`` largest values."""
    if not count:
        return np.zeros(size.size, bool)
    cut = np.partition(size, size.size - count)[size.size - count]
    chosen: NDArray[np.bool_] = size > cut
    chosen[np.flatnonzero(size == cut)[: count - int(np.count_nonzero(chosen))]] = True
    return chosen
