"""Choose the rounds after which the server evaluates the model, so that this costs little beside the training."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

SHARE = 0.08
"""Largest share of the training time that a run's evaluations may take, where the user names no rounds."""

LAST = 5
"""Rounds at the end that are evaluated before others: a run's accuracy is their mean."""

_FORWARD = 1 / 3
"""Cost of evaluating an example, as a share of training on it once: backward takes twice as long as forward."""


def cost_of_evaluation(test_examples: int, trained_per_round: float) -> float:
    """Return what one evaluation costs, as a share of one round's training (our estimate, by numbers of examples)."""
    return _FORWARD * test_examples / max(trained_per_round, 1.0)


def evaluated_rounds(rounds: int, every: int, cost: float) -> frozenset[int]:
    """Return the rounds after which the model is evaluated. Round 0 is the start; the last round is always among them.

    Parameters
    ----------
    rounds : int
        Number of rounds, >= 1.
    every : int
        Evaluate every so many rounds, and after the last. 0: as often as :data:`SHARE` allows, first after each of the
        last :data:`LAST` rounds, then at the start, then evenly in between.
    cost : float
        Of one evaluation, as a share of one round's training; only used where ``every`` is 0.

    Examples
    --------
    >>> sorted(evaluated_rounds(10, 4, 0.0))
    [0, 4, 8, 10]
    >>> sorted(evaluated_rounds(60, 0, 0.4))
    [0, 10, 20, 30, 40, 50, 56, 57, 58, 59, 60]
    """
    if every:
        return frozenset((*range(0, rounds, every), rounds))
    most = max(int(SHARE * rounds / cost), 1) if cost > 0 else rounds + 1
    last = range(max(rounds - LAST + 1, 1), rounds + 1)
    if most <= len(last):
        return frozenset(last[-most:])
    choices: Iterable[frozenset[int]] = (frozenset((*range(0, last[0], step), *last)) for step in range(1, rounds + 1))
    return next(chosen for chosen in choices if len(chosen) <= most)


def rows_to_test(examples: int, wanted: int) -> NDArray[np.int64] | None:
    """Return ``wanted`` of the test examples, ascending; ``None`` for all. The choice is the same in every run."""
    if not 0 < wanted < examples:
        return None
    return np.sort(np.random.default_rng(0).permutation(examples)[:wanted])
