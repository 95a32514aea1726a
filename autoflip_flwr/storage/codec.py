"""Convert state to JSON and arrays, and back. Nothing is pickled, and no class is looked up by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from numpy.typing import NDArray

from autoflip_flwr.core.layout import Arrays
from autoflip_flwr.wire.records import to_arrays, to_record

_KINDS = "?bhilqBHILQefd"
"""NumPy type codes of the arrays that can be stored."""

_METRICS = {"MetricRecord": MetricRecord, "ConfigRecord": ConfigRecord}


def encode(value: object, arrays: Arrays, at: str) -> Any:
    """Convert a value to JSON, and add its arrays to ``arrays`` under names that begin with ``at``.

    Raises
    ------
    ValueError
        If it is, or contains, something other than None, bool, numbers, str, bytes, arrays, Flower's records, and
        lists, tuples, sets and dicts of those. The message says where.
    """
    match value:
        case None | bool() | str():
            return value
        case np.generic():
            return {"scalar": _put(np.asarray(value), arrays, at)}
        case int() | float():
            return value
        case bytes():
            return {"bytes": _put(np.frombuffer(value, np.uint8), arrays, at)}
        case np.ndarray():
            return {"array": _put(value, arrays, at)}
        case ArrayRecord():
            found = to_arrays(value)
            return {"ArrayRecord": [[name, _put(array, arrays, f"{at}/{name}")] for name, array in found.items()]}
        case MetricRecord() | ConfigRecord():
            return {type(value).__name__: [[key, encode(each, arrays, f"{at}/{key}")] for key, each in value.items()]}
        case list() | tuple() | set() | frozenset():
            kind = next(kind.__name__ for kind in (list, tuple, set, frozenset) if isinstance(value, kind))
            return {kind: [encode(each, arrays, f"{at}/{index}") for index, each in enumerate(value)]}
        case Mapping():
            return {
                "dict": [
                    [encode(key, arrays, f"{at}/key"), encode(each, arrays, f"{at}/{key}")]
                    for key, each in value.items()
                ]
            }
    raise ValueError(f"{at.replace('/', '.')} is a {type(value).__name__}")


def decode(tree: Any, arrays: Mapping[str, NDArray[Any]]) -> Any:
    """Return the value that :func:`encode` was given."""
    if not isinstance(tree, dict):
        return tree
    ((kind, found),) = tree.items()
    match kind:
        case "scalar":
            return arrays[found][()]
        case "bytes":
            return arrays[found].tobytes()
        case "array":
            return np.array(arrays[found])
        case "ArrayRecord":
            return to_record({name: arrays[key] for name, key in found})
        case "MetricRecord" | "ConfigRecord":
            return _METRICS[kind]({key: decode(each, arrays) for key, each in found})
        case "dict":
            return {decode(key, arrays): decode(each, arrays) for key, each in found}
    return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind](
        decode(each, arrays) for each in found
    )


def _put(array: NDArray[Any], arrays: Arrays, name: str) -> str:
    if array.dtype.char not in _KINDS:
        raise ValueError(f"{name.replace('/', '.')} is an array of {array.dtype}")
    unused = name
    while unused in arrays:  # two keys of a dict may have the same text
        unused += "'"
    arrays[unused] = array
    return unused
