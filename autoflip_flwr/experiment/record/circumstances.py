"""Record when a run started, its code, its package versions and its machine."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from datetime import datetime
from importlib import metadata
from pathlib import Path

_DISTRIBUTIONS = ("autoflip-flwr", "flwr", "torch", "torchvision", "numpy", "ray")


def circumstances(started: datetime) -> dict[str, object]:
    """Return when a run starts, its code, its package versions and its machine."""
    package = Path(__file__).resolve().parents[2]
    source = source_digest(package)
    commit, dirty = source_commit(package)
    beside = Path.cwd() / package.name
    if commit is None and beside.is_dir() and source_digest(beside) == source:
        # `flwr run` works on a copy of the app, which is no checkout; the original may be here
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
        "started": stamp(started),
    }


def stamp(moment: datetime) -> str:
    """Write a moment as ISO 8601, to the second."""
    return moment.isoformat(timespec="seconds")


def source_digest(package: Path) -> str:
    """Return the SHA-256 (hex) of the names and contents of the folder's Python files."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def source_commit(package: Path) -> tuple[str | None, bool | None]:
    """Return the git commit of the folder ``package``, and whether the folder has changed since.

    Both are ``None`` if git is missing or does not track the folder.
    """

    def git(*arguments: str) -> str:
        # Without optional locks, so that this never blocks another git command.
        command = ("git", "--no-optional-locks", "-C", str(package), *arguments)
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # An installed copy may be inside another project's checkout, which does not track it.
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
