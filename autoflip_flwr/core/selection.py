"""Select a mask from scores, with exact counts, floors and rules for ties."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.core.budget import floors_of
from autoflip_flwr.core.layout import Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.statistics import Floats, Statistics

Bools = NDArray[np.bool_]


def select(
    layout: Layout,
    score: Mapping[str, Floats],
    budget: Mapping[tuple[str, ...], int],
    *,
    out: Mapping[str, Bools] | None = None,
    version: int = 0,
) -> Mask:
    """Keep the entries with the highest scores: exactly as many per group as the budget says.

    Ties are broken by index: of equal scores, the earlier entry is pruned first. Each array keeps at least one entry,
    and each unit of the output layers at least one incoming weight (:func:`protected_outputs`). Where such a floor
    keeps an entry, the entry with the next-lowest score is pruned instead.

    Parameters
    ----------
    layout : Layout
        The model's arrays.
    score : Mapping[str, ndarray]
        A finite score per prunable entry, in the arrays' shapes.
    budget : Mapping[tuple[str, ...], int]
        Group of arrays that are ranked together -> number of entries to keep
        (:class:`~autoflip_flwr.core.budget.Budget`). Each prunable array belongs to one group.
    out : Mapping[str, ndarray] | None
        Entries (True) that are pruned whatever their scores, since their whole unit is pruned. They count as pruned. A
        unit or an array with no other entries has no floor.
    version : int
        Version of the mask.

    Raises
    ------
    ValueError
        If nothing is prunable, an array is in no group or in two, a count is out of range, a score is not finite, or
        the budget is too small for the floors.
    """
    if not layout.prunable:
        raise ValueError("no array of the model is prunable: weights have two or more dimensions; else give `prunable`")
    _check_budget(layout, budget)
    flat = {spec.name: np.asarray(score[spec.name], np.float64).reshape(-1) for spec in layout.prunable}
    for name, values in flat.items():
        if not np.isfinite(values).all():
            raise ValueError(f"the scores of {name!r} are not finite")
    taken = {spec.name: np.zeros(spec.size, bool) for spec in layout.prunable}
    taken |= {name: np.asarray(entries, bool).reshape(-1) for name, entries in (out or {}).items()}
    outputs = protected_outputs(layout, budget)
    protected = {
        spec.name: _protected(flat[spec.name], taken[spec.name], spec.shape, outputs.get(spec.name))
        for spec in layout.prunable
    }
    keep: dict[str, Bools] = {}
    for names, kept in budget.items():
        if not names:
            continue
        what = "the model" if len(budget) == 1 else f"{names[0]!r}" if len(names) == 1 else f"{names[0]} to {names[-1]}"
        values = np.concatenate([flat[name] for name in names])
        floors, units = (np.concatenate([part[name] for name in names]) for part in (protected, taken))
        every = _keep(values, floors, units, kept, what)
        ends = np.cumsum([flat[name].size for name in names])[:-1]
        keep |= dict(zip(names, np.split(every, ends), strict=True))
    return Mask.from_bool(layout, {spec.name: keep[spec.name].reshape(spec.shape) for spec in layout.prunable}, version)


def protected_outputs(layout: Layout, budget: Mapping[tuple[str, ...], int]) -> dict[str, int]:
    """Map each output layer whose units all keep an incoming weight to the axis of its units.

    Guessed output layers are included in the layout's order, as long as their floors fit into the budget.
    """
    floors = floors_of(layout)
    left = {names: kept - sum(floors[name] for name in names) for names, kept in budget.items()}
    group = {name: names for names in budget for name in names}
    found = {name: axis for name, axis in layout.output.items() if name not in layout.guesses}
    for name in layout.guesses:
        units = layout[name].shape[layout.output[name]]
        if units - 1 <= left[group[name]]:
            found[name] = layout.output[name]
            left[group[name]] -= units - 1
    return found


def tied_weights(
    layout: Layout, initial: Mapping[str, NDArray[np.generic]], seen: Statistics | None = None
) -> dict[str, str]:
    """Map each prunable array that is the same weight as an earlier one to the first of its names.

    Tied weights (such as an embedding that is also the output layer) appear under several names with the same values,
    and with the same statistics from clients. Constant arrays, and arrays with a statistic of only zeros, are skipped.
    """
    parts = [] if seen is None else [*seen.mean_square.values(), *seen.mean.values()]
    alike = [initial, *(part for part in parts if part.keys() >= set(layout.prunable_names))]
    first: dict[tuple[object, ...], str] = {}
    found: dict[str, str] = {}
    for spec in layout.prunable:
        values = initial[spec.name]
        if not values.size or (values == values.flat[0]).all() or not all(a[spec.name].any() for a in alike[1:2]):
            continue
        sums = tuple(zlib.crc32(arrays[spec.name].tobytes()) for arrays in alike)
        one = first.setdefault((spec.shape, spec.dtype, sums), spec.name)
        if one != spec.name and all(np.array_equal(arrays[one], arrays[spec.name]) for arrays in alike):
            found[spec.name] = one
    return found


def narrowed(layout: Layout, tied: Mapping[str, str], spared: Collection[str]) -> Layout:
    """Return the layout without duplicate names of :func:`tied_weights`, with ``spared`` arrays not prunable."""
    specs = (replace(spec, prunable=spec.prunable and spec.name not in spared) for spec in layout.specs)
    output = {tied.get(name, name): axis for name, axis in layout.output.items()}
    return Layout(
        tuple(spec for spec in specs if spec.name not in tied),
        {name: axis for name, axis in output.items() if name not in spared},
        tuple(name for name in dict.fromkeys(tied.get(name, name) for name in layout.guesses) if name not in spared),
    )


def widened(layout: Layout, mask: Mask, tied: Mapping[str, str], spared: Collection[str]) -> Mask:
    """Convert a mask of :func:`narrowed`'s layout to the whole layout; duplicate names get the mask of the first."""
    keep = {**mask.keep, **{name: np.ones(layout[name].shape, bool) for name in spared}}
    keep |= {name: keep[other] for name, other in tied.items()}
    return Mask.from_bool(layout, keep, mask.version)


def _check_budget(layout: Layout, budget: Mapping[tuple[str, ...], int]) -> None:
    names = [name for group in budget for name in group]
    if sorted(names) != sorted(layout.prunable_names):
        odd = sorted(set(names) ^ set(layout.prunable_names)) or sorted({n for n in names if names.count(n) > 1})
        raise ValueError(f"budget: each prunable array belongs to one group, and {', '.join(odd[:5])} does not")
    for group, kept in budget.items():
        size = sum(layout[name].size for name in group)
        if not 0 <= kept <= size:
            raise ValueError(f"budget: {kept} of the {size} entries of {', '.join(group[:3])} cannot be kept")


def _protected(values: Floats, taken: Bools, shape: tuple[int, ...], axis: int | None) -> Bools:
    """Return 1-D flags of the protected entries: the best one of the array, or of each unit of an output layer."""
    protected = np.zeros(values.size, dtype=bool)
    units = shape[axis] if axis is not None else 1
    free = np.where(taken, -np.inf, values).reshape(shape)
    rows = np.moveaxis(free, axis or 0, 0).reshape(units, -1) if shape else free.reshape(1, 1)
    # take the last of equal maxima, since of equal scores the earlier entry is pruned first
    top = rows.shape[1] - 1 - np.argmax(rows[:, ::-1], axis=1)
    places = np.arange(values.size).reshape(shape)
    places = np.moveaxis(places, axis or 0, 0).reshape(units, -1) if shape else places.reshape(1, 1)
    protected[places[np.arange(units), top]] = True
    return protected & ~taken


def _keep(values: Floats, protected: Bools, taken: Bools, kept: int, what: str) -> Bools:
    open_ = ~(protected | taken)
    free = values[open_]
    must, count = int(np.count_nonzero(protected)), values.size - int(np.count_nonzero(taken)) - kept
    if count < 0:
        raise ValueError(f"{kept} of the entries of {what} are to be kept, but whole units leave {kept + count}")
    if count > free.size:
        raise ValueError(
            f"{values.size - kept} of the {values.size} entries of {what} would be pruned, but {must} must stay (one "
            "for each array and one for each output unit)"
        )
    keep_free = np.ones(free.size, dtype=bool)
    if count:
        cut = np.partition(free, count - 1)[count - 1]
        keep_free = free > cut
        ties = np.flatnonzero(free == cut)
        keep_free[ties[count - int(np.count_nonzero(free < cut)) :]] = True
    keep = protected.copy()
    keep[open_] = keep_free
    return keep
