"""Suites: runs in processes of their own, shared explorations, failures, and going on after a stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autoflip_flwr.experiment import client, server
from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.rules import ConfigError
from autoflip_flwr.experiment.suite.plan import plan
from autoflip_flwr.experiment.suite.spec import read_suite
from autoflip_flwr.experiment.suite.state import Folder
from autoflip_flwr.experiment.suite.worker import run_in_process
from autoflip_flwr.launch.cli import main
from autoflip_flwr.testing import LocalGrid

SUITE = """\
defaults: {nodes: 3, num-server-rounds: 60, local-epochs: 1, exploration-epochs: 1, max-examples-per-class: 20}
data: [{dataset: digits, split: iid}]
methods:
  - method: fedavg
  - {method: autoflip, density: [0.3, 0.1]}
  - {method: random, density: 0.0001}
"""


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "autoflip_flwr.launch.cli", "suite", str(folder / "small.yaml")]
    command += ["--output", str(folder), "--workers", "2"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def states(folder: Path) -> dict[str, dict]:
    return {run["name"]: run for run in json.loads((folder / "small" / "suite.json").read_text())["runs"]}


@pytest.mark.runs
def test_a_suite_that_is_stopped_goes_on_shares_explorations_and_tells_failures(tmp_path, capsys):
    (tmp_path / "small.yaml").write_text(SUITE)
    assert main(["suite", str(tmp_path / "small.yaml"), "--output", str(tmp_path), "--dry-run"]) == 0
    listed = capsys.readouterr().out
    assert "autoflip density=0.1   waiting" in listed
    assert "4 of 4 runs to make, about" in listed
    assert not (tmp_path / "small").exists()

    stopped = start(tmp_path)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if any(path.read_text().count("\n") > 4 for path in tmp_path.glob("small/autoflip*/metrics.jsonl")):
            break
        time.sleep(0.05)
    os.kill(stopped.pid, signal.SIGINT)
    out, _ = stopped.communicate(timeout=60)
    assert stopped.returncode == 130
    assert "runs are done; the same command goes on with the others" in out
    done = [run["folder"] for run in states(tmp_path).values() if run["state"] == "done"]
    written = {name: (tmp_path / "small" / name / "model.safetensors").stat().st_mtime_ns for name in done}

    goes_on = start(tmp_path)
    out, err = goes_on.communicate(timeout=300)
    assert goes_on.returncode == 1
    assert f"small: {4 - len(done)} of 4 runs to make with 2 workers" in out
    assert "random density=0.0001 failed: sparsity = 0.9999: " in err
    runs = states(tmp_path)
    failed = runs.pop("random density=0.0001")
    assert failed["state"] == "failed"
    assert "entries of the model would be pruned" in failed["reason"]
    assert {run["state"] for run in runs.values()} == {"done"}
    for name in done:
        assert (tmp_path / "small" / name / "model.safetensors").stat().st_mtime_ns == written[name]
    assert (tmp_path / "small" / "report.html").exists()

    pruned = [tmp_path / "small" / run["folder"] for name, run in runs.items() if name != "fedavg"]
    told = [json.loads((each / "summary.json").read_text()) for each in pruned]
    settings = [json.loads((each / "config.json").read_text())["config"] for each in pruned]
    assert any(each["resumed_after"] for each in told)
    assert sorted(bool(each["exploration"]) for each in settings) == [False, True]
    assert told[0]["bytes"]["exploration_up"] == told[1]["bytes"]["exploration_up"] > 0
    assert not any((each / "checkpoint").exists() for each in pruned)
    # one shares an exploration, one was interrupted: both are as if they had been made alone
    for folder, run in zip(pruned, (runs["autoflip density=0.3"], runs["autoflip density=0.1"]), strict=True):
        whole = run_in_process(Config.from_run_config(run["settings"]), tmp_path / run["key"])
        assert (whole / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_two_processes_do_not_make_one_suite(tmp_path):
    (tmp_path / "small.yaml").write_text(SUITE)
    suite = read_suite(tmp_path / "small.yaml")
    one, other = (Folder(tmp_path / "small", suite, plan(suite.runs), "autoflip suite") for _ in range(2))
    with (
        one.alone(),
        pytest.raises(ConfigError, match="small: another process is making this suite; wait for it, or stop it"),
        other.alone(),
    ):
        pass
    with other.alone():
        pass


@pytest.mark.runs
@pytest.mark.parametrize(
    "settings", [{"values": "int8"}, {"outside": "initial", "values": "bfloat16"}, {"method": "fedavg"}]
)
def test_without_serialisation_the_results_and_the_counted_bytes_are_the_same(tmp_path, settings):
    values = {"nodes": 3, "num-server-rounds": 2, "local-epochs": 1, "exploration-epochs": 1, "fraction-train": 0.7}
    config = Config.from_run_config({**values, "max-examples-per-class": 20, **settings})
    found = []
    for serialise in (True, False):
        grid = LocalGrid(client.app, 3, config.as_dict(), serialise=serialise)
        folder = server.run(grid, config, folder=tmp_path / str(serialise))
        told = json.loads((folder / "summary.json").read_text())
        found.append(((folder / "model.safetensors").read_bytes(), told["bytes"], told["bytes_by_node"]))
        assert (grid.up > 0) == serialise
    assert found[0] == found[1]
