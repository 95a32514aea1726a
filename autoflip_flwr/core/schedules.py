"""Schedules: densities that fall, and entries that are exchanged for others at constant density.

What those of the field leave out of their papers is in ``docs/methods.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from autoflip_flwr.core.ballots import VOTES, Ballots, votes_of
from autoflip_flwr.core.budget import BUDGETS, Budget
from autoflip_flwr.core.choices import DROPS, FALL_SCOPES
from autoflip_flwr.core.layout import Arrays, Layout
from autoflip_flwr.core.losses import Losses
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.moves import NEEDS_MOVES, Moves, ranking
from autoflip_flwr.core.pace import Exchange, Fall
from autoflip_flwr.core.regrow import drop_and_grow, reconfigure, shrink, vote
from autoflip_flwr.core.request import DELTA, Request
from autoflip_flwr.core.schedule import Reported, Schedule, check_choice, check_counts, check_shares
from autoflip_flwr.core.selection import select
from autoflip_flwr.core.statistics import Floats, Statistics

FEWEST_CHANGES = 8
"""So many comparisons of a client's loss with its own before are needed to stop a fall."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Gradual(Schedule):
    """Prune step by step while training goes on; what is pruned stays pruned.

    The density falls along a polynomial (a cubic: Zhu and Gupta 2017), as in FedSparsify (Stripelis et al. 2022).

    Parameters
    ----------
    initial_density : float
        Density of round 1, in (0, 1]; below 1, the method's first mask has it. Where the target is denser, it is the
        target's, and nothing falls.
    fall : float
        Share of the rounds within which the density falls to the target, in (0, 1].
    every : int
        Rounds between two steps, >= 1.
    power : float
        Exponent of the fall, >= 1: the higher, the more is pruned early.
    drop_by : str
        Which entries are dropped first, see :func:`~autoflip_flwr.core.moves.ranking`. ``"votes"``: those for which
        few clients vote; a client votes for its largest weights after training, as many as the next step keeps. What
        is dropped is sampled (:class:`~autoflip_flwr.core.ballots.Ballots`; FedRTS).
    scope : str
        Among which entries: ``"global"``, ``"layer"`` or ``"erk"`` as for the first mask
        (:class:`~autoflip_flwr.core.scored.Scored`); ``"explored"``: each array falls to the density that the first
        mask's scores give it at the target.
    extrusion : float
        How strongly clients draw to zero, in the round before a step, what it will drop: the factor of ``||w||^2`` over
        these entries (FedMef, Huang et al. 2024); 0: not at all. Only by magnitude and in the global scope.
    seed : int
        Seed of the samples for ``drop_by="votes"``.

    Notes
    -----
    Where the sparsity is to be found (``sparsity="auto"``), the density falls no further as soon as the clients'
    training losses no longer fall: a step then costs as much as training wins (our rule). Each client is compared with
    itself (:class:`~autoflip_flwr.core.losses.Losses`), over the last tenth of the rounds, at least
    :data:`FEWEST_CHANGES` times.
    """

    initial_density: float = 1.0
    fall: float = 0.6
    every: int = 1
    power: float = 3.0
    drop_by: str = "magnitude"
    scope: str = "global"
    extrusion: float = 0.0
    seed: int = 0
    _moves: Moves = field(default_factory=Moves, init=False, compare=False)
    _ballots: Ballots = field(default_factory=Ballots, init=False, compare=False)
    _sent: tuple[Mask, Arrays, int] | None = field(default=None, init=False, compare=False)
    _target: dict[str, int] = field(default_factory=dict, init=False, compare=False)
    _losses: Losses | None = field(default=None, init=False, compare=False)
    _found: bool = field(default=False, init=False, compare=False)

    def __post_init__(self) -> None:
        check_shares(self, "initial_density", "fall")
        check_counts(self, "every")
        if not 1 <= self.power < 100:
            raise ValueError(f"Gradual: power = {self.power}: must be a number >= 1, such as 3")
        check_choice(self, "drop_by", DROPS)
        check_choice(self, "scope", FALL_SCOPES)
        if not 0 <= self.extrusion < np.inf:
            raise ValueError(f"Gradual: extrusion = {self.extrusion}: must be a number >= 0")
        if self.extrusion and (self.drop_by, self.scope) != ("magnitude", "global"):
            raise ValueError(f"Gradual: extrusion = {self.extrusion}: needs drop_by='magnitude' and scope='global'")

    def plan(self, sparsity: float, rounds: int) -> None:
        """Note sparsity and rounds; ``ValueError`` if there is no round for a step."""
        super().plan(sparsity, rounds)
        vars(self).update(_moves=Moves(), _losses=None, _found=False, _ballots=Ballots(), _sent=None)
        if self._falls:
            self._pace.steps(rounds)

    def seek(self) -> bool:
        """Stop at the density from which on pruning costs as much as training wins."""
        vars(self)["_losses"] = Losses()
        return True

    def watch(self, round_: int, losses: Mapping[int, float]) -> None:
        """Learn the losses, if they are to stop the fall."""
        if self._losses is not None:
            self._losses.add(round_, losses)

    def _costs_too_much(self, round_: int) -> bool:
        if self._losses is None or self._found:
            return self._found
        trend = self._losses.trend(round_ - 1 - max(self.every, self.rounds // 10), FEWEST_CHANGES)
        if trend is not None and trend > 0:
            vars(self)["_found"] = True
        return self._found

    @property
    def _falls(self) -> bool:
        return self.rounds > 1 and self.initial_density > 1 - self.sparsity

    @property
    def _pace(self) -> Fall:
        return Fall(self.initial_density, self.fall, self.every, self.power)

    def first_sparsity(self, sparsity: float) -> float:
        """Return the sparsity of the initial density; the target's if nothing falls."""
        return round(1 - self.initial_density, 9) if self._falls else sparsity

    def begin(self, layout: Layout, score: Mapping[str, Floats], target: Mask) -> None:
        """Note how many entries of each array the target's mask keeps."""
        vars(self)["_target"] = dict(target.kept_by_name)

    def request(self, round_: int) -> tuple[Request, ...]:
        """Request the deltas of the kept entries while the density falls, if they decide what is dropped."""
        falls = self._falls and round_ <= self._pace.last(self.rounds)
        return (Request(DELTA, over="kept"),) if falls and self.drop_by in (*NEEDS_MOVES, VOTES) else ()

    def look(self, layout: Layout, found: Mapping[str, Reported]) -> Mapping[str, Reported]:
        """Add the client's votes, if they decide what is dropped."""
        if self._sent is None or DELTA not in found:
            return found
        mask, model, count = self._sent
        return {**found, VOTES: votes_of(mask, model, found[DELTA], count)}

    def refine(self, round_: int, mask: Mask, model: Arrays, seen: Statistics | None) -> Mask | None:
        """Drop the entries of the lowest rank if a step is due."""
        if not self._falls:
            return None
        if self.drop_by in NEEDS_MOVES:
            self._moves.add(mask, seen)
        self._ballots.add(mask, seen)
        sparsity = self._pace.sparsity(self.sparsity, round_, self.rounds)
        if sparsity is None or self._costs_too_much(round_):
            return None
        if self.drop_by == VOTES:
            score = self._ballots.ranked(mask, model, (self.seed, round_))
        else:
            score = ranking(self.drop_by, mask, model, self._moves)
        return shrink(mask, score, self._budget(mask.layout, sparsity))

    @property
    def prepares(self) -> bool:
        """Whether the schedule extrudes, or counts votes."""
        return self.extrusion > 0 or self.drop_by == VOTES

    def prepare(self, round_: int, mask: Mask, model: Arrays) -> dict[str, bool | int | float | str]:
        """Tell clients below which magnitude an entry will be dropped, if a step follows this round."""
        vars(self)["_sent"] = None
        if not self.sparsity or self.rounds < 2 or self._found:
            return {}
        if self.drop_by == VOTES and (count := self._next_count(round_, mask.layout)):
            vars(self)["_sent"] = mask, model, count
        if not self.extrusion:
            return {}
        sparsity = self._pace.sparsity(self.sparsity, round_ + 1, self.rounds)
        if sparsity is None:
            return {}
        size = np.concatenate([np.abs(model[name][keep]) for name, keep in mask.keep.items()])
        count = size.size - sum(self._budget(mask.layout, sparsity).values())
        if not 0 < count < size.size:
            return {}
        return {"extrusion": self.extrusion, "extrude-below": float(np.partition(size, count)[count])}

    def _next_count(self, round_: int, layout: Layout) -> int:
        """Return how many entries the next step after a round keeps; 0: no step follows."""
        later = range(round_ + 1, self._pace.last(self.rounds) + 2)
        found = (self._pace.sparsity(self.sparsity, each, self.rounds) for each in later)
        sparsity = next((each for each in found if each is not None), None)
        return 0 if sparsity is None else sum(Budget.whole(layout, sparsity).values())

    def _budget(self, layout: Layout, sparsity: float) -> Budget:
        if self.scope != "explored":
            return BUDGETS[self.scope](layout, sparsity)
        return Budget.between(layout, self._target, sparsity)

    def state(self) -> Any:
        """Return the plan, the target's counts, and the clients' moves, votes and losses."""
        losses = None if self._losses is None else self._losses.state()
        clients = {"moves": self._moves.state(), "votes": self._ballots.state(), "losses": losses}
        return {"plan": super().state(), "target": self._target, "found": self._found, **clients}

    def load(self, state: Any) -> None:
        """Restore what :meth:`state` returned."""
        super().load(state["plan"])
        vars(self).update(_target=state["target"], _found=state["found"])
        self._moves.load(state["moves"])
        self._ballots.load(state["votes"])
        if self._losses is not None:
            self._losses.load(state["losses"])


@dataclass(frozen=True, kw_only=True, repr=False)
class Regrow(Schedule):
    """Exchange entries at constant density: drop the smallest weights, grow where the clients' gradients are largest.

    This is RigL (Evci et al. 2020) on federated data, as in the progressive pruning of FedTiny (Huang et al. 2023). The
    number of kept entries of each array stays. Clients send the top entries only.

    Parameters
    ----------
    share : float
        Share of an array's kept entries that is exchanged at first, in (0, 1); it falls along a cosine.
    every : int
        Rounds between two exchanges, >= 1.
    begin : float
        Share of the rounds before which nothing is exchanged, in [0, 1).
    until : float
        Share of the rounds after which nothing is exchanged, in (0, 1], and above ``begin``.
    """

    share: float = 0.3
    every: int = 10
    after: float = 0.0
    until: float = 0.6

    def __post_init__(self) -> None:
        check_shares(self, "until")
        check_shares(self, "after", zero=True, one=False)
        check_shares(self, "share", one=False)
        check_counts(self, "every")
        if self.after >= self.until:
            raise ValueError(f"{type(self).__name__}: after = {self.after}: must be below until = {self.until}")

    def exchanged(self, round_: int) -> float:
        """Return the share of the kept entries that is exchanged after a round; 0: none."""
        pace = Exchange(self.share, self.every, self.until, self.after)
        return pace.after(round_, self.rounds) if self.sparsity else 0.0

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
class Votes(Regrow):
    """Exchange entries at constant density by the clients' votes: FedDST (Bibikar et al. 2022).

    After their training, clients report which of their weights they drop (the smallest) and which pruned entries they
    grow instead (the largest gradients). The server keeps the largest averaged weights that not all of them have
    dropped, then the entries that most have grown (:func:`~autoflip_flwr.core.regrow.vote`).

    Parameters
    ----------
    share, every, after, until
        See :class:`Regrow`.
    """

    share: float = 0.01
    every: int = 15
    until: float = 0.5

    weighting: ClassVar[str] = "uniform"

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
class Reconfigure(Schedule):
    """Reconsider the smallest weights by the clients' squared gradients: PruneFL (Jiang et al. 2022).

    The smallest weights of each array and all pruned entries compete for their places
    (:func:`~autoflip_flwr.core.regrow.reconfigure`).

    Parameters
    ----------
    share : float
        Share of an array's kept entries that may lose their places, in (0, 1).
    every : int
        Rounds between two reconfigurations, >= 1.
    """

    share: float = 0.3
    every: int = 50

    grow_from: ClassVar[str] = "last"

    def __post_init__(self) -> None:
        check_shares(self, "share", one=False)
        check_counts(self, "every")

    def request(self, round_: int) -> tuple[Request, ...]:
        """Request squared gradients in the rounds before a reconfiguration."""
        return (Request("gradient-square", over="all"),) if self.sparsity and round_ % self.every == 0 else ()

    def refine(self, round_: int, mask: Mask, model: Arrays, seen: Statistics | None) -> Mask | None:
        """Reconfigure, if clients have reported squared gradients in the round before."""
        if not self.sparsity or (round_ - 1) % self.every or seen is None or "gradient-square" not in seen.mean:
            return None
        return reconfigure(mask, model, seen.mean["gradient-square"], self.share)


@dataclass(frozen=True, kw_only=True, repr=False)
class Agreement(Schedule):
    """Rank all entries anew at constant density, by what the clients' updates say of them while training goes on.

    The score of a kept entry is the moving average of the squared deltas times their agreement, as in the exploration.
    The rule is our reading of the paper's "refined by client agreement throughout training". A pruned entry has the
    score that it had when it was dropped, or else the exploration's. That is scaled by one factor, so that both kinds
    of scores have the same mean over the kept entries. A grown entry resumes from its last value.

    Parameters
    ----------
    every : int
        Rounds between two changes, >= 1.
    until : float
        Share of the rounds after which nothing changes, in (0, 1].
    decay : float
        Weight of the past in the moving averages per round, in [0, 1).
    """

    every: int = 5
    until: float = 0.6
    decay: float = 0.9
    _moves: Moves = field(default_factory=Moves, init=False, compare=False)
    _score: dict[str, Floats] = field(default_factory=dict, init=False, compare=False)

    grow_from: ClassVar[str] = "last"

    def __post_init__(self) -> None:
        check_shares(self, "until")
        check_shares(self, "decay", zero=True, one=False)
        check_counts(self, "every")

    def plan(self, sparsity: float, rounds: int) -> None:
        """Note sparsity and rounds."""
        super().plan(sparsity, rounds)
        vars(self)["_moves"] = Moves()

    def begin(self, layout: Layout, score: Mapping[str, Floats], target: Mask) -> None:
        """Note the scores of the first mask."""
        vars(self)["_score"] = {name: np.asarray(values, np.float32) for name, values in score.items()}

    @property
    def _last(self) -> int:
        return int(self.until * self.rounds)

    def request(self, round_: int) -> tuple[Request, ...]:
        """Request the deltas of the kept entries."""
        return (Request(DELTA, over="kept"),) if self.sparsity and round_ <= self._last else ()

    def refine(self, round_: int, mask: Mask, model: Arrays, seen: Statistics | None) -> Mask | None:
        """Rank all entries if a change is due."""
        if not self.sparsity or round_ - 1 > self._last:
            return None
        self._moves.add(mask, seen, self.decay)
        if (round_ - 1) % self.every or not self._moves:
            return None
        new = self._moves.agreed(mask.layout)
        kept, before = (self._total(mask, scores) for scores in (new, self._score))
        factor = kept / before if before > 0 else 0.0
        score = {name: np.where(self._moves.known(name), new[name], factor * self._score[name]) for name in new}
        return select(mask.layout, score, {tuple(mask.layout.prunable_names): mask.kept})

    @staticmethod
    def _total(mask: Mask, scores: Mapping[str, Floats]) -> float:
        return sum(float(scores[name][keep].sum(dtype=np.float64)) for name, keep in mask.keep.items())

    def state(self) -> Any:
        """Return the plan, the first mask's scores and the clients' moves."""
        return {"plan": super().state(), "score": self._score, "moves": self._moves.state()}

    def load(self, state: Any) -> None:
        """Restore what :meth:`state` returned."""
        super().load(state["plan"])
        vars(self)["_score"] = state["score"]
        self._moves.load(state["moves"])
