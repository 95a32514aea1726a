"""When masks change during training, and by how much: falling densities, and shares of entries that are exchanged."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autoflip_flwr.core.request import DECIMALS


def falling(initial: float, target: float, done: float, power: float) -> float:
    """Return ``target + (initial - target) (1 - done)^power``; ``done`` in [0, 1]. Zhu and Gupta 2017 take power 3."""
    left: float = (1 - done) ** power
    return target + (initial - target) * left


def cosine(share: float, done: float) -> float:
    """Return ``share / 2 (1 + cos(pi done))`` (Evci et al. 2020, RigL); ``done`` in [0, 1]."""
    return share / 2 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Fall:
    """A density that falls along a polynomial, in steps.

    Parameters
    ----------
    initial : float
        Density of round 1, in (0, 1].
    share : float
        Share of the rounds within which it reaches the target, in (0, 1].
    every : int
        Rounds between two steps, >= 1.
    power : float
        Exponent of the polynomial, >= 1; 3: a cubic.

    Examples
    --------
    >>> fall = Fall(initial=1.0, share=0.5, every=2)
    >>> [fall.sparsity(0.9, round_, rounds=8) for round_ in range(1, 9)]
    [None, None, 0.7875, None, 0.9, None, None, None]
    """

    initial: float
    share: float
    every: int
    power: float = 3.0

    def steps(self, rounds: int) -> int:
        """Return the number of steps in a run of so many rounds; the last one is before its last round.

        Raises
        ------
        ValueError
            If there is no room for a step.
        """
        most = (rounds - 1) // self.every
        if most < 1:
            raise ValueError(
                f"{rounds} round{'s' * (rounds != 1)} with a step every {self.every}: the density would never fall; "
                "run more rounds, or step more often"
            )
        return max(1, min(int(self.share * rounds) // self.every, most))

    def last(self, rounds: int) -> int:
        """Return the round after which the last step is due."""
        return self.steps(rounds) * self.every

    def sparsity(self, target: float, round_: int, rounds: int) -> float | None:
        """Return the sparsity that a step before this round leads to; ``None``: no step.

        ``target`` is the sparsity after the last step, returned exactly.
        """
        number, rest = divmod(round_ - 1, self.every)
        steps = self.steps(rounds)
        if rest or not 1 <= number <= steps:
            return None
        return (
            target if number == steps else round(1 - falling(self.initial, 1 - target, number / steps, self.power), 9)
        )


@dataclass(frozen=True)
class Exchange:
    """A share of the kept entries that is exchanged for others from time to time; it falls along a cosine to 0.

    Parameters
    ----------
    share : float
        Share at the start of the run, in (0, 1).
    every : int
        Rounds between two exchanges, >= 1.
    until : float
        Share of the rounds after which nothing is exchanged, in (0, 1].
    begin : float
        Share of the rounds before which nothing is exchanged, in [0, 1), below ``until``.

    Examples
    --------
    >>> exchange = Exchange(share=0.4, every=2, until=0.5)
    >>> [exchange.after(round_, rounds=16) for round_ in range(1, 9)]
    [0.0, 0.341421, 0.0, 0.2, 0.0, 0.058579, 0.0, 0.0]
    """

    share: float
    every: int
    until: float
    begin: float = 0.0

    def after(self, round_: int, rounds: int) -> float:
        """Return the share that is exchanged after a round, to six decimals; 0: none."""
        begin, end = self.begin * rounds, self.until * rounds
        if round_ % self.every or not max(begin, 1) <= round_ < end:
            return 0.0
        return round(cosine(self.share, (round_ - begin) / (end - begin)), DECIMALS)
