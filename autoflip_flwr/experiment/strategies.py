"""Make the strategy that the app's settings describe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from flwr.serverapp.strategy import FedAvg, FedAvgM, FedProx, Strategy

from autoflip_flwr.core.choices import ASKING, AUTO_SPARSITY, DENSE
from autoflip_flwr.core.method import Method
from autoflip_flwr.core.methods import LossExploration, Magnitude, Random, Snip
from autoflip_flwr.core.participants import Participants
from autoflip_flwr.core.prunefl import PruneFl
from autoflip_flwr.core.schedule import Schedule
from autoflip_flwr.core.schedules import Agreement, Gradual, Reconfigure, Regrow, Votes
from autoflip_flwr.core.scored import Scored
from autoflip_flwr.core.statistics import Exploration, Statistics
from autoflip_flwr.core.warmup import Warmup
from autoflip_flwr.costs.ledger import Ledger
from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.fedlex import Guidance, Guided
from autoflip_flwr.experiment.leak import Relay
from autoflip_flwr.experiment.rules import Value
from autoflip_flwr.replies.quarantine import ReplyRules
from autoflip_flwr.server.settings import Values
from autoflip_flwr.server.strategy import AutoFlip, Pruned
from autoflip_flwr.storage.checkpoint import Checkpoints

Made = TypeVar("Made")

METHODS: Mapping[str, tuple[type[Scored], Mapping[str, Value]]] = {
    "autoflip": (LossExploration, {}),
    "fedavg": (Magnitude, {}),  # for quantised values: nothing is pruned
    "fedprox": (Magnitude, {}),
    "random": (Random, {}),
    "magnitude": (Magnitude, {}),
    "erk": (Random, {"scope": "erk"}),
    "snip": (Snip, {}),
    "ssfl": (Snip, {}),
    "prunefl": (PruneFl, {}),
    "feddst": (Random, {"scope": "erk"}),
    "rigl": (Random, {"scope": "erk"}),
    "gradual": (Magnitude, {}),
    "fedlex": (Guidance, {}),
    "sequential-leak": (LossExploration, {"initial": "explorers"}),
}
"""The class of each method, and those of its fields that no setting decides."""

SCHEDULES: Mapping[str, type[Schedule]] = {
    "prunefl": Reconfigure,
    "feddst": Votes,
    "rigl": Regrow,
    "gradual": Gradual,
    "regrow": Regrow,
    "agreement": Agreement,
    "participants": Participants,
}
"""The schedule of each method, and of each part of the setting ``schedule``, if it is not static."""

KINDS: Mapping[str, type[Pruned]] = {"autoflip": AutoFlip, "fedlex": Guided, "sequential-leak": Relay}
"""The strategy of each method, if it is not ``Pruned``."""


def strategy_of(
    config: Config, ledger: Ledger, exploration: Exploration | Statistics | None, checkpoints: Path
) -> Strategy:
    """Make the strategy that the settings describe. ``exploration`` is that of an earlier run."""
    inner = _inner(config)
    if not config.wrapped:
        return inner
    kept = None
    if config.checkpoints:
        kept = Checkpoints(checkpoints, resume=bool(config.resume), keep=config.checkpoints, settings=config.decisive())
    values = Values(
        up=config.values_up or config.values,
        down=config.values_down or config.values,
        deltas=config.exploration_values,
    )
    rules = ReplyRules(norm_factor=config.norm_factor, max_examples=config.max_examples, min_replies=config.min_replies)
    seeks = config.auto_sparsity and config.falls
    return KINDS.get(config.method, Pruned)(
        inner,
        0.0 if config.method in DENSE else AUTO_SPARSITY if seeks else config.sparsity,
        method=_method(config),
        biases=config.prune_biases,
        outside=config.outside,
        lr_power=config.lr_power,
        exploration=exploration,
        values=values,
        rules=rules,
        checkpoints=kept,
        ledger=ledger,
        seed=config.seed,
    )


def least_nodes(config: Config) -> int:
    """Return 2, unless the settings say that one node is enough."""
    return 1 if config.nodes == 1 or (config.method in ASKING and config.min_explorers == 1) else 2


def _inner(config: Config) -> FedAvg:
    """Return the strategy that samples and averages."""
    common: dict[str, Any] = {
        "fraction_train": config.fraction_train,
        "fraction_evaluate": config.fraction_evaluate,
        "min_train_nodes": 1,
        "min_evaluate_nodes": 1 if config.fraction_evaluate else 0,
        "min_available_nodes": least_nodes(config),
    }
    if config.method == "fedprox":
        return FedProx(**common, proximal_mu=config.proximal_mu)
    if config.server_momentum or config.server_learning_rate != 1.0:
        return FedAvgM(
            **common, server_momentum=config.server_momentum, server_learning_rate=config.server_learning_rate
        )
    return FedAvg(**common)


def _method(config: Config) -> Method:
    """Return the method, with its fields taken from the settings of the same names that apply to it."""
    kind, fixed = METHODS[config.method]
    parts = config.schedule.split("+") if config.method == "autoflip" else [config.method]
    schedule: tuple[Schedule, ...] = tuple(
        _made(SCHEDULES[part], config, *(("fall", "drop") if part == "gradual" else ("adjust",)))
        for part in parts
        if part in SCHEDULES
    )
    if warmup := config.in_effect("warmup"):
        schedule += (Warmup(share=warmup),)
    return _made(kind, config, "exploration", **fixed, **({"schedule": schedule} if schedule else {}))


def _made(kind: type[Made], config: Config, *prefixes: str, **fixed: Any) -> Made:
    """Make an object of the settings that apply and have its fields' names, perhaps after one of these prefixes."""
    own = {each.name: getattr(config, each.name) for each in fields(config) if config.applies(each)}
    own = {name: value for name, value in own.items() if value or not name.startswith("adjust_")}  # 0: as the authors
    found: dict[str, Any] = {}
    for field in fields(kind):  # type: ignore[arg-type]
        names = [f"{prefix}_{field.name}" for prefix in prefixes] + [field.name]
        if field.init and field.name != "schedule" and (name := next((n for n in names if n in own), "")):
            found[field.name] = own[name]
    if "timeout" in found:
        found["timeout"] = found["timeout"] or None
    return kind(**{**found, **fixed})
