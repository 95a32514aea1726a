"""What a run leaves behind: one folder, written while the run goes on.

``config.json`` is there from the start and ``metrics.jsonl`` grows by a line a phase step, so a run that is
interrupted can still be reported. ``summary.json`` is written last: its presence says that the run is complete.
``failure.json`` says why a run has ended without one, until it goes on.
Bytes are counted in bytes throughout and shown in MB of 10^6 bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save as safetensors_bytes

from autoflip_flwr.storage.files import naming, write_atomic

PHASES: Mapping[str, str] = {
    "exploration_up": "Exploration, up",
    "exploration_down": "Exploration, down",
    "mask_down": "Mask, down",
    "train_up": "Training, up",
    "train_down": "Training, down",
    "evaluate_up": "Evaluation, up",
    "evaluate_down": "Evaluation, down",
    "other": "Other",
}
"""The phases that bytes are counted in, in the order they are shown, with their titles."""

_DISTRIBUTIONS = ("autoflip-flwr", "flwr", "torch", "torchvision", "numpy", "ray")


@dataclass(frozen=True)
class RunRecord:
    """The folder of one run; ``path`` is absolute."""

    path: Path

    @classmethod
    def create(cls, output_dir: str | Path, name: str, config: Mapping[str, object]) -> RunRecord:
        """Make ``<output_dir>/<YYYYMMDD-HHMMSS>-<name>/`` (UTC) and write ``config.json`` into it.

        Characters of ``name`` that do not belong in a folder's name become ``-``; a folder that exists already is
        never reused, the new one gets ``-2``, ``-3`` and so on. ``config`` holds every setting, resolved.

        Raises ``OSError`` if the folder cannot be made.
        """
        started = datetime.now(UTC)
        about = {"name": name, "config": config, "seed": config.get("seed"), **_circumstances(started)}
        safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "run"
        record = cls(_new_folder(Path(output_dir).resolve() / f"{started:%Y%m%d-%H%M%S}-{safe}"))
        _write_json(record.path / "config.json", about)
        return record

    def about(self) -> dict[str, Any]:
        """What ``config.json`` holds."""
        found: dict[str, Any] = json.loads((self.path / "config.json").read_text("utf-8"))
        return found

    def goes_on(self, config: Mapping[str, object], after: int) -> None:
        """Note in ``config.json`` that the run goes on after a round, with which settings, and on what."""
        about = self.about()
        about.setdefault("resumed", []).append({"after": after, "config": config, **_circumstances(datetime.now(UTC))})
        _write_json(self.path / "config.json", about)

    def fail(self, reason: str) -> None:
        """Write ``failure.json``, with the reason for which the run has ended, and the report."""
        from autoflip_flwr.experiment import report  # as in `finish`

        _write_json(self.path / "failure.json", {"reason": reason, "ended": _stamp(datetime.now(UTC))})
        report.write(self.path)

    def forget_failure(self) -> None:
        """Remove ``failure.json``: the run goes on, or is complete."""
        (self.path / "failure.json").unlink(missing_ok=True)

    def has_rounds(self) -> bool:
        """Whether ``metrics.jsonl`` has a line of a round."""
        lines = self.path / "metrics.jsonl"
        return lines.exists() and '"phase": "train"' in lines.read_text("utf-8")

    def shorten(self, size: int) -> None:
        """Cut ``metrics.jsonl`` back to its first ``size`` bytes: what came after them was not finished."""
        if self.size() > size:
            os.truncate(self.path / "metrics.jsonl", size)

    def size(self) -> int:
        """Bytes of ``metrics.jsonl``."""
        lines = self.path / "metrics.jsonl"
        return lines.stat().st_size if lines.exists() else 0

    def append(self, line: Mapping[str, object]) -> None:
        """Add one line to ``metrics.jsonl``; it is on the disk when this returns. NaN and infinities become null."""
        path = self.path / "metrics.jsonl"
        with naming(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(jsonable(line), allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def write_incidents(self, incidents: Sequence[Mapping[str, object]]) -> None:
        """Write ``incidents.json``: what went wrong so far (:class:`~autoflip_flwr.costs.ledger.Ledger`)."""
        write_atomic(self.path / "incidents.json", _json_lines(incidents))

    def finish(
        self,
        summary: Mapping[str, object],
        model: Mapping[str, npt.NDArray[Any]],
        mask: Mapping[str, npt.NDArray[Any]] | None,
    ) -> None:
        """Write ``model.safetensors``, ``mask.safetensors`` (if given), ``summary.json`` and the report.

        ``model`` maps parameter names to arrays of any shape; ``mask`` maps the pruned ones among them to bool or
        uint8 arrays of the same shapes, true where a parameter is kept.
        """
        # Deferred because matplotlib is slow to load and nothing before this point wants it.
        from autoflip_flwr.experiment import report

        _write_tensors(self.path / "model.safetensors", model)
        if mask is not None:
            _write_tensors(self.path / "mask.safetensors", mask)
        _write_json(self.path / "summary.json", summary)
        self.forget_failure()
        report.write(self.path)


def summary_rows(summary: Mapping[str, object]) -> list[tuple[str, str]]:
    """The (title, value) pairs that a summary is shown as; what it lacks, or holds as null or NaN, is left out."""
    known = {key: value for key, value in jsonable(summary).items() if value is not None}
    sent: Mapping[str, int] = known.get("bytes", {})
    total, dense = sent.get("total"), known.get("dense_bytes")
    seconds, exchanges = (_by_part(known.get(key, {}), "{:,.1f} s") for key in ("seconds", "exchange_seconds"))
    flops = _by_part({phase: value / 1e9 for phase, value in known.get("flops", {}).items()}, "{:,.1f}")
    rows = [
        ("Method", _shown(known.get("method"), "{}")),
        ("Data set", _shown(known.get("dataset"), "{}")),
        ("Model", _shown(known.get("model"), "{}")),
        ("Rounds", _shown(known.get("rounds"), "{:,}")),
        ("Final accuracy", _shown(known.get("final_accuracy"), "{:.2%}")),
        ("Best accuracy", _shown(known.get("best_accuracy"), "{:.2%}")),
        ("Density, prunable", _shown(known.get("density"), "{:.2%}")),
        ("Density, all", _shown(known.get("density_all"), "{:.2%}")),
        ("Problems of the mask", "; ".join(known.get("mask_problems", []))),
        ("Parameters", _shown(known.get("parameters"), "{:,}")),
        *((title, _megabytes(sent[phase])) for phase, title in PHASES.items() if sent.get(phase)),
        ("Total sent", _megabytes(total)),
        ("Saving", _saving(total, dense) if known.get("method") != "fedavg" else ""),
        ("Upload per client and round", _megabytes(known.get("train_up_per_client_round"))),
        (
            "Computation",
            _shown(_scaled(known.get("flops_total"), 1e9), "{:,.1f} GFLOP") + (f" ({flops})" if flops else ""),
        ),
        ("Time", _shown(known.get("seconds_total"), "{:,.1f} s") + (f" ({seconds})" if seconds else "")),
        ("Time in exchanges", exchanges),
        ("Failures", _failures(known["failures"]) if "failures" in known else ""),
    ]
    return [(title, value) for title, value in rows if value]


def summary_table(summary: Mapping[str, object]) -> str:
    """A summary as a plain text table, at most 80 columns wide, without colour codes."""
    table = Table("Run", "", box=box.SIMPLE_HEAD, show_edge=False)
    for row in summary_rows(summary):
        table.add_row(*row)
    text = StringIO()
    Console(file=text, width=80, color_system=None, markup=False, emoji=False, force_jupyter=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def jsonable(value: object) -> Any:
    """``value`` as what JSON can hold: NaN and infinities as null, NumPy values as Python's, the unknown as text."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return jsonable(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _circumstances(started: datetime) -> dict[str, object]:
    """When a run starts, of which code, with which versions, on what."""
    package = Path(__file__).resolve().parent.parent
    source = source_digest(package)
    commit, dirty = source_commit(package)
    beside = Path.cwd() / package.name
    if commit is None and beside.is_dir() and source_digest(beside) == source:
        # `flwr run` works on a copy of the app, which is no checkout; the one it was made from may lie here
        commit, dirty = source_commit(beside)
    return {
        "versions": _versions(),
        "source": source,
        "commit": commit,
        "dirty": dirty,
        "platform": {
            "system": platform.system(),
            "release": platform.release(),
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
        },
        "started": _stamp(started),
    }


def _stamp(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")


def source_digest(package: Path) -> str:
    """SHA-256 (hex) of the names and contents of the folder's Python files."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def source_commit(package: Path) -> tuple[str | None, bool | None]:
    """The git commit that the folder ``package`` is at, and whether it differs from it.

    Both are ``None`` if git is missing or does not track the folder.
    """

    def git(*arguments: str) -> str:
        # Without the optional locks, so that asking never gets in the way of a git command running beside it.
        command = ("git", "--no-optional-locks", "-C", str(package), *arguments)
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # An installed copy may lie inside somebody else's checkout, which does not track it.
        git("ls-files", "--error-unmatch", ".")
        return git("rev-parse", "--verify", "HEAD"), bool(git("status", "--porcelain", "."))
    except (OSError, subprocess.SubprocessError):
        return None, None


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for distribution in _DISTRIBUTIONS:
        try:
            versions[distribution.replace("-", "_")] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            versions[distribution.replace("-", "_")] = None
    return versions


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
    # safetensors wants C order; ascontiguousarray would turn the shape () into (1,).
    write_atomic(path, safetensors_bytes({name: np.asarray(array, order="C") for name, array in arrays.items()}))


def _shown(value: object, form: str) -> str:
    return "" if value is None else form.format(value)


def _saving(total: float | None, dense: float | None) -> str:
    if not dense or total is None:
        return ""
    share = f"{1 - total / dense:z.1%}"
    if share.startswith("-"):
        return f"none: dense FedAvg would be {_megabytes(dense)}"
    return f"{share} against {_megabytes(dense)} of dense FedAvg"


def _failures(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number:,} {kind}" for kind, number in counts.items() if number) or "none"


def _by_part(values: Mapping[str, float], form: str) -> str:
    return ", ".join(f"{part} {form.format(value)}" for part, value in values.items() if value)


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def _megabytes(size: float | None) -> str:
    return _shown(_scaled(size, 1e6), "{:,.3f} MB")
