"""Schedule of the authors' published code: the mask of a round comes from the nodes that the round samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from autoflip_flwr.core.budget import Budget
from autoflip_flwr.core.layout import Arrays
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.schedule import Schedule, check_counts
from autoflip_flwr.core.selection import select
from autoflip_flwr.core.statistics import Floats, Statistics


@dataclass(frozen=True, kw_only=True, repr=False)
class Participants(Schedule):
    """Rank all entries anew by what the explorers among the nodes of a round reported before training.

    This is the rule of the authors' published code. Where a round samples no explorer, all explorers count. The rule
    holds from round 1 on. As many entries are kept as before, within the method's scope. An entry that comes back
    resumes from its last value.

    The server keeps what each explorer reported, in the bytes in which it came. That is a byte or less per explorer and
    prunable parameter, or four with ``Values(deltas="float32")``. Checkpoints hold it once. An exploration of an
    earlier run holds averages only and cannot be used. Methods that ask nobody before training have no such reports.

    Parameters
    ----------
    every : int
        Rounds between two changes, >= 1; the first change is in round 1.
    """

    every: int = 1
    _ranked: tuple[Mapping[str, Floats], str] | None = field(default=None, init=False, compare=False)

    grow_from: ClassVar[str] = "last"

    def __post_init__(self) -> None:
        check_counts(self, "every")

    def plan(self, sparsity: float, rounds: int) -> None:
        """Note sparsity and rounds."""
        super().plan(sparsity, rounds)
        vars(self)["_ranked"] = None

    def asks_who(self, round_: int) -> bool:
        """Return whether a change is due in a round."""
        return bool(self.sparsity) and (round_ - 1) % self.every == 0

    def sampled(self, score: Mapping[str, Floats], scope: str) -> None:
        """Note the scores from the explorers among the nodes of the round to come."""
        vars(self)["_ranked"] = score, scope

    def refine(self, round_: int, mask: Mask, model: Arrays, seen: Statistics | None) -> Mask | None:
        """Keep the entries with the highest of these scores, as many as before."""
        if self._ranked is None:
            return None
        (score, scope), vars(self)["_ranked"] = self._ranked, None
        whole: Any = {tuple(mask.layout.prunable_names): mask.kept}
        return select(mask.layout, score, whole if scope == "global" else Budget.explored(mask))
