"""Requests for statistics per parameter, which a server may send to clients in addition to training."""

from __future__ import annotations

from typing import NamedTuple

DELTA = "delta"
"""Name of the statistic that every result already contains: the returned values minus the sent values."""


class Request(NamedTuple):
    """A statistic that the server requests from clients.

    Parameters
    ----------
    name : str
        ``"delta"``, ``"gradient"``, ``"gradient-square"``, ``"saliency"``, or a name that the method defines.
    over : str
        Prunable entries for which it is requested: ``"kept"``, ``"pruned"`` or ``"all"``.
    code : str
        Encoding: ``"log8"`` (at most one byte per entry) or ``"float32"``.
    """

    name: str
    over: str = "kept"
    code: str = "log8"
