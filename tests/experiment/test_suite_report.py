"""What the report of a suite and a comparison say: rows over seeds, spread, targets, labels, tables, figures."""

from __future__ import annotations

import csv
import json
import re
import statistics
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from suites import entry, write_run, write_suite

from autoflip_flwr.experiment.record.runs import Run
from autoflip_flwr.experiment.record.suites import Suite
from autoflip_flwr.experiment.report import figures, listing, pictures, report, tables
from autoflip_flwr.experiment.report.command import repeating
from autoflip_flwr.experiment.report.points import Point, final_accuracy, mean_curve, points, reached
from autoflip_flwr.experiment.report.rows import Section, sections, with_differences

FEDAVG = {"method": "fedavg", "sparsity": 0.0}
PRUNED = {"method": "autoflip", "sparsity": 0.9}
IID = {**PRUNED, "split": "iid"}


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets; FedAvg and AutoFLIP with two seeds on digits, a run that failed and one that waits."""
    folder = tmp_path_factory.mktemp("suites") / "made-up"
    runs = []
    for name, varies, accuracies, megabytes in (
        ("fedavg-1", {**FEDAVG, "seed": 1}, [0.1, 0.6, 0.8], 1.0),
        ("fedavg-2", {**FEDAVG, "seed": 2}, [0.1, 0.8, 1.0], 1.0),
        ("pruned-1", {**PRUNED, "seed": 1}, [0.1, None, 0.8], 0.25),
        ("pruned-2", {**PRUNED, "seed": 2}, [0.1, 0.9, 0.6], 0.75),
        ("mnist-1", {**FEDAVG, "seed": 1, "dataset": "mnist"}, [0.1, 0.5, 0.7], 1.0),
    ):
        varies = {"dataset": "digits", **varies}
        runs.append(entry(write_run(folder / name, varies, accuracies, megabytes=megabytes), varies))
    runs.append(entry(folder / "bad", {**PRUNED, "dataset": "digits", "seed": 3}, state="failed", reason="<no> memory"))
    runs.append(entry(folder / "late", {**PRUNED, "dataset": "mnist", "seed": 1}, state="waiting"))
    (folder / "pruned-1" / "incidents.json").write_text('[{"kind": "errors", "round": 1, "reason": "<lost>"}]')
    about = json.loads((folder / "mnist-1" / "config.json").read_text())
    (folder / "mnist-1" / "config.json").write_text(json.dumps({**about, "source": "other"}))
    write_suite(folder, runs)
    report.write_suite(folder)
    return folder


def sections_of(folder: Path, target: float | None = None) -> list[Section]:
    return sections([one for one in Suite.read(folder).entries if one.state == "done"], target, over_seeds=True)


def text_of(table: list[tables.Column]) -> dict[str, list[str]]:
    return {column.whole_title: [cell.text for cell in column.cells] for column in table}


# --- curves


def test_points_are_the_evaluated_rounds(suite: Path) -> None:
    found = points(Run.read(suite / "pruned-1"))
    assert found == (Point(0, 0.1, 0.0, 0.0, 0.0), Point(2, 0.8, 0.5, 4.0, 6.0))
    assert final_accuracy(found) == 0.8
    assert reached(found, 0.8) == found[1]
    assert reached(found, 0.81) is None


def test_the_accuracy_is_the_mean_of_the_last_five_evaluated_rounds() -> None:
    run = [Point(n, accuracy, 0, 0, 0) for n, accuracy in enumerate([0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])]
    assert final_accuracy(run) == pytest.approx(0.4)
    assert final_accuracy(run[:2]) == 0.1  # the start is no round
    assert final_accuracy(run[:1]) is None


def test_the_mean_curve_has_the_rounds_that_all_runs_have() -> None:
    one = [Point(0, 0.1, 0, 0, 0), Point(1, 0.4, 1, 2, 3), Point(2, 0.5, 2, 4, 6)]
    other = [Point(0, 0.1, 0, 0, 0), Point(2, 0.7, 4, 4, 8)]
    assert mean_curve([one, other]) == [
        (Point(0, 0.1, 0, 0, 0), 0.0),
        (Point(2, 0.6, 3, 4, 7), pytest.approx(statistics.stdev([0.5, 0.7]))),
    ]
    assert mean_curve([]) == []


# --- sections, rows and tables


def test_a_section_per_data_set_and_a_row_per_setting(suite: Path) -> None:
    digits, mnist = sections_of(suite)
    assert digits.title == "digits, dirichlet (alpha 0.3), cnn"
    assert mnist.title == "mnist, dirichlet (alpha 0.3), cnn"
    assert [row.label for row in digits.rows] == ["fedavg", "autoflip, density 10%"]
    assert [[one.name for one in row.entries] for row in digits.rows] == [
        ["fedavg-1", "fedavg-2"],
        ["pruned-1", "pruned-2"],
    ]
    assert digits.rows[0].number == mnist.rows[0].number  # the same colour on the whole page


def test_the_table_of_a_section(suite: Path) -> None:
    digits, _ = sections_of(suite)
    # FedAvg: the seeds' means are 0.7 and 0.9
    assert digits.target == pytest.approx(0.95 * 0.8)
    assert digits.target_told == "95% of FedAvg's accuracy, 80.00 %"
    assert text_of(tables.columns(digits)) == {
        "Run": ["fedavg", "autoflip, density 10%"],
        "Seeds": ["2", "2"],
        "Accuracy (%)": ["80.00 ± 14.14", "77.50 ± 3.54"],
        "Density (%)": ["100.0", "10.0"],
        "MB": ["2.00", "1.00"],
        "Saved (%)": ["0.00", "50.00"],
        "GFLOP": ["4.00", "4.00"],
        "Seconds": ["6.00", "6.00"],
        "Rounds to 76.0 %": ["1.50", "1.50"],
        "MB to 76.0 %": ["1.50", "0.62"],
        "GFLOP to 76.0 %": ["3.00", "3.00"],
        "Seconds to 76.0 %": ["4.50", "4.50"],
        "Incidents": ["0", "1"],
    }


def test_a_target_that_not_all_runs_reach(suite: Path) -> None:
    digits, mnist = sections_of(suite, 0.85)
    table = text_of(tables.columns(digits))
    assert table["Rounds to 85.0 %"] == ["2 (1 of 2)", "1 (1 of 2)"]
    assert table["MB to 85.0 %"] == ["2.00", "0.75"]
    nobody = text_of(tables.columns(sections_of(suite, 0.95)[0]))
    assert nobody["Rounds to 95.0 %"] == ["2 (1 of 2)", "not reached"]
    assert nobody["MB to 95.0 %"] == ["2.00", "-"]
    assert "Rounds to 85.0 %" not in text_of(tables.columns(mnist))  # nobody gets there


def test_exports(suite: Path) -> None:
    lines = (suite / "table.md").read_text().splitlines()
    assert "commit c0ffee" in lines[0]
    assert lines[2] == "### digits, dirichlet (alpha 0.3), cnn"
    assert lines[4].startswith("| Run | Seeds | Accuracy (%) |")
    assert lines[5].startswith("| --- | ---: | ---: |")
    assert lines[7].startswith("| autoflip, density 10% | 2 | 77.50 ± 3.54 |")
    latex = (suite / "table.tex").read_text()
    assert latex.count("\\begin{tabular}") == latex.count("\\end{tabular}") == 2
    assert "autoflip, density 10\\% & 2 & 77.50 $\\pm$ 3.54 & 10.0 & 1.00" in latex
    rows = list(csv.DictReader((suite / "table.csv").open()))
    assert [(row["dataset"], row["run"]) for row in rows] == [
        ("digits", "fedavg"),
        ("digits", "autoflip, density 10%"),
        ("mnist", "fedavg"),
    ]
    assert float(rows[1]["accuracy_percent"]) == pytest.approx(77.5)
    assert float(rows[1]["accuracy_percent_sd"]) == pytest.approx(100 * statistics.stdev([0.8, 0.75]))
    assert (rows[1]["sparsity"], rows[0]["sparsity"]) == ("0.9", "")  # which FedAvg does not have
    runs = list(csv.DictReader((suite / "runs.csv").open()))
    assert [run["state"] for run in runs] == ["done"] * 5 + ["failed", "waiting"]
    assert runs[0]["command"] == "autoflip run -c 'name=\"fedavg-1\"'"
    assert runs[0]["setting seed"] == "1"


def test_latex_takes_any_text() -> None:
    assert tables._tex(r"a_b & 5% {x} \y $z #1 ~ ^") == (r"a\_b \& 5\% \{x\} \textbackslash{}y \$z \#1 \~{} \^{}")


# --- the page


def test_the_page_of_a_suite(suite: Path) -> None:
    text = (suite / "report.html").read_text()
    assert "5 of 7 runs done, 1 waiting, 1 failed." in text
    assert "made by 2 different versions of the code" in text
    assert '<td class="first">bad</td><td><span class="bad">&lt;no&gt; memory</span></td>' in text
    assert "&lt;lost&gt;" in text
    assert "autoflip suite made-up.yaml" in text
    assert "autoflip run -c &#x27;name=&quot;pruned-2&quot;&#x27;" in text
    assert "c0ffee" * 6 in text
    assert text.count('<section id="') == 3  # two data sets, and all runs


def test_ids_are_unique_and_links_lead_somewhere(suite: Path) -> None:
    text = (suite / "report.html").read_text()
    ids = re.findall(r'\sid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    inside = set(re.findall(r'href="?#([^" >]*)', text)) | set(re.findall(r"url\(#([^)]*)\)", text))
    assert inside <= set(ids)
    beside = re.findall(r'href="([^"#:]+)"', text)
    assert all((suite / link).exists() for link in beside)
    assert {"table.md", "table.tex", "table.csv", "runs.csv", "accuracy.svg", "accuracy.pdf"} <= set(beside)
    assert not re.search(r'(?:src|href)="?(?:https?:)?//', text)


def test_the_same_suite_gives_the_same_bytes(suite: Path) -> None:
    before = {path.name: path.read_bytes() for path in suite.iterdir() if path.is_file()}
    report.write_suite(suite)
    assert {path.name: path.read_bytes() for path in suite.iterdir() if path.is_file()} == before


def test_a_light_report_has_no_figure_files(tmp_path: Path) -> None:
    varies = {**FEDAVG, "seed": 1}
    write_suite(tmp_path, [entry(write_run(tmp_path / "a", varies, [0.1, 0.5]), varies)], target_accuracy=0.4)
    report.write_suite(tmp_path, light=True)
    assert not list(tmp_path.glob("accuracy.*"))
    assert "Target, the dashed line: 40.00 % (as set)." in (tmp_path / "report.html").read_text()


def test_a_suite_of_which_nothing_is_done(tmp_path: Path) -> None:
    write_suite(tmp_path, [entry(tmp_path / "a", {"seed": 1}, state="waiting")])
    assert "No run has been evaluated yet." in report.write_suite(tmp_path).read_text()


@pytest.mark.parametrize("text", ["{", "{}", '{"runs": 3}'])
def test_what_is_no_suite_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "suite.json").write_text(text)
    with pytest.raises(ValueError, match=r"suite\.json: not the record of a suite"):
        report.write_suite(tmp_path)


# --- comparisons


def labels_of(tmp_path: Path, settings: list[dict[str, object]], *, over_seeds: bool = False) -> list[str]:
    paths = [write_run(tmp_path / f"run-{n}", each, [0.1, 0.5]) for n, each in enumerate(settings)]
    entries = with_differences([one for path in paths for one in report.entries_of(path)])
    return [row.label for section in sections(entries, None, over_seeds=over_seeds) for row in section.rows]


@pytest.mark.parametrize(
    ("settings", "labels"),
    [
        ([{**PRUNED, "seed": 1}, {**PRUNED, "seed": 2}], ["seed 1", "seed 2"]),
        ([{**PRUNED, "sparsity": 0.5}, PRUNED, FEDAVG], ["autoflip, density 50%", "autoflip, density 10%", "fedavg"]),
        ([PRUNED, {**PRUNED, "values": "int8"}], ["values float32", "values int8"]),
        (
            [{**PRUNED, "name": "old"}, {**PRUNED, "name": "new", "prune-biases": True}],
            ["old", "new, prune-biases"],
        ),
        ([PRUNED, {**PRUNED, "output-dir": "elsewhere"}], ["autoflip, run-0", "autoflip, run-1"]),
        ([PRUNED, {**PRUNED, "dataset": "mnist"}], ["autoflip", "autoflip"]),
        ([{**IID, "alpha": 1.0}, IID], ["autoflip, run-0", "autoflip, run-1"]),
    ],
)
def test_a_legend_says_what_differs(tmp_path: Path, settings: list[dict[str, object]], labels: list[str]) -> None:
    assert labels_of(tmp_path, settings) == labels


def test_runs_that_differ_in_their_seed_alone_can_be_one_row(tmp_path: Path) -> None:
    settings = [{**method, "seed": seed} for method in (FEDAVG, PRUNED) for seed in (1, 2)]
    assert labels_of(tmp_path, settings, over_seeds=True) == ["fedavg", "autoflip, density 10%"]


@pytest.mark.parametrize(("name", "head"), [("a.svg", b"<?xml"), ("a.pdf", b"%PDF"), ("a.png", b"\x89PNG\r\n\x1a\n")])
def test_a_figure_has_the_format_that_its_name_ends_in(suite: Path, tmp_path: Path, name: str, head: bytes) -> None:
    out = tmp_path / "figures" / name
    assert report.compare([suite / "fedavg-1", suite / "pruned-2"], out) == out
    assert out.read_bytes().startswith(head)
    if name.endswith("svg"):
        words = "".join(ElementTree.fromstring(out.read_bytes()).itertext())
        assert all(word in words for word in ("fedavg", "autoflip", "Sent so far, both ways (MB)", "Round"))


def test_a_suite_stands_for_its_runs(suite: Path) -> None:
    (digits, _) = sections(with_differences(report.entries_of(suite)), None, over_seeds=False)
    assert [row.label for row in digits.rows] == [
        "fedavg, seed 1",
        "fedavg, seed 2",
        "autoflip, density 10%, seed 1",
        "autoflip, density 10%, seed 2",
    ]


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="no run has an evaluated round"):
        report.compare([empty], tmp_path / "out")
    with pytest.raises(ValueError, match=r"must be a folder, or a figure's file that ends in \.svg, \.pdf, \.png"):
        report.compare([empty], tmp_path / "out.jpg")


# --- figures and pictures


def curve(*megabytes: float) -> list[tuple[Point, float]]:
    return [(Point(n, 0.5 + n / 10, sent, 0.0, n), 0.01) for n, sent in enumerate(megabytes)]


def test_figures_follow_the_page_and_begin_at_zero() -> None:
    found = dict(figures.plots([figures.Series(1, "a", curve(5.0, 6.0, 7.0))], 0.55, "here"))
    assert list(found) == [
        "Test accuracy (%) by round",
        "Test accuracy (%) by traffic",
        "Test accuracy (%) by time",
    ]  # no GFLOP
    svg = found["Test accuracy (%) by traffic"]
    assert ">0</text>" in svg  # the first tick, though all was sent after 5 MB
    assert "currentColor" in svg
    assert "var(--run-1)" in svg
    assert "#fe0" not in svg
    assert not re.search(r"#[0-9a-f]{6}(?!;? *stroke)", re.sub(r"#[mp][0-9a-f]{10}", "", svg))
    assert 'class="run-1"' in svg


def test_many_runs_look_different() -> None:
    assert len({figures.swatch(number) for number in range(56)}) == 56


def test_the_picture_of_a_mask(tmp_path: Path) -> None:
    keep = np.zeros((2, 3, 2), bool)
    keep[1] = True
    np.testing.assert_array_equal(pictures.kept_shares(keep), [[0] * 6, [1] * 6])
    large = np.zeros((100, 4), np.uint8)
    large[:2] = 1
    shares = pictures.kept_shares(large, most=3)  # rows 0 to 32, 33 to 65, 66 to 99
    np.testing.assert_allclose(shares, [[2 / 33] * 3, [0] * 3, [0] * 3])
    assert pictures.kept_shares(np.array(True)).shape == (1, 1)
    save_file({"conv": keep, "bias": np.array([True, False])}, tmp_path / "mask.safetensors")
    layers = {layer.name: layer for layer in pictures.layers_of(tmp_path / "mask.safetensors")}
    assert layers["conv"][1:5] == ((2, 3, 2), 0.5, 2, 6)
    assert (layers["bias"].rows, layers["bias"].columns) == (1, 2)
    assert pictures.layers_of(tmp_path / "none") == []
    (tmp_path / "mask.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"mask\.safetensors"):
        pictures.layers_of(tmp_path / "mask.safetensors")


def test_the_picture_of_who_holds_what(tmp_path: Path) -> None:
    path = tmp_path / "holdings.json"
    assert pictures.holdings(path, "a") == ""
    path.write_text(json.dumps({"classes": ["cat", "$dog$"], "counts": [[1, 2], [3, 4], [0, 0]]}))
    svg = pictures.holdings(path, "a")
    assert ">$dog$</text>" in svg
    for wrong in ('{"classes": ["a"], "counts": [[1, 2]]}', "[]", '{"classes": [], "counts": "x"}'):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=r"holdings\.json: not examples by node and class"):
            pictures.holdings(path, "a")


# --- the command that repeats a run, and the list


def test_the_command_that_repeats_a_run() -> None:
    assert repeating({"method": "autoflip", "name": "x", "output-dir": "y"}) == "autoflip run"
    settings = {"method": "fedavg", "seed": 3, "lr": 0.1, "prune-biases": True, "data-dir": "/a b"}
    assert repeating(settings) == (
        'autoflip run -c \'method="fedavg" seed=3 lr=0.1 prune-biases=true data-dir="/a b"\''
    )


def test_the_list_of_a_folder(suite: Path) -> None:
    (made_up,) = listing.lines(suite.parent)
    assert made_up[:8] == ("made-up/", "digits, mnist", "fedavg, autoflip", "100%, 10%", "1, 2, 3", "20", "", "")
    assert made_up.state == "5 of 7 done, 1 failed"
    runs = {line.name: line for line in listing.lines(suite)}
    assert runs["pruned-2"] == (
        *("pruned-2", "digits dirichlet", "autoflip", "10%", "2", "2 of 20"),
        *("75.00%", "1.50", "done", "2026-01-02 03:04"),
    )
    assert runs["late"][1:] == ("mnist dirichlet", "autoflip", "10%", "1", "", "", "", "waiting", "")
    assert listing.lines(suite / "pruned-2") == [runs["pruned-2"]]
