"""What a mask prunes is kept once for each mask, beside packed models; masks that change go on after a crash."""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest
from apps import Killed, arrays_of, message_app, model, record, same_bytes
from flwr.app import MetricRecord
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM
from safetensors.numpy import load_file

import autoflip_flwr.storage.checkpoint as checkpoint
from autoflip_flwr import AutoFlip, Layout, Mask
from autoflip_flwr.core.choices import PACKINGS
from autoflip_flwr.core.methods import LossExploration
from autoflip_flwr.storage import sealed
from autoflip_flwr.storage.checkpoint import CheckpointError, Checkpoints, DamagedError
from autoflip_flwr.testing import LocalGrid

NODES = 2
ROUNDS = 6
GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guide.md"


def schedule(round_, mask):
    """Another mask in rounds 3 and 5."""
    if round_ not in (3, 5):
        return None
    draw = np.random.default_rng(round_)
    return Mask.from_bool(mask.layout, {spec.name: draw.random(spec.shape) < 0.5 for spec in mask.layout.prunable})


def run(folder, *, inner=FedAvg, dies_in=None, resume=False, rounds=ROUNDS, keep=2, arrays=None, sets=None, **options):
    """A process of its own, as it were; it dies in the evaluation of round ``dies_in``."""
    random.seed(1)
    np.random.seed(1)
    checkpoints = None if folder is None else Checkpoints(folder, resume=resume, keep=keep)
    options = {"sparsity": 0.5, "mask_schedule": schedule, "method": LossExploration.static(epochs=1), **options}
    made = {"server_momentum": 0.9} if inner is FedAvgM else {}
    strategy = AutoFlip(inner(fraction_evaluate=0.0, **made), seed=3, checkpoints=checkpoints, **options)

    def evaluate(round_, found):
        if round_ == dies_in:
            raise Killed
        if sets is not None and round_ == sets[0]:
            strategy.mask = sets[1]
        return MetricRecord({"sum": float(sum(np.abs(array.numpy()).sum() for array in found.values()))})

    arrays = record(model()) if arrays is None else arrays
    result = strategy.start(LocalGrid(message_app(), NODES), arrays, num_rounds=rounds, evaluate_fn=evaluate)
    return result, strategy


def same(left, right):
    same_bytes(arrays_of(left.arrays), arrays_of(right.arrays))


def names(folder, kind):
    return sorted(path.name for path in folder.glob(f"{kind}-*.safetensors"))


@pytest.mark.parametrize("coordinates", PACKINGS)
@pytest.mark.parametrize("inner", [FedAvg, FedAvgM, FedAdam])
def test_masks_that_change_go_on_bit_for_bit(inner, coordinates, tmp_path):
    whole, first = run(None, inner=inner, coordinates=coordinates)
    for dies_in in (3, 6):
        folder = tmp_path / str(dies_in)
        with pytest.raises(Killed):
            run(folder, inner=inner, coordinates=coordinates, dies_in=dies_in)
        resumed, second = run(folder, inner=inner, coordinates=coordinates, resume=True)
        same(resumed, whole)
        assert second.mask == first.mask


def test_a_round_holds_the_kept_values_and_each_mask_its_shadow(tmp_path):
    _, strategy = run(tmp_path, keep=3)
    assert names(tmp_path, "round") == [f"round-{round_:06d}.safetensors" for round_ in (4, 5, 6)]
    assert names(tmp_path, "shadow") == ["shadow-000001.safetensors", "shadow-000002.safetensors"]
    kept = load_file(tmp_path / "round-000006.safetensors")
    held = {name.removeprefix("model/"): array for name, array in kept.items() if name.startswith("model/")}
    assert {name: array.shape for name, array in held.items()} == {
        name: strategy.mask.packed_shape(name) for name in model()
    }
    shadow = load_file(tmp_path / "shadow-000002.safetensors")
    assert {name: array.shape for name, array in shadow.items()} == {
        name: array.shape for name, array in model().items()
    }


def test_a_shadow_is_written_once_and_goes_with_the_last_round_that_needs_it(tmp_path, monkeypatch):
    written = []
    write = sealed.write_atomic
    monkeypatch.setattr(sealed, "write_atomic", lambda path, data: (written.append(path.name), write(path, data)))
    run(tmp_path)
    assert [name for name in written if name.startswith("shadow")] == [
        "shadow-000001.safetensors",
        "shadow-000002.safetensors",
    ]
    assert names(tmp_path, "shadow") == ["shadow-000002.safetensors"]  # rounds 5 and 6


def test_a_static_mask_needs_none(tmp_path):
    run(tmp_path, mask_schedule=None)
    assert names(tmp_path, "shadow") == []


def test_scouts_have_moved_what_their_mask_prunes(tmp_path):
    whole, _ = run(None, method=LossExploration.static(initial="explorers"))
    with pytest.raises(Killed):
        run(tmp_path, dies_in=2, method=LossExploration.static(initial="explorers"))
    assert names(tmp_path, "shadow") == ["shadow-000000.safetensors"]
    (tmp_path / "exploration.safetensors").unlink()
    same(run(tmp_path, resume=True, method=LossExploration.static(initial="explorers"))[0], whole)


@pytest.mark.parametrize("how", ["cut", "flipped", "gone", "another"])
def test_a_shadow_that_cannot_be_used_is_named(how, tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, dies_in=4)
    path = tmp_path / "shadow-000001.safetensors"
    data = bytearray(path.read_bytes())
    if how == "another":
        arrays = {name: array + 1 for name, array in load_file(path).items()}
        kept = Checkpoints(tmp_path)
        kept._settings = sealed.read_sealed(path)[0]["settings"]
        kept._write_shadow(1, arrays)
    elif how == "gone":
        path.unlink()
    else:
        data[-3] ^= 1
        path.write_bytes(data[:-7] if how == "cut" else data)
    text = r"round-000003.* shadow-000001.*not there" if how == "gone" else r"shadow-000001.* round-000003"
    with pytest.raises(DamagedError, match=f"{text}.*without it the run goes on from round-000002"):
        run(tmp_path, resume=True)
    (tmp_path / "round-000003.safetensors").unlink()
    same(run(tmp_path, resume=True)[0], run(None)[0])  # it is written anew


@pytest.mark.parametrize("which", ["shadow", "round"])
def test_a_crash_between_the_two_files_loses_no_finished_round(which, tmp_path, monkeypatch):
    whole, _ = run(None)
    write = sealed.write_atomic

    def crash(path, data):
        if path.name == {"shadow": "shadow-000001.safetensors", "round": "round-000003.safetensors"}[which]:
            raise Killed
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(sealed, "write_atomic", crash)
        with pytest.raises(Killed):
            run(tmp_path)
    assert names(tmp_path, "round")[-1] == "round-000002.safetensors"
    same(run(tmp_path, resume=True)[0], whole)


def test_a_full_disk_keeps_the_shadow_that_is_needed(tmp_path, monkeypatch, caplog):
    write = sealed.write_atomic

    def full(path, data):
        if path.name == "round-000005.safetensors":
            raise OSError(28, "No space left")
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(sealed, "write_atomic", full)
        with pytest.raises(Killed):
            run(tmp_path, dies_in=6)
    assert "the checkpoint of round 5 could not be written" in caplog.text
    assert names(tmp_path, "round") == ["round-000003.safetensors", "round-000004.safetensors"]
    same(run(tmp_path, resume=True)[0], run(None)[0])


def test_a_mask_that_was_set_but_is_not_in_force_yet_is_kept(tmp_path):
    layout = Layout.of(model())
    mask = Mask.from_bool(
        layout, {spec.name: np.arange(spec.size).reshape(spec.shape) % 3 > 0 for spec in layout.prunable}
    )
    options = {"mask_schedule": None, "sets": (2, mask)}
    whole, first = run(None, **options)
    with pytest.raises(Killed):
        run(tmp_path, dies_in=3, **options)
    resumed, second = run(tmp_path, resume=True, mask_schedule=None)
    same(resumed, whole)
    assert second.mask == first.mask


def test_a_second_start_with_checkpoints_keeps_the_values_of_the_first(tmp_path):
    def start(strategy, arrays, rounds, **options):
        random.seed(1)
        np.random.seed(1)
        return strategy.start(LocalGrid(message_app(), NODES), arrays, num_rounds=rounds, **options)

    def make(arrays):
        strategy = AutoFlip(FedAvg(fraction_evaluate=0.0), seed=3, sparsity=0.5, method=LossExploration.static())
        first = start(strategy, arrays, 1)
        strategy.mask_schedule = schedule
        return strategy, first

    def die(round_, _):
        if round_ == 3:
            raise Killed

    strategy, first = make(record(model()))
    whole = start(strategy, first.arrays, 4)
    strategy, _ = make(record(model()))
    strategy.checkpoints = Checkpoints(tmp_path)
    with pytest.raises(Killed):
        start(strategy, first.arrays, 4, evaluate_fn=die)
    assert "shadow-000000.safetensors" in names(tmp_path, "shadow")
    strategy.checkpoints = Checkpoints(tmp_path, resume=True)
    same(start(strategy, first.arrays, 4), whole)


def test_an_older_format_is_refused_in_words(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "CHECKPOINT_FORMAT", 1)
        with pytest.raises(Killed):
            run(tmp_path, dies_in=2)
    with pytest.raises(
        CheckpointError, match="has format 1, this version reads 2: finish the run with the version that"
    ):
        run(tmp_path, resume=True)


def test_the_schedule_of_the_guide_survives_a_resume(tmp_path):
    code = next(
        block for block in re.findall(r"```python\n(.*?)```", GUIDE.read_text("utf-8"), re.S) if "model[name]" in block
    )
    told = {"np": np, "Mask": Mask}
    exec(code.split("strategy =")[0], told)
    options = {"mask_schedule": told["schedule"], "rounds": 12}
    whole, first = run(None, **options)
    assert first.mask.kept == 16  # of 33: the median itself is dropped
    for dies_in in (9, 10, 11):
        folder = tmp_path / str(dies_in)
        with pytest.raises(Killed):
            run(folder, dies_in=dies_in, **options)
        resumed, second = run(folder, resume=True, **options)
        same(resumed, whole)
        assert second.mask == first.mask
