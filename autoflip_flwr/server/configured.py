"""A strategy whose arguments are settings: each can be read by its name, and is checked whenever it is set."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, ClassVar

from flwr.serverapp.strategy import FedAvg, Strategy

from autoflip_flwr.core.digest import digest_of
from autoflip_flwr.core.layout import Arrays, Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.method import Method
from autoflip_flwr.core.methods import LossExploration
from autoflip_flwr.core.schedule import default_of
from autoflip_flwr.core.statistics import Exploration, Statistics
from autoflip_flwr.costs.ledger import Ledger
from autoflip_flwr.replies.quarantine import ReplyRules
from autoflip_flwr.server.schedule import Schedule
from autoflip_flwr.server.settings import Nodes, Values, check
from autoflip_flwr.wrapped.privacy import budget_of
from autoflip_flwr.wrapped.snapshot import settings_of, strategy_state

_MADE: dict[str, Callable[[], object]] = {
    "strategy": FedAvg,
    "method": LossExploration,
    "ledger": Ledger,
    "rules": ReplyRules,
}
"""Makes the value that None stands for."""


class Configured(Strategy):
    """A strategy that wraps another one. Its constructor's arguments are settings, read and set by their names.

    Other attributes that the wrapped strategy has are read from it and set on it.
    """

    strategy: Strategy
    method: Method
    ledger: Ledger
    rules: ReplyRules
    mask: Mask | None
    exploration: Exploration | Statistics | None
    outside: str
    lr_power: float
    mask_schedule: Schedule | None
    _brought: dict[str, Any]
    """The mask and the exploration that the user has given, by these names."""
    _defaults: ClassVar[dict[str, object]]
    _ready = False  # whether the constructor has finished
    _running = False  # whether a start is running

    def __init_subclass__(cls) -> None:
        parameters = inspect.signature(cls).parameters
        own = "__init__" in vars(cls) and "strategy" in parameters
        if own and cls.__module__.startswith(f"{__package__}."):  # a user's subclass may have another constructor
            cls._defaults = {each.name: each.default for each in parameters.values()}

    def __getattr__(self, name: str) -> Any:
        # code that calls methods of its own strategy keeps working
        if name == "strategy" or name.startswith("__"):  # not set yet, or a protocol name, as while a copy is made
            raise AttributeError(name)
        return getattr(self.strategy, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._defaults:
            if value is None and name in _MADE:
                value = _MADE[name]()
            if self._running:
                self._check_running(name, value)
            if self._ready:
                self._check({**self._arguments(), name: value})
            if name in ("mask", "exploration") and not self._running:
                vars(self)["_brought"] = {**vars(self).get("_brought", {}), name: value}
            if name == "strategy" and self._ready:
                vars(self)["privacy"] = budget_of(value)
            vars(self)[name] = value
        elif self._ready and name not in vars(self) and hasattr(self.strategy, name):
            setattr(self.strategy, name, value)  # as in reading
        else:
            if (
                self._ready
                and not hasattr(type(self), name)
                and (near := get_close_matches(name, self._defaults, 1, 0.85))
            ):
                raise AttributeError(f"{type(self).__name__} has no setting {name!r}: did you mean {near[0]!r}?")
            super().__setattr__(name, value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join([told(self.strategy), *self._told().values()])})"

    def _check(self, settings: Mapping[str, Any]) -> None:
        check(settings, outermost=Configured)

    def _told(self) -> dict[str, str]:
        """Return the settings that differ from their defaults, by name, as they are written in the constructor."""
        found = {}
        for name, value in {**self._arguments(), **self._brought}.items():  # a mask that was chosen is not a setting
            default = self._defaults[name]
            if name == "method" and default is None:
                default = default_method(self.outside, self._brought["mask"], self.mask_schedule)
            elif default is None and name in _MADE:
                default = _MADE[name]()
            plain = isinstance(value, bool | int | float | str | list | tuple)
            same = value == default if plain or dataclasses.is_dataclass(value) else value is default
            if name not in ("strategy", "ledger") and not same:
                found[name] = f"{name}={told(value)}"
        return found

    @property
    def _values(self) -> Values:
        return Values.of(vars(self)["values"])

    @property
    def _nodes(self) -> Nodes:
        return Nodes.of(vars(self)["nodes"])

    def _layout(self, arrays: Arrays) -> Layout:
        """Return the layout of a model, given by its arrays."""
        own = vars(self)
        return Layout.of(arrays, **{name: own[name] for name in ("prunable", "exclude", "biases", "output")})

    def _arguments(self) -> dict[str, Any]:
        """Return the present values of the constructor's arguments."""
        return {name: vars(self)[name] for name in self._defaults}

    def _choosing(self) -> dict[str, Any]:
        """Return what decides the first mask, besides the model and the clients' reports."""
        return {name: vars(self)[name] for name in ("sparsity", "method", "prunable", "exclude", "biases", "output")}

    def _decisive(self, layout: Layout, initial: Arrays, *, packed: bool) -> dict[str, object]:
        """Return what must not change when a run is resumed. Raise ``ValueError`` if it could not be resumed."""
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
            "mask": {**self._choosing(), "method": _method_key(self.method), "ready": ready and ready.digest},
            "outside": self.outside,
            "lr_power": self.lr_power,
            "values": dataclasses.asdict(self._values),
            "autoflip": [packed, self.seed],
            "rules": dataclasses.asdict(self.rules),
            "strategy": settings_of(self.strategy),
        }

    def _check_running(self, name: str, value: object) -> None:
        """Raise an error unless the setting may get this value while rounds run."""
        raise RuntimeError(
            f"{name} was set while AutoFlip runs, where it would do nothing: set it before start; only the mask may "
            "change between rounds (mask_schedule=, or strategy.mask = ...)"
        )


def default_method(outside: str, mask: object, mask_schedule: object) -> LossExploration:
    """Return AutoFLIP's method: dynamic, unless the mask is the user's own, or a schedule of the user's changes it.

    What keeps its initial value is not sparse: there the paper's static mask, by deltas, says which entries move most,
    and the explorers' average would have to be sent to every node.
    """
    if outside == "initial":
        return LossExploration.static()
    return LossExploration() if mask is None and mask_schedule is None else LossExploration(schedule=())


def told(value: object) -> str:
    """Return a setting as it is written in code, or the class of an object without such a form."""
    if isinstance(value, Configured):
        return repr(value)
    if isinstance(value, Strategy):
        inside = [told(each) for each in vars(value).values() if isinstance(each, Strategy)]
        return f"{type(value).__name__}({', '.join(inside)})"
    if dataclasses.is_dataclass(value) and not isinstance(value, Mask | Exploration | Ledger):
        shown = [f for f in dataclasses.fields(value) if f.init and getattr(value, f.name) != default_of(f)]
        return f"{type(value).__name__}({', '.join(f'{f.name}={told(getattr(value, f.name))}' for f in shown)})"
    plain = value is None or isinstance(value, bool | int | float | str | list | tuple | dict)
    return repr(value) if plain else getattr(value, "__qualname__", f"{type(value).__qualname__}(...)")


def _method_key(method: Method) -> dict[str, object]:
    """Return what a method's results depend on, by name."""
    names: list[str] = [f.name for f in dataclasses.fields(method)] if dataclasses.is_dataclass(method) else []
    own = {name: getattr(method, name) for name in names if name not in ("public", "timeout")}
    plain = {name: value if isinstance(value, bool | int | float | str) else repr(value) for name, value in own.items()}
    return {"method": type(method).__name__, **plain}
