"""Read the folder of a suite: `suite.json`, and the folder of each of its runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoflip_flwr.experiment.record.runs import Run

FILE = "suite.json"


@dataclass(frozen=True)
class Entry:
    """A run of a suite or of a comparison.

    ``varies`` are the settings that differ between the runs, in kebab case. ``command`` repeats the run. ``state`` is
    done, failed, running, waiting, or unfinished where that is not known.
    """

    run: Run
    name: str
    state: str
    reason: str
    settings: Mapping[str, Any]
    varies: Mapping[str, Any]
    command: str

    @property
    def seed(self) -> Any:
        """The seed of the run."""
        return self.settings.get("seed")


@dataclass(frozen=True)
class Suite:
    """The content of `suite.json`. ``target`` is an accuracy in (0, 1] if the suite sets one."""

    path: Path
    name: str
    command: str
    about: Mapping[str, Any]
    file: str
    target: float | None
    entries: tuple[Entry, ...]

    @classmethod
    def read(cls, folder: Path) -> Suite:
        """Read a suite's folder. Runs without a folder yet have no metrics.

        Raises ``OSError`` if there is no `suite.json`, and ``ValueError`` if it is not that of a suite.
        """
        path = folder / FILE
        try:
            found = json.loads(path.read_text("utf-8"))
            target = found["target_accuracy"]
            return cls(
                folder,
                str(found["name"]),
                str(found["command"]),
                dict(found["about"]),
                str(found["file"]),
                None if target is None else float(target),
                tuple(_entry(folder, each) for each in found["runs"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not the record of a suite ({type(error).__name__}: {error})") from None


def is_suite(folder: Path) -> bool:
    """Return whether a folder is that of a suite."""
    return (folder / FILE).is_file()


def _entry(folder: Path, told: Mapping[str, Any]) -> Entry:
    path = folder / told["folder"]
    run = Run.read(path) if path.is_dir() else Run(path, {}, [], {}, complete=False, incidents=[], failure="")
    return Entry(
        run, told["name"], told["state"], told["reason"], dict(told["settings"]), dict(told["varies"]), told["command"]
    )
