"""Run a suite on several processes: hand out runs, and note what becomes of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from autoflip_flwr.experiment.preflight import cuda_devices
from autoflip_flwr.experiment.suite.state import RUNNING, WAITING, Folder, RunState
from autoflip_flwr.experiment.suite.worker import Task, work

LOOK = 0.5
"""Seconds between looks at the running runs."""


@dataclass
class _Worker:
    process: SpawnProcess
    pipe: Connection
    run: RunState | None = None
    since: float = 0.0


def workers_for(device: str, wanted: int) -> list[str | None]:
    """Return for each worker the GPU that it uses; ``None``: the CPU.

    Parameters
    ----------
    device : str
        The setting ``device`` of the runs.
    wanted : int
        Number of workers. 0: one per GPU, or one per CPU core where there is none.
    """
    gpus = (cuda_devices() or 0) if device in ("auto", "cuda") else 0
    count = (
        wanted
        or gpus
        or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))
    )
    return [str(number % gpus) if gpus else None for number in range(count)]


def run_all(folder: Folder, gpus: list[str | None], show: Callable[[Folder, RunState | None], None]) -> None:
    """Make all runs that are not done. ``show`` is called with each run that is over, and else with ``None``.

    A run that fails does not end the suite, nor does a process that dies.
    """
    with _workers(gpus[: sum(run.state == WAITING for run in folder.runs)]) as workers:
        while any(run.state in (WAITING, RUNNING) for run in folder.runs):
            for number, worker in enumerate(workers):
                if worker.run is None and (run := _next(folder.runs)) is not None:
                    if not worker.process.is_alive():
                        workers[number] = worker = _start(gpus[number])
                    _hand_over(worker, run)
                    folder.write()
            busy = [worker for worker in workers if worker.run is not None]
            wait([each for worker in busy for each in (worker.pipe, worker.process.sentinel)], LOOK)
            for worker in busy:
                over = worker.run
                reason = _result(worker)
                if reason is not None and over is not None:
                    over.finished(reason)
                    over.worked = time.monotonic() - worker.since
                    worker.run = None
                    folder.write()
                    show(folder, over)
            show(folder, None)


def _next(runs: list[RunState]) -> RunState | None:
    """Return a run that can begin now. One that shares an exploration waits until it is there, or is not to come."""
    for run in runs:
        if run.state != WAITING:
            continue
        shared = run.planned.exploration
        others = [each for each in runs if shared and each.planned.exploration == shared and each is not run]
        begun = run.exploration or run.explored.exists()
        if not begun and (done := next((each for each in others if each.explored.exists()), None)) is not None:
            run.exploration = str(done.explored)
        if begun or run.exploration or not any(each.state == RUNNING for each in others):
            return run
    return None


def _hand_over(worker: _Worker, run: RunState) -> None:
    if run.exploration and not os.path.exists(run.exploration):
        run.exploration = ""
    run.state, worker.run, worker.since = RUNNING, run, time.monotonic()
    worker.pipe.send(Task(run.settings(), run.planned.name, run.planned.key, str(run.folder)))


def _result(worker: _Worker) -> str | None:
    """Return why a worker's run failed, "" if it did not, and ``None`` while it goes on."""
    try:
        if worker.pipe.poll():
            reason: str = worker.pipe.recv()
            return reason
    except (EOFError, OSError):
        worker.process.join()
    if worker.process.is_alive():
        return None
    code = worker.process.exitcode or 0
    if code < 0:
        name = signal.Signals(-code).name
        return f"its process was ended by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")
    return f"its process ended with exit code {code}"


@contextmanager
def _workers(gpus: list[str | None]) -> Iterator[list[_Worker]]:
    workers = [_start(gpu) for gpu in gpus]
    try:
        yield workers
        for worker in workers:
            if worker.process.is_alive():
                worker.pipe.send(None)
        deadline = time.monotonic() + 10
        for worker in workers:
            worker.process.join(max(deadline - time.monotonic(), 0))
    finally:
        for worker in workers:
            if worker.process.is_alive():
                worker.process.terminate()
            worker.process.join()


def _start(gpu: str | None) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, gpu), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)
