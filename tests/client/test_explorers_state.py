"""What a client wrote while exploring does not reach round 1 unless it asks for that; its config tells them apart."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from apps import arrays_of, model, record
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, FedProx

from autoflip_flwr import AutoFlip, autoflip_mod, current_mask
from autoflip_flwr.client.mod import EXPLORED
from autoflip_flwr.core.methods import LossExploration
from autoflip_flwr.server.settings import Values
from autoflip_flwr.testing import LocalGrid
from autoflip_flwr.wire.keys import PHASE_KEY

Seen = list[tuple[int, bool, int, list[str]]]  # round, exploring, the client's own count, names of its records


def work(context: Context, config: dict, seen: Seen) -> None:
    """Counts its calls in place, keeps a head, and asks for one record to stay."""
    exploring = PHASE_KEY in config
    own = sorted(key for key in context.state if not key.startswith("autoflip"))
    if "count" not in context.state:
        context.state["count"] = ConfigRecord({"n": 0})
    seen.append((config["server-round"], exploring, context.state["count"]["n"], own))
    context.state["count"]["n"] += 1
    context.state["head"] = record({"h": np.ones(3) * len(seen)})
    if exploring:
        context.state[f"{EXPLORED}moments"] = ConfigRecord({"mean": 0.5})


def moved(arrays):
    return {name: array if array.dtype.kind == "i" else array * np.float32(1.1) for name, array in arrays.items()}


def client_of(look: Callable[[Context, ConfigRecord], None]) -> ClientApp:
    """A Message-API client; ``look`` sees its context and config before it answers."""
    app = ClientApp(mods=[autoflip_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        look(context, message.content["config"])
        arrays = record(moved(arrays_of(message.content["arrays"])))
        return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    return app


def message_client(seen: Seen) -> ClientApp:
    return client_of(lambda context, config: work(context, config, seen))


def numpy_client(seen: Seen) -> ClientApp:
    class Client(NumPyClient):
        def __init__(self, context: Context) -> None:
            self.context = context

        def fit(self, parameters, config):
            work(self.context, config, seen)
            return list(moved(dict(enumerate(parameters))).values()), 1, {}

    return ClientApp(client_fn=lambda context: Client(context).to_client(), mods=[autoflip_mod])


@pytest.mark.parametrize("client", [message_client, numpy_client])
def test_round_1_begins_with_the_state_from_before_the_exploration(client):
    seen: Seen = []
    strategy = AutoFlip(FedAvg(fraction_evaluate=0.0))
    strategy.start(LocalGrid(client(seen), 2), record(model()), num_rounds=2)
    kept = f"{EXPLORED}moments"
    assert seen[::2] == [
        (0, True, 0, []),
        (1, False, 0, [kept]),
        (2, False, 1, ["count", kept, "head"]),
    ]


def test_what_was_there_before_the_exploration_is_there_afterwards_unchanged():
    seen: Seen = []
    heads: list[float] = []
    grid = LocalGrid(message_client(seen), 2)
    for context in grid.contexts.values():
        context.state["count"] = ConfigRecord({"n": 7})
        context.state["head"] = record({"h": np.zeros(3)})

    def evaluate(server_round, arrays):
        if server_round == 0:
            heads.extend(context.state["head"]["h"].numpy().sum() for context in grid.contexts.values())

    strategy = AutoFlip(FedAvg(fraction_evaluate=0.0))
    strategy.start(grid, record(model()), num_rounds=1, evaluate_fn=evaluate)
    assert [count for _, _, count, _ in seen] == [7, 7, 7, 7]
    assert heads == [0, 0]


def test_a_client_that_fails_while_exploring_leaves_nothing_behind_either():
    seen: Seen = []

    def look(context, config):
        work(context, config, seen)
        if PHASE_KEY in config and context.node_id == 100:
            raise RuntimeError("after it has written to its state")

    AutoFlip(FedAvg(fraction_evaluate=0.0)).start(LocalGrid(client_of(look), 3), record(model()), num_rounds=1)
    assert [(count, own) for round_, _, count, own in seen if round_ == 1] == [(0, [f"{EXPLORED}moments"])] * 3


def test_our_own_records_stay_right():
    masks = []

    def look(context, config):
        masks.append(current_mask(context))
        context.state["own"] = ConfigRecord({"n": 1})

    strategy = AutoFlip(FedAvg(fraction_evaluate=0.0), 0.5, method=LossExploration.static(), values=Values(up="int8"))
    grid = LocalGrid(client_of(look), 2)
    strategy.start(grid, record(model()), num_rounds=2)
    assert [mask is None for mask in masks] == [True, True, False, False, False, False]
    assert all(mask.digest == strategy.mask.digest for mask in masks[2:])
    assert set(grid.contexts[100].state) == {"autoflip", "autoflip.mask", "autoflip.residual", "own"}


def configs_of(strategy, **settings):
    """What the first of two nodes is told in the exploration and two rounds."""
    configs = []
    client = client_of(lambda context, config: configs.append(dict(config)))
    AutoFlip(strategy).start(LocalGrid(client, 2), record(model()), num_rounds=2, **settings)
    return configs[::2]


def test_explorers_are_told_round_0_beside_the_strategys_own_settings():
    inner = FedProx(fraction_evaluate=0.0, proximal_mu=0.1)
    configs = configs_of(inner, train_config=ConfigRecord({"lr": 0.5}))
    assert [config["server-round"] for config in configs] == [0, 1, 2]
    assert all(config["proximal-mu"] == 0.1 and config["lr"] == 0.5 for config in configs)


def test_a_strategy_whose_config_has_no_round_is_given_none():
    class Bare(FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            for message in super().configure_train(server_round, arrays, config, grid):
                message.content = RecordDict({"arrays": message.content["arrays"], "config": ConfigRecord({"a": 1})})
                yield message

    assert all("server-round" not in config for config in configs_of(Bare(fraction_evaluate=0.0)))
