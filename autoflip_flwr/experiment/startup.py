"""A light start: in a deployment every message is served by a process of its own."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_CALLS_IT_A_LEAK = "triton"  # torch's compiler: where it was set aside, dozens of lines end the process

atexit.register(gc.disable)  # Python looks for garbage once more, but a last time is enough


@contextmanager
def light_imports() -> Iterator[None]:
    """Load modules in this block without looking for garbage among them.

    While modules are loaded, Python's collector goes through all of them again and again, and once more when the
    process ends: with torch that is a third of a short process's time. If the block has loaded something, all that
    there is at its end is set aside for good, unless torch's compiler is among it; the collector then works as before
    on what comes later.
    """
    loaded, enabled = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > loaded and _CALLS_IT_A_LEAK not in sys.modules:
            gc.freeze()
        if enabled:
            gc.enable()
