"""Strategies that differ from FedAvg in more than their averaging, and runs that differ from one plain start."""

from __future__ import annotations

import random

import numpy as np
import pytest
from apps import NO_FAILURES, arrays_of, message_app, model, record, same_bytes, step
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdam, FedAvg, Strategy
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from autoflip_flwr import AutoFlip, autoflip_mod
from autoflip_flwr.core.methods import LossExploration
from autoflip_flwr.testing import LocalGrid
from autoflip_flwr.wire.keys import HEADER, MASK_RECORD, PHASE_KEY, TRAIN

NODES = 4


def floats():
    return record({name: array for name, array in model().items() if array.dtype.kind == "f"})


def start(strategy, grid, arrays=None, rounds=2, **options):
    random.seed(7)
    return strategy.start(grid, floats() if arrays is None else arrays, rounds, **options)


def fedavg(**options):
    return FedAvg(fraction_evaluate=0.0, **options)


class Plain(Strategy):
    """Knows nothing of weights and metrics: it averages by itself, and each node gets a config of its own."""

    def configure_train(self, server_round, arrays, config, grid):
        def content(node):
            return RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": server_round, "who": node})})

        return [Message(content(node), node, "train") for node in grid.get_node_ids()]

    def aggregate_train(self, server_round, replies):
        replies = [reply for reply in replies if not reply.has_error()]
        alike = [RecordDict({"arrays": r.content["arrays"], "metrics": MetricRecord({"n": 1})}) for r in replies]
        return aggregate_arrayrecords(alike, "n"), MetricRecord({"replies": len(replies)})

    def configure_evaluate(self, server_round, arrays, config, grid):
        return []

    def aggregate_evaluate(self, server_round, replies):
        return None

    def summary(self):
        pass


class Outer(Plain):
    """Wraps another strategy under a name of its own."""

    def __init__(self, inner):
        self.inner = inner

    def configure_train(self, *arguments):
        return self.inner.configure_train(*arguments)

    def aggregate_train(self, *arguments):
        return self.inner.aggregate_train(*arguments)


def app(metrics, mods, asked=None):
    """A client whose metrics are ``metrics(node)``, or that sends none."""
    client = ClientApp(mods=mods)

    @client.train()
    def train(message, context):
        config = message.content["config"]
        if asked is not None:
            asked.append((context.node_id, config["who"], PHASE_KEY in config))
        new = step(arrays_of(message.content["arrays"]), context, config["server-round"], PHASE_KEY in config)
        told = metrics(context.node_id)
        content = {"arrays": record(new)} | ({} if told is None else {"metrics": MetricRecord(told)})
        return Message(RecordDict(content), reply_to=message)

    return client


METRICS = {
    "none": lambda node: None,
    "no number of examples": lambda node: {"loss": 1.0},
    "others on each node": lambda node: {f"loss-{node}": 1.0},
}


@pytest.mark.parametrize("metrics", METRICS.values(), ids=METRICS)
def test_a_strategy_without_a_weight_asks_nothing_of_metrics(metrics):
    asked: list[tuple[int, int, bool]] = []
    expected = start(Plain(), LocalGrid(app(metrics, []), NODES))
    full = start(AutoFlip(Plain(), sparsity=0.0), LocalGrid(app(metrics, [autoflip_mod]), NODES))
    same_bytes(arrays_of(expected.arrays), arrays_of(full.arrays))
    pruned = AutoFlip(Plain(), sparsity=0.5)
    result = start(pruned, LocalGrid(app(metrics, [autoflip_mod], asked), NODES))
    assert pruned.ledger.failure_counts() == NO_FAILURES
    assert result.train_metrics_clientapp[2] == {"replies": NODES}
    assert sum(exploring for *_, exploring in asked) == NODES
    assert all(node == who for node, who, _ in asked)  # explorers get their own config too


def test_a_strategy_inside_another_is_found_under_any_name():
    clients = LocalGrid(app(lambda node: {"n": node}, [autoflip_mod]), NODES)

    class Config(FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            return Plain.configure_train(self, server_round, arrays, config, grid)

    strategy = AutoFlip(Outer(Config(weighted_by_key="n")), sparsity=0.5)
    start(strategy, clients)
    assert strategy.ledger.failure_counts() == NO_FAILURES
    with pytest.raises(ValueError, match="AutoFlip inside another strategy"):
        AutoFlip(Outer(AutoFlip(fedavg())))


# --- a start of its own ----------------------------------------------------------------------------------------------


class Few(FedAvg):
    def start(self, grid, initial_arrays, num_rounds):
        return super().start(grid, initial_arrays, num_rounds)


class Swapped(FedAvg):
    def start(self, grid, initial_arrays, num_rounds=3, train_config=None, timeout=1.0, save_path=""):
        self.told = (dict(train_config or {}), timeout, save_path)
        self.made_here = 1
        return super().start(grid, initial_arrays, num_rounds, timeout, train_config)

    def configure_train(self, server_round, arrays, config, grid):
        assert self.made_here
        return super().configure_train(server_round, arrays, config, grid)


def test_a_start_of_its_own_may_have_other_parameters(caplog):
    result = start(AutoFlip(Few(fraction_evaluate=0.0), sparsity=0.5), LocalGrid(message_app(), NODES))
    assert result.arrays
    strategy = AutoFlip(Swapped(fraction_evaluate=0.0), sparsity=0.5)
    start(strategy, LocalGrid(message_app(), NODES), train_config=ConfigRecord({"lr": 0.5}), save_path="here")
    assert strategy.told == ({"lr": 0.5}, 3600, "here")
    assert "could not copy Swapped to see its round-1 messages" in caplog.text  # what its start makes is not there yet
    with pytest.raises(TypeError, match="save_path"):
        start(AutoFlip(fedavg(), sparsity=0.0), LocalGrid(message_app(), NODES), save_path="here")


def test_an_uncopyable_strategy_explores_under_its_own_keys():
    class Locked(FedAvg):
        def __deepcopy__(self, memo):
            raise TypeError("a lock")

    def rename(message, context, call_next):
        message.content = RecordDict({"arrays": message.content["arrays"], "config": message.content["cfg"]})
        return call_next(message, context)

    strategy = AutoFlip(Locked(fraction_evaluate=0.0, configrecord_key="cfg"), sparsity=0.5)
    start(strategy, LocalGrid(message_app(mods=[autoflip_mod, rename]), NODES))
    assert strategy.ledger.failure_counts() == NO_FAILURES


# --- settings after the fact, and a second start ---------------------------------------------------------------------


def test_what_is_set_on_autoflip_reaches_the_strategy():
    strategy = AutoFlip(fedavg(), sparsity=0.0)
    strategy.fraction_train, strategy.min_train_nodes = 0.5, 1
    grid = LocalGrid(message_app(), NODES)
    start(strategy, grid, rounds=1)
    assert len(grid.sent) == 2


def test_a_metric_function_set_later_sees_full_arrays():
    seen = []

    def metrics(records, weight_key):
        seen.extend(content["arrays"]["out.weight"].numpy().shape for content in records)
        return MetricRecord({"nodes": len(records)})

    strategy = AutoFlip(fedavg(), sparsity=0.5)
    strategy.strategy.train_metrics_aggr_fn = metrics
    start(strategy, LocalGrid(message_app(), NODES), rounds=1)
    assert seen == [(3, 6)] * NODES


def test_a_metric_function_that_is_a_property_sees_full_arrays():
    seen = []

    class Own(FedAvg):
        @property
        def train_metrics_aggr_fn(self):
            def metrics(records, weight_key):
                seen.extend(content["arrays"]["out.weight"].numpy().shape for content in records)
                return MetricRecord({"nodes": len(records)})

            return metrics

        @train_metrics_aggr_fn.setter
        def train_metrics_aggr_fn(self, function):
            pass

    start(AutoFlip(Own(fraction_evaluate=0.0), sparsity=0.5), LocalGrid(message_app(), NODES), rounds=1)
    assert seen == [(3, 6)] * NODES


def test_a_second_start_goes_on_from_the_first_ones_result():
    alone, wrapped = FedAdam(fraction_evaluate=0.0), AutoFlip(FedAdam(fraction_evaluate=0.0), sparsity=0.0)
    results = []
    for strategy, mods in ((alone, []), (wrapped, [autoflip_mod])):
        first = start(strategy, LocalGrid(message_app(mods=mods), NODES))
        assert first.arrays["out.weight"].numpy().dtype == np.float64
        model32 = {name: array.astype(np.float32) for name, array in arrays_of(first.arrays).items()}
        again = first.arrays if strategy is wrapped else record(model32)
        results.append(start(strategy, LocalGrid(message_app(mods=mods), NODES), again))
    same_bytes(*(arrays_of(each.arrays) for each in results))


def test_scouts_move_the_start_once():
    strategy = AutoFlip(fedavg(), sparsity=0.5, method=LossExploration.static(initial="explorers"))
    first = start(strategy, LocalGrid(message_app(), NODES))
    seen = {}
    start(strategy, LocalGrid(message_app(), NODES), first.arrays, evaluate_fn=lambda r, a: seen.setdefault(r, a))
    same_bytes(arrays_of(seen[0]), arrays_of(first.arrays))


def test_a_message_keeps_a_shorter_time_to_live_of_its_own():
    class Hasty(FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            messages = list(super().configure_train(server_round, arrays, config, grid))
            messages[0].metadata.ttl = 30.0
            return messages

    grid = LocalGrid(message_app(), NODES)
    start(AutoFlip(Hasty(fraction_evaluate=0.0), sparsity=0.0), grid, rounds=1, timeout=90)
    assert sorted(message.metadata.ttl for message in grid.sent) == [30, 90, 90, 90]


# --- what the exploration and the replies say ------------------------------------------------------------------------


def test_layers_that_nobody_moves_are_named(caplog):
    def frozen(message, context, call_next):
        reply = call_next(message, context)
        reply.content["arrays"]["hidden.weight"] = message.content["arrays"]["hidden.weight"]
        return reply

    start(AutoFlip(fedavg(), sparsity=0.5), LocalGrid(message_app(mods=[autoflip_mod, frozen]), NODES), rounds=1)
    assert "no explorer moved hidden.weight: what is frozen" in caplog.text


def test_a_model_with_infinite_values_is_refused_before_any_client_works():
    grid = LocalGrid(message_app(), NODES)
    arrays = {**arrays_of(floats()), "causal": np.full((2, 2), -np.inf, np.float32)}
    with pytest.raises(ValueError, match="array 'causal' of the initial model holds NaN or infinity"):
        AutoFlip(fedavg(), sparsity=0.5).start(grid, record(arrays))
    assert grid.sent == []


def test_integers_come_from_a_reply_that_counts():
    def heavy(reply):
        if reply.metadata.src_node_id == 103 and reply.content[HEADER]["phase"] == TRAIN:
            reply.content["more metrics"] = MetricRecord({"extra": 1.0})
        return reply

    strategy = AutoFlip(fedavg(), sparsity=0.0)
    result = strategy.start(LocalGrid(message_app(), NODES, tamper=heavy), record(model()), num_rounds=1)
    assert strategy.ledger.failure_counts()["rejected"] == 1
    assert result.arrays["steps"].numpy() == 3  # node 102's; node 103 says 4


def test_a_strategy_that_asks_its_nodes_between_rounds_does_not_cost_them_the_mask():
    class Polling(FedAvg):
        def configure_train(self, server_round, arrays: ArrayRecord, config, grid):
            asking = [Message(RecordDict({"config": ConfigRecord()}), n, "query") for n in grid.get_node_ids()]
            grid.send_and_receive(asking)
            return super().configure_train(server_round, arrays, config, grid)

    client = message_app()

    @client.query()
    def query(message, context):
        return Message(RecordDict(), reply_to=message)

    grid = LocalGrid(client, NODES)
    start(
        AutoFlip(Polling(fraction_evaluate=0.0), sparsity=0.5, method=LossExploration.static(min_explorers=1)),
        grid,
        rounds=3,
    )
    rounds = [m for m in grid.sent if HEADER in m.content and m.content[HEADER]["phase"] == TRAIN]
    assert [MASK_RECORD in m.content for m in rounds] == [True] * NODES + [False] * 2 * NODES
