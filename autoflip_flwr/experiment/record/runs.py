"""Read the folder of a run, whether it is complete, still goes on, was interrupted or has failed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Run:
    """The content of a run's folder: config, metrics so far, summary, incidents, and the reason if it has failed."""

    path: Path
    about: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    complete: bool
    incidents: Sequence[Mapping[str, Any]]
    failure: str

    @classmethod
    def read(cls, run_dir: Path) -> Run:
        """Read the folder of a run. Missing files count as empty.

        Without ``summary.json``, the summary is made from the last line of metrics.

        Raises ``NotADirectoryError`` if ``run_dir`` is no folder, and ``ValueError`` for a file that is not JSON.
        """
        if not run_dir.is_dir():
            raise NotADirectoryError(f"not the folder of a run: {run_dir}")
        about, summary, failure = (_read_json(run_dir / f"{name}.json") for name in ("config", "summary", "failure"))
        incidents = _read_json(run_dir / "incidents.json")
        metrics: list[dict[str, Any]] = []
        with suppress(FileNotFoundError):
            for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
                # The last line of a killed run may be incomplete.
                with suppress(json.JSONDecodeError):
                    metrics.append(json.loads(line))
        complete = bool(summary) and not failure  # a complete run may have been resumed and then failed
        if not complete:
            summary = _summary_so_far(_settings(about), metrics)
        return cls(run_dir, about, metrics, summary, complete, list(incidents), str(failure.get("reason", "")))

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings that the run ended with: those of the last time it was resumed, if it was."""
        return _settings(self.about)

    @property
    def name(self) -> str:
        """The name given to the run, or else that of its folder."""
        return str(self.about.get("name") or self.path.resolve().name)

    @property
    def state(self) -> str:
        """The run's state: done, failed or unfinished, which may still go on."""
        if self.complete:
            return "done"
        return "failed" if self.failure else "unfinished"


def _settings(about: Mapping[str, Any]) -> Mapping[str, Any]:
    last: Mapping[str, Any] = (about.get("resumed") or [about])[-1]
    return last.get("config") or {}


def _summary_so_far(config: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    last = metrics[-1] if metrics else {}
    accuracies = [line["accuracy"] for line in metrics if line["accuracy"] is not None]
    flops = last.get("flops") or {}
    return {
        **{key: config.get(key) for key in ("method", "dataset", "model")},
        "rounds": max((line["round"] for line in metrics if line["phase"] == "train"), default=0),
        "final_accuracy": accuracies[-1] if accuracies else None,
        "best_accuracy": max(accuracies, default=None),
        **{key: last.get(key) for key in ("density", "bytes", "failures")},
        "flops": flops,
        "flops_total": sum(flops.values()) if flops else None,
        "seconds_total": last.get("seconds"),
    }


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
