"""The library needs NumPy and Flower only, and its imports point downwards."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import autoflip_flwr

PACKAGE = Path(autoflip_flwr.__file__).parent

# Each room with the rooms that it may import from, and the packages beside Python's own.
ROOMS = {
    "core": ("", "numpy"),
    "wire": ("core", "numpy flwr"),
    "client": ("core wire", "numpy flwr"),
    "costs": ("core wire", "numpy flwr"),
    "storage": ("core wire", "numpy flwr safetensors"),
    "replies": ("core wire costs", "numpy flwr"),
    "wrapped": ("core wire costs storage", "numpy flwr"),
    "torch": ("core wire client", "numpy flwr torch"),
    "trackers": ("", "flwr mlflow tensorboard wandb"),
    "server": ("core wire costs storage replies wrapped trackers", "numpy flwr"),
    "experiment": ("core wire client costs storage replies wrapped torch trackers server", "*"),
    "launch": ("core wire costs storage experiment", "flwr rich"),
}
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py" or path.parent.name == "torch"
}
IN_ROOMS = [name for name in MODULES if name.count(".") > 1]


def imported(path: Path) -> set[str]:
    """Every module that a file imports, and every name that it imports from one."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("module", IN_ROOMS)
def test_a_room_imports_from_the_rooms_below_it_alone(module):
    rooms, packages = ROOMS[room_of(module)]
    names = imported(MODULES[module])
    ours = {room_of(name) for name in names if name.startswith("autoflip_flwr.")} & ROOMS.keys()
    assert ours - {room_of(module)} <= set(rooms.split())
    roots = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"autoflip_flwr"}
    assert packages == "*" or roots <= set(packages.split())


def test_the_rooms_have_an_order():
    below: set[str] = set()
    for room, (rooms, _) in ROOMS.items():
        assert set(rooms.split()) <= below
        below.add(room)


def test_no_import_leads_back():
    follows = {name: (imported(path) & MODULES.keys()) - {name} for name, path in MODULES.items()}
    graphlib.TopologicalSorter(follows).prepare()  # raises CycleError


@pytest.mark.parametrize("room", sorted(ROOMS.keys() - {"torch"}))
def test_a_room_has_nothing_but_its_modules(room):
    assert not (PACKAGE / room / "__init__.py").read_text()


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
from autoflip_flwr.core.methods import LossExploration
from flwr.serverapp.strategy import DifferentialPrivacyClientSideAdaptiveClipping, FedAvg
AutoFlip(DifferentialPrivacyClientSideAdaptiveClipping(FedAvg(), 0.1, 100), method=LossExploration.static(public=True))
try:
    import autoflip_flwr.testing
except ModuleNotFoundError as error:
    print(error)
"""


def test_flowers_private_parts_are_needed_for_testing_only():
    done = subprocess.run([sys.executable, "-c", WITHOUT_PRIVATE_PARTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no module flwr.supercore")


def test_a_client_loads_core_wire_and_client_alone():
    code = "import sys; from autoflip_flwr import autoflip_mod; print(*(n for n in sys.modules if n.count('.') > 1))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours = {room_of(name) for name in done.stdout.split() if name.startswith("autoflip_flwr.")}
    assert ours <= {"core", "wire", "client"}


def test_every_public_name_is_there_when_it_is_asked_for():
    assert set(autoflip_flwr.__all__) <= set(dir(autoflip_flwr))
    assert all(getattr(autoflip_flwr, name).__name__ == name for name in autoflip_flwr.__all__)
    with pytest.raises(AttributeError, match="module 'autoflip_flwr' has no attribute 'AutoFlop'"):
        autoflip_flwr.AutoFlop  # noqa: B018
