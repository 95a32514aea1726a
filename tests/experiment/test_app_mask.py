"""What the shipped app does about masks: explorers without weight decay, problems in the summary."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from safetensors.numpy import load_file

from autoflip_flwr.experiment import client, server
from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.data.dataset import Inputs
from autoflip_flwr.experiment.examples import Examples, Shared
from autoflip_flwr.experiment.models.build import build
from autoflip_flwr.experiment.record.summary import summary_table
from autoflip_flwr.testing import LocalGrid
from autoflip_flwr.wire.keys import EPOCHS_KEY, PATIENCE_KEY, PHASE_KEY, WEIGHT_DECAY_KEY

pytestmark = pytest.mark.runs


def trained(decay: float, config: dict[str, object]) -> np.ndarray:
    torch.manual_seed(0)
    settings = Config(weight_decay=decay, local_epochs=1)
    shared = Shared(torch.rand(20, 1, 8, 8).numpy(), np.arange(20, dtype=np.int64) % 10)
    examples = Examples(shared, Inputs("signal", (1, 8, 8)))
    one = client.LocalClient(settings, 0, examples, 10, Context(1, 1, {}, RecordDict(), {}))
    arrays, _, _ = one.fit([p.detach().numpy().copy() for p in one._model.state_dict().values()], config)
    return np.concatenate([array.ravel() for array in arrays])


def test_explorers_do_without_weight_decay_and_rounds_do_not():
    exploring = {PHASE_KEY: "explore", EPOCHS_KEY: 1, PATIENCE_KEY: 1, "server-round": 0, WEIGHT_DECAY_KEY: 0.0}
    assert (trained(0.5, exploring) == trained(0.0, exploring)).all()
    assert (trained(0.5, {"server-round": 1}) != trained(0.0, {"server-round": 1})).any()


def test_a_mask_that_leaves_a_layer_to_its_floor_is_told_in_the_summary(tmp_path: Path):
    values = {"output-dir": str(tmp_path), "num-server-rounds": 1, "exploration-epochs": 1, "sparsity": 0.998}
    values |= {"rank-by": "deviation", "initial": "scratch"}
    path = server.run(LocalGrid(client.app, 2, values), Config.from_run_config(values))
    summary = json.loads((path / "summary.json").read_text())
    assert summary["mask_problems"] == ["nothing but its floor is left of fc2.weight (10 of 1280 entries)"]
    assert "Problems of the mask" in summary_table(summary)
    assert summary["mask_problems"][0] in (path / "report.html").read_text()
    assert "Problems of the mask" not in summary_table({**summary, "mask_problems": []})


@pytest.mark.parametrize("initial", ["scratch", "explorers"])
def test_the_app_leaves_what_is_outside_the_mask_where_it_was(initial: str, tmp_path: Path):
    values = {"output-dir": str(tmp_path), "num-server-rounds": 2, "exploration-epochs": 1, "sparsity": 0.9}
    values |= {"outside": "initial", "initial": initial, "weight-decay": 0.1}
    path = server.run(LocalGrid(client.app, 2, values), Config.from_run_config(values))
    summary = json.loads((path / "summary.json").read_text())
    assert summary["mask_problems"] == []
    sent = summary["bytes"]
    assert sent["total"] == sum(count for phase, count in sent.items() if phase != "total")
    assert ("Outside the mask, down" in summary_table(summary)) == ("base_down" in sent) == (initial == "explorers")
    model, mask = load_file(path / "model.safetensors"), load_file(path / "mask.safetensors")
    config = Config.from_run_config(values)
    start = build(config.model, (1, 8, 8), 10, config.seed).state_dict()
    for name, keep in mask.items():
        pruned = ~keep.astype(bool)
        assert model[name][pruned].any()
        assert (model[name][pruned] == start[name].numpy()[pruned]).all() == (initial == "scratch")
