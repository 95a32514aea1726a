"""What the clients' updates say of the kept entries over rounds, and the ranks by which entries are dropped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.core.layout import Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.request import DELTA
from autoflip_flwr.core.scores import agreement
from autoflip_flwr.core.statistics import Floats, Statistics

NEEDS_MOVES = ("magnitude-agreement", "movement", "deviation")
"""Ranks that need the clients' updates."""

_KINDS = ("move", "square", "agreed")


class Moves:
    """Sums, or moving averages, of the clients' deltas over rounds, as full arrays by name.

    Entries that are pruned keep what they had. Three sums are kept: of the mean delta ``A``, of the mean squared delta
    ``D``, and of ``A ** 2``.
    """

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, NDArray[np.float32]]] = {kind: {} for kind in _KINDS}
        self._seen: dict[str, NDArray[np.bool_]] = {}

    def __bool__(self) -> bool:
        return bool(self._seen)

    def add(self, mask: Mask, seen: Statistics | None, decay: float = 1.0) -> None:
        """Add a round's statistics at the kept entries; nothing where no client reported.

        ``decay`` 1 sums up; below 1, sums are moving averages up to a common factor.
        """
        if seen is None or DELTA not in seen.mean_square:
            return
        for name, keep in mask.keep.items():
            mean, square = (part[DELTA][name][keep].astype(np.float32) for part in (seen.mean, seen.mean_square))
            for kind, new in zip(_KINDS, (mean, square, mean**2), strict=True):
                held = self._sums[kind].setdefault(name, np.zeros(keep.shape, np.float32))
                held[keep] = decay * held[keep] + new
            self._seen[name] = self._seen.get(name, np.zeros(keep.shape, bool)) | keep

    def known(self, name: str) -> NDArray[np.bool_]:
        """Return which entries have been reported at least once."""
        return self._seen[name]

    def of(self, kind: str) -> Mapping[str, NDArray[np.float32]]:
        """Return the sums of ``move``, ``square`` or ``agreed`` (``A ** 2``)."""
        return self._sums[kind]

    def agreement(self, name: str) -> Floats:
        """Return the clients' agreement on each entry, in [0, 1]: the sum of ``A ** 2`` over that of ``D``."""
        return agreement(self._sums["square"][name], np.sqrt(self._sums["agreed"][name]))

    def agreed(self, layout: Layout) -> dict[str, Floats]:
        """Return the squared deltas times the agreement on them, for each prunable entry."""
        return {spec.name: np.asarray(self._sums["agreed"][spec.name], np.float64) for spec in layout.prunable}

    def state(self) -> Any:
        """Return all sums."""
        return {"sums": self._sums, "seen": self._seen}

    def load(self, state: Any) -> None:
        """Restore what :meth:`state` returned."""
        self._sums, self._seen = state["sums"], state["seen"]


def ranking(by: str, mask: Mask, model: Mapping[str, NDArray[Any]], moves: Moves) -> dict[str, Floats]:
    """Return the score of each prunable entry by which a schedule drops: the lowest go first.

    Parameters
    ----------
    by : str
        ``"magnitude"``: ``|w|``. ``"layer-magnitude"``: the same, divided by the root mean square over the array's
        kept entries. ``"magnitude-agreement"``: ``|w|`` times the clients' agreement over the rounds. ``"movement"``:
        ``|w|`` times how far training has moved it, ``|w sum(A)|``. ``"deviation"``: the accumulated squared deltas
        (the paper's guidance, over rounds). The last three are our readings. Before any client has reported they rank
        by magnitude.
    mask : Mask
        The mask in force.
    model : Mapping[str, ndarray]
        The model, full arrays by name.
    moves : Moves
        What clients have reported so far.
    """
    score: dict[str, Floats] = {}
    for name, keep in mask.keep.items():
        size = np.abs(np.asarray(model[name], np.float64))
        if by == "layer-magnitude":
            score[name] = size / (float(np.sqrt(np.mean(size[keep] ** 2))) or 1.0) if keep.any() else size
        elif by == "magnitude" or not moves:
            score[name] = size
        elif by == "magnitude-agreement":
            score[name] = size * moves.agreement(name)
        elif by == "movement":
            score[name] = size * np.abs(moves.of("move")[name])
        else:
            score[name] = np.asarray(moves.of("square")[name], np.float64)
    return score
