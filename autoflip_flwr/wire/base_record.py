"""Record of the base (the values of pruned entries): its prunable arrays, flat by dtype, not quantised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from numpy.typing import NDArray

from autoflip_flwr.core.digest import digest_of
from autoflip_flwr.core.layout import Arrays, ArraySpec, Layout, split
from autoflip_flwr.wire.records import WireError, make_array, view_of


def base_digest(layout: Layout, base: Mapping[str, NDArray[Any]]) -> str:
    """Return the digest that identifies a base in headers, of its prunable arrays in the model's dtypes and order."""
    return digest_of({spec.name: np.asarray(base[spec.name], spec.dtype) for spec in layout.prunable})


def base_entry(digest: str) -> dict[str, str]:
    """Return the header entry that names the base; empty if pruned entries are zero."""
    return {"base": digest} if digest else {}


def encode_base(layout: Layout, base: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """Make the record of a base from full arrays by name (one copy)."""
    return ArrayRecord(
        {
            dtype: make_array([np.ascontiguousarray(base[spec.name], dtype).reshape(-1) for spec in specs])
            for dtype, specs in _prunable(layout).items()
        }
    )


def decode_base(layout: Layout, record: object) -> Arrays:
    """Return the prunable arrays of a record in their shapes, as read-only views of the record's bytes.

    Raises
    ------
    WireError
        If it is no ArrayRecord, or its keys, dtypes or lengths do not fit the layout.
    """
    expected = _prunable(layout)
    if not isinstance(record, ArrayRecord):
        raise WireError("the base must be an ArrayRecord")
    if set(record) != set(expected):
        raise WireError(f"the base has the keys {sorted(record)[:5]}, expected {sorted(expected)}")
    arrays: Arrays = {}
    for dtype, specs in expected.items():
        values = view_of(record[dtype], dtype, sum(spec.size for spec in specs))
        arrays |= split(values, {spec.name: spec.shape for spec in specs})
    return arrays


def check_base(layout: Layout, record: object, digest: str) -> None:
    """Check a base that came with a message against the digest in the header.

    Raises
    ------
    WireError
        As :func:`decode_base`; or if a value is NaN or infinity, or the digest differs.
    """
    arrays = decode_base(layout, record)
    for name, values in arrays.items():
        if not np.isfinite(values).all():
            raise WireError(f"array {name!r} of the base holds NaN or infinity")
    if base_digest(layout, arrays) != digest:
        raise WireError("the base that came along is not the one that the message's header names")


def _prunable(layout: Layout) -> dict[str, list[ArraySpec]]:
    """Return the prunable arrays of each dtype in the layout's order; dtypes without any are omitted."""
    found = {dtype: [spec for spec in specs if spec.prunable] for dtype, specs in layout.by_dtype.items()}
    return {dtype: specs for dtype, specs in found.items() if specs}
