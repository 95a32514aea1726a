"""Pruning methods: AutoFLIP's loss exploration, and baselines that keep the highest scores."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.core import evidence
from autoflip_flwr.core.budget import Budget
from autoflip_flwr.core.choices import INITIALS, NORMALISATIONS, RANKS
from autoflip_flwr.core.layout import Arrays, Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.method import Method, check_method
from autoflip_flwr.core.participants import Participants
from autoflip_flwr.core.request import DELTA, Request
from autoflip_flwr.core.schedule import check_choice, check_counts
from autoflip_flwr.core.scored import Scored
from autoflip_flwr.core.scores import magnitude, random_scores, scores
from autoflip_flwr.core.selection import select
from autoflip_flwr.core.statistics import Exploration, Floats, Statistics, minmax, start_arrays


@dataclass(frozen=True, kw_only=True, repr=False)
class Random(Scored):
    """Keep entries at random.

    Parameters
    ----------
    seed : int
        Seed of the random scores.
    scope, schedule
        See :class:`Scored`.
    """

    seed: int = 0

    def score(self, layout: Layout, initial: Arrays, seen: Statistics | None) -> Mapping[str, Floats]:
        """Return random scores."""
        return random_scores(layout, self.seed)


@dataclass(frozen=True, kw_only=True, repr=False)
class Magnitude(Scored):
    """Keep the entries of W0 with the largest magnitude.

    Parameters
    ----------
    scope, schedule
        See :class:`Scored`.
    """

    def score(self, layout: Layout, initial: Arrays, seen: Statistics | None) -> Mapping[str, Floats]:
        """Return ``|W0|``."""
        return magnitude(layout, initial)


@dataclass(frozen=True, kw_only=True, repr=False)
class _Asks(Scored):
    """Method that asks clients before training; its parameters are the attributes of :class:`Method`."""

    explorers: float = Method.explorers
    min_explorers: int = Method.min_explorers
    batches: int = Method.batches
    weighting: str = Method.weighting
    timeout: float | None = Method.timeout
    public: bool = Method.public

    def __post_init__(self) -> None:
        super().__post_init__()
        check_method(self)


@dataclass(frozen=True, kw_only=True, repr=False)
class Snip(_Asks):
    """Keep the entries on which the clients' losses depend most: the mean of ``|gradient x weight|`` at W0.

    This is SNIP (Lee et al. 2019) on federated data, as in SSFL (Flower's baseline ``ssfl``). Each client reports the
    statistic ``saliency``, averaged over any number of minibatches (:func:`autoflip_flwr.torch.gradients` computes it
    for PyTorch).

    Parameters
    ----------
    explorers, min_explorers, batches, weighting, timeout, public
        See :class:`~autoflip_flwr.core.method.Method`.
    scope, schedule
        See :class:`Scored`.
    """

    def request(self, round_: int) -> tuple[Request, ...]:
        """Request the saliency before training."""
        return super().request(round_) if round_ else (Request("saliency", over="all"),)

    def inspect(self, layout: Layout, initial: Arrays, seen: Statistics | None) -> Iterable[str]:
        """Raise ``RuntimeError`` if the saliency is zero everywhere."""
        assert seen is not None
        if not any(values.any() for values in seen.mean["saliency"].values()):
            raise RuntimeError("the clients report a saliency of zero everywhere, and a mask would say nothing")
        return ()

    def score(self, layout: Layout, initial: Arrays, seen: Statistics | None) -> Mapping[str, Floats]:
        """Return the mean saliency."""
        assert seen is not None
        return seen.mean["saliency"]


@dataclass(frozen=True, kw_only=True, repr=False)
class LossExploration(_Asks):
    """Keep entries with large deltas that explorers agree on: AutoFLIP (arXiv 2405.10271), FedLEx (arXiv 2506.18640).

    Before round 1, explorers train from the same W0. The score of a parameter combines the size of its deltas and the
    explorers' agreement on them (:func:`~autoflip_flwr.core.scores.scores`).

    Parameters
    ----------
    explorers, min_explorers, batches, weighting, timeout, public
        See :class:`~autoflip_flwr.core.method.Method`.
    epochs, patience : int
        Sent to the explorers: train for at most ``epochs`` epochs, and stop after ``patience`` epochs without a better
        mean training loss; both >= 1.
    scope, schedule
        See :class:`Scored`.
    rank_by : str
        By what the entries of the first mask are ranked. ``"deviation"``: guidance times agreement, as above.
        ``"magnitude"``: the magnitude of the explorers' average model. ``"random"``: at random, with as many entries
        of each array as ``"deviation"`` would keep; that tells what coordinates are worth beyond densities (FLASH,
        Babakniya et al. 2023).
    seed : int
        Seed for ``rank_by="random"``.
    normalisation : str
        Normalisation of the deviations: ``"none"``, ``"layer"`` (the authors' code) or ``"per-client"`` (FedLEx).
    gamma : float
        Exponent of the client agreement, >= 0 (our reading); 0 ignores the agreement.
    initial : str
        Model from which training begins: ``"scratch"`` (W0), or ``"explorers"`` (their average).
    prune_unmoved : bool
        Whether arrays that no explorer changed are pruned first. Default: they are kept whole.
    """

    epochs: int = 5
    patience: int = 2
    rank_by: str = "deviation"
    seed: int = 0
    normalisation: str = "none"
    gamma: float = 1.0
    initial: str = "scratch"
    prune_unmoved: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "epochs", "patience")
        check_choice(self, "rank_by", RANKS)
        check_choice(self, "normalisation", NORMALISATIONS)
        check_choice(self, "initial", INITIALS)
        if not isinstance(self.gamma, int | float | np.number):
            raise TypeError(f"LossExploration: gamma = {self.gamma!r}: must be a number")
        if not 0 <= self.gamma < np.inf:
            raise ValueError(f"LossExploration: gamma = {self.gamma}: must be a number >= 0")
        if self.rank_by == "random" and any(isinstance(each, Participants) for each in self.schedules):
            raise ValueError(
                "LossExploration: rank_by = 'random': Participants() ranks by scores from round 1 on, and chance would "
                "decide nothing; use rank_by='deviation', or another schedule"
            )

    def request(self, round_: int) -> tuple[Request, ...]:
        """Request the deltas of an exploration before training."""
        return super().request(round_) if round_ else (Request(DELTA, over="all"),)

    def config(self) -> dict[str, bool | int | float | str]:
        """Return how long explorers train, and weight decay 0, since it would change all weights in the same way."""
        return {"epochs": self.epochs, "patience": self.patience, "weight-decay": 0.0}

    def look(self, layout: Layout, found: dict[str, Arrays]) -> Mapping[str, Mapping[str, NDArray[Any]]]:
        """Add the explorer's normalised deviation if the normalisation is per client."""
        seen = super().look(layout, found)
        if self.normalisation != "per-client":
            return seen
        own = {name: minmax(np.asarray(found[DELTA][name], np.float64) ** 2) for name in layout.prunable_names}
        return {**seen, "normalised": own}

    def exploring(self) -> object:
        """Return the settings on which the explorers' statistics depend."""
        how = (self.explorers, self.min_explorers, self.batches, self.weighting, self.epochs, self.patience)
        return type(self), how, self.normalisation == "per-client"

    def spared(self, layout: Layout, seen: Statistics | None) -> Collection[str]:
        """Return the arrays that no explorer changed, or none if ``prune_unmoved``."""
        return [] if seen is None or self.prune_unmoved else evidence.unmoved(Exploration.of(seen))

    def inspect(self, layout: Layout, initial: Arrays, seen: Statistics | None) -> Iterable[str]:
        """Warn of arrays that no explorer changed, and of arrays that seem to be changed by weight decay alone."""
        assert seen is not None
        exploration = Exploration.of(seen)
        evidence.check_moved(exploration)
        if still := evidence.unmoved(exploration):
            what = (
                "pruned first (prune_unmoved=True)"
                if self.prune_unmoved
                else "not pruned, and does not count in the sparsity (prune_unmoved=True prunes it first)"
            )
            names = ", ".join(evidence.shortest(still, layout.prunable_names))
            yield f"no explorer moved {names}: what is frozen, or a buffer, is {what}"
        if decayed := evidence.decayed(layout, initial, exploration):
            names = ", ".join(evidence.shortest(decayed, layout.prunable_names))
            yield (
                f"the explorers moved {names} by a constant share of the initial values, as weight decay alone does, "
                "and the mask follows the size of those: explore without it (the config says autoflip-weight-decay = "
                "0.0)"
            )

    def score(self, layout: Layout, initial: Arrays, seen: Statistics | None) -> Mapping[str, Floats]:
        """Return guidance times agreement to the power gamma, or the magnitude of the explorers' average."""
        assert seen is not None
        found = Exploration.of(seen)
        if self.rank_by == "magnitude":
            return magnitude(layout, start_arrays(initial, found.signed_mean))
        return scores(found, self.normalisation, self.gamma)

    def choose(self, layout: Layout, score: Mapping[str, Floats], sparsity: float) -> Mask:
        """Return the mask of the highest scores, or a random one with its number of entries per array."""
        mask = super().choose(layout, score, sparsity)
        if self.rank_by != "random":
            return mask
        return select(layout, random_scores(layout, self.seed), Budget.explored(mask))

    def begin(self, initial: Arrays, seen: Statistics | None) -> Arrays:
        """Return W0, or the explorers' average."""
        if self.initial == "scratch" or seen is None:
            return initial
        return start_arrays(initial, Exploration.of(seen).signed_mean)
