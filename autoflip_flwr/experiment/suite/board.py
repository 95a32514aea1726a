"""Show how far a suite is: a live board on a terminal, else a line for each run that is over."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from autoflip_flwr.experiment.suite.estimate import Estimates
from autoflip_flwr.experiment.suite.state import DONE, FAILED, RUNNING, WAITING, Folder, RunState
from autoflip_flwr.server.waiting import duration


class Board:
    """Shows progress and the time left; use it in a ``with`` statement.

    Parameters
    ----------
    console : Console
        Where to show it. The live board needs a terminal.
    estimates : Estimates
        The expected seconds of the runs.
    workers : int
        How many runs are made at the same time.
    """

    def __init__(self, console: Console, estimates: Estimates, workers: int) -> None:
        self._console, self._estimates, self._workers = console, estimates, workers
        self._live = Live(console=console, refresh_per_second=2, transient=True) if console.is_terminal else None
        self._began = time.monotonic()

    def __enter__(self) -> Board:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, folder: Folder, over: RunState | None) -> None:
        """Show the present state; ``over`` is a run that has just ended."""
        left = self._left(folder.runs)
        counts = Counter(run.state for run in folder.runs)
        if over is not None:
            number = counts[DONE] + counts[FAILED]
            end = f"; {left}" if counts[WAITING] + counts[RUNNING] else ""
            self._console.print(f"[{number}/{len(folder.runs)}] {result_of(over)}{end}", markup=False, highlight=False)
        if self._live is not None:
            lines = [Text(f"{counts[DONE]} of {len(folder.runs)} runs done, {counts[FAILED]} failed, {left}", "bold")]
            lines += [Text(f"  {_progress(run)}") for run in folder.runs if run.state == RUNNING]
            self._live.update(Group(*lines))

    def _left(self, runs: Iterable[RunState]) -> str:
        return f"about {self._estimates.told_left(list(runs), self._workers)} left"


def result_of(run: RunState) -> str:
    """Return what a run has given, in a line."""
    if run.state == FAILED:
        return f"{run.planned.name}: FAILED: {run.reason} ({run.folder / 'log.txt'})"
    told = run.summary()
    accuracy, sent = told.get("final_accuracy"), told.get("bytes", {}).get("total", 0)
    shown = "" if accuracy is None else f"{accuracy:.2%}, "
    return f"{run.planned.name}: {shown}{sent / 1e6:,.2f} MB, {duration(run.seconds or 0)}"


def _progress(run: RunState) -> str:
    line, rounds = run.last_line(), run.planned.config.num_server_rounds
    accuracy = line.get("accuracy")
    shown = "" if accuracy is None else f", {accuracy:.2%}"
    if not line:
        return f"{run.planned.name}: begins"
    return f"{run.planned.name}: {line.get('phase')}, round {line.get('round')} of {rounds}{shown}"
