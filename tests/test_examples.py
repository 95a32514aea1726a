"""The projects in `examples/`, plain and with their `autoflip.diff`, as real runs under Ray."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

REPOSITORY = Path(__file__).parents[1]
EXAMPLES = {"pytorch": 0.88, "pytorch-numpyclient": 0.9, "sklearn": 0.9}
"""Each project and the least accuracy of the plain run: well below what was seen, far above chance (0.1)."""
TOLERANCE = 0.1  # by which the pruned run may fall behind the plain one
MOST_LINES = 5

every_example = pytest.mark.parametrize("example", EXAMPLES)


def changed_lines(example: str) -> list[str]:
    """The diff's lines with a sign."""
    lines = (REPOSITORY / "examples" / example / "autoflip.diff").read_text().splitlines()
    return [line for line in lines if re.match(r"[+-](?!\+\+ |-- )", line)]


def copied(example: str, folder: Path, *, patched: bool) -> Path:
    project = folder / ("patched" if patched else "plain")
    shutil.copytree(REPOSITORY / "examples" / example, project, ignore=shutil.ignore_patterns("__pycache__"))
    if patched:
        applied = subprocess.run(["git", "apply", "autoflip.diff"], cwd=project, capture_output=True, text=True)
        assert (applied.returncode, applied.stderr) == (0, "")
    return project


def ran(project: Path, model: Path) -> str:
    """The output of a run that completed and in which no client failed."""
    command = [sys.executable, "-m", "autoflip_flwr.launch.cli", "run", str(project), "--nodes", "4"]
    command += ["--verbose", "-c", f'model-path="{model}"']
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=project.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(re.findall(r"(\d+) failures", done.stdout)) == {"0"}, done.stdout
    return done.stdout


def final_accuracy(output: str) -> float:
    (accuracy,) = re.findall(r"final accuracy: (\d\.\d{4})\b", output)
    return float(accuracy)


def non_zero_weights(model: Path) -> tuple[int, int]:
    """How many entries of the arrays with two or more dimensions are not zero, and how many there are."""
    weights: Mapping[str, NDArray[np.generic] | torch.Tensor] = (
        np.load(model) if model.suffix == ".npz" else torch.load(model, weights_only=True)
    )
    matrices = [np.asarray(weights[name]) for name in weights]
    matrices = [array for array in matrices if array.ndim >= 2]
    return sum(int(np.count_nonzero(array)) for array in matrices), sum(array.size for array in matrices)


@every_example
def test_five_lines_are_enough(example: str, tmp_path: Path) -> None:
    lines = changed_lines(example)
    assert 0 < sum(line.startswith("+") for line in lines) <= MOST_LINES
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        assert line.startswith("+") or following.startswith("+"), f"deleted, not changed: {line}"
    plain, patched = copied(example, tmp_path, patched=False), copied(example, tmp_path, patched=True)
    for file in patched.rglob("*.py"):
        compile(file.read_text(), file, "exec")
    touched = [f for f in patched.rglob("*.py") if f.read_text() != (plain / f.relative_to(patched)).read_text()]
    assert sorted(file.name for file in touched) == ["client_app.py", "server_app.py"]


@every_example
def test_a_page_shows_this_diff(example: str) -> None:
    """The very lines in their order: the first screen of README.md those of PyTorch, the guide those of the others."""
    page = REPOSITORY / ("README.md" if example == "pytorch" else "docs/guide.md")
    blocks = re.findall(r"^```diff\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    shown = [[line for line in block.splitlines() if not line.startswith("#")] for block in blocks]
    assert changed_lines(example) in shown


@pytest.mark.runs
@pytest.mark.parametrize("example", ["pytorch", pytest.param("pytorch-numpyclient", marks=pytest.mark.slow), "sklearn"])
def test_it_runs_plain_and_pruned(example: str, tmp_path: Path) -> None:
    suffix = ".npz" if example == "sklearn" else ".pt"
    dense, sparse = tmp_path / f"dense{suffix}", tmp_path / f"sparse{suffix}"
    plain = ran(copied(example, tmp_path, patched=False), dense)
    pruned = ran(copied(example, tmp_path, patched=True), sparse)

    assert "prunable" not in plain
    assert final_accuracy(plain) > EXAMPLES[example]
    assert final_accuracy(pruned) > final_accuracy(plain) - TOLERANCE
    ((kept, prunable),) = re.findall(r"mask: (\d+) of (\d+) prunable parameters kept", pruned)
    assert int(kept) == int(prunable) - int(0.2 * int(prunable))  # in round 1
    remaining, everything = non_zero_weights(sparse)
    assert everything == int(prunable)
    assert 0 < remaining <= everything - int(0.7 * everything) < non_zero_weights(dense)[0]
