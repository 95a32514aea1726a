"""How long an update may be: beside the others of its round, the work that its node states, and the model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FAR = 1000.0
"""The default of ``ReplyRules(norm_factor=...)``. From here on no update counts as too long that the model outgrows."""

ODD = 10.0
"""An update so many times longer than is explained is noted."""

MAX_ALLOWANCE = 100.0
"""Work that a node states lengthens what is explained so many times at most: nobody can check it."""


@dataclass(frozen=True)
class Update:
    """What the length of a reply's update is judged by. Norms are L2, of the kept prunable values.

    Parameters
    ----------
    norm : float
        Norm of the update, finite.
    weight : float
        Weight that the reply states, > 0.
    processed : int | None
        Examples that it says it has processed (epochs count each time).
    model : float
        Norm of the model that the node was sent.
    """

    norm: float
    weight: float
    processed: int | None
    model: float


def joint_norm(arrays: Iterable[NDArray[Any]]) -> float:
    """L2 norm of all values of floating arrays, summed in float32 at least; infinity where that overflows."""
    with np.errstate(over="ignore"):
        return math.hypot(
            *(
                float(np.linalg.norm(array.astype(np.promote_types(array.dtype, np.float32), copy=False)))
                for array in arrays
            )
        )


def low_median(values: Iterable[float]) -> float:
    """Low median of the values > 0: of two the larger is judged by the smaller one; 0 if there is none."""
    positive = [value for value in values if value > 0]
    return statistics.median_low(positive) if positive else 0.0


def find_outliers(
    updates: Mapping[int, Update], factor: float, earlier: float
) -> tuple[dict[int, str], dict[int, str]]:
    """Find the updates of a round that are too long, and those that are odd.

    Explained is the median norm of the round, times the allowance for the work that the reply states; a lone update is
    compared with ``earlier`` rounds. An update is too long above ``factor`` times that, and odd above :data:`ODD`
    times.

    A factor of :data:`FAR` or more spares whoever may be honest: ``earlier`` rounds explain an update, too, where they
    are longer, and none is too long that the model outgrows. It ruins nothing, and clients that have converged move so
    little that an honest one may move ten thousand times as far.

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
        Nodes whose updates are too long, and nodes whose updates are odd and count, each with the reason.
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
    """How many times as far as most a node may have moved, by its weight and the examples it has processed."""

    def ratios(stated: Callable[[Update], float]) -> dict[int, float]:
        found = {node: stated(update) for node, update in updates.items()}
        usual = low_median(found.values())
        return {node: value / usual if usual else 0.0 for node, value in found.items()}

    weights, processed = ratios(lambda update: update.weight), ratios(lambda update: update.processed or 0)
    return {node: min(max(1.0, weights[node], processed[node]), MAX_ALLOWANCE) for node in updates}
