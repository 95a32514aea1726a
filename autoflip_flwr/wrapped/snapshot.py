"""Read a strategy's state for a checkpoint, load it again, or undo changes to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from autoflip_flwr.core.layout import Arrays
from autoflip_flwr.storage.codec import decode, encode
from autoflip_flwr.wrapped.privacy import WRAPPERS
from autoflip_flwr.wrapped.traits import layers

_CODE = (FunctionType, MethodType, BuiltinFunctionType, partial, type)


def strategy_state(strategy: Strategy, arrays: Arrays) -> list[Any]:
    """Return the state of a strategy and of those inside it, as JSON and arrays.

    It is what their ``state_dict()`` returns, if they have one (as Flower's privacy accountant does). Otherwise it is
    their attributes, without functions and classes.

    Raises
    ------
    ValueError
        If an attribute can be neither stored nor skipped; the message names it.
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
    """Load the state that :func:`strategy_state` returned for a strategy made in the same way."""

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
    """Return a function that resets a strategy, and those inside it, to their present attributes.

    Dicts, lists and sets get back their present entries; the entries themselves are not copied. Wrappers for
    differential privacy are not reset, since a release cannot be undone.
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
    """Return class and plain settings (numbers, text) of a strategy and of those inside it, as they are now."""
    return {
        f"{index}.{type(layer).__name__}": {
            name: value for name, value in vars(layer).items() if isinstance(value, bool | int | float | str)
        }
        for index, layer in enumerate(layers(strategy))
    }


def _has_own(thing: object) -> bool:
    return all(callable(getattr(thing, name, None)) for name in ("state_dict", "load_state_dict"))
