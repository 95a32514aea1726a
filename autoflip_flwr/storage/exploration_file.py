"""File of an exploration that other runs can use: the explorers' statistics, the digest of their model, and the cost.

The app and the checkpoints write the same format, so that each file can be used wherever an exploration is expected.
It needs safetensors (``pip install "autoflip-flwr[checkpoint]"``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord
from numpy.typing import NDArray

from autoflip_flwr.core.digest import digest_of
from autoflip_flwr.core.layout import Arrays
from autoflip_flwr.core.statistics import Exploration, Statistics, named
from autoflip_flwr.storage.sealed import SealError, difference, read_sealed, write_sealed
from autoflip_flwr.wire.records import to_arrays

FILE_NAME = "exploration.safetensors"
"""Name of the file in a run's folder, as the app and checkpoints write it."""

EXPLORATION_FORMAT = 1

_STATE = "state/"
"""Prefix of the names of a checkpoint's arrays. Those of statistics are ``mean[_square]/<statistic>/<array>``."""


class ExplorationFileError(ValueError):
    """A file is damaged, is no exploration, or belongs to another model; the message names it, and says what to do.

    ``reason`` is the message without the file's name. ``damaged`` is True if the file cannot be read.
    """

    def __init__(self, path: Path, reason: str, *, damaged: bool = False) -> None:
        super().__init__(f"{path}: {reason}")
        self.reason, self.damaged = reason, damaged


@dataclass(frozen=True)
class StoredExploration:
    """Content of an exploration file.

    Attributes
    ----------
    seen : Statistics
        Statistics that the explorers reported; each array keeps its dtype.
    start : str
        Digest of W0, the full model (:func:`~autoflip_flwr.core.digest.digest_of`).
    settings : Mapping[str, object]
        Settings that W0 was made with (JSON-serialisable).
    cost : Mapping[str, float]
        Cost of the exploration, as :meth:`Ledger.charge_exploration()
        <autoflip_flwr.costs.ledger.Ledger.charge_exploration>` takes it; empty if unknown.
    seconds : float
        Duration of the exploration in seconds.
    checkpoint : Mapping[str, object]
        Additional state of a checkpoint, to resume its run (JSON-serialisable); else empty.
    arrays : dict[str, ndarray]
        Arrays that belong to ``checkpoint``.
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
        """The explorers' statistics, as ``AutoFlip(exploration=...)`` takes them."""
        return named(self.seen)

    def write(self, path: Path) -> None:
        """Write the file completely or not at all; raise ``OSError``, which names the file, if that fails."""
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
        """Read a file; raise :class:`ExplorationFileError` if it is unusable, or ``FileNotFoundError``."""
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
        found: dict[str, dict[str, dict[str, Any]]] = {"mean": {}, "mean_square": {}}
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
    """Write an exploration to a file.

    Parameters
    ----------
    path : Path or str
        The file; an existing file is replaced.
    exploration : Exploration
        The explorers' statistics: ``strategy.exploration`` after the start.
    initial : ArrayRecord or dict[str, ndarray]
        W0, the full model from which the explorers started, as it was given to ``start``.
    settings : Mapping[str, object] or None
        Settings that W0 was made with (JSON-serialisable), for :func:`read_exploration` to compare.
    cost : Mapping[str, float] or None
        Cost, from :meth:`Ledger.exploration_only() <autoflip_flwr.costs.ledger.Ledger.exploration_only>`.
    seconds : float
        Duration of the exploration in seconds.

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
    """Read an exploration that started from ``initial``, written by :func:`write_exploration`, app or checkpoint.

    Parameters
    ----------
    path : Path or str
        The file.
    initial : ArrayRecord or dict[str, ndarray] or None
        W0, the full model that will be given to ``start``; ``None`` skips the check.
    settings : Mapping[str, object] or None
        Settings that must equal those in the file; settings that the file lacks are not compared.

    Raises
    ------
    ExplorationFileError
        If the file is damaged, is no exploration, or belongs to another initial model or other settings.
    FileNotFoundError
        If the file does not exist.
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
