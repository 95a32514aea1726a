"""The benchmark of a round's seconds reads records right, and the loopback deployment that it measures works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.data.load import load
from benchmarks import round as benchmark
from benchmarks.loopback import Loopback

ROOT = Path(__file__).parents[1]
BEGAN = 1_700_000_000.0


def processes_of(home: Path) -> list[str]:
    """Ids of the processes that work for this Flower home."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended, or is another user's
            if f"FLWR_HOME={home}\0".encode() in (folder / "environ").read_bytes():
                found.append(folder.name)
    return found


def write_record(folder: Path, seconds: list[float], explored: float | None, absent: int = 0) -> Path:
    """A record whose server app was ready 12 s after the command; `seconds` at the ends of rounds 0, 1, ..."""
    lines: list[dict[str, object]] = []
    if explored is not None:
        # two batches of explorers
        lines += [
            {"phase": "exploration", "round": 0, "seconds": at, "accuracy": None} for at in (explored / 2, explored)
        ]
    lines += [
        {"phase": "train", "round": number, "seconds": at, "accuracy": number / 10, "failures": {"absent": absent}}
        for number, at in enumerate(seconds)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.json").write_text("{}")
    os.utime(folder / "config.json", (BEGAN + 12, BEGAN + 12))
    return folder


def test_seconds_come_from_the_record(tmp_path):
    found = benchmark.read_timing(write_record(tmp_path, [30.0, 50.0, 52.0, 53.0, 56.0], 29.0), BEGAN, 77)
    assert found.startup == pytest.approx(12)
    assert found.exploration == 29
    assert found.rounds == (20, 2, 1, 3)
    assert found.round == 2  # the first is left out
    assert (found.accuracy, found.traffic) == (0.4, 77)
    assert benchmark.read_timing(write_record(tmp_path, [1.0, 2.0, 3.0], None), BEGAN).exploration == 0


@pytest.mark.parametrize("seconds", [[1.0, 2.0], []])
def test_a_record_of_too_few_rounds_is_refused(tmp_path, seconds):
    with pytest.raises(ValueError, match=r"expected rounds 0, 1, 2, \.\.\., found"):
        benchmark.read_timing(write_record(tmp_path, seconds, None), BEGAN)


def test_a_record_with_failures_is_refused(tmp_path):
    with pytest.raises(ValueError, match="replies are missing"):
        benchmark.read_timing(write_record(tmp_path, [1.0, 2.0, 3.0], None, absent=1), BEGAN)


def test_the_methods_take_turns_and_the_ratio_is_that_of_the_medians(capsys):
    calls = []
    paces = {"autoflip": iter([1.0, 9.0, 1.2]), "fedavg": iter([1.0, 2.0, 4.0])}

    def run(method: str, folder: Path) -> int:
        calls.append(method)
        pace = next(paces[method])
        (record := folder / "record").mkdir()
        write_record(record, [0, 7, 7 + pace, 7 + 2 * pace], 5.0 if method == "autoflip" else None)
        return 1000

    row = benchmark.compare("deployment", "cnn", 3, run)
    assert calls == ["autoflip", "fedavg"] * 3
    assert (row["autoflip_s"], row["fedavg_s"], row["ratio"]) == pytest.approx((1.2, 2.0, 0.6))
    assert row["ratio_spread"] == pytest.approx([0.3, 4.5])
    assert row["autoflip_spread_s"] == pytest.approx([1, 9])
    assert (row["limit"], row["within_limit"], row["exploration_s"]) == (1.1, True, 5)
    assert row["network_bytes"] == {"autoflip": 1000, "fedavg": 1000}
    assert capsys.readouterr().err.count("deployment, cnn") == 6


def test_the_settings_are_the_apps_and_their_images_load(tmp_path):
    benchmark.make_images(tmp_path)
    data = load("cifar10", str(tmp_path))
    for settings in (benchmark.SIMULATION, *benchmark.DEPLOYMENT.values()):
        Config.from_run_config(settings)
    for model in ("resnet18", "resnet18-gn"):
        assert len(data.y_train) == 2 * int(benchmark.DEPLOYMENT[model]["batch-size"])  # a step a node


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_loopback_runs_the_app_counts_its_traffic_and_leaves_nothing(tmp_path):
    settings = {**benchmark.DEPLOYMENT["cnn"], "num-server-rounds": 1, "output-dir": str(tmp_path / "runs")}
    with Loopback(nodes=2, folder=tmp_path) as loopback:
        entry = loopback.run(ROOT, settings, 300)
        with pytest.raises(RuntimeError, match=r"finished:failed[\s\S]*method = 'nope'"):
            loopback.run(ROOT, {**settings, "method": "nope"}, 300)
        with pytest.raises(RuntimeError, match="not started"):
            loopback.run(ROOT, {"nosuch": 1}, 300)
        assert len(processes_of(loopback.home)) >= 6  # each with its SuperExec
    assert not processes_of(loopback.home)
    assert not loopback.home.exists()
    assert all(process.returncode is not None for process in loopback.processes)
    (record,) = (tmp_path / "runs").iterdir()
    sent = json.loads((record / "summary.json").read_text())["bytes"]
    up, down = (sum(count for phase, count in sent.items() if phase.endswith(way)) for way in ("up", "down"))
    traffic = entry["network-traffic"]
    # what Flower counts beyond the messages: the roll call, and per message its requests and the list of its objects
    assert up < traffic["inbound-bytes"] < up + sent["other"] + 2 * 3 * 4000
    assert down < traffic["outbound-bytes"] < down + sent["other"] + 2 * 3 * 8000
    assert traffic["total-bytes"] == traffic["inbound-bytes"] + traffic["outbound-bytes"]
    assert (tmp_path / "supernode-1.log").stat().st_size


def test_the_command_refuses_a_single_round():
    command = [sys.executable, "-m", "benchmarks.round", "--rounds", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "at least 2 rounds" in done.stderr
