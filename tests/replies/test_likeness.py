"""Metrics are the user's: whatever a client reports, its weights count, and what Flower cannot average is left out."""

from __future__ import annotations

import logging
import math
import random

import numpy as np
import pytest
from apps import arrays_of, model, record
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, QFedAvg

from autoflip_flwr import AutoFlip, autoflip_mod
from autoflip_flwr.replies.likeness import disputed_metrics, without_metrics
from autoflip_flwr.replies.quarantine import ReplyRules
from autoflip_flwr.testing import LocalGrid
from autoflip_flwr.wire.records import to_arrays

NODES = 3
NAN = math.nan


def app(train=lambda part, round_: {}, evaluate=lambda part, round_: {}, weight=lambda part, round_: 10):
    """Clients with these metrics by partition and round; ``weight`` is that of evaluations."""
    client = ClientApp(mods=[autoflip_mod])

    def asked(message, context):
        return context.node_config["partition-id"], message.content["config"]["server-round"]

    @client.train()
    def _train(message, context):
        part, round_ = asked(message, context)
        new = {
            name: array + np.float32(0.1 * (part + 1)) if array.dtype.kind == "f" else array
            for name, array in arrays_of(message.content["arrays"]).items()
        }
        metrics = MetricRecord({"num-examples": 10, **train(part, round_)})
        return Message(RecordDict({"arrays": record(new), "metrics": metrics}), reply_to=message)

    @client.evaluate()
    def _evaluate(message, context):
        part, round_ = asked(message, context)
        metrics = MetricRecord({"num-examples": weight(part, round_), **evaluate(part, round_)})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return client


def run(client, inner=None, wrap=True, rounds=2, rules=None):
    random.seed(7)
    strategy = FedAvg() if inner is None else inner
    if wrap:
        strategy = AutoFlip(strategy, sparsity=0.0, rules=rules)
    floats = {name: array for name, array in model().items() if array.dtype.kind == "f"}
    return strategy, strategy.start(LocalGrid(client, NODES), record(floats), num_rounds=rounds)


def only(part, value, others):
    return lambda each, _: value if each == part else others


ODD = {
    "NaN": only(0, {"auc": NAN}, {"auc": 0.5}),
    "infinity": only(0, {"auc": math.inf}, {"auc": 0.5}),
    "both infinities": only(0, {"auc": math.inf}, {"auc": -math.inf}),
    "a list of NaN": only(0, {"auc": [NAN, 1.0]}, {"auc": [0.5, 0.5]}),
    "an integer beyond 2^53": only(0, {"auc": 2**62 + 1}, {"auc": 0.5}),
    "an empty list": only(0, {"auc": []}, {"auc": []}),
    "an integer among numbers": only(0, {"auc": 1}, {"auc": 0.5}),
}
"""What Flower averages in its own way."""

DISPUTED = {
    "one reports it": only(0, {"auc": 1.0}, {}),
    "one does not": only(0, {}, {"auc": 1.0}),
    "at times": lambda part, round_: {"auc": 1.0} if (part + round_) % 2 else {},
    "a list in one": only(0, {"auc": [1.0]}, {"auc": 1.0}),
    "another length": only(0, {"auc": [1.0, 2.0]}, {"auc": [1.0]}),
    "another name": only(0, {"surprise": 1.0}, {"auc": 1.0}),
}
"""What ends a run in Flower alone."""


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("phase", ["train", "evaluate"])
def test_an_odd_metric_is_passed_on_as_flower_passes_it(kind, phase):
    client = app(**{phase: ODD[kind]})
    strategy, result = run(client)
    _, expected = run(client, wrap=False)
    assert strategy.ledger.incidents == []
    assert str(result.train_metrics_clientapp) == str(expected.train_metrics_clientapp)
    assert str(result.evaluate_metrics_clientapp) == str(expected.evaluate_metrics_clientapp)
    for name, array in to_arrays(expected.arrays).items():
        assert to_arrays(result.arrays)[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("kind", DISPUTED)
@pytest.mark.parametrize("phase", ["train", "evaluate"])
def test_what_ends_a_run_in_flower_is_left_out_of_the_mean_with_one_warning(kind, phase, caplog):
    def metrics(part, round_):
        return {"loss": float(part), **DISPUTED[kind](part, round_)}

    with caplog.at_level(logging.WARNING, "flwr"):
        strategy, result = run(app(**{phase: metrics}), rounds=3)
    _, expected = run(app(), wrap=False, rounds=3)
    assert strategy.ledger.incidents == []
    for name, array in to_arrays(expected.arrays).items():
        assert to_arrays(result.arrays)[name].tobytes() == array.tobytes(), name
    found = result.train_metrics_clientapp if phase == "train" else result.evaluate_metrics_clientapp
    assert [dict(found[round_]) for round_ in (1, 2, 3)] == [pytest.approx({"loss": 1.0})] * 3
    said = [each.getMessage() for each in caplog.records if "is not averaged" in each.getMessage()]
    assert len(said) == len({each.split("metric ")[1] for each in said}) == (2 if kind == "another name" else 1)


def test_a_users_own_mean_gets_lists_of_different_lengths():
    seen = []

    def mean(contents, _key):
        seen.append([content["metrics"]["losses"] for content in contents])
        return MetricRecord({"count": sum(map(len, seen[-1]))})

    client = app(lambda part, _: {"losses": [1.0] * (part + 1)})
    strategy, result = run(client, FedAvg(fraction_evaluate=0.0, train_metrics_aggr_fn=mean), rounds=1)
    assert strategy.ledger.incidents == []
    assert result.train_metrics_clientapp[1]["count"] == 6
    assert sorted(map(len, seen[0])) == [1, 2, 3]


@pytest.mark.parametrize(
    "bad", [{"num-examples": NAN}, {"num-examples": [1.0]}, {"train_loss": NAN}, {"train_loss": [1.0]}]
)
def test_nobody_takes_the_weight_or_a_needed_metric_from_the_others(bad):
    client = app(only(0, {"train_loss": 1.0, **bad}, {"train_loss": 1.0}))
    strategy, result = run(client, QFedAvg(client_learning_rate=0.1, fraction_evaluate=0.0))
    assert [(each["kind"], each["node"]) for each in strategy.ledger.incidents] == [("rejected", 100)] * 2
    assert all(np.isfinite(array).all() for array in to_arrays(result.arrays).values())
    assert result.train_metrics_clientapp[2]["train_loss"] == 1.0


@pytest.mark.parametrize("weight", [0, 0.0, -1, NAN, [1.0]])
def test_an_evaluation_costs_a_node_no_training(weight, caplog):
    client = app(weight=only(0, weight, 5), evaluate=only(0, {"acc": 0.0}, {"acc": 0.5}))
    with caplog.at_level(logging.WARNING, "flwr"):
        strategy, result = run(client, rounds=5, rules=ReplyRules(strikes=1))
    assert strategy.ledger.replies["train"] == 5 * NODES
    assert {each["kind"] for each in strategy.ledger.incidents} == (set() if weight == 0 else {"rejected"})
    assert any("rejected the reply" in each.getMessage() for each in caplog.records) == (weight != 0)
    assert [dict(result.evaluate_metrics_clientapp[n]) for n in range(1, 6)] == [pytest.approx({"acc": 0.5})] * 5


def test_evaluations_that_all_weigh_nothing_have_no_metrics():
    strategy, result = run(app(weight=lambda *_: 0))
    assert result.evaluate_metrics_clientapp == {}
    assert sorted(result.train_metrics_clientapp) == [1, 2]
    assert strategy.ledger.incidents == []


def test_disputed_metrics_are_told_with_their_reason():
    contents = [
        RecordDict({"m": MetricRecord(values)}) for values in ({"a": 1, "b": [1.0]}, {"a": 2.0, "b": [1.0, 2.0]})
    ]
    assert disputed_metrics(contents, averaged=False) == {}
    assert disputed_metrics(contents, averaged=True) == {
        "b": "it is not a number in all replies, nor a list of one length"
    }
    assert disputed_metrics([*contents, RecordDict({"m": MetricRecord({"a": 3})})], averaged=False) == {
        "b": "2 of 3 replies report it"
    }
    assert dict(without_metrics(contents[0], ["b"])["m"]) == {"a": 1}
    assert disputed_metrics([], averaged=True) == {}
