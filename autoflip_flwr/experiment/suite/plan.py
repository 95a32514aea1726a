"""Plan the runs of a suite: what identifies a run, which runs share an exploration, and how they are told apart."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autoflip_flwr.core import choices
from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.idle import with_effect
from autoflip_flwr.experiment.report.command import repeating
from autoflip_flwr.experiment.rules import Value, shown

_AFTER_EXPLORING = (
    "sparsity",
    "scope",
    "gamma",
    "initial",
    "rank-by",
    "schedule",
    "initial-density",
    "fall",
    "fall-every",
    "fall-power",
    "auto-sparsity",
    "drop-by",
    "drop-scope",
    "cut-feedback",
    "warmup",
    "extrusion",
    "adjust-every",
    "adjust-share",
    "adjust-after",
    "adjust-until",
    "fraction-train",
    "fraction-evaluate",
    "num-server-rounds",
    "local-epochs",
    "lr-decay",
    "lr-power",
    "server-momentum",
    "server-learning-rate",
    "values-up",
    "min-replies",
    "evaluate-every",
    "test-examples",
)
"""Settings that have no effect before the exploration is over."""


@dataclass(frozen=True)
class Planned:
    """One run of a suite.

    Attributes
    ----------
    config : Config
        Its settings.
    key : str
        16 hex digits: the digest of all settings that decide its result.
    exploration : str
        Equal for runs that can share one exploration; "" for a run that cannot.
    varies : dict[str, Value]
        Those of its settings that tell it from the suite's other runs.
    name : str
        Its name in tables, made of these.
    """

    config: Config
    key: str
    exploration: str
    varies: Mapping[str, Value]
    name: str

    @property
    def folder(self) -> str:
        """Name of its folder: readable, and different for each key."""
        safe = re.sub(r"[^A-Za-z0-9._=-]+", "-", self.name).strip("-.")
        return f"{safe[:80]}-{self.key[:8]}"

    @property
    def command(self) -> str:
        """The command that makes the same run alone."""
        return repeating(self.config.as_dict())


def plan(configs: Iterable[Config]) -> list[Planned]:
    """Return the runs of a suite, without those that compute the same, in order."""
    first: dict[str, Config] = {}
    for config in configs:
        first.setdefault(key_of_run(config), config)
    active = {key: with_effect(config) for key, config in first.items()}
    axes = _telling(_axes(list(active.values())), list(active.values()))
    return [
        Planned(
            config,
            key,
            exploration_key(config),
            {axis: active[key][axis] for axis in axes if axis in active[key]},
            " ".join(_told(axis, active[key][axis]) for axis in axes if axis in active[key]) or config.method,
        )
        for key, config in first.items()
    ]


def key_of_run(config: Config) -> str:
    """Return the digest of all settings that decide a run's result.

    Those that have no effect do not count, nor do those that are 0, false or empty: that switches something off. So a
    run keeps its key when the app gets settings that do not concern it.
    """
    return _digest(with_effect(config))


def exploration_key(config: Config) -> str:
    """Return a digest that is equal for runs that may share one exploration; "" for a run that may not.

    An exploration is shared only if sharing changes neither the model nor the bytes: with ``outside="initial"``
    explorers keep W0, which other clients must be sent. A schedule by participants needs what each explorer reported,
    which a shared exploration does not hold.
    """
    if config.schedule in choices.SAMPLED_SCHEDULES:
        return ""
    if config.method != "autoflip" or not config.sparsity or config.outside != "zero":
        return ""
    return _digest({key: value for key, value in with_effect(config).items() if key not in _AFTER_EXPLORING})


def _axes(settings: Sequence[Mapping[str, Value]]) -> list[str]:
    """Return the settings that differ between runs: first those that a reader looks for first, the seed last."""
    keys = dict.fromkeys(key for each in settings for key in each)
    differ = [key for key in keys if len({each[key] for each in settings if key in each}) > 1]
    order = {key: place for place, key in enumerate(("dataset", "split", "model", "method", "sparsity"))}
    return sorted(differ, key=lambda key: (key == "seed", order.get(key, len(order))))


def _telling(axes: Sequence[str], settings: Sequence[Mapping[str, Value]]) -> list[str]:
    """Return the axes that are not settled by those before them, as a data set may settle the number of nodes."""
    chosen: list[str] = []
    for axis in axes:
        before = {tuple(each.get(key) for key in chosen) for each in settings}
        after = {tuple(each.get(key) for key in (*chosen, axis)) for each in settings}
        if len(after) > len(before):
            chosen.append(axis)
    return chosen


def _told(key: str, value: Value) -> str:
    if key in ("dataset", "split", "model", "method"):
        return str(value)
    if key == "sparsity" and isinstance(value, float):
        return f"density={round(1 - value, 12):g}"
    return f"{key}={value if isinstance(value, str) else shown(value)}"


def _digest(settings: Mapping[str, Any]) -> str:
    on = {key: value for key, value in settings.items() if value}
    return hashlib.sha256(json.dumps(on, sort_keys=True).encode()).hexdigest()[:16]
