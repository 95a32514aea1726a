"""One file holds an exploration, whoever writes it, and is used wherever one is asked for."""

from __future__ import annotations

import numpy as np
import pytest
from apps import message_app, model, record
from flwr.serverapp.strategy import FedAvg
from safetensors.numpy import load_file, save_file

from autoflip_flwr import AutoFlip, Exploration
from autoflip_flwr.storage.checkpoint import CheckpointError, Checkpoints, DamagedError
from autoflip_flwr.storage.exploration_file import (
    ExplorationFileError,
    StoredExploration,
    read_exploration,
    write_exploration,
)
from autoflip_flwr.storage.sealed import read_sealed, write_sealed
from autoflip_flwr.testing import LocalGrid

FOUND = Exploration(
    {"a/b": np.array([1e-300, 2.0]), "": np.ones((2, 1), np.float32)},
    {"a/b": np.array([1.0, -2.0]), "": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))},
    {},
    explorers=3,
)
COST = {"up": 10, "seconds": 0.1}


def same(left: Exploration, right: Exploration) -> None:
    assert left.explorers == right.explorers
    for name in ("deviation", "signed_mean", "normalised"):
        one, two = getattr(left, name), getattr(right, name)
        assert one.keys() == two.keys()
        for key in one:
            assert (one[key].dtype, one[key].shape) == (two[key].dtype, two[key].shape)
            assert one[key].tobytes() == two[key].tobytes()


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "explored.safetensors"
    write_exploration(path, FOUND, model(), settings={"lr": 0.1, "seed": 1}, cost=COST, seconds=2.5)
    return path


def test_it_comes_back_as_it_was(path):
    for initial in (model(), record(model()), None):
        found = read_exploration(str(path), initial, settings={"lr": 0.1, "other": 5})
        same(found.exploration, FOUND)
        assert (found.cost, found.seconds, found.checkpoint) == (COST, 2.5, {})


def test_only_the_explorers_and_the_model_must_be_told(tmp_path):
    write_exploration(tmp_path / "x", FOUND, record(model()))
    found = read_exploration(tmp_path / "x", model(), settings={"seed": 1})
    assert (found.cost, found.seconds, found.settings) == ({}, 0.0, {})


def test_another_start_is_refused(path):
    with pytest.raises(ExplorationFileError, match=r"explored.safetensors: made from another initial model: an expl"):
        read_exploration(path, model(1))
    with pytest.raises(
        ExplorationFileError, match=r"explored.safetensors: seed was 1, and is now 2: an exploration fits"
    ):
        read_exploration(path, model(), settings={"lr": 0.1, "seed": 2})
    with pytest.raises(FileNotFoundError):
        read_exploration(path.with_name("none"), model())


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "text", "another's"])
def test_a_damaged_file_is_named_with_what_to_do(how, path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    if how == "another's":
        save_file(load_file(path), path)
    else:
        path.write_bytes({"cut": data[:-5], "flipped": data, "empty": b"", "text": b"nothing of the kind"}[how])
    with pytest.raises(
        ExplorationFileError, match=r"explored.safetensors: damaged, or .* remove it and explore"
    ) as told:
        read_exploration(path, model())
    assert told.value.damaged


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"kind": "mask"}, "not an exploration: give the exploration.safetensors of a run"),
        ({"format": 0}, "has format 0, this version reads 1: explore again"),
        ({"explorers": "many"}, "not an exploration"),
        ({"cost": None}, "not an exploration"),
        ({"settings": 3}, "not an exploration"),
    ],
)
def test_whole_files_of_another_kind_are_refused(change, told, path):
    about, arrays = read_sealed(path)
    write_sealed(path, {**about, **change}, arrays)
    with pytest.raises(ExplorationFileError, match=f"explored.safetensors: {told}"):
        read_exploration(path, model())
    write_sealed(path, about, {**arrays, "other/delta/w": np.ones(1)})
    with pytest.raises(ExplorationFileError, match=r"not an exploration \(KeyError\('other'\)\): give another file"):
        read_exploration(path, model())


def run(**options):
    strategy = AutoFlip(FedAvg(fraction_evaluate=0.0), seed=3, **options)
    strategy.start(LocalGrid(message_app(), 3), record(model()), num_rounds=1)
    return strategy


def test_a_checkpoints_file_serves_another_run(tmp_path):
    first = run(checkpoints=Checkpoints(tmp_path, settings={"seed": 7}))
    found = read_exploration(tmp_path / "exploration.safetensors", model(), settings={"seed": 7})
    same(found.exploration, first.exploration)
    second = run(exploration=found.exploration)
    assert second.mask == first.mask
    second.ledger.charge_exploration(found.cost)
    assert second.ledger.exploration_only()["up"] == first.ledger.up["exploration"] > 0
    with pytest.raises(ExplorationFileError, match="seed was 7, and is now 8"):
        read_exploration(tmp_path / "exploration.safetensors", None, settings={"seed": 8})


def test_a_checkpoint_refuses_what_is_not_its_own(tmp_path):
    write_exploration(tmp_path / "exploration.safetensors", FOUND, model())
    with pytest.raises(
        CheckpointError, match=r"is not of a checkpoint: move it elsewhere, and give it as exploration="
    ):
        run(checkpoints=Checkpoints(tmp_path, resume=True))
    StoredExploration(FOUND.statistics, "", checkpoint={"settings": {"seed": 1}}).write(
        tmp_path / "exploration.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"exploration.safetensors belongs to another run: .* was "):
        run(checkpoints=Checkpoints(tmp_path, resume=True))
    (tmp_path / "exploration.safetensors").write_bytes(b"torn")
    with pytest.raises(DamagedError, match=r"exploration.safetensors: damaged, .*: remove it"):
        run(checkpoints=Checkpoints(tmp_path, resume=True))
