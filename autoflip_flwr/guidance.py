"""From the explorers' deviations to scores and a mask: pure functions on arrays.

Sources: the AutoFLIP paper (arXiv 2405.10271) and the code its authors published, FedLEx (arXiv 2506.18640). What
neither settles is marked "our reading".
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.layout import Arrays, Layout
from autoflip_flwr.mask import Mask

NORMALISATIONS = ("none", "layer", "per-client")
SCOPES = ("global", "layer")

Floats = NDArray[np.floating[Any]]

_SMALLEST = float(np.finfo(np.float32).tiny)
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Exploration:
    """What the explorers found, averaged over those that answered.

    It is summed in float64 and held in float32, array by array, unless an array has values beyond what float32 tells
    apart (squares of tiny moves, say) or is of float64 itself: that one stays in float64.

    Parameters
    ----------
    deviation : dict[str, ndarray]
        ``D = sum_k p_k Delta_k ** 2`` of each prunable array, with ``Delta_k = W_k - W0`` (paper, code).
    signed_mean : dict[str, ndarray]
        ``A = sum_k p_k Delta_k`` of each floating array.
    normalised : dict[str, ndarray]
        ``sum_k p_k minmax(Delta_k ** 2)`` of each prunable array: each explorer's deviation min-max normalised per
        array before averaging (FedLEx). Empty where it was not asked for.
    explorers : int
        How many explorers answered.
    """

    deviation: dict[str, Floats]
    signed_mean: dict[str, Floats]
    normalised: dict[str, Floats]
    explorers: int


def combine(
    layout: Layout, answers: Iterable[tuple[float, Mapping[str, NDArray[np.generic]]]], *, per_client: bool = False
) -> Exploration:
    """Average the explorers' answers, one at a time (memory does not grow with their number).

    Parameters
    ----------
    layout : Layout
        The model's arrays.
    answers : Iterable[tuple[float, Mapping[str, ndarray]]]
        For each explorer its weight ``> 0`` (1 for ``p_k = 1/|X|``, or its number of examples) and ``Delta_k`` for
        each floating array, in the layout's shapes.
    per_client : bool
        Also average the deviations that are normalised per explorer, which ``normalisation="per-client"`` needs.

    Raises
    ------
    ValueError
        If there is no answer, or a weight is not positive and finite.
    """
    deviation = {spec.name: np.zeros(spec.shape) for spec in layout.prunable}
    normalised = {spec.name: np.zeros(spec.shape) for spec in layout.prunable if per_client}
    mean = {spec.name: np.zeros(spec.shape) for spec in layout.specs if spec.floating}
    total, explorers = 0.0, 0
    for weight, delta in answers:
        if not 0 < weight < np.inf:
            raise ValueError(f"weight of an explorer = {weight}: must be a positive number")
        total += weight
        explorers += 1
        for name in mean:
            values = np.asarray(delta[name], np.float64)
            mean[name] += weight * values
            if name in deviation:
                square = values**2
                deviation[name] += weight * square
                if per_client:
                    normalised[name] += weight * minmax(square)
    if not explorers:
        raise ValueError("no explorer answered")

    def held(sums: dict[str, NDArray[np.float64]]) -> dict[str, Floats]:
        return {name: _held(sums.pop(name) / total, layout[name].dtype) for name in list(sums)}

    return Exploration(held(deviation), held(mean), held(normalised), explorers)


def _held(values: Floats, dtype: str) -> Floats:
    """The values in float32 if that tells them apart as well as it does a model's of this dtype, else as they are."""
    if np.dtype(dtype).itemsize > 4:
        return values
    size = np.abs(values)
    fits = not size.size or (size.max() <= _LARGEST and size.min(initial=np.inf, where=size > 0) >= _SMALLEST)
    return values.astype(np.float32) if fits else values


def minmax(values: Floats) -> NDArray[np.float64]:
    """``(x - min) / (max - min)``, float64; all 0 where max equals min."""
    values = np.asarray(values, np.float64)
    low, high = values.min(), values.max()
    if not high > low:
        return np.zeros_like(values)
    result: NDArray[np.float64] = (values - low) / (high - low)
    return result


def agreement(deviation: Floats, signed_mean: Floats) -> Floats:
    """Client agreement ``a = A ** 2 / D`` in [0, 1], float64 (our reading).

    1 where the explorers moved a parameter the same way, 0 where they cancel or nobody moved it.
    """
    square = np.asarray(signed_mean, np.float64) ** 2
    share = np.divide(square, deviation, out=np.zeros_like(square), where=deviation > 0)
    return np.minimum(share, 1.0)


def scores(exploration: Exploration, normalisation: str = "none", gamma: float = 1.0) -> dict[str, Floats]:
    """Score of each prunable parameter: guidance times agreement to the power gamma.

    Parameters
    ----------
    exploration : Exploration
        What the explorers found.
    normalisation : str
        ``"none"``: G = D. ``"layer"``: D min-max normalised per array (the authors' code). ``"per-client"``: each
        explorer's deviation normalised, then averaged (FedLEx).
    gamma : float
        Power of the agreement, ``>= 0``; 0 ignores it. ``"none"`` with 1 ranks by the squared signed mean.

    Returns
    -------
    dict[str, ndarray]
        float64 arrays in the shapes of the prunable arrays; low = unimportant.
    """
    if normalisation not in NORMALISATIONS:
        raise ValueError(f"normalisation = {normalisation!r}: must be one of {', '.join(NORMALISATIONS)}")
    if not 0 <= gamma < np.inf:
        raise ValueError(f"gamma = {gamma}: must be a number >= 0")
    if normalisation == "per-client" and exploration.normalised.keys() != exploration.deviation.keys():
        raise ValueError(
            "normalisation = 'per-client': the exploration was made without it and no longer tells the explorers "
            "apart; explore again with this setting"
        )
    result = {}
    for name, held in exploration.deviation.items():
        deviation = np.asarray(held, np.float64)
        if normalisation == "per-client":
            guidance: Floats = np.asarray(exploration.normalised[name], np.float64)
        else:
            guidance = minmax(deviation) if normalisation == "layer" else deviation
        result[name] = guidance * agreement(deviation, exploration.signed_mean[name]) ** gamma if gamma else guidance
    return result


def pruned_count(sparsity: float, size: int) -> int:
    """``floor(sparsity * size)`` in exact decimals: ``pruned_count(0.29, 100)`` is 29."""
    return int(Fraction(repr(float(sparsity))) * size)


def tied(layout: Layout, initial: Mapping[str, NDArray[np.generic]], exploration: Exploration) -> dict[str, str]:
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
        Arrays that are another one's weight under a second name (:func:`tied`): they count once, and get its mask.
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
    """The layout without second names (:func:`tied`), in which what is spared is not prunable."""
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


def start_arrays(initial: Mapping[str, NDArray[np.generic]], exploration: Exploration) -> Arrays:
    """The explorers' average ``W0 + A`` (``initial = "scouts"``), in the dtypes of ``initial``."""
    return {
        name: np.asarray(array.astype(np.float64) + exploration.signed_mean[name], array.dtype)
        if name in exploration.signed_mean
        else array
        for name, array in initial.items()
    }
