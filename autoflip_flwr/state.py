"""State as JSON and arrays, and back: nothing is pickled, and no class is looked up by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from autoflip_flwr.coordinates import layers
from autoflip_flwr.privacy import WRAPPERS
from autoflip_flwr.wire.records import to_arrays, to_record

Arrays = dict[str, NDArray[Any]]

_KINDS = "?bhilqBHILQefd"
"""Type codes of the arrays that can be kept."""

_CODE = (FunctionType, MethodType, BuiltinFunctionType, partial, type)

_METRICS = {"MetricRecord": MetricRecord, "ConfigRecord": ConfigRecord}


def encode(value: object, arrays: Arrays, at: str) -> Any:
    """A value as JSON, its arrays put into ``arrays`` under names that begin with ``at``.

    Raises
    ------
    ValueError
        If it is, or holds, something other than None, bool, numbers, str, bytes, arrays, Flower's records, and lists,
        tuples, sets and dicts of those; the message says where.
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
    """The value that :func:`encode` was given."""
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


def strategy_state(strategy: Strategy, arrays: Arrays) -> list[Any]:
    """The state of a strategy and of those inside it, as JSON and arrays.

    That is what their ``state_dict()`` returns where they have one, as Flower's privacy accountant has, and else their
    attributes, but for functions and classes.

    Raises
    ------
    ValueError
        If an attribute can neither be kept nor be left out; the message names it.
    """

    def of(thing: Any, at: str) -> Any:
        if _has_own(thing):
            return {"own": encode(thing.state_dict(), arrays, at)}
        if not isinstance(thing, Strategy):
            return {"plain": encode(thing, arrays, at)}
        return {
            "attributes": {
                name: of(value, f"{at}/{name}")
                for name, value in vars(thing).items()
                if not isinstance(value, (Strategy, *_CODE))
            }
        }

    found = []
    for index, layer in enumerate(layers(strategy)):
        name = type(layer).__name__
        try:
            state = of(layer, f"{index}.{name}")
        except ValueError as error:
            raise ValueError(
                f"the state of {name} cannot be kept: {str(error).partition('.')[2]}; give {name} the methods "
                "state_dict() and load_state_dict(state), of numbers, text, arrays and lists and dicts of those"
            ) from error
        found.append([name, state])
    return found


def load_strategy_state(strategy: Strategy, state: list[Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Give a strategy the state that :func:`strategy_state` has read from one that was made alike."""

    def put(thing: Any, tree: dict[str, Any], assign: Callable[[Any], None]) -> None:
        ((kind, found),) = tree.items()
        if kind == "own":
            thing.load_state_dict(decode(found, arrays))
        elif kind == "plain":
            assign(decode(found, arrays))
        else:
            for name, each in found.items():
                put(getattr(thing, name, None), each, partial(setattr, thing, name))

    for layer, (_, tree) in zip(layers(strategy), state, strict=True):
        put(layer, tree, lambda _: None)


def undo_of(strategy: Strategy) -> Callable[[], None]:
    """A function that gives a strategy, and those inside it, the attributes that they have now.

    Dicts, lists and sets get back the entries that they have now; what those hold is not copied. Wrappers for
    differential privacy stay as they are then: what they have released is released.
    """
    kept = []
    for layer in layers(strategy):
        if isinstance(layer, WRAPPERS):
            continue
        attributes = dict(vars(layer))
        entries = [(value, value.copy()) for value in attributes.values() if isinstance(value, dict | list | set)]
        kept.append((layer, attributes, entries))

    def undo() -> None:
        for layer, attributes, entries in kept:
            vars(layer).clear()
            vars(layer).update(attributes)
            for container, before in entries:
                container.clear()
                container.extend(before) if isinstance(container, list) else container.update(before)

    return undo


def settings_of(strategy: Strategy) -> dict[str, Any]:
    """Class and plain settings (numbers, text) of a strategy and of those inside it, as they are now."""
    return {
        f"{index}.{type(layer).__name__}": {
            name: value for name, value in vars(layer).items() if isinstance(value, bool | int | float | str)
        }
        for index, layer in enumerate(layers(strategy))
    }


def _has_own(thing: object) -> bool:
    return all(callable(getattr(thing, name, None)) for name in ("state_dict", "load_state_dict"))


def _put(array: NDArray[Any], arrays: Arrays, name: str) -> str:
    if array.dtype.char not in _KINDS:
        raise ValueError(f"{name.replace('/', '.')} is an array of {array.dtype}")
    unused = name
    while unused in arrays:  # two keys of a dict may read alike
        unused += "'"
    arrays[unused] = array
    return unused
