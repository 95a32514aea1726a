"""Which updates are too long: none of honest clients, whatever their data; those of liars, with few replies as well."""

from __future__ import annotations

import logging
import math
import random

import numpy as np
import pytest
from apps import NO_FAILURES
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import EVERY_STRATEGY

from autoflip_flwr import AutoFlip, autoflip_mod
from autoflip_flwr.core.methods import LossExploration
from autoflip_flwr.costs.ledger import Ledger
from autoflip_flwr.replies.norms import Update, find_outliers, joint_norm
from autoflip_flwr.replies.quarantine import Quarantine, ReplyRules
from autoflip_flwr.testing import LocalGrid
from autoflip_flwr.wire.keys import PHASE_KEY
from autoflip_flwr.wire.records import to_arrays, to_record
from benchmarks import digits, honest


def updates(*norms, weights=None, processed=None, model=0.0):
    weights = weights or [1.0] * len(norms)
    processed = processed or [None] * len(norms)
    return {
        node: Update(norm, weight, count, model)
        for node, (norm, weight, count) in enumerate(zip(norms, weights, processed, strict=True))
    }


def far(found, factor=10.0, earlier=0.0):
    return list(find_outliers(found, factor, earlier)[0])


def odd(found, factor=1000.0, earlier=0.0):
    return list(find_outliers(found, factor, earlier)[1])


def test_a_norm_is_told_by_the_low_median_from_two_replies_on():
    assert far(updates(2.0, 2.0, 2.0, 20.1, 19.9)) == [3]
    assert far(updates(1.0, 10.1)) == [1]
    assert far(updates(1.0, 9.9)) == []
    assert far(updates(5.0)) == []
    assert far(updates(5.0), earlier=0.4) == [0]
    assert far(updates(5.0), earlier=0.6) == []


def test_who_has_not_moved_tells_nothing_of_the_others():
    assert far(updates(0.0, 0.0, 0.0, 5.0, 6.0)) == []
    assert far(updates(0.0, 5.0)) == []
    assert far(updates(0.0, 5.0), earlier=0.4) == [1]
    assert far(updates(0.0, 0.0)) == []


@pytest.mark.parametrize("stated", ["weights", "processed"])
def test_stated_work_lengthens_what_is_explained_a_hundredfold_at_most(stated):
    assert far(updates(1.0, 1.0, 199.0, **{stated: [10, 10, 200]})) == []
    assert far(updates(1.0, 1.0, 201.0, **{stated: [10, 10, 200]})) == [2]
    assert far(updates(1.0, 1.0, 999.0, **{stated: [10, 10, 10**9]})) == []
    assert far(updates(1.0, 1.0, 1001.0, **{stated: [10, 10, 10**9]})) == [2]
    assert far(updates(1.0, 1.0, 9.9, **{stated: [10, 10, 1]})) == []  # little work shortens nothing


def test_by_default_no_update_is_too_long_that_the_model_outgrows():
    assert far(updates(1.0, 1.0, 1001.0), 1000.0) == [2]
    assert far(updates(1.0, 1.0, 1001.0, model=1002.0), 1000.0) == []
    assert far(updates(1.0, 1.0, 1003.0, model=1002.0), 1000.0) == [2]
    assert far(updates(1.0, 1.0, 1001.0, model=1002.0), 999.0) == [2]  # a stricter factor is taken at its word
    assert far(updates(1.0, 1.0, 1e300), math.inf) == []


def test_what_is_ten_times_too_long_and_counts_is_odd():
    assert odd(updates(1.0, 1.0, 11.0)) == [2]
    assert odd(updates(1.0, 1.0, 9.0)) == []
    assert odd(updates(1.0, 1.0, 11.0), factor=10.5) == []  # it is left out
    assert odd(updates(1.0, 1.0, 11.0), factor=math.inf) == [2]
    assert odd(updates(1.0, 1.0, 11.0), earlier=2.0) == []


def test_earlier_rounds_explain_unless_the_factor_is_stricter():
    assert far(updates(1.0, 1.0, 1999.0), 1000.0, earlier=2.0) == []
    assert far(updates(1.0, 1.0, 2001.0), 1000.0, earlier=2.0) == [2]
    assert far(updates(1.0, 1.0, 1001.0), 1000.0, earlier=0.5) == [2]
    assert far(updates(1.0, 1.0, 11.0), 10.0, earlier=2.0) == [2]


def test_the_largest_median_that_counted_is_remembered_and_survives_a_checkpoint():
    quarantine = Quarantine(ReplyRules(norm_factor=10.0), Ledger())
    assert list(quarantine.judge_norms(updates(1.0, 3.0, 3.0, 90.0), "train", 1)) == [3]
    assert quarantine.longest == 3.0
    quarantine.judge_norms(updates(0.1, 0.1), "train", 2)
    after = Quarantine(ReplyRules(norm_factor=10.0), Ledger())
    after.load(quarantine.state())
    assert list(after.judge_norms(updates(29.0), "train", 3)) == []
    assert list(after.judge_norms(updates(291.0), "train", 4)) == [0]


def test_a_joint_norm_is_wide_enough_for_halves():
    assert joint_norm([np.full(4, 6e4, np.float16), np.zeros(0, np.float32)]) == pytest.approx(1.2e5, rel=1e-3)
    assert joint_norm([np.full(2, 3e38, np.float32)]) == math.inf


# federations

W0 = {"w": np.ones((4, 4), np.float32), "running_var": np.ones(4, np.float32)}


def moving(move, examples=lambda part: 10, processed=None, statistics=lambda part: 0.1):
    """Clients that move each weight by ``move(part, round)``, and each running statistic by ``statistics(part)``."""
    app = ClientApp(mods=[autoflip_mod])

    @app.train()
    def train(message, context):
        part = context.node_config["partition-id"]
        config = message.content["config"]
        step = move(part, 0 if PHASE_KEY in config else config["server-round"])
        given = to_arrays(message.content["arrays"])
        new = {"w": given["w"] + np.float32(step), "running_var": given["running_var"] + np.float32(statistics(part))}
        metrics = {"num-examples": examples(part)} | (
            {} if processed is None else {"examples-processed": processed(part)}
        )
        return Message(RecordDict({"arrays": to_record(new), "metrics": MetricRecord(metrics)}), reply_to=message)

    return app


def federation(app, nodes, rounds=1, rules=None, wrap=True, **options):
    random.seed(7)
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
    if wrap:
        strategy = AutoFlip(
            strategy, rules=rules, **{"sparsity": 0.0, "method": LossExploration.static(min_explorers=1), **options}
        )
    start = ArrayRecord({name: Array(array) for name, array in W0.items()})
    return strategy, to_arrays(strategy.start(LocalGrid(app, nodes), start, num_rounds=rounds).arrays)


def left_out(strategy):
    return [
        (each["phase"], each["round"], each["node"] % 100)
        for each in strategy.ledger.incidents
        if each["kind"] == "rejected"
    ]


def only(part, value, others):
    """A function of the partition: ``value`` for one, ``others`` for the rest."""
    return lambda each, *_: value if each == part else others


HONEST = {
    "five sites of 20 examples and one of 4,000": (6, moving(only(5, 2.0, 0.01), only(5, 4000, 20))),
    "stragglers of one step beside 25": (5, moving(lambda part, _: 2.5 if part > 2 else 0.1)),
    "one with 300 epochs": (5, moving(only(4, 3.0, 0.01), processed=only(4, 3000, 10))),
    "one scanner with other grey values": (6, moving(only(9, 0.1, 0.1), statistics=only(0, 1e5, 0.1))),
    "one has converged, one has not": (2, moving(only(0, 1e-7, 0.9))),
    "one has not moved": (2, moving(only(0, 0.0, 0.9))),
    "one alone in each round": (1, moving(lambda _, round_: 10.0**-round_)),
}


@pytest.mark.parametrize("kind", HONEST)
def test_honest_clients_count_whatever_their_data(kind):
    nodes, app = HONEST[kind]
    strategy, found = federation(app, nodes, rounds=2)
    _, expected = federation(app, nodes, rounds=2, wrap=False)
    assert left_out(strategy) == []
    assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("nodes", [2, 3, 4, 5])
def test_an_update_a_million_times_too_long_does_not_count(nodes, first, sparsity):
    def move(part, round_):
        return (1e5 if part == 1 and round_ >= first else 0.1) * np.arange(1, 17).reshape(4, 4)

    app = moving(move, lambda part: 1e9 if part == 1 else 10)
    strategy, found = federation(app, nodes, rounds=2, sparsity=sparsity)
    assert left_out(strategy) == [("train", round_, 1) for round_ in range(first, 3)]
    assert np.abs(found["w"]).max() < 5


@pytest.mark.parametrize("nodes", [3, 5])
def test_nor_does_an_exploration_that_long(nodes):
    app = moving(lambda part, round_: (1e5 if part == 1 and round_ == 0 else 0.1) * np.arange(1, 17).reshape(4, 4))
    strategy, _ = federation(app, nodes, sparsity=0.5)
    assert left_out(strategy) == [("exploration", 0, 1)]
    assert strategy.exploration.explorers == nodes - 1


def test_one_reply_alone_is_judged_by_earlier_rounds():
    app = moving(lambda _, round_: 1e5 if round_ == 3 else 0.1)
    strategy, found = federation(app, 1, rounds=4)
    assert left_out(strategy) == [("train", 3, 0)]
    np.testing.assert_allclose(found["w"], 1.3, rtol=1e-6)


def test_what_is_odd_is_noted_and_counts_and_rests_nobody(caplog):
    app = moving(lambda part, _: 5.0 if part == 0 else 0.1)
    with caplog.at_level(logging.WARNING, "flwr"):
        strategy, found = federation(app, 5, rounds=5, rules=ReplyRules(strikes=1))
    assert [(each["kind"], each["round"]) for each in strategy.ledger.incidents] == [("odd", n) for n in range(1, 6)]
    assert strategy.ledger.incidents[0]["reason"].startswith(
        "the norm of its update is 20, 50 times what other replies"
    )
    assert strategy.ledger.failures["odd"] == 5
    assert strategy.ledger.failure_counts() == NO_FAILURES
    assert sum("counts, but" in each.getMessage() for each in caplog.records) == 1
    np.testing.assert_allclose(found["w"], 1 + 5 * 1.08, rtol=1e-5)


def test_a_stricter_factor_is_the_users_choice():
    app = moving(lambda part, _: 0.5 if part == 0 else 0.01)
    strategy, _ = federation(app, 2, rules=ReplyRules(norm_factor=10.0))
    assert left_out(strategy) == [("train", 1, 0)]


# properties

sites = st.tuples(st.integers(1, 300), st.integers(1, 30), st.floats(-1, 1).map(lambda power: 10.0**power))
quick = settings(max_examples=2, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize("name", EVERY_STRATEGY)
@quick
@given(drawn=st.lists(sites, min_size=7, max_size=8))
def test_with_nothing_pruned_honest_data_give_the_wrapped_strategys_result(name, drawn):
    images, labels = digits.load().train
    each = [
        honest.Site(images[start : start + size] * np.float32(scale), labels[start : start + size], steps)
        for start, (size, steps, scale) in enumerate(drawn)
    ]
    app = honest.client_app(each, mods=[autoflip_mod, *digits.mods_for(name)])

    def run(wrap):
        random.seed(7)
        np.random.seed(7)
        strategy = wrap(digits.STRATEGIES[name](len(each)))
        return strategy, strategy.start(LocalGrid(app, len(each)), to_record(digits.model(counter=False)), num_rounds=2)

    strategy, result = run(lambda inner: AutoFlip(inner, sparsity=0.0))
    _, expected = run(lambda inner: inner)
    assert left_out(strategy) == []
    found = to_arrays(result.arrays)
    for key, array in to_arrays(expected.arrays).items():
        assert found[key].tobytes() == array.tobytes(), key
    assert str(result.train_metrics_clientapp) == str(expected.train_metrics_clientapp)
