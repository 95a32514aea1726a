"""Choose the mask of round 1, and check what could fail before any client works."""

from __future__ import annotations

import copy
from collections.abc import Collection
from logging import INFO, WARNING

import numpy as np
from flwr.app import ArrayRecord
from flwr.common.logger import log

from autoflip_flwr.core import health
from autoflip_flwr.core.budget import BUDGETS
from autoflip_flwr.core.layout import Arrays, Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.method import Method, check_requests
from autoflip_flwr.core.request import DELTA
from autoflip_flwr.core.scored import Scored
from autoflip_flwr.core.selection import narrowed, protected_outputs, tied_weights, widened
from autoflip_flwr.core.statistics import Floats, Statistics
from autoflip_flwr.core.subspace import Subspace
from autoflip_flwr.wire.records import to_arrays


def choose_first(method: Method, sparsity: float, layout: Layout, initial: Arrays, seen: Statistics | None) -> Mask:
    """Let the method choose the mask of round 1. Tied weights are one weight, and get one mask.

    Raises
    ------
    ValueError, RuntimeError
        As :meth:`Method.first <autoflip_flwr.core.method.Method.first>` does.
    """
    for remark in method.inspect(layout, initial, seen):
        log(WARNING, "%s", remark)
    tied, spared = tied_weights(layout, initial, seen), method.spared(layout, seen)
    inner = narrowed(layout, tied, spared)
    scope = method.scope if isinstance(method, Scored) else "global"
    if outputs := list(protected_outputs(inner, BUDGETS[scope](inner, sparsity))):
        log(INFO, "each unit of %s keeps an incoming weight (output=)", ", ".join(outputs))
    try:
        chosen = _checked(method, method.first(sparsity, inner, initial, seen), inner)
    except ValueError as error:
        error = ValueError(f"sparsity = {sparsity}: {error}")
        if not spared:
            raise error from None
        raise ValueError(
            f"{error}; only what the explorers moved is pruned. The exploration is kept: start again with a lower "
            "sparsity, or with prune_unmoved=True"
        ) from error
    return widened(layout, chosen, tied, spared)


def _checked(method: Method, mask: object, layout: Layout) -> Mask:
    name = type(method).__name__
    if not isinstance(mask, Mask):
        raise TypeError(f"{name}.first returned a {type(mask).__name__}: must be a Mask, such as select(...) makes")
    if mask.layout.specs != layout.specs:
        raise ValueError(f"{name}.first returned a mask of other arrays than those of the layout that it was given")
    return mask


def rehearse(
    method: Method, sparsity: float, layout: Layout, initial: Arrays, mask: Mask | None, seen: Statistics | None
) -> None:
    """Check settings and model now, so that nothing fails after clients have trained.

    ``mask`` and ``seen`` are a mask and an exploration that the user has given.

    Raises
    ------
    ValueError, RuntimeError, TypeError
        If something would fail, with what to do about it.
    """
    for name, values in initial.items():
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ValueError(
                f"array {name!r} of the initial model holds NaN or infinity, and replies with such are rejected: send "
                "finite arrays, without constant buffers"
            )
    if mask is not None and mask.layout.specs != layout.specs:
        raise ValueError("mask: its arrays are not those of the initial model")
    if seen is not None:
        _check_statistics(layout, seen)
    if mask is not None or sparsity == 0:
        return
    trial = copy.deepcopy(method)
    if seen is not None:
        list(trial.inspect(layout, initial, seen))
        trial.first(sparsity, narrowed(layout, {}, trial.spared(layout, seen)), initial, seen)
        return
    asked = check_requests(trial, 0)
    same = _ones(layout, [each.name for each in asked], trial.squares)
    for tied in _ties(layout, initial, same):
        inner = narrowed(layout, tied, ())
        try:
            _checked(trial, trial.first(sparsity, inner, initial, same if asked else None), inner)
        except ValueError as error:
            raise ValueError(f"sparsity = {sparsity}: {error}") from None


def _ties(layout: Layout, initial: Arrays, same: Statistics) -> list[dict[str, str]]:
    """Return two cases: no ties, and all possible ties (arrays that start equal may turn out to be one weight)."""
    tied = tied_weights(layout, initial, same)
    return [{}, tied] if tied else [{}]


def _ones(layout: Layout, names: Collection[str], squares: Collection[str]) -> Statistics:
    """Return statistics in which all entries are equal."""
    ones: dict[str, Floats] = {spec.name: np.ones(spec.shape) for spec in layout.prunable}
    mean = dict.fromkeys(names, ones) | ({"normalised": ones} if DELTA in names else {})
    return Statistics(mean, {name: ones for name in names if name in squares}, 0)


def _check_statistics(layout: Layout, seen: Statistics) -> None:
    wanted = {spec.name: spec.shape for spec in layout.prunable}
    squares, means = (
        [{name: values.shape for name, values in arrays.items()} for arrays in part.values()]
        for part in (seen.mean_square, seen.mean)
    )
    if any(shapes != wanted for shapes in squares) or not all(wanted.items() <= shapes.items() for shapes in means):
        raise ValueError("exploration: its arrays are not the prunable arrays of the initial model")


def warn_of_problems(subspace: Subspace) -> None:
    """Log the problems of a mask in one warning, with what to do. None if pruned weights keep non-zero values."""
    if subspace.base is None and (found := health.problems(subspace.mask)):
        log(
            WARNING,
            "the mask may leave a network that cannot learn: %s. Try scope='layer', a lower sparsity, or exclude=[...]",
            "; ".join(found),
        )


def model_of(record: ArrayRecord) -> Arrays:
    """Return the arrays of a model that can be pruned; ``ValueError`` if none of them holds floating-point numbers."""
    coded = sorted({array.stype for array in record.values()} - {"numpy.ndarray"})
    arrays = {} if coded else to_arrays(record)
    kinds = coded or sorted({array.dtype.name for array in arrays.values()})
    if not any(array.dtype.kind == "f" for array in arrays.values()):
        raise ValueError(
            f"nothing to prune: the model is {len(record)} arrays of {', '.join(kinds) or 'nothing'}, and AutoFlip "
            "prunes floating-point ones; a model that travels as bytes, as XGBoost's does, runs with its strategy alone"
        )
    return arrays
