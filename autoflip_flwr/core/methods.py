"""Pruning methods: AutoFLIP's loss exploration, and baselines that keep the highest scores."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.core import evidence
from autoflip_flwr.core.budget import BUDGETS
from autoflip_flwr.core.choices import INITIALS, NORMALISATIONS, SCOPES
from autoflip_flwr.core.layout import Arrays, Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.method import Method, check_method
from autoflip_flwr.core.request import DELTA, Request
from autoflip_flwr.core.scores import magnitude, random_scores, scores
from autoflip_flwr.core.selection import select
from autoflip_flwr.core.statistics import Exploration, Floats, Statistics, minmax, start_arrays


@dataclass(frozen=True, kw_only=True)
class Scored(Method):
    """Base class of methods that keep the entries with the highest scores.

    Parameters
    ----------
    scope : str
        Which entries are ranked together, and how many are kept. ``"global"``: one quantile over all (the authors'
        code). ``"layer"``: one quantile per array. ``"erk"``: per array, with densities from the arrays' dimensions
        (:meth:`Budget.erk <autoflip_flwr.core.budget.Budget.erk>`).
    """

    scope: str = "global"

    def __post_init__(self) -> None:
        check_choice(self, "scope", SCOPES)

    def __repr__(self) -> str:
        told = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(told)})"

    def score(self, layout: Layout, initial: Arrays, seen: Statistics | None) -> Mapping[str, Floats]:
        """Return a finite score for each prunable entry; low = unimportant."""
        raise NotImplementedError

    def first(self, sparsity: float, layout: Layout, initial: Arrays, seen: Statistics | None) -> Mask:
        """Keep the entries with the highest scores, as many as the scope's budget says."""
        return select(layout, self.score(layout, initial, seen), BUDGETS[self.scope](layout, sparsity))


@dataclass(frozen=True, kw_only=True, repr=False)
class Random(Scored):
    """Keep entries at random.

    Parameters
    ----------
    seed : int
        Seed of the random scores.
    scope : str
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
    scope : str
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
    scope : str
        See :class:`Scored`.
    """

    def request(self, round_: int) -> tuple[Request, ...]:
        """Request the saliency before training."""
        return (Request("saliency", over="all"),) if round_ == 0 else ()

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
    scope : str
        See :class:`Scored`.
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
    normalisation: str = "none"
    gamma: float = 1.0
    initial: str = "scratch"
    prune_unmoved: bool = False

    squares: ClassVar[Collection[str]] = (DELTA,)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "epochs", "patience")
        check_choice(self, "normalisation", NORMALISATIONS)
        check_choice(self, "initial", INITIALS)
        if not isinstance(self.gamma, int | float | np.number):
            raise TypeError(f"LossExploration: gamma = {self.gamma!r}: must be a number")
        if not 0 <= self.gamma < np.inf:
            raise ValueError(f"LossExploration: gamma = {self.gamma}: must be a number >= 0")

    def request(self, round_: int) -> tuple[Request, ...]:
        """Request the deltas of an exploration before training."""
        return (Request(DELTA, over="all"),) if round_ == 0 else ()

    def config(self) -> dict[str, bool | int | float | str]:
        """Return how long explorers train, and weight decay 0, since it would change all weights in the same way."""
        return {"epochs": self.epochs, "patience": self.patience, "weight-decay": 0.0}

    def look(self, layout: Layout, found: dict[str, Arrays]) -> Mapping[str, Mapping[str, NDArray[Any]]]:
        """Add the explorer's normalised deviation if the normalisation is per client."""
        if self.normalisation != "per-client":
            return found
        own = {name: minmax(np.asarray(found[DELTA][name], np.float64) ** 2) for name in layout.prunable_names}
        return {**found, "normalised": own}

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
        """Return guidance times agreement to the power gamma."""
        assert seen is not None
        return scores(Exploration.of(seen), self.normalisation, self.gamma)

    def begin(self, initial: Arrays, seen: Statistics | None) -> Arrays:
        """Return W0, or the explorers' average."""
        if self.initial == "scratch" or seen is None:
            return initial
        return start_arrays(initial, Exploration.of(seen).signed_mean)


def check_choice(method: Method, name: str, allowed: Iterable[str]) -> None:
    """Raise ``ValueError`` unless a field of a method has one of the allowed values."""
    if getattr(method, name) not in list(allowed):
        raise ValueError(
            f"{type(method).__name__}: {name} = {getattr(method, name)!r}: must be one of {', '.join(allowed)}"
        )


def check_counts(method: Method, *names: str) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless these fields of a method are whole numbers >= 1."""
    for name in names:
        value = getattr(method, name)
        if not isinstance(value, int | np.integer):
            raise TypeError(f"{type(method).__name__}: {name} = {value!r}: must be a whole number")
        if value < 1:
            raise ValueError(f"{type(method).__name__}: {name} = {value}: must be at least 1")
