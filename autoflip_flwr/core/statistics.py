"""What explorers found, averaged: mean and mean square of how far each parameter moved.

Sources: the AutoFLIP paper (arXiv 2405.10271) and the code its authors published, FedLEx (arXiv 2506.18640).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.core.layout import Arrays, Layout

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


def start_arrays(initial: Mapping[str, NDArray[np.generic]], exploration: Exploration) -> Arrays:
    """The explorers' average ``W0 + A`` (``initial = "scouts"``), in the dtypes of ``initial``."""
    return {
        name: np.asarray(array.astype(np.float64) + exploration.signed_mean[name], array.dtype)
        if name in exploration.signed_mean
        else array
        for name, array in initial.items()
    }
