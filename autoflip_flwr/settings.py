"""The settings of AutoFlip: each stays readable under its name, and is checked whenever it is set."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from itertools import takewhile
from typing import Any, ClassVar, TypeVar

from flwr.serverapp.strategy import FedAvg, Strategy

from autoflip_flwr import coordinates as coords
from autoflip_flwr.exploration import ExplorationPlan
from autoflip_flwr.guidance import Exploration
from autoflip_flwr.layout import Layout
from autoflip_flwr.ledger import Ledger
from autoflip_flwr.mask import Mask
from autoflip_flwr.plan import MaskPlan
from autoflip_flwr.quarantine import ReplyRules
from autoflip_flwr.values import KINDS

INITIALS = ("scratch", "scouts")

_MADE: dict[str, Callable[[], object]] = {"strategy": FedAvg, "ledger": Ledger, "rules": ReplyRules}
"""What None stands for."""

_TYPES: dict[str, tuple[type, str]] = {
    "ledger": (Ledger, "a Ledger"),
    "rules": (ReplyRules, "a ReplyRules of autoflip_flwr.quarantine"),
    "mask": (Mask, "a Mask, as Mask.from_bool(layout, keep) makes it, or None"),
    "exploration": (Exploration, "an Exploration, which an AutoFlip has as its attribute after a run, or None"),
}

_MANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

_Plan = TypeVar("_Plan", MaskPlan, ExplorationPlan)


class Configured(Strategy):
    """A strategy around another one, whose constructor's arguments are settings: read and set under their names.

    Any other name is the wrapped strategy's where it has it, for reading and for setting.
    """

    strategy: Strategy
    ledger: Ledger
    rules: ReplyRules
    _defaults: ClassVar[dict[str, object]]
    _ready = False  # its constructor is through
    _running = False  # its start is not

    def __init_subclass__(cls) -> None:
        if Configured in cls.__bases__:  # a class made of that one may have a constructor of its own
            cls._defaults = {each.name: each.default for each in inspect.signature(cls).parameters.values()}

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
    """Check the arguments of :class:`~autoflip_flwr.strategy.AutoFlip`, alone and together.

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
    kept = settings["checkpoints"]
    if kept is not None and not hasattr(kept, "read_exploration"):  # its class needs safetensors
        raise TypeError(
            f"checkpoints = {_short(kept)}: must be Checkpoints(folder) of autoflip_flwr.checkpoint, or None"
        )
    if settings["initial"] not in INITIALS:
        raise ValueError(f"initial = {settings['initial']!r}: must be one of {', '.join(INITIALS)}")
    plan(MaskPlan, settings)
    plan(ExplorationPlan, settings)
    if settings["nodes"] is not None and not settings["nodes"] >= 1:
        raise ValueError(f"nodes = {settings['nodes']}: must be at least 1, or None")
    for name in ("node_timeout", "exploration_timeout"):
        if settings[name] is not None and not settings[name] > 0:
            raise ValueError(f"{name} = {settings[name]}: must be a number of seconds > 0")
    if settings["mask_schedule"] is not None:
        schedule_takes(settings["mask_schedule"])
    for name in ("values", "values_up", "values_down"):
        if settings[name] not in (*KINDS, *([] if name == "values" else [None])):
            raise ValueError(f"{name} = {settings[name]!r}: must be one of {', '.join(KINDS)}")
    coords.resolve(settings["coordinates"], settings["strategy"])
    if values_up(settings) != "float32" and coords.clips_at_clients(settings["strategy"]):
        raise ValueError(
            f"values_up = {values_up(settings)!r}: rounding may lengthen an update beyond the norm to which the "
            "clients have clipped it, and the privacy is then not what was promised: values_up='float32'"
        )


def schedule_takes(schedule: Callable[..., Mask | None]) -> int:
    """How many of the round, the mask in force and the model a mask schedule takes by position.

    A parameter with a default other than None keeps that: it may hold something for the function's own use.

    Raises
    ------
    TypeError
        If it is no function, or takes none of them, or needs more.
    """
    if not callable(schedule):
        raise TypeError(f"mask_schedule = {_short(schedule)}: must be a function of (round, mask, model), or None")
    try:
        parameters = list(inspect.signature(schedule).parameters.values())
    except ValueError:  # some that are written in C do not say
        return 1
    positional = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    given = len(list(takewhile(lambda each: each.default in (each.empty, None), positional)))
    if any(each.kind is each.VAR_POSITIONAL for each in parameters) and given == len(positional):
        given = 3
    needed = [each.name for each in parameters if each.default is each.empty and each.kind not in _MANY]
    if not given or len(needed) > len([each for each in positional[:3] if each.name in needed]):
        raise TypeError(
            f"mask_schedule takes {', '.join(needed) or 'nothing'}; it is called with the round, or the round and the "
            "mask in force, or those and the model (full arrays by name): let it take one, two or three of them"
        )
    return min(given, 3)


def check_mask(mask: object, layout: Layout, origin: str) -> Mask:
    """Check a mask that is to be in force from the next round on; ``origin`` says what it comes from.

    Raises
    ------
    TypeError
        If it is no mask.
    ValueError
        If its arrays are not those of the layout.
    """
    if not isinstance(mask, Mask):
        raise TypeError(
            f"{origin}: must be a Mask, not {type(mask).__name__}: make one with Mask.from_bool(mask.layout, keep)"
        )
    if mask.layout.specs != layout.specs:
        raise ValueError(f"{origin}: the mask's arrays are not those of the model")
    return mask


def _check_strategy(strategy: object) -> None:
    if not isinstance(strategy, Strategy):
        raise TypeError(
            f"AutoFlip wraps strategies of flwr.serverapp.strategy, not {type(strategy).__module__}."
            f"{type(strategy).__name__}"
        )
    if any(isinstance(layer, Configured) for layer in coords.layers(strategy)):
        raise ValueError("AutoFlip inside another strategy: it must be outermost, and once: AutoFlip(DP(strategy))")


def _short(value: object) -> str:
    told = repr(value)
    return told if len(told) <= 80 else f"{told[:80]}..."
