"""The commands that read records: report, compare and list."""

from __future__ import annotations

from pathlib import Path

import pytest
from suites import entry, write_run, write_suite

from autoflip_flwr.launch import cli

FEDAVG = {"method": "fedavg", "seed": 1}
PRUNED = {"method": "autoflip", "seed": 1, "sparsity": 0.9}


def exit_code(*arguments: str) -> int:
    try:
        return cli.main(arguments)
    except SystemExit as ending:
        return int(ending.code or 0)


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "small"
    runs = {"dense": FEDAVG, "sparse": PRUNED}
    made = [entry(write_run(folder / name, varies, [0.1, 0.4, 0.5]), varies) for name, varies in runs.items()]
    return write_suite(folder, made)


def test_report_of_a_run_and_of_a_suite(suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("report", str(suite / "dense"), str(suite), "--target", "0.4") == 0
    pages = [suite / "dense" / "report.html", suite / "report.html"]
    assert capsys.readouterr().out.splitlines() == list(map(str, pages))
    assert "40.00% (as set)" in pages[0].read_text()
    assert "40.00 % (as set)" in pages[1].read_text()
    assert 'href="dense/report.html"' in pages[1].read_text()
    assert 'href="sparse/report.html"' not in pages[1].read_text()


def test_compare_writes_a_page_or_a_figure(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = ("runs/small/dense", "runs/small/sparse")
    assert exit_code("compare", *runs) == 0
    assert exit_code("compare", *runs, "--out", "figures/both.svg") == 0
    assert capsys.readouterr().out == "comparison/report.html\nfigures/both.svg\n"
    found = {path.name for path in (tmp_path / "comparison").iterdir()}
    assert found == {"report.html", "table.md", "table.tex", "table.csv", "runs.csv", "accuracy.svg", "accuracy.pdf"}
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["both.svg"]


def test_list(suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert exit_code("list") == 0
    head, _, line = capsys.readouterr().out.splitlines()
    assert " ".join(head.split()) == "Name Data Method Density Seed Rounds Accuracy MB State When (UTC)"
    assert " ".join(line.split()) == "small/ digits fedavg, autoflip 100%, 10% 1 20 2 of 2 done"
    assert exit_code("list", str(suite)) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[0] for line in lines] == ["dense", "sparse"]
    assert exit_code("list", str(tmp_path)) == 0
    assert capsys.readouterr().out == f"no run and no suite in {tmp_path}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "no-such-run"], "no-such-run: no such folder"),
        (["compare", "no-such-run"], "no-such-run: no such folder"),
        (["list", "no-such-folder"], "no-such-folder: no such folder"),
        (["compare", "."], "nothing to compare: no run has an evaluated round"),
        (
            ["compare", ".", "--out", "a.jpg"],
            "a.jpg: must be a folder, or a figure's file that ends in .svg, .pdf, .png",
        ),
        (["report", ".", "--target", "80"], "argument --target: must be a number in (0, 1], not '80'"),
    ],
)
def test_refusals(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert exit_code(*arguments) == 2
    assert capsys.readouterr().err == f"autoflip: error: {message}\n"


def test_a_file_that_cannot_be_read_is_named(suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (suite / "suite.json").write_text("{")
    assert exit_code("list", str(suite)) == 2
    assert f"autoflip: error: {suite / 'suite.json'}: not the record of a suite" in capsys.readouterr().err
    (suite / "dense" / "config.json").write_text("{")
    assert exit_code("report", str(suite / "dense")) == 2
    assert f"{suite / 'dense' / 'config.json'}: not JSON" in capsys.readouterr().err
