"""What stands outside the mask goes on after a crash, bit for bit, and is kept once, or not at all."""

from __future__ import annotations

import random

import numpy as np
import pytest
from apps import arrays_of, message_app, model, record
from flwr.app import MetricRecord
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM
from safetensors.numpy import load_file

from autoflip_flwr import AutoFlip, Mask
from autoflip_flwr.core.methods import LossExploration
from autoflip_flwr.storage.checkpoint import CheckpointError, Checkpoints, DamagedError
from autoflip_flwr.testing import LocalGrid

NODES, ROUNDS = 3, 5


class Killed(BaseException):
    """As if the process had been killed."""


def schedule(round_, mask):
    """Another mask in round 3."""
    if round_ != 3:
        return None
    draw = np.random.default_rng(round_)
    return Mask.from_bool(mask.layout, {spec.name: draw.random(spec.shape) < 0.5 for spec in mask.layout.prunable})


def run(folder, *, inner=FedAvg, dies_in=None, resume=False, grid=None, **options):
    """A process of its own, as it were; it dies in the evaluation of round ``dies_in``."""
    random.seed(1)
    np.random.seed(1)
    checkpoints = None if folder is None else Checkpoints(folder, resume=resume)
    options = {"sparsity": 0.5, "method": LossExploration.static(epochs=1), "outside": "initial", **options}
    strategy = AutoFlip(inner(fraction_evaluate=0.0), seed=3, checkpoints=checkpoints, **options)

    def evaluate(round_, found):
        if round_ == dies_in:
            raise Killed
        return MetricRecord({"sum": float(sum(np.abs(array.numpy()).sum() for array in found.values()))})

    grid = LocalGrid(message_app(), NODES) if grid is None else grid
    return strategy.start(grid, record(model()), num_rounds=ROUNDS, evaluate_fn=evaluate)


def same(left, right):
    left, right = arrays_of(left.arrays), arrays_of(right.arrays)
    assert list(left) == list(right)
    for name in left:
        assert left[name].tobytes() == right[name].tobytes(), name


def files(folder):
    return sorted(path.name for path in folder.glob("*.safetensors"))


@pytest.mark.runs
@pytest.mark.parametrize("dies_in", range(ROUNDS + 1))
@pytest.mark.parametrize("masks", [None, schedule], ids=["static", "changing"])
@pytest.mark.parametrize("initial", ["scratch", "explorers"])
def test_the_end_is_bit_identical_wherever_it_was_interrupted(initial, masks, dies_in, tmp_path):
    options = {"mask_schedule": masks, "method": LossExploration.static(initial=initial)}
    whole = run(None, **options)
    with pytest.raises(Killed):
        run(tmp_path, dies_in=dies_in, **options)
    assert ("base.safetensors" in files(tmp_path)) == (initial == "explorers")
    same(run(tmp_path, resume=True, **options), whole)


@pytest.mark.parametrize("coordinates", ["packed", "dense"])
@pytest.mark.parametrize("inner", [FedAvgM, FedAdam])
def test_so_with_a_servers_optimiser(inner, coordinates, tmp_path):
    options = {
        "mask_schedule": schedule,
        "inner": inner,
        "coordinates": coordinates,
        "method": LossExploration.static(initial="explorers"),
    }
    whole = run(None, **options)
    with pytest.raises(Killed):
        run(tmp_path, dies_in=4, **options)
    same(run(tmp_path, resume=True, **options), whole)


def test_again_and_again_on_nodes_that_stay(tmp_path):
    whole = run(None, mask_schedule=schedule, method=LossExploration.static(initial="explorers"))
    grid = LocalGrid(message_app(), NODES)
    for dies_in in (2, 3, 5):
        with pytest.raises(Killed):
            run(
                tmp_path,
                dies_in=dies_in,
                resume=dies_in > 2,
                grid=grid,
                mask_schedule=schedule,
                method=LossExploration.static(initial="explorers"),
            )
    same(
        run(
            tmp_path, resume=True, grid=grid, mask_schedule=schedule, method=LossExploration.static(initial="explorers")
        ),
        whole,
    )


def test_rounds_hold_kept_values_and_the_base_is_written_once(tmp_path):
    run(tmp_path, mask_schedule=schedule, method=LossExploration.static(initial="explorers"))
    assert files(tmp_path) == [
        "base.safetensors",
        "exploration.safetensors",
        "round-000004.safetensors",
        "round-000005.safetensors",
        "shadow-000001.safetensors",
    ]
    assert set(load_file(tmp_path / "base.safetensors")) == {"hidden.weight", "out.weight"}
    sizes = sorted(array.size for array in load_file(tmp_path / "round-000005.safetensors").values() if array.ndim)
    assert not {48, 18} & set(sizes)
    static = tmp_path / "static"
    run(static, method=LossExploration.static(initial="explorers"))
    assert "shadow-000000.safetensors" not in files(static)  # the base has it
    run(tmp_path / "scratch")
    assert files(tmp_path / "scratch")[0] == "exploration.safetensors"


def test_without_the_exploration_it_is_there_all_the_same(tmp_path):
    whole = run(None, method=LossExploration.static(initial="explorers"))
    with pytest.raises(Killed):
        run(tmp_path, dies_in=3, method=LossExploration.static(initial="explorers"))
    (tmp_path / "exploration.safetensors").unlink()
    same(run(tmp_path, resume=True, method=LossExploration.static(initial="explorers")), whole)


def test_a_base_that_is_gone_or_damaged_is_named(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, dies_in=3, method=LossExploration.static(initial="explorers"))
    path = tmp_path / "base.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-5])
    with pytest.raises(
        DamagedError, match=r"base\.safetensors is damaged .*, and round-000002\.safetensors, which nee"
    ):
        run(tmp_path, resume=True, method=LossExploration.static(initial="explorers"))
    path.unlink()
    with pytest.raises(DamagedError, match=r"is of no use without base\.safetensors, which is not there: remove it$"):
        run(tmp_path, resume=True, method=LossExploration.static(initial="explorers"))


def test_a_run_does_not_go_on_with_something_else_outside(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, dies_in=3)
    with pytest.raises(CheckpointError, match="outside was 'initial', and is now 'zero'"):
        run(tmp_path, resume=True, outside="zero")
