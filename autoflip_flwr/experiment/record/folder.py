"""The record of a run: one folder, written while the run goes on.

``config.json`` is there from the start, and ``metrics.jsonl`` grows by one line per phase step, so an interrupted run
can still be reported. ``summary.json`` is written last: it marks a complete run. ``failure.json`` says why a run ended
without it, until the run is resumed.
Bytes are counted in bytes throughout and shown in MB of 10^6 bytes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save as safetensors_bytes

from autoflip_flwr.experiment.record.circumstances import circumstances, stamp
from autoflip_flwr.experiment.record.summary import jsonable
from autoflip_flwr.storage.files import naming, write_atomic


@dataclass(frozen=True)
class RunRecord:
    """The folder of one run; ``path`` is absolute."""

    path: Path

    @classmethod
    def create(
        cls,
        output_dir: str | Path,
        name: str,
        config: Mapping[str, object],
        *,
        folder: Path | None = None,
        key: str = "",
    ) -> RunRecord:
        """Make ``<output_dir>/<YYYYMMDD-HHMMSS>-<name>/`` (UTC), or ``folder``, and write ``config.json`` into it.

        Characters of ``name`` that do not belong in a folder's name become ``-``. An existing folder is never reused:
        the new one gets ``-2``, ``-3`` and so on. ``config`` holds the resolved value of every setting. ``key`` is the
        run's identity in a suite.

        Raises ``OSError`` if the folder cannot be made.
        """
        started = datetime.now(UTC)
        about = {"name": name, "config": config, "seed": config.get("seed"), **circumstances(started)}
        if key:
            about["key"] = key
        if folder is None:
            safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "run"
            folder = _new_folder(Path(output_dir).resolve() / f"{started:%Y%m%d-%H%M%S}-{safe}")
        folder.mkdir(parents=True, exist_ok=True)
        record = cls(folder.resolve())
        _write_json(record.path / "config.json", about)
        return record

    def about(self) -> dict[str, Any]:
        """Return the content of ``config.json``."""
        found: dict[str, Any] = json.loads((self.path / "config.json").read_text("utf-8"))
        return found

    def goes_on(self, config: Mapping[str, object], after: int) -> None:
        """Note in ``config.json`` that the run is resumed after a round, its settings, and its machine."""
        about = self.about()
        about.setdefault("resumed", []).append({"after": after, "config": config, **circumstances(datetime.now(UTC))})
        _write_json(self.path / "config.json", about)

    def fail(self, reason: str) -> None:
        """Write ``failure.json`` with the reason why the run has ended."""
        pass  # as in `finish`

        _write_json(self.path / "failure.json", {"reason": reason, "ended": stamp(datetime.now(UTC))})

    def forget_failure(self) -> None:
        """Remove ``failure.json``, since the run is resumed or complete."""
        (self.path / "failure.json").unlink(missing_ok=True)

    def has_rounds(self) -> bool:
        """Return whether ``metrics.jsonl`` has a line of a round."""
        lines = self.path / "metrics.jsonl"
        return lines.exists() and '"phase": "train"' in lines.read_text("utf-8")

    def shorten(self, size: int) -> None:
        """Cut ``metrics.jsonl`` to its first ``size`` bytes, since the rest belongs to unfinished rounds."""
        if self.size() > size:
            os.truncate(self.path / "metrics.jsonl", size)

    def size(self) -> int:
        """Return the size of ``metrics.jsonl`` in bytes."""
        lines = self.path / "metrics.jsonl"
        return lines.stat().st_size if lines.exists() else 0

    def append(self, line: Mapping[str, object]) -> None:
        """Add one line to ``metrics.jsonl``. It is on the disk when this returns. NaN and infinities become null."""
        path = self.path / "metrics.jsonl"
        with naming(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(jsonable(line), allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def write_incidents(self, incidents: Sequence[Mapping[str, object]]) -> None:
        """Write ``incidents.json``: what went wrong so far (:class:`~autoflip_flwr.costs.ledger.Ledger`)."""
        write_atomic(self.path / "incidents.json", _json_lines(incidents))

    def write_holdings(self, holdings: Mapping[str, object]) -> None:
        """Write ``holdings.json``: the names of the ``classes``, and each node's ``counts`` of examples of each."""
        write_atomic(self.path / "holdings.json", (json.dumps(holdings) + "\n").encode())

    def finish(
        self,
        summary: Mapping[str, object],
        model: Mapping[str, npt.NDArray[Any]],
        mask: Mapping[str, npt.NDArray[Any]] | None,
    ) -> None:
        """Write ``model.safetensors``, ``mask.safetensors`` (if given), and ``summary.json``.

        ``model`` maps parameter names to arrays of any shape; ``mask`` maps the pruned ones among them to bool or
        uint8 arrays of the same shapes, true where a parameter is kept.
        """
        _write_tensors(self.path / "model.safetensors", model)
        if mask is not None:
            _write_tensors(self.path / "mask.safetensors", mask)
        _write_json(self.path / "summary.json", summary)
        self.forget_failure()


def _new_folder(wanted: Path) -> Path:
    path, number = wanted, 1
    while True:
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            number += 1
            path = wanted.with_name(f"{wanted.name}-{number}")


def _json_lines(rows: Sequence[Mapping[str, object]]) -> bytes:
    return ("[\n" + ",\n".join(json.dumps(jsonable(row)) for row in rows) + "\n]\n").encode()


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    write_atomic(path, (json.dumps(jsonable(value), indent=2, allow_nan=False) + "\n").encode())


def _write_tensors(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    # safetensors needs C order; ascontiguousarray would turn the shape () into (1,).
    write_atomic(path, safetensors_bytes({name: np.asarray(array, order="C") for name, array in arrays.items()}))
