"""Methods that change the mask, in whole runs: where entries grow from, what is kept of them, and what goes along."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from apps import NO_FAILURES, Killed, arrays_of, model, record, same_bytes
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
)

from autoflip_flwr import Checkpoints, Mask, Pruned, autoflip_mod, current_mask, current_request, report
from autoflip_flwr.core.layout import Arrays, Layout
from autoflip_flwr.core.method import Method
from autoflip_flwr.core.methods import LossExploration, Magnitude, Random
from autoflip_flwr.core.prunefl import PruneFl
from autoflip_flwr.core.schedule import Schedule
from autoflip_flwr.core.schedules import Agreement, Gradual, Reconfigure, Regrow, Votes
from autoflip_flwr.costs.message_size import record_bytes
from autoflip_flwr.testing import LocalGrid
from autoflip_flwr.wire.keys import HEADER, MASK_RECORD, STATISTICS

NODES, ROUNDS = 3, 6
LAYOUT = Layout.of(model())


def app() -> ClientApp:
    """Clients that take a made-up step under the mask, and report made-up values where they are asked."""
    made = ClientApp(mods=[autoflip_mod])

    @made.train()
    def train(message: Message, context: Context) -> Message:
        part, config = int(context.node_config["partition-id"]), message.content["config"]
        draw = np.random.default_rng([part, config["server-round"]])
        arrays = arrays_of(message.content["arrays"])
        for request in current_request(context):
            report(context, request.name, {name: draw.normal(size=a.shape) for name, a in arrays.items() if a.ndim > 1})
        mask = current_mask(context)
        for name, array in arrays.items():
            if array.dtype.kind == "f":
                step = 0.1 * draw.normal(size=array.shape)
                arrays[name] = (array + step * (1 if mask is None else mask.keep.get(name, 1))).astype(np.float32)
        content = {"arrays": record(arrays), "metrics": MetricRecord({"num-examples": 10 + part})}
        return Message(RecordDict(content), reply_to=message)

    return made


class Watched:
    """A run, and its model, mask and last values of each round."""

    def __init__(
        self,
        method: Method,
        inner: Any = None,
        *,
        dies_in: int = 0,
        rounds: int = ROUNDS,
        tamper: Any = None,
        **options: Any,
    ) -> None:
        random.seed(1)
        options = {"sparsity": 0.5, "seed": 1, **options}
        arrays = options.pop("arrays", None) or model()
        self.models: dict[int, Arrays] = {}
        self.masks: dict[int, Mask] = {}
        self.strategy = Pruned(inner or FedAvg(fraction_evaluate=0.0), method=method, **options)
        self.grid = LocalGrid(app(), NODES, tamper=tamper)
        self.dies_in = dies_in
        self.result = self.strategy.start(self.grid, record(arrays), num_rounds=rounds, evaluate_fn=self.see)

    def see(self, round_: int, arrays: ArrayRecord) -> MetricRecord:
        if self.dies_in and round_ == self.dies_in:
            raise Killed
        self.models[round_], self.masks[round_] = arrays_of(arrays), self.strategy.mask
        return MetricRecord({"sum": float(sum(np.abs(array).sum() for array in self.models[round_].values()))})

    def sent(self, round_: int) -> Arrays:
        """The full model of a round's messages."""
        mask = self.masks[round_]
        message = next(m for m in self.grid.sent if m.content[HEADER]["round"] == round_)
        flat = message.content["arrays"]["float32"].numpy()
        packed, at = {}, 0
        for name in mask.keep:
            packed[name] = flat[at : at + mask.kept_by_name[name]]
            at += mask.kept_by_name[name]
        return {name: np.where(keep, _scattered(keep, packed[name]), 0) for name, keep in mask.keep.items()}


def _scattered(keep: np.ndarray, values: np.ndarray) -> np.ndarray:
    full = np.zeros(keep.shape, np.float32)
    full[keep] = values
    return full


class FromLast(Regrow):
    """RigL whose entries resume."""

    grow_from = "last"


def rigl(kind: type[Schedule] = Regrow, **settings: Any) -> Random:
    return Random(scope="layer", schedule=kind(**{"share": 0.6, "every": 2, "until": 1.0, **settings}))


def gradual(fall: float = 0.8) -> Magnitude:
    return Magnitude(schedule=Gradual(fall=fall))


def feddst() -> Random:
    return Random(scope="erk", schedule=Votes(share=0.6, every=2, until=1.0))


def prunefl() -> PruneFl:
    return PruneFl(schedule=Reconfigure(every=2))


def explored(*schedule: Schedule) -> LossExploration:
    return LossExploration(epochs=1, initial="explorers", schedule=schedule)


def grown(ran: Watched, round_: int) -> dict[str, np.ndarray]:
    return {name: keep & ~ran.masks[round_ - 1].keep[name] for name, keep in ran.masks[round_].keep.items()}


@pytest.mark.parametrize("outside", ["zero", "initial"])
def test_entries_grow_from_what_stands_outside_the_mask(outside: str):
    ran = Watched(rigl(), outside=outside)
    assert ran.strategy.mask.version == 2
    for round_ in (3, 5):
        new, sent = grown(ran, round_), ran.sent(round_)
        assert sum(flags.sum() for flags in new.values()) >= 2
        for name, flags in new.items():
            expected = model()[name] if outside == "initial" else np.zeros_like(model()[name])
            assert (sent[name][flags] == expected[flags]).all()
        assert ran.masks[round_].kept_by_name == ran.masks[1].kept_by_name
    assert ran.strategy.ledger.failure_counts() == NO_FAILURES


def test_or_from_their_last_value_where_the_method_says_so():
    ran = Watched(rigl(FromLast, every=1), rounds=6)
    last: dict[str, np.ndarray] = {name: model()[name].copy() for name in ran.masks[1].keep}
    resumed = 0
    for round_ in range(1, 6):
        for name, keep in ran.masks[round_].keep.items():
            last[name][keep] = ran.models[round_][name][keep]
        new, sent = grown(ran, round_ + 1), ran.sent(round_ + 1)
        for name, flags in new.items():
            assert (sent[name][flags] == last[name][flags]).all()
            resumed += flags.sum()
    assert resumed > 5


@pytest.mark.runs
@pytest.mark.parametrize(
    "inner",
    [
        FedAvg,
        lambda **options: FedAvgM(**options, server_momentum=0.9, server_learning_rate=0.5),
        FedAdam,
    ],
)
@pytest.mark.parametrize(
    "method",
    [
        rigl(),
        gradual(0.8),
        feddst(),
        prunefl(),
        explored(Gradual(fall=0.5, drop_by="movement", initial_density=0.8), Regrow(share=0.5, every=1, until=1.0)),
        explored(Agreement(every=2, until=1.0)),
    ],
)
def test_it_goes_on_after_a_crash_and_ends_in_the_same_bytes(method: Method, inner: Any, tmp_path: Path):
    whole = Watched(method, inner(fraction_evaluate=0.0))
    assert len({mask.digest for mask in whole.masks.values()}) >= 2
    for dies_in in (2, 4):
        folder = tmp_path / str(dies_in)
        with pytest.raises(Killed):
            Watched(method, inner(fraction_evaluate=0.0), dies_in=dies_in, checkpoints=Checkpoints(folder))
        resumed = Watched(method, inner(fraction_evaluate=0.0), checkpoints=Checkpoints(folder, resume=True))
        assert list(resumed.models) == list(range(dies_in, ROUNDS + 1))
        for round_, found in resumed.models.items():
            same_bytes(found, whole.models[round_])
            assert resumed.masks[round_].digest == whole.masks[round_].digest


def test_samples_of_the_votes_go_on_after_a_crash(tmp_path: Path):
    method = Magnitude(schedule=Gradual(fall=0.8, drop_by="votes", seed=1))
    test_it_goes_on_after_a_crash_and_ends_in_the_same_bytes(method, FedAvg, tmp_path)


def test_a_run_with_more_rounds_keeps_the_plan_that_it_began_with(tmp_path: Path):
    whole = Watched(gradual(0.5), rounds=6)
    with pytest.raises(Killed):
        Watched(gradual(0.5), rounds=6, dies_in=3, checkpoints=Checkpoints(tmp_path))
    longer = Watched(gradual(0.5), rounds=12, checkpoints=Checkpoints(tmp_path, resume=True))
    kept = [longer.masks[round_].kept for round_ in range(3, 13)]
    assert kept[:4] == [whole.masks[round_].kept for round_ in range(3, 7)]
    assert set(kept[3:]) == {whole.strategy.mask.kept}


def test_a_mask_that_only_shrinks_keeps_no_last_values_and_tells_what_is_dropped(tmp_path: Path):
    ran = Watched(gradual(0.8), checkpoints=Checkpoints(tmp_path / "gradual"))
    assert not [file.name for file in (tmp_path / "gradual").iterdir() if "shadow" in file.name]
    Watched(rigl(FromLast), checkpoints=Checkpoints(tmp_path / "last"))
    assert [file.name for file in (tmp_path / "last").iterdir() if "shadow" in file.name]
    masks = [m.content[MASK_RECORD] for m in ran.grid.sent if MASK_RECORD in m.content]
    assert {str(each["encoding"]) for each in masks[NODES:]} <= {"dropped-gaps", "dropped-bitmap"}
    assert (
        sum(record_bytes(m.content, MASK_RECORD) for m in ran.grid.sent if MASK_RECORD in m.content)
        == (ran.strategy.ledger.bytes_by_phase()["mask_down"])
    )


def test_a_mask_that_only_shrinks_costs_the_entropy_of_what_each_node_loses():
    draw = np.random.default_rng(0)
    arrays = {name: draw.normal(size=(200, 500)).astype(np.float32) for name in ("in.weight", "mid.weight")}
    arrays |= {"out.weight": draw.normal(size=(3, 200)).astype(np.float32)}
    ran = Watched(gradual(1.0), FedAvg(fraction_train=0.5, fraction_evaluate=0.0), arrays=arrays, rounds=12)
    bytes_, entropy, records, away = 0, 0.0, 0, 0
    had: dict[int, int] = {}
    for message in ran.grid.sent:
        if MASK_RECORD not in message.content:
            continue
        node, round_ = message.metadata.dst_node_id, int(message.content[HEADER]["round"])
        if node in had:
            base, mask = ran.masks[had[node]], ran.masks[round_]
            kept = mask.kept / base.kept
            entropy -= base.kept * (kept * np.log2(kept) + (1 - kept) * np.log2(1 - kept)) / 8
            bytes_ += record_bytes(message.content, MASK_RECORD)
            records, away = records + 1, max(away, round_ - had[node])
        had[node] = round_
    assert records > 15
    assert away > 1
    assert entropy < bytes_ <= 1.03 * entropy + 200 * records


def test_tied_weights_stay_one_weight():
    draw = np.random.default_rng(0)
    weight = draw.normal(size=(6, 8)).astype(np.float32)
    arrays = {"in.weight": weight, "mid.weight": draw.normal(size=(8, 8)).astype(np.float32), "out.weight": weight}
    seen: list[Layout] = []

    class Noted(Magnitude):
        def refine(self, round_, mask, model, seen_):
            seen.append(mask.layout)
            return super().refine(round_, mask, model, seen_)

    # clients in step: tied arrays move alike
    made = ClientApp(mods=[autoflip_mod])

    @made.train()
    def train(message: Message, context: Context) -> Message:
        mask = current_mask(context)
        got = arrays_of(message.content["arrays"])
        new = {name: (0.9 * a * mask.keep[name]).astype(np.float32) for name, a in got.items()}
        content = {"arrays": record(new), "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    strategy = Pruned(FedAvg(fraction_evaluate=0.0), 0.5, method=Noted(schedule=Gradual(fall=0.8)), seed=1)
    strategy.start(LocalGrid(made, 2), record(arrays), num_rounds=4)
    assert {tuple(layout.prunable_names) for layout in seen} == {("in.weight", "mid.weight")}
    keep = strategy.mask.keep
    assert (keep["in.weight"] == keep["out.weight"]).all()
    assert keep["in.weight"].sum() + keep["mid.weight"].sum() == (48 + 64) / 2


def test_what_asks_clients_needs_leave_under_differential_privacy_and_what_does_not_runs():
    def private() -> Any:
        return DifferentialPrivacyServerSideFixedClipping(FedAvg(fraction_evaluate=0.0), 1.0, 1.0, NODES)

    with pytest.raises(ValueError, match="outside the noise and the budget"):
        Watched(rigl(), private())
    ran = Watched(gradual(0.8), private())
    assert ran.strategy.privacy.releases == ROUNDS
    assert ran.strategy.mask.kept == LAYOUT.prunable_size // 2


@pytest.mark.parametrize("coordinates", ["packed", "dense"])
def test_what_the_strategy_sees_makes_no_difference(coordinates: str):
    one, other = Watched(rigl(), coordinates=coordinates), Watched(rigl())
    for round_ in range(ROUNDS + 1):
        same_bytes(one.models[round_], other.models[round_])


def test_a_method_that_asks_for_what_does_not_go_is_refused():
    class Odd(Magnitude):
        grow_from = "nowhere"

    with pytest.raises(ValueError, match="Odd: grow_from = 'nowhere': must be one of last, outside"):
        Pruned(FedAvg(), method=Odd())


def test_reports_of_top_entries_are_small_and_charged():
    ran = Watched(rigl(share=0.2))
    assert ran.strategy.ledger.failure_counts() == NO_FAILURES
    asked = {m.content[HEADER]["round"]: m.content[HEADER].get("ask") for m in ran.grid.sent}
    assert asked[2] == ["gradient pruned log8 0.15"]
    assert asked[1] is None
    up = ran.strategy.ledger.bytes_by_phase()["train_up"]
    silent = Watched(Magnitude()).strategy.ledger.bytes_by_phase()["train_up"]
    assert 0 < up - silent < 2 * NODES * 1000  # a record's own overhead, and a few bytes


@pytest.mark.parametrize("size", [0, 3, 40, 4000])
def test_a_node_that_reports_rubbish_is_rejected_and_the_others_decide(size: int):
    def tamper(reply: Message) -> Message:
        if reply.has_content() and reply.metadata.src_node_id == 101 and STATISTICS in reply.content:
            rubbish = np.random.default_rng(size).integers(0, 256, size).astype(np.uint8)
            reply.content[STATISTICS] = ArrayRecord({"gradient": Array(rubbish)})
        return reply

    ran = Watched(rigl(), tamper=tamper)
    assert ran.strategy.ledger.failure_counts()["rejected"] == 2
    assert ran.strategy.mask.version == 2
    assert ran.strategy.mask.kept_by_name == ran.masks[1].kept_by_name


class Telling(Schedule):
    """Tells clients how many entries the mask of the round keeps."""

    prepares = True

    def prepare(self, round_: int, mask: Mask, model: Arrays) -> dict[str, bool | int | float | str]:
        assert not any(model[name][~keep].any() for name, keep in mask.keep.items())
        return {"kept": mask.kept}


def test_a_schedule_may_tell_clients_something_in_each_round():
    run = Watched(Magnitude(schedule=(Gradual(fall=0.8), Telling())), rounds=3)
    sent = [m.content for m in run.grid.sent if m.content[HEADER]["phase"] == "train"]
    told = {content[HEADER]["round"]: content["config"] for content in sent}
    assert {round_: config["autoflip-kept"] for round_, config in told.items()} == {
        round_: run.masks[round_].kept for round_ in (1, 2, 3)
    }
    assert len({mask.kept for mask in run.masks.values()}) == 3
