"""When the server evaluates, and on what."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.evaluation import LAST, SHARE, cost_of_evaluation, evaluated_rounds, rows_to_test
from autoflip_flwr.experiment.suite.worker import run_in_process


@given(st.integers(1, 300), st.floats(1e-4, 10))
def test_evaluations_cost_their_share_and_the_last_rounds_come_first(rounds, cost):
    found = sorted(evaluated_rounds(rounds, 0, cost))
    assert found[-1] == rounds
    assert len(found) * cost <= SHARE * rounds or len(found) == 1
    last = [round_ for round_ in found if round_ > max(rounds - LAST, 0)]
    assert last == list(range(rounds - len(last) + 1, rounds + 1))
    assert len(last) == min(LAST, rounds, len(found))


@pytest.mark.parametrize(
    ("rounds", "every", "cost", "wanted"),
    [
        (3, 1, 9.0, [0, 1, 2, 3]),
        (10, 4, 0.0, [0, 4, 8, 10]),
        (10, 99, 0.0, [0, 10]),
        (20, 0, 0.02, list(range(21))),
        (60, 0, 0.4, [0, 10, 20, 30, 40, 50, 56, 57, 58, 59, 60]),
        (2, 0, 0.27, [2]),
        (25, 0, 1.0, [24, 25]),
    ],
)
def test_the_rounds_that_are_evaluated(rounds, every, cost, wanted):
    assert sorted(evaluated_rounds(rounds, every, cost)) == wanted


def test_the_cost_of_an_evaluation_is_a_third_of_training_on_as_many():
    assert cost_of_evaluation(10_000, 12_500) == pytest.approx(0.2667, abs=1e-4)


def test_a_part_of_the_test_set_is_the_same_in_every_run():
    assert rows_to_test(10, 0) is None
    assert rows_to_test(10, 10) is None
    rows = rows_to_test(1000, 100)
    assert rows is not None
    assert len(np.unique(rows)) == 100
    assert (np.diff(rows) > 0).all()
    assert np.array_equal(rows, rows_to_test(1000, 100))


def test_rounds_that_are_not_evaluated_are_recorded_without_accuracy(tmp_path):
    config = Config(
        method="fedavg", nodes=2, num_server_rounds=3, local_epochs=1, max_examples_per_class=4, evaluate_every=2,
        test_examples=50,
    )  # fmt: skip
    folder = run_in_process(config, tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["round"], line["accuracy"] is None) for line in lines] == [
        (0, False),
        (1, True),
        (2, False),
        (3, False),
    ]
    told = json.loads((folder / "summary.json").read_text())
    assert told["rounds"] == 3
    assert told["final_accuracy"] == lines[-1]["accuracy"]
    assert (told["final_accuracy"] * 50) % 1 == pytest.approx(0, abs=1e-6)
    assert 0 < told["seconds"]["central_evaluation"] < 60
