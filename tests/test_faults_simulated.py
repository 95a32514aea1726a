"""Faults of a simulated run: killed, without disk space, clients that fail; `pytest -m slow -k faults`.

In each, nothing is lost, the model is as good as it should be (bit for bit, where a run goes on from its checkpoint),
and the run's record tells what happened.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from apps import NO_FAILURES
from faults import (
    LIMIT,
    REPOSITORY,
    SMALL,
    checkpoint,
    faulty_app,
    kill,
    output,
    record,
    rounds,
    run,
    running,
    server_process,
    told,
    wait_for,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole")
    code, text, seconds = run(out)
    assert code == 0, text
    print(f"the whole run: {seconds:.0f} s")
    return record(out)


def goes_on(out: Path, whole: Path, after: int) -> None:
    """The run goes on from its checkpoint and ends as if nothing had happened."""
    folder = record(out)
    code, text, seconds = run(out, resume=str(folder))
    assert code == 0, text
    same(folder, whole, after)
    print(f"went on after round {after}: {seconds:.0f} s")


def same(folder: Path, whole: Path, after: int) -> None:
    for name in ("model.safetensors", "mask.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    one, other = told(folder), told(whole)
    for key in ("flops", "final_accuracy", "failures", "rounds", "mask"):
        assert one[key] == other[key], key
    assert one["resumed_after"] == [after]
    # nothing is counted twice but what was sent twice: the roll call, and the mask to nodes that no longer had it
    again = one["bytes"]["total"] - other["bytes"]["total"]
    assert 0 < again < 2 * (other["bytes"]["mask_down"] + other["bytes"]["other"])
    lines, expected = rounds(folder), rounds(whole)
    assert [line["accuracy"] for line in lines.values()] == [line["accuracy"] for line in expected.values()]
    assert list(lines) == list(range(SMALL["num-server-rounds"] + 1))
    assert not list(folder.rglob(".*.tmp"))


def test_all_processes_killed_between_two_rounds(tmp_path: Path, whole: Path) -> None:
    with running(tmp_path) as process:
        wait_for(lambda: checkpoint(tmp_path, 2))
        kill(process.pid)
    assert not (record(tmp_path) / "summary.json").exists()
    goes_on(tmp_path, whole, after=2)


def test_the_server_app_killed_in_the_middle_of_a_round(tmp_path: Path, whole: Path) -> None:
    with running(tmp_path) as process:
        wait_for(lambda: checkpoint(tmp_path, 2) and output(tmp_path).count("configure_train: Sampled") >= 3)
        os.kill(server_process(process.pid), signal.SIGKILL)
        began = time.monotonic()
        assert process.wait(LIMIT) == 1
        print(f"the command noticed after {time.monotonic() - began:.0f} s: {output(tmp_path).splitlines()[-1]}")
    assert "autoflip: the run failed: " in output(tmp_path)
    goes_on(tmp_path, whole, after=2)


HALF_WRITTEN = """
import os, signal
from autoflip_flwr import files

class Dying:
    def __getattr__(self, name):
        return getattr(os, name)

    def replace(self, source, target):
        if target.name == "round-000003.safetensors":
            os.truncate(source, source.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        os.replace(source, target)

files.os = Dying()
"""


def test_killed_in_the_middle_of_writing_a_checkpoint_and_one_that_is_damaged(tmp_path: Path, whole: Path) -> None:
    app, out = faulty_app(tmp_path / "app", server=HALF_WRITTEN), tmp_path / "out"
    code, text, _ = run(out, app)
    assert code == 1, text
    folder = record(out)
    kept = {path.name for path in (folder / "checkpoint").iterdir() if path.is_file()} - {"lock"}
    names = [f"round-00000{number}.safetensors" for number in (1, 2)]
    assert kept == {"exploration.safetensors", *names, ".round-000003.safetensors.tmp"}
    shutil.copytree(out, tmp_path / "damaged")
    goes_on(out, whole, after=2)

    last = checkpoint(tmp_path / "damaged", 2)
    assert last is not None
    os.truncate(last, last.stat().st_size // 2)
    code, text, _ = run(tmp_path / "damaged", resume=str(record(tmp_path / "damaged")))
    assert code == 1, text
    reason = next(line for line in text.splitlines() if line.startswith("autoflip: the run failed: "))
    assert f"{last} is damaged" in reason
    assert f"remove it; without it the run goes on from {names[0]}" in reason
    last.unlink()
    goes_on(tmp_path / "damaged", whole, after=1)


@pytest.mark.parametrize("size", [200_000, 10])
def test_a_full_disk(size: int, tmp_path: Path, whole: Path) -> None:
    """No file of the server app grows beyond `size` bytes: no checkpoint and then no report, or nothing at all."""
    with running(tmp_path) as process:
        wait_for(lambda: checkpoint(tmp_path, 2))
        limits = resource.prlimit(server_process(process.pid), resource.RLIMIT_FSIZE)
        resource.prlimit(server_process(process.pid), resource.RLIMIT_FSIZE, (size, limits[1]))
        code = process.wait(LIMIT)
    text = output(tmp_path)
    print(text.splitlines()[-1])
    assert code == 1
    assert "File too large" in text.splitlines()[-1]
    assert ("the checkpoint of round 4 could not be written" in text) is (size > 10)
    after = max(number for number in range(5) if checkpoint(tmp_path, number))
    goes_on(tmp_path, whole, after)


FAILING = """
import random

def fault(message, context, call_next):
    config = message.content.get("config", {})
    if "server-round" in config:
        draw = f"{config.get('autoflip-phase')} {config['server-round']} {context.node_config['partition-id']}"
        if random.Random(draw).random() < 0.5:
            raise RuntimeError("as the test wants it")
    return call_next(message, context)
"""


TWENTY = {"nodes": 10, "num-server-rounds": 20, "local-epochs": 3, "exploration-epochs": 3}


def twenty_rounds(out: Path, app: Path = REPOSITORY, **settings: Any) -> tuple[Path, float]:
    """The record of a run to its end, and its mean accuracy after the last five rounds."""
    code, text, seconds = run(out, app, **TWENTY, **settings)
    assert code == 0, text
    folder = record(out)
    accuracy = sum(rounds(folder)[number]["accuracy"] for number in range(16, 21)) / 5
    print(f"{out.name}: {accuracy:.4f}, {told(folder)['failures']}, {seconds:.0f} s")
    return folder, accuracy


@pytest.fixture(scope="module")
def half_fails(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    tmp_path = tmp_path_factory.mktemp("half")
    return twenty_rounds(tmp_path / "failing", faulty_app(tmp_path / "app", client=FAILING))


def test_half_of_the_clients_fail_at_random_for_20_rounds(tmp_path: Path, half_fails: tuple[Path, float]) -> None:
    folder, accuracy = half_fails
    sampled, reference = twenty_rounds(tmp_path / "sampled", **{"fraction-train": 0.5, "explorers": 0.5})
    assert told(sampled)["failures"] == NO_FAILURES
    failing = told(folder)
    assert failing["rounds"] == 20
    assert 80 < failing["failures"]["errors"] < 130  # of 210
    assert failing["failures"]["rejected"] == failing["failures"]["absent"] == 0
    happened = told(folder, "incidents.json")
    assert len(happened) == failing["failures"]["errors"]
    assert {each["node"] for each in happened} == set(range(10))
    assert all(each["kind"] == "errors" and "as the test wants it" in each["reason"] for each in happened)
    # Three seeds, three ways to fail each: 0.006 below the run in which half are sampled, standard deviation 0.014,
    # 0.032 at most. A round of few replies costs accuracy, and here two to eight reply, there always five.
    assert accuracy > reference - 0.05
    lines = rounds(folder)
    counts = [line["nodes"] for number, line in lines.items() if number]
    explored = 10 - lines[0]["failures"]["errors"]
    assert explored + sum(counts) == 210 - failing["failures"]["errors"]
    assert {3, 4, 5, 6, 7} & set(counts)


SPARING = """
import json, random
from flwr.serverapp.strategy import fedavg
from autoflip_flwr import exploration

failed = {{}}
for each in json.loads({incidents!r}):
    failed.setdefault(each["round"], set()).add(each["node"])
draws = []  # the first is a look at what the strategy would send, then one a round

def sample_nodes(grid, *_):
    nodes = list(grid.get_node_ids())  # in the order of their partitions
    drawn = random.sample(nodes, len(nodes))
    draws.append([node for node in drawn if nodes.index(node) not in failed.get(len(draws), ())])
    return draws[-1], nodes

fedavg.sample_nodes = sample_nodes
exploration._sample = lambda nodes, *_: [node for index, node in enumerate(nodes) if index not in failed[0]]
"""


def test_those_who_fail_leave_no_trace_in_the_model(tmp_path: Path, half_fails: tuple[Path, float]) -> None:
    """It is, bit for bit, that of a run in which they are not asked."""
    folder, _ = half_fails
    app = faulty_app(tmp_path / "app", server=SPARING.format(incidents=(folder / "incidents.json").read_text()))
    spared, _ = twenty_rounds(tmp_path / "spared", app, explorers=0.5)  # which of them, the app says
    assert told(spared)["failures"] == NO_FAILURES
    for name in ("model.safetensors", "mask.safetensors"):
        assert (folder / name).read_bytes() == (spared / name).read_bytes(), name
    one, other = rounds(folder), rounds(spared)
    for key in ("accuracy", "nodes"):
        assert [line[key] for line in one.values()] == [line[key] for line in other.values()], key
