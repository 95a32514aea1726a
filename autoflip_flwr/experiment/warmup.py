"""Warm-up: the learning rate rises from zero over the first steps of a training."""

from __future__ import annotations

import torch


class Rising:
    """Sets an optimizer's learning rate before each step: ``lr (i + 1) / (n + 1)`` in step i < n, then ``lr``.

    Parameters
    ----------
    optimizer : Optimizer
        With the learning rate to rise to.
    steps : int
        n, the number of steps in which it rises, >= 0.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self._optimizer, self._steps, self._done = optimizer, steps, 0
        self._full = [group["lr"] for group in optimizer.param_groups]

    def before_step(self) -> None:
        """Set the learning rate of the next step."""
        if self._done > self._steps:
            return
        self._done += 1
        for group, full in zip(self._optimizer.param_groups, self._full, strict=True):
            group["lr"] = full * self._done / (self._steps + 1)
