"""The schedule by participants in whole runs: whose reports make a round's mask, what it costs, and going on."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from apps import NO_FAILURES, Killed, arrays_of, explored, message_app, model, record, same_bytes
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, FedAvgM

from autoflip_flwr import AutoFlip, Checkpoints, LossExploration, Mask, Pruned, Values, select
from autoflip_flwr.core.layout import Arrays, Layout
from autoflip_flwr.core.methods import Magnitude
from autoflip_flwr.core.participants import Participants
from autoflip_flwr.core.schedules import Gradual
from autoflip_flwr.core.scores import scores
from autoflip_flwr.costs.message_size import record_bytes
from autoflip_flwr.storage.checkpoint import CheckpointError
from autoflip_flwr.storage.sealed import read_sealed
from autoflip_flwr.testing import LocalGrid
from autoflip_flwr.wire.keys import EXPLORE, HEADER, MASK_RECORD, TRAIN
from autoflip_flwr.wrapped.template import messages_of_copy

NODES, ROUNDS = 6, 6
LAYOUT = Layout.of(model())


def fedavg(kind: type[FedAvg] = FedAvg, **settings: Any) -> FedAvg:
    return kind(fraction_train=0.34, fraction_evaluate=0.0, min_train_nodes=2, min_available_nodes=2, **settings)


def fedavgm() -> FedAvg:
    return fedavg(FedAvgM, server_momentum=0.9, server_learning_rate=0.5)


def participants(*before: Gradual, every: int = 1, **settings: Any) -> LossExploration:
    return LossExploration.static(schedule=(*before, Participants(every=every)), **{"explorers": 0.5, **settings})


class Run:
    """A run, and its model and mask in each round."""

    def __init__(
        self,
        method: LossExploration,
        inner: FedAvg | None = None,
        *,
        rounds: int = ROUNDS,
        dies_in: int | None = None,
        **options: Any,
    ) -> None:
        random.seed(1)
        self.models: dict[int, Arrays] = {}
        self.masks: dict[int, Mask] = {}
        self.dies_in = dies_in
        options = {"sparsity": 0.5, "seed": 1, **options}
        self.strategy = AutoFlip(fedavg() if inner is None else inner, method=method, **options)
        self.grid = LocalGrid(message_app(), NODES)
        self.start(rounds)

    def start(self, rounds: int = ROUNDS) -> None:
        self.strategy.start(self.grid, record(model()), num_rounds=rounds, evaluate_fn=self.see)

    def see(self, round_: int, arrays: ArrayRecord) -> MetricRecord:
        if round_ == self.dies_in:
            raise Killed
        self.models[round_], self.masks[round_] = arrays_of(arrays), self.strategy.mask
        return MetricRecord({})

    def asked(self, phase: str, round_: int) -> list[int]:
        """Partitions that got a round's messages, in order."""
        heads = [(message.content[HEADER], message.metadata.dst_node_id) for message in self.grid.sent]
        return [node - 100 for head, node in heads if (head["phase"], head["round"]) == (phase, round_)]


def delta(part: int) -> Arrays:
    """What an explorer of `message_app` finds."""
    draw, found = np.random.default_rng([1, 1, part]), {}
    for name, array in model().items():
        if array.dtype.kind == "f":
            found[name] = (array * 0.9 + 0.1 * draw.normal(size=array.shape)).astype(np.float32) - array
    return found


def mask_of(parts: Iterable[int], kept: int = LAYOUT.prunable_size // 2) -> Mask:
    score = scores(explored(LAYOUT, [(1.0, delta(part)) for part in sorted(parts)]))
    return select(LAYOUT, score, {tuple(LAYOUT.prunable_names): kept})


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("inner", [fedavg, fedavgm])
def test_a_rounds_mask_comes_from_the_explorers_that_it_samples(inner, seed):
    ran = Run(participants(), inner(), seed=seed, values=Values(deltas="float32"))
    explorers = ran.asked(EXPLORE, 0)
    assert len(explorers) == 3
    assert ran.masks[0].digest == mask_of(explorers).digest
    numbers = []
    for round_ in range(1, ROUNDS + 1):
        sampled = ran.asked(TRAIN, round_)
        assert len(sampled) == 2
        there = set(sampled) & set(explorers)
        numbers.append(len(there))
        assert ran.masks[round_].digest == mask_of(there or explorers).digest
        heads = {m.content[HEADER]["digest"] for m in ran.grid.sent if m.content[HEADER]["round"] == round_}
        assert heads == {ran.masks[round_].digest}
    if seed is not None:  # else chance draws the explorers
        assert len({mask.digest for mask in ran.masks.values()}) >= 3
        assert {0, 1} <= set(numbers)
    assert ran.strategy.ledger.failure_counts() == NO_FAILURES


class Drawn(FedAvg):
    """A strategy that draws one of FedAvg's nodes, with NumPy's global generator and with one of its own."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.generator = np.random.default_rng()

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid):
        messages = list(super().configure_train(server_round, arrays, config, grid))
        return [messages[np.random.randint(3)], messages[3 + self.generator.integers(3)]]


@pytest.mark.parametrize("inner", [fedavg, fedavgm, lambda: Drawn(fraction_evaluate=0.0)])
def test_a_copy_draws_what_the_strategy_then_draws(inner):
    strategy, grid, config = inner(), LocalGrid(message_app(), NODES), ConfigRecord({"lr": 0.1})
    before = {name: value for name, value in vars(strategy).items() if name != "generator"}
    for round_ in range(1, 9):
        copied = messages_of_copy(strategy, round_, record(model()), config, grid)
        assert config == ConfigRecord({"lr": 0.1})
        assert {name: value for name, value in vars(strategy).items() if name in before} == before
        own = list(strategy.configure_train(round_, record(model()), ConfigRecord(), grid))
        assert [m.metadata.dst_node_id for m in copied] == [m.metadata.dst_node_id for m in own]
        before = {name: vars(strategy)[name] for name in before}


def test_the_strategy_samples_as_it_does_without(caplog):
    with caplog.at_level(logging.INFO):
        ran = Run(participants(), rounds=4, seed=None)
    assert caplog.text.count("configure_train: Sampled 2 nodes") == 4  # the copy's words are not repeated
    static = Run(LossExploration.static(explorers=0.5), rounds=4, seed=None)
    for round_ in range(1, 5):
        assert ran.asked(TRAIN, round_) == static.asked(TRAIN, round_)


def test_masks_are_told_as_differences_and_every_byte_is_counted():
    ran = Run(participants())
    masks = [message.content for message in ran.grid.sent if MASK_RECORD in message.content]
    told = [each for each in masks if each[HEADER]["phase"] == TRAIN]
    assert sum(record_bytes(each, MASK_RECORD) for each in masks) == ran.strategy.ledger.bytes_by_phase()["mask_down"]
    assert {str(each[MASK_RECORD]["encoding"]) for each in told} >= {"difference"}


def test_what_comes_back_resumes_from_its_last_value():
    ran, resumed = Run(participants()), 0
    last = {name: model()[name].copy() for name in ran.masks[0].keep}
    for round_ in range(1, ROUNDS):
        for name, keep in ran.masks[round_].keep.items():
            last[name][keep] = ran.models[round_][name][keep]
            back = ran.masks[round_ + 1].keep[name] & ~keep
            message = next(m for m in ran.grid.sent if m.content[HEADER]["round"] == round_ + 1)
            sent = ran.masks[round_ + 1].scatter(_packed(ran.masks[round_ + 1], message))[name]
            assert (sent[back] == last[name][back]).all()
            resumed += back.sum()
    assert resumed > 5


def _packed(mask: Mask, message: Message) -> Arrays:
    """The packed arrays of a message of this model, whose prunable arrays come first."""
    flat = message.content["arrays"]["float32"].numpy()
    ends = np.cumsum([mask.kept_by_name[name] for name in mask.keep])
    parts = dict(zip(mask.keep, np.split(flat, ends), strict=False))
    return {name: parts.get(name, array) for name, array in model().items()}


def test_the_density_falls_first_and_its_entries_are_ranked_anew():
    ran = Run(participants(Gradual(fall=0.6), explorers=1.0), values=Values(deltas="float32"))
    alone = Run(LossExploration.static(schedule=Gradual(fall=0.6)))
    for round_ in range(1, ROUNDS + 1):
        mask = ran.masks[round_]
        assert mask.kept == alone.masks[round_].kept
        assert mask.digest == mask_of(ran.asked(TRAIN, round_), mask.kept).digest
    assert ran.masks[1].is_full
    assert ran.strategy.mask.kept == LAYOUT.prunable_size // 2


def test_between_changes_the_mask_stays():
    ran = Run(participants(every=3, explorers=1.0))
    same = [ran.masks[round_].digest == ran.masks[round_ - 1].digest for round_ in range(2, ROUNDS + 1)]
    assert [round_ for round_, each in enumerate(same, 2) if not each] == [4]


class Locked(FedAvg):
    """A strategy that cannot be copied."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.lock = threading.Lock()


def test_where_the_strategy_cannot_be_copied_all_explorers_decide(caplog):
    ran = Run(participants(), fedavg(Locked), rounds=3)
    assert {mask.digest for mask in ran.masks.values()} == {mask_of(ran.asked(EXPLORE, 0)).digest}
    assert caplog.text.count("could not copy Locked to see which nodes it samples") == 1


class Whimsical(FedAvg):
    """A strategy whose copies draw from what it draws from, too."""

    draws = count()

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid):
        return list(super().configure_train(server_round, arrays, config, grid))[next(self.draws) % 2 :][:1]


def test_a_strategy_that_draws_otherwise_than_its_copy_is_told(caplog):
    Run(participants(), fedavg(Whimsical), rounds=2)
    assert caplog.text.count("the strategy has sampled other nodes than its copy did") == 2


@pytest.mark.parametrize(
    ("inner", "dies_in"),
    [
        (fedavgm, 3),
        *(pytest.param(inner, dies_in, marks=pytest.mark.slow) for inner in (fedavg, fedavgm) for dies_in in (0, 1, 5)),
    ],
)
def test_a_run_goes_on_bit_for_bit_and_keeps_reports_once(inner, dies_in: int, tmp_path: Path):
    whole = Run(participants(Gradual(fall=0.5)), inner())
    with pytest.raises(Killed):
        Run(participants(Gradual(fall=0.5)), inner(), dies_in=dies_in, checkpoints=Checkpoints(tmp_path))
    names = {path.name: read_sealed(path)[1].keys() for path in tmp_path.glob("*.safetensors")}
    held = {name for name, keys in names.items() if any("reports" in key for key in keys)}
    assert held == {"exploration.safetensors"}
    resumed = Run(participants(Gradual(fall=0.5)), inner(), checkpoints=Checkpoints(tmp_path, resume=True))
    assert not resumed.asked(EXPLORE, 0)
    for round_ in range(max(dies_in, 1), ROUNDS + 1):
        same_bytes(resumed.models[round_], whole.models[round_])
        assert resumed.masks[round_].digest == whole.masks[round_].digest


def test_a_run_whose_reports_are_lost_does_not_go_on(tmp_path: Path):
    with pytest.raises(Killed):
        Run(participants(), dies_in=1, checkpoints=Checkpoints(tmp_path))
    (tmp_path / "exploration.safetensors").unlink()
    with pytest.raises(CheckpointError, match="what each explorer reported is not in the checkpoints"):
        Run(participants(), checkpoints=Checkpoints(tmp_path, resume=True))


def test_a_second_start_uses_the_reports_again_and_one_without_explores_anew():
    ran = Run(participants(), rounds=1, seed=None, values=Values(deltas="float32"))
    explorers = ran.asked(EXPLORE, 0)
    ran.grid = LocalGrid(message_app(), NODES)
    ran.start(4)
    assert not ran.asked(EXPLORE, 0)
    for round_ in range(1, 5):
        there = set(ran.asked(TRAIN, round_)) & set(explorers)
        assert ran.masks[round_].digest == mask_of(there or explorers).digest
    static = Run(LossExploration.static(), rounds=1)
    static.strategy.method = participants(explorers=1.0)
    static.start(2)
    assert len(static.asked(EXPLORE, 0)) == 2 * NODES


def test_reports_that_nobody_has_are_refused_before_anything_runs():
    found = Run(LossExploration.static(), rounds=1).strategy.exploration
    with pytest.raises(ValueError, match=r"exploration: holds averages over its explorers, .* leave it out"):
        Run(participants(), exploration=found)
    grid = LocalGrid(message_app(), NODES)
    with pytest.raises(ValueError, match=r"Magnitude\(.*Participants\(\)\): asks what .* and nobody explores"):
        Pruned(fedavg(), 0.5, method=Magnitude(schedule=Participants())).start(grid, record(model()))
    assert not grid.sent
    ready = Run(participants(), rounds=2, mask=mask_of([0]))  # a ready mask stays
    assert ready.strategy.mask.digest == mask_of([0]).digest
