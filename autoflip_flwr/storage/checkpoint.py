"""Checkpoints on disk: the whole state of a run after each finished round, written so that a crash cannot lose it."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from logging import ERROR, WARNING
from pathlib import Path
from typing import Any, BinaryIO

from flwr.app import ArrayRecord
from flwr.common.logger import log
from numpy.typing import NDArray

from autoflip_flwr.core.layout import Arrays
from autoflip_flwr.storage.exploration_file import FILE_NAME, ExplorationFileError, StoredExploration
from autoflip_flwr.storage.sealed import SealError, difference, read_sealed, seal, write_sealed
from autoflip_flwr.wire.records import to_arrays, to_record

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

CHECKPOINT_FORMAT = 2
EXPLORERS = "explorers"
LOCK = "lock"

_ROUND = re.compile(r"round-(\d{6,})\.safetensors")
_SHADOW = "shadow-{:06d}.safetensors"
_BASE = "base.safetensors"


class CheckpointError(ValueError):
    """A checkpoint is damaged, belongs to another run, or must not be overwritten.

    The message names the file, and says what to do.
    """


class DamagedError(CheckpointError):
    """A checkpoint cannot be read, or was changed after it was written."""


@dataclass
class Checkpoints:
    """Folder of checkpoints, from which ``AutoFlip(checkpoints=...)`` can resume a run bit for bit after a crash.

    Parameters
    ----------
    folder : Path or str
        Folder of this run only; it is made if it does not exist. Protect it as well as the model itself.
    resume : bool
        Whether to resume after the last finished round in the folder, or within the exploration if no round is
        finished. If False, the folder must not contain checkpoints.
    keep : int
        Number of rounds whose checkpoints are kept, at least 1.
    settings : Mapping[str, object]
        Settings of your own code that must be the same when the run is resumed (JSON-serialisable).
    extra : Callable[[], object] or None
        Called for each checkpoint, of a round or of the exploration. Its result (JSON-serialisable) is stored too.
    restore : Callable[[Any], None] or None
        Called before the run is resumed, with the result of ``extra`` from the checkpoint; with ``None`` if the run was
        interrupted before the first checkpoint.

    Raises
    ------
    ValueError
        If ``keep`` is less than 1.
    """

    folder: Path | str
    resume: bool = False
    keep: int = 2
    settings: Mapping[str, object] = field(default_factory=dict)
    extra: Callable[[], object] | None = None
    restore: Callable[[Any], None] | None = None

    def __post_init__(self) -> None:
        self.folder = Path(self.folder).resolve()
        if self.keep < 1:
            raise ValueError(f"keep = {self.keep}: must be at least 1")
        self._settings: dict[str, Any] = {}
        self._shadow: tuple[Arrays, list[str]] | None = None  # the last shadow, and its file's name and digest
        self._base: tuple[Arrays, list[str]] | None = None  # the same for the base
        self._needed: dict[str, str] = {}  # file of a round -> file of its shadow

    def open(
        self, settings: Mapping[str, object]
    ) -> tuple[dict[str, Any], Arrays, Arrays | None, Arrays | None] | None:
        """Open the folder, and return state, arrays, shadow and base of the last finished round.

        The shadow holds the last values of entries before they were pruned, the base their fixed values while pruned.
        Return ``None`` if there is no finished round to resume from.

        Parameters
        ----------
        settings : Mapping[str, object]
            All settings that must be the same when the run is resumed (JSON-serialisable).

        Raises
        ------
        CheckpointError
            If there are checkpoints but ``resume`` is False; if the last one is damaged, or has other settings.
        OSError
            If the folder cannot be made.
        """
        folder = self._folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)  # private: it holds replies and the state of the noise generator
        (folder / EXPLORERS).mkdir(exist_ok=True)
        _lock(folder / LOCK)
        self._settings = json.loads(json.dumps({**settings, "own": dict(self.settings)}, default=_name))
        rounds = self._rounds()
        if not self.resume:
            if rounds or (folder / FILE_NAME).exists() or any((folder / EXPLORERS).glob("*.safetensors")):
                raise CheckpointError(
                    f"{folder} holds checkpoints of an earlier run: resume it, or choose another folder"
                )
            return None
        for left in [*folder.glob(".*.tmp"), *(folder / EXPLORERS).glob(".*.tmp")]:
            left.unlink()  # files that were incomplete when the run ended
        if not rounds:
            found = self.read_exploration()
            self.explorers()  # raises for another run's files before anything changes
            self._restore(None if found is None else found.checkpoint["extra"])
            return None
        try:
            state, arrays, shadow, base = self._read_round(rounds[-1])
        except DamagedError as error:
            raise DamagedError(f"{error}{self._offer(rounds[:-1])}") from error
        self._needed = state.pop("shadows")
        self._shadow = None if shadow is None else (shadow, state["shadow"])
        self._base = None if base is None else (base, state["base"])
        self._restore(state.pop("extra"))
        return state, arrays, shadow, base

    def _read_round(self, path: Path) -> tuple[dict[str, Any], Arrays, Arrays | None, Arrays | None]:
        state, arrays = _read(path, self._settings)
        return state, arrays, self._read_beside(path, state["shadow"]), self._read_beside(path, state["base"])

    def _read_beside(self, path: Path, beside: list[str] | None) -> Arrays | None:
        """Return the arrays of another file that a round needs, given by its name and digest."""
        if beside is None:
            return None
        name, digest = beside
        other = path.with_name(name)
        if not other.exists():
            raise DamagedError(f"{path} is of no use without {name}, which is not there: remove it")
        try:
            about, values = _read(other, self._settings)
        except DamagedError as error:
            raise DamagedError(f"{error}, and {path.name}, which needs it") from error
        if about["digest"] != digest:
            raise DamagedError(f"{other} is not the one that {path.name} was written with: remove both")
        return values

    def _offer(self, rounds: list[Path]) -> str:
        """Return the end of an error text: from which earlier round the run can be resumed; "" if from none."""
        for path in reversed(rounds):
            with suppress(CheckpointError):
                self._read_round(path)
                return f"; without it the run goes on from {path.name}"
        return ""

    def write(
        self,
        round_: int,
        state: Mapping[str, Any],
        arrays: Mapping[str, NDArray[Any]],
        shadow: tuple[int, Arrays] | None = None,
        base: Arrays | None = None,
    ) -> None:
        """Write the state after a round, then remove the oldest; a failure is logged, and the run continues.

        ``shadow`` is the version of the current mask, and the last values of the entries that it prunes (full arrays by
        name). They are written to a separate file, once per version. ``base`` holds the fixed values of entries while
        they are pruned. It is written to a separate file, once. Either is ``None`` if its values are those of the
        initial model, which a resumed run is given again.
        """
        path = self._folder / f"round-{round_:06d}.safetensors"
        whole = {**state, "extra": self._extra()}
        try:
            whole["shadow"] = None if shadow is None else self._write_shadow(*shadow)
            whole["base"] = None if base is None else self._write_base(base)
            if shadow is not None:
                self._needed[path.name] = whole["shadow"][0]
            _write(path, {**whole, "shadows": self._needed}, arrays, self._settings)
            for old in self._rounds()[: -self.keep]:
                old.unlink()
            rounds = {left.name for left in self._rounds()}
            self._needed = {name: its for name, its in self._needed.items() if name in rounds}
            for left in self._folder.glob("shadow-*.safetensors"):
                if left.name not in self._needed.values():
                    left.unlink()
        except OSError as error:
            log(ERROR, "the checkpoint of round %d could not be written: %s; the one before it stays", round_, error)

    def _write_shadow(self, version: int, arrays: Arrays) -> list[str]:
        """Return name and digest of the file of a shadow; write it if the shadow has changed."""
        if self._shadow is None or self._shadow[0] is not arrays:
            self._shadow = arrays, self._write_beside(_SHADOW.format(version), arrays)
        return self._shadow[1]

    def _write_base(self, arrays: Arrays) -> list[str]:
        """Return name and digest of the file of the base; write it if the base has changed."""
        if self._base is None or self._base[0] is not arrays:
            self._base = arrays, self._write_beside(_BASE, arrays)
        return self._base[1]

    def _write_beside(self, name: str, arrays: Arrays) -> list[str]:
        digest = seal("", arrays)
        _write(self._folder / name, {"digest": digest}, arrays, self._settings)
        return [name, digest]

    def write_exploration(self, found: StoredExploration) -> None:
        """Write a finished exploration, and remove its explorers' replies; a failure is logged, and the run continues.

        ``found.checkpoint`` is what this run needs in addition to be resumed. Other runs may use the file too.
        """
        on_top = {"settings": self._settings, "state": found.checkpoint, "extra": self._extra()}
        try:
            replace(found, settings=self._settings["own"], checkpoint=on_top).write(self._folder / FILE_NAME)
        except OSError as error:
            log(ERROR, "the exploration could not be written: %s; its explorers' answers stay", error)
            return
        for answer in (self._folder / EXPLORERS).glob("*.safetensors"):
            answer.unlink()

    def read_exploration(self) -> StoredExploration | None:
        """Return the finished exploration, or ``None``; raise :class:`CheckpointError` as :meth:`open` does.

        Its ``checkpoint["state"]`` is the ``checkpoint`` that :meth:`write_exploration` was given. A damaged file
        causes only a warning if there is a finished round, since the round has the mask.
        """
        path = self._folder / FILE_NAME
        try:
            return _read_exploration(path, self._settings) if path.exists() else None
        except DamagedError as error:
            if not self._rounds():
                raise
            log(WARNING, "%s; the rounds go on without it", error)
            return None

    def add_explorer(self, explorer: int, about: Mapping[str, Any], deltas: ArrayRecord) -> None:
        """Write an explorer's reply unchanged; a failure is logged, and the run continues."""
        try:
            _write(self._folder / EXPLORERS / f"{explorer}.safetensors", about, to_arrays(deltas), self._settings)
        except OSError as error:
            log(ERROR, "the answer of explorer %d could not be written: %s", explorer, error)

    def explorers(self) -> dict[int, tuple[dict[str, Any], ArrayRecord]]:
        """Return the replies from before the interruption, by explorer.

        Raises :class:`CheckpointError` as :meth:`open` does.
        """
        answers = {}
        for path in sorted((self._folder / EXPLORERS).glob("*.safetensors")):
            about, arrays = _read(path, self._settings)
            answers[int(path.stem)] = about, to_record(arrays)
        return answers

    def _extra(self) -> object:
        extra = None if self.extra is None else self.extra()
        try:
            json.dumps(extra)
        except TypeError as error:
            raise TypeError(f"Checkpoints.extra returned what JSON cannot hold: {error}") from error
        return extra

    def _restore(self, extra: object) -> None:
        if self.restore is not None:
            self.restore(extra)

    @property
    def _folder(self) -> Path:
        return Path(self.folder)

    def _rounds(self) -> list[Path]:
        found = [(int(match[1]), path) for path in self._folder.iterdir() if (match := _ROUND.fullmatch(path.name))]
        return [path for _, path in sorted(found)]


_HELD: dict[Path, BinaryIO] = {}
"""Open lock files of this process. The lock is lost as soon as the process closes any file on that path."""


def _lock(path: Path) -> None:
    """Lock the folder for this process: a server app may outlive its SuperLink, and still write."""
    if fcntl is None or path in _HELD:
        return
    file = path.open("ab")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise CheckpointError(
                f"{path.parent}: another process is still at work on this run: wait for its end, or end it"
            ) from error
        log(WARNING, "%s cannot be locked (%s): see to it that no other process works on this run", path, error)
    else:
        _HELD[path] = file


def _write(
    path: Path, state: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], settings: Mapping[str, Any]
) -> None:
    write_sealed(path, {"format": CHECKPOINT_FORMAT, "settings": settings, "state": state}, arrays)


def _read(path: Path, settings: Mapping[str, Any]) -> tuple[dict[str, Any], Arrays]:
    try:
        found, tensors = read_sealed(path)
    except SealError as error:
        raise DamagedError(f"{path} is damaged ({error}): remove it") from error
    if found["format"] != CHECKPOINT_FORMAT:
        raise CheckpointError(
            f"{path} has format {found['format']}, this version reads {CHECKPOINT_FORMAT}: finish the run with the "
            "version that wrote it, or begin it anew in another folder"
        )
    _compare(path, found["settings"], settings)
    return found["state"], tensors


def _read_exploration(path: Path, settings: Mapping[str, Any]) -> StoredExploration:
    try:
        found = StoredExploration.read(path)
    except ExplorationFileError as error:
        raise (DamagedError if error.damaged else CheckpointError)(str(error)) from error
    if not found.checkpoint:
        raise CheckpointError(f"{path} is not of a checkpoint: move it elsewhere, and give it as exploration=")
    _compare(path, found.checkpoint["settings"], settings)
    return found


def _compare(path: Path, before: object, now: object) -> None:
    if before != now:
        raise CheckpointError(f"{path} belongs to another run: {difference(before, now)}")


def _name(thing: object) -> str:
    return str(getattr(thing, "__qualname__", type(thing).__qualname__))
