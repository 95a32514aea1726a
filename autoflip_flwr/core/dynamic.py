"""Pruning methods that change the mask during training: gradual pruning, and the field's drop-and-grow rules.

What each leaves out of its paper is in ``docs/methods.md``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from autoflip_flwr.core.budget import BUDGETS
from autoflip_flwr.core.layout import Arrays, Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.methods import Scored, check_counts
from autoflip_flwr.core.pace import Exchange, Fall
from autoflip_flwr.core.regrow import drop_and_grow, reconfigure, shrink, vote
from autoflip_flwr.core.request import DELTA, Request
from autoflip_flwr.core.scores import magnitude, random_scores
from autoflip_flwr.core.statistics import Floats, Statistics, start_arrays


@dataclass(frozen=True, kw_only=True, repr=False)
class Planned(Scored):
    """Base class of methods that need to know the sparsity and the number of rounds.

    A run that goes on from a checkpoint keeps the plan with which it began, even if it now has more rounds. An object
    serves one run at a time.
    """

    _plan: ClassVar[tuple[float, int]] = (0.0, 0)

    @property
    def sparsity(self) -> float:
        """Target of the run that was planned last."""
        return self._plan[0]

    @property
    def rounds(self) -> int:
        """Number of rounds of the run that was planned last."""
        return self._plan[1]

    def plan(self, sparsity: float, rounds: int) -> None:
        """Note sparsity and rounds."""
        vars(self)["_plan"] = (sparsity, rounds)

    def exploring(self) -> object:
        """Return the settings, without the plan."""
        return type(self), [getattr(self, f.name) for f in fields(self)]

    def state(self) -> object:
        """Return the plan."""
        return self._plan

    def load(self, state: object) -> None:
        """Restore the plan."""
        vars(self)["_plan"] = state


@dataclass(frozen=True, kw_only=True, repr=False)
class Gradual(Planned):
    """Prune step by step while training goes on, by the magnitude of the averaged model; nothing is asked of clients.

    The density falls along a cubic (Zhu and Gupta 2017), as in FedSparsify (Stripelis et al. 2022). What is pruned
    stays pruned.

    Parameters
    ----------
    initial_density : float
        Density of round 1, in (0, 1]; below 1, the largest weights of W0 are kept.
    fall : float
        Share of the rounds within which the density falls to the target, in (0, 1].
    every : int
        Rounds between two steps, >= 1.
    scope : str
        See :class:`~autoflip_flwr.core.methods.Scored`.
    """

    initial_density: float = 1.0
    fall: float = 0.6
    every: int = 1

    grow_from = "outside"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self, "initial_density", "fall")
        check_counts(self, "every")

    def plan(self, sparsity: float, rounds: int) -> None:
        """Note sparsity and rounds; ``ValueError`` if the density could not fall to the target in so many rounds."""
        super().plan(sparsity, rounds)
        if sparsity and self.initial_density < 1 - sparsity:
            raise ValueError(
                f"initial_density = {self.initial_density}: is below the density {1 - sparsity:g} that the sparsity "
                f"{sparsity} leads to; raise it"
            )
        if sparsity and rounds:
            self._schedule.steps(rounds)

    @property
    def _schedule(self) -> Fall:
        return Fall(self.initial_density, self.fall, self.every)

    def score(self, layout: Layout, initial: Arrays, seen: Statistics | None) -> Mapping[str, Floats]:
        """Return ``|W0|``."""
        return magnitude(layout, initial)

    def first(self, sparsity: float, layout: Layout, initial: Arrays, seen: Statistics | None) -> Mask:
        """Keep the largest weights, as many as the initial density says."""
        super().first(sparsity, layout, initial, seen)  # raises now what the last step would raise
        return super().first(round(1 - self.initial_density, 9), layout, initial, seen)

    def refine(self, round_: int, mask: Mask, model: Arrays, seen: Statistics | None) -> Mask | None:
        """Drop the smallest weights if a step is due."""
        sparsity = self._schedule.sparsity(self.sparsity, round_, self.rounds) if self.sparsity else None
        if sparsity is None:
            return None
        return shrink(mask, magnitude(mask.layout, model), BUDGETS[self.scope](mask.layout, sparsity))


@dataclass(frozen=True, kw_only=True, repr=False)
class Rigl(Planned):
    """Exchange entries during training: drop the smallest weights, grow where the clients' gradients are largest.

    This is RigL (Evci et al. 2020) on federated data, as in the progressive pruning of FedTiny (Huang et al. 2023). It
    starts from a random mask with ERK densities. The number of kept entries of each array never changes.

    Parameters
    ----------
    share : float
        Share of an array's kept entries that is exchanged at the start, in (0, 1); it falls along a cosine.
    every : int
        Rounds between two exchanges, >= 1.
    until : float
        Share of the rounds after which nothing is exchanged, in (0, 1].
    seed : int
        Seed of the first mask.
    scope : str
        Budget of the first mask, see :class:`~autoflip_flwr.core.methods.Scored`.
    """

    share: float = 0.3
    every: int = 10
    until: float = 0.6
    seed: int = 0
    scope: str = "erk"

    grow_from = "outside"
    weighting = "examples"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self, "until")
        check_shares(self, "share", below_one=True)
        check_counts(self, "every")

    def score(self, layout: Layout, initial: Arrays, seen: Statistics | None) -> Mapping[str, Floats]:
        """Return random scores."""
        return random_scores(layout, self.seed)

    def exchanged(self, round_: int) -> float:
        """Return the share of the kept entries that is exchanged after a round; 0: none."""
        return Exchange(self.share, self.every, self.until).after(round_, self.rounds) if self.sparsity else 0.0

    def request(self, round_: int) -> tuple[Request, ...]:
        """Request the largest gradients of pruned entries in the rounds before an exchange."""
        share = self.exchanged(round_)
        return (Request("gradient", over="pruned", top=share),) if share else ()

    def refine(self, round_: int, mask: Mask, model: Arrays, seen: Statistics | None) -> Mask | None:
        """Drop and grow, if clients have reported gradients in the round before."""
        share = self.exchanged(round_ - 1)
        if not share or seen is None or "gradient" not in seen.mean:
            return None
        return drop_and_grow(mask, model, seen.mean["gradient"], share)


@dataclass(frozen=True, kw_only=True, repr=False)
class FedDst(Rigl):
    """Let clients change their own masks, and keep what they agree on: FedDST (Bibikar et al. 2022).

    After their training, clients report which of their weights they drop (the smallest) and which pruned entries they
    grow instead (the largest gradients). The server keeps the largest averaged weights that not all of them have
    dropped, then the entries that most have grown (:func:`~autoflip_flwr.core.regrow.vote`).

    Parameters
    ----------
    share, every, until, seed, scope
        See :class:`Rigl`.
    """

    share: float = 0.01
    every: int = 15
    until: float = 0.5

    weighting = "uniform"

    def request(self, round_: int) -> tuple[Request, ...]:
        """Request what clients drop and grow in the rounds before an exchange."""
        share = self.exchanged(round_)
        if not share:
            return ()
        return Request("smallness", "kept", "places", share), Request("gradient", "pruned", "places", share)

    def refine(self, round_: int, mask: Mask, model: Arrays, seen: Statistics | None) -> Mask | None:
        """Count the votes of the round before, if there are any."""
        if not self.exchanged(round_ - 1) or seen is None or not {"smallness", "gradient"} <= seen.mean.keys():
            return None
        return vote(mask, model, seen.mean["smallness"], seen.mean["gradient"])


@dataclass(frozen=True, kw_only=True, repr=False)
class PruneFl(Planned):
    """Prune at one client, then reconsider the smallest weights by squared gradients: PruneFL (Jiang et al. 2022).

    Before round 1, one client trains from W0 and reports its squared gradients. The entries with the largest ones are
    kept, and training begins from that client's model. Every some rounds, the smallest weights of each array and the
    pruned entries compete for their places by the clients' squared gradients
    (:func:`~autoflip_flwr.core.regrow.reconfigure`).

    Parameters
    ----------
    epochs, patience : int
        Sent to the first client: train for at most ``epochs`` epochs, and stop after ``patience`` epochs without a
        better mean training loss; both >= 1.
    share : float
        Share of an array's kept entries that may lose their places, in (0, 1).
    every : int
        Rounds between two reconfigurations, >= 1.
    scope : str
        Budget of the first mask, see :class:`~autoflip_flwr.core.methods.Scored`.
    timeout, public
        See :class:`~autoflip_flwr.core.method.Method`.
    """

    epochs: int = 5
    patience: int = 2
    share: float = 0.3
    every: int = 50
    timeout: float | None = None
    public: bool = False

    explorers = 1e-9  # one
    min_explorers = 1
    weighting = "examples"
    initial = "explorers"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self, "share", below_one=True)
        check_counts(self, "epochs", "patience", "every")

    def config(self) -> dict[str, bool | int | float | str]:
        """Return how long the first client trains."""
        return {"epochs": self.epochs, "patience": self.patience}

    def request(self, round_: int) -> tuple[Request, ...]:
        """Request squared gradients in the rounds before a reconfiguration, and the first client's deltas."""
        if round_ == 0:
            return Request(DELTA, over="all"), Request("gradient-square", over="all")
        return (Request("gradient-square", over="all"),) if self.sparsity and round_ % self.every == 0 else ()

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

    def refine(self, round_: int, mask: Mask, model: Arrays, seen: Statistics | None) -> Mask | None:
        """Reconfigure, if clients have reported squared gradients in the round before."""
        if not self.sparsity or (round_ - 1) % self.every or seen is None or "gradient-square" not in seen.mean:
            return None
        return reconfigure(mask, model, seen.mean["gradient-square"], self.share)


def check_shares(method: object, *names: str, below_one: bool = False) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless these fields are numbers in (0, 1], or in (0, 1)."""
    for name in names:
        value: Any = getattr(method, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{type(method).__name__}: {name} = {value!r}: must be a number")
        if not 0 < value <= 1 or (below_one and value == 1):
            end = ")" if below_one else "]"
            raise ValueError(f"{type(method).__name__}: {name} = {value}: must be a share in (0, 1{end}")
