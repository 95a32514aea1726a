"""The settings of AutoFlip: each stays readable under its name, and is checked whenever it is set."""

from __future__ import annotations

import dataclasses
import inspect
import numbers
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from flwr.serverapp.strategy import FedAvg, Strategy

from autoflip_flwr.core.digest import digest_of
from autoflip_flwr.core.layout import Arrays, Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.statistics import Exploration
from autoflip_flwr.costs.ledger import Ledger
from autoflip_flwr.replies.quarantine import ReplyRules
from autoflip_flwr.server.plans import ExplorationPlan, MaskPlan
from autoflip_flwr.server.schedule import arguments_of
from autoflip_flwr.wire.values import KINDS
from autoflip_flwr.wrapped import traits
from autoflip_flwr.wrapped.privacy import budget_of
from autoflip_flwr.wrapped.snapshot import settings_of, strategy_state

INITIALS = ("scratch", "scouts")
OUTSIDE = ("zero", "initial")

_MADE: dict[str, Callable[[], object]] = {"strategy": FedAvg, "ledger": Ledger, "rules": ReplyRules}
"""What None stands for."""

_TYPES: dict[str, tuple[type, str]] = {
    "ledger": (Ledger, "a Ledger"),
    "rules": (ReplyRules, "a ReplyRules of autoflip_flwr.replies.quarantine"),
    "mask": (Mask, "a Mask, as Mask.from_bool(layout, keep) makes it, or None"),
    "exploration": (Exploration, "an Exploration, which an AutoFlip has as its attribute after a run, or None"),
}

_NUMBERS = {"sparsity", "gamma", "explorers", "node_timeout", "exploration_timeout"}
_WHOLE = {"min_explorers", "exploration_rounds", "exploration_epochs", "exploration_patience", "nodes", "seed"}

_OPTIONAL = {"exploration_timeout", "nodes", "seed"}

_Plan = TypeVar("_Plan", MaskPlan, ExplorationPlan)


class Configured(Strategy):
    """A strategy around another one, whose constructor's arguments are settings: read and set under their names.

    Any other name is the wrapped strategy's where it has it, for reading and for setting.
    """

    strategy: Strategy
    ledger: Ledger
    rules: ReplyRules
    mask: Mask | None
    exploration: Exploration | None
    _brought: dict[str, Any]
    """A mask and an exploration of the user's own, by these names."""
    _defaults: ClassVar[dict[str, object]]
    _ready = False  # its constructor is through
    _running = False  # its start is not

    def __init_subclass__(cls) -> None:
        parameters = inspect.signature(cls).parameters
        if "strategy" in parameters and not hasattr(cls, "_defaults"):  # a user's subclass may have another constructor
            cls._defaults = {each.name: each.default for each in parameters.values()}

    def __getattr__(self, name: str) -> Any:
        # a project that calls methods of its own strategy goes on doing so
        if name == "strategy" or name.startswith("__"):  # not there yet, or a protocol, as in a copy that is being made
            raise AttributeError(name)
        return getattr(self.strategy, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._defaults:
            if value is None and name in _MADE:
                value = _MADE[name]()
            if self._running:
                self._check_running(name, value)
            if self._ready:
                check({**self._arguments(), name: value})
            if name in ("mask", "exploration") and not self._running:
                vars(self)["_brought"] = {**vars(self).get("_brought", {}), name: value}
            if name == "strategy" and self._ready:
                vars(self)["privacy"] = budget_of(value)
            vars(self)[name] = value
        elif self._ready and name not in vars(self) and hasattr(self.strategy, name):
            setattr(self.strategy, name, value)  # as reading
        else:
            super().__setattr__(name, value)

    def __repr__(self) -> str:
        told = [
            f"{name}={value!r}"
            for name, value in self._arguments().items()
            if isinstance(value, int | float | str | list | tuple) and value != self._defaults[name]
        ]
        return f"{type(self).__name__}({', '.join([f'{type(self.strategy).__name__}()', *told])})"

    @property
    def mask_plan(self) -> MaskPlan:
        """Which entries are pruned, and how they are chosen."""
        return plan(MaskPlan, vars(self))

    @property
    def exploration_plan(self) -> ExplorationPlan:
        """Who explores, and how."""
        return plan(ExplorationPlan, vars(self))

    @property
    def _up(self) -> str:
        return values_up(vars(self))

    @property
    def _down(self) -> str:
        return values_down(vars(self))

    def _arguments(self) -> dict[str, Any]:
        """The constructor's arguments as they are now."""
        return {name: vars(self)[name] for name in self._defaults}

    def _decisive(self, layout: Layout, initial: Arrays, *, packed: bool) -> dict[str, object]:
        """What must be the same when an interrupted run goes on. Raises ``ValueError`` if it could not."""
        if self.checkpoints is None:
            return {}
        if type(self.strategy).start is not Strategy.start:
            raise ValueError(
                f"checkpoints: {type(self.strategy).__name__} has a start of its own, whose variables cannot be kept"
            )
        strategy_state(self.strategy, {})
        ready = self._brought["mask"]
        return {
            "model": {spec.name: [*spec.shape, spec.dtype] for spec in layout.specs},
            "prunable": [spec.name for spec in layout.prunable],
            "initial": digest_of(initial),
            "mask": {
                **dataclasses.asdict(self.mask_plan),
                "ready": ready and ready.digest,
            },
            "exploration": dataclasses.asdict(self.exploration_plan),
            "outside": self.outside,
            "autoflip": [self.initial, packed, self._up, self._down, self.seed],
            "rules": dataclasses.asdict(self.rules),
            "strategy": settings_of(self.strategy),
        }

    def _check_running(self, name: str, value: object) -> None:
        """Raise an error unless a setting may be set to this while rounds run."""
        raise RuntimeError(
            f"{name} was set while AutoFlip runs, where it would do nothing: set it before start; only the mask may "
            "change between rounds (mask_schedule=, or strategy.mask = ...)"
        )


def plan(kind: type[_Plan], settings: Mapping[str, Any]) -> _Plan:
    """Make a plan of the settings that are called as its fields are, with or without ``exploration_`` in front."""
    names = {field.name: f"exploration_{field.name}" for field in dataclasses.fields(kind)}
    return kind(**{field: settings[name if name in settings else field] for field, name in names.items()})


def values_up(settings: Mapping[str, Any]) -> str:
    """How the values of replies are coded."""
    return str(settings["values"] if settings["values_up"] is None else settings["values_up"])


def values_down(settings: Mapping[str, Any]) -> str:
    """How the values of messages are coded."""
    return str(settings["values"] if settings["values_down"] is None else settings["values_down"])


def check(settings: Mapping[str, Any]) -> None:
    """Check the arguments of :class:`~autoflip_flwr.server.strategy.AutoFlip`, alone and together.

    Raises
    ------
    TypeError
        If one is of another type than it must be, or ``mask_schedule`` takes what it is not given.
    ValueError
        If one is out of range, or two do not go together.
    """
    _check_strategy(settings["strategy"])
    for name, (kind, told) in _TYPES.items():
        if settings[name] is not None and not isinstance(settings[name], kind):
            raise TypeError(f"{name} = {_short(settings[name])}: must be {told}")
    for names, number, told in ((_NUMBERS, numbers.Real, "a number"), (_WHOLE, numbers.Integral, "a whole number")):
        for name in sorted(names & settings.keys()):
            if not isinstance(settings[name], number) and (settings[name] is not None or name not in _OPTIONAL):
                raise TypeError(f"{name} = {_short(settings[name])}: must be {told}")
    kept = settings["checkpoints"]
    if kept is not None and not hasattr(kept, "read_exploration"):  # its class needs safetensors
        raise TypeError(
            f"checkpoints = {_short(kept)}: must be Checkpoints(folder) of autoflip_flwr.storage.checkpoint, or None"
        )
    for name, allowed in (("initial", INITIALS), ("outside", OUTSIDE)):
        if settings[name] not in allowed:
            raise ValueError(f"{name} = {settings[name]!r}: must be one of {', '.join(allowed)}")
    plan(MaskPlan, settings)
    plan(ExplorationPlan, settings)
    if settings["nodes"] is not None and not settings["nodes"] >= 1:
        raise ValueError(f"nodes = {settings['nodes']}: must be at least 1, or None")
    for name in ("node_timeout", "exploration_timeout"):
        if settings[name] is not None and not settings[name] > 0:
            raise ValueError(f"{name} = {settings[name]}: must be a number of seconds > 0")
    if settings["mask_schedule"] is not None:
        arguments_of(settings["mask_schedule"])
    for name in ("values", "values_up", "values_down"):
        if settings[name] not in (*KINDS, *([] if name == "values" else [None])):
            raise ValueError(f"{name} = {settings[name]!r}: must be one of {', '.join(KINDS)}")
    traits.resolve(settings["coordinates"], settings["strategy"])
    if values_up(settings) != "float32" and traits.clips_at_clients(settings["strategy"]):
        raise ValueError(
            f"values_up = {values_up(settings)!r}: rounding may lengthen an update beyond the norm to which the "
            "clients have clipped it, and the privacy is then not what was promised: values_up='float32'"
        )


def _check_strategy(strategy: object) -> None:
    if isinstance(strategy, type):
        raise TypeError(f"AutoFlip wraps a strategy, not a class: AutoFlip({strategy.__name__}(...))")
    if isinstance(strategy, str | int | float):
        raise TypeError(f"AutoFlip wraps a strategy, not {strategy!r}: AutoFlip(FedAvg(...), sparsity=0.7)")
    if not isinstance(strategy, Strategy):
        raise TypeError(
            f"AutoFlip wraps strategies of flwr.serverapp.strategy, not {type(strategy).__module__}."
            f"{type(strategy).__name__}"
        )
    if any(isinstance(layer, Configured) for layer in traits.layers(strategy)):
        raise ValueError("AutoFlip inside another strategy: it must be outermost, and once: AutoFlip(DP(strategy))")


def _short(value: object) -> str:
    told = repr(value)
    return told if len(told) <= 80 else f"{told[:80]}..."
