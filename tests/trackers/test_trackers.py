"""What the trackers write to disk, with the real packages, and read back with those."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
from apps import Killed, message_app, model, record
from flwr.app import MetricRecord
from flwr.serverapp.strategy import FedAvg
from written import of_mlflow, of_tensorboard, of_wandb

from autoflip_flwr import AutoFlip, Checkpoints, Hook, MLflow, Round, TensorBoard, WandB, follow
from autoflip_flwr.testing import LocalGrid

pytestmark = pytest.mark.usefixtures("trackers_stay_here")

SETTINGS = {"lr": 0.1, "name": "a|b", "nesterov": True}
TOTALS = {"rounds": 2.0, "bytes": 1000.0}


def tell(hook: Hook, numbers: range, after: int = 0, failure: str = "") -> None:
    """A run of these rounds."""
    hook.began(SETTINGS, after)
    for number in numbers:
        hook.round(Round(number, {"central/accuracy": number / 8, "density": 0.25, "train/acc@1": 0.5}))
    hook.ended(TOTALS, failure)


class Run:
    """A run of AutoFLIP with checkpoints, which may be killed, and then goes on."""

    def __init__(self, folder, make):
        self.folder, self.make = folder, make

    def run(self, resume, killed_in=None):
        def evaluate(round_, arrays):
            if round_ == killed_in:
                raise Killed
            return MetricRecord({"accuracy": round_ / 8})

        checkpoints = Checkpoints(self.folder / "checkpoint", resume=resume)
        strategy = follow(AutoFlip(FedAvg(), 0.5, seed=1, checkpoints=checkpoints), self.make())
        grid = LocalGrid(message_app(), 2)
        try:
            strategy.start(grid, record(model()), num_rounds=4, evaluate_fn=evaluate)
        except Killed:
            return


def test_tensorboard_has_the_rounds_the_settings_and_the_totals(tmp_path):
    tell(TensorBoard(tmp_path / "logs"), range(3))
    rounds, texts = of_tensorboard(tmp_path / "logs")
    assert rounds[2] == {"central/accuracy": 0.25, "density": 0.25, "train/acc@1": 0.5}
    assert list(rounds) == [0, 1, 2]
    assert "| lr | 0.1 |" in texts["settings"].splitlines()
    assert r"| name | a\|b |" in texts["settings"].splitlines()
    assert "| bytes | 1000.0 |" in texts["totals"].splitlines()


def test_tensorboard_shows_the_last_run_of_a_folder(tmp_path):
    tell(TensorBoard(tmp_path), range(5))
    tell(TensorBoard(tmp_path), range(2), failure="ValueError: no")
    rounds, texts = of_tensorboard(tmp_path)
    assert list(rounds) == [0, 1]
    assert "| failure | ValueError: no |" in texts["totals"]


def test_tensorboard_goes_on_after_the_last_finished_round(tmp_path):
    tell(TensorBoard(tmp_path), range(5))
    tell(TensorBoard(tmp_path), range(3, 6), after=2)
    assert list(of_tensorboard(tmp_path)[0]) == [0, 1, 2, 3, 4, 5]  # each once


def test_tensorboard_follows_a_resumed_run(tmp_path):
    run = Run(tmp_path, lambda: TensorBoard(tmp_path / "logs"))
    run.run(resume=False, killed_in=3)
    run.run(resume=True)
    rounds, texts = of_tensorboard(tmp_path / "logs")
    assert {number: values["central/accuracy"] for number, values in rounds.items()} == {n: n / 8 for n in range(5)}
    assert rounds[4]["bytes/total"] > rounds[2]["bytes/total"] > 0
    assert "| sparsity | 0.5 |" in texts["settings"].splitlines()


@pytest.mark.runs
def test_mlflow_has_the_rounds_the_settings_and_the_totals(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    tell(MLflow(uri, name="first"), range(3))
    tell(MLflow(uri, name="it's second"), range(2), failure="ValueError: no")
    tell(MLflow(uri, name="it's second"), range(1, 4), after=1)  # round 1 is there already
    (first, of_first), (second, of_second) = of_mlflow(uri)
    assert of_first[1] == {"central/accuracy": 0.125, "density": 0.25, "train/acc_1": 0.5}
    assert of_first[2]["total/bytes"] == 1000
    assert first.data.params == {"lr": "0.1", "name": "a|b", "nesterov": "True"}
    assert (first.info.run_name, first.info.status) == ("first", "FINISHED")
    assert (second.info.run_name, second.info.status) == ("it's second", "FINISHED")
    assert second.data.tags["failure"] == "ValueError: no"
    assert {number: values["central/accuracy"] for number, values in of_second.items()} == {n: n / 8 for n in range(4)}
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.runs
def test_wandb_has_the_rounds_the_settings_and_the_totals(tmp_path):
    tell(WandB("pruning", folder=tmp_path, name="first", id="first-1"), range(3), failure="ValueError: no")
    rounds, config, summary, run = of_wandb(tmp_path)
    assert list(rounds) == [0, 1, 2]
    assert rounds[2] == {"central/accuracy": 0.25, "density": 0.25, "train/acc@1": 0.5}
    assert {name: config[name] for name in SETTINGS} == SETTINGS
    assert summary["total/bytes"] == 1000
    assert summary["failure"] == "ValueError: no"
    assert (run.project, run.display_name, run.run_id) == ("pruning", "first", "first-1")


@pytest.mark.runs
def test_wandb_begins_a_resumed_run_after_the_last_finished_round(tmp_path):
    run = Run(tmp_path, lambda: WandB(folder=tmp_path))
    run.run(resume=False, killed_in=3)
    (earlier,) = tmp_path.glob("wandb/offline-run-*")
    earlier.rename(tmp_path / "earlier")
    run.run(resume=True)
    rounds, config, _, _ = of_wandb(tmp_path)
    assert list(rounds) == [3, 4]
    assert config["sparsity"] == 0.5


@pytest.mark.parametrize(
    ("variables", "mode", "expected"),
    [
        ({}, None, "offline"),
        ({"WANDB_API_KEY": "k"}, None, "online"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, None, "offline"),
        ({"WANDB_MODE": "online"}, "disabled", "disabled"),
    ],
)
def test_wandb_is_offline_unless_the_user_says_otherwise(variables, mode, expected, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert WandB(mode=mode).resolved_mode == expected


@pytest.mark.parametrize(("kind", "package"), [(TensorBoard, "tensorboard"), (WandB, "wandb"), (MLflow, "mlflow")])
def test_a_package_that_is_missing_is_told_with_the_extra(kind, package, monkeypatch, tmp_path):
    (tmp_path / package).mkdir()  # such as W&B's own folder
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, package, raising=False)
    importlib.invalidate_caches()
    with pytest.raises(ModuleNotFoundError) as caught:
        kind()
    assert str(caught.value) == f"the package {package} is not installed: pip install 'autoflip-flwr[{package}]'"


def test_trackers_load_nothing_before_a_run():
    code = (
        "import sys; from autoflip_flwr import *; TensorBoard(), WandB(), MLflow(); "
        "print(sorted({'tensorboard', 'wandb', 'mlflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_folder_that_cannot_be_written_leaves_the_tracker_out(tmp_path, caplog):
    (tmp_path / "logs").write_text("in the way")
    strategy = follow(FedAvg(), TensorBoard(tmp_path / "logs"))
    result = strategy.start(LocalGrid(message_app(), 2), record(model()), num_rounds=2)
    assert result.arrays is not None
    (told,) = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert told.startswith("TensorBoard has failed and is left out from now on: ")
