"""What the tests of faults share: the shipped app with a fault, runs of it, and their records."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from projects import write_project

from autoflip_flwr.launch import superlink
from autoflip_flwr.launch.cli import to_toml

REPOSITORY = Path(__file__).parents[1]
LIMIT = 300.0  # seconds within which whatever is waited for must happen
SMALL = {"num-server-rounds": 4, "nodes": 4, "local-epochs": 5, "exploration-epochs": 1}


def faulty_app(folder: Path, client: str = "", server: str = "") -> Path:
    """The shipped app with a fault of the test's own: Python text that the client, or the server, runs first.

    The client's names its mod `fault`.
    """
    project = (REPOSITORY / "pyproject.toml").read_text()
    config = project[project.index("[tool.flwr.app.config]") : project.index("[tool.ruff]")].partition("\n")[2]
    fault = "fault, " if client else ""
    own_client = (
        f"from flwr.clientapp import ClientApp\nfrom autoflip_flwr import autoflip_mod\n"
        f"from autoflip_flwr.experiment.client import client_fn\n{client}\n"
        f"app = ClientApp(client_fn=client_fn, mods=[{fault}autoflip_mod])\n"
    )
    own_server = f'{server}\nfrom autoflip_flwr.experiment.server import app\n\n__all__ = ["app"]\n'
    return write_project(folder, server=own_server, client=own_client, config=config)


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
    command += ["--verbose", *(["--nodes", str(values["nodes"])] if app != REPOSITORY else [])]
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
