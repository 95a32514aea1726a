"""Find updates with too large a norm, given the round's other updates, the work a node reports, and the model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FAR = 1000.0
"""The default of ``ReplyRules(norm_factor=...)``. From here on, updates shorter than the model are accepted."""

ODD = 10.0
"""An update is logged as odd if its norm is more than this many times the expected one."""

MAX_ALLOWANCE = 100.0
"""Largest factor by which reported work raises the expected norm. It is limited since nobody can check the report."""


@dataclass(frozen=True)
class Update:
    """What an update's norm is judged by. Norms are L2, over the kept prunable values.

    Parameters
    ----------
    norm : float
        Norm of the update, finite.
    weight : float
        Weight that the reply reports, > 0.
    processed : int | None
        Examples that it reports as processed (each epoch counts them again).
    model : float
        Norm of the model that the node was sent.
    """

    norm: float
    weight: float
    processed: int | None
    model: float


def joint_norm(arrays: Iterable[NDArray[Any]]) -> float:
    """Return the L2 norm of all values of floating arrays, summed in at least float32; infinity if that overflows."""
    with np.errstate(over="ignore"):
        return math.hypot(
            *(
                float(np.linalg.norm(array.astype(np.promote_types(array.dtype, np.float32), copy=False)))
                for array in arrays
            )
        )


def low_median(values: Iterable[float]) -> float:
    """Return the low median of the values > 0 (the smaller of two), or 0 if there is none."""
    positive = [value for value in values if value > 0]
    return statistics.median_low(positive) if positive else 0.0


def find_outliers(
    updates: Mapping[int, Update], factor: float, earlier: float
) -> tuple[dict[int, str], dict[int, str]]:
    """Find the updates of a round whose norm is too large, and those whose norm is odd.

    The expected norm is the round's median norm, times the allowance for the work that the reply reports. A single
    update is compared with ``earlier`` rounds. A norm is too large above ``factor`` times the expected one, and odd
    above :data:`ODD` times.

    A factor of :data:`FAR` or more rejects only updates that cannot be honest. Then the expected norm is at least that
    of ``earlier`` rounds, and an update shorter than the model is never too large. Such an update does no lasting harm,
    and once most clients have converged, an honest update may be ten thousand times as long as theirs.

    Parameters
    ----------
    updates : Mapping[int, Update]
        By node.
    factor : float
        As in :class:`~autoflip_flwr.replies.quarantine.ReplyRules`.
    earlier : float
        The largest median norm of earlier rounds; 0 if there was none.

    Returns
    -------
    tuple[dict[int, str], dict[int, str]]
        Nodes whose updates are too large, and nodes whose updates are odd but count, each with the reason.
    """
    spares = factor >= FAR
    moved = [update.norm for update in updates.values() if update.norm > 0]
    usual = low_median(moved) if len(moved) > 1 else earlier
    usual = max(usual, earlier) if spares else usual
    if usual == 0:  # nothing to compare with
        return {}, {}
    allowed = _allowances(updates)
    far: dict[int, str] = {}
    odd: dict[int, str] = {}
    for node, update in updates.items():
        explained = usual * allowed[node]
        floor = update.model if spares else 0.0
        if update.norm > ODD * explained or update.norm > factor * explained:
            reason = (
                f"the norm of its update is {update.norm:.4g}, {update.norm / explained:.3g} times what other replies "
                "and the work it states explain"
            )
            (far if update.norm > max(factor * explained, floor) else odd)[node] = reason
    return far, odd


def _allowances(updates: Mapping[int, Update]) -> dict[int, float]:
    """Return by what factor each node's update may exceed the median, given its weight and its processed examples."""

    def ratios(stated: Callable[[Update], float]) -> dict[int, float]:
        found = {node: stated(update) for node, update in updates.items()}
        usual = low_median(found.values())
        return {node: value / usual if usual else 0.0 for node, value in found.items()}

    weights, processed = ratios(lambda update: update.weight), ratios(lambda update: update.processed or 0)
    return {node: min(max(1.0, weights[node], processed[node]), MAX_ALLOWANCE) for node in updates}
