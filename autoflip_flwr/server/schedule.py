"""Change masks during training: call a schedule, check its answer, and find the values that entries grow from."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from itertools import takewhile

import numpy as np

from autoflip_flwr.core.layout import Arrays, Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.method import Method
from autoflip_flwr.core.selection import narrowed, tied_weights, widened
from autoflip_flwr.core.statistics import Statistics
from autoflip_flwr.core.subspace import Subspace
from autoflip_flwr.wire.keys import HEADER

Schedule = Callable[..., Mask | None]
"""Takes one, two or three of the round, the mask in force and the model (full arrays by name), in this order."""

_MANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def arguments_of(schedule: Schedule) -> int:
    """Return how many of the round, the mask in force and the model a mask schedule takes by position.

    A parameter with a default other than None keeps its default: it may be meant for the function's own use.

    Raises
    ------
    TypeError
        If it is not a function, takes none of them, or needs more.
    """
    if not callable(schedule):
        raise TypeError(
            f"mask_schedule is of type {type(schedule).__name__}: must be a function of (round, mask, model), or None"
        )
    try:
        parameters = list(inspect.signature(schedule).parameters.values())
    except ValueError:  # some functions written in C have no signature
        return 1
    positional = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    given = len(list(takewhile(lambda each: each.default in (each.empty, None), positional)))
    if given == len(positional) and any(each.kind is each.VAR_POSITIONAL for each in parameters):
        given = 3
    needed = [each for each in parameters if each.default is each.empty and each.kind not in _MANY]
    if not given or any(each not in positional[:3] for each in needed):
        raise TypeError(
            f"mask_schedule takes ({', '.join(each.name for each in needed)}): it must take one, two or three of the "
            "round, the mask in force and the model (full arrays by name), in this order"
        )
    return min(given, 3)


def ask_schedule(schedule: Schedule, round_: int, mask: Mask, model: Arrays) -> Mask | None:
    """Return the mask that a schedule names for a round; ``None`` keeps the one in force.

    Raises
    ------
    TypeError, ValueError
        As :func:`check_mask` does.
    """
    new = schedule(*(round_, mask, _views(model))[: arguments_of(schedule)])
    return None if new is None else check_mask(new, mask.layout, f"mask_schedule in round {round_}")


def refined(
    method: Method,
    round_: int,
    mask: Mask,
    model: Arrays,
    seen: Statistics | None,
    explored: Statistics | None,
    initial: Arrays,
    sampled: Statistics | None,
) -> Mask | None:
    """Return the mask that a method names for a round, as :func:`ask_schedule` does for a schedule.

    ``explored`` is what clients reported before training, from W0 (``initial``). ``sampled`` is what those explorers
    reported that the round samples, if the method asks for it. As in the choice of the first mask, tied weights are one
    weight, and spared arrays keep all entries.
    """
    if type(method).refine is Method.refine:
        return None
    inner, tied, spared = _narrowed(method, mask, model, explored)
    if sampled is not None:
        method.sampled(inner.layout, initial, sampled)
    new = method.refine(round_, inner, _views(model), seen)
    if new is None:
        return None
    new = check_mask(new, inner.layout, f"{type(method).__name__}.refine in round {round_}")
    return new if inner is mask else widened(mask.layout, new, tied, spared)


def prepared(
    method: Method, round_: int, mask: Mask, model: Arrays, explored: Statistics | None
) -> dict[str, bool | int | float | str]:
    """Return the config entries that a method has for a round's clients, by their whole names."""
    if not method.prepares:
        return {}
    inner, _, _ = _narrowed(method, mask, model, explored)
    return {f"{HEADER}-{name}": value for name, value in method.prepare(round_, inner, _views(model)).items()}


def _narrowed(
    method: Method, mask: Mask, model: Arrays, explored: Statistics | None
) -> tuple[Mask, dict[str, str], Collection[str]]:
    """Return the mask as a method sees it, the tied weights that it lacks, and the spared arrays."""
    tied, spared = tied_weights(mask.layout, model), method.spared(mask.layout, explored)
    if not tied and not spared:
        return mask, tied, spared
    return Mask.from_bool(narrowed(mask.layout, tied, spared), mask.keep), tied, spared


def _views(model: Arrays) -> Arrays:
    """Return read-only views of the model, so that a schedule cannot change it."""
    views = {name: array.view() for name, array in model.items()}
    for view in views.values():
        view.flags.writeable = False
    return views


def check_mask(mask: object, layout: Layout, origin: str) -> Mask:
    """Check a mask that comes into force with the next round. ``origin`` says where it comes from.

    Raises
    ------
    TypeError
        If it is not a mask.
    ValueError
        If its arrays differ from the layout's.
    """
    if not isinstance(mask, Mask):
        raise TypeError(
            f"{origin}: must be a Mask, not {type(mask).__name__}: make one with Mask.from_bool(mask.layout, keep)"
        )
    if mask.layout.specs != layout.specs:
        raise ValueError(f"{origin}: the mask's arrays are not those of the model")
    return mask


def same_arrays(layout: Layout, model: Arrays) -> bool:
    """Return whether a model has the names and shapes of a layout, in its order."""
    return [(spec.name, spec.shape) for spec in layout.specs] == [(name, each.shape) for name, each in model.items()]


def goes_on(before: Subspace, model: Arrays) -> bool:
    """Return whether a model continues an earlier start, that is, lies in its subspace.

    The initial model of that start does not continue it, although it lies in the subspace if its values stand outside
    the mask.
    """
    if not same_arrays(before.mask.layout, model):
        return False
    base, keep = before.base, before.mask.keep
    if base is None:
        return not any(model[name][~keep[name]].any() for name in keep)
    outside = all(np.array_equal(model[name][~keep[name]], base[name][~keep[name]]) for name in keep)
    return outside and any(not np.array_equal(model[name], base[name]) for name in keep)


def last_values(mask: Mask, values: Arrays, model: Arrays) -> Arrays:
    """Return the final model of an earlier start, with the values that entries grow from outside its mask."""
    return mask.layout.cast(mask.scatter(mask.gather(model), into=values))
