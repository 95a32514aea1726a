"""The shipped app, in-process and as a real ``flwr run`` under Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from apps import NO_FAILURES
from flwr.app import Context, RecordDict
from replay import write_data
from safetensors.numpy import load_file

from autoflip_flwr.experiment import client, server
from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.rules import ConfigError
from autoflip_flwr.experiment.suite.worker import run_in_process
from autoflip_flwr.experiment.training import choose_device, seed_of
from autoflip_flwr.testing import LocalGrid

pytestmark = pytest.mark.runs

REPOSITORY = Path(__file__).parents[2]


def run(output: Path, nodes: int = 4, **settings: bool | int | float | str) -> Path:
    values = {"output-dir": str(output), "num-server-rounds": 2, "local-epochs": 1, "exploration-epochs": 2}
    values |= {key.replace("_", "-"): value for key, value in settings.items()}
    return server.run(LocalGrid(client.app, nodes, values), Config.from_run_config(values))


def summary(path: Path) -> dict:
    return json.loads((path / "summary.json").read_text())


def test_one_seed_gives_one_result(tmp_path):
    first, second, other = (run(tmp_path, seed=seed) for seed in (1, 1, 2))
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert (first / "mask.safetensors").read_bytes() == (second / "mask.safetensors").read_bytes()
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()
    assert summary(first)["bytes"] == summary(second)["bytes"]


def test_the_record_tells_what_happened(tmp_path):
    path = run(tmp_path, fraction_evaluate=1.0)
    told = summary(path)
    assert told["method"] == "autoflip"
    assert told["rounds"] == 2
    assert told["density"] == pytest.approx(0.3, abs=1e-4)
    assert told["parameters"] == 43_626
    assert told["bytes"]["total"] == sum(value for key, value in told["bytes"].items() if key != "total")
    assert all(value > 0 for value in told["bytes"].values())
    assert told["train_up_per_client_round"] == pytest.approx(told["bytes"]["train_up"] / 8)
    # 4 nodes send 80 % of the weights in round 1, and the target's 30 % in round 2
    assert told["bytes"]["train_up"] == pytest.approx(4 * (0.8 + 0.3) * 4 * told["parameters"], rel=0.05)
    assert told["failures"] == NO_FAILURES
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["phase"], line["round"]) for line in lines] == [("exploration", 0)] + [("train", r) for r in range(3)]
    model, mask = load_file(path / "model.safetensors"), load_file(path / "mask.safetensors")
    assert sum(int(keep.sum()) for keep in mask.values()) == sum(v["kept"] for v in told["density_by_layer"].values())
    assert not any(model[name][mask[name] == 0].any() for name in mask)
    made = {file.name for file in path.iterdir()}
    assert {"config.json", "report.html", "exploration.safetensors"} <= made
    assert json.loads((path / "config.json").read_text())["config"]["sparsity"] == 0.7


def test_a_run_that_goes_on_has_one_record(tmp_path):
    whole = run(tmp_path, num_server_rounds=4, schedule="static")
    path = run(tmp_path, schedule="static")  # a density that falls would have reached its target
    assert run(tmp_path, num_server_rounds=4, schedule="static", resume=str(path)) == path
    assert (path / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert summary(path)["resumed_after"] == [2]
    lines = [[json.loads(line) for line in (each / "metrics.jsonl").read_text().splitlines()] for each in (path, whole)]
    for key in ("round", "nodes", "accuracy", "train_loss"):
        assert [line[key] for line in lines[0]] == [line[key] for line in lines[1]]
    about = json.loads((path / "config.json").read_text())
    assert about["config"]["num-server-rounds"] == 2
    (resumed,) = about["resumed"]
    assert resumed["after"] == 2
    assert resumed["config"]["num-server-rounds"] == 4
    assert resumed["versions"] == about["versions"]
    assert resumed["source"] == about["source"]


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        ({"method": "fedavg"}, {}, "method was 'fedavg' there, and is now 'autoflip'"),
        ({}, {"lr": 0.5}, "lr was 0.003 there, and is now 0.5"),
        ({"checkpoints": 0}, {}, "it has rounds, but none of their checkpoints: begin a new run"),
    ],
)
def test_a_record_that_cannot_go_on_is_left_as_it_is(first, then, message, tmp_path):
    path = run(tmp_path, **first)
    before = {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, resume=str(path), **then)
    assert {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()} == before


def test_nodes_that_lack_the_mask_and_replies_that_are_left_out_are_counted_right(tmp_path):
    values = {"output-dir": str(tmp_path), "num-server-rounds": 2, "local-epochs": 1, "exploration-epochs": 1}

    def spoil(reply):
        head = reply.content.get("autoflip")
        if reply.metadata.src_node_id == 103 and head is not None and head.get("phase") == "train":
            for record in reply.content.metric_records.values():
                record["num-examples"] = -1
        return reply

    grid = LocalGrid(client.app, 4, values, forget=lambda node, handled: node == 101 and handled == 3, tamper=spoil)
    path = server.run(grid, Config.from_run_config(values))
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [line["nodes"] for line in lines if line["phase"] == "train"] == [0, 3, 3]
    incidents = json.loads((path / "incidents.json").read_text())
    assert [(each["kind"], each["round"], each["node"]) for each in incidents] == [
        ("rejected", 1, 3),
        ("rejected", 2, 3),
    ]


def test_an_exploration_is_shared_and_charged_to_each_run(tmp_path):
    first = run(tmp_path)
    shared = run(tmp_path, exploration=str(first / "exploration.safetensors"))
    again = run(tmp_path, exploration=str(first / "checkpoint" / "exploration.safetensors"))
    assert (shared / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert summary(shared)["bytes"] == summary(again)["bytes"]
    assert (first / "model.safetensors").read_bytes() == (shared / "model.safetensors").read_bytes()
    charged = [{k: v for k, v in summary(p)["bytes"].items() if k.startswith("exploration")} for p in (first, shared)]
    assert charged[0] == charged[1]
    assert summary(first)["flops_total"] == summary(shared)["flops_total"]
    with pytest.raises(ConfigError, match=r"exploration = .*: seed was 1, and is now 9"):
        run(tmp_path, seed=9, exploration=str(first / "exploration.safetensors"))
    with pytest.raises(ConfigError, match="not an exploration"):
        run(tmp_path, exploration=str(first / "model.safetensors"))


def test_fedavg_starts_from_the_same_model_and_samples_the_same_nodes(tmp_path):
    dense, full = run(tmp_path, method="fedavg"), run(tmp_path, sparsity=0.0)
    assert (dense / "model.safetensors").read_bytes() == (full / "model.safetensors").read_bytes()
    assert summary(dense)["bytes"]["exploration_up"] == 0
    assert not (dense / "mask.safetensors").exists()
    # what the record calls dense FedAvg messages is what FedAvg really sent
    told = summary(dense)
    assert told["dense_bytes"] == pytest.approx(told["bytes"]["train_up"] + told["bytes"]["train_down"], rel=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"server_momentum": 0.9, "server_learning_rate": 0.1, "initial": "explorers"},
        {"scope": "layer", "normalisation": "per-client", "gamma": 0.0, "prune_biases": True},
        {"normalisation": "layer", "exploration_weighting": "examples", "exploration_batches": 2, "explorers": 0.5},
        {"split": "pathological", "fraction_train": 0.5, "optimizer": "sgd", "momentum": 0.9, "weight_decay": 1e-4},
        {"split": "iid", "model": "twocnn", "num_server_rounds": 1},
    ],
)
def test_every_way_to_run_it_runs(tmp_path, settings):
    told = summary(run(tmp_path, nodes=5 if "split" in settings else 3, **settings))
    assert np.isfinite(told["final_accuracy"])
    assert told["failures"]["errors"] == 0


def test_real_data_runs(tmp_path, data_dir):
    for dataset in ("mnist", "cifar10"):
        values = {
            "dataset": dataset,
            "data_dir": str(data_dir),
            "num_server_rounds": 1,
            "batch_size": 64,
            "split": "iid",
        }
        told = summary(run(tmp_path, nodes=100, fraction_train=0.02, explorers=0.02, exploration_epochs=1, **values))
        assert told["final_accuracy"] > 0.05


def node(**config: bool | int | float | str) -> Context:
    return Context(1, 1, {key.replace("_", "-"): value for key, value in config.items()}, RecordDict(), MNIST)


MNIST: dict[str, bool | int | float | str] = {"dataset": "mnist", "split": "iid", "data-dir": "/no/such/folder"}


def examples_of(context: Context) -> torch.Tensor:
    examples = client.client_fn(context).numpy_client._examples
    return examples.batch(torch.arange(len(examples)))[0]


def test_a_node_trains_on_the_folder_of_its_own_config(tmp_path):
    folders = [write_data(tmp_path / str(part), part, 2) for part in range(2)]
    first, second = (examples_of(node(partition_id=i, data_dir=str(folder))) for i, folder in enumerate(folders))
    assert len(first) == len(second) == 48
    assert not torch.equal(first, second)
    part = examples_of(node(partition_id=1, num_partitions=3, data_dir=str(folders[0])))
    assert len(part) == 16


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"partition_id": 0},
        {"partition_id": 2, "num_partitions": 2},
        {"partition_id": 0, "num_partitions": 0, "data_dir": "/d"},
        {"partition_id": -1, "data_dir": "/d"},
        {"partition_id": "0", "data_dir": "/d"},
        {"data_dir": "/d"},
    ],
)
def test_a_node_config_that_cannot_be_is_refused(config):
    with pytest.raises(ConfigError, match="node config partition-id = "):
        client.client_fn(node(**config))


def test_too_few_nodes_is_said_before_any_client_works(tmp_path):
    grid = LocalGrid(client.app, 2, {})
    config = Config.from_run_config({"nodes": 4, "node-timeout": 0.3, "output-dir": str(tmp_path)})
    with pytest.raises(
        ConfigError, match=r"nodes = 4: 2 nodes have connected within 0.3 s, but 4 are needed; start more"
    ):
        server.run(grid, config)
    assert all("arrays" not in message.content for message in grid.sent)
    assert list(tmp_path.iterdir()) == []


def test_a_split_that_cannot_be_is_said_before_any_client_works(tmp_path):
    with pytest.raises(ConfigError, match="classes-per-client"):
        run(tmp_path, nodes=3, split="pathological", classes_per_client=2)
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_is_not_there_is_named():
    there = choose_device("auto").type
    missing = "mps" if there != "mps" else "cuda"
    with pytest.raises(ConfigError, match=f"device = '{missing}': not available here"):
        choose_device(missing)


def test_seeds_depend_on_every_part():
    seeds = {seed_of(s, e, r, p) for s in (1, 2) for e in (0, 1) for r in (1, 2) for p in (0, 1)}
    assert len(seeds) == 16
    assert seed_of(1, 0, 1, 0) == seed_of(1, 0, 1, 0)


def autoflip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "autoflip"), "run", str(REPOSITORY), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=REPOSITORY)


def only(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_flwr_run_learns_the_digits_as_a_suite_does_and_leaves_its_record(tmp_path):
    done = autoflip("-c", f'num-server-rounds=6 local-epochs=2 output-dir="{tmp_path}"')
    assert done.returncode == 0, done.stdout + done.stderr
    folder = only(tmp_path)
    told = summary(folder)
    assert told["rounds"] == 6
    assert told["final_accuracy"] > 0.6
    assert told["failures"] == NO_FAILURES
    assert "Saving" in done.stdout
    assert "[round 6/6] accuracy" in done.stdout
    other = run_in_process(Config(num_server_rounds=6, local_epochs=2, nodes=10), tmp_path / "other")
    assert (other / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    for phase in ("exploration", "train"):
        for way in ("up", "down"):  # ids of run, nodes and tasks are random numbers, of 9 or 10 bytes each
            apart = summary(other)["bytes"][f"{phase}_{way}"] - told["bytes"][f"{phase}_{way}"]
            assert abs(apart) <= 8 * (60 if phase == "train" else 10)


def test_nothing_pruned_equals_fedavg_bit_for_bit_under_ray(tmp_path):
    models = []
    for name, settings in (("autoflip", "sparsity=0.0"), ("fedavg", 'method="fedavg"')):
        folder = tmp_path / name
        done = autoflip("--nodes", "3", "-c", f'num-server-rounds=2 local-epochs=1 {settings} output-dir="{folder}"')
        assert done.returncode == 0, done.stdout + done.stderr
        models.append((only(folder) / "model.safetensors").read_bytes())
    assert models[0] == models[1]
