"""Interface of a schedule: how a mask changes during training.

A method chooses the first mask, and its schedules the masks that follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar

from numpy.typing import NDArray

from autoflip_flwr.core.layout import Arrays, Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.request import Request
from autoflip_flwr.core.statistics import Floats, Statistics

Reported = Mapping[str, NDArray[Any]]
"""What a client reports of one statistic: arrays by name."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Base class of all schedules. An object serves one run at a time.

    A run that goes on from a checkpoint keeps the plan with which it began, even if it now has more rounds.

    Attributes
    ----------
    grow_from : str
        Value at which an entry that is grown starts, see :class:`~autoflip_flwr.core.method.Method`.
    weighting : str
        How clients are weighted in the statistics that the schedule requests, for methods that have no such setting.
    sparsity : float
        Target of the run that was planned last.
    rounds : int
        Number of rounds of that run.
    """

    grow_from: ClassVar[str] = "outside"
    weighting: ClassVar[str] = "examples"
    _plan: tuple[float, int] = field(default=(0.0, 0), init=False, compare=False)

    def __repr__(self) -> str:
        own = [f for f in fields(self) if f.init and getattr(self, f.name) != default_of(f)]
        told = [f"{f.name}={getattr(self, f.name)!r}" for f in own]
        return f"{type(self).__name__}({', '.join(told)})"

    @property
    def sparsity(self) -> float:
        """Target of the run that was planned last."""
        return self._plan[0]

    @property
    def rounds(self) -> int:
        """Number of rounds of the run that was planned last."""
        return self._plan[1]

    def plan(self, sparsity: float, rounds: int) -> None:
        """Note the target and the number of rounds of the run that begins.

        Raises
        ------
        ValueError
            If the schedule cannot work with them.
        """
        vars(self)["_plan"] = (sparsity, rounds)

    def seek(self) -> bool:
        """Find the sparsity of the run that was planned. Return whether the schedule can; default: it cannot."""
        return False

    def watch(self, round_: int, losses: Mapping[int, float]) -> None:
        """Learn the training losses of a round's clients; default: nothing."""

    def first_sparsity(self, sparsity: float) -> float:
        """Return the sparsity of round 1; default: the target."""
        return sparsity

    def begin(self, layout: Layout, score: Mapping[str, Floats], target: Mask) -> None:
        """Learn the scores of the first mask, and the mask that they would make at the target; default: nothing."""

    def request(self, round_: int) -> tuple[Request, ...]:
        """Return the statistics to request from clients in a round >= 1; default: none."""
        return ()

    def asks_who(self, round_: int) -> bool:
        """Return whether the mask of a round >= 1 depends on which nodes the round samples; default: no."""
        return False

    def sampled(self, score: Mapping[str, Floats], scope: str) -> None:
        """Learn the method's scores from the explorers among the nodes of the round to come; default: nothing.

        ``scope`` is the method's (:class:`~autoflip_flwr.core.scored.Scored`). It is called before :meth:`refine` in
        the rounds for which :meth:`asks_who` says so.
        """

    def look(self, layout: Layout, found: Mapping[str, Reported]) -> Mapping[str, Reported]:
        """Convert one client's statistics to those that are averaged; default: as is.

        See :meth:`Method.look <autoflip_flwr.core.method.Method.look>`.
        """
        return found

    def refine(self, round_: int, mask: Mask, model: Arrays, seen: Statistics | None) -> Mask | None:
        """Return the mask for a round > 1, or ``None`` to keep the current one.

        See :meth:`Method.refine <autoflip_flwr.core.method.Method.refine>`.
        """
        return None

    @property
    def prepares(self) -> bool:
        """Whether :meth:`prepare` is called before each round."""
        return False

    def prepare(self, round_: int, mask: Mask, model: Arrays) -> dict[str, bool | int | float | str]:
        """Learn the mask and the model of a round >= 1, and return config entries for its clients.

        See :meth:`Method.prepare <autoflip_flwr.core.method.Method.prepare>`.
        """
        return {}

    def state(self) -> Any:
        """Return the schedule's state for a checkpoint."""
        return list(self._plan)

    def load(self, state: Any) -> None:
        """Restore what :meth:`state` returned."""
        vars(self)["_plan"] = tuple(state)


def default_of(field: Field[Any]) -> object:
    """Return the default of a dataclass field, made if it has a factory."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def check_choice(of: object, name: str, allowed: Any) -> None:
    """Raise ``ValueError`` unless a field has one of the allowed values."""
    if getattr(of, name) not in list(allowed):
        raise ValueError(f"{type(of).__name__}: {name} = {getattr(of, name)!r}: must be one of {', '.join(allowed)}")


def check_counts(of: object, *names: str) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless these fields are whole numbers >= 1."""
    for name in names:
        value = getattr(of, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{type(of).__name__}: {name} = {value!r}: must be a whole number")
        if value < 1:
            raise ValueError(f"{type(of).__name__}: {name} = {value}: must be at least 1")


def check_shares(of: object, *names: str, zero: bool = False, one: bool = True) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless these fields are numbers from 0 to 1, each end as said."""
    for name in names:
        value: Any = getattr(of, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{type(of).__name__}: {name} = {value!r}: must be a number")
        if not 0 <= value <= 1 or (value == 0 and not zero) or (value == 1 and not one):
            ends = ("[" if zero else "(") + "0, 1" + ("]" if one else ")")
            raise ValueError(f"{type(of).__name__}: {name} = {value}: must be a share in {ends}")
