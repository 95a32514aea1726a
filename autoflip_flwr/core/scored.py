"""Base class of the methods that keep the highest scores, and change the mask by schedules."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from autoflip_flwr.core.budget import BUDGETS
from autoflip_flwr.core.choices import SCOPES
from autoflip_flwr.core.layout import Arrays, Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.method import Method
from autoflip_flwr.core.request import DELTA, Request
from autoflip_flwr.core.schedule import Schedule, check_choice, default_of
from autoflip_flwr.core.selection import select
from autoflip_flwr.core.statistics import Floats, Statistics


@dataclass(frozen=True, kw_only=True)
class Scored(Method):
    """Base class of methods that keep the entries with the highest scores.

    Parameters
    ----------
    schedule : Schedule or tuple[Schedule, ...]
        How the mask changes during training: one of :mod:`autoflip_flwr.core.schedules`, or several, which take their
        turns in this order before each round; ``()``: it never does (static).
    scope : str
        Which entries are ranked together, and how many are kept. ``"global"``: one quantile over all (the authors'
        code). ``"layer"``: one quantile per array. ``"erk"``: per array, with densities from the arrays' dimensions
        (:meth:`Budget.erk <autoflip_flwr.core.budget.Budget.erk>`).
    """

    scope: str = "global"
    schedule: Schedule | tuple[Schedule, ...] = ()

    squares: ClassVar[Collection[str]] = (DELTA,)

    def __post_init__(self) -> None:
        check_choice(self, "scope", SCOPES)
        given: Any = self.schedule
        if not all(isinstance(each, Schedule) for each in (given if isinstance(given, tuple) else (given,))):
            raise TypeError(
                f"{type(self).__name__}: schedule = {given!r}: must be a Schedule, such as Gradual(), a tuple of them, "
                "or () for a static mask"
            )
        if self.schedules:
            values_grow = {each.grow_from for each in self.schedules}
            vars(self)["grow_from"] = "last" if "last" in values_grow else "outside"
            if "weighting" not in {f.name for f in fields(self)}:
                vars(self)["weighting"] = self.schedules[0].weighting

    def __repr__(self) -> str:
        told = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != default_of(f)]
        return f"{type(self).__name__}({', '.join(told)})"

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """The schedules in their order."""
        return self.schedule if isinstance(self.schedule, tuple) else (self.schedule,)

    def plan(self, sparsity: float, rounds: int) -> None:
        """Tell the schedules; ``ValueError`` if one cannot work with them."""
        for each in self.schedules:
            each.plan(sparsity, rounds)

    def seek(self) -> None:
        """Let the schedules find the sparsity; ``ValueError`` if none can."""
        able = [each.seek() for each in self.schedules]
        if not any(able):
            super().seek()

    def watch(self, round_: int, losses: Mapping[int, float]) -> None:
        """Tell the schedules the clients' losses."""
        for each in self.schedules:
            each.watch(round_, losses)

    def exploring(self) -> object:
        """Return the settings."""
        return type(self), [getattr(self, f.name) for f in fields(self)]

    def request(self, round_: int) -> tuple[Request, ...]:
        """Request what the schedules need in a round >= 1."""
        asked = (request for each in self.schedules for request in each.request(round_)) if round_ else ()
        return tuple(dict.fromkeys(asked))

    def score(self, layout: Layout, initial: Arrays, seen: Statistics | None) -> Mapping[str, Floats]:
        """Return a finite score for each prunable entry; low = unimportant."""
        raise NotImplementedError(f"{type(self).__name__} has no method score(layout, initial, seen)")

    def first(self, sparsity: float, layout: Layout, initial: Arrays, seen: Statistics | None) -> Mask:
        """Keep the entries with the highest scores, as many as the scope's budget and the schedules say."""
        score = self.score(layout, initial, seen)
        target = chosen = self.choose(layout, score, sparsity)  # raises now what the last step would raise
        start = min((each.first_sparsity(sparsity) for each in self.schedules), default=sparsity)
        if start != sparsity:
            chosen = self.choose(layout, score, start)
        for each in self.schedules:
            each.begin(layout, score, target)
        return chosen

    def choose(self, layout: Layout, score: Mapping[str, Floats], sparsity: float) -> Mask:
        """Return the mask of the highest scores, as many as the scope's budget says."""
        return select(layout, score, BUDGETS[self.scope](layout, sparsity))

    def asks_who(self, round_: int) -> bool:
        """Return whether a schedule asks."""
        return any(each.asks_who(round_) for each in self.schedules)

    def sampled(self, layout: Layout, initial: Arrays, explored: Statistics) -> None:
        """Tell the schedules the scores from the explorers among the nodes of the round to come."""
        score = self.score(layout, initial, explored)
        for each in self.schedules:
            each.sampled(score, self.scope)

    def refine(self, round_: int, mask: Mask, model: Arrays, seen: Statistics | None) -> Mask | None:
        """Let the schedules change the mask, one after another; in round 1 those alone that ask whom it samples."""
        new = mask
        for each in self.schedules:
            if round_ > 1 or each.asks_who(round_):
                new = each.refine(round_, new, model, seen) or new
        return None if new is mask else new

    def state(self) -> object:
        """Return the schedules' states."""
        return [each.state() for each in self.schedules]

    def load(self, state: Any) -> None:
        """Restore what :meth:`state` returned."""
        for each, own in zip(self.schedules, state, strict=True):
            each.load(own)
