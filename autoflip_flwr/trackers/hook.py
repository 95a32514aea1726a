"""What may follow a run: it is told the settings, then each finished round, then the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import ArrayRecord

Setting = bool | int | float | str


@dataclass(frozen=True)
class Round:
    """A finished round.

    Attributes
    ----------
    number : int
        From 1 on; 0 is the start, after the exploration. A resumed run goes on with the numbers of the interrupted one.
    values : Mapping[str, float]
        What is known of it by name, such as ``"train/loss"`` or ``"bytes/total"``
        (:func:`~autoflip_flwr.server.following.follow` lists them).
    arrays : ArrayRecord or None
        The model after the round, as full arrays; not a copy. ``None`` in round 0 of a strategy whose ``start`` neither
        shows nor sends it.
    """

    number: int
    values: Mapping[str, float]
    arrays: ArrayRecord | None = None


class Hook:
    """Follows a run. Each method does nothing here: override those that are needed.

    An exception in one of them does not end the run: it is logged once, and the hook is told no more.
    """

    def began(self, settings: Mapping[str, Setting], after: int) -> None:
        """Take note of a run that begins.

        Parameters
        ----------
        settings : Mapping[str, bool | int | float | str]
            Those of the strategy and of its ``start``, and those that were given to ``follow``.
        after : int
            Rounds that were finished before this process, if the run is resumed; else 0.
        """

    def round(self, round_: Round) -> None:
        """Take note of a finished round."""

    def ended(self, totals: Mapping[str, float], failure: str) -> None:
        """Take note of the end.

        Parameters
        ----------
        totals : Mapping[str, float]
            Sums over the whole run, such as ``"bytes"`` and ``"seconds"``.
        failure : str
            Why the run has failed, in one line; ``""`` if it has not.
        """
