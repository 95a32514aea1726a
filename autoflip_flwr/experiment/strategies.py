"""Make the strategy that the app's settings describe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from flwr.serverapp.strategy import FedAvg, FedAvgM, Strategy

from autoflip_flwr.core.choices import ASKING
from autoflip_flwr.core.method import Method
from autoflip_flwr.core.methods import LossExploration, Magnitude, Random, Snip
from autoflip_flwr.core.statistics import Exploration, Statistics
from autoflip_flwr.costs.ledger import Ledger
from autoflip_flwr.experiment.config import Config
from autoflip_flwr.replies.quarantine import ReplyRules
from autoflip_flwr.server.settings import Values
from autoflip_flwr.server.strategy import AutoFlip, Pruned
from autoflip_flwr.storage.checkpoint import Checkpoints

METHODS: Mapping[str, type[LossExploration | Magnitude | Random | Snip]] = {
    "autoflip": LossExploration,
    "snip": Snip,
    "magnitude": Magnitude,
    "random": Random,
}


def strategy_of(
    config: Config, ledger: Ledger, exploration: Exploration | Statistics | None, checkpoints: Path
) -> Strategy:
    """Make the strategy that the settings describe. ``exploration`` is that of an earlier run."""
    common = {
        "fraction_train": config.fraction_train,
        "fraction_evaluate": config.fraction_evaluate,
        "min_train_nodes": 1,
        "min_evaluate_nodes": 1 if config.fraction_evaluate else 0,
        "min_available_nodes": least_nodes(config),
    }
    inner: FedAvg
    if config.server_momentum or config.server_learning_rate != 1.0:
        inner = FedAvgM(
            **common,  # type: ignore[arg-type]
            server_momentum=config.server_momentum,
            server_learning_rate=config.server_learning_rate,
        )
    else:
        inner = FedAvg(**common)  # type: ignore[arg-type]
    if config.method == "fedavg":
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
    make = AutoFlip if config.method == "autoflip" else Pruned
    return make(
        inner,
        config.sparsity,
        method=_method(config),  # type: ignore[arg-type]
        biases=config.prune_biases,
        outside=config.outside,
        exploration=exploration,  # type: ignore[arg-type]
        values=values,
        rules=rules,
        checkpoints=kept,
        ledger=ledger,
        seed=config.seed,
    )


def least_nodes(config: Config) -> int:
    """Return 2, unless the settings say that one node is enough."""
    return 1 if config.nodes == 1 or (config.method in ASKING and config.min_explorers == 1) else 2


def _method(config: Config) -> Method:
    """Return the method, with its fields taken from the settings of the same names."""
    kind, own = METHODS[config.method], config.as_fields()
    found = {}
    for field in fields(kind):
        for name in (f"exploration_{field.name}", field.name):
            if name in own:
                found[field.name] = own[name]
                break
    if "timeout" in found:
        found["timeout"] = found["timeout"] or None  # type: ignore[assignment]
    return kind(**found)  # type: ignore[arg-type]
