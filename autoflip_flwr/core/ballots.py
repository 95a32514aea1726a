"""The clients' votes on which entries to keep, and samples of what they say: Thompson sampling, as in FedRTS (2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.statistics import Floats, Statistics

VOTES = "votes"
"""Name of the statistic: 1 where a client votes for an entry, and 0 elsewhere."""

DECAY = 0.9
"""What a vote is worth after each further round (our reading)."""

Model = Mapping[str, NDArray[Any]]


class Ballots:
    """Votes for and against each entry over the rounds, as full arrays by name. A fresh entry has none."""

    def __init__(self) -> None:
        self._for: dict[str, NDArray[np.float32]] = {}
        self._against: dict[str, NDArray[np.float32]] = {}

    def add(self, mask: Mask, seen: Statistics | None) -> None:
        """Add a round's votes on the kept entries; nothing if no client voted."""
        if seen is None or VOTES not in seen.mean:
            return
        for name, keep in mask.keep.items():
            share = seen.mean[VOTES][name][keep].astype(np.float32)
            for held, votes in ((self._for, share), (self._against, 1 - share)):
                own = held.setdefault(name, np.zeros(keep.shape, np.float32))
                own[keep] = DECAY * own[keep] + votes * seen.clients

    def ranked(self, mask: Mask, model: Model, seed: tuple[int, ...]) -> dict[str, Floats]:
        """Return a rank for each kept entry, the highest for those to keep, and 0 for pruned ones.

        A share is drawn for each entry from ``Beta(1 + votes for, 1 + votes against)``. Entries are ranked by it, and
        those of equal shares by ``|w|``. Before anyone has voted, ``|w|`` alone decides. The same seed draws the same.
        """
        generator, drawn, sizes = np.random.default_rng(seed), [], []
        for name, keep in mask.keep.items():
            sizes.append(np.abs(np.asarray(model[name][keep], np.float64)))
            if name in self._for:
                drawn.append(generator.beta(*(1 + part[name][keep].astype(np.float64) for part in self._parts)))
            else:
                drawn.append(np.zeros(sizes[-1].size))
        order = np.lexsort((np.concatenate(sizes), np.concatenate(drawn)))
        ranks = np.empty(order.size)
        ranks[order] = np.arange(1, order.size + 1)
        found: dict[str, Floats] = {}
        at = 0
        for name, keep in mask.keep.items():
            found[name] = np.zeros(keep.shape)
            found[name][keep] = ranks[at : at + mask.kept_by_name[name]]
            at += mask.kept_by_name[name]
        return found

    @property
    def _parts(self) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.float32]]]:
        return self._for, self._against

    def state(self) -> Any:
        """Return all votes."""
        return list(self._parts)

    def load(self, state: Any) -> None:
        """Restore what :meth:`state` returned."""
        self._for, self._against = state


def votes_of(mask: Mask, model: Model, deltas: Model, count: int) -> dict[str, NDArray[np.float32]]:
    """Return a client's votes: 1 for the ``count`` kept entries that are largest after its training, else 0.

    Parameters
    ----------
    mask : Mask
        The mask of the round.
    model, deltas : Mapping[str, ndarray]
        The model that the client was sent, and how it changed it: full arrays by name.
    count : int
        Number of votes; entries that equal the smallest of those that get one get one, too.
    """
    size = {name: np.abs(model[name][keep] + deltas[name][keep]) for name, keep in mask.keep.items()}
    every = np.concatenate(list(size.values()))
    least = np.partition(every, every.size - count)[every.size - count] if 0 < count <= every.size else -np.inf
    votes = {}
    for name, keep in mask.keep.items():
        votes[name] = np.zeros(keep.shape, np.float32)
        votes[name][keep] = size[name] >= least
    return votes
