"""Check the arguments of ``start``, and call the ``start`` of a wrapped strategy that has its own."""

from __future__ import annotations

import difflib
import inspect
import math
import numbers
import operator
from collections.abc import Callable, Iterable, Mapping
from itertools import takewhile
from typing import Any, TypeVar

import flwr
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp.strategy import Strategy

S = TypeVar("S", bound=Strategy)

METHODS = ("configure_train", "aggregate_train", "configure_evaluate", "aggregate_evaluate")

_GRID = ("get_node_ids", "push_messages", "pull_messages")  # methods of Flower's grid that are used
_FIRST = ("grid", "initial_arrays")
_STANDARD = {name: each.default for name, each in inspect.signature(Strategy.start).parameters.items()}
_ALIKE = 0.85  # more similar names are taken for a typo, even if the start takes any name


def check(grid: object, initial_arrays: object, arguments: Mapping[str, Any]) -> None:
    """Check the arguments of ``start`` before any client works.

    Raises
    ------
    TypeError
        If an argument has another type than Flower's ``Strategy.start`` takes.
    ValueError
        If ``num_rounds`` or ``timeout`` is out of range.
    """
    if isinstance(grid, type) or not all(callable(getattr(grid, name, None)) for name in _GRID):
        raise TypeError(f"grid = {grid!r}: must be a Grid of flwr.serverapp")
    if not isinstance(initial_arrays, ArrayRecord):
        raise TypeError(
            f"initial_arrays is of type {type(initial_arrays).__name__}: must be an ArrayRecord, such as "
            "ArrayRecord(model.state_dict())"
        )
    rounds, timeout = arguments["num_rounds"], arguments["timeout"]
    try:
        if isinstance(rounds, bool):
            raise TypeError
        rounds = operator.index(rounds)
    except TypeError as error:
        raise TypeError(f"num_rounds = {rounds!r}: must be a whole number") from error
    if rounds < 0:
        raise ValueError(f"num_rounds = {rounds}: must be at least 0")
    if timeout is not None:
        if isinstance(timeout, bool) or not isinstance(timeout, numbers.Real):
            raise TypeError(f"timeout = {timeout!r}: must be a number of seconds, or None for no limit")
        if math.isnan(timeout) or timeout <= 0:
            raise ValueError(f"timeout = {timeout}: must be a number of seconds > 0, or None for no limit")
    for name in ("train_config", "evaluate_config"):
        if not isinstance(arguments[name], ConfigRecord | None):
            raise TypeError(f"{name} is of type {type(arguments[name]).__name__}: must be a ConfigRecord, or None")
    for name, of in (("evaluate_fn", "arrays"), ("should_stop", "result")):
        if not (arguments.get(name) is None or callable(arguments[name])):
            raise TypeError(f"{name} = {arguments[name]!r}: must be a function of the round and the {of}, or None")


class Twin:
    """A strategy that :func:`twin` has made."""


def twin(strategy: S, methods_of: object, names: Iterable[str] = METHODS) -> S:
    """Return a strategy of the same class and with the same state, but with methods of ``methods_of``.

    ``names`` are those of the methods. With the round methods alone, which is the default, a strategy with its own
    ``start`` (one that keeps the best model, say) still runs its own loop.
    """

    def forward(name: str) -> Callable[..., object]:
        return lambda _, *args, **kwargs: getattr(methods_of, name)(*args, **kwargs)

    kind: Any = type(strategy)
    methods = {name: forward(name) for name in names}
    result: S = object.__new__(type(kind)(kind.__name__, (Twin, kind), methods))
    result.__dict__ = strategy.__dict__
    return result


def bind(
    start: Callable[..., object], given: Mapping[str, Any], own: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """Match the arguments to the parameters of a ``start``. Return the positional ones and the named ones.

    Parameters
    ----------
    start : Callable
        The bound method of the strategy.
    given : Mapping[str, Any]
        The arguments of Flower's ``Strategy.start`` by name, in its order. The first two, the grid and the model, are
        passed by position if no parameter has their name. Defaults that ``start`` does not take are omitted.
    own : Mapping[str, Any]
        Further arguments that the user gave by name.

    Raises
    ------
    TypeError
        If ``start`` cannot be called with them.
    """
    signature = inspect.signature(start)
    parameters = list(signature.parameters.values())
    positional = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    kinds = {each.kind for each in parameters}
    rest = {**given, **own}
    values = {each.name: rest.pop(each.name) for each in parameters if each.name in rest}
    free = [
        each.name
        for index, each in enumerate(positional)
        if each.name not in values and (index < len(_FIRST) or each.default is each.empty)
    ]
    for parameter, name in zip(free, [name for name in _FIRST if name in rest], strict=False):
        values[parameter] = rest.pop(name)
    args = [values.pop(each.name) for each in takewhile(lambda each: each.name in values, positional)]
    if inspect.Parameter.VAR_POSITIONAL in kinds and len(args) == len(positional):
        only = kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
        args += [rest.pop(name) for name in (_FIRST if only else given) if name in rest]
    takes_any = inspect.Parameter.VAR_KEYWORD in kinds
    for name in (name for name in own if name in rest):
        if name == "should_stop" and not takes_any:
            flowers = getattr(start, "__func__", None) is Strategy.start
            since = f": it needs Flower 1.43 or later, and this is {flwr.__version__}" if flowers else ""
            raise TypeError(f"{start.__qualname__} takes no should_stop, which AutoFlip.start was given{since}")
        near = difflib.get_close_matches(name, [*given, *signature.parameters], 1, _ALIKE if takes_any else 0.6)
        if near or not takes_any:
            hint = f": did you mean {near[0]!r}?" if near else f", and neither has {start.__qualname__}"
            raise TypeError(f"AutoFlip.start has no parameter {name!r}{hint}")
    if takes_any:
        values |= rest
    elif lost := [name for name in given if name in rest and name != "timeout" and rest[name] != _STANDARD[name]]:
        raise TypeError(f"{start.__qualname__} takes no {' and no '.join(lost)}, which AutoFlip.start was given")
    try:
        signature.bind(*args, **values)
    except TypeError as error:
        raise TypeError(
            f"{start.__qualname__}{signature} cannot be called by AutoFlip.start: {error}; what Flower's own start has "
            "no name for is given by name, AutoFlip(strategy).start(grid, initial_arrays, name=...)"
        ) from error
    return args, values
