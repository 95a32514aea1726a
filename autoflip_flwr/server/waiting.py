"""Progress while replies are awaited: a log line every ten seconds, with how many are there and the time left."""

from __future__ import annotations

import time
from logging import INFO

from flwr.app import Message
from flwr.common.logger import log

from autoflip_flwr.costs.ledger import phase_of, round_of

INTERVAL = 10.0
"""Seconds between two lines of progress; a shorter exchange has none."""


class Waiting:
    """Log how an exchange comes along.

    Parameters
    ----------
    message : Message
        One of its messages: its phase and its round name the exchange.
    total : int
        Number of replies that are awaited.
    """

    def __init__(self, message: Message, total: int) -> None:
        self._phase, self._round, self._total = phase_of(message), round_of(message), total
        self._began = self._told = time.monotonic()
        self._first: tuple[float, int] | None = None  # when the first replies were there, and how many

    def tell(self, done: int) -> None:
        """Log a line if the last one is :data:`INTERVAL` seconds old; ``done`` replies are there."""
        now = time.monotonic()
        if done and self._first is None:
            self._first = now, done
        if now - self._told < INTERVAL:
            return
        self._told = now
        left = f" after {duration(now - self._began)}"
        # the first replies take longer, with all that is loaded for them: how fast the others come tells the time left
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
    """A duration to read: ``42 s``, ``4 min``, ``2 h 5 min``."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
