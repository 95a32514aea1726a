"""Fixtures shared by the tests: where the real data lie, and a cache folder of the session's own."""

import gc
import inspect
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import Result, Strategy

with suppress(ImportError):  # the library's own tests need none: "torch" is then the folder of tests beside this file
    from torch import set_num_threads

    set_num_threads(1)  # the tests are many small steps: threads only wait for each other

_BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"


_STARTS_PROCESSES = re.compile(r"^(?:import|from) (?:subprocess|replay|browser|faults)\b", re.MULTILINE)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With two workers, a module's tests share one, and whole runs in other processes go one after another."""
    starts: dict[Path, bool] = {}
    for item in items:
        if item.path not in starts:
            starts[item.path] = _STARTS_PROCESSES.search(item.path.read_text("utf-8")) is not None
        alone = starts[item.path] and (item.get_closest_marker("runs") or item.get_closest_marker("slow"))
        item.add_marker(pytest.mark.xdist_group("processes" if alone else item.path.name))


@pytest.fixture(scope="session")
def data_dir() -> str:
    """Folder of the real data sets: $AUTOFLIP_DATA, else ../shared/data beside the repository."""
    folder = Path(os.environ.get("AUTOFLIP_DATA") or _BESIDE)
    if not folder.is_dir():
        pytest.fail(f"no data sets in {folder}: set AUTOFLIP_DATA to the folder with MNIST/raw and cifar10", False)
    return str(folder)


def _start_of_flower_1_43(
    self,
    grid,
    initial_arrays,
    num_rounds=3,
    timeout=3600,
    train_config=None,
    evaluate_config=None,
    evaluate_fn=None,
    should_stop=None,
):
    arrays, result = initial_arrays, Result(arrays=initial_arrays)
    train_config, evaluate_config = train_config or ConfigRecord(), evaluate_config or ConfigRecord()

    def note(history, metrics):
        if metrics is not None:
            history[round_] = metrics

    for round_ in range(num_rounds + 1):
        if round_:
            messages = self.configure_train(round_, arrays, train_config, grid)
            found, metrics = self.aggregate_train(round_, grid.send_and_receive(messages, timeout=timeout))
            note(result.train_metrics_clientapp, metrics)
            if found is not None:
                result.arrays = arrays = found
            messages = self.configure_evaluate(round_, arrays, evaluate_config, grid)
            metrics = self.aggregate_evaluate(round_, grid.send_and_receive(messages, timeout=timeout))
            note(result.evaluate_metrics_clientapp, metrics)
        if evaluate_fn:
            note(result.evaluate_metrics_serverapp, evaluate_fn(round_, arrays))
        if round_ and should_stop is not None and should_stop(round_, result):
            break
    return result


@pytest.fixture
def flower_1_43(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop of Flower 1.43, which can stop early, also where an earlier one is installed."""
    if "should_stop" not in inspect.signature(Strategy.start).parameters:
        monkeypatch.setattr(Strategy, "start", _start_of_flower_1_43)


@pytest.fixture(scope="module", autouse=True)
def _little_to_collect() -> None:
    """Set aside what is there: Flower collects garbage for each array that it converts, and would go through it all."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOFLIP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def trackers_stay_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing that a tracker writes leaves this machine, or the test's folder, whatever the user has set."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "of-wandb"))
