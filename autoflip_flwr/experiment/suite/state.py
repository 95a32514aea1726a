"""What a suite's folder holds: which runs are done, interrupted, or still to be made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from autoflip_flwr.experiment.record.circumstances import circumstances
from autoflip_flwr.experiment.record.suites import FILE
from autoflip_flwr.experiment.rules import ConfigError, Value
from autoflip_flwr.experiment.suite.plan import Planned
from autoflip_flwr.experiment.suite.spec import Suite
from autoflip_flwr.storage.exploration_file import FILE_NAME
from autoflip_flwr.storage.files import write_atomic

DONE, FAILED, RUNNING, WAITING = "done", "failed", "running", "waiting"


@dataclass
class RunState:
    """A planned run, its folder, and how far it is.

    ``exploration`` is the file of another run's exploration that it uses; "" if it explores itself. ``seconds`` are
    those of the record, exploration included; ``worked`` are those that a worker has just spent on it.
    """

    planned: Planned
    folder: Path
    state: str = WAITING
    reason: str = ""
    seconds: float | None = None
    exploration: str = ""
    worked: float | None = None

    @property
    def explored(self) -> Path:
        """The file of its own exploration, which is there once that is over."""
        return self.folder / FILE_NAME

    def last_line(self) -> dict[str, Any]:
        """Return the last complete line of its metrics; {} if there is none."""
        with suppress(OSError, ValueError, IndexError):
            found: dict[str, Any] = json.loads((self.folder / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
            return found
        return {}

    def summary(self) -> dict[str, Any]:
        """Return its summary; {} if there is none."""
        return read_json(self.folder / "summary.json")

    def settings(self) -> dict[str, Value]:
        """Return the settings with which it is made or goes on."""
        resume = str(self.folder) if any((self.folder / "checkpoint").glob("*.safetensors")) else ""
        ours = {"exploration": self.exploration, "resume": resume, "output-dir": str(self.folder.parent)}
        return self.planned.config.as_dict() | ours

    def finished(self, reason: str) -> None:
        """Note that it is over; ``reason`` says why it failed, "" if it did not."""
        self.state, self.reason = FAILED if reason else DONE, reason
        self.seconds = self.last_line().get("seconds")


class Folder:
    """The folder of a suite, with ``suite.json`` and a folder for each run."""

    def __init__(self, path: Path, suite: Suite, planned: Iterable[Planned], command: str) -> None:
        self.path, self._suite, self._command = path.resolve(), suite, command
        self._about = circumstances(datetime.now(UTC))
        there = _by_key(self.path)
        self.runs = [_found(each, there.get(each.key), self.path) for each in planned]
        source = self._about["source"]
        self.of_other_code = [
            run for run in self.runs if there.get(run.planned.key) and _source(run.folder) not in ("", source)
        ]
        """Runs that other code of this package has made or begun."""

    def begin(self, *, again: bool) -> None:
        """Make the folder. Clear away what cannot be gone on with, and with ``again`` what other code has made."""
        for run in self.of_other_code:
            if again or run.state != DONE:
                run.state, run.reason, run.seconds = WAITING, "", None
        for run in self.runs:
            if run.state != DONE and not (run.settings()["resume"] and run not in self.of_other_code):
                shutil.rmtree(run.folder, ignore_errors=True)
        self.write()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Refuse the folder to other processes in this block, where the system has locks (not on Windows).

        Raises
        ------
        ConfigError
            If another process is making this suite.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            import fcntl
        except ImportError:
            yield
            return
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError(
                    f"{self.path}: another process is making this suite; wait for it, or stop it"
                ) from None
            yield

    def write(self) -> None:
        """Write ``suite.json``."""
        told = {
            "name": self._suite.name,
            "command": self._command,
            "about": self._about,
            "file": self._suite.text,
            "target_accuracy": self._suite.target_accuracy,
            "runs": [_told(run) for run in self.runs],
        }
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path / FILE, (json.dumps(told, indent=1) + "\n").encode())


def _found(planned: Planned, folder: Path | None, suite: Path) -> RunState:
    run = RunState(planned, folder or suite / planned.folder)
    if folder is None:
        return run
    settings = read_json(folder / "config.json").get("config", {})
    run.exploration = settings.get("exploration", "")
    if (folder / "summary.json").exists() and not (folder / "failure.json").exists():
        run.finished("")
    return run


def _told(run: RunState) -> dict[str, Any]:
    return {
        "key": run.planned.key,
        "name": run.planned.name,
        "folder": run.folder.name,
        "state": run.state,
        "reason": run.reason,
        "settings": run.planned.config.as_dict(),
        "varies": dict(run.planned.varies),
        "seconds": run.seconds,
        "command": run.planned.command,
    }


def _by_key(suite: Path) -> dict[str, Path]:
    """Map the keys of the runs that are there to their folders."""
    found = {str(read_json(path).get("key", "")): path.parent for path in sorted(suite.glob("*/config.json"))}
    return {key: folder for key, folder in found.items() if key}


def _source(folder: Path) -> str:
    return str(read_json(folder / "config.json").get("source", ""))


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; {} if there is none."""
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text("utf-8"))
        return found if isinstance(found, Mapping) else {}  # type: ignore[return-value]
    return {}
