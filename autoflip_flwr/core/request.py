"""Requests for statistics per parameter, which a server may send to clients in addition to training."""

from __future__ import annotations

from typing import NamedTuple

DELTA = "delta"
"""Name of the statistic that every result already contains: the returned values minus the sent values."""

DECIMALS = 6
"""Decimals of a share of entries, so that both sides of the wire compute the same counts."""


class Request(NamedTuple):
    """A statistic that the server requests from clients.

    Parameters
    ----------
    name : str
        ``"delta"``, ``"gradient"``, ``"gradient-square"``, ``"saliency"``, or a name that the method defines.
    over : str
        Prunable entries for which it is requested: ``"kept"``, ``"pruned"`` or ``"all"``.
    code : str
        Encoding: ``"log8"`` (at most one byte per entry), ``"float32"``, or ``"places"``: only which entries are the
        top ones; their values arrive as 1. That needs ``top`` below 1.
    top : float
        Below 1, only the entries of the largest magnitude are sent, of each array ``ceil(top n)``, where ``n`` is the
        number of its kept entries. The others arrive as 0. In (0, 1], with at most six decimals.

    Examples
    --------
    >>> Request("gradient", over="pruned", top=0.1).number(kept=45, size=1000)
    5
    """

    name: str
    over: str = "kept"
    code: str = "log8"
    top: float = 1.0

    def number(self, kept: int, size: int) -> int:
        """Return how many of ``size`` requested entries of an array are sent, of which ``kept`` are kept."""
        unit = 10**DECIMALS
        return size if self.top == 1 else min(size, -(-round(self.top * unit) * kept // unit))
