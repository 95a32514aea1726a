"""Read files that others wrote: bounded, and nothing in them is unpickled."""

from __future__ import annotations

import gzip
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.experiment.rules import ConfigError

LARGEST_JSON = 2**31
"""Most bytes of a json file, unpacked. LEAF's own files, of 100 users each, are smaller by far."""


def plain_array(path: Path) -> NDArray[Any]:
    """Map a `.npy` file; `ConfigError` if it is not a plain one."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{path}: expected a plain .npy array: {one_line(error)}") from error


def plain_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read an `.npz` file; `ConfigError` if it is not one of plain arrays."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError(f"{path}: expected an .npz file of plain arrays: {one_line(error)}") from error


def read_json(path: Path) -> Any:
    """Read a `.json` or `.json.gz` file of bounded size; `ConfigError` if it is none."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(LARGEST_JSON + 1)
        if len(content) <= LARGEST_JSON:
            return json.loads(content)
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise ConfigError(f"{path}: expected a json file: {one_line(error)}") from error
    raise ConfigError(f"{path}: expected at most {LARGEST_JSON} bytes, unpacked")


def one_line(error: Exception) -> str:
    """Return an error's message in one line."""
    return " ".join(str(error).split()) or type(error).__name__
