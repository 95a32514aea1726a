"""Show the results of the suites that are kept in results/: accuracy, bytes and computation, beside FedAvg's.

Accuracy is the mean of the last five evaluated rounds, over seeds the mean and its standard error. Bytes are all that
were sent, both ways, exploration and masks included. "FedAvg at equal MB" is the accuracy that FedAvg had reached when
it had sent as many bytes. The last line is JSON.

    python -m benchmarks.results                        # the table
    python -m benchmarks.results --from runs/rivals     # keep the finished runs of a suite, in results/<suite>.json
    python -m benchmarks.results --readme               # make the table of README.md and docs/accuracy-by-mb.png
    python -m benchmarks.results --study                # make the tables of docs/study.md
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from autoflip_flwr.experiment.record.suites import Suite
from autoflip_flwr.experiment.report.rows import told as told_setting
from autoflip_flwr.storage.files import write_atomic
from benchmarks import results_readme, results_study
from benchmarks.results_file import FOLDER, read, read_suite, text_of
from benchmarks.results_rows import rows_of, told

ROOT = FOLDER.parent
README, PICTURE, STUDY = ROOT / "README.md", ROOT / "docs" / "accuracy-by-mb.png", ROOT / "docs" / "study.md"
TITLES = ("method", "density", "schedule", "values", "seeds", "accuracy, %", "MB", "of FedAvg's", "points to FedAvg")
EQUAL = ("FedAvg at equal MB", "gradual at equal MB")


def keep(suite: Path, folder: Path = FOLDER) -> Path:
    """Write the summary of a suite's finished runs, and return its path."""
    found = Suite.read(suite)
    folder.mkdir(exist_ok=True)
    path = folder / f"{found.name}.json"
    write_atomic(path, text_of(found).encode())
    return path


def show(facts: Sequence[dict[str, Any]]) -> None:
    """Print a table for each data set, model and number of rounds."""
    text = StringIO()
    console = Console(file=text, width=1000, color_system=None, markup=False, highlight=False)
    for key, group in itertools.groupby(facts, lambda fact: [fact[name] for name in ("data", "model", "rounds")]):
        table = Table(*TITLES, *EQUAL, "GFLOP", "other settings", box=box.MARKDOWN)
        for fact in group:
            table.add_row(*_cells(fact))
        console.print(f"{key[0]}, {key[1]}, {key[2]} rounds")
        console.print(table)
    print("\n".join(line.rstrip() for line in text.getvalue().splitlines()))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="suites", type=Path, nargs="+", default=[], metavar="FOLDER", help="of a suite")
    parser.add_argument("--readme", action="store_true", help="make README.md's table and picture")
    parser.add_argument("--study", action="store_true", help="make the tables of docs/study.md")
    options = parser.parse_args(arguments)
    try:
        for suite in options.suites:
            print(f"wrote {keep(suite).relative_to(ROOT)}")
        rows = rows_of(read())
        if options.readme:
            shown = rows_of(read_suite(results_readme.SUITE))
            text = results_readme.readme_with(README.read_text("utf-8"), shown)
            write_atomic(PICTURE, results_readme.picture(shown))
            write_atomic(README, text.encode())
            print(f"wrote {README.name} and {PICTURE.relative_to(ROOT)}")
        if options.study:
            write_atomic(STUDY, results_study.study_with(STUDY.read_text("utf-8"), rows).encode())
            print(f"wrote {STUDY.relative_to(ROOT)}")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    facts = told(rows)
    show(facts)
    print(json.dumps({"rows": facts}))


def _cells(fact: dict[str, Any]) -> list[str]:
    error = fact["accuracy_se"]
    return [
        fact["method"],
        f"{fact['density']:g}",
        fact["schedule"] or "",
        fact["values"],
        str(fact["seeds"]),
        f"{100 * fact['accuracy_mean']:.2f}" + ("" if error is None else f" ± {100 * error:.2f}"),
        f"{fact['mb']:,.1f}",
        _percent(fact["share_of_fedavg_mb"]),
        "" if fact["points_to_fedavg"] is None else f"{fact['points_to_fedavg']:+.2f}",
        *(_percent(fact[f"{name}_accuracy_at_equal_mb"]) for name in ("fedavg", "gradual")),
        f"{fact['gflop']:,.0f}",
        ", ".join(told_setting(key, value) for key, value in fact["settings"].items()),
    ]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


if __name__ == "__main__":
    main()
