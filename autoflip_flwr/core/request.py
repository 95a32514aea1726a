"""What a server may ask of clients beside their results: statistics of single parameters."""

from __future__ import annotations

from typing import NamedTuple

DELTA = "delta"
"""The statistic that every client's result holds already: what it returns less what it was sent."""


class Request(NamedTuple):
    """A statistic that the server asks of clients.

    Parameters
    ----------
    name : str
        ``"delta"``, ``"gradient"``, ``"gradient-square"``, ``"saliency"``, or a name of the method's own.
    over : str
        Which prunable entries it is asked for: the ``"kept"`` ones, the ``"pruned"`` ones or ``"all"``.
    code : str
        How it travels: ``"log8"``, a byte per entry or less, or ``"float32"``.
    """

    name: str
    over: str = "kept"
    code: str = "log8"
