"""Checkpoints on disk: all of a run's state after each finished round, written so that no crash can lose one."""

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

Arrays = dict[str, NDArray[Any]]

_ROUND = re.compile(r"round-(\d{6,})\.safetensors")
_SHADOW = "shadow-{:06d}.safetensors"
_BASE = "base.safetensors"


class CheckpointError(ValueError):
    """A checkpoint that is damaged, of another run, or in the way; the message says which file, and what to do."""


class DamagedError(CheckpointError):
    """A checkpoint that cannot be read, or is not as it was written."""


@dataclass
class Checkpoints:
    """Where ``AutoFlip(checkpoints=...)`` keeps what it takes to go on after a crash, bit for bit.

    Parameters
    ----------
    folder : Path or str
        One folder for each run; made if it is not there. It must be as safe from others as the model itself.
    resume : bool
        Go on after the last finished round in the folder, or within the exploration if none is there. False: the
        folder must hold no checkpoint.
    keep : int
        So many rounds are kept, at least 1.
    settings : Mapping[str, object]
        More that must be the same when the run goes on, as JSON can hold it: what the run's own code depends on.
    extra : Callable[[], object] or None
        Called for each checkpoint, of a round or of the exploration; what it returns, as JSON can hold it, is kept.
    restore : Callable[[Any], None] or None
        Called with what ``extra`` returned for the checkpoint from which the run goes on, before it does; with
        ``None`` if the run was interrupted before the first.

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
        self._shadow: tuple[Arrays, list[str]] | None = None  # the last one, and its file's name and digest
        self._base: tuple[Arrays, list[str]] | None = None  # the same of the base
        self._needed: dict[str, str] = {}  # by the file of a round: that of its shadow

    def open(
        self, settings: Mapping[str, object]
    ) -> tuple[dict[str, Any], Arrays, Arrays | None, Arrays | None] | None:
        """State, arrays, shadow and base of the last finished round, or ``None`` if the run begins.

        Parameters
        ----------
        settings : Mapping[str, object]
            All that must be the same when the run goes on, as JSON can hold it.

        Raises
        ------
        CheckpointError
            If there are checkpoints but nothing is to be resumed; if the last one is damaged, or of other settings.
        OSError
            If the folder cannot be made.
        """
        folder = self._folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)  # replies, and the state of the generator that noise is drawn from
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
            left.unlink()  # what was being written when the run ended
        if not rounds:
            found = self.read_exploration()
            self.explorers()  # refuses others' before anything is touched
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
        """The arrays of another file that a round needs, given by its name and digest."""
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
        """From where the run can go on without its last checkpoint."""
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
        """Keep the state after a round, then let go of the oldest; a failure is logged, and the run goes on.

        ``shadow`` is the version of the mask in force, and the last values of what that prunes (full arrays by name):
        they go to a file of their own, once for each version. ``base`` is what stands outside the mask: it goes to a
        file of its own, once. ``None`` where they are those of the initial model, which a run that goes on is given
        again.
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
        """Name and digest of the file that holds a shadow; it is written where the last one was another."""
        if self._shadow is None or self._shadow[0] is not arrays:
            self._shadow = arrays, self._write_beside(_SHADOW.format(version), arrays)
        return self._shadow[1]

    def _write_base(self, arrays: Arrays) -> list[str]:
        """Name and digest of the file that holds the base; it is written once."""
        if self._base is None or self._base[0] is not arrays:
            self._base = arrays, self._write_beside(_BASE, arrays)
        return self._base[1]

    def _write_beside(self, name: str, arrays: Arrays) -> list[str]:
        digest = seal("", arrays)
        _write(self._folder / name, {"digest": digest}, arrays, self._settings)
        return [name, digest]

    def write_exploration(self, found: StoredExploration) -> None:
        """Keep a finished exploration, in place of its explorers' answers; a failure is logged, and the run goes on.

        ``found.checkpoint`` is what this run needs on top to go on; other runs may use the file too.
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
        """The finished exploration, or ``None``; raises :class:`CheckpointError` as :meth:`open` does.

        Its ``checkpoint["state"]`` is what :meth:`write_exploration` was given.
        One that is damaged is only warned of where a round is there: that has the mask.
        """
        path = self._folder / FILE_NAME
        try:
            return _read_exploration(path, self._settings) if path.exists() else None
        except DamagedError as error:
            if not self._rounds():
                raise
            log(WARNING, "%s; the rounds go on without it", error)
            return None

    def add_explorer(self, explorer: int, about: Mapping[str, Any], moves: ArrayRecord) -> None:
        """Keep an explorer's answer as it came; a failure is logged, and the run goes on."""
        try:
            _write(self._folder / EXPLORERS / f"{explorer}.safetensors", about, to_arrays(moves), self._settings)
        except OSError as error:
            log(ERROR, "the answer of explorer %d could not be written: %s", explorer, error)

    def explorers(self) -> dict[int, tuple[dict[str, Any], ArrayRecord]]:
        """The answers that came before the run was interrupted; raises :class:`CheckpointError` as :meth:`open`."""
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
"""Lock files of this process: its lock is gone as soon as one of its files on that path is closed."""


def _lock(path: Path) -> None:
    """Keep other processes out while this one lives: a server app may outlive its SuperLink and still write."""
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
