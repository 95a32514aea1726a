"""What a run leaves behind, and its report."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import subprocess
from collections.abc import Mapping
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file

from autoflip_flwr.costs import savings
from autoflip_flwr.costs.ledger import Ledger
from autoflip_flwr.experiment.record import circumstances, folder
from autoflip_flwr.experiment.record.circumstances import source_commit, source_digest
from autoflip_flwr.experiment.record.folder import RunRecord
from autoflip_flwr.experiment.record.summary import BYTE_TITLES, summary_table
from autoflip_flwr.experiment.report import report
from autoflip_flwr.storage.files import write_atomic

CONFIG = {"name": "demo", "method": "autoflip", "dataset": "digits", "model": "cnn", "seed": 7, "lr": 0.001}
BYTES = {
    "exploration_up": 1_000_000,
    "exploration_down": 2_000_000,
    "mask_down": 30_000,
    "train_up": 4_000_000,
    "train_down": 5_000_000,
    "evaluate_up": 0,
    "evaluate_down": 0,
    "other": 1_234,
    "total": 12_031_234,
}
SUMMARY = {
    "method": "autoflip",
    "dataset": "digits",
    "model": "cnn",
    "rounds": 3,
    "seed": 7,
    "final_accuracy": 0.9,
    "best_accuracy": 0.91237,
    "density": 0.3,
    "density_all": 0.31,
    "parameters": 123_456,
    "bytes": BYTES,
    "dense_bytes": 48_124_936,
    "train_up_per_client_round": 148_000.0,
    "bytes_by_node": {"0": {"train_up": 4_000_000, "total": 4_000_000}},
    "flops": {"exploration": 0.5e12, "train": 1e12},
    "flops_total": 1.5e12,
    "seconds_total": 61.25,
    "seconds": {"exploration": 10.25, "train": 51.0},
    "exchange_seconds": {"exploration": 9.0, "train": 40.5, "evaluate": 2.0},
    "failures": {"rejected": 0, "errors": 1, "absent": 2},
    "mask": {"version": 1, "digest": "ab12"},
    "density_by_layer": {"conv.weight": {"kept": 30, "size": 100}, "fc.$odd$": {"kept": 0, "size": 0}},
}
MODEL: dict[str, npt.NDArray[Any]] = {
    "fc.weight": np.arange(6, dtype=np.float32).reshape(2, 3).T,  # not in C order
    "steps": np.array(3, np.int64),
}
MASK = {"fc.weight": np.array([[True, False], [False, False], [True, True]])}


def line(number: int, accuracy: float | None, *, phase: str = "train", total: int = 0) -> dict[str, Any]:
    return {
        "phase": phase,
        "round": number,
        "accuracy": accuracy,
        "loss": 1.0,
        "train_loss": math.nan,
        "bytes": {**dict.fromkeys(BYTE_TITLES, 0), "train_up": total, "total": total},
        "flops": {"train": 1e9 * number},
        "seconds": 1.5 * number,
        "density": 0.3,
        "nodes": 4,
        "failures": {"rejected": 0, "errors": 0, "absent": 0},
    }


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def started(tmp_path: Path, config: Mapping[str, object] = CONFIG) -> RunRecord:
    made = RunRecord.create(tmp_path, str(config["name"]), config)
    made.append(line(0, 0.1))
    made.append(line(1, None, phase="exploration", total=3_000_000))
    made.append(line(1, 0.8, total=6_000_000))
    made.append(line(2, 0.5, total=9_000_000))
    return made


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run; plots take a while, so one is shared by the tests that only look at it."""
    made = started(tmp_path_factory.mktemp("runs"))
    made.finish({**SUMMARY, "train_up_per_client_round": math.nan}, MODEL, MASK)
    report.write(made.path)
    return made.path


def rows(text: str) -> dict[str, str]:
    """The two columns of a printed table."""
    cells = (re.split(r"\s{2,}", row.strip(), maxsplit=1) for row in text.splitlines())
    return {row[0]: row[1] for row in cells if len(row) == 2}


# --- the folder and its files


def test_create_writes_the_config(tmp_path: Path) -> None:
    config = {**CONFIG, "path": Path("a/b"), "nan": math.nan, "numpy": np.float32(0.5), "list": (1, None, True)}
    made = RunRecord.create(str(tmp_path / "runs"), "demo", config)
    assert made.path.is_absolute()
    assert made.path.parent == tmp_path / "runs"
    assert re.fullmatch(r"\d{8}-\d{6}-demo", made.path.name)
    assert files(made.path) == {"config.json"}
    about = json.loads((made.path / "config.json").read_text())
    assert about.keys() == {"name", "config", "seed", "versions", "source", "commit", "dirty", "platform", "started"}
    assert about["config"] == {**CONFIG, "path": "a/b", "nan": None, "numpy": 0.5, "list": [1, None, True]}
    assert about["seed"] == 7
    assert about["versions"].keys() == {"python", "autoflip_flwr", "flwr", "torch", "torchvision", "numpy", "ray"}
    assert about["versions"]["numpy"] == np.__version__
    when = datetime.fromisoformat(about["started"])
    assert when.utcoffset() is not None
    assert f"{when:%Y%m%d-%H%M%S}-demo" == made.path.name


def test_create_takes_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert RunRecord.create("runs", "demo", CONFIG).path.parent == tmp_path / "runs"


def test_create_never_reuses_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Clock:
            return cls(2025, 1, 2, 3, 4, 5, tzinfo=tz)

    monkeypatch.setattr(folder, "datetime", Clock)
    names = [RunRecord.create(tmp_path, "demo", CONFIG).path.name for _ in range(3)]
    assert names == ["20250102-030405-demo", "20250102-030405-demo-2", "20250102-030405-demo-3"]


@pytest.mark.parametrize(
    ("name", "folder"), [("<script>", "script"), ("../../x y", "x-y"), ("", "run"), ("..", "run"), ("a_b.1", "a_b.1")]
)
def test_a_name_cannot_leave_the_output_folder(tmp_path: Path, name: str, folder: str) -> None:
    made = RunRecord.create(tmp_path, name, {})
    assert made.path.parent == tmp_path
    assert made.path.name[16:] == folder


def test_create_survives_packages_that_are_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(circumstances, "_DISTRIBUTIONS", ("numpy", "no-such-package-here"))
    made = RunRecord.create(tmp_path, "demo", CONFIG)
    versions = json.loads((made.path / "config.json").read_text())["versions"]
    assert versions["no_such_package_here"] is None
    assert versions["numpy"] == np.__version__


def test_append_is_one_valid_line_at_a_time(tmp_path: Path) -> None:
    made = RunRecord.create(tmp_path, "demo", CONFIG)
    made.append({**line(0, 0.25), "loss": math.inf, "accuracy": np.float64(0.25), "nodes": np.int64(4)})
    first = (made.path / "metrics.jsonl").read_text()
    assert first.count("\n") == 1
    assert first.endswith("\n")
    assert json.loads(first, parse_constant=pytest.fail) == {**line(0, 0.25), "loss": None, "train_loss": None}
    made.append(line(1, None))
    assert (made.path / "metrics.jsonl").read_text().startswith(first)
    assert len((made.path / "metrics.jsonl").read_text().splitlines()) == 2


def test_append_is_on_the_disk_when_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, sizes = RunRecord.create(tmp_path, "demo", CONFIG), []
    monkeypatch.setattr(os, "fsync", lambda file: sizes.append(os.fstat(file).st_size))
    made.append({"round": 1})
    assert sizes == [len('{"round": 1}\n')]


def test_finish_writes_everything(finished: Path) -> None:
    tensors = {"model.safetensors", "mask.safetensors"}
    assert files(finished) == {"config.json", "metrics.jsonl", "summary.json", "report.html"} | tensors
    assert json.loads((finished / "summary.json").read_text()) == {**SUMMARY, "train_up_per_client_round": None}
    for name, arrays in (("model", MODEL), ("mask", MASK)):
        loaded = load_file(finished / f"{name}.safetensors")
        assert loaded.keys() == arrays.keys()
        for key, array in arrays.items():
            np.testing.assert_array_equal(loaded[key], array, strict=True)


def test_finish_without_a_mask(tmp_path: Path) -> None:
    made = RunRecord.create(tmp_path, "demo", CONFIG)
    made.finish(SUMMARY, MODEL, None)
    assert files(made.path) == {"config.json", "model.safetensors", "summary.json"}


def test_a_run_without_its_model_has_no_summary(tmp_path: Path) -> None:
    made = RunRecord.create(tmp_path, "demo", CONFIG)
    with pytest.raises(SafetensorError):
        made.finish(SUMMARY, {"w": np.array(["not", "numbers"])}, None)
    assert files(made.path) == {"config.json"}


def test_an_interrupted_write_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=f"disk full: '{path}'"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert files(tmp_path) == {"file"}


# --- the commit


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    done = subprocess.run(("git", *identity, *arguments), cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_source_commit(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("1")
    assert source_commit(package) == (None, None)  # no checkout
    git(tmp_path, "init")
    assert source_commit(package) == (None, None)  # not tracked
    git(tmp_path, "add", ".")
    assert source_commit(package) == (None, None)  # no commit yet
    git(tmp_path, "commit", "-m", "x")
    (tmp_path / "elsewhere").write_text("not the package's")
    assert source_commit(package) == (git(tmp_path, "rev-parse", "HEAD"), False)
    (package / "a.py").write_text("2")
    assert source_commit(package) == (git(tmp_path, "rev-parse", "HEAD"), True)


def test_the_commit_of_an_app_that_flower_has_copied_is_that_of_the_checkout_it_is_like(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied, checkout = tmp_path / "copied" / "package", tmp_path / "checkout" / "package"
    for package in (copied, checkout):
        (package / "experiment" / "record").mkdir(parents=True)
        (package / "experiment" / "record" / "circumstances.py").write_text("1")
    git(checkout, "init")
    git(checkout, "add", ".")
    git(checkout, "commit", "-m", "x")
    monkeypatch.setattr(circumstances, "__file__", str(copied / "experiment" / "record" / "circumstances.py"))
    monkeypatch.chdir(checkout.parent)
    about = json.loads((RunRecord.create(tmp_path / "runs", "a", {}).path / "config.json").read_text())
    assert (about["commit"], about["dirty"]) == (git(checkout, "rev-parse", "HEAD"), False)
    assert about["source"] == source_digest(checkout)
    (checkout / "experiment" / "record" / "circumstances.py").write_text("2")
    about = json.loads((RunRecord.create(tmp_path / "runs", "b", {}).path / "config.json").read_text())
    assert (about["commit"], about["dirty"]) == (None, None)


def test_source_commit_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert source_commit(Path(folder.__file__).parent) == (None, None)


# --- the table


def test_the_table_says_everything() -> None:
    text = summary_table(SUMMARY)
    assert rows(text) == {
        "Method": "autoflip",
        "Data set": "digits",
        "Model": "cnn",
        "Rounds": "3",
        "Final accuracy": "90.00%",
        "Best accuracy": "91.24%",
        "Density, prunable": "30.00%",
        "Density, all": "31.00%",
        "Parameters": "123,456",
        "Exploration, up": "1.000 MB",
        "Exploration, down": "2.000 MB",
        "Mask, down": "0.030 MB",
        "Training, up": "4.000 MB",
        "Training, down": "5.000 MB",
        "Other": "0.001 MB",
        "Total sent": "12.031 MB",
        "Saving": "75.0% against 48.125 MB of dense FedAvg",
        "Upload per client and round": "0.148 MB",
        "Computation": "1,500.0 GFLOP (exploration 500.0, train 1,000.0)",
        "Time": "61.2 s (exploration 10.2 s, train 51.0 s)",
        "Time in exchanges": "exploration 9.0 s, train 40.5 s, evaluate 2.0 s",
        "Failures": "1 errors, 2 absent",
    }
    assert max(map(len, text.splitlines())) <= 80


def test_the_table_is_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = summary_table({**SUMMARY, "method": "[red]bold[/red] :smile:"})
    assert "\x1b" not in text
    assert rows(text)["Method"] == "[red]bold[/red] :smile:"


def test_the_table_leaves_out_what_is_not_known() -> None:
    shown = rows(summary_table({"method": "fedavg", "final_accuracy": math.nan, "bytes": None, "dense_bytes": 0}))
    assert shown == {"Method": "fedavg"}


def test_the_table_says_no_minus_zero() -> None:
    assert rows(summary_table({"bytes": {"total": 100_001}, "dense_bytes": 100_000}))["Saving"].startswith("0.0% ")


# --- the report


class Page(HTMLParser):
    """The tags, links and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.sources: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for key, value in attrs if key in {"src", "href"}]

    def handle_data(self, data: str) -> None:
        self.words += data + "\n"


def test_the_report_is_self_contained(finished: Path) -> None:
    page = Page((finished / "report.html").read_text())
    assert page.sources
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in page.sources)
    assert not page.tags & {"link", "iframe"}
    assert "not complete" not in page.words
    assert "Upload per client" not in page.words
    for word in ("Saving", "75.0% against 48.125 MB of dense FedAvg", "lr", "0.001", "versions.numpy"):
        assert f"{word}\n" in page.words


def test_the_report_escapes_what_it_shows(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>"
    made = RunRecord.create(tmp_path, evil, {"name": evil, evil: evil, "nested": {evil: [evil]}})
    (made.path / "summary.json").write_text(json.dumps({"method": evil, "failures": {evil: 1}}))
    text = report.write(made.path).read_text()
    page = Page(text)
    assert text.count("<script") == 1  # the page's own
    assert page.words.count(evil) == 10
    assert "not complete" not in page.words


def test_the_report_of_an_interrupted_run(tmp_path: Path) -> None:
    made = started(tmp_path)
    with (made.path / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "train", "rou')
    words = Page(report.write(made.path).read_text()).words
    assert "not complete" in words
    for title, value in (("Rounds", "2"), ("Final accuracy", "50.00%"), ("Best accuracy", "80.00%")):
        assert f"{title}\n{value}\n" in words
    assert "Total sent\n9.000 MB\n" in words
    assert "Computation\n2.0 GFLOP (train 2.0)\n" in words
    assert files(made.path) == {"config.json", "metrics.jsonl", "report.html"}


@pytest.mark.parametrize("lines", [[], [line(1, None, phase="exploration")]])
def test_the_report_of_a_run_without_rounds(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    made = RunRecord.create(tmp_path, "demo", CONFIG)
    for one in lines:
        made.append(one)
    words = Page(report.write(made.path).read_text()).words
    assert "No round has been evaluated yet." in words
    assert "<svg" not in (made.path / "report.html").read_text()


def test_the_report_of_an_empty_folder(tmp_path: Path) -> None:
    assert tmp_path.name in Page(report.write(tmp_path).read_text()).words
    with pytest.raises(NotADirectoryError, match="nowhere"):
        report.write(tmp_path / "nowhere")


def test_every_byte_that_the_ledger_counts_has_its_row_in_both_tables():
    counted = Ledger(base_down=1).bytes_by_phase().keys()
    assert BYTE_TITLES.keys() | {"total"} == counted
    assert {key for keys in savings._ROWS.values() for key in keys} == counted
