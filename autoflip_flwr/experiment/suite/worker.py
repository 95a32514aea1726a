"""Run the runs of a suite in a process of their own, one after another."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.rules import Value

# PyTorch and all that needs it are imported in `work`, after the environment is set


class Task(NamedTuple):
    """A run to make: its settings, its identity, and its folder, which may hold an interrupted try."""

    settings: dict[str, Value]
    name: str
    key: str
    folder: str


def work(connection: Connection, gpu: str | None) -> None:
    """Make the runs that come through the pipe, until ``None`` comes. Answer each with why it failed; "" if it did not.

    Each process computes with one thread. ``gpu`` is the index of the only GPU that it may use.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that has started this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = "1"
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    with suppress(EOFError, BrokenPipeError):
        while (task := connection.recv()) is not None:
            connection.send(make(task))


def _end_with_parent() -> None:
    """End this process if the one that has started it is killed: another may go on with its runs."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def make(task: Task) -> str:
    """Make one run. Return why it failed; "" if it did not."""
    import logging

    import torch

    from autoflip_flwr.experiment.server import in_words

    folder = Path(task.folder)
    logger = logging.getLogger("flwr")
    folder.mkdir(parents=True, exist_ok=True)
    handlers, logger.handlers = logger.handlers, [logging.FileHandler(folder / "log.txt", encoding="utf-8")]
    torch.set_num_threads(1)
    try:
        run_in_process(Config.from_run_config(task.settings), folder, name=task.name, key=task.key)
    except Exception as error:
        logger.exception("the run failed")
        return in_words(error)
    finally:
        logger.handlers[0].close()
        logger.handlers = handlers
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    return ""


def run_in_process(config: Config, folder: Path | None = None, *, name: str = "", key: str = "") -> Path:
    """Run the app in this process, without Ray and without a SuperLink, one client after another.

    The model is that of ``autoflip run`` with the same settings, bit for bit. So are the bytes that are counted, but
    for the ids of run, nodes and tasks, which Flower draws anew for each run: one may take a byte less.

    Parameters
    ----------
    config : Config
        All settings; ``nodes`` is at least 1.
    folder : Path | None
        Folder of the record, which goes on if it is there; default: a new one in ``output-dir``.
    name, key : str
        Name and identity of the run for its record.
    """
    from autoflip_flwr.experiment import client, server
    from autoflip_flwr.testing import LocalGrid

    grid = LocalGrid(client.app, config.nodes, config.as_dict(), serialise=False, first=2**63)
    return server.run(grid, config, folder=folder, name=name, key=key)
