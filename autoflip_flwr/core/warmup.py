"""Warm-up: in rounds that begin with a new mask, clients raise their learning rate from zero."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from autoflip_flwr.core.layout import Arrays
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.schedule import Schedule, check_shares


@dataclass(frozen=True, kw_only=True, repr=False)
class Warmup(Schedule):
    """Tell clients to warm up in rounds that begin with a new mask, as the first does; no mask is changed.

    Parameters
    ----------
    share : float
        Share of a client's steps in which its learning rate rises, in (0, 1].
    """

    share: float
    _last: str = field(default="", init=False, compare=False)

    def __post_init__(self) -> None:
        check_shares(self, "share")

    def plan(self, sparsity: float, rounds: int) -> None:
        """Note sparsity and rounds; no mask is known any more."""
        super().plan(sparsity, rounds)
        vars(self)["_last"] = ""

    @property
    def prepares(self) -> bool:
        """Whether :meth:`prepare` is called before each round: it is."""
        return True

    def prepare(self, round_: int, mask: Mask, model: Arrays) -> dict[str, bool | int | float | str]:
        """Tell clients to warm up if the mask is not that of the round before."""
        before = self._last
        vars(self)["_last"] = mask.digest
        return {} if mask.digest == before else {"warmup": self.share}

    def state(self) -> Any:
        """Return the plan, and the digest of the last round's mask."""
        return {"plan": super().state(), "last": self._last}

    def load(self, state: Any) -> None:
        """Restore what :meth:`state` returned."""
        super().load(state["plan"])
        vars(self)["_last"] = state["last"]
