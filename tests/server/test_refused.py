"""A round that is refused leaves the model, its integers and the wrapped strategy's state as they were."""

from __future__ import annotations

import random

import numpy as np
import pytest
from apps import message_app, model, record
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAdam, FedAvg, FedAvgM, FedYogi

from autoflip_flwr import AutoFlip, autoflip_mod
from autoflip_flwr.replies.quarantine import ReplyRules
from autoflip_flwr.testing import LocalGrid
from autoflip_flwr.wire.records import to_arrays
from autoflip_flwr.wrapped.snapshot import undo_of

NODES, ROUNDS, REFUSED = 3, 4, 2

STATEFUL = {
    "FedAvgM": (FedAvgM, {"server_momentum": 0.9, "server_learning_rate": 0.5}),
    "FedAdam": (FedAdam, {"eta": 0.05}),
    "FedYogi": (FedYogi, {"eta": 0.05}),
    "FedAvg": (FedAvg, {}),
}


def diverging(kind):
    """A strategy that updates its state in round 2, and returns NaN."""

    class Diverging(kind):
        def aggregate_train(self, server_round, replies):
            arrays, metrics = super().aggregate_train(server_round, replies)
            if server_round == REFUSED:
                nothing = {name: np.full_like(array.numpy(), np.nan) for name, array in arrays.items()}
                arrays = ArrayRecord({name: Array(array) for name, array in nothing.items()})
            return arrays, metrics

    return Diverging


def skipping(kind):
    """A strategy that aggregates nothing in round 2."""

    class Skipping(kind):
        def aggregate_train(self, server_round, replies):
            return (None, None) if server_round == REFUSED else super().aggregate_train(server_round, replies)

    return Skipping


def run(inner, mods=(), rules=None):
    """The integers that each message carries, by round, and the final arrays."""
    random.seed(7)
    seen = {}

    def see(message, _context):
        arrays = to_arrays(message.content["arrays"])
        seen[message.content["config"]["server-round"]] = {n: a for n, a in arrays.items() if a.dtype.kind not in "f"}

    strategy = AutoFlip(inner, sparsity=0.0, seed=1, rules=rules, coordinates="packed")
    grid = LocalGrid(message_app(see, mods=[autoflip_mod, *mods]), NODES)
    return seen, strategy, to_arrays(strategy.start(grid, record(model()), num_rounds=ROUNDS).arrays)


@pytest.mark.parametrize("name", STATEFUL)
def test_a_result_that_is_not_finite_leaves_the_strategys_state_as_it_was(name):
    kind, options = STATEFUL[name]
    _, strategy, found = run(diverging(kind)(fraction_evaluate=0.0, **options))
    _, _, expected = run(skipping(kind)(fraction_evaluate=0.0, **options))
    assert [(each["kind"], each["round"]) for each in strategy.ledger.incidents] == [("unchanged", REFUSED)]
    for key, array in expected.items():
        if array.dtype.kind == "f":
            assert found[key].tobytes() == array.tobytes(), key


def away(message, context, call_next):
    """A mod of whose nodes one fails in round 2."""
    if message.content["config"]["server-round"] == REFUSED and context.node_config["partition-id"] == 0:
        raise OSError("the link is down")
    return call_next(message, context)


REFUSALS = {
    "not finite": (diverging(FedAvg)(fraction_evaluate=0.0), (), None),
    "too few": (FedAvg(fraction_evaluate=0.0), (away,), ReplyRules(min_replies=NODES)),
    "privacy": (
        DifferentialPrivacyServerSideFixedClipping(
            FedAvg(fraction_evaluate=0.0), noise_multiplier=0.01, clipping_norm=5.0, num_sampled_clients=NODES
        ),
        (away,),
        None,
    ),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_refused_round_leaves_integers_as_they_were(kind):
    inner, mods, rules = REFUSALS[kind]
    seen, strategy, _ = run(inner, mods, rules)
    assert [each["round"] for each in strategy.ledger.incidents if each["kind"] == "unchanged"] == [REFUSED]
    assert seen[1].keys()
    assert all((seen[1][name] != seen[2][name]).any() for name in seen[1])
    assert all((seen[2][name] == seen[3][name]).all() for name in seen[2])
    assert all((seen[3][name] != seen[4][name]).any() for name in seen[3])


def test_attributes_and_the_entries_of_containers_come_back_and_stay_the_same_objects():
    strategy = FedAvg(fraction_evaluate=0.0)
    strategy.losses, strategy.best, strategy.nodes = [1.0], {"loss": 1.0}, {1}
    losses, best, nodes = strategy.losses, strategy.best, strategy.nodes
    undo = undo_of(strategy)
    losses.append(2.0)
    best.update(loss=2.0, round=2)
    nodes.add(2)
    strategy.losses, strategy.new = [], 1
    undo()
    assert strategy.losses is losses
    assert (strategy.losses, strategy.best, strategy.nodes) == ([1.0], {"loss": 1.0}, {1})
    assert strategy.best is best
    assert strategy.nodes is nodes
    assert not hasattr(strategy, "new")


def test_what_a_privacy_wrapper_has_released_stays_released():
    strategy = DifferentialPrivacyServerSideFixedClipping(
        FedAvgM(fraction_evaluate=0.0), noise_multiplier=1.0, clipping_norm=1.0, num_sampled_clients=2
    )
    undo = undo_of(strategy)
    strategy.clipping_norm, strategy.strategy.momentum_vector = 0.5, [np.ones(1)]
    undo()
    assert strategy.clipping_norm == 0.5
    assert strategy.strategy.momentum_vector is None
