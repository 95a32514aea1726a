"""Follow the clients' training losses over rounds, each client compared with itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class Losses:
    """Trend of the clients' training losses.

    Clients with unequal data have unequal losses, and a round asks only some of them. So the mean over a round's
    clients says little. A client's loss is therefore compared with its own of the round in which it was asked before.

    Examples
    --------
    >>> losses = Losses()
    >>> losses.add(1, {7: 2.0, 8: 0.5})
    >>> losses.add(3, {7: 1.0})
    >>> losses.add(4, {8: 0.25})
    >>> round(losses.trend(since=1), 4)  # both have halved, in 2 and in 3 rounds
    -0.2773
    """

    def __init__(self) -> None:
        self._last: dict[int, tuple[int, float]] = {}
        self._changes: list[tuple[int, int, float]] = []  # round, rounds since the client's one before, change of log

    def add(self, round_: int, losses: Mapping[int, float]) -> None:
        """Add a round's losses by client. Those that are not positive numbers are left out."""
        for client, loss in losses.items():
            if not 0 < loss < math.inf:
                continue
            if client in self._last:
                before, old = self._last[client]
                self._changes.append((round_, round_ - before, math.log(loss / old)))
            self._last[client] = (round_, loss)

    def trend(self, since: int, least: int = 1) -> float | None:
        """Return the mean change of the logarithm of the loss per round, over the changes seen after a round.

        ``None`` if there are fewer than ``least`` of them.
        """
        found = [(rounds, change) for round_, rounds, change in self._changes if round_ > since]
        if len(found) < least:
            return None
        return sum(change for _, change in found) / sum(rounds for rounds, _ in found)

    def state(self) -> Any:
        """Return all that is known."""
        return {"last": self._last, "changes": self._changes}

    def load(self, state: Any) -> None:
        """Restore what :meth:`state` returned."""
        self._last, self._changes = state["last"], state["changes"]
