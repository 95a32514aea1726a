"""An exploration on disk: what the explorers found and what it cost, so that several runs can share one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

from autoflip_flwr.experiment.config import ConfigError
from autoflip_flwr.files import write_atomic
from autoflip_flwr.guidance import Exploration

_FIELDS = ("deviation", "signed_mean", "normalised")


def start_digest(initial: Mapping[str, NDArray[np.generic]]) -> str:
    """SHA-256 (hex) of W0: names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, array in initial.items():
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def write_exploration(path: Path, found: Exploration, start: str, cost: Mapping[str, float], seconds: float) -> None:
    """Write an exploration (safetensors), with the digest of its W0, what it cost (see `Ledger`) and its time."""
    tensors = {f"{field}/{name}": array for field in _FIELDS for name, array in getattr(found, field).items()}
    about = {
        "start": start,
        "explorers": str(found.explorers),
        "cost": json.dumps(dict(cost)),
        "seconds": repr(seconds),
    }
    write_atomic(path, save(tensors, metadata=about))


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
        raise ConfigError(f"exploration = '{path}': not an exploration of an earlier run ({error})") from error
    if about["start"] != start:
        raise ConfigError(
            f"exploration = '{path}': made from another initial model; use the same model, dataset and seed"
        )
    return found, cost, seconds
