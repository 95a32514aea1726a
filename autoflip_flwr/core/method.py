"""What a pruning method is: what it asks of clients, and the masks that it makes of their answers.

AutoFLIP is one method (:class:`~autoflip_flwr.core.methods.LossExploration`), its rivals are others. A method is maths
alone: who is asked, what travels and when is the server's affair.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Iterable, Mapping
from typing import Any, ClassVar

from numpy.typing import NDArray

from autoflip_flwr.core.choices import DELTAS, OVER, WEIGHTINGS
from autoflip_flwr.core.layout import Arrays, Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.request import DELTA, Request
from autoflip_flwr.core.statistics import Statistics


class Method:
    """A pruning method; the base of all.

    A method of your own overrides :meth:`first`, and what else it needs. Those that ask something before training
    (round 0) may set who answers; the class attributes are the defaults.

    Attributes
    ----------
    explorers : float
        Share of the connected nodes that are asked in round 0, in (0, 1].
    min_explorers : int
        The mask is made of the answers if they are at least this many.
    batches : int
        Number of batches in which they are asked, of different nodes each, all from W0.
    weighting : str
        ``"uniform"`` (the authors' code), or ``"examples"``: by number of examples (our reading).
    timeout : float or None
        Seconds per batch, > 0; ``None``: the rounds' own.
    public : bool
        Declares that what clients report may be known: under a differential-privacy wrapper they are asked only then.
    initial : str
        ``"scratch"`` if training begins at W0; anything else if :meth:`begin` returns another model.
    squares : Collection[str]
        Statistics whose squares are averaged too.
    """

    explorers: float = 1.0
    min_explorers: int = 2
    batches: int = 1
    weighting: str = "uniform"
    timeout: float | None = None
    public: bool = False
    initial: str = "scratch"
    squares: ClassVar[Collection[str]] = ()

    def request(self, round_: int) -> tuple[Request, ...]:
        """Return what is asked of clients in a round; round 0 is before training. Nothing by default."""
        return ()

    def config(self) -> dict[str, bool | int | float | str]:
        """Return what round 0 tells clients in their config, under these names after ``autoflip-``."""
        return {}

    def look(self, layout: Layout, found: dict[str, Arrays]) -> Mapping[str, Mapping[str, NDArray[Any]]]:
        """Turn what one client reports (statistic -> arrays by name) into what is averaged; by default the same."""
        return found

    def spared(self, layout: Layout, seen: Statistics | None) -> Collection[str]:
        """Return the names of prunable arrays that keep all of their entries, and do not count in the sparsity."""
        return ()

    def inspect(self, layout: Layout, initial: Arrays, seen: Statistics | None) -> Iterable[str]:
        """Return what the user is warned of before the first mask is chosen.

        Raises
        ------
        RuntimeError
            If no mask can be made of what clients reported.
        """
        return ()

    def first(self, sparsity: float, layout: Layout, initial: Arrays, seen: Statistics | None) -> Mask:
        """Choose the mask of round 1.

        Parameters
        ----------
        sparsity : float
            Share of the prunable entries to prune, in (0, 1).
        layout : Layout
            The arrays to choose from: the model's, less second names of tied weights and what is :meth:`spared`.
        initial : dict[str, ndarray]
            W0, full arrays by name.
        seen : Statistics | None
            What clients reported in round 0; ``None`` if nothing was asked.

        Raises
        ------
        ValueError
            If the settings and the model do not allow one.
        RuntimeError
            If what clients reported does not.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method first(sparsity, layout, initial, seen)")

    def refine(self, round_: int, mask: Mask, model: Arrays, seen: Statistics | None) -> Mask | None:
        """Return the mask for a round > 1, or ``None`` to keep the one in force.

        ``model`` is that of the round before (full arrays by name, read-only), ``seen`` what clients reported in it.
        """
        return None

    def begin(self, initial: Arrays, seen: Statistics | None) -> Arrays:
        """Return the model from which training begins; by default W0."""
        return initial

    def exploring(self) -> object:
        """Return what decides the statistics of round 0: as long as it is equal, they are used again."""
        return type(self), vars(self)

    def state(self) -> object:
        """Return what a checkpoint keeps of the method: numbers, text, arrays, and lists and dicts of those."""
        return None

    def load(self, state: object) -> None:
        """Go on from what :meth:`state` returned."""


def check_method(method: Method) -> None:
    """Check what the server reads of a method.

    Raises
    ------
    TypeError
        If an attribute is of another type.
    ValueError
        If one is out of range, or a request of round 0 is not one.
    """
    name = type(method).__name__
    whole = dict.fromkeys(("min_explorers", "batches"), (numbers.Integral, "a whole number"))
    for field, (kind, told) in {"explorers": (numbers.Real, "a number"), **whole}.items():
        if not isinstance(getattr(method, field), kind):
            raise TypeError(f"{name}: {field} = {getattr(method, field)!r}: must be {told}")
    if not 0 < method.explorers <= 1:
        raise ValueError(f"{name}: explorers = {method.explorers}: must be a share in (0, 1]")
    for field in ("min_explorers", "batches"):
        if getattr(method, field) < 1:
            raise ValueError(f"{name}: {field} = {getattr(method, field)}: must be at least 1")
    if method.weighting not in WEIGHTINGS:
        raise ValueError(f"{name}: weighting = {method.weighting!r}: must be one of {', '.join(WEIGHTINGS)}")
    timeout: Any = method.timeout
    if timeout is not None and not isinstance(timeout, numbers.Real):
        raise TypeError(f"{name}: timeout = {timeout!r}: must be a number of seconds, or None")
    if timeout is not None and not 0 < float(timeout) < math.inf:
        raise ValueError(f"{name}: timeout = {timeout}: must be a number of seconds > 0")
    check_requests(method, 0)


def check_requests(method: Method, round_: int) -> tuple[Request, ...]:
    """Return what a method asks in a round, checked.

    Raises
    ------
    TypeError
        If it is no tuple of requests.
    ValueError
        If one is out of range, or two have the same name.
    """
    asked = method.request(round_)
    name = f"{type(method).__name__}.request({round_})"
    if not isinstance(asked, tuple) or not all(isinstance(each, Request) for each in asked):
        raise TypeError(f"{name} = {asked!r}: must be a tuple of Request")
    for each in asked:
        if not each.name or not set(each.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-"):
            raise ValueError(f"{name}: the name {each.name!r} must be of lower-case letters, digits and '-'")
        if each.over not in OVER or each.code not in DELTAS:
            raise ValueError(f"{name}: {each}: over must be one of {', '.join(OVER)}, code of {', '.join(DELTAS)}")
        if each.name == DELTA and each.over != ("all" if round_ == 0 else "kept"):
            raise ValueError(f"{name}: deltas are there of all entries in round 0, and of kept ones in the others")
    if len({each.name for each in asked}) < len(asked):
        raise ValueError(f"{name}: the names of its requests must differ")
    return asked
