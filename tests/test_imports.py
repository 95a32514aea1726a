"""The library needs NumPy and Flower only, and its imports point downwards."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import autoflip_flwr

PACKAGE = Path(autoflip_flwr.__file__).parent
CORE = sorted(path.stem for path in PACKAGE.glob("*.py"))

# from the bottom up; a module may import from lower rows only
ROWS = [
    {"files", "loop", "metrics", "norms", "reason", "savings", "traffic", "weights", "_flower"},
    {"outputs"},
    {"layout"},
    {"mask", "testing", "values"},
    {"average", "bits", "guidance", "health", "subspace"},
    {"evidence", "moves"},
    {"wire"},
    {"coordinates", "feedback", "firewall", "ledger", "legacy", "maskrecord", "plan", "roll_call"},
    {"waiting"},
    {"grid", "mod", "quarantine", "privacy"},
    {"translate"},
    {"state", "checkpoint"},
    {"exploration", "progress"},
    {"settings"},
    {"rounds"},
    {"strategy"},
    {"__init__"},
]


def imported(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_module_of_the_core_has_its_row():
    assert sorted(set().union(*ROWS)) == CORE


@pytest.mark.parametrize("module", CORE)
def test_imports_point_downwards(module):
    row = next(index for index, modules in enumerate(ROWS) if module in modules)
    names = {name for name in imported(PACKAGE / f"{module}.py") if name.startswith("autoflip_flwr.")}
    used = {name.split(".")[1] for name in names} & set(CORE)
    assert used <= set().union(*ROWS[:row])
    assert not {name.split(".")[1] for name in names} & {"torch", "experiment"}


@pytest.mark.parametrize("module", CORE)
def test_the_core_imports_numpy_and_flower_only(module):
    roots = {name.partition(".")[0] for name in imported(PACKAGE / f"{module}.py")}
    allowed = {"numpy", "flwr", "autoflip_flwr"} | ({"safetensors"} if module == "checkpoint" else set())
    assert roots - set(sys.stdlib_module_names) <= allowed


def test_importing_the_library_loads_neither_torch_nor_ray():
    code = (
        "import sys, autoflip_flwr, autoflip_flwr.testing; "
        "print(sorted({'torch', 'torchvision', 'ray', 'sklearn', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


WITHOUT_PRIVATE_PARTS = """
import sys
import flwr.app, flwr.clientapp.mod, flwr.common.logger, flwr.serverapp.strategy  # public, with what they need

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(private):
            raise ModuleNotFoundError(f"no module {name}", name=name)

private = ("flwr.supercore", "flwr.proto", "flwr.common.constant", "flwr.common.serde")
for name in [name for name in sys.modules if name.startswith(private)]:
    del sys.modules[name]
sys.meta_path.insert(0, Refuse())

from autoflip_flwr import AutoFlip, autoflip_mod
from flwr.serverapp.strategy import DifferentialPrivacyClientSideAdaptiveClipping, FedAvg
AutoFlip(DifferentialPrivacyClientSideAdaptiveClipping(FedAvg(), 0.1, 100), exploration_public=True)
try:
    import autoflip_flwr.testing
except ModuleNotFoundError as error:
    print(error)
"""


def test_flowers_private_parts_are_needed_for_testing_only():
    done = subprocess.run([sys.executable, "-c", WITHOUT_PRIVATE_PARTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no module flwr.supercore")


def test_a_client_does_not_load_the_servers_modules():
    code = "import sys, autoflip_flwr.mod; print(*(name for name in sys.modules if name.startswith('autoflip_flwr.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[2] for name in done.stdout.split()}
    core = {"layout", "mask", "outputs", "values", "weights"}
    assert loaded == core | {"bits", "moves", "wire", "feedback", "legacy", "maskrecord", "mod"}


def test_every_public_name_is_there_when_it_is_asked_for():
    assert set(autoflip_flwr.__all__) <= set(dir(autoflip_flwr))
    assert all(getattr(autoflip_flwr, name).__name__ == name for name in autoflip_flwr.__all__)
    with pytest.raises(AttributeError, match="module 'autoflip_flwr' has no attribute 'AutoFlop'"):
        autoflip_flwr.AutoFlop  # noqa: B018
