"""From scores to a mask: exact counts, floors, ties."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping
from dataclasses import replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.core.choices import SCOPES
from autoflip_flwr.core.layout import Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.statistics import Exploration, Floats


def pruned_count(sparsity: float, size: int) -> int:
    """``floor(sparsity * size)`` in exact decimals: ``pruned_count(0.29, 100)`` is 29."""
    return int(Fraction(repr(float(sparsity))) * size)


def tied_weights(
    layout: Layout, initial: Mapping[str, NDArray[np.generic]], exploration: Exploration
) -> dict[str, str]:
    """Prunable arrays that are a weight known by another name too -> the first of its names.

    Tied weights (an embedding that is the output layer as well) come under each of their names with the same values,
    and the explorers moved them in the same way. Arrays of one value, or that nobody moved, say nothing.
    """
    alike = (initial, exploration.deviation, exploration.signed_mean)
    first: dict[tuple[object, ...], str] = {}
    found: dict[str, str] = {}
    for spec in layout.prunable:
        values = initial[spec.name]
        if (values == values.flat[0]).all() or not exploration.deviation[spec.name].any():
            continue
        sums = tuple(zlib.crc32(arrays[spec.name].tobytes()) for arrays in alike)
        one = first.setdefault((spec.shape, spec.dtype, sums), spec.name)
        if one != spec.name and all(np.array_equal(arrays[one], arrays[spec.name]) for arrays in alike):
            found[spec.name] = one
    return found


def choose_mask(
    layout: Layout,
    score: Mapping[str, Floats],
    sparsity: float,
    scope: str = "global",
    version: int = 0,
    tied: Mapping[str, str] | None = None,
    spared: Collection[str] = (),
) -> Mask:
    """Prune exactly the share ``sparsity`` of the prunable entries, those with the lowest scores.

    Ties are broken by index: of equal scores the earlier entry is pruned first. Each array keeps at least one entry
    and each unit of the output layers at least one incoming weight (:func:`protected_outputs`); where such a floor
    binds, the next-lowest entries make up the count.

    Parameters
    ----------
    layout : Layout
        The model's arrays.
    score : Mapping[str, ndarray]
        A finite score for each prunable entry.
    sparsity : float
        T_p, the share to prune, in [0, 1).
    scope : str
        ``"global"``: one quantile over all prunable entries (the authors' code); ``"layer"``: one for each array.
    version : int
        Version of the mask.
    tied : Mapping[str, str] | None
        Arrays that are another one's weight under a second name (:func:`tied_weights`): they count once, and get its
        mask.
    spared : Collection[str]
        Prunable arrays that keep all of their entries; they do not count.

    Raises
    ------
    ValueError
        If an argument is out of range, a score is not finite, nothing is prunable, or the floors cannot be kept.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity = {sparsity}: must be a number in [0, 1)")
    if scope not in SCOPES:
        raise ValueError(f"scope = {scope!r}: must be one of {', '.join(SCOPES)}")
    if not layout.prunable:
        raise ValueError("no array of the model is prunable: weights have two or more dimensions; else give `prunable`")
    if tied or spared:
        whole = {name: np.ones(layout[name].shape, bool) for name in spared}
        keep = choose_mask(narrowed(layout, tied or {}, spared), score, sparsity, scope).keep | whole
        keep |= {name: keep[other] for name, other in (tied or {}).items()}
        return Mask.from_bool(layout, keep, version)
    flat = {spec.name: np.asarray(score[spec.name], np.float64).reshape(-1) for spec in layout.prunable}
    for name, values in flat.items():
        if not np.isfinite(values).all():
            raise ValueError(f"the scores of {name!r} are not finite")
    outputs = protected_outputs(layout, sparsity, scope)
    protected = {
        spec.name: _protected(flat[spec.name].reshape(spec.shape), outputs.get(spec.name)) for spec in layout.prunable
    }
    if scope == "layer":
        keep = {name: _keep(flat[name], protected[name], sparsity, name) for name in flat}
    else:
        every = _keep(
            np.concatenate(list(flat.values())), np.concatenate(list(protected.values())), sparsity, "the model"
        )
        ends = np.cumsum([values.size for values in flat.values()])[:-1]
        keep = dict(zip(flat, np.split(every, ends), strict=True))
    return Mask.from_bool(layout, {spec.name: keep[spec.name].reshape(spec.shape) for spec in layout.prunable}, version)


def protected_outputs(layout: Layout, sparsity: float, scope: str) -> dict[str, int]:
    """The output layers of which each unit keeps an incoming weight -> the axis of their units.

    Of the layout's guesses those are left out, the later first, with which there are fewer entries left than must stay.
    """
    found = {name: axis for name, axis in layout.output.items() if name not in layout.guesses}
    room = {spec.name: spec.size - pruned_count(sparsity, spec.size) for spec in layout.prunable}
    units = {name: layout[name].shape[axis] for name, axis in layout.output.items()}
    left = layout.prunable_size - pruned_count(sparsity, layout.prunable_size)
    left -= sum(units[spec.name] if spec.name in found else 1 for spec in layout.prunable)
    for name in layout.guesses:
        if units[name] <= room[name] if scope == "layer" else units[name] - 1 <= left:
            found[name] = layout.output[name]
            left -= units[name] - 1
    return found


def narrowed(layout: Layout, tied: Mapping[str, str], spared: Collection[str]) -> Layout:
    """The layout without second names (:func:`tied_weights`), in which what is spared is not prunable."""
    specs = (replace(spec, prunable=spec.prunable and spec.name not in spared) for spec in layout.specs)
    output = {tied.get(name, name): axis for name, axis in layout.output.items()}
    return Layout(
        tuple(spec for spec in specs if spec.name not in tied),
        {name: axis for name, axis in output.items() if name not in spared},
        tuple(name for name in dict.fromkeys(tied.get(name, name) for name in layout.guesses) if name not in spared),
    )


def _protected(values: Floats, axis: int | None) -> NDArray[np.bool_]:
    """The entry that is pruned last of the array, or of each unit along the axis of an output layer; 1-D."""
    protected = np.zeros(values.shape, dtype=bool)
    units = values.shape[axis] if axis is not None else 1
    rows = np.moveaxis(values, axis or 0, 0).reshape(units, -1)
    # the last of equal maxima, since of equal scores the earlier entry is pruned first
    top = rows.shape[1] - 1 - np.argmax(rows[:, ::-1], axis=1)
    places = np.moveaxis(np.arange(values.size).reshape(values.shape), axis or 0, 0).reshape(units, -1)
    protected.reshape(-1)[places[np.arange(units), top]] = True
    return protected.reshape(-1)


def _keep(values: Floats, protected: NDArray[np.bool_], sparsity: float, what: str) -> NDArray[np.bool_]:
    count = pruned_count(sparsity, values.size)
    free = values[~protected]
    if count > free.size:
        raise ValueError(
            f"sparsity = {sparsity}: {count} of the {values.size} entries of {what} would be pruned, but "
            f"{values.size - free.size} must stay (one for each array and one for each output unit)"
        )
    keep_free = np.ones(free.size, dtype=bool)
    if count:
        cut = np.partition(free, count - 1)[count - 1]
        keep_free = free > cut
        ties = np.flatnonzero(free == cut)
        keep_free[ties[count - int(np.count_nonzero(free < cut)) :]] = True
    keep = np.ones(values.size, dtype=bool)
    keep[~protected] = keep_free
    return keep
