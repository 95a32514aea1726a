"""An exploration on disk: what the explorers found and what it cost, so that several runs can share one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

from autoflip_flwr.core.statistics import Exploration
from autoflip_flwr.experiment.config import ConfigError, Value, shown
from autoflip_flwr.storage.files import write_atomic

_FIELDS = ("deviation", "signed_mean", "normalised")


def write_exploration(
    path: Path,
    found: Exploration,
    start: str,
    settings: Mapping[str, Value],
    cost: Mapping[str, float],
    seconds: float,
) -> None:
    """Write an exploration (safetensors), with the digest and settings of its W0, its cost (see `Ledger`) and time."""
    tensors = {f"{field}/{name}": array for field in _FIELDS for name, array in getattr(found, field).items()}
    about = {
        "start": start,
        "settings": json.dumps(dict(settings)),
        "explorers": str(found.explorers),
        "cost": json.dumps(dict(cost)),
        "seconds": repr(seconds),
    }
    write_atomic(path, save(tensors, metadata=about))


def check_exploration(path: Path, settings: Mapping[str, Value]) -> None:
    """Look at what a file says of itself; `ConfigError` if it is no exploration, or has begun with other settings.

    Explorations of before these were noted are not refused: `read_exploration` compares the model itself.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
        before: dict[str, Value] = json.loads(about.get("settings", "{}"))
        missing = {"start", "explorers", "cost", "seconds"} - about.keys()
    except Exception as error:  # safetensors raises its own type
        raise _not_one(path, error) from error
    if missing:
        raise _not_one(path, f"without {', '.join(sorted(missing))}")
    for key, value in settings.items():
        if before.get(key, value) != value:
            raise ConfigError(
                f"exploration = '{path}': {key} was {shown(before[key])} there, and is now {shown(value)}: "
                "an exploration fits the initial model that it has begun with"
            )


def _not_one(path: Path, reason: object) -> ConfigError:
    return ConfigError(f"exploration = '{path}': not an exploration of an earlier run ({reason})")


def read_exploration(path: Path, start: str) -> tuple[Exploration, dict[str, float], float]:
    """Read an exploration, its cost and its seconds.

    Raises
    ------
    ConfigError
        If the file is none, or its W0 (digest ``start``) is another one.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            fields: dict[str, dict[str, NDArray[np.floating[Any]]]] = {field: {} for field in _FIELDS}
            for key in file.keys():  # noqa: SIM118 - not a dict
                field, _, name = key.partition("/")
                fields[field][name] = file.get_tensor(key)
        cost = {str(key): float(value) for key, value in json.loads(about["cost"]).items()}
        found, seconds = Exploration(**fields, explorers=int(about["explorers"])), float(about["seconds"])
    except Exception as error:  # safetensors raises its own type, json and the metadata others
        raise _not_one(path, error) from error
    if about["start"] != start:
        raise ConfigError(
            f"exploration = '{path}': made from another initial model; use the same model, dataset and seed"
        )
    return found, cost, seconds
