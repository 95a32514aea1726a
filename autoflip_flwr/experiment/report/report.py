"""Write reports: of a run, of a suite, and of runs that are compared. MB are 10^6 bytes.

What still goes on, or was interrupted, is reported as far as it got.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from autoflip_flwr.experiment.record.runs import Run
from autoflip_flwr.experiment.record.suites import Entry, Suite, is_suite
from autoflip_flwr.experiment.report import run_page, suite_page, tables
from autoflip_flwr.experiment.report.command import repeating
from autoflip_flwr.experiment.report.figures import FORMATS, Series, plots, save
from autoflip_flwr.experiment.report.points import points
from autoflip_flwr.experiment.report.rows import Section, sections, with_differences
from autoflip_flwr.storage.files import write_atomic

PAGE = "report.html"


def write(run_dir: Path, target: float | None = None) -> Path:
    """Write ``report.html`` into the folder of a run and return its path.

    ``target`` is an accuracy in (0, 1] whose cost is to be shown.

    Raises ``NotADirectoryError`` if ``run_dir`` is no folder, and ``ValueError`` if a file in it cannot be read.
    """
    run = Run.read(run_dir)
    curve = [(point, 0.0) for point in points(run)]
    drawn = plots([Series(0, "", curve)], target, "run") if curve else []
    return _write(run_dir / PAGE, run_page.render(run, drawn, target))


def write_suite(folder: Path, target: float | None = None, *, light: bool = False) -> Path:
    """Write ``report.html`` of a suite, with its tables and figures as files beside it, and return its path.

    The tables are ``table.md``, ``table.tex``, ``table.csv`` and ``runs.csv``, the figures ``accuracy.svg`` and
    ``accuracy.pdf``; ``light`` leaves the figures' files out. Only runs that are done have rows and curves. ``target``
    is an accuracy in (0, 1] instead of the suite's own.

    Raises ``OSError`` if a file cannot be read or written, and ``ValueError`` if it is not that of a suite.
    """
    suite = Suite.read(folder)
    done = [entry for entry in suite.entries if entry.state == "done" and points(entry.run)]
    found = sections(done, suite.target if target is None else target, over_seeds=True)
    return _write_together(folder, suite.name, suite.entries, found, suite, light=light)


def compare(paths: Sequence[Path], out: Path, target: float | None = None, *, over_seeds: bool = False) -> Path:
    """Compare runs: write a page with tables and figures into the folder ``out``, or one figure into that file.

    A suite among ``paths`` stands for its runs. If ``out`` ends in ``.svg``, ``.pdf`` or ``.png``, it is a figure. Each
    run has a row, or with ``over_seeds`` the runs that differ in their seed alone have one. Returns the path of the
    page or of the figure.

    Raises ``OSError`` if a file cannot be read or written, and ``ValueError`` if there is nothing to draw, or if
    ``out`` is a file of another format.
    """
    kind = out.suffix.lower().removeprefix(".")
    if kind and kind not in FORMATS and not out.is_dir():
        raise ValueError(f"{out}: must be a folder, or a figure's file that ends in .{', .'.join(FORMATS)}")
    entries = with_differences([entry for path in paths for entry in entries_of(path)])
    found = sections([each for each in entries if points(each.run)], target, over_seeds=over_seeds)
    if not found:
        raise ValueError("nothing to compare: no run has an evaluated round")
    if kind in FORMATS:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, save(found, kind))
        return out
    out.mkdir(parents=True, exist_ok=True)
    return _write_together(out, "Comparison", entries, found, None, light=False)


def entries_of(path: Path) -> list[Entry]:
    """Return the run of a folder, or the runs of a suite's that have begun."""
    if is_suite(path):
        return [entry for entry in Suite.read(path).entries if entry.run.metrics]
    run = Run.read(path)
    return [Entry(run, run.name, run.state, run.failure, run.settings, {}, repeating(run.settings))]


def _write_together(
    folder: Path,
    title: str,
    entries: Sequence[Entry],
    found: Sequence[Section],
    suite: Suite | None,
    *,
    light: bool,
) -> Path:
    note = suite_page.note(title, suite.about if suite else {})
    texts = {
        "table.md": tables.markdown(found, note),
        "table.tex": tables.latex(found, note),
        "table.csv": tables.csv_of_rows(found),
        "runs.csv": tables.csv_of_runs(entries),
    }
    for name, text in texts.items():
        _write(folder / name, text)
    files = [] if light or not found else [f"accuracy.{kind}" for kind in ("svg", "pdf")]
    for name in files:
        write_atomic(folder / name, save(found, name.rpartition(".")[2]))
    return _write(folder / PAGE, suite_page.render(title, folder, entries, found, texts, files, suite))


def _write(path: Path, text: str) -> Path:
    write_atomic(path, text.encode())
    return path
