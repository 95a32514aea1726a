"""Folders of suites whose records are made up, for tests of what is said of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.rules import Value

ABOUT = {"commit": "c0ffee" * 6, "dirty": False, "source": "ab" * 32, "versions": {}, "platform": {}}


def write_run(
    folder: Path, settings: Mapping[str, Value], accuracies: Sequence[float | None], *, megabytes: float = 1.0
) -> Path:
    """Write a complete run whose round n sent ``megabytes`` * n MB, computed 2 n GFLOP and ended after 3 n seconds."""
    folder.mkdir(parents=True)
    config = {**Config().as_dict(), **settings}
    about = {"name": folder.name, "config": config, "seed": config["seed"], "started": "2026-01-02T03:04:05+00:00"}
    (folder / "config.json").write_text(json.dumps({**about, **ABOUT}))
    lines = [
        {
            "phase": "train",
            "round": number,
            "accuracy": accuracy,
            "bytes": {"train_up": 0, "total": round(1e6 * megabytes * number)},
            "flops": {"train": 2e9 * number},
            "seconds": 3.0 * number,
        }
        for number, accuracy in enumerate(accuracies)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {
        **{key: config[key] for key in ("method", "dataset", "model")},
        "rounds": len(lines) - 1,
        "density": 1.0 if config["method"] == "fedavg" else 1 - float(config["sparsity"]),
        "bytes": lines[-1]["bytes"],
        "dense_bytes": round(1e6 * (len(lines) - 1)),
        "flops_total": 2e9 * (len(lines) - 1),
        "seconds_total": 3.0 * (len(lines) - 1),
        "bytes_by_node": {"0": {"train_up": 1000, "total": 1000}, "1": {"train_up": 3000, "total": 3000}},
        "density_by_layer": {"fc.weight": {"kept": 1, "size": 4}} if config["method"] != "fedavg" else {},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def entry(folder: Path, varies: Mapping[str, Value], *, state: str = "done", reason: str = "") -> dict[str, Any]:
    """A run of `suite.json`."""
    settings = {**Config().as_dict(), **varies}
    return {
        "key": folder.name,
        "name": folder.name,
        "folder": folder.name,
        "state": state,
        "reason": reason,
        "settings": settings,
        "varies": varies,
        "seconds": None,
        "command": f"autoflip run -c 'name=\"{folder.name}\"'",
    }


def write_suite(folder: Path, entries: Sequence[Mapping[str, Any]], **others: object) -> Path:
    """Write `suite.json`."""
    told = {"name": "made-up", "command": "autoflip suite made-up.yaml", "about": ABOUT, "file": "name: made-up\n"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "suite.json").write_text(json.dumps({**told, "target_accuracy": None, "runs": entries, **others}))
    return folder
