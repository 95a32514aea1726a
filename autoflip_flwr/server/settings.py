"""Arguments of AutoFlip that are objects, and the checks of all arguments."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flwr.serverapp.strategy import Strategy

from autoflip_flwr.core.choices import AUTO_SPARSITY, DELTAS, OUTSIDE, VALUES
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.method import Method, check_method
from autoflip_flwr.core.statistics import Exploration, Statistics
from autoflip_flwr.costs.ledger import Ledger
from autoflip_flwr.replies.quarantine import ReplyRules
from autoflip_flwr.server.schedule import arguments_of
from autoflip_flwr.wrapped import traits
from autoflip_flwr.wrapped.loop import Twin


@dataclass(frozen=True)
class Values:
    """How values travel in each direction.

    Parameters
    ----------
    up, down : str
        Of replies, and of messages: ``"float32"`` (as the model has them), ``"bfloat16"`` or ``"float16"`` (half the
        bytes), or ``"int8"`` (a quarter).
    deltas : str
        Of what explorers report: ``"log8"``, a byte per parameter or less, or ``"float32"``.

    Raises
    ------
    ValueError
        If one is another text.
    """

    up: str = "float32"
    down: str = "float32"
    deltas: str = "log8"

    def __post_init__(self) -> None:
        for name, allowed in (("up", VALUES), ("down", VALUES), ("deltas", DELTAS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"values: {name} = {getattr(self, name)!r}: must be one of {', '.join(allowed)}")

    @classmethod
    def of(cls, values: object) -> Values:
        """Convert what the constructor takes: a ``Values``, or one text for both directions."""
        if isinstance(values, Values):
            return values
        if not isinstance(values, str) or values not in VALUES:
            raise ValueError(f"values = {values!r}: must be one of {', '.join(VALUES)}, or Values(up=..., down=...)")
        return cls(values, values)


@dataclass(frozen=True)
class Nodes:
    """For which nodes a run waits before its first message.

    Parameters
    ----------
    expected : int | None
        How many are expected, >= 1; ``None``: as many as the nodes' own ``num-partitions`` says, else until no new one
        has come for some seconds. Never fewer than the wrapped strategy needs.
    timeout : float | None
        Seconds without a new node, > 0, after which a run goes on without those that are still expected; ``None``: the
        rounds' own, which holds for those that the wrapped strategy needs in any case.

    Raises
    ------
    TypeError
        If one is no number.
    ValueError
        If one is out of range.
    """

    expected: int | None = None
    timeout: float | None = 60.0

    def __post_init__(self) -> None:
        if not isinstance(self.expected, numbers.Integral | None):
            raise TypeError(f"nodes: expected = {self.expected!r}: must be a whole number, or None")
        if self.expected is not None and self.expected < 1:
            raise ValueError(f"nodes: expected = {self.expected}: must be at least 1, or None")
        if not isinstance(self.timeout, numbers.Real | None):
            raise TypeError(f"nodes: timeout = {self.timeout!r}: must be a number of seconds, or None")
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"nodes: timeout = {self.timeout}: must be a number of seconds > 0")

    @classmethod
    def of(cls, nodes: object) -> Nodes:
        """Convert what the constructor takes: a ``Nodes``, a number of nodes, or ``None``."""
        if isinstance(nodes, Nodes):
            return nodes
        if isinstance(nodes, bool) or not isinstance(nodes, numbers.Integral | None):
            raise TypeError(f"nodes = {nodes!r}: must be a whole number, Nodes(expected=..., timeout=...), or None")
        return cls(None if nodes is None else int(nodes))


_TYPES: dict[str, tuple[type | tuple[type, ...], str]] = {
    "method": (Method, "a Method, such as LossExploration(...)"),
    "ledger": (Ledger, "a Ledger"),
    "rules": (ReplyRules, "a ReplyRules"),
    "mask": (Mask, "a Mask, as Mask.from_bool(layout, keep) makes it"),
    "exploration": ((Exploration, Statistics), "an Exploration, which an AutoFlip has as its attribute after a run"),
}

_NEVER_NONE = ("strategy", "method", "ledger", "rules")


def check(settings: Mapping[str, Any], *, outermost: type[object]) -> None:
    """Check the arguments of :class:`~autoflip_flwr.server.strategy.Pruned`, alone and together.

    ``outermost`` is the class of the strategies that no other may wrap.

    Raises
    ------
    TypeError
        If one has the wrong type, or ``mask_schedule`` needs other arguments than it is given.
    ValueError
        If one is out of range, or two contradict each other.
    """
    _check_strategy(settings["strategy"], outermost)
    for name, (kind, what) in _TYPES.items():
        value = settings[name]
        if not isinstance(value, kind) and (value is not None or name in _NEVER_NONE):
            raise TypeError(f"{name} = {_short(value)}: must be {what}{'' if name in _NEVER_NONE else ', or None'}")
    sparsity = settings["sparsity"]
    for name, number, what in (
        ("sparsity", numbers.Real, f"a number, or {AUTO_SPARSITY!r}"),
        ("seed", numbers.Integral, "a whole number"),
    ):
        if settings[name] == AUTO_SPARSITY and name == "sparsity":
            continue
        if not isinstance(settings[name], number) and (settings[name] is not None or name != "seed"):
            raise TypeError(f"{name} = {_short(settings[name])}: must be {what}")
    if sparsity != AUTO_SPARSITY and not 0 <= sparsity < 1:
        raise ValueError(f"sparsity = {sparsity}: must be a number in [0, 1), or {AUTO_SPARSITY!r}")
    check_method(settings["method"])
    power: Any = settings["lr_power"]
    if isinstance(power, bool) or not isinstance(power, int | float):
        raise TypeError(f"lr_power = {_short(power)}: must be a number")
    if not 0 <= power <= 1:
        raise ValueError(f"lr_power = {power}: must be a number in [0, 1]; 0 leaves the clients' learning rate alone")
    if settings["outside"] not in OUTSIDE:
        raise ValueError(f"outside = {settings['outside']!r}: must be one of {', '.join(OUTSIDE)}")
    kept = settings["checkpoints"]
    if kept is not None and not hasattr(kept, "read_exploration"):  # its class needs safetensors
        raise TypeError(f"checkpoints = {_short(kept)}: must be Checkpoints(folder), or None")
    if settings["mask_schedule"] is not None:
        arguments_of(settings["mask_schedule"])
    values = Values.of(settings["values"])
    Nodes.of(settings["nodes"])
    traits.resolve(settings["coordinates"], settings["strategy"])
    if values.up != "float32" and traits.clips_at_clients(settings["strategy"]):
        raise ValueError(
            f"values: up = {values.up!r}: rounding may lengthen an update beyond the norm to which the clients have "
            "clipped it, and the privacy is then not what was promised: Values(up='float32')"
        )


def _check_strategy(strategy: object, outermost: type[object]) -> None:
    if isinstance(strategy, type):
        raise TypeError(f"AutoFlip wraps a strategy, not a class: AutoFlip({strategy.__name__}(...))")
    if isinstance(strategy, str | int | float):
        raise TypeError(f"AutoFlip wraps a strategy, not {strategy!r}: AutoFlip(FedAvg(...), sparsity=0.7)")
    if not isinstance(strategy, Strategy):
        raise TypeError(
            f"AutoFlip wraps strategies of flwr.serverapp.strategy, not {type(strategy).__module__}."
            f"{type(strategy).__name__}"
        )
    if any(isinstance(layer, outermost) for layer in traits.layers(strategy)):
        raise ValueError("AutoFlip inside another strategy: it must be outermost, and once: AutoFlip(DP(strategy))")
    if any(isinstance(layer, Twin) for layer in traits.layers(strategy)):
        raise ValueError("follow(strategy) inside AutoFlip: it must be around it: follow(AutoFlip(strategy), hook)")


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:80]}..."
