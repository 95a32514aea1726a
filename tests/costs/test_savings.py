"""What a run says of its bytes at its end: by phase, beside those of plain FedAvg."""

from __future__ import annotations

import numpy as np
import pytest
from apps import message_app, record
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import FedAvg

from autoflip_flwr import AutoFlip, Ledger
from autoflip_flwr.costs.message_size import dense_traffic
from autoflip_flwr.costs.savings import lines, saving
from autoflip_flwr.server.grid import OrderedGrid
from autoflip_flwr.testing import LocalGrid

SENT = {
    "exploration_up": 400_000,
    "exploration_down": 1_000_000,
    "train_up": 1_500_000,
    "train_down": 1_500_000,
    "evaluate_up": 0,
    "evaluate_down": 0,
    "mask_down": 50_000,
    "other": 4_000,
    "total": 4_454_000,
}


def test_the_table_has_a_line_for_each_phase_that_has_sent_anything():
    dense = {"train_up": 4_000_000, "train_down": 4_000_000, "total": 8_000_000}
    assert list(lines(SENT, dense, pruned=True)) == [
        "MB sent         AutoFLIP       dense",
        "exploration         1.40",
        "masks               0.05",
        "training            3.00        8.00",
        "other               0.00",
        "total               4.45        8.00   44.3 % saved",
        "MB are 10^6 bytes; more in strategy.ledger.bytes_by_phase()",
    ]


def test_so_has_what_stands_outside_the_mask():
    dense = {"train_up": 4_000_000, "train_down": 4_000_000, "total": 8_000_000}
    found = list(lines({**SENT, "base_down": 600_000}, dense, pruned=True))
    assert found[3] == "outside them        0.60"
    assert "base_down" not in SENT  # records of earlier runs lack it


def test_bytes_that_were_not_saved_are_told():
    assert saving(150, 100) == "50.0 % more than dense"
    assert saving(100, 100) == "0.0 % saved"
    assert saving(100, 0) == "no rounds"


def test_where_nothing_is_pruned_there_is_one_line():
    assert list(lines({"total": 1_100_000}, {"total": 1_000_000}, pruned=False)) == [
        "sent 1.10 MB, 10.0 % more than dense; see strategy.ledger"
    ]


def model():
    return {"w": np.zeros((200, 100), np.float32), "v": np.zeros((200, 100), np.float32), "b": np.zeros(3, np.float32)}


def federated(fraction_evaluate):
    return FedAvg(fraction_evaluate=fraction_evaluate, min_evaluate_nodes=2 if fraction_evaluate else 0)


@pytest.mark.parametrize("fraction_evaluate", [0.0, 1.0])
def test_dense_bytes_are_those_of_fedavg(fraction_evaluate):
    grid = OrderedGrid(LocalGrid(message_app(), 2))
    random = np.random.default_rng(1)
    initial = {name: random.random(w.shape, np.float32) for name, w in model().items()}
    federated(fraction_evaluate).start(grid, record(initial), 3)
    counted, dense = grid.ledger.bytes_by_phase(), grid.ledger.dense_bytes_by_phase(record(model()))
    for key in ("train_up", "train_down", "evaluate_up", "evaluate_down"):
        assert dense[key] == pytest.approx(counted[key], rel=1e-3, abs=1_000)  # ids of nodes and messages are shorter
    assert dense["total"] == sum(value for key, value in dense.items() if key != "total")


def test_equal_arrays_of_an_untrained_model_count_each():
    message, reply, evaluation = dense_traffic(record(model()))
    assert message.down > 160_000
    assert reply.up > 160_000
    assert evaluation.up < 2_000


@pytest.mark.parametrize(("sparsity", "expected"), [(0.7, "MB sent  "), (0, "sent ")])
def test_a_run_ends_with_what_it_has_sent(sparsity, expected, caplog):
    ledger = Ledger()
    strategy = AutoFlip(federated(0.0), sparsity=sparsity, ledger=ledger)
    initial = record({name: w + np.float32(0.1) for name, w in model().items()})
    strategy.start(LocalGrid(message_app(), 2), initial, num_rounds=5)
    told = list(lines(ledger.bytes_by_phase(), ledger.dense_bytes_by_phase(initial), pruned=bool(sparsity)))
    assert caplog.messages[-len(told) :] == told
    assert told[0].startswith(expected)
    assert all(len(line) <= 68 for line in told)
    assert "strategy.ledger" in told[-1]


def test_a_strategy_with_a_loop_of_its_own_says_it_too(caplog):
    class Own(FedAvg):
        def start(self, grid, initial_arrays, num_rounds=1):
            for server_round in range(num_rounds):
                grid.send_and_receive(self.configure_train(server_round + 1, initial_arrays, ConfigRecord(), grid))
            return "its own result"

    initial = record({name: w + np.float32(0.1) for name, w in model().items()})
    assert AutoFlip(Own(fraction_evaluate=0.0)).start(LocalGrid(message_app(), 2), initial) == "its own result"
    assert "strategy.ledger.bytes_by_phase()" in caplog.messages[-1]
