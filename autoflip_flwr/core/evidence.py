"""Checks of the explorers' deltas: unchanged arrays, updates returned instead of weights, weight decay."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.core.layout import Arrays, Layout
from autoflip_flwr.core.statistics import Exploration

UPDATE_COSINE = 0.3
"""Largest cosine to W0 at which returned arrays may be an update. Trained weights have a cosine of 0.4 or more as long
as their norm is at most twice that of W0; weights that only decayed have the largest."""

UPDATE_LENGTH, DOUBTFUL_LENGTH = 0.7, 2.0
"""Norms, in units of W0's: up to the first, returned arrays count as an update; up to the second, they cause a warning.
In a small convex problem, trained weights may no longer depend on W0, and then look the same."""

DECAY_RESIDUAL = 0.01
"""Largest share of an array's squared delta that may deviate from a multiple of W0 to count as weight decay."""

_TOO_FEW = 8
"""Up to this many entries, a delta may be a multiple of W0 by chance."""

_CHUNK = 2**16


def unmoved(exploration: Exploration) -> list[str]:
    """Return the names of the prunable arrays that no explorer changed."""
    return [name for name, deviation in exploration.deviation.items() if not deviation.any()]


def check_moved(exploration: Exploration) -> None:
    """Raise ``RuntimeError`` if no explorer changed any prunable parameter."""
    if len(unmoved(exploration)) == len(exploration.deviation):
        raise RuntimeError(
            "no explorer moved any prunable parameter, and a mask would say nothing: do the clients train the arrays "
            "that they are sent, and return their work under the same names? Else bring a mask (mask=)"
        )


class Updates:
    """Counter of explorers that seem to have returned updates (new - old) instead of weights.

    Their deltas are then ``(W_k - W0) - W0``, and the mask would follow the magnitude of the initial weights.

    Parameters
    ----------
    layout : Layout
        The model's arrays.
    initial : Mapping[str, ndarray]
        W0.
    """

    def __init__(self, layout: Layout, initial: Mapping[str, NDArray[Any]]) -> None:
        self._initial = {spec.name: initial[spec.name].reshape(-1) for spec in layout.prunable}
        self._square = sum(_dot(values, values) for values in self._initial.values())
        self._lengths: list[float] = []  # norm of what each returned, in units of W0's; inf: not an update

    def add(self, deltas: Mapping[str, NDArray[Any]]) -> None:
        """Add the deltas of one explorer."""
        along = square = 0.0
        for name, values in self._initial.items():
            if values.any():
                delta = deltas[name].reshape(-1)
                along += _dot(delta, values)
                square += _dot(delta, delta)
        # the explorer returned W0 + delta: its norm, and its inner product with W0, in units of W0's norm
        length, product = math.inf, math.inf
        if self._square > 0:
            length = math.sqrt(max(1 + (square + 2 * along) / self._square, 0.0))
            product = 1 + along / self._square
        self._lengths.append(length if product <= UPDATE_COSINE * length else math.inf)

    def check(self) -> str:
        """Return a warning if most explorers may have returned updates, else "".

        Raises
        ------
        RuntimeError
            If most explorers have returned updates.
        """
        for longest, raises in ((UPDATE_LENGTH, True), (DOUBTFUL_LENGTH, False)):
            number = sum(length <= longest for length in self._lengths)
            if number <= len(self._lengths) / 2:
                continue
            found = (
                f"what {number} of {len(self._lengths)} explorers returned looks like updates (new - old), not weights"
            )
            if raises:
                raise RuntimeError(
                    f"{found}: the mask would follow the size of the initial weights. Return weights while exploring "
                    "(the config then has 'autoflip-phase'), or bring a mask (mask=)"
                )
            return f"{found}; if so, the mask follows the size of the initial weights"
        return ""


def decayed(layout: Layout, initial: Arrays, exploration: Exploration) -> list[str]:
    """Return the names of the prunable arrays whose mean delta is a multiple of W0, as under weight decay alone.

    The explorers then agree everywhere, and the mask follows the magnitude of the initial weights. The factor is found
    by least squares. Constant arrays and very small arrays are skipped.
    """
    found = []
    for spec in layout.prunable:
        start, mean = (arrays[spec.name].reshape(-1) for arrays in (initial, exploration.signed_mean))
        if spec.size <= _TOO_FEW or (start == start[0]).all():
            continue
        square, along = _dot(mean, mean), _dot(mean, start)
        if square > 0 and square - along**2 / _dot(start, start) < DECAY_RESIDUAL * square:
            found.append(spec.name)
    return found


def shortest(names: Sequence[str], among: Sequence[str]) -> list[str]:
    """Return one shell-style pattern that matches exactly these names, if a simple one exists; else the names."""
    if len(names) < 2:
        return list(names)
    start, end = _common(names), _common([name[::-1] for name in names])[::-1]
    whole = start[: max(start.rfind("."), start.rfind("/")) + 1]
    for pattern in (f"{whole}*", f"{start}*", f"*{end}", f"{start}*{end}"):
        if pattern != "*" and {name for name in among if fnmatchcase(name, pattern)} == set(names):
            return [pattern]
    return list(names)


def _common(names: Sequence[str]) -> str:
    """Return the common prefix of the names."""
    first, last = min(names), max(names)
    same = [one == other for one, other in zip(first, last, strict=False)]
    return first[: same.index(False) if False in same else len(same)]


def _dot(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Return the inner product of two 1-D arrays, summed in float64."""
    return sum(
        float(np.dot(one[at : at + _CHUNK].astype(np.float64), other[at : at + _CHUNK].astype(np.float64)))
        for at in range(0, one.size, _CHUNK)
    )
