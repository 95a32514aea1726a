"""Which entries are pruned, and how they are chosen: the settings of the mask."""

from __future__ import annotations

from dataclasses import dataclass
from logging import INFO, WARNING

import numpy as np
from flwr.app import ArrayRecord
from flwr.common.logger import log

from autoflip_flwr.core import evidence, health
from autoflip_flwr.core.layout import AUTO, Arrays, Layout, Output, Rule
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.scores import NORMALISATIONS, scores
from autoflip_flwr.core.selection import SCOPES, choose_mask, narrowed, protected_outputs, tied_weights
from autoflip_flwr.core.statistics import Exploration, Floats
from autoflip_flwr.core.subspace import Subspace
from autoflip_flwr.wire.records import to_arrays


@dataclass(frozen=True)
class MaskPlan:
    """The settings of the mask; :class:`~autoflip_flwr.server.strategy.AutoFlip` explains them.

    Raises
    ------
    ValueError
        If one is out of range.
    """

    sparsity: float = 0.7
    scope: str = "global"
    normalisation: str = "none"
    gamma: float = 1.0
    prunable: Rule | None = None
    exclude: Rule | None = None
    biases: bool = False
    output: Output | None = AUTO
    prune_unmoved: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity = {self.sparsity}: must be a number in [0, 1)")
        if not 0 <= self.gamma < np.inf:
            raise ValueError(f"gamma = {self.gamma}: must be a number >= 0")
        for name, allowed in (("scope", SCOPES), ("normalisation", NORMALISATIONS)):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} = {value!r}: must be one of {', '.join(allowed)}")

    def layout(self, arrays: Arrays) -> Layout:
        """The layout of a model, given by its arrays."""
        return Layout.of(arrays, prunable=self.prunable, exclude=self.exclude, biases=self.biases, output=self.output)

    def choose(self, layout: Layout, initial: Arrays, exploration: Exploration) -> Mask:
        """The mask that these settings make of an exploration from ``initial``."""
        evidence.check_moved(exploration)
        still = evidence.unmoved(exploration)
        if still:
            names = evidence.shortest(still, layout.prunable_names)
            what = (
                "pruned first (prune_unmoved=True)"
                if self.prune_unmoved
                else "not pruned, and does not count in the sparsity (prune_unmoved=True prunes it first)"
            )
            log(WARNING, "no explorer moved %s: what is frozen, or a buffer, is %s", ", ".join(names), what)
        if decayed := evidence.decayed(layout, initial, exploration):
            names = evidence.shortest(decayed, layout.prunable_names)
            log(
                WARNING,
                "the explorers moved %s by a constant share of the initial values, as weight decay alone does, and the "
                "mask follows the size of those: explore without it (the config says autoflip-weight-decay = 0.0)",
                ", ".join(names),
            )
        score = scores(exploration, self.normalisation, self.gamma)
        twins = tied_weights(layout, initial, exploration)
        spared = [] if self.prune_unmoved else still
        counted = narrowed(layout, twins, spared)
        if outputs := list(protected_outputs(counted, self.sparsity, self.scope)):
            log(INFO, "each unit of %s keeps an incoming weight (output=)", ", ".join(outputs))
        try:
            return choose_mask(layout, score, self.sparsity, self.scope, tied=twins, spared=spared)
        except ValueError as error:
            if not spared:
                raise
            raise ValueError(
                f"{error}; only what the explorers moved is pruned. The exploration is kept: start again with a lower "
                "sparsity, or with prune_unmoved=True"
            ) from error

    def rehearse(self, layout: Layout, initial: Arrays, mask: Mask | None, exploration: Exploration | None) -> None:
        """Raise ``ValueError`` for all that could go wrong once clients have worked.

        ``mask`` and ``exploration`` are ready ones that the user has brought.
        """
        for name, values in initial.items():
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                raise ValueError(
                    f"array {name!r} of the initial model holds NaN or infinity, and replies with such are left out: "
                    "send finite arrays, without constant buffers"
                )
        if mask is not None and mask.layout.specs != layout.specs:
            raise ValueError("mask: its arrays are not those of the initial model")
        if exploration is not None:
            shapes = {name: values.shape for name, values in exploration.deviation.items()}
            if shapes != {spec.name: spec.shape for spec in layout.prunable}:
                raise ValueError("exploration: its arrays are not the prunable arrays of the initial model")
            if mask is None:
                evidence.check_moved(exploration)
                scores(exploration, self.normalisation, self.gamma)
        elif mask is None and self.sparsity > 0:
            same: dict[str, Floats] = {spec.name: np.ones(spec.shape) for spec in layout.prunable}
            twins = tied_weights(layout, initial, Exploration(same, same, same, explorers=0))
            for names in ({}, twins) if twins else ({},):  # arrays that start alike may turn out to be one weight
                choose_mask(layout, same, self.sparsity, self.scope, tied=names)


def warn_of_problems(subspace: Subspace) -> None:
    """Log the problems of a mask in one warning, with what to do; none where the pruned weights go on working."""
    if subspace.base is None and (found := health.problems(subspace.mask)):
        log(
            WARNING,
            "the mask may leave a network that cannot learn: %s. Try scope='layer', a lower sparsity, or exclude=[...]",
            "; ".join(found),
        )


WEIGHTINGS = ("uniform", "examples")
VALUES = ("log8", "float32")


@dataclass(frozen=True)
class ExplorationPlan:
    """Who explores, and how.

    Parameters
    ----------
    explorers : float
        Share of the connected nodes that explore, in (0, 1].
    min_explorers : int
        The mask is made from those that answer, if they are at least this many.
    rounds : int
        Number of batches, of different explorers each, all starting from W0.
    epochs, patience : int
        Sent to the explorers: at most so many epochs, stopping after ``patience`` epochs without a better mean
        training loss.
    weighting : str
        ``"uniform"`` (the authors' code) or ``"examples"``, by number of examples (our reading).
    values : str
        How explorers' moves travel: ``"log8"``, a byte a parameter or less (:mod:`autoflip_flwr.wire.deltas`), or
        ``"float32"``, as the model has them.
    """

    explorers: float = 1.0
    min_explorers: int = 2
    rounds: int = 1
    epochs: int = 5
    patience: int = 2
    weighting: str = "uniform"
    values: str = "log8"

    def __post_init__(self) -> None:
        if not 0 < self.explorers <= 1:
            raise ValueError(f"explorers = {self.explorers}: must be a share in (0, 1]")
        for name in ("min_explorers", "rounds", "epochs", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        for name, allowed in (("weighting", WEIGHTINGS), ("values", VALUES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be one of {', '.join(allowed)}")


def model_of(record: ArrayRecord) -> Arrays:
    """The arrays of a model that can be pruned; ``ValueError`` if none of them holds floating-point numbers."""
    coded = sorted({array.stype for array in record.values()} - {"numpy.ndarray"})
    arrays = {} if coded else to_arrays(record)
    kinds = coded or sorted({array.dtype.name for array in arrays.values()})
    if not any(array.dtype.kind == "f" for array in arrays.values()):
        raise ValueError(
            f"nothing to prune: the model is {len(record)} arrays of {', '.join(kinds) or 'nothing'}, and AutoFlip "
            "prunes floating-point ones; a model that travels as bytes, as XGBoost's does, runs with its strategy alone"
        )
    return arrays
