"""Faults of real processes: killed, late, slow, failing at random, a full disk; `pytest -m slow tests/test_faults.py`.

In each, nothing is lost, the model is as good as it should be (bit for bit, where a run goes on from its checkpoint),
and the run's record tells what happened.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from autoflip_flwr.experiment import superlink
from autoflip_flwr.experiment.cli import to_toml
from benchmarks.loopback import Loopback

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[1]
LIMIT = 300.0  # seconds within which whatever is waited for must happen
NONE = {"quarantined": 0, "errors": 0, "absent": 0}
SMALL = {"num-server-rounds": 4, "nodes": 4, "local-epochs": 5, "exploration-epochs": 1}


def faulty_app(folder: Path, client: str = "", server: str = "") -> Path:
    """The shipped app with a fault of the test's own: Python text that the client, or the server, runs first.

    The client's names its mod `fault`.
    """
    folder.mkdir()
    project = (REPOSITORY / "pyproject.toml").read_text()
    config = project[project.index("[tool.flwr.app.config]") : project.index("[tool.ruff]")]
    (folder / "pyproject.toml").write_text(
        '[project]\nname = "faulty"\nversion = "1.0.0"\ndescription = "A fault"\nlicense = "Apache-2.0"\n'
        '[tool.flwr.app]\npublisher = "test"\n'
        f'[tool.flwr.app.components]\nserverapp = "faulty_server:app"\nclientapp = "faulty_client:app"\n{config}'
    )
    fault = "fault, " if client else ""
    (folder / "faulty_client.py").write_text(
        f"from flwr.clientapp import ClientApp\nfrom autoflip_flwr import autoflip_mod\n"
        f"from autoflip_flwr.experiment.client import client_fn\n{client}\n"
        f"app = ClientApp(client_fn=client_fn, mods=[{fault}autoflip_mod])\n"
    )
    (folder / "faulty_server.py").write_text(f"{server}\nfrom autoflip_flwr.experiment.server import app\n")
    return folder


def told(folder: Path, name: str = "summary.json") -> Any:
    return json.loads((folder / name).read_text())


def rounds(folder: Path) -> dict[int, dict[str, Any]]:
    """The lines of the record, by round; each is there once."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {line["round"]: line for line in lines if line["phase"] == "train"}
    assert len(found) == sum(line["phase"] == "train" for line in lines)
    return found


def wait_for(what: Callable[[], Any]) -> Any:
    limit = time.monotonic() + LIMIT
    while not (found := what()):
        assert time.monotonic() < limit, "it did not happen"
        time.sleep(0.01)
    return found


def kill(pid: int) -> None:
    """SIGKILL to a process and all that it has started, as when a machine loses power."""
    children = [each.identity[0] for each in superlink._descendants(pid, set())]
    for each in (pid, *children):
        with suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)


# ---- `autoflip run` in simulation


def run(out: Path, app: Path = REPOSITORY, **settings: Any) -> tuple[int, str, float]:
    """`autoflip run` to its end: its exit code, its output and the seconds that it took."""
    with running(out, app, **settings) as process:
        began = time.monotonic()
        code = process.wait(LIMIT)
    return code, output(out), time.monotonic() - began


@contextmanager
def running(out: Path, app: Path = REPOSITORY, **settings: Any) -> Iterator[subprocess.Popen[bytes]]:
    out.mkdir(exist_ok=True)
    values = {**SMALL, "output-dir": str(out), **{key.replace("_", "-"): value for key, value in settings.items()}}
    (out / "settings.toml").write_text(to_toml(values))
    command = [f"{superlink.TOOLS}/autoflip", "run", str(app), "--config", str(out / "settings.toml")]
    command += ["--nodes", str(values["nodes"])] if app != REPOSITORY else []
    with (out / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()


def output(out: Path) -> str:
    return (out / "log").read_text(errors="replace")


def record(out: Path) -> Path:
    (folder,) = (path for path in out.iterdir() if path.is_dir())
    return folder


def server_process(root: int) -> int:
    """Of those that process `root` has started, the one that the server app runs in."""
    for each in superlink._descendants(root, set()):
        with suppress(OSError):
            if b"flwr-simulation" in Path(f"/proc/{each.identity[0]}/cmdline").read_bytes():
                return each.identity[0]
    raise AssertionError("no process of the server app")


def checkpoint(out: Path, round_: int) -> Path | None:
    return next(out.glob(f"*/checkpoint/round-{round_:06d}.safetensors"), None)


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
from autoflip_flwr import checkpoint

class Dying:
    def __getattr__(self, name):
        return getattr(os, name)

    def replace(self, source, target):
        if target.name == "round-000003.safetensors":
            os.truncate(source, source.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        os.replace(source, target)

checkpoint.os = Dying()
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


def test_half_of_the_clients_fail_at_random_for_20_rounds(tmp_path: Path) -> None:
    summaries = {}
    for name, fault in (("well", ""), ("failing", FAILING)):
        app = faulty_app(tmp_path / f"{name}-app", client=fault)
        settings = {"nodes": 10, "num-server-rounds": 20, "local-epochs": 3, "exploration-epochs": 3}
        code, text, seconds = run(tmp_path / name, app, **settings)
        assert code == 0, text
        summaries[name] = told(record(tmp_path / name))
        print(f"{name}: {summaries[name]['final_accuracy']:.4f}, {summaries[name]['failures']}, {seconds:.0f} s")
    well, failing = summaries["well"], summaries["failing"]
    assert well["failures"] == NONE
    assert failing["rounds"] == 20
    assert 80 < failing["failures"]["errors"] < 130  # of 210
    assert failing["failures"]["quarantined"] == failing["failures"]["absent"] == 0
    assert failing["final_accuracy"] > well["final_accuracy"] - 0.05
    lines = rounds(record(tmp_path / "failing"))
    counts = [line["nodes"] for number, line in lines.items() if number]
    explored = 10 - lines[0]["failures"]["errors"]
    assert explored + sum(counts) == 210 - failing["failures"]["errors"]
    assert {3, 4, 5, 6, 7} & set(counts)


# ---- a SuperLink and SuperNodes on loopback

TIMEOUT = 30.0  # seconds of a round
SLOW = 2.2 * TIMEOUT

SLEEPING = f"""
import time
from pathlib import Path

def fault(message, context, call_next):
    config = message.content.get("config", {{}})
    if "began" in context.node_config and "server-round" in config and "autoflip-phase" not in config:
        with Path(context.node_config["began"]).open("a") as file:
            print(config["server-round"], file=file)
        if config["server-round"] == 2:
            time.sleep({SLOW})
    return call_next(message, context)
"""


def deployed(out: Path, nodes: int, **settings: Any) -> dict[str, Any]:
    own = {key.replace("_", "-"): value for key, value in settings.items()}
    return {**SMALL, "nodes": nodes, "round-timeout": TIMEOUT, "output-dir": str(out), **own}


def start_node(loopback: Loopback, part: int, log: str) -> None:
    """A new SuperNode with the node config of an earlier one."""
    arguments = loopback.processes[1 + part].args
    options = arguments[arguments.index("--superlink") :]  # type: ignore[union-attr, index]
    loopback.processes[1 + part] = loopback._serve("supernode", log, superlink._free_port(), *options)


@contextmanager
def meanwhile(fault: Callable[[], None]) -> Iterator[None]:
    """A fault that happens while the block runs; what goes wrong in it is told at the end."""
    troubles: list[BaseException] = []

    def happen() -> None:
        try:
            fault()
        except BaseException as error:
            troubles.append(error)

    thread = threading.Thread(target=happen)
    thread.start()
    yield
    thread.join()
    assert not troubles, troubles


def said(loopback: Loopback, text: str, log: str = "run-0") -> Any:
    return wait_for(lambda: loopback._log(log).exists() and text in loopback._log(log).read_text(errors="replace"))


def tell(folder: Path) -> None:
    for number, line in rounds(folder).items():
        print(f"round {number}: {line['nodes']} nodes, {line['seconds']:.0f} s, {line['failures']}")


def test_a_node_killed_in_the_middle_of_a_round_and_started_again(tmp_path: Path) -> None:
    with Loopback(nodes=3) as loopback:

        def fault() -> None:
            said(loopback, "[ROUND 2/")
            time.sleep(1)
            kill(loopback.processes[3].pid)
            start_node(loopback, 2, "supernode-again")

        with meanwhile(fault):
            loopback.run(REPOSITORY, deployed(tmp_path, 3, num_server_rounds=7), timeout=LIMIT)
    folder = record(tmp_path)
    tell(folder)
    lines, summary = rounds(folder), told(folder)
    assert lines[1]["nodes"] == 3
    assert lines[2]["nodes"] == 2  # on without it
    assert lines[7]["nodes"] == 3
    assert all(line["nodes"] >= 2 for number, line in lines.items() if number)
    for number in range(2, 8):
        assert lines[number]["seconds"] - lines[number - 1]["seconds"] < TIMEOUT + 15
    assert 0 < summary["failures"]["errors"] + summary["failures"]["absent"] <= 3
    assert summary["failures"]["quarantined"] == 0
    assert summary["final_accuracy"] > 0.8


def test_a_node_that_joins_late(tmp_path: Path) -> None:
    with Loopback(nodes=3) as loopback:
        os.kill(loopback.processes[3].pid, signal.SIGTERM)
        loopback.processes[3].wait(60)

        def fault() -> None:
            said(loopback, "[round 1/")
            start_node(loopback, 2, "supernode-late")

        with meanwhile(fault):
            entry = loopback.run(
                REPOSITORY, deployed(tmp_path, 2, num_server_rounds=6, node_timeout=5.0), timeout=LIMIT
            )
        assert "2 of 3 nodes have connected within 5 s; going on with those" in Path(entry["log"]).read_text()
    folder = record(tmp_path)
    tell(folder)
    lines, summary = rounds(folder), told(folder)
    assert lines[1]["nodes"] == 2
    assert lines[6]["nodes"] == 3
    assert summary["failures"] == NONE
    assert len(summary["bytes_by_node"]) == 3
    masks = [own["mask_down"] for own in summary["bytes_by_node"].values()]
    assert min(masks) > 0.9 * max(masks) > 0  # it was sent the mask as the others were


def test_a_node_slower_than_the_rounds_limit(tmp_path: Path) -> None:
    began = tmp_path / "began"
    app = faulty_app(tmp_path / "app", client=SLEEPING)
    with Loopback(nodes=3, node_configs=[{}, {}, {"began": str(began)}]) as loopback:
        loopback.run(app, deployed(tmp_path / "out", 3, num_server_rounds=5), timeout=LIMIT)
    folder = record(tmp_path / "out")
    tell(folder)
    lines, summary = rounds(folder), told(folder)
    assert [line["nodes"] for number, line in lines.items() if number] == [3, 2, 2, 3, 3]
    assert began.read_text().split() == ["1", "2", "4", "5"]  # no backlog: the message of round 3 has expired
    for number in (2, 3):
        assert lines[number]["seconds"] - lines[number - 1]["seconds"] < TIMEOUT + 5
    assert summary["failures"]["errors"] + summary["failures"]["absent"] == 2
    assert summary["failures"]["quarantined"] == 0
    assert summary["final_accuracy"] > 0.8


def test_the_superlink_killed_and_restarted_with_its_database(tmp_path: Path) -> None:
    settings = {"local_epochs": 2, "round_timeout": 120.0}
    with Loopback(nodes=2, options=["--database", str(tmp_path / "state.db")]) as loopback:
        loopback.run(REPOSITORY, deployed(tmp_path / "whole", 2, **settings), timeout=LIMIT)
        times: dict[str, float] = {}

        def fault() -> None:
            wait_for(lambda: checkpoint(tmp_path / "out", 2))
            old = loopback.processes[0]
            kill(old.pid)  # the server app, too, which else works on for a while
            old.wait()
            times["killed"] = time.monotonic()
            with loopback._log("superlink-again").open("wb") as out:
                loopback.processes[0] = subprocess.Popen(
                    old.args,
                    stdout=out,
                    stderr=out,
                    env=loopback._environment,
                    cwd=loopback.home,
                    start_new_session=True,
                )

        with meanwhile(fault), pytest.raises(RuntimeError):
            loopback.run(REPOSITORY, deployed(tmp_path / "out", 2, **settings), timeout=LIMIT)
        port = int(loopback.processes[0].args[5])  # type: ignore[index, arg-type]
        assert not superlink._wait_until_healthy(loopback.processes[0], port)
        loopback._wait_for_nodes()
        print(f"the nodes were back after {time.monotonic() - times['killed']:.0f} s")
        folder = record(tmp_path / "out")
        assert not (folder / "summary.json").exists()
        entry = loopback.run(REPOSITORY, deployed(tmp_path / "out", 2, **settings, resume=str(folder)), timeout=LIMIT)
        print(f"the run was whole after {time.monotonic() - times['killed']:.0f} s: {entry['status']}")
    tell(folder)
    whole = record(tmp_path / "whole")
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert told(folder)["failures"] == NONE
    (after,) = told(folder)["resumed_after"]
    assert after >= 2
