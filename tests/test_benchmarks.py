"""The benchmarks run as their documentation says and keep to their limits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from autoflip_flwr.core.choices import CODED
from benchmarks import precision, startup


@pytest.mark.runs
@pytest.mark.parametrize(("params", "density"), [(60_000, 0.1), (200_000, 0.3), (200_000, 0.7)])
def test_wire_keeps_to_its_limits(params, density):
    command = [sys.executable, "-m", "benchmarks.wire", "--params", str(params), "--density", str(density)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert abs(found["parameters"] - params) < 0.5 * params
    assert found["density"] == pytest.approx(density, abs=1e-4)
    assert found["upload_bytes"] <= found["upload_limit_bytes"]
    assert found["download_bytes"] <= found["download_limit_bytes"]
    assert found["mask_entropy_bytes"] <= found["mask_bytes"] <= 1.25 * found["mask_entropy_bytes"] + 1024
    assert found["exploration_upload_bytes"] <= found["dense_bytes"] / 4
    assert found["values"].keys() == set(CODED)
    assert all(
        ratio > (3 if kind == "int8" else 1.8) for kind, way in found["values"].items() for ratio in way.values()
    )
    assert found["upload_bytes"] < density * found["dense_bytes"] * 1.1 + 4096


@pytest.mark.runs
def test_a_clients_start_up_is_measured_with_the_mod_and_without():
    cached, along = startup.measure("cnn", 1)
    assert [cached["case"], along["case"]] == ["cnn, mask cached", "cnn, mask along"]
    assert cached["limit"] == 1.15
    for row in (cached, along):
        assert row["ours_s"] > row["message_ours_s"] > row["handle_ours_s"] > 0
        assert row["plain_s"] == cached["plain_s"] > row["message_plain_s"] > 0
        assert row["within"] == (max(row["ratio"], row["message_ratio"]) <= 1.15)


@pytest.mark.runs
def test_both_precisions_are_timed_and_tested_in_turns():
    row = precision.measure("mlp:digits", "", batch_size=50, examples=120, epochs=2)
    assert (row["model"], row["dataset"], row["steps"]) == ("mlp", "digits", 6)
    assert row["ratio"] > 0
    assert row["float32_ms"] > 0
    assert abs(row["float32_accuracy"] - row["bfloat16_accuracy"]) < 10
