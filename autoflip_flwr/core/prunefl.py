"""PruneFL: one client chooses the first mask, and squared gradients change it during training."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from autoflip_flwr.core.layout import Arrays, Layout
from autoflip_flwr.core.request import DELTA, Request
from autoflip_flwr.core.schedule import Schedule, check_counts
from autoflip_flwr.core.schedules import Reconfigure
from autoflip_flwr.core.scored import Scored
from autoflip_flwr.core.statistics import Floats, Statistics, start_arrays


@dataclass(frozen=True, kw_only=True, repr=False)
class PruneFl(Scored):
    """Prune at one client, then reconsider the smallest weights by squared gradients: PruneFL (Jiang et al. 2022).

    Before round 1, one client trains from W0 and reports its squared gradients. The entries with the largest ones are
    kept, and training begins from that client's model.

    Parameters
    ----------
    epochs, patience : int
        Sent to the first client: train for at most ``epochs`` epochs, and stop after ``patience`` epochs without a
        better mean training loss; both >= 1.
    schedule
        See :class:`~autoflip_flwr.core.scored.Scored`; default: :class:`~autoflip_flwr.core.schedules.Reconfigure`.
    scope : str
        Budget of the first mask, see :class:`~autoflip_flwr.core.scored.Scored`.
    timeout, public
        See :class:`~autoflip_flwr.core.method.Method`.
    """

    epochs: int = 5
    patience: int = 2
    schedule: Schedule | tuple[Schedule, ...] = field(default_factory=Reconfigure)
    timeout: float | None = None
    public: bool = False

    explorers = 1e-9  # one
    min_explorers = 1
    initial = "explorers"
    squares: ClassVar[Collection[str]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "epochs", "patience")

    def config(self) -> dict[str, bool | int | float | str]:
        """Return how long the first client trains."""
        return {"epochs": self.epochs, "patience": self.patience}

    def request(self, round_: int) -> tuple[Request, ...]:
        """Request the first client's deltas and squared gradients, then what the schedule needs."""
        before = (Request(DELTA, over="all"), Request("gradient-square", over="all"))
        return super().request(round_) if round_ else before

    def inspect(self, layout: Layout, initial: Arrays, seen: Statistics | None) -> Iterable[str]:
        """Raise ``RuntimeError`` if the gradients are zero everywhere."""
        assert seen is not None
        if not any(values.any() for values in seen.mean["gradient-square"].values()):
            raise RuntimeError("the client reports gradients of zero everywhere, and a mask would say nothing")
        return ()

    def score(self, layout: Layout, initial: Arrays, seen: Statistics | None) -> Mapping[str, Floats]:
        """Return the squared gradients."""
        assert seen is not None
        return seen.mean["gradient-square"]

    def begin(self, initial: Arrays, seen: Statistics | None) -> Arrays:
        """Return the first client's model."""
        return initial if seen is None else start_arrays(initial, seen.mean[DELTA])
