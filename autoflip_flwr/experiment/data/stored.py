"""Arrays that are made once per machine, and then mapped into the memory of every process."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.experiment.data.dataset import Arrays
from autoflip_flwr.experiment.data.files import cache_dir, store_of

_LIST = "arrays.json"
_FORMAT = 1  # of what is stored; another one is made anew


def stored(name: str, sources: Sequence[Path], make: Callable[[], Arrays]) -> Arrays:
    """Return arrays from the cache folder; make and store them first where they are not there, or damaged.

    Several processes may do so at once: each writes a folder of its own, and the first to finish renames it into place.
    Where the cache folder cannot be written, the arrays stay in memory.

    Parameters
    ----------
    name : str
        Of the data set.
    sources : sequence of Path
        The files that the arrays are made from. When one of them changes, arrays are made anew. Empty for a data set
        whose content is fixed.
    make : Callable
        Makes the arrays.

    Returns
    -------
    Mapping
        Read-only arrays by name.
    """
    folder = store_of(name, _digest(sources) if sources else "")
    there = _mapped(folder)
    if there is not None:
        return there
    made = make()
    with suppress(OSError):
        _write(folder, made)
    return _mapped(folder) or made


def _digest(sources: Sequence[Path]) -> str:
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in sources]
    return hashlib.sha256(json.dumps([_FORMAT, stats]).encode()).hexdigest()[:16]


def _mapped(folder: Path) -> dict[str, NDArray[Any]] | None:
    """Map what is in a folder; None if anything is missing or not as it was written."""
    try:
        about = json.loads((folder / _LIST).read_text("utf-8"))
        if about["format"] != _FORMAT:
            return None
        arrays = {}
        for name, (dtype, shape) in about["arrays"].items():
            empty = 0 in shape  # an empty file cannot be mapped
            array = np.load(folder / f"{name}.npy", mmap_mode=None if empty else "r", allow_pickle=False)
            if (array.dtype.str, list(array.shape)) != (dtype, shape):
                return None
            arrays[name] = array
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
        return None
    return arrays


def _write(folder: Path, arrays: Arrays) -> None:
    cache = cache_dir()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=cache) as name:
        own = Path(name)
        new = own / "new"
        new.mkdir()
        for key, array in arrays.items():
            np.save(new / f"{key}.npy", np.ascontiguousarray(array), allow_pickle=False)
        shapes = {key: (array.dtype.str, array.shape) for key, array in arrays.items()}
        (new / _LIST).write_text(json.dumps({"format": _FORMAT, "arrays": shapes}), "utf-8")
        if _mapped(folder) is None:
            with suppress(OSError):  # nothing there yet, or a damaged folder
                folder.rename(own / "damaged")
        with suppress(OSError):  # another process was first
            new.rename(folder)
