"""The commands that read records: `autoflip report`, `autoflip compare` and `autoflip list`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoflip_flwr.experiment.rules import ConfigError

if TYPE_CHECKING:
    _Commands = argparse._SubParsersAction[Any]

_TARGET = "accuracy in (0, 1] whose cost is shown"


def add_commands(commands: _Commands) -> None:
    """Add the three commands to the command line."""
    report = commands.add_parser("report", help="make the report of runs and suites anew")
    report.set_defaults(command=_report)
    report.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="folder of a run or of a suite")
    report.add_argument("--target", type=_accuracy, metavar="ACCURACY", help=_TARGET)

    compare = commands.add_parser("compare", help="compare runs on one page, with tables and figures")
    compare.set_defaults(command=_compare)
    compare.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or of a suite for all its runs"
    )
    compare.add_argument(
        "--out",
        type=Path,
        default=Path("comparison"),
        metavar="OUT",
        help="folder of the page (default: comparison), or one figure: a file that ends in .svg, .pdf or .png",
    )
    compare.add_argument("--target", type=_accuracy, metavar="ACCURACY", help=_TARGET)
    compare.add_argument(
        "--over-seeds", action="store_true", help="show runs that differ in their seed alone as mean and spread"
    )

    listing = commands.add_parser("list", help="list the runs and suites of a folder")
    listing.set_defaults(command=_list)
    listing.add_argument("folder", nargs="?", type=Path, default=Path("runs"), help="folder (default: runs)")


def _report(options: argparse.Namespace) -> int:
    with _reading(*options.folders):
        from autoflip_flwr.experiment.record.suites import is_suite
        from autoflip_flwr.experiment.report import report

        for folder in options.folders:
            write = report.write_suite if is_suite(folder) else report.write
            print(write(folder, options.target))
    return 0


def _compare(options: argparse.Namespace) -> int:
    with _reading(*options.runs):
        from autoflip_flwr.experiment.report import report

        print(report.compare(options.runs, options.out, options.target, over_seeds=options.over_seeds))
    return 0


def _list(options: argparse.Namespace) -> int:
    with _reading(options.folder):
        from rich import box
        from rich.console import Console
        from rich.table import Table

        from autoflip_flwr.experiment.report import listing

        found = listing.lines(options.folder)
    if not found:
        print(f"no run and no suite in {options.folder}")
        return 0
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for head in listing.HEADS:
        right = head in ("Density", "Seed", "Rounds", "Accuracy", "MB")
        table.add_column(head, justify="right" if right else "left", overflow="fold")
    for line in found:
        table.add_row(*line)
    # what is piped into another program is not wrapped
    Console(width=None if sys.stdout.isatty() else 1000, markup=False, emoji=False).print(table)
    return 0


@contextmanager
def _reading(*folders: Path) -> Iterator[None]:
    """Refuse folders that are not there, and tell in one line what cannot be read."""
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder")
    try:
        yield
    except ImportError as error:
        raise ConfigError(f"a report needs {error.name}: pip install 'autoflip-flwr[app]'") from None
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error


def _accuracy(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number in (0, 1], not {text!r}")
    return value
