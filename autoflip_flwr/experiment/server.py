"""The shipped server app: reads the settings, checks everything, then runs AutoFLIP or FedAvg."""

from __future__ import annotations

from contextlib import suppress
from logging import ERROR, INFO
from pathlib import Path

import torch
from flwr.app import Context
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, FedAvgM, Strategy

from autoflip_flwr import AutoFlip, Ledger
from autoflip_flwr.core.digest import digest_of
from autoflip_flwr.core.statistics import Exploration
from autoflip_flwr.experiment import training
from autoflip_flwr.experiment.config import Config, ConfigError
from autoflip_flwr.experiment.data import load
from autoflip_flwr.experiment.explored import read_exploration, write_exploration
from autoflip_flwr.experiment.models import build
from autoflip_flwr.experiment.partition import partition_by
from autoflip_flwr.experiment.preflight import resumable
from autoflip_flwr.experiment.record.folder import RunRecord
from autoflip_flwr.experiment.record.tracker import Tracker
from autoflip_flwr.replies.quarantine import ReplyRules
from autoflip_flwr.server.grid import OrderedGrid
from autoflip_flwr.storage.checkpoint import Checkpoints
from autoflip_flwr.wire.records import to_record

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the app; what is wrong is said in one line that begins with ``autoflip: error:``."""
    try:
        run(grid, Config.from_run_config(context.run_config))
    except (ConfigError, ValueError, RuntimeError, OSError) as error:
        log(ERROR, "autoflip: error: %s", _in_words(error))
        raise


def run(grid: Grid, config: Config) -> Path:
    """Run one experiment and return the folder of its record.

    Raises
    ------
    ConfigError
        If a setting must be changed, before any client works.
    RuntimeError
        If too few nodes connect, or too few explorers answer.
    """
    data = load(config.dataset, config.resolved_data_dir)
    device = training.choose_device(config.device if config.device in ("auto", "cpu") else "auto")
    model = build(config.model, data.input_shape, data.classes, config.seed).to(device)
    initial = training.get_arrays(model)
    ledger = Ledger()
    ordered = OrderedGrid(grid, seed=config.seed, ledger=ledger)
    _wait_for_nodes(ordered, config)
    if ordered.num_partitions:  # else each node has data of its own
        # refuses an impossible split now, and leaves the split in the cache for the clients
        partition_by(config, data.y_train, max(ordered.num_partitions, len(ordered.partitions)))
    start = digest_of(initial)
    exploration, cost, explored_seconds = _earlier_exploration(config, start)
    if config.resume:
        record = resumable(config)
    else:
        name = config.name or f"{config.method}-{config.dataset}"
        record = RunRecord.create(config.output_dir, name, config.as_dict())
    log(INFO, "run record: %s", record.path)
    strategy = _strategy(config, ledger, exploration, record.path / "checkpoint")
    tracker = Tracker(
        record,
        config,
        model,
        torch.from_numpy(data.batch(data.x_test[:])),
        torch.tensor(data.y_test),
        ledger,
        lambda: strategy.mask if isinstance(strategy, AutoFlip) else None,
        explored_seconds,
    )
    ordered.observe = tracker.observe
    if isinstance(strategy, AutoFlip) and strategy.checkpoints is not None:
        strategy.checkpoints.extra, strategy.checkpoints.restore = tracker.state, tracker.restore

    def evaluate(server_round: int, arrays):  # type: ignore[no-untyped-def]
        if server_round == 0 and cost:
            ledger.charge_exploration(cost)
        elif server_round == 0 and isinstance(strategy, AutoFlip) and strategy.exploration:
            write_exploration(
                record.path / "exploration.safetensors",
                strategy.exploration,
                start,
                config.of_start(),
                ledger.exploration_only(),
                tracker.exploration_seconds,
            )
        return tracker.evaluate(server_round, arrays)

    try:
        result = strategy.start(
            ordered,
            to_record(initial),
            num_rounds=config.num_server_rounds,
            timeout=config.round_timeout,
            evaluate_fn=evaluate,
        )
    except Exception as error:
        with suppress(OSError):  # a full disk may be the reason itself
            tracker.fail(_in_words(error))
        raise
    return tracker.finish(result.arrays if result.arrays else to_record(initial))


def _in_words(error: Exception) -> str:
    """An error on one line; what is not meant for users keeps its class."""
    words = " ".join(str(error).split())
    return words if isinstance(error, ValueError | RuntimeError | OSError) else f"{type(error).__name__}: {words}"


def _wait_for_nodes(ordered: OrderedGrid, config: Config) -> None:
    minimum = max(_least_nodes(config), config.nodes, config.min_explorers if config.method == "autoflip" else 0)
    try:
        ordered.roll_call(minimum=minimum, expected=config.nodes, timeout=config.node_timeout)
    except RuntimeError as error:
        raise ConfigError(
            f"nodes = {config.nodes}: {error}; start more SuperNodes "
            f"(simulation: --federation-config 'num-supernodes={minimum}') or lower nodes or min-explorers"
        ) from error


def _least_nodes(config: Config) -> int:
    """2, unless the settings say that one is enough."""
    return 1 if config.nodes == 1 or (config.method == "autoflip" and config.min_explorers == 1) else 2


def _earlier_exploration(config: Config, start: str) -> tuple[Exploration | None, dict[str, float], float]:
    """The exploration of an earlier run that is to be used, what it cost and its seconds."""
    return read_exploration(Path(config.exploration), start) if config.exploration else (None, {}, 0.0)


def _strategy(config: Config, ledger: Ledger, exploration: Exploration | None, checkpoints: Path) -> Strategy:
    common = {
        "fraction_train": config.fraction_train,
        "fraction_evaluate": config.fraction_evaluate,
        "min_train_nodes": 1,
        "min_evaluate_nodes": 1 if config.fraction_evaluate else 0,
        "min_available_nodes": _least_nodes(config),
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
    return AutoFlip(
        inner,
        sparsity=config.sparsity,
        scope=config.scope,
        normalisation=config.normalisation,
        gamma=config.gamma,
        biases=config.prune_biases,
        initial=config.initial,
        outside=config.outside,
        explorers=config.explorers,
        min_explorers=config.min_explorers,
        exploration_rounds=config.exploration_rounds,
        exploration_epochs=config.exploration_epochs,
        exploration_patience=config.exploration_patience,
        exploration_timeout=config.exploration_timeout or None,
        exploration_weighting=config.exploration_weighting,
        exploration_values=config.exploration_values,
        values=config.values,
        values_up=config.values_up or None,
        values_down=config.values_down or None,
        exploration=exploration,
        seed=config.seed,
        ledger=ledger,
        rules=ReplyRules(config.norm_factor, config.max_examples, config.min_replies),
        checkpoints=kept,
    )
