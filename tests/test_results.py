"""Summaries of suites in results/: what they keep, what is said of them, and README.md's block, which they make."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from suites import entry, write_run, write_suite

from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.record.suites import Suite
from autoflip_flwr.experiment.report.points import Point
from autoflip_flwr.experiment.rules import Value
from benchmarks import results, results_readme
from benchmarks.results_file import FOLDER, Result, in_force, read, read_suite, text_of
from benchmarks.results_rows import Row, rows_of, told

DIGITS: dict[str, Value] = {"dataset": "digits", "num-server-rounds": 2, "nodes": 4}
FEDAVG = {**DIGITS, "method": "fedavg"}
PRUNED = {**DIGITS, "method": "autoflip", "sparsity": 0.9, "schedule": "static"}
GRADUAL = {**DIGITS, "method": "gradual", "sparsity": 0.9}
RUNS: tuple[tuple[str, dict[str, Value], Sequence[float | None], float], ...] = (
    ("fedavg-1", {**FEDAVG, "seed": 1}, [0.1, 0.6, 0.8], 1.0),
    ("fedavg-2", {**FEDAVG, "seed": 2}, [0.1, 0.8, 1.0], 1.0),
    ("pruned-1", {**PRUNED, "seed": 1}, [0.1, None, 0.8], 0.6),
    ("pruned-2", {**PRUNED, "seed": 2}, [0.1, 0.9, 0.6], 0.8),
    ("gradual-1", {**GRADUAL, "seed": 1}, [0.1, 0.4, 0.7], 0.5),
    ("layer-1", {**PRUNED, "seed": 1, "scope": "layer"}, [0.1, 0.2, 0.4], 0.25),
)


def made(folder: Path, runs: Any = RUNS, **others: object) -> Suite:
    """A suite with these runs, one that failed and one that waits."""
    entries = [
        entry(write_run(folder / name, settings, accuracies, megabytes=megabytes), settings)
        for name, settings, accuracies, megabytes in runs
    ]
    for path in folder.glob("*/config.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "versions": {"flwr": "1.42.0"}}))
    entries += [entry(folder / "bad", PRUNED, state="failed"), entry(folder / "late", PRUNED, state="waiting")]
    command = "autoflip suite configs/made-up.yaml --output /disk/of/mine --workers=2 -c 'lr=0.1 data-dir=\"/data\"'"
    return Suite.read(write_suite(folder, entries, **{"command": command, **others}))


def kept(tmp_path: Path, runs: Any = RUNS, name: str = "made-up") -> Path:
    """A folder with the summary of a suite."""
    folder = tmp_path / "results"
    results.keep(made(tmp_path / "suites" / name, runs, name=name).path, folder)
    return folder


def rows_in(tmp_path: Path, runs: Any = RUNS) -> list[Row]:
    return rows_of(read(kept(tmp_path, runs)))


def result(settings: Mapping[str, Value], seed: int = 1, accuracy: float = 0.5) -> Result:
    curve = (Point(0, 0.1, 0, 0, 0), Point(1, accuracy, 10.0, 1, 0))
    whole = in_force(Config.from_run_config(settings))
    return Result("autoflip suite a.yaml", whole, seed, "", "c0ffee" * 6, False, 0.1, {"total": 10**7}, 1.0, curve)


# --- the summary of a suite


def test_a_summary_has_a_run_on_each_line_and_nothing_of_the_machine(tmp_path: Path) -> None:
    suite = made(tmp_path / "made-up")
    text = text_of(suite)
    assert text == text_of(suite)
    first, *runs, last = text.splitlines()
    assert json.loads(first + "]}") == {
        "suite": "made-up",
        "command": "autoflip suite configs/made-up.yaml -c lr=0.1",
        "runs": [],
    }
    assert (len(runs), last) == (len(RUNS), "]}")
    assert str(tmp_path) not in text
    assert "/disk" not in text
    pruned = json.loads(runs[2].rstrip(","))
    settings = pruned.pop("settings")
    assert pruned == {
        "seed": 1,
        "accuracy": 0.8,
        "density": pytest.approx(0.1),
        "bytes": {"total": 1_200_000},
        "gflop": 4.0,
        "started": "2026-01-02T03:04:05+00:00",
        "commit": "c0ffee" * 6,
        "changed": False,
        "versions": {"flwr": "1.42.0"},
        "curve": [[0, 0.1, 0.0, 0.0], [2, 0.8, 1.2, 4.0]],
    }
    assert (settings["sparsity"], settings["alpha"], settings["gamma"]) == (0.9, 0.3, 1.0)
    assert settings.keys().isdisjoint({"seed", "output-dir", "data-dir", "fall", "classes-per-client"})


def test_a_suite_without_finished_runs_has_no_summary(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run of this suite is finished; go on with: autoflip suite"):
        text_of(made(tmp_path / "made-up", ()))


def test_a_run_of_two_suites_counts_once_and_the_latest_wins(tmp_path: Path) -> None:
    folder = kept(tmp_path, RUNS[:1], "b")
    later = kept(tmp_path, [("again", RUNS[0][1], [0.1, 0.2, 0.3], 1.0)], "a") / "a.json"
    later.write_text(later.read_text().replace("2026-01-02", "2026-01-03"))
    (found,) = read(folder)
    assert [point.accuracy for point in found.curve] == [0.1, 0.2, 0.3]


def test_files_that_are_no_summaries_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no summaries; make one: python -m benchmarks\.results --from"):
        read(tmp_path)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json: not the summary of a suite \(KeyError: 'runs'\)"):
        read(tmp_path)


def test_settings_that_came_later_have_the_value_that_means_what_was_before(tmp_path: Path) -> None:
    folder = kept(tmp_path, RUNS[2:3])
    path = folder / "made-up.json"
    text = path.read_text()
    for told_ in (
        '"clip-norm": 0.0, ',
        '"scope": "global", ',
        '"lr-power": 0.25, ',
        '"schedule": "static", ',
        '"rank-by": "magnitude", ',
        '"initial": "explorers", ',
    ):
        assert told_ in text
        text = text.replace(told_, "")
    path.write_text(text)
    (found,) = read(folder)
    assert (found.settings["clip-norm"], found.settings["scope"]) == (0.0, "global")
    assert (found.settings["lr-power"], found.settings["schedule"]) == (0.0, "static")
    assert (found.settings["rank-by"], found.settings["initial"]) == ("deviation", "scratch")


def test_a_summary_tells_the_settings_that_the_others_have_chosen(tmp_path: Path) -> None:
    (found,) = read(kept(tmp_path, [("default", {**DIGITS, "method": "autoflip"}, [0.1, 0.2, 0.3], 1.0)]))
    chosen = ("rank-by", "schedule", "initial", "initial-density")
    assert [found.settings[key] for key in chosen] == ["magnitude", "gradual", "explorers", 0.8]


# --- rows


def test_rows_are_means_over_seeds_beside_fedavg_and_gradual_pruning(tmp_path: Path) -> None:
    fedavg, pruned, layer, gradual = told(rows_in(tmp_path))
    # FedAvg's seeds have 0.7 and 0.9, with 2 MB each
    assert fedavg == {
        "data": "digits",
        "model": "cnn",
        "method": "fedavg",
        "density": 1.0,
        "schedule": None,
        "values": "float32",
        "rounds": 2,
        "seeds": 2,
        "accuracy_mean": 0.8,
        "accuracy_se": 0.1,
        "mb": 2.0,
        "gflop": 4.0,
        "share_of_fedavg_mb": 1.0,
        "points_to_fedavg": 0.0,
        "fedavg_accuracy_at_equal_mb": 0.9,
        "gradual_accuracy_at_equal_mb": None,
        "settings": {},
    }
    assert (pruned["density"], pruned["schedule"], pruned["seeds"]) == (0.1, "static", 2)
    assert pruned["accuracy_mean"] == 0.775  # of 0.8, the one evaluated round, and 0.75
    assert (pruned["mb"], pruned["share_of_fedavg_mb"], pruned["points_to_fedavg"]) == (1.4, 0.7, -2.5)
    assert pruned["fedavg_accuracy_at_equal_mb"] == pytest.approx(0.4 * 0.9 + 0.6 * 0.7)
    assert pruned["gradual_accuracy_at_equal_mb"] == 0.7  # it never sent so much: its last
    assert (layer["mb"], layer["accuracy_se"], layer["settings"]) == (0.5, None, {"scope": "layer"})
    assert layer["fedavg_accuracy_at_equal_mb"] is None  # before its first evaluated round
    assert layer["gradual_accuracy_at_equal_mb"] == 0.4
    assert (gradual["schedule"], gradual["settings"]) == ("gradual", {"scope": "global"})


def test_what_trained_otherwise_is_compared_with_nothing(tmp_path: Path) -> None:
    _, pruned = told(rows_in(tmp_path, [RUNS[0], ("other", {**PRUNED, "lr": 0.1}, [0.1, 0.2, 0.3], 1.0)]))
    assert pruned["settings"] == {"lr": 0.1}
    assert all(value is None for key, value in pruned.items() if "fedavg" in key or "gradual" in key)


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        ({"method": "fedprox", "proximal-mu": 0.1, "sparsity": 0.9}, {"density": 1.0, "schedule": None}),
        ({"method": "ssfl", "sparsity": 0.95}, {"density": 0.05, "schedule": "static"}),
        ({"method": "rigl"}, {"density": 0.3, "schedule": "rigl"}),
        ({"method": "autoflip"}, {"schedule": "gradual"}),
        ({"method": "autoflip", "schedule": "static"}, {"schedule": "static"}),
        ({"method": "autoflip", "values": "int8"}, {"values": "int8"}),
        ({"method": "autoflip", "values": "int8", "values-down": "float16"}, {"values": "int8 up, float16 down"}),
    ],
)
def test_fields_of_a_row(settings: Mapping[str, Value], fields: Mapping[str, Any]) -> None:
    found = Row(in_force(Config.from_run_config(settings)), ()).fields
    assert {key: found[key] for key in fields} == fields


def test_the_curve_of_a_row_has_its_standard_error_and_no_start() -> None:
    (row,) = rows_of([result({}, 1, 0.4), result({}, 2, 0.6)])
    ((point, error),) = row.curve
    assert (point.round, point.accuracy) == (1, 0.5)
    assert error == pytest.approx(statistics.stdev([0.4, 0.6]) / 2**0.5)


# --- README.md


def test_the_readme_follows_the_results() -> None:
    text = results.README.read_text("utf-8")
    shown = rows_of(read_suite(results_readme.SUITE))
    assert results_readme.readme_with(text, shown) == text, "python -m benchmarks.results --readme"


def test_a_readme_without_a_block_is_left_alone() -> None:
    with pytest.raises(ValueError, match="must have the lines <!-- made by"):
        results_readme.readme_with("# A project\n", [])


def test_the_block_shows_the_rows_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    data = (results_readme.Shown("Digits", {"data": "digits"}), results_readme.Shown("MNIST", {"data": "mnist"}))
    monkeypatch.setattr(results_readme, "DATA", data)
    pruned = [
        result(
            {"method": "autoflip", "schedule": "static", "rank-by": "deviation", "sparsity": 0.9},
            seed,
            0.4 + 0.1 * seed,
        )
        for seed in (1, 2)
    ]
    fedavg = result({"method": "fedavg"}, accuracy=0.8)
    rows = rows_of([*pruned, replace(fedavg, bytes={"total": 4 * 10**7}, changed=True)])
    table, _, note = results_readme.block(rows).partition("\n\n")
    assert table.splitlines()[2:] == [
        "| Digits | FedAvg | 1 | 80.0 | 40.00 | 100.0 % |",
        "|  | AutoFLIP, static | 0.1 | 55.0 ± 5.0 | 10.00 | 25.0 % |",
    ]
    note = " ".join(note.split())
    assert "Mean over 1 to 2 seeds" in note
    assert "Made by `autoflip suite a.yaml` at c0ffeec, c0ffeec with changes," in note
    assert results_readme.picture(rows).startswith(b"\x89PNG")


def test_a_line_that_several_rows_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_readme, "DATA", (results_readme.Shown("Digits", {"data": "digits"}),))
    two = rows_of([result({**PRUNED, "lr": 0.1}), *(result({"method": "fedavg", "lr": lr}) for lr in (0.1, 0.2))])
    with pytest.raises(ValueError, match=r"2 rows are 'FedAvg' on 'Digits': say in .* which is meant, by lr"):
        results_readme.selected(two)
    with pytest.raises(ValueError, match="no result fits"):
        results_readme.selected([])


# --- results/ itself, and the command


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_a_kept_summary_is_whole(path: Path) -> None:
    text = path.read_text("utf-8")
    told_ = json.loads(text)
    assert told_["suite"] == path.stem
    assert not [word for word in text.replace('"', " ").split() if word.startswith("/")]
    for run in told_["runs"]:
        last = [accuracy for round_, accuracy, *_ in run["curve"] if round_ > 0][-5:]
        assert run["accuracy"] == pytest.approx(statistics.fmean(last), abs=2e-6)
        assert sum(run["bytes"].values()) == 2 * run["bytes"]["total"]
        assert run["commit"]


def test_the_command_ends_with_json(capsys: pytest.CaptureFixture[str]) -> None:
    results.main([])
    *table, last = capsys.readouterr().out.splitlines()
    rows = json.loads(last)["rows"]
    assert len(rows) == sum(line.startswith("| ") for line in table) - sum("| method" in line for line in table)
    assert all(0 < row["accuracy_mean"] < 1 and row["seeds"] >= 1 for row in rows)


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        results.main(["--from", str(tmp_path)])
    assert end.value.code == 2
    assert "suite.json" in capsys.readouterr().err.splitlines()[-1]
