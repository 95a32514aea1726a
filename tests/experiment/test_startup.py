"""A client's process starts and ends lightly."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from autoflip_flwr.experiment.startup import light_imports

CLIENT = """
import gc
from client_app import app
assert gc.isenabled() and gc.get_freeze_count() > 10_000, gc.get_freeze_count()
import torch
from autoflip_flwr.experiment.startup import light_imports
model = torch.nn.Linear(2, 2)
before = gc.get_freeze_count()
with light_imports():
    torch.optim.SGD(model.parameters(), lr=0.1)  # loads torch's compiler
assert gc.get_freeze_count() <= before
print("done")
"""

CRASHES = {
    "an exception in an exit handler": """
import atexit
atexit.register(lambda: 1 / 0)  # before the app's own: runs after them
import client_app
""",
    "an exception while modules go": """
import client_app
class Last:
    def __del__(self):
        raise ZeroDivisionError
last = Last()
""",
    "a crash while modules go": """
import ctypes, faulthandler
faulthandler.enable()
import client_app
class Last:
    def __del__(self, crash=ctypes.string_at):
        crash(0)
last = Last()
""",
}


@pytest.mark.runs
def test_a_client_process_sets_its_modules_aside_and_ends_quietly() -> None:
    done = subprocess.run([sys.executable, "-c", CLIENT], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.runs
@pytest.mark.parametrize(
    ("crash", "message"),
    list(zip(CRASHES, ["ZeroDivisionError", "ZeroDivisionError", "Fatal Python error"], strict=True)),
)
def test_what_goes_wrong_at_the_end_is_seen(crash: str, message: str) -> None:
    done = subprocess.run([sys.executable, "-c", CRASHES[crash]], capture_output=True, text=True)
    assert message in done.stderr


def test_a_block_that_loads_nothing_changes_nothing() -> None:
    before = gc.get_freeze_count()
    with light_imports():
        assert not gc.isenabled()
        import gc as same
    assert same.isenabled()
    assert gc.get_freeze_count() == before


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with light_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
