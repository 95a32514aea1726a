"""The shipped app writes for TensorBoard, Weights & Biases and MLflow into its record."""

from __future__ import annotations

from pathlib import Path

import pytest
from written import of_mlflow, of_tensorboard, of_wandb

from autoflip_flwr.experiment import client, server
from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.record.runs import Run
from autoflip_flwr.testing import LocalGrid

pytestmark = [pytest.mark.runs, pytest.mark.usefixtures("trackers_stay_here")]


def run(output: Path, **settings: bool | int | float | str) -> Path:
    values = {
        "output-dir": str(output),
        "num-server-rounds": 2,
        "local-epochs": 1,
        "exploration-epochs": 1,
        "evaluate-every": 1,
    }
    values |= {key.replace("_", "-"): value for key, value in settings.items()}
    return server.run(LocalGrid(client.app, 2, values), Config.from_run_config(values))


def test_tensorboard_has_what_the_record_has_also_of_a_resumed_run(tmp_path):
    path = run(tmp_path, trackers="tensorboard", num_server_rounds=1)
    run(tmp_path, trackers="tensorboard", resume=str(path))
    of_record = {line["round"]: line for line in Run.read(path).metrics if line["phase"] == "train"}
    rounds, texts = of_tensorboard(path / "tensorboard")
    assert list(rounds) == list(of_record) == [0, 1, 2]
    for number, line in of_record.items():
        assert rounds[number]["central/accuracy"] == pytest.approx(line["accuracy"])
        assert rounds[number]["bytes/total"] == pytest.approx(line["bytes"]["total"])
        assert rounds[number]["density"] == pytest.approx(line["density"])
        assert rounds[number]["replies/train"] == line["nodes"]
    assert "| sparsity | 0.7 |" in texts["settings"].splitlines()
    assert "| rounds | 2.0 |" in texts["totals"].splitlines()


def test_fedavg_is_tracked_as_well(tmp_path):
    path = run(tmp_path, trackers="wandb, mlflow", method="fedavg", fraction_evaluate=1.0)
    by_wandb, config, summary, about = of_wandb(path)
    ((found, by_mlflow),) = of_mlflow(f"sqlite:///{path}/mlruns/mlflow.db")
    of_record = Run.read(path)
    lines = {line["round"]: line for line in of_record.metrics}
    for rounds in (by_wandb, by_mlflow):
        assert list(rounds) == list(lines) == [0, 1, 2]
        for number, line in lines.items():
            assert rounds[number]["central/loss"] == pytest.approx(line["loss"])
            assert rounds[number]["bytes/total"] == line["bytes"]["total"]
            assert rounds[number]["density"] == 1
        assert "evaluate/accuracy" in rounds[2]
    assert config["method"] == found.data.params["method"] == "fedavg"
    assert summary["total/bytes"] == by_mlflow[2]["total/bytes"] == of_record.summary["bytes"]["total"]
    assert about.run_id == about.display_name == found.info.run_name == path.name
    assert found.info.status == "FINISHED"
