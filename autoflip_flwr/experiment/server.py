"""The shipped server app: it reads and checks the settings, then runs AutoFLIP or FedAvg."""

from __future__ import annotations

from contextlib import suppress
from logging import ERROR, INFO, WARNING
from pathlib import Path

from flwr.app import Context
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from autoflip_flwr import Ledger
from autoflip_flwr.core.choices import ASKING
from autoflip_flwr.experiment import training
from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.data.load import load_for
from autoflip_flwr.experiment.data.partition import holdings, partition_by
from autoflip_flwr.experiment.evaluation import cost_of_evaluation, evaluated_rounds, rows_to_test
from autoflip_flwr.experiment.examples import examples_to_test
from autoflip_flwr.experiment.leak import Relay
from autoflip_flwr.experiment.models.blank import blank
from autoflip_flwr.experiment.models.build import build
from autoflip_flwr.experiment.powerpropagation import to_theta
from autoflip_flwr.experiment.precision import check_precision
from autoflip_flwr.experiment.preflight import check_trackers, earlier_exploration, resumable
from autoflip_flwr.experiment.record.folder import RunRecord
from autoflip_flwr.experiment.record.tracker import Tracker
from autoflip_flwr.experiment.rules import ConfigError
from autoflip_flwr.experiment.strategies import least_nodes, strategy_of
from autoflip_flwr.experiment.trackers import trackers_of
from autoflip_flwr.server.following import follow
from autoflip_flwr.server.grid import OrderedGrid
from autoflip_flwr.server.strategy import Pruned
from autoflip_flwr.storage.exploration_file import FILE_NAME, write_exploration
from autoflip_flwr.wire.records import to_record

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the app. An error is shown in one line that begins with ``autoflip: error:``."""
    try:
        run(grid, Config.from_run_config(context.run_config))
    except (ConfigError, ValueError, RuntimeError, OSError) as error:
        log(ERROR, "autoflip: error: %s", in_words(error))
        raise


def run(grid: Grid, config: Config, *, folder: Path | None = None, name: str = "", key: str = "") -> Path:
    """Run one experiment and return the folder of its record.

    Parameters
    ----------
    grid : Grid
        Flower's grid, or another one with the shipped clients.
    config : Config
        The settings.
    folder : Path | None
        Folder of the record; default: a new one in ``output-dir``, named after the moment and the run.
    name : str
        Name of the run for its record; default: the setting, else method and data set.
    key : str
        Identity of the run for its record, if it has one.

    Raises
    ------
    ConfigError
        Before any client works, if a setting must be changed.
    RuntimeError
        If too few nodes connect, or too few explorers answer.
    """
    check_trackers(config)
    data = load_for(config)
    if not len(data.y_test):
        raise ConfigError(f"dataset = {config.dataset!r}: the server's data have no test examples: add x_test, y_test")
    device = training.choose_device(config.device if config.device in ("auto", "cpu") else "auto")
    model = build(config.model, data.input_shape, data.classes, config.seed, kind=data.inputs.kind).to(device)
    slow = check_precision(model, blank(1, data.input_shape, data.inputs.kind, device), config.precision)
    if slow:
        log(WARNING, slow)
    to_theta(model, config.in_effect("powerpropagation"))
    initial = training.get_arrays(model)
    ledger = Ledger()
    ordered = OrderedGrid(grid, seed=config.seed, ledger=ledger)
    _wait_for_nodes(ordered, config)
    parts = None
    if ordered.num_partitions:  # else each node has its own data
        parts = partition_by(config, data, max(ordered.num_partitions, len(ordered.partitions)))
    earlier = earlier_exploration(config, initial) if config.exploration else None
    if config.resume:
        record = resumable(config)
    else:
        name = name or config.name or f"{config.method}-{config.dataset}"
        record = RunRecord.create(config.output_dir, name, config.as_dict(), folder=folder, key=key)
    log(INFO, "run record: %s", record.path)
    if parts is not None:
        record.write_holdings(holdings(data, parts))
    strategy = strategy_of(config, ledger, earlier.exploration if earlier else None, record.path / "checkpoint")
    strategy = follow(strategy, *trackers_of(config, record.path), settings=config.as_dict())
    trained = len(data.y_train) if parts is None else sum(map(len, parts))
    test = examples_to_test(data, rows_to_test(len(data.y_test), config.test_examples))
    tracker = Tracker(
        record,
        config,
        model,
        test.to(device),
        ledger,
        lambda: strategy.mask if isinstance(strategy, Pruned) else None,
        evaluated_rounds(
            config.num_server_rounds,
            config.evaluate_every,
            cost_of_evaluation(len(test), config.fraction_train * trained * config.local_epochs),
        ),
        earlier.seconds if earlier else 0.0,
    )
    ordered.observe = tracker.observe
    if isinstance(strategy, Pruned) and strategy.checkpoints is not None:
        strategy.checkpoints.extra, strategy.checkpoints.restore = tracker.state, tracker.restore

    shares = not isinstance(strategy, Relay)  # whose exploration suits no other run

    def evaluate(server_round: int, arrays):  # type: ignore[no-untyped-def]
        if server_round == 0 and earlier is not None:
            if earlier.cost:
                ledger.charge_exploration(earlier.cost)
        elif server_round == 0 and isinstance(strategy, Pruned) and shares and strategy.exploration:
            write_exploration(
                record.path / FILE_NAME,
                strategy.exploration,
                initial,
                settings=config.of_start(),
                cost=ledger.exploration_only(),
                seconds=tracker.exploration_seconds,
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
        with suppress(OSError):  # the error itself may be a full disk
            tracker.fail(in_words(error))
        raise
    return tracker.finish(result.arrays if result.arrays else to_record(initial))


def in_words(error: Exception) -> str:
    """Return an error in one line. Errors that are not meant for users keep their class."""
    words = " ".join(str(error).split())
    return words if isinstance(error, ValueError | RuntimeError | OSError) else f"{type(error).__name__}: {words}"


def _wait_for_nodes(ordered: OrderedGrid, config: Config) -> None:
    minimum = max(least_nodes(config), config.nodes, config.min_explorers if config.method in ASKING else 0)
    try:
        ordered.roll_call(minimum=minimum, expected=config.nodes, timeout=config.node_timeout)
    except RuntimeError as error:
        raise ConfigError(
            f"nodes = {config.nodes}: {error}; start more SuperNodes "
            f"(simulation: --federation-config 'num-supernodes={minimum}') or lower nodes or min-explorers"
        ) from error
