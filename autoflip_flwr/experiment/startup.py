"""Start quickly, since in a deployment every message is served by a new process."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_CALLS_IT_A_LEAK = "triton"  # torch's compiler: at exit it reports frozen objects as leaks, in dozens of lines

atexit.register(gc.disable)  # Python collects several times at exit; its last collection is enough


@contextmanager
def light_imports() -> Iterator[None]:
    """Pause garbage collection while modules are loaded in this block.

    Otherwise Python's collector would scan all modules again and again, and once more when the process ends. With torch
    that is a third of a short process's time. If the block has loaded something, all present objects are frozen at its
    end (``gc.freeze``), unless torch's compiler is among them. Later objects are collected as before.
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
