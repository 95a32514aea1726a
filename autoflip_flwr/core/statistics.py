"""Statistics of clients: the mean, and the mean square, of what clients report per parameter.

Sources: the AutoFLIP paper (arXiv 2405.10271) and the code its authors published, FedLEx (arXiv 2506.18640).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.core.layout import Arrays, Layout

Floats = NDArray[np.floating[Any]]

_SMALLEST = float(np.finfo(np.float32).tiny)
_LARGEST = float(np.finfo(np.float32).max)


class Statistics(NamedTuple):
    """Statistics that clients have reported, averaged over the clients.

    Sums are in float64. Each averaged array is stored in float32. It stays in float64 if float32 cannot represent its
    values (such as squares of tiny deltas), or if the model's array is float64.

    Parameters
    ----------
    mean : dict[str, dict[str, ndarray]]
        Name of a statistic -> name of an array -> ``sum_k p_k x_k``, in the array's shape. Entries that the statistic
        was not requested for are 0.
    mean_square : dict[str, dict[str, ndarray]]
        The same for ``x_k ** 2``, for prunable arrays. Only for statistics whose squares are averaged.
    clients : int
        Number of clients that reported.
    """

    mean: dict[str, dict[str, Floats]]
    mean_square: dict[str, dict[str, Floats]]
    clients: int


class Accumulator:
    """Running average of clients' statistics; memory does not grow with the number of clients.

    Parameters
    ----------
    layout : Layout
        The model's arrays.
    squares : Collection[str]
        Names of the statistics whose squares are averaged too.

    Examples
    --------
    >>> found = Accumulator(Layout.of({"w": np.zeros((1, 2))}), squares=["delta"])
    >>> found.add(1.0, {"delta": {"w": np.array([[1.0, -2.0]])}})
    >>> found.add(1.0, {"delta": {"w": np.array([[3.0, 2.0]])}})
    >>> seen = found.result()
    >>> seen.mean["delta"]["w"].tolist(), seen.mean_square["delta"]["w"].tolist(), seen.clients
    ([[2.0, 0.0]], [[5.0, 4.0]], 2)
    """

    def __init__(self, layout: Layout, squares: Collection[str] = ()) -> None:
        self._layout, self._squares = layout, squares
        self._mean: dict[str, dict[str, NDArray[np.float64]]] = {}
        self._mean_square: dict[str, dict[str, NDArray[np.float64]]] = {}
        self._total: dict[str, float] = {}  # per statistic, since a client need not report all
        self._clients = 0

    def add(self, weight: float, found: Mapping[str, Mapping[str, NDArray[np.generic]]]) -> None:
        """Add the statistics of one client: name of a statistic -> arrays by name, in the layout's shapes.

        ``weight`` is the client's ``p_k`` before normalisation: 1, or its number of examples.

        Raises
        ------
        ValueError
            If the weight is not a positive number.
        """
        if not 0 < weight < np.inf:
            raise ValueError(f"weight of a client = {weight}: must be a positive number")
        self._clients += 1
        for statistic, arrays in found.items():
            self._total[statistic] = self._total.get(statistic, 0.0) + weight
            mean = self._mean.setdefault(statistic, {})
            square = self._mean_square.setdefault(statistic, {}) if statistic in self._squares else None
            for spec in self._layout.specs:
                if spec.name not in arrays or not spec.floating:
                    continue
                values = np.asarray(arrays[spec.name], np.float64)
                _add(mean, spec.name, weight * values)
                if square is not None and spec.prunable:
                    _add(square, spec.name, weight * values**2)

    def result(self) -> Statistics:
        """Return the averages, and discard the sums.

        Raises
        ------
        ValueError
            If no client has reported.
        """
        if not self._clients:
            raise ValueError("no client has reported")

        def held(sums: dict[str, dict[str, NDArray[np.float64]]]) -> dict[str, dict[str, Floats]]:
            return {
                statistic: {
                    name: _held(arrays.pop(name) / self._total[statistic], self._layout[name].dtype)
                    for name in list(arrays)
                }
                for statistic, arrays in sums.items()
            }

        return Statistics(held(self._mean), held(self._mean_square), self._clients)


def _add(sums: dict[str, NDArray[np.float64]], name: str, values: NDArray[np.float64]) -> None:
    if name in sums:
        sums[name] += values
    else:
        sums[name] = 0.0 + values  # as if added to zeros: no negative zero


@dataclass(frozen=True)
class Exploration:
    """Statistics of the explorers, averaged over those that replied.

    Parameters
    ----------
    deviation : dict[str, ndarray]
        ``D = sum_k p_k Delta_k ** 2`` of each prunable array, with ``Delta_k = W_k - W0`` (paper, code).
    signed_mean : dict[str, ndarray]
        ``A = sum_k p_k Delta_k`` of each floating array.
    normalised : dict[str, ndarray]
        ``sum_k p_k minmax(Delta_k ** 2)`` of each prunable array: each explorer's deviation is min-max normalised per
        array before averaging (FedLEx). Empty if it was not requested.
    explorers : int
        Number of explorers that replied.
    """

    deviation: dict[str, Floats]
    signed_mean: dict[str, Floats]
    normalised: dict[str, Floats]
    explorers: int

    @classmethod
    def of(cls, seen: Statistics) -> Exploration:
        """Make an exploration from the statistics of round 0."""
        return cls(seen.mean_square["delta"], seen.mean["delta"], seen.mean.get("normalised", {}), seen.clients)

    @property
    def statistics(self) -> Statistics:
        """The same content as :class:`Statistics`."""
        mean = {"delta": self.signed_mean} | ({"normalised": self.normalised} if self.normalised else {})
        return Statistics(mean, {"delta": self.deviation}, self.explorers)


def named(seen: Statistics) -> Exploration | Statistics:
    """Return an :class:`Exploration` if the statistics contain squared deltas, else the statistics themselves."""
    return Exploration.of(seen) if "delta" in seen.mean_square else seen


def statistics_of(found: Exploration | Statistics | None) -> Statistics | None:
    """Return the statistics from the result of :func:`named`."""
    return found.statistics if isinstance(found, Exploration) else found


def _held(values: Floats, dtype: str) -> Floats:
    """Return the values in float32 if their range allows it and the model's dtype is no wider, else unchanged."""
    if np.dtype(dtype).itemsize > 4:
        return values
    size = np.abs(values)
    fits = not size.size or (size.max() <= _LARGEST and size.min(initial=np.inf, where=size > 0) >= _SMALLEST)
    return values.astype(np.float32) if fits else values


def minmax(values: Floats) -> NDArray[np.float64]:
    """Return ``(x - min) / (max - min)`` in float64; all 0 if max equals min."""
    values = np.asarray(values, np.float64)
    low, high = values.min(), values.max()
    if not high > low:
        return np.zeros_like(values)
    result: NDArray[np.float64] = (values - low) / (high - low)
    return result


def start_arrays(initial: Mapping[str, NDArray[np.generic]], signed_mean: Mapping[str, Floats]) -> Arrays:
    """Return the explorers' average ``W0 + A`` in the dtypes of ``initial``."""
    return {
        name: np.asarray(array.astype(np.float64) + signed_mean[name], array.dtype) if name in signed_mean else array
        for name, array in initial.items()
    }
