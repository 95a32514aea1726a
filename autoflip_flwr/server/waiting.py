"""Log progress while replies are awaited: every ten seconds, how many are there and the estimated time left."""

from __future__ import annotations

import time
from logging import INFO

from flwr.app import Message
from flwr.common.logger import log

from autoflip_flwr.costs.ledger import phase_of, round_of

INTERVAL = 10.0
"""Seconds between two lines of progress. A shorter exchange logs none."""


class Waiting:
    """Logs the progress of an exchange.

    Parameters
    ----------
    message : Message
        One of its messages, which gives the phase and the round.
    total : int
        Number of replies that are awaited.
    """

    def __init__(self, message: Message, total: int) -> None:
        self._phase, self._round, self._total = phase_of(message), round_of(message), total
        self._began = self._told = time.monotonic()
        self._first: tuple[float, int] | None = None  # time of the first replies, and their number

    def tell(self, done: int) -> None:
        """Log that ``done`` replies are there, if the last line is :data:`INTERVAL` seconds old."""
        now = time.monotonic()
        if done and self._first is None:
            self._first = now, done
        if now - self._told < INTERVAL:
            return
        self._told = now
        left = f" after {duration(now - self._began)}"
        # the first replies take longer, since modules are loaded for them: the time left is estimated from the others
        if self._first is not None and done > self._first[1]:
            since, before = self._first
            left = f", about {duration((now - since) * (self._total - done) / (done - before))} left"
        log(INFO, "%s", self._line(done) + left)

    def _line(self, done: int) -> str:
        if self._phase == "exploration":
            return f"explorer {done} of {self._total}"
        noun = "evaluations" if self._phase == "evaluate" else "replies"
        return f"round {self._round}: {done} of {self._total} {noun}"


def duration(seconds: float) -> str:
    """Return a readable duration: ``42 s``, ``4 min``, ``2 h 5 min``."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
