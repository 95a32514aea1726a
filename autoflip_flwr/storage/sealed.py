"""Safetensors files of JSON and arrays with a digest: changed files are rejected. Nothing is unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.core.digest import digest_of
from autoflip_flwr.core.layout import Arrays
from autoflip_flwr.storage.files import write_atomic

try:
    from safetensors import safe_open
    from safetensors.numpy import save
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        'checkpoints and stored explorations need safetensors: pip install "autoflip-flwr[checkpoint]"',
        name=missing.name,
    ) from missing


class SealError(ValueError):
    """A file cannot be read, or was changed after it was written; the message says why."""


def write_sealed(path: Path, about: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write JSON-serialisable data, and arrays by name; raise ``OSError``, which names the file, if that fails."""
    tensors = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    text = json.dumps(about)
    write_atomic(path, save(tensors, metadata={"autoflip": text, "digest": seal(text, tensors)}))


def read_sealed(path: Path) -> tuple[dict[str, Any], Arrays]:
    """Read what :func:`write_sealed` wrote; raise :class:`SealError` if it is damaged, or ``FileNotFoundError``."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        text = metadata["autoflip"]
        whole = seal(text, tensors) == metadata["digest"]
        about: dict[str, Any] = json.loads(text)
    except FileNotFoundError:
        raise
    except KeyError as error:
        raise SealError(f"without {error}") from error
    except Exception as error:  # safetensors has its own error type; JSON and arrays raise others
        raise SealError(str(error)) from error
    if not whole:
        raise SealError("its digest is another")
    return about, tensors


def seal(text: str, tensors: Mapping[str, NDArray[Any]]) -> str:
    """Return the SHA-256 (hex) of a text and of arrays by name, independent of their order."""
    return digest_of(dict(sorted(tensors.items())), text)


def difference(before: Any, now: Any, at: str = "") -> str:
    """Return a text about the first setting in which two trees differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if keys:
            return difference(before.get(keys[0]), now.get(keys[0]), f"{at}.{keys[0]}".lstrip("."))
    return f"{at} was {before!r}, and is now {now!r}"
