"""Wire format: conversion between (mask, packed arrays) and Flower records. ``docs/wire.md`` specifies it.

A message of AutoFLIP is a Flower message. Its content holds the records of the wrapped strategy and of the client's own
code, and

- the packed ``ArrayRecord``: one flat vector per dtype of the model (key: the dtype's name). It holds first the kept
  values of prunable arrays, in the model's order, then the other arrays. Values may be quantised
  (:mod:`autoflip_flwr.wire.values`). An explorer's reply holds quantised deltas instead
  (:mod:`autoflip_flwr.wire.deltas`);
- ``HEADER``, a small ``ConfigRecord``: format version, phase, round, mask digest, encoding of the values; in replies
  also the values' fingerprint;
- ``MASK_RECORD``, a ``ConfigRecord`` with the model's layout and the mask's bits, only if the node may lack them
  (:mod:`autoflip_flwr.wire.mask_record`);
- ``BASE_RECORD``, an ``ArrayRecord`` of the values of pruned entries if they are not zero, only if the node lacks them
  (:mod:`autoflip_flwr.wire.base_record`).

Nothing is unpickled or evaluated. Every size is checked against what the receiver expects before memory is allocated.
All errors are raised as :class:`WireError`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from autoflip_flwr.core.choices import LOG8, VALUES
from autoflip_flwr.core.layout import Arrays, ArraySpec, split
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.wire.deltas import decode_deltas, encode_deltas
from autoflip_flwr.wire.keys import FORMAT, GIVEN, HEADER, HELLO, NOTHING, PHASES
from autoflip_flwr.wire.records import WireError, make_array, view_of
from autoflip_flwr.wire.values import Coded, Vector, coded_size, encode, is_coded

_DIGEST = re.compile("[0-9a-f]{64}")


MAX_RATE = 1e4
"""Largest factor for a client's learning rate."""


def make_header(
    phase: str, round_: int, mask: Mask | None = None, **extra: int | float | str | list[str]
) -> ConfigRecord:
    """Make the header record of a message or reply."""
    values: dict[str, Any] = {"format": FORMAT, "phase": phase, "round": round_, **extra}
    if mask is not None:
        values |= {"digest": mask.digest, "version": mask.version}
    return ConfigRecord(values)


def weight_entry(name: str) -> dict[str, str]:
    """Return the header entry that names the metric by which replies are weighted; empty if there is none."""
    return {"weight-key": name} if name else {}


def rate_entry(rate: float) -> dict[str, float]:
    """Return the header entry of the factor for the clients' learning rate; empty if it is 1."""
    return {"rate": rate} if rate != 1 else {}


def value_entries(**chosen: str) -> dict[str, str]:
    """Return header entries for the value encodings of a message or its reply; defaults are omitted."""
    return {key: kind for key, kind in chosen.items() if kind != "float32"}


def read_header(content: RecordDict) -> ConfigRecord | None:
    """Return the header of a message after checking it; ``None`` if the message is not AutoFLIP's."""
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
        if record.get(key, "float32") not in (*VALUES, LOG8, NOTHING):
            raise WireError(f"{key} {record.get(key)!r}: must be one of {', '.join(VALUES)}, {LOG8}, {NOTHING}")
    rate = record.get("rate", 1.0)
    if not isinstance(rate, float) or not 0 < rate <= MAX_RATE:
        raise WireError(f"rate {rate!r}: must be a number in (0, {MAX_RATE:g}]")
    if "base" in record:
        base = record["base"]
        known = isinstance(base, str) and (_DIGEST.fullmatch(base) or (base, record["phase"]) == (GIVEN, HELLO))
        if not known:
            raise WireError(f"base {base!r}: must be a digest, of 64 hex digits")
    return record


def kept_and_size(mask: Mask, specs: list[ArraySpec]) -> tuple[int, int]:
    """Return the number of kept values of prunable arrays, and of all values, in a flat vector of these arrays."""
    kept = sum(mask.kept_by_name[spec.name] for spec in specs if spec.prunable)
    return kept, kept + sum(spec.size for spec in specs if not spec.prunable)


def flatten(mask: Mask, packed: Mapping[str, NDArray[Any]]) -> Arrays:
    """Join packed arrays to one flat vector per dtype, cast to the model's dtypes."""
    return {dtype: np.concatenate(parts) for dtype, parts in _parts(mask, packed).items()}


def split_vectors(mask: Mask, flat: Mapping[str, NDArray[Any]]) -> Arrays:
    """Split flat vectors into packed arrays (views), in the model's order."""
    packed: Arrays = {}
    for dtype, values in flat.items():
        packed |= split(values, {spec.name: mask.packed_shape(spec.name) for spec in mask.layout.by_dtype[dtype]})
    return {spec.name: packed[spec.name] for spec in mask.layout.specs if spec.name in packed}


def arrays_of(mask: Mask, found: Mapping[str, Vector]) -> Arrays:
    """Read the vectors of a message whole, and split them into packed arrays."""
    return split_vectors(mask, {dtype: vector.whole() for dtype, vector in found.items()})


def pack_values(mask: Mask, packed: Mapping[str, NDArray[Any]], kind: str = "float32") -> ArrayRecord:
    """Make the record of a message from packed arrays, quantised as ``kind`` says (one copy if not quantised)."""
    record = {}
    for dtype, parts in _parts(mask, packed).items():
        if is_coded(kind, dtype):
            kept, _ = kept_and_size(mask, mask.layout.by_dtype[dtype])
            parts = [encode(kind, np.concatenate(parts), kept)]
        record[dtype] = make_array(parts)
    return ArrayRecord(record)


def unpack_values(mask: Mask, record: object, kind: str = "float32") -> Arrays:
    """Return the packed arrays of a record; if not quantised, as read-only views of the message's bytes."""
    return arrays_of(mask, read_vectors(mask, record, kind))


def read_vectors(
    mask: Mask, record: object, kind: str = "float32", base: Mapping[str, NDArray[Any]] | None = None
) -> dict[str, Vector]:
    """Return the flat vectors of a record, which can be read in parts.

    Parameters
    ----------
    mask : Mask
        The mask under which they are packed.
    record : ArrayRecord
        Record of a message.
    kind : str
        Encoding of the values.
    base : Mapping[str, ndarray] | None
        Flat vectors of floating dtypes, to which the record's values are added.

    Raises
    ------
    WireError
        If the record lacks a dtype, has an unexpected one, a length does not fit the mask, or a quantised value is not
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
            data = view_of(record[dtype], "uint8", coded_size(kind, kept, size))
            try:
                source = Coded(data, kind, kept, size).read
            except ValueError as error:
                raise WireError(f"the {dtype} values: {error}") from error
        else:
            source = view_of(record[dtype], dtype, size)
        found[dtype] = Vector(dtype, size, source, None if base is None else base.get(dtype))
    return found


def pack_deltas(mask: Mask, deltas: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """Make the record of an explorer's reply from its deltas, under a mask that keeps everything.

    It has the same keys as the message, as Flower's mods expect. Integer dtypes get an encoding of no arrays.
    """
    try:
        coded = {
            dtype: encode_deltas([spec for spec in specs if spec.floating], deltas)
            for dtype, specs in mask.layout.by_dtype.items()
        }
    except ValueError as error:
        raise WireError(str(error)) from error
    return ArrayRecord({dtype: make_array([data]) for dtype, data in coded.items()})


def unpack_deltas(mask: Mask, record: ArrayRecord) -> Arrays:
    """Return the deltas of an explorer's reply per floating array, in its shape, as :func:`decode_deltas` does."""
    expected = mask.layout.by_dtype
    if set(record) != set(expected):
        raise WireError(f"an explorer's deltas have the keys {sorted(record)[:5]}, expected {sorted(expected)}")
    deltas: Arrays = {}
    try:
        for dtype, specs in expected.items():
            data = bytes(view_of(record[dtype], "uint8").data)
            deltas |= decode_deltas([spec for spec in specs if spec.floating], data)
    except ValueError as error:
        raise WireError(str(error)) from error
    return deltas


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
