"""The command ``autoflip suite``: make all runs of a suite in this machine's processes, or list them."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from autoflip_flwr.experiment import preflight
from autoflip_flwr.experiment.data.load import prepare
from autoflip_flwr.experiment.report import report
from autoflip_flwr.experiment.rules import Value
from autoflip_flwr.experiment.suite.board import Board
from autoflip_flwr.experiment.suite.estimate import Estimates
from autoflip_flwr.experiment.suite.plan import Planned, plan
from autoflip_flwr.experiment.suite.runner import run_all, workers_for
from autoflip_flwr.experiment.suite.spec import read_suite
from autoflip_flwr.experiment.suite.state import DONE, FAILED, WAITING, Folder, RunState
from autoflip_flwr.experiment.toml import parse_pairs

REPORT_EVERY = 60.0
"""Seconds after which the report is made again, once another run is over."""


def run_suite(options: argparse.Namespace) -> int:
    """Run the command. Return 0 if every run is done, 1 if one failed.

    Raises
    ------
    ConfigError
        Before anything runs, if the suite is malformed or cannot work on this machine.
    """
    given: dict[str, Value] = {}
    for text in options.run_config:
        given |= parse_pairs(text)
    suite = read_suite(options.file, given)
    planned = plan(suite.runs)
    path = (options.output or Path("runs")) / suite.name
    _check(planned, path)
    folder = Folder(path, suite, planned, shlex.join(["autoflip", *options.arguments]))
    console = Console(markup=False, highlight=False, soft_wrap=True)
    waiting = [run for run in folder.runs if run.state != DONE]
    estimates = Estimates.measured([run.planned.config for run in waiting])
    gpus = workers_for(planned[0].config.device, options.workers)
    if options.dry_run:
        _list(console, folder, estimates, len(gpus))
        return 0
    _tell_of_other_code(console, folder, options.again)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs are born deaf to the first
        signal.signal(number, signal.default_int_handler)
    with folder.alone():
        folder.begin(again=options.again)
        left = sum(run.state == WAITING for run in folder.runs)
        workers = f"{len(gpus)} worker{'s' * (len(gpus) > 1)}"
        expected = estimates.told_left(folder.runs, len(gpus))
        console.print(
            f"{suite.name}: {left} of {len(planned)} runs to make with {workers}, about {expected}; {folder.path}"
        )
        try:
            with Board(console, estimates, len(gpus)) as board:
                run_all(folder, gpus, _showing(board))
        except KeyboardInterrupt:
            done = sum(run.state == DONE for run in folder.runs)
            console.print(f"stopped: {done} of {len(planned)} runs are done; the same command goes on with the others")
            raise
        finally:
            folder.write()
            page = report.write_suite(folder.path)
    console.print(f"report: {page}")
    failed = [run for run in folder.runs if run.state == FAILED]
    for run in failed:
        print(f"autoflip: {run.planned.name} failed: {run.reason}", file=sys.stderr)
    return 1 if failed else 0


def _showing(board: Board) -> Callable[[Folder, RunState | None], None]:
    """Return what shows the state on the board, and from time to time in the report."""
    written = time.monotonic()

    def show(folder: Folder, over: RunState | None) -> None:
        nonlocal written
        board.show(folder, over)
        if over is not None and time.monotonic() - written > REPORT_EVERY:
            report.write_suite(folder.path, light=True)
            written = time.monotonic()

    return show


def _check(planned: list[Planned], path: Path) -> None:
    for each in planned:
        preflight.check(replace(each.config, output_dir=str(path)), 1.0)
        prepare(each.config)


def _list(console: Console, folder: Folder, estimates: Estimates, workers: int) -> None:
    table = Table("Run", "State", "Expected", box=None, pad_edge=False)
    for run in folder.runs:
        table.add_row(run.planned.name, run.state, "" if run.state == DONE else estimates.told(run))
    console.print(table)
    waiting = [run for run in folder.runs if run.state != DONE]
    console.print(
        f"{len(waiting)} of {len(folder.runs)} runs to make, about {estimates.told_left(folder.runs, workers)} with "
        f"{workers} worker{'s' * (workers > 1)}"
    )


def _tell_of_other_code(console: Console, folder: Folder, again: bool) -> None:
    old = [run for run in folder.of_other_code if run.state == DONE]
    if old:
        what = "are made again" if again else "are kept; --again makes them anew"
        console.print(f"{len(old)} runs were made by other code than is here now, and {what}")
