"""A light start: in a deployment every message is served by a process of its own."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def light_imports() -> Iterator[None]:
    """Load modules in this block without looking for garbage among them.

    While modules are loaded, Python's collector goes through all of them again and again, and once more when the
    process ends: with torch that is a third of a short process's time. If the block has loaded something, all that
    there is at its end is set aside for good; the collector then works as before on what comes later.
    """
    loaded, enabled = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > loaded:
            gc.freeze()
        if enabled:
            gc.enable()


@atexit.register
def _end() -> None:
    gc.disable()
    if gc.get_freeze_count():
        # What is set aside goes with the process, not object by object. Some extension modules call that leaks, in
        # dozens of lines a message, when everything else has been said.
        sys.stderr.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stderr__.fileno() if sys.__stderr__ else 2)
