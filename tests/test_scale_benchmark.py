"""The benchmark of many nodes: what it measures with, on small things; and, slowly, a run of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from apps import NO_FAILURES

from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.data.load import load
from benchmarks import scale

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def mnist(tmp_path):
    random = np.random.default_rng(0)
    for part, count in (("train", 240), ("test", scale.TEST_EXAMPLES)):
        np.save(tmp_path / f"x_{part}.npy", random.integers(256, size=(count, 28, 28, 1), dtype=np.uint8))
        np.save(tmp_path / f"y_{part}.npy", random.integers(10, size=count))
    return tmp_path


def record(folder: Path, failures=NO_FAILURES) -> Path:
    lines = [{"phase": "exploration", "nodes": 20, "seconds": 4.0}]
    lines += [{"phase": "train", "nodes": 20, "seconds": seconds} for seconds in (5.0, 7.0, 8.0, 13.0)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {"rounds": 3, "final_accuracy": 0.5, "failures": failures, "seconds": {"exploration": 4.0}}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.json").touch()
    return folder


def test_every_node_gets_as_many_examples_whatever_their_number(mnist, tmp_path_factory):
    for nodes in (2, 4):
        own = tmp_path_factory.mktemp("own")
        scale.cut(str(mnist), nodes, own)
        found = load("mnist", str(own))
        assert (len(found.y_train), len(found.y_test)) == (60 * nodes, scale.TEST_EXAMPLES)
    with pytest.raises(ValueError, match="at most 4"):
        scale.cut(str(mnist), 5, own)


def test_the_app_takes_the_settings_and_twenty_nodes_train(mnist):
    for nodes in (10, 100, 1000):
        config = Config.from_run_config({**scale.settings(nodes, 3, mnist, mnist), "nodes": nodes})
        assert round(config.fraction_train * nodes) == round(config.explorers * nodes) == min(20, nodes)


def test_a_row_is_read_from_the_run_record(tmp_path):
    began = record(tmp_path).joinpath("config.json").stat().st_mtime - 9
    assert scale.read(tmp_path, 100, began) == {
        "nodes": 100,
        "sampled": 20,
        "rounds": 3,
        "seconds_per_round": 2.0,
        "startup_s": pytest.approx(9),
        "exploration_s": 4.0,
        "final_accuracy": 0.5,
    }


def test_a_run_in_which_a_reply_is_missing_is_no_measurement(tmp_path):
    with pytest.raises(RuntimeError, match="'absent': 1"):
        scale.read(record(tmp_path, NO_FAILURES | {"absent": 1}), 100, 0.0)


@linux
def test_orphans_in_sessions_of_their_own_are_watched():
    # the child's child loses its parent, and goes to another session, as Ray's processes may
    orphan = "import time; held = b'x' * 150_000_000; time.sleep(60)"
    child = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {orphan!r}], start_new_session=True)"
    marker = {scale.MARKER: f"test-{os.getpid()}"}
    with subprocess.Popen(["sleep", "60"]) as root:
        with scale.MemoryWatch(root.pid, f"{scale.MARKER}=test-{os.getpid()}", interval=0.05) as watch:
            subprocess.run([sys.executable, "-c", child], env={**os.environ, **marker}, check=True)
            limit = time.monotonic() + 60
            while watch.peak < 150e6 and time.monotonic() < limit:
                time.sleep(0.05)
            found = watch.family()
        for pid in found:
            os.kill(pid, signal.SIGKILL)
    assert root.pid in found
    assert len(found) == 2
    assert 150e6 <= watch.peak < 250e6
    assert watch.shared < 50e6


def test_the_plot_is_a_small_picture(tmp_path):
    rows = [
        {"nodes": nodes, "sampled": min(20, nodes), "seconds_per_round": 1.5, "peak_pss_mb": 2500.0}
        for nodes in (10, 100, 1000)
    ]
    scale.plot(rows, tmp_path / "scale.png")
    picture = (tmp_path / "scale.png").read_bytes()
    assert picture[:4] == b"\x89PNG"
    assert len(picture) < 60_000


@linux
@pytest.mark.slow
def test_a_run_is_measured(mnist):
    command = [sys.executable, "-m", "benchmarks.scale", "--nodes", "3", "--rounds", "2", "--data-dir", str(mnist)]
    done = subprocess.run(command, cwd=scale.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    (row,) = found["rows"]
    assert found["ratio_1000_100"] is None
    assert list(row) == list(scale.COLUMNS)
    assert (row["nodes"], row["sampled"], row["rounds"]) == (3, 3, 2)
    assert row["seconds_per_round"] > 0
    assert 500 < row["peak_pss_mb"] < 8000
    assert 0 < row["shm_mb"] < scale.OBJECT_STORE / 1e6
