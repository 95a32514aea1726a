"""An exploration as a file: what the explorers found, from which model, and what it cost, for other runs to use.

The app's runs and checkpoints write the same file, so that each can be used wherever one is asked for. It needs
safetensors (``pip install "autoflip-flwr[checkpoint]"``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord
from numpy.typing import NDArray

from autoflip_flwr.core.digest import digest_of
from autoflip_flwr.core.statistics import Exploration, Statistics, named
from autoflip_flwr.storage.sealed import SealError, difference, read_sealed, write_sealed
from autoflip_flwr.wire.records import to_arrays

FILE_NAME = "exploration.safetensors"
"""What the app and checkpoints call it, in a run's folder."""

EXPLORATION_FORMAT = 1

_STATE = "state/"
"""Before the names of arrays that are a checkpoint's; those of statistics are ``mean/<statistic>/<array>``."""

Arrays = dict[str, NDArray[Any]]


class ExplorationFileError(ValueError):
    """A file that is damaged, no exploration, or of another model; the message says which file, and what to do.

    ``reason`` is the message without the file's name; ``damaged`` tells whether another file of this name may do.
    """

    def __init__(self, path: Path, reason: str, *, damaged: bool = False) -> None:
        super().__init__(f"{path}: {reason}")
        self.reason, self.damaged = reason, damaged


@dataclass(frozen=True)
class StoredExploration:
    """An exploration and what its file says of it.

    Attributes
    ----------
    seen : Statistics
        What the explorers reported; each array in the dtype that it had.
    start : str
        Digest of W0, the full model (:func:`~autoflip_flwr.core.digest.digest_of`).
    settings : Mapping[str, object]
        Settings that W0 was made with, as JSON can hold them.
    cost : Mapping[str, float]
        What it has cost, as :meth:`Ledger.charge_exploration()
        <autoflip_flwr.costs.ledger.Ledger.charge_exploration>` takes it; empty where that was not told.
    seconds : float
        How long it took.
    checkpoint : Mapping[str, object]
        What a checkpoint keeps on top of that to go on with its run, as JSON can hold it; else empty.
    arrays : dict[str, ndarray]
        The arrays that belong to ``checkpoint``.
    """

    seen: Statistics
    start: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    checkpoint: Mapping[str, Any] = field(default_factory=dict)
    arrays: Arrays = field(default_factory=dict)

    @property
    def exploration(self) -> Exploration | Statistics:
        """What the explorers found, as ``AutoFlip(exploration=...)`` takes it."""
        return named(self.seen)

    def write(self, path: Path) -> None:
        """Write the file: whole, or not at all. Raises ``OSError``, which names the file, if that fails."""
        tensors = {
            f"{kind}/{statistic}/{name}": array
            for kind, statistics in (("mean", self.seen.mean), ("mean_square", self.seen.mean_square))
            for statistic, arrays in statistics.items()
            for name, array in arrays.items()
        }
        about = {
            "kind": "exploration",
            "format": EXPLORATION_FORMAT,
            "explorers": self.seen.clients,
            "start": self.start,
            "settings": dict(self.settings),
            "cost": dict(self.cost),
            "seconds": self.seconds,
            "checkpoint": dict(self.checkpoint),
        }
        write_sealed(path, about, tensors | {_STATE + name: array for name, array in self.arrays.items()})

    @classmethod
    def read(cls, path: Path) -> StoredExploration:
        """Read a file; raises :class:`ExplorationFileError`, or ``FileNotFoundError``."""
        try:
            about, tensors = read_sealed(path)
        except SealError as error:
            reason = f"damaged, or not an exploration ({error}): remove it and explore again, or give another file"
            raise ExplorationFileError(path, reason, damaged=True) from error
        if not isinstance(about, dict) or about.get("kind") != "exploration":
            raise ExplorationFileError(path, f"not an exploration: give the {FILE_NAME} of a run")
        if about.get("format") != EXPLORATION_FORMAT:
            told = f"has format {about.get('format')}, this version reads {EXPLORATION_FORMAT}: explore again"
            raise ExplorationFileError(path, told)
        found: dict[str, dict[str, Arrays]] = {"mean": {}, "mean_square": {}}
        arrays: Arrays = {}
        try:
            for key, array in tensors.items():
                if key.startswith(_STATE):
                    arrays[key[len(_STATE) :]] = array
                else:
                    kind, statistic, name = key.split("/", 2)
                    found[kind].setdefault(statistic, {})[name] = array
            return cls(
                Statistics(found["mean"], found["mean_square"], int(about["explorers"])),
                str(about["start"]),
                dict(about["settings"]),
                {str(key): float(value) for key, value in about["cost"].items()},
                float(about["seconds"]),
                dict(about["checkpoint"]),
                arrays,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ExplorationFileError(path, f"not an exploration ({error!r}): give another file") from error


def write_exploration(
    path: Path | str,
    exploration: Exploration | Statistics,
    initial: ArrayRecord | Mapping[str, NDArray[Any]],
    *,
    settings: Mapping[str, Any] | None = None,
    cost: Mapping[str, float] | None = None,
    seconds: float = 0.0,
) -> None:
    """Keep an exploration in a file.

    Parameters
    ----------
    path : Path or str
        The file; what was there before is replaced.
    exploration : Exploration
        What the explorers found: ``strategy.exploration`` after the start.
    initial : ArrayRecord or dict[str, ndarray]
        W0, the full model that they started from, as ``start`` was given it.
    settings : Mapping[str, object] or None
        Settings that W0 was made with, as JSON can hold them, for :func:`read_exploration` to compare.
    cost : Mapping[str, float] or None
        :meth:`Ledger.exploration_only() <autoflip_flwr.costs.ledger.Ledger.exploration_only>`.
    seconds : float
        How long it took.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    seen = exploration.statistics if isinstance(exploration, Exploration) else exploration
    StoredExploration(seen, _start(initial), settings or {}, cost or {}, seconds).write(Path(path))


def read_exploration(
    path: Path | str,
    initial: ArrayRecord | Mapping[str, NDArray[Any]] | None,
    *,
    settings: Mapping[str, Any] | None = None,
) -> StoredExploration:
    """Read an exploration that began with ``initial``: of :func:`write_exploration`, the app, or a checkpoint.

    Parameters
    ----------
    path : Path or str
        The file.
    initial : ArrayRecord or dict[str, ndarray] or None
        W0, the full model, as ``start`` will be given it; ``None`` leaves it unchecked.
    settings : Mapping[str, object] or None
        Settings that must be as they were, where the file tells them.

    Raises
    ------
    ExplorationFileError
        If the file is damaged, no exploration, or of another initial model.
    FileNotFoundError
        If it is not there.
    """
    path = Path(path)
    found = StoredExploration.read(path)
    before = {key: found.settings[key] for key in settings or {} if key in found.settings}
    now = {key: (settings or {})[key] for key in before}
    if before != now:
        told = f"{difference(before, now)}: an exploration fits the initial model that it began with"
        raise ExplorationFileError(path, told)
    if initial is not None and found.start != _start(initial):
        raise ExplorationFileError(
            path, "made from another initial model: an exploration fits the one that it began with, bit for bit"
        )
    return found


def _start(initial: ArrayRecord | Mapping[str, NDArray[Any]]) -> str:
    return digest_of(to_arrays(initial) if isinstance(initial, ArrayRecord) else initial)
