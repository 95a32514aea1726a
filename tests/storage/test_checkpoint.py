"""A run that was interrupted goes on from its last finished round, and ends as if nothing had happened."""

from __future__ import annotations

import functools
import random
import subprocess
import sys
import threading

import numpy as np
import pytest
from apps import Killed, arrays_of, message_app, model, record, same_bytes
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import FedAdam, FedAvg
from matrices import EVERY_STRATEGY

from autoflip_flwr import AutoFlip, autoflip_mod
from autoflip_flwr.core.choices import PACKINGS
from autoflip_flwr.core.methods import LossExploration
from autoflip_flwr.storage import sealed
from autoflip_flwr.storage.checkpoint import CheckpointError, Checkpoints
from autoflip_flwr.storage.codec import decode, encode
from autoflip_flwr.testing import LocalGrid
from benchmarks import digits

NODES = 6
ROUNDS = 5


def inner(kind=FedAvg, **options):
    return kind(fraction_evaluate=0.5, fraction_train=0.5, **options)


def evaluate(round_, arrays):
    return MetricRecord({"sum": float(sum(np.abs(array.numpy()).sum() for array in arrays.values()))})


def run(
    folder,
    make=inner,
    *,
    resume=False,
    dies_in=None,
    rounds=ROUNDS,
    app=message_app,
    nodes=NODES,
    should_stop=None,
    **options,
):
    """Start a new process, as it were: everything is made anew. It dies in the evaluation of round ``dies_in``."""
    random.seed(1)
    np.random.seed(1)

    def evaluate_or_die(round_, arrays):
        if round_ == dies_in:
            raise Killed
        return evaluate(round_, arrays)

    checkpoints = None if folder is None else Checkpoints(folder, resume=resume)
    options = {"method": LossExploration.static(epochs=1, public=True), **options}
    strategy = AutoFlip(make(), seed=3, checkpoints=checkpoints, **options)
    grid = LocalGrid(app(), nodes)
    result = strategy.start(
        grid, record(model()), num_rounds=rounds, evaluate_fn=evaluate_or_die, should_stop=should_stop
    )
    return result, strategy, grid


def same(left, right):
    same_bytes(arrays_of(left.arrays), arrays_of(right.arrays))
    for part in ("train_metrics_clientapp", "evaluate_metrics_clientapp"):
        assert getattr(left, part) == getattr(right, part)
    central = [{r: v for r, v in each.evaluate_metrics_serverapp.items() if r} for each in (left, right)]
    assert central[0] == central[1]


SAMPLED = 7
"""Of twice as many nodes, for strategies that need some."""


def each_strategy(name, folder, **options):
    """A run of one of Flower's strategies, half of the nodes in each round."""
    mods = digits.mods_for(name)
    given = {"fraction_train": 0.5, "fraction_evaluate": 0.0 if mods else 0.5}  # the clipping mods refuse to evaluate
    if name == "QFedAvg":
        given["train_loss_key"] = "train-loss"
    make = functools.partial(digits.STRATEGIES[name], SAMPLED, **given)
    app = functools.partial(message_app, mods=[autoflip_mod, *mods])
    return run(folder, make, app=app, nodes=2 * SAMPLED, **options)


@pytest.mark.runs
@pytest.mark.parametrize("coordinates", PACKINGS)
@pytest.mark.parametrize("name", EVERY_STRATEGY)
def test_the_end_is_bit_identical(name, coordinates, tmp_path):
    whole, *_ = each_strategy(name, None, coordinates=coordinates)
    with pytest.raises(Killed):
        each_strategy(name, tmp_path, dies_in=3, coordinates=coordinates)
    resumed, _, grid = each_strategy(name, tmp_path, resume=True, coordinates=coordinates)
    same(resumed, whole)
    sent = [message.content["config"].get("server-round") for message in grid.sent if "config" in message.content]
    assert min(round_ for round_ in sent if round_) == 3  # rounds 1 and 2 were finished
    assert not any(message.metadata.group_id == "exploration" for message in grid.sent)


@pytest.mark.parametrize("method", [LossExploration.static(), LossExploration()], ids=["static", "dynamic"])
@pytest.mark.parametrize("dies_in", [0, 1, 2, ROUNDS])
def test_wherever_it_was_interrupted(dies_in, method, tmp_path):
    whole, *_ = run(None, method=method)
    with pytest.raises(Killed):
        run(tmp_path, method=method, dies_in=dies_in)
    same(run(tmp_path, method=method, resume=True)[0], whole)


def test_again_and_again(tmp_path):
    whole, *_ = run(None)
    for dies_in in (1, 2, 2, 4):
        with pytest.raises(Killed):
            run(tmp_path, resume=dies_in > 1, dies_in=dies_in)
    same(run(tmp_path, resume=True)[0], whole)


def test_a_finished_run_can_be_given_more_rounds(tmp_path):
    whole, *_ = run(None)
    run(tmp_path, rounds=3)
    same(run(tmp_path, resume=True)[0], whole)


def test_a_finished_run_that_is_resumed_returns_what_it_had(tmp_path):
    whole, *_ = run(tmp_path)
    resumed, _, grid = run(tmp_path, resume=True)
    same(resumed, whole)
    assert all(message.metadata.message_type != "evaluate" for message in grid.sent)


def test_should_stop_sees_the_rounds_before_the_interruption(tmp_path, flower_1_43):
    def going(end, seen, **options):
        def stop(round_, result):
            told = (result.train_metrics_clientapp, result.evaluate_metrics_clientapp)
            central = {round_ for round_ in result.evaluate_metrics_serverapp if round_}
            seen.append((round_, *(sorted(history) for history in (*told, central))))
            assert set(result.arrays) == set(model())
            return round_ == end

        return run(tmp_path, should_stop=stop, **options)

    seen: list[tuple] = []
    with pytest.raises(Killed):
        going(4, seen, dies_in=3)
    result, _, _ = going(4, seen, resume=True)
    rounds = [1, 2, 3, 4]
    assert seen == [(r, *[rounds[:r]] * 3) for r in (1, 2, 2, 3, 4)]  # the new process asks of the last one again
    assert sorted(result.train_metrics_clientapp) == rounds
    # a run that has been stopped stays so, unless another end is asked for
    again, _, grid = going(4, seen, resume=True)
    same(again, result)
    assert not any(message.content["config"].get("server-round") for message in grid.sent)
    whole, _, _ = going(None, seen, resume=True)
    assert seen[-2:] == [(r, *[[*rounds, 5][:r]] * 3) for r in (4, 5)]
    same(whole, run(None)[0])


def test_nothing_to_resume_begins(tmp_path):
    whole, *_ = run(None)
    same(run(tmp_path, resume=True)[0], whole)


def test_a_changed_mask_its_shadow_and_version_are_kept(tmp_path):
    def schedule(round_):
        keep = {spec.name: np.random.default_rng(round_).random(spec.shape) < 0.5 for spec in layout.prunable}
        return mask_of(layout, keep)

    from autoflip_flwr import Layout, Mask

    layout, mask_of = Layout.of(model()), Mask.from_bool
    whole, first, _ = run(None, mask_schedule=schedule)
    with pytest.raises(Killed):
        run(tmp_path, mask_schedule=schedule, dies_in=4)
    resumed, second, _ = run(tmp_path, mask_schedule=schedule, resume=True)
    same(resumed, whole)
    assert second.mask == first.mask


def test_the_ledger_goes_on(tmp_path):
    _, whole, _ = run(None)
    with pytest.raises(Killed):
        run(tmp_path, dies_in=3)
    _, resumed, _ = run(tmp_path, resume=True)
    for phase in ("exploration", "train"):
        assert resumed.ledger.replies[phase] == whole.ledger.replies[phase]
        assert resumed.ledger.up[phase] == whole.ledger.up[phase]


@pytest.mark.parametrize("name", [name for name in digits.STRATEGIES if name.startswith("DifferentialPrivacy")])
def test_the_privacy_that_was_spent_goes_on(name, tmp_path):
    _, whole, _ = each_strategy(name, None)
    with pytest.raises(Killed):
        each_strategy(name, tmp_path, dies_in=3)
    _, resumed, _ = each_strategy(name, tmp_path, resume=True)
    assert resumed.privacy == whole.privacy
    assert resumed.privacy.releases == ROUNDS


def only_first(monkeypatch, count):
    """The process dies when ``count`` explorers' answers are kept."""
    came, add = [], Checkpoints.add_explorer

    def add_some(self, explorer, about, moves):
        if len(came) == count:
            raise Killed
        came.append(explorer)
        add(self, explorer, about, moves)

    monkeypatch.setattr(Checkpoints, "add_explorer", add_some)
    return came


def test_answers_of_explorers_outlive_a_crash(tmp_path, monkeypatch):
    whole, first, _ = run(None)
    with monkeypatch.context() as patch:
        came = only_first(patch, 4)
        with pytest.raises(Killed):
            run(tmp_path)
    resumed, second, grid = run(tmp_path, resume=True)
    same(resumed, whole)
    asked = [message.metadata.dst_node_id - 100 for message in grid.sent if message.metadata.group_id == "exploration"]
    assert sorted(asked + came) == list(range(NODES))
    assert second.exploration.explorers == NODES
    assert second.ledger.replies["exploration"] == NODES
    assert second.ledger.up["exploration"] == first.ledger.up["exploration"]
    assert not list((tmp_path / "explorers").iterdir())


class Fewer(LocalGrid):
    """Its first two nodes are gone."""

    def get_node_ids(self):
        return super().get_node_ids()[2:]


def test_so_do_those_whose_nodes_are_gone(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        came = only_first(patch, 4)
        with pytest.raises(Killed):
            run(tmp_path)
    strategy = AutoFlip(
        inner(), seed=3, checkpoints=Checkpoints(tmp_path, resume=True), method=LossExploration.static(epochs=1)
    )
    grid = Fewer(message_app(), NODES)
    strategy.start(grid, record(model()), num_rounds=1, timeout=1.0)
    everybody = len({*came, *range(2, NODES)})
    assert strategy.exploration.explorers == strategy.ledger.replies["exploration"] == everybody
    asked = [message.metadata.dst_node_id for message in grid.sent if message.metadata.group_id == "exploration"]
    assert asked == [node for node in range(102, 100 + NODES) if node - 100 not in came]


def test_and_those_that_another_draw_would_not_have_asked(tmp_path, monkeypatch):
    def start(resume):
        kept = Checkpoints(tmp_path, resume=resume)
        strategy = AutoFlip(
            FedAvg(), checkpoints=kept, method=LossExploration.static(epochs=1, explorers=0.2)
        )  # no seed
        grid = LocalGrid(message_app(), 20)
        strategy.start(grid, record(model()), num_rounds=1)
        return strategy, grid

    with monkeypatch.context() as patch:
        came = only_first(patch, 3)
        with pytest.raises(Killed):
            start(False)
    strategy, grid = start(True)
    asked = [message.metadata.dst_node_id - 100 for message in grid.sent if message.metadata.group_id == "exploration"]
    assert len(asked) == 1
    assert not set(asked) & set(came)
    assert strategy.exploration.explorers == strategy.ledger.replies["exploration"] == 4


def test_nodes_that_claim_one_partition_keep_an_answer_each(tmp_path, monkeypatch, caplog):
    def start(resume):
        strategy = AutoFlip(
            inner(), seed=3, checkpoints=Checkpoints(tmp_path, resume=resume), method=LossExploration.static(epochs=1)
        )
        grid = LocalGrid(message_app(), NODES)
        grid.contexts[101].node_config["partition-id"] = 0
        strategy.start(grid, record(model()), num_rounds=1)
        return strategy, grid

    with monkeypatch.context() as patch:
        came = only_first(patch, 4)
        with pytest.raises(Killed):
            start(False)
    assert set(came) < {2, 3, 4, 5, 100, 101}
    strategy, _ = start(True)
    assert strategy.exploration.explorers == NODES
    assert "nodes [100, 101] all say that they have partition 0" in caplog.text


def test_a_finished_exploration_keeps_what_it_has_cost(tmp_path, monkeypatch):
    whole, first, _ = run(None)
    with monkeypatch.context() as patch:
        patch.setattr("autoflip_flwr.server.beginning.choose_first", raise_killed)
        with pytest.raises(Killed):
            run(tmp_path)
    resumed, second, grid = run(tmp_path, resume=True)
    same(resumed, whole)
    assert not any(message.metadata.group_id == "exploration" for message in grid.sent)
    cost, before = second.ledger.exploration_only(), first.ledger.exploration_only()
    assert cost.pop("seconds") > 0 < before.pop("seconds")
    assert cost == before
    for name in ("up", "down", "replies", "messages"):
        assert getattr(second.ledger, name)["exploration"] == getattr(first.ledger, name)["exploration"] > 0


def raise_killed(*_):
    raise Killed


@pytest.mark.parametrize("how", ["gone", "damaged"])
def test_where_a_round_has_the_mask_nobody_explores_again(how, tmp_path):
    whole, *_ = run(None)
    with pytest.raises(Killed):
        run(tmp_path, dies_in=3)
    path = tmp_path / "exploration.safetensors"
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-5])
    resumed, _, grid = run(tmp_path, resume=True)
    same(resumed, whole)
    assert not any(message.metadata.group_id == "exploration" for message in grid.sent)


def test_nodes_that_have_not_come_back_are_told(tmp_path, caplog):
    with pytest.raises(Killed):
        run(tmp_path, dies_in=3)
    kept = Checkpoints(tmp_path, resume=True)
    strategy = AutoFlip(inner(), seed=3, checkpoints=kept, method=LossExploration.static(epochs=1, public=True))
    strategy.start(LocalGrid(message_app(), NODES - 2), record(model()), num_rounds=ROUNDS, timeout=1.0)
    assert "partitions [4, 5] were there before and are not now" in caplog.text


def test_one_object_may_start_again(tmp_path):
    """As in a notebook, after Ctrl-C."""
    whole, *_ = run(None)
    random.seed(1)
    np.random.seed(1)
    kept = Checkpoints(tmp_path, resume=True)
    strategy = AutoFlip(inner(), seed=3, checkpoints=kept, method=LossExploration.static(epochs=1))

    def dies(round_, arrays):
        if round_ == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        strategy.start(LocalGrid(message_app(), NODES), record(model()), num_rounds=ROUNDS, evaluate_fn=dies)
    assert strategy.mask is not None
    result = strategy.start(LocalGrid(message_app(), NODES), record(model()), ROUNDS, evaluate_fn=evaluate)
    same_bytes(arrays_of(result.arrays), arrays_of(whole.arrays))


def test_what_json_cannot_hold_is_named(tmp_path):
    kept = Checkpoints(tmp_path, extra=lambda: np.float32(1))
    with pytest.raises(TypeError, match=r"Checkpoints.extra returned what JSON cannot hold: .* float32"):
        AutoFlip(inner(), sparsity=0, checkpoints=kept).start(LocalGrid(message_app(), NODES), record(model()))


def test_the_last_ones_are_kept(tmp_path):
    run(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("round-*")) == [f"round-{r:06d}.safetensors" for r in (4, 5)]


def test_another_run_is_refused(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, dies_in=3)
    with pytest.raises(CheckpointError, match="resume it, or choose another folder"):
        run(tmp_path)
    with pytest.raises(CheckpointError, match=r"belongs to another run: mask.sparsity was 0.7, and is now 0.5"):
        run(tmp_path, resume=True, sparsity=0.5)
    with pytest.raises(CheckpointError, match=r"strategy.0.FedAvg was .* and is now None"):
        run(tmp_path, lambda: inner(FedAdam), resume=True)
    with pytest.raises(CheckpointError, match=r"strategy.0.FedAvg.fraction_train was 0.5, and is now 1.0"):
        run(tmp_path, lambda: FedAvg(fraction_evaluate=0.5), resume=True)


@pytest.mark.parametrize("how", ["cut", "flip", "empty", "text"])
def test_a_damaged_one_is_named_and_the_one_before_it_offered(how, tmp_path):
    whole, *_ = run(None)
    with pytest.raises(Killed):
        run(tmp_path, dies_in=4)
    last = tmp_path / "round-000003.safetensors"
    data = bytearray(last.read_bytes())
    if how == "flip":
        data[-5] ^= 1
    last.write_bytes({"cut": data[:-7], "flip": data, "empty": b"", "text": b"nothing of the kind"}[how])
    with pytest.raises(CheckpointError, match=r"round-000003\.safetensors is damaged .*: remove it; without it the "):
        run(tmp_path, resume=True)
    last.unlink()
    same(run(tmp_path, resume=True)[0], whole)


def test_of_those_before_a_damaged_one_only_a_whole_one_is_offered(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, dies_in=4)
    for number in (2, 3):
        (tmp_path / f"round-{number:06d}.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"round-000003\.safetensors is damaged .*: remove it$"):
        run(tmp_path, resume=True)


def test_what_was_being_written_is_not_read(tmp_path):
    whole, *_ = run(None)
    with pytest.raises(Killed):
        run(tmp_path, dies_in=3)
    half = (tmp_path / "round-000002.safetensors").read_bytes()[:1000]
    (tmp_path / ".round-000003.safetensors.tmp").write_bytes(half)
    same(run(tmp_path, resume=True)[0], whole)
    assert not list(tmp_path.glob(".*"))


HOLDS = """
import sys
from autoflip_flwr.storage import sealed
from autoflip_flwr.storage.checkpoint import Checkpoints
kept = Checkpoints(sys.argv[1])
kept.open({})
print("open", flush=True)
sys.stdin.read()
"""


def test_one_process_at_a_time_works_on_a_run(tmp_path):
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(CheckpointError, match="another process is still at work on this run"):
            run(tmp_path)
        other.kill()  # the lock goes with its process, however that ends
    run(tmp_path)
    run(tmp_path, resume=True)  # one process may open it twice, and holds it until its own end
    done = subprocess.run(command, capture_output=True, text=True)
    assert "another process is still at work on this run" in done.stderr


def test_a_full_disk_costs_a_checkpoint_and_nothing_else(tmp_path, monkeypatch, caplog):
    whole, *_ = run(None)
    save = sealed.save
    monkeypatch.setattr(
        sealed, "save", lambda *a, **k: save(*a, **k) if full["left"] > 0 else raise_(OSError(28, "No space left"))
    )
    full = {"left": 1}

    def raise_(error):
        raise error

    class Filling(Checkpoints):
        def write(self, round_, state, arrays):
            full["left"] = 0 if round_ == 2 else 1
            super().write(round_, state, arrays)

        def write_exploration(self, found):
            full["left"] = 0
            super().write_exploration(found)

    strategy = AutoFlip(inner(), seed=3, checkpoints=Filling(tmp_path), method=LossExploration.static(epochs=1))
    random.seed(1)
    np.random.seed(1)
    result = strategy.start(LocalGrid(message_app(), NODES), record(model()), num_rounds=ROUNDS, evaluate_fn=evaluate)
    same(result, whole)
    assert "the checkpoint of round 2 could not be written" in caplog.text
    assert "the exploration could not be written: [Errno 28] No space left" in caplog.text


def test_state_that_cannot_be_kept_is_named_at_the_start(tmp_path):
    class Locked(FedAvg):
        def __init__(self, **options):
            super().__init__(**options)
            self.guard = threading.Lock()

    with pytest.raises(ValueError, match=r"the state of Locked cannot be kept: Locked.guard is a lock; give Locked"):
        run(tmp_path, lambda: inner(Locked))


class Counting(FedAvg):
    """Has state that only it can tell."""

    def __init__(self, **options):
        super().__init__(**options)
        self.guard = threading.Lock()
        self.seen = 0

    def aggregate_train(self, server_round, replies):
        self.seen += 1
        return super().aggregate_train(server_round, replies)

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def test_a_strategy_may_tell_its_own_state(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, lambda: inner(Counting), dies_in=3)
    _, strategy, _ = run(tmp_path, lambda: inner(Counting), resume=True)
    assert strategy.strategy.seen == ROUNDS


class Budget:
    """An attribute that tells its own state, as Flower's privacy accountant does."""

    def __init__(self):
        self.spent, self.guard = 0, threading.Lock()

    def state_dict(self):
        return {"spent": self.spent}

    def load_state_dict(self, state):
        self.spent = state["spent"]


class Spending(FedAvg):
    def __init__(self, **options):
        super().__init__(**options)
        self.budget = Budget()

    def aggregate_train(self, server_round, replies):
        self.budget.spent += 1
        return super().aggregate_train(server_round, replies)


def test_so_may_what_a_strategy_holds(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, lambda: inner(Spending), dies_in=3)
    _, strategy, _ = run(tmp_path, lambda: inner(Spending), resume=True)
    assert strategy.strategy.budget.spent == ROUNDS


def test_a_strategy_with_a_loop_of_its_own_is_refused(tmp_path):
    class Own(FedAvg):
        def start(self, *args, **kwargs):
            return super().start(*args, **kwargs)

    with pytest.raises(ValueError, match="Own has a start of its own, whose variables cannot be kept"):
        run(tmp_path, lambda: inner(Own))


def test_values_come_back_as_they_were():
    value = {
        "a": [1, 2.5, None, True, "x", b"\x00\xff", (1, (2,)), {3}, float("inf")],
        4: np.arange(6, dtype=np.float16).reshape(2, 3),
        "s": np.float64(0.1),
        "r": ArrayRecord({"w": record({"w": np.ones((2, 0), np.float32)})["w"]}),
        "m": MetricRecord({"x": 1, "y": [0.1, 2.0]}),
        "c": ConfigRecord({"x": "y", "z": b"1"}),
        "e": {},
    }
    arrays = {}
    back = decode(encode(value, arrays, "v"), arrays)
    assert list(back) == list(value)
    assert back["a"] == value["a"]
    assert back[4].dtype == np.float16
    assert (back[4] == value[4]).all()
    assert back["s"] == 0.1
    assert type(back["s"]) is np.float64
    assert (back["m"], back["c"]) == (value["m"], value["c"])
    assert back["r"]["w"].numpy().shape == (2, 0)
    with pytest.raises(ValueError, match=r"v.x.1 is a object"):
        encode({"x": [1, object()]}, {}, "v")
    with pytest.raises(ValueError, match=r"v is an array of object"):
        encode(np.array([None]), {}, "v")
