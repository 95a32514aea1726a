"""A client's process starts and ends lightly."""

from __future__ import annotations

import gc
import subprocess
import sys

from autoflip_flwr.experiment.startup import light_imports

CLIENT = """
import gc
from client_app import app
assert gc.isenabled() and gc.get_freeze_count() > 10_000, gc.get_freeze_count()
import torch
model = torch.nn.Linear(2, 2)
torch.optim.SGD(model.parameters(), lr=0.1)  # loads torch's compiler
print("done")
"""


def test_a_client_process_sets_its_modules_aside_and_ends_quietly() -> None:
    done = subprocess.run([sys.executable, "-c", CLIENT], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


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
