"""Faults of a deployed run, on loopback: nodes killed, late, slow; the SuperLink killed; `pytest -m slow -k faults`."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from apps import NO_FAILURES
from faults import LIMIT, REPOSITORY, SMALL, checkpoint, faulty_app, kill, record, rounds, told, wait_for

from autoflip_flwr.launch import superlink
from benchmarks.loopback import Loopback

pytestmark = pytest.mark.slow

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
    happened = told(folder, "incidents.json")
    assert 0 < len(happened) <= 3
    assert {(each["kind"] in ("errors", "absent"), each["node"]) for each in happened} == {(True, 2)}
    assert happened[0]["round"] == 2
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
    assert summary["failures"] == NO_FAILURES
    assert list(summary["bytes_by_node"]) == ["0", "1", "2"]
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
    happened = told(folder, "incidents.json")
    assert [(each["round"], each["node"]) for each in happened] == [(2, 2), (3, 2)]
    assert all(each["kind"] in ("errors", "absent") for each in happened)
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
    assert told(folder)["failures"] == NO_FAILURES
    (after,) = told(folder)["resumed_after"]
    assert after >= 2
