"""A bad reply ends no run and poisons no model, whatever strategy is wrapped; it is noted and the rest counts."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from apps import message_app, model, record
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, FedTrimmedAvg, FedYogi, QFedAvg

from autoflip_flwr import AutoFlip, autoflip_mod
from autoflip_flwr.core.methods import LossExploration
from autoflip_flwr.costs.ledger import Ledger
from autoflip_flwr.replies.quarantine import Quarantine, ReplyRules
from autoflip_flwr.server.settings import Values
from autoflip_flwr.testing import LocalGrid
from autoflip_flwr.wire.keys import PHASE_KEY
from autoflip_flwr.wire.records import to_arrays, to_record
from benchmarks import digits

NODES, ROUNDS, HOSTILE = 8, 2, 0


def _values(change):
    def act(reply, before):
        name, arrays = next(iter(reply.content.array_records.items()))
        reply.content[name] = ArrayRecord(
            {key: Array(change(array.numpy(), before[key])) for key, array in arrays.items()}
        )

    return act


def _metrics(**values):
    def act(reply, _before):
        (metrics,) = reply.content.metric_records.values()
        metrics.update(values)

    return act


def _floats(change):
    return _values(lambda new, old: change(new, old).astype(new.dtype) if new.dtype.kind == "f" else new)


def _raise(_reply, _before):
    raise OSError("the link is down")


def _drop(kind):
    def act(reply, _before):
        for name in list(getattr(reply.content, kind)):
            del reply.content[name]

    return act


def _rename(kind):
    def act(reply, _before):
        for name in list(getattr(reply.content, kind)):
            reply.content[f"other {name}"] = reply.content.pop(name)

    return act


BAD = {
    "error": _raise,
    "NaN": _floats(lambda new, old: np.full_like(new, np.nan)),
    "infinity": _floats(lambda new, old: np.full_like(new, np.inf)),
    "overflowing": _floats(lambda new, old: np.full_like(new, 3e38)),
    "far away": _floats(lambda new, old: old + 1e6),
    "no examples": _metrics(**{"num-examples": 0}),
    "fewer than none": _metrics(**{"num-examples": -5}),
    "all the examples": _metrics(**{"num-examples": 10**12}),
    "examples NaN": _metrics(**{"num-examples": math.nan}),
    "other records": _rename("metric_records"),
    "no metrics": _drop("metric_records"),
    "no arrays": _drop("array_records"),
    "complex numbers": _values(lambda new, old: new.astype(np.complex64) if new.dtype.kind == "f" else new),
    "other shapes": _values(lambda new, old: new.reshape(-1)[:1] if new.ndim else new),
}
REFUSED_BY_THE_MOD = {"no arrays", "complex numbers", "other shapes"}


def hostile(act, exploring=False):
    """A mod right around the client's own code, of which one node behaves as told."""

    def mod(message, context, call_next):
        arrays = next(iter(message.content.array_records.values()), None)
        before = None if arrays is None else to_arrays(arrays)
        config = next((r for r in message.content.config_records.values() if "server-round" in r), {})
        reply = call_next(message, context)
        hit = message.metadata.message_type == "train" and (PHASE_KEY in config) == exploring and before is not None
        if hit and context.node_config["partition-id"] == HOSTILE:
            act(reply, before)
        return reply

    return mod


def run(strategy, mods, app=digits.client_app, start=None):
    random.seed(7)
    np.random.seed(7)
    grid = LocalGrid(app(mods), NODES)
    result = strategy.start(grid, to_record(digits.model(counter=False)) if start is None else start, ROUNDS)
    return result, grid


REPRESENTATIVE = ("FedAdam", "Krum", "DifferentialPrivacyServerSideFixedClipping")
"""With state, by distances, with noise for all replies; FedAvg has a stricter test below."""

COMBINATIONS = [(name, bad) for name in REPRESENTATIVE for bad in (*BAD, "zero")]
COMBINATIONS += [
    pytest.param(name, bad, marks=pytest.mark.runs)
    for name in digits.STRATEGIES
    if name not in REPRESENTATIVE
    for bad in ("NaN", "zero")
]


@pytest.mark.parametrize(("name", "bad"), COMBINATIONS)
def test_no_strategy_ends_or_is_poisoned(name, bad):
    act = BAD.get(bad, _values(lambda new, old: old))
    inner = digits.STRATEGIES[name](NODES)
    inner.noise_multiplier = inner.clipped_count_stddev = 0.0
    strategy = AutoFlip(inner, sparsity=0.5, mask=digits_mask())
    result, _ = run(strategy, [autoflip_mod, *digits.mods_for(name), hostile(act)])
    arrays = to_arrays(result.arrays)
    private = name.startswith("DifferentialPrivacy")
    assert arrays or private  # whose noise is scaled for all replies
    assert all(np.isfinite(array).all() for array in arrays.values())
    assert all(np.abs(array).max() < 100 for array in arrays.values())
    found = strategy.ledger.incidents
    if digits.mods_for(name) and bad in ("zero", "far away", "overflowing", "other shapes"):
        return  # Flower's own clipping mods divide by the norm at the client, clip what is far away, and broadcast
    if bad == "zero":
        assert not found
        assert strategy.ledger.replies["train"] == NODES * ROUNDS
        return
    assert {each["round"] for each in found} == set(range(1, ROUNDS + 1))
    assert {each["node"] for each in found if each["kind"] != "unchanged"} == {100 + HOSTILE}
    assert all(each["reason"] for each in found)
    assert [each["kind"] for each in found].count("unchanged") == (ROUNDS if private else 0)


@pytest.mark.parametrize("kind", [QFedAvg, FedYogi, FedTrimmedAvg])
def test_too_few_to_compare_norms_and_still_no_overflow_counts(kind):
    strategy, result, _ = federation([hostile(BAD["overflowing"])], inner=kind, nodes=3)
    assert strategy.ledger.failure_counts()["rejected"] == ROUNDS
    assert all(np.isfinite(array).all() for array in to_arrays(result.arrays).values())


class FromTheSecondRoundOn:
    """A mod of a node that answers as it should, and then does not."""

    def __init__(self, act):
        self.act, self.calls = act, 0

    def __call__(self, reply, before):
        self.calls += 1
        if self.calls > 1:
            self.act(reply, before)


@pytest.mark.parametrize(
    "bad", [_metrics(**{"train-loss": -1.0}), _metrics(**{"train-loss": 1e300}), _metrics(**{"train-loss": [1.0]})]
)
@pytest.mark.parametrize("nodes", [1, 2, 6])
def test_a_strategy_is_given_the_metrics_that_it_needs_or_no_reply(bad, nodes):
    strategy, result, _ = federation([hostile(FromTheSecondRoundOn(bad))], inner=QFedAvg, nodes=nodes, rounds=3)
    assert all(np.isfinite(array).all() for array in to_arrays(result.arrays).values())
    incidents = strategy.ledger.incidents
    assert [each["round"] for each in incidents] == [2, 3]
    assert "metric 'train-loss' is " in incidents[0]["reason"]
    assert "the strategy needs a number" in incidents[0]["reason"]


def test_of_two_that_differ_the_one_is_right_that_says_what_counted_before():
    act = FromTheSecondRoundOn(BAD["other records"])
    strategy, _, _ = federation([hostile(act)], nodes=2, rounds=3)
    assert [(each["round"], each["node"]) for each in strategy.ledger.incidents] == [(2, HOSTILE), (3, HOSTILE)]


class Diverging(FedAvg):
    """Returns NaN in round 2."""

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        if server_round == 2:
            arrays = ArrayRecord({name: Array(np.full_like(array.numpy(), np.nan)) for name, array in arrays.items()})
        return arrays, metrics


@pytest.mark.parametrize("values", ["float32", "bfloat16", "int8"])
def test_a_strategy_whose_result_is_not_finite_leaves_the_model_as_it_was(values):
    strategy, result, _ = federation([], inner=Diverging, rounds=3, values=Values(down=values))
    assert all(np.isfinite(array).all() for array in to_arrays(result.arrays).values())
    (incident,) = strategy.ledger.incidents
    assert incident["kind"] == "unchanged"
    assert incident["round"] == 2
    assert incident["reason"] == "what the strategy has made of the replies is not finite"
    assert incident["node"] is None
    assert strategy.ledger.replies["train"] == 3 * NODES


def digits_mask():
    from autoflip_flwr import Layout, Mask

    layout = Layout.of(digits.model(counter=False))
    draw = np.random.default_rng(1)
    return Mask.from_bool(layout, {spec.name: draw.random(spec.shape) < 0.5 for spec in layout.prunable})


def federation(mods, rules=None, rounds=ROUNDS, nodes=NODES, seed=1, inner=FedAvg, **options):
    random.seed(7)
    own = {"train_loss_key": "train-loss", "client_learning_rate": 0.1} if inner is QFedAvg else {}
    least = {"min_train_nodes": 1, "min_available_nodes": 1}
    options = {"method": LossExploration.static(epochs=1, min_explorers=1), **options}
    strategy = AutoFlip(inner(fraction_evaluate=0.0, **least, **own), seed=seed, rules=rules, **options)
    grid = LocalGrid(message_app(mods=[autoflip_mod, *mods]), nodes)
    result = strategy.start(grid, record(model()), num_rounds=rounds)
    return strategy, result, grid


@pytest.mark.parametrize("bad", BAD)
def test_the_rest_counts_as_if_the_bad_reply_had_never_come(bad):
    _, expected, _ = federation([hostile(BAD["error"])], ReplyRules(strikes=99))
    strategy, result, _ = federation([hostile(BAD[bad])], ReplyRules(strikes=99))
    for name, array in to_arrays(result.arrays).items():
        assert array.tobytes() == to_arrays(expected.arrays)[name].tobytes(), name
    kind = "errors" if bad == "error" or bad in REFUSED_BY_THE_MOD else "rejected"
    assert strategy.ledger.failure_counts()[kind] == ROUNDS
    assert [each["kind"] for each in strategy.ledger.incidents] == [kind] * ROUNDS
    assert {each["node"] for each in strategy.ledger.incidents} == {HOSTILE}  # its partition


@pytest.mark.parametrize("bad", [bad for bad in BAD if bad != "other records"])
@pytest.mark.parametrize("values", ["log8", "float32"])
def test_the_same_holds_for_explorers(bad, values):
    expected, _, _ = federation([hostile(BAD["error"], exploring=True)], rounds=1, values=Values(deltas=values))
    strategy, _, _ = federation([hostile(BAD[bad], exploring=True)], rounds=1, values=Values(deltas=values))
    assert strategy.exploration.explorers == NODES - 1
    assert strategy.mask == expected.mask
    assert strategy.ledger.incidents[0]["phase"] == "exploration"


def test_with_honest_clients_of_skewed_data_nothing_is_removed():
    strategy = AutoFlip(FedAvg(fraction_evaluate=0.0), method=LossExploration.static(epochs=2))
    run(strategy, [autoflip_mod])
    assert strategy.ledger.incidents == []


def test_fewer_replies_than_wanted_keep_the_model():
    seen = {}

    def act(reply, before):
        seen[len(seen)] = before  # what this node was sent
        BAD["NaN"](reply, before)

    strategy, result, _ = federation([hostile(act)], ReplyRules(min_replies=NODES, strikes=99))
    for name, array in to_arrays(result.arrays).items():  # as in Flower where no round counts
        assert array.tobytes() == seen[0][name].tobytes(), name
    assert all((seen[round_]["out.weight"] == seen[0]["out.weight"]).all() for round_ in range(ROUNDS))
    assert [each["reason"] for each in strategy.ledger.incidents if each["kind"] == "unchanged"] == [
        f"{NODES - 1} replies count, fewer than {NODES}"
    ] * ROUNDS
    _, result, _ = federation([], ReplyRules(min_replies=NODES))
    assert result.arrays


def test_a_node_that_is_left_out_again_and_again_rests():
    strategy, _, grid = federation([hostile(BAD["NaN"])], ReplyRules(strikes=2, pause=3), rounds=9)
    trained = {}
    for message in grid.sent:
        head = message.content.get("autoflip")
        if head is not None and head["phase"] == "train":
            trained.setdefault(head["round"], set()).add(message.metadata.dst_node_id - 100)
    assert [HOSTILE in trained[round_] for round_ in range(1, 10)] == [
        True, True, False, False, False, True, False, False, False,
    ]  # fmt: skip
    assert all(trained[round_] >= set(range(1, NODES)) for round_ in trained)
    paused = [each for each in strategy.ledger.incidents if each["kind"] == "paused"]
    assert [each["round"] for each in paused] == [2, 6]
    assert strategy.ledger.failure_counts()["rejected"] == 3


def test_a_node_whose_replies_count_in_between_does_not_rest():
    class Sometimes:
        calls = 0

    def act(reply, before):
        Sometimes.calls += 1
        if Sometimes.calls % 2:
            BAD["NaN"](reply, before)

    strategy, _, _ = federation([hostile(act)], ReplyRules(strikes=2), rounds=6)
    assert strategy.ledger.failure_counts()["rejected"] == 3
    assert all(each["kind"] == "rejected" for each in strategy.ledger.incidents)


def test_no_node_rests_where_the_strategy_needs_it():
    random.seed(7)
    inner = FedAvg(fraction_evaluate=0.0, min_available_nodes=NODES)
    strategy = AutoFlip(inner, seed=1, rules=ReplyRules(strikes=1), method=LossExploration.static(epochs=1))
    grid = LocalGrid(message_app(mods=[autoflip_mod, hostile(BAD["NaN"])]), NODES)
    strategy.start(grid, record(model()), num_rounds=3)
    assert strategy.ledger.failure_counts()["rejected"] == 3


def test_a_second_answer_and_an_old_one_do_not_count():
    class Twice(LocalGrid):
        old = None

        def pull_messages(self, message_ids):
            found = super().pull_messages(message_ids)
            return found + found[:1]

    random.seed(7)
    strategy = AutoFlip(FedAvg(fraction_evaluate=0.0), seed=1, method=LossExploration.static(epochs=1))
    result = strategy.start(Twice(message_app(), NODES), record(model()), num_rounds=2)
    _, expected, _ = federation([], rounds=2)
    for name, array in to_arrays(result.arrays).items():
        assert array.tobytes() == to_arrays(expected.arrays)[name].tobytes(), name


@pytest.mark.parametrize(
    "options", [{"norm_factor": 1.0}, {"norm_factor": math.nan}, {"max_examples": 0}, {"min_replies": 0}, {"pause": 0}]
)
def test_rules_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ReplyRules(**options)


def test_the_count_goes_on_after_a_restart():
    ledger = Ledger(partitions={7: 0})
    before = Quarantine(ReplyRules(strikes=2, pause=3), ledger)
    before.strike(7, "train", 1, "bad")
    after = Quarantine(ReplyRules(strikes=2, pause=3), ledger)
    after.load(before.state())
    after.strike(7, "train", 2, "bad")
    assert after.active([7, 8], 3, needed=1) == [8]
    assert after.active([7, 8], 5, needed=1) == [8]
    assert after.active([7, 8], 6, needed=1) == [7, 8]
    assert after.active([7, 8], 3, needed=2) == [7, 8]


def test_replies_of_one_message_count_once_in_the_records():
    app = ClientApp(mods=[autoflip_mod])

    @app.train()
    def train(message, context):
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": message.content["arrays"], "metrics": metrics}), reply_to=message)

    strategy = AutoFlip(FedAvg(fraction_evaluate=0.0), sparsity=0)
    strategy.start(LocalGrid(app, 2), record(model()), num_rounds=1)
    assert strategy.ledger.replies["train"] == 2
