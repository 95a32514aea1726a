"""The examples of docs/data.md run as they stand: their Python makes the data, and their settings train on them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from autoflip_flwr.experiment import client, server
from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.data.load import load_for
from autoflip_flwr.experiment.data.partition import partition_by
from autoflip_flwr.experiment.toml import parse_pairs
from autoflip_flwr.testing import LocalGrid

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text("utf-8")
COMMAND = re.compile(r"^autoflip run (?:--nodes (\d+) )?-c '(.*)'$", re.MULTILINE)
MAKERS = re.compile(
    r"^```python\n(.*?)^```\n+```bash\nautoflip run --nodes (\d+) -c '(.*?)'\n```$", re.MULTILINE | re.DOTALL
)
SHORT = {"num-server-rounds": 1, "local-epochs": 1, "exploration-epochs": 1, "device": "cpu"}


def config_of(pairs: str, **changes: object) -> Config:
    return Config.from_run_config(
        {**parse_pairs(pairs), **{key.replace("_", "-"): value for key, value in changes.items()}}
    )


@pytest.mark.parametrize(("nodes", "pairs"), COMMAND.findall(PAGE), ids=lambda text: text[:40])
def test_the_commands_are_valid(nodes: str, pairs: str, data_dir: str) -> None:
    if "own" in pairs or "blobs" in pairs:
        assert nodes
        return
    config = Config.from_run_config(parse_pairs(pairs.replace('"/data"', f'"{data_dir}"')))
    data = load_for(config)
    assert len(partition_by(config, data, int(nodes or 10))) == int(nodes or 10)


@pytest.mark.runs
@pytest.mark.parametrize(("code", "nodes", "pairs"), MAKERS.findall(PAGE), ids=["arrays", "clients", "function"])
def test_ones_own_data_train(
    code: str, nodes: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if "def " in code:
        Path("my_sets.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
    else:
        exec(code, {})
    given = {"nodes": int(nodes), "output-dir": str(tmp_path / "runs"), **SHORT}
    config = Config.from_run_config({**parse_pairs(pairs), **given})
    path = server.run(LocalGrid(client.app, int(nodes), config.as_dict()), config)
    held = json.loads((path / "holdings.json").read_text())
    assert held["classes"] == ["0", "1", "2"]
    assert np.array(held["counts"]).shape == (int(nodes), 3)
    assert np.array(held["counts"]).sum() == 240
    assert json.loads((path / "summary.json").read_text())["final_accuracy"] > 0.3


def test_every_form_of_ones_own_data_is_shown() -> None:
    assert len(MAKERS.findall(PAGE)) == 3
