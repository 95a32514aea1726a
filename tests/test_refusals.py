"""What cannot be run is refused in one line of words, before any client works."""

from __future__ import annotations

import numpy as np
import pytest
from apps import message_app, record
from flwr.app import Array, ArrayRecord
from flwr.server import Server, ServerApp, ServerAppComponents, ServerConfig, SimpleClientManager
from flwr.server import strategy as legacy
from flwr.serverapp.strategy import FedAvg, FedXgbBagging

from autoflip_flwr import AutoFlip
from autoflip_flwr.server.first_mask import model_of
from autoflip_flwr.testing import LocalGrid


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (FedAvg, r"^AutoFlip wraps a strategy, not a class: AutoFlip\(FedAvg\(...\)\)$"),
        ("fedavg", r"not 'fedavg': AutoFlip\(FedAvg\(...\), sparsity=0.7\)$"),
        (0.7, r"not 0.7: AutoFlip\(FedAvg\(...\), sparsity=0.7\)$"),
        (legacy.FedAvg(), r"strategies of flwr.serverapp.strategy, not flwr.server.strategy.fedavg.FedAvg$"),
    ],
)
def test_what_is_no_strategy_is_refused(given, words):
    with pytest.raises(TypeError, match=words):
        AutoFlip(given)


@pytest.mark.parametrize(
    ("initial", "words"),
    [
        (ArrayRecord([np.frombuffer(b"a booster", np.uint8)]), "1 arrays of uint8, and AutoFlip prunes floating-point"),
        (ArrayRecord([np.array([], np.uint8)]), "1 arrays of uint8"),
        (ArrayRecord({"0": Array("uint8", (9,), "xgboost.json", b"a booster")}), "1 arrays of xgboost.json"),
        (ArrayRecord({"a": Array(np.ones(3, np.int64)), "b": Array(np.ones(3, bool))}), "2 arrays of bool, int64"),
        (ArrayRecord(), "0 arrays of nothing"),
    ],
)
@pytest.mark.parametrize("sparsity", [0, 0.7])
def test_a_model_without_floating_arrays_is_refused(initial, words, sparsity):
    grid = LocalGrid(message_app(), 2)
    with pytest.raises(ValueError, match=f"^nothing to prune: the model is {words}"):
        AutoFlip(FedXgbBagging(), sparsity=sparsity).start(grid, initial)
    assert not grid.sent


def test_floats_in_another_byte_order_are_floats():
    arrays = {"w": np.zeros((3, 4), ">f4"), "f8": np.zeros((3, 4), "float16")}
    assert set(model_of(record(arrays))) == {"w", "f8"}


OLD = "not with ServerAppComponents or start_server: call strategy.start"


def test_flowers_old_server_is_told_how_to_start_a_run():
    with pytest.raises(RuntimeError, match=OLD):
        Server(client_manager=SimpleClientManager(), strategy=AutoFlip(FedAvg())).fit(1, None)


def test_an_old_server_app_is_told_how_to_start_a_run():
    def server_fn(context):
        return ServerAppComponents(strategy=AutoFlip(FedAvg()), config=ServerConfig(num_rounds=1))

    grid = LocalGrid(message_app(), 2)
    with pytest.raises(RuntimeError, match=OLD):
        ServerApp(server_fn=server_fn)(grid, next(iter(grid.contexts.values())))
    assert not grid.sent


def test_a_wrapped_strategys_own_method_of_that_name_is_called():
    class Own(FedAvg):
        def initialize_parameters(self, seed):
            return seed + 1

    assert AutoFlip(Own()).initialize_parameters(seed=1) == 2
