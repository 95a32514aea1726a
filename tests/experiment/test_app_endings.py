"""How the shipped app ends: with a failure, with one node, and with the same model whatever threads a client has."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from autoflip_flwr.experiment import client, server
from autoflip_flwr.experiment.config import Config
from autoflip_flwr.testing import LocalGrid

pytestmark = pytest.mark.runs

ROOT = Path(__file__).resolve().parents[2]


def run(output: Path, count: int = 3, spoil=None, **settings: bool | int | float | str) -> Path:
    values = {"output-dir": str(output), "num-server-rounds": 1, "local-epochs": 1, "exploration-epochs": 1}
    values |= {key.replace("_", "-"): value for key, value in settings.items()}
    return server.run(LocalGrid(client.app, count, values, tamper=spoil), Config.from_run_config(values))


def test_a_run_whose_exploration_fails_has_a_report_with_the_reason_and_the_incidents(tmp_path):
    def spoil(reply):
        if reply.has_content() and "autoflip" in reply.content and reply.content["autoflip"].get("phase") == "explore":
            for record in reply.content.metric_records.values():
                record["num-examples"] = -1
        return reply

    with pytest.raises(RuntimeError) as failure:
        run(tmp_path, spoil=spoil)
    (path,) = tmp_path.iterdir()
    assert json.loads((path / "failure.json").read_text())["reason"] == str(failure.value)
    page = (path / "report.html").read_text("utf-8")
    assert "This run is not complete: <strong>the exploration failed" in page
    assert page.count("<td>rejected</td>") == 3


def test_a_client_that_raises_is_told_by_its_exception_and_not_by_the_place_of_our_mod(tmp_path):
    with pytest.raises(RuntimeError) as failure:
        run(tmp_path, device="cuda" if not torch.cuda.is_available() else "mps")
    assert "must be the first" not in str(failure.value)
    assert str(failure.value).endswith("not available here; auto takes what there is")


@pytest.mark.parametrize("method", ["autoflip", "fedavg"])
def test_one_node_is_enough_if_the_settings_say_so(method, tmp_path):
    path = run(tmp_path, 1, nodes=1, method=method, min_explorers=1)
    assert json.loads((path / "summary.json").read_text())["rounds"] == 1


def test_the_small_model_does_not_depend_on_the_threads_of_its_clients(tmp_path):
    before, models = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            models.append((run(tmp_path / str(threads)) / "model.safetensors").read_bytes())
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert models[0] == models[1]


def test_threads_of_a_clients_process_wait_without_spinning():
    code = "import os, client_app; print(os.environ['OMP_WAIT_POLICY'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "PASSIVE\n"
