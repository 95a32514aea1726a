"""Hooks that follow a run: what they are told, of AutoFLIP and of plain strategies, and what they cannot end."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping

import numpy as np
import pytest
from apps import Killed, arrays_of, message_app, model, record, same_bytes
from flwr.app import ConfigRecord, MetricRecord
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAdam, FedAvg

from autoflip_flwr import AutoFlip, Checkpoints, Hook, Round, follow
from autoflip_flwr.core.methods import LossExploration
from autoflip_flwr.server.grid import OrderedGrid
from autoflip_flwr.testing import LocalGrid


class Notes(Hook):
    def __init__(self) -> None:
        self.settings, self.after, self.rounds = {}, None, []
        self.totals, self.failure = None, None

    def began(self, settings: Mapping[str, object], after: int) -> None:
        assert not self.rounds
        self.settings, self.after = dict(settings), after

    def round(self, round_: Round) -> None:
        self.rounds.append(round_)

    def ended(self, totals: Mapping[str, float], failure: str) -> None:
        assert self.totals is None
        self.totals, self.failure = dict(totals), failure

    @property
    def numbers(self) -> list[int]:
        return [each.number for each in self.rounds]

    def of(self, name: str) -> list[float | None]:
        return [each.values.get(name) for each in self.rounds]


def central(round_: int, arrays) -> MetricRecord:
    return MetricRecord({"accuracy": round_ / 10, "by-class": [0.5, 0.5]})


def run(strategy, rounds=2, nodes=3, evaluate_fn=central, grid=None, **options):
    random.seed(0)  # Flower's strategies sample by it
    grid = grid or LocalGrid(message_app(), nodes)
    return grid, strategy.start(grid, record(model()), num_rounds=rounds, evaluate_fn=evaluate_fn, **options)


def test_a_hook_is_told_each_round_of_autoflip():
    notes = Notes()
    plain = AutoFlip(FedAvg(), 0.5, seed=3, method=LossExploration.static())
    strategy = follow(plain, notes, settings={"lr": 0.1})
    _, result = run(strategy, timeout=60.0)
    assert isinstance(strategy, AutoFlip)
    assert strategy.mask is plain.mask is not None
    assert notes.after == 0
    told = {"strategy": "FedAvg()", "sparsity": 0.5, "seed": 3, "num_rounds": 2, "timeout": 60.0, "lr": 0.1}
    assert told.items() <= notes.settings.items()
    assert notes.settings["method"] == repr(LossExploration.static())
    assert notes.settings["FedAvg.fraction_train"] == 1.0
    assert notes.numbers == [0, 1, 2]
    assert notes.of("train/train-loss") == [None, 1.0, 1.0]
    assert notes.of("evaluate/loss") == [None, 0.5, 0.5]
    assert notes.of("central/accuracy") == [0.0, 0.1, 0.2]
    assert notes.of("central/by-class") == [None] * 3
    assert notes.of("replies/train") == notes.of("replies/evaluate") == [0, 3, 3]
    assert notes.of("density") == [strategy.mask.density] * 3
    assert notes.of("bytes/total")[-1] == strategy.ledger.bytes_by_phase()["total"]
    assert notes.of("bytes/exploration_up") == [strategy.ledger.up["exploration"]] * 3
    assert notes.of("bytes/train_up")[0] == 0 < notes.of("bytes/train_up")[1] < notes.of("bytes/train_up")[2]
    assert all(seconds >= 0 for seconds in notes.of("seconds/round"))
    same_bytes(arrays_of(notes.rounds[-1].arrays), arrays_of(result.arrays))
    assert notes.failure == ""
    assert notes.totals["rounds"] == 2
    assert notes.totals["replies/train"] == 6
    assert notes.totals["bytes"] == strategy.ledger.bytes_by_phase()["total"]
    dense = strategy.ledger.dense_bytes_by_phase(record(model()))["total"]
    assert notes.totals["bytes_of_dense"] == dense


@pytest.mark.parametrize("make", [FedAvg, lambda: FedAdam(), lambda: AutoFlip(FedAvg(), 0.5, seed=1)])
def test_a_hook_changes_nothing(make):
    _, alone = run(make())
    _, followed = run(follow(make(), Notes()))
    same_bytes(arrays_of(alone.arrays), arrays_of(followed.arrays))
    assert str(alone.train_metrics_clientapp) == str(followed.train_metrics_clientapp)
    assert str(alone.evaluate_metrics_serverapp) == str(followed.evaluate_metrics_serverapp)


def test_a_plain_strategy_is_followed_and_its_bytes_are_counted():
    notes = Notes()
    run(follow(FedAvg(fraction_evaluate=0.0), notes))
    counting, _ = run(FedAvg(fraction_evaluate=0.0), grid=OrderedGrid(LocalGrid(message_app(), 3)))
    assert notes.settings["strategy"] == "FedAvg()"
    assert notes.settings["FedAvg.fraction_evaluate"] == 0.0
    assert notes.numbers == [0, 1, 2]
    assert notes.of("train/train-loss") == [None, 1.0, 1.0]
    assert notes.of("replies/train") == [0, 3, 3]
    assert notes.of("density") == [1.0] * 3
    assert notes.of("bytes/total")[-1] == counting.ledger.bytes_by_phase()["total"] == notes.totals["bytes"]
    assert notes.totals["bytes_of_dense"] == pytest.approx(notes.totals["bytes"], rel=0.05)


def test_a_run_without_central_evaluation_is_followed_too():
    notes = Notes()
    _, result = run(follow(FedAvg(), notes), evaluate_fn=None)
    assert notes.numbers == [0, 1, 2]
    assert notes.of("evaluate/loss") == [None, 0.5, 0.5]
    same_bytes(arrays_of(notes.rounds[0].arrays), model())
    same_bytes(arrays_of(notes.rounds[-1].arrays), arrays_of(result.arrays))


class OwnLoop(FedAvg):
    """As projects write it: a loop of its own, which evaluates each second round, and names its parameters itself."""

    def start(self, grid, initial_arrays, num_rounds=3, evaluate_fn=None, patience=0):
        arrays = initial_arrays
        for round_ in range(1, num_rounds + 1):
            messages = self.configure_train(round_, arrays, ConfigRecord(), grid)
            arrays, _ = self.aggregate_train(round_, grid.send_and_receive(messages, timeout=60.0))
            if round_ % 2 == 0:
                evaluate_fn(server_round=round_, arrays=arrays)
        return arrays, patience


@pytest.mark.parametrize("around", [lambda own: own, lambda own: AutoFlip(own, 0.5)], ids=["alone", "in AutoFlip"])
def test_a_strategy_with_a_loop_of_its_own_is_followed(around):
    notes = Notes()

    def evaluate(server_round, arrays):
        return MetricRecord({"accuracy": server_round / 10})

    strategy = follow(around(OwnLoop()), notes)
    _, result = run(strategy, rounds=3, evaluate_fn=evaluate, patience=4)
    assert result[1] == 4
    assert notes.numbers == [0, 1, 2, 3]
    assert notes.of("central/accuracy") == [None, None, 0.2, None]
    assert notes.of("train/train-loss") == [None, 1.0, 1.0, 1.0]
    assert notes.of("bytes/train_up")[1] > 0
    same_bytes(arrays_of(notes.rounds[-1].arrays), arrays_of(result[0]))


def test_failures_are_those_of_the_round():
    notes = Notes()
    app = message_app()

    def tamper(reply):
        if reply.content["autoflip"].get("round") == 1 and reply.metadata.src_node_id == 101:
            reply.content["metrics"]["num-examples"] = -1
        return reply

    grid = LocalGrid(app, 3, tamper=tamper)
    follow(AutoFlip(FedAvg(fraction_evaluate=0.0), 0.5), notes).start(grid, record(model()), num_rounds=2)
    assert notes.of("failures/rejected") == [0, 1, 0]
    assert notes.totals["failures/rejected"] == 1


@pytest.mark.parametrize("method", ["began", "round", "ended"])
def test_a_hook_that_fails_ends_no_run_and_is_named_once(method, caplog):
    class Broken(Notes):
        pass

    def fail(*_):
        raise OSError("no space left on device")

    broken, notes = Broken(), Notes()
    setattr(broken, method, fail)
    _, result = run(follow(FedAvg(), broken, notes))
    assert result.arrays is not None
    assert notes.numbers == [0, 1, 2]
    found = [each.message for each in caplog.records if each.levelno == logging.WARNING]
    assert found == ["Broken has failed and is left out from now on: no space left on device"]
    assert broken.totals is None


def test_a_run_that_fails_says_why_and_shows_no_half_round():
    notes = Notes()

    def evaluate(round_, arrays):
        if round_ == 2:
            raise ValueError("the test set\nis gone")
        return MetricRecord({"accuracy": 0.5})

    with pytest.raises(ValueError, match="is gone"):
        run(follow(FedAvg(), notes), evaluate_fn=evaluate)
    assert notes.numbers == [0, 1]
    assert notes.failure == "ValueError: the test set is gone"


def test_a_run_that_fails_before_its_rounds_is_not_told():
    notes = Notes()
    with pytest.raises(ValueError, match="num_rounds = -1"):
        run(follow(AutoFlip(), notes), rounds=-1)
    assert notes.after is notes.totals is None


def test_a_resumed_run_goes_on_with_the_true_rounds(tmp_path):
    pytest.importorskip("safetensors")

    def strategy(**options):
        return AutoFlip(FedAvg(), 0.5, seed=1, checkpoints=Checkpoints(tmp_path, **options))

    def evaluate(round_, arrays):
        if round_ == stops:
            raise Killed
        return central(round_, arrays)

    first, second, third, stops = Notes(), Notes(), Notes(), 3
    with pytest.raises(Killed):
        run(follow(strategy(), first), rounds=4, evaluate_fn=evaluate)
    stops = None
    run(follow(strategy(resume=True), second), rounds=4, evaluate_fn=evaluate)
    assert (first.numbers, first.failure) == ([0, 1, 2], "Killed: ")
    assert (second.after, second.numbers) == (2, [3, 4])
    assert second.of("central/accuracy") == [0.3, 0.4]
    assert second.of("replies/train") == [3, 3]
    sizes = first.of("bytes/train_up") + second.of("bytes/train_up")
    assert np.all(np.diff(sizes) > 0)
    run(follow(strategy(resume=True), third), rounds=4, evaluate_fn=evaluate)
    assert (third.after, third.numbers, third.totals["rounds"]) == (4, [], 4)


def test_each_start_is_a_run_of_its_own():
    notes = [Notes(), Notes()]
    inner = AutoFlip(FedAvg(), 0.5)
    run(follow(inner, notes[0]))
    run(follow(inner, notes[1]))
    assert notes[1].numbers == [0, 1, 2]
    assert notes[1].of("replies/train") == [0, 3, 3]


def test_what_cannot_be_followed_is_told():
    with pytest.raises(TypeError, match=r"follow\(\.\.\., 'logs'\): must be a Hook, such as TensorBoard\(folder\)"):
        follow(FedAvg(), "logs")
    with pytest.raises(TypeError, match="must be given a strategy once, with all of its hooks"):
        follow(follow(FedAvg(), Notes()), Notes())
    with pytest.raises(TypeError, match=r"follow\(type\(...\), \.\.\.\)|follow\(FedAvg, ...\)"):
        follow(FedAvg, Notes())
    inside = DifferentialPrivacyServerSideFixedClipping(follow(FedAvg(), Notes()), 0.1, 1.0, 2)
    for strategy in (follow(FedAvg(), Notes()), inside):
        with pytest.raises(ValueError, match=r"it must be around it: follow\(AutoFlip\(strategy\), hook\)"):
            AutoFlip(strategy)
