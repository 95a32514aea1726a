"""Interface of a pruning method: what it requests from clients, and the masks that it makes from their replies.

AutoFLIP is one method (:class:`~autoflip_flwr.core.methods.LossExploration`); the baselines are others. A method only
computes. The server decides which clients to ask, and sends the messages.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Iterable, Mapping
from typing import Any, ClassVar

from numpy.typing import NDArray

from autoflip_flwr.core.choices import CODES, GROW_FROM, OVER, PLACES, WEIGHTINGS
from autoflip_flwr.core.explorers import asked_among
from autoflip_flwr.core.layout import Arrays, Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.request import DECIMALS, DELTA, Request
from autoflip_flwr.core.statistics import Statistics


class Method:
    """Base class of all pruning methods.

    A method of your own overrides :meth:`first`, and other methods as needed. A method that requests something before
    training (round 0) may set the attributes below; the class attributes are the defaults.

    Attributes
    ----------
    explorers : float or None
        Share of the connected nodes that are asked in round 0, in (0, 1]. ``None``: a quarter of them, but at least 5.
    min_explorers : int
        Minimum number of replies needed to make the mask.
    batches : int
        Number of batches in which the nodes are asked. Each batch has different nodes, and all start from W0.
    weighting : str
        ``"uniform"`` (the authors' code), or ``"examples"``: by number of examples (our reading).
    timeout : float or None
        Timeout in seconds per batch, > 0; ``None``: the timeout of the rounds.
    public : bool
        Whether clients' reports may become known. Under a differential-privacy wrapper, clients are asked only if True.
    initial : str
        ``"scratch"`` if training begins at W0; anything else if :meth:`begin` returns another model.
    squares : Collection[str]
        Names of the statistics whose squares are averaged too.
    dense : bool
        Whether the method prunes nothing, and asks clients before training although the sparsity is 0.
    grow_from : str
        Value at which an entry that is grown starts: ``"last"`` (its last one), or ``"outside"`` (the value of pruned
        entries, as in RigL). A method whose masks only shrink says ``"outside"``: then no last values are kept.
    """

    explorers: float | None = 1.0
    min_explorers: int = 2
    batches: int = 1
    weighting: str = "uniform"
    timeout: float | None = None
    public: bool = False
    initial: str = "scratch"
    squares: ClassVar[Collection[str]] = ()
    dense: bool = False
    grow_from: str = "last"

    def asked(self, nodes: int) -> int:
        """Return how many of so many connected nodes are asked in round 0."""
        return asked_among(nodes, self.explorers, self.min_explorers)

    def plan(self, sparsity: float, rounds: int) -> None:
        """Learn the sparsity and the number of rounds of the run that begins; default: nothing.

        A method whose masks depend on them returns them from :meth:`state`, so that a run that goes on keeps its plan.

        Raises
        ------
        ValueError
            If the method cannot work with them.
        """

    def seek(self) -> None:
        """Find the sparsity of the run that was planned: the planned one is then the most that may be reached.

        Raises
        ------
        ValueError
            If the method cannot; that is the default.
        """
        raise ValueError(
            f"sparsity = 'auto': {type(self).__name__} has no schedule in which the density falls: give a number, or "
            "schedule=Gradual()"
        )

    def watch(self, round_: int, losses: Mapping[int, float]) -> None:
        """Learn the training losses that clients have reported in a round; default: nothing.

        ``losses`` has them by the client's partition id, or by its node id where it has told none.
        """

    def request(self, round_: int) -> tuple[Request, ...]:
        """Return the statistics to request from clients in a round (round 0: before training); default: none."""
        return ()

    def config(self) -> dict[str, bool | int | float | str]:
        """Return config entries for the clients in round 0; each name gets the prefix ``autoflip-``."""
        return {}

    def look(self, layout: Layout, found: dict[str, Arrays]) -> Mapping[str, Mapping[str, NDArray[Any]]]:
        """Convert one client's statistics (statistic -> arrays by name) to those that are averaged; default: as is."""
        return found

    def spared(self, layout: Layout, seen: Statistics | None) -> Collection[str]:
        """Return the names of prunable arrays that keep all entries and do not count in the sparsity."""
        return ()

    def inspect(self, layout: Layout, initial: Arrays, seen: Statistics | None) -> Iterable[str]:
        """Return warnings for the user before the first mask is chosen.

        Raises
        ------
        RuntimeError
            If no mask can be made from what clients reported.
        """
        return ()

    def first(self, sparsity: float, layout: Layout, initial: Arrays, seen: Statistics | None) -> Mask:
        """Choose the mask of round 1.

        Parameters
        ----------
        sparsity : float
            Share of the prunable entries to prune, in (0, 1).
        layout : Layout
            The model's layout without duplicate names of tied weights; :meth:`spared` arrays are not prunable in it.
        initial : dict[str, ndarray]
            W0, full arrays by name.
        seen : Statistics | None
            What clients reported in round 0; ``None`` if nothing was requested.

        Raises
        ------
        ValueError
            If the settings and the model do not allow a mask.
        RuntimeError
            If what clients reported does not allow a mask.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method first(sparsity, layout, initial, seen)")

    def asks_who(self, round_: int) -> bool:
        """Return whether the mask of a round >= 1 depends on which nodes the round samples; default: no.

        If so for any round, the server keeps what each explorer reported in round 0.
        """
        return False

    def sampled(self, layout: Layout, initial: Arrays, explored: Statistics) -> None:
        """Learn what the explorers among the nodes of the round to come reported in round 0; default: nothing.

        It is called before :meth:`refine` in the rounds for which :meth:`asks_who` says so. ``layout`` and ``initial``
        are as in :meth:`first`. ``explored`` is the average over these explorers, or over all explorers where the round
        samples none of them.
        """

    def refine(self, round_: int, mask: Mask, model: Arrays, seen: Statistics | None) -> Mask | None:
        """Return the mask for a round > 1, or ``None`` to keep the current one.

        It is called for round 1 too if :meth:`asks_who` says so.

        ``model`` is the model after the previous round (full arrays by name, read-only). ``seen`` is what clients
        reported in the last round that asked them; ``None`` if nobody reported. The mask's layout is as in
        :meth:`first`; the mask that is returned has the same.
        """
        return None

    def begin(self, initial: Arrays, seen: Statistics | None) -> Arrays:
        """Return the model from which training begins; default: W0."""
        return initial

    def exploring(self) -> object:
        """Return the settings on which round 0's statistics depend; if they are equal, statistics can be reused."""
        return type(self), vars(self)

    def state(self) -> object:
        """Return the method's state for a checkpoint: numbers, text, arrays, and lists and dicts of those."""
        return None

    def load(self, state: object) -> None:
        """Restore what :meth:`state` returned."""


def check_method(method: Method) -> None:
    """Check the attributes of a method that the server reads, and its requests of round 0.

    Raises
    ------
    TypeError
        If an attribute has the wrong type.
    ValueError
        If an attribute is out of range, or a request of round 0 is invalid.
    """
    name = type(method).__name__
    whole = dict.fromkeys(("min_explorers", "batches"), (numbers.Integral, "a whole number"))
    for field, (kind, told) in {"explorers": (numbers.Real | None, "a number, or None"), **whole}.items():
        if not isinstance(getattr(method, field), kind):
            raise TypeError(f"{name}: {field} = {getattr(method, field)!r}: must be {told}")
    if method.explorers is not None and not 0 < method.explorers <= 1:
        raise ValueError(f"{name}: explorers = {method.explorers}: must be a share in (0, 1]")
    for field in ("min_explorers", "batches"):
        if getattr(method, field) < 1:
            raise ValueError(f"{name}: {field} = {getattr(method, field)}: must be at least 1")
    if method.grow_from not in GROW_FROM:
        raise ValueError(f"{name}: grow_from = {method.grow_from!r}: must be one of {', '.join(GROW_FROM)}")
    if method.weighting not in WEIGHTINGS:
        raise ValueError(f"{name}: weighting = {method.weighting!r}: must be one of {', '.join(WEIGHTINGS)}")
    timeout: Any = method.timeout
    if timeout is not None and not isinstance(timeout, numbers.Real):
        raise TypeError(f"{name}: timeout = {timeout!r}: must be a number of seconds, or None")
    if timeout is not None and not 0 < float(timeout) < math.inf:
        raise ValueError(f"{name}: timeout = {timeout}: must be a number of seconds > 0")
    check_requests(method, 0)


def check_requests(method: Method, round_: int) -> tuple[Request, ...]:
    """Return a method's requests for a round after checking them.

    Raises
    ------
    TypeError
        If the method does not return a tuple of requests.
    ValueError
        If a request is invalid, or two have the same name.
    """
    asked = method.request(round_)
    name = f"{type(method).__name__}.request({round_})"
    if not isinstance(asked, tuple) or not all(isinstance(each, Request) for each in asked):
        raise TypeError(f"{name} = {asked!r}: must be a tuple of Request")
    for each in asked:
        if not each.name or not set(each.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-"):
            raise ValueError(f"{name}: the name {each.name!r} must be of lower-case letters, digits and '-'")
        if each.over not in OVER or each.code not in CODES:
            raise ValueError(f"{name}: {each}: over must be one of {', '.join(OVER)}, code of {', '.join(CODES)}")
        if not isinstance(each.top, int | float) or not 0 < each.top <= 1 or round(each.top, DECIMALS) != each.top:
            raise ValueError(f"{name}: top = {each.top!r}: must be a share in (0, 1], of at most {DECIMALS} decimals")
        if each.top == 1 and each.code == PLACES:
            raise ValueError(f"{name}: {each}: the places of all entries say nothing: give top")
        if each.name == DELTA and (each.top < 1 or each.over != ("all" if round_ == 0 else "kept")):
            raise ValueError(f"{name}: deltas are there of all entries in round 0, and of kept ones in the others")
    if len({each.name for each in asked}) < len(asked):
        raise ValueError(f"{name}: the names of its requests must differ")
    return asked
