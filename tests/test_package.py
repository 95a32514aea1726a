"""What is released: what the wheel, the sdist and the FAB hold, and a library that runs on Flower and NumPy alone."""

from __future__ import annotations

import email
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from uv import find_uv_bin

pytestmark = pytest.mark.runs

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
STEM = f"autoflip_flwr-{PROJECT['version']}"

SDIST_FOLDERS = {"autoflip_flwr", "benchmarks", "configs", "docker", "docs", "examples", "results", "tests"}
SDIST_FILES = {
    ".gitignore",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "README.md",
    "SECURITY.md",
    "client_app.py",
    "pyproject.toml",
    "server_app.py",
}
FAB_FILES = {"LICENSE", "README.md", "client_app.py", "pyproject.toml", "server_app.py", ".info/CONTENT"}

LITTER = (
    "autoflip_flwr/__pycache__/mask.cpython-311.pyc",
    "tests/__pycache__/apps.cpython-311.pyc",
    "examples/runs/fedavg/model.safetensors",
    "runs/fedavg/model.safetensors",
    ".venv/lib/module.py",
    ".ci/run",
    "build/lib/autoflip_flwr/old.py",
    "dist/old.whl",
    "old.fab",
    "data/x_train.npy",
    "notes.md",
    "scratch.py",
)
"""What lies about in a folder where somebody works, and is not to be released."""

OPTIONAL = ("torch", "torchvision", "ray", "sklearn", "matplotlib", "safetensors", "flwr_datasets")

RUN = """
import json
import sys

import numpy as np
from apps import arrays_of, message_app, model, numpy_app, record
from flwr.serverapp.strategy import FedAvg

import autoflip_flwr
from autoflip_flwr import AutoFlip
from autoflip_flwr.testing import LocalGrid


def run(client_app):
    strategy = AutoFlip(FedAvg(fraction_evaluate=0.0), sparsity=0.5, seed=1)
    result = strategy.start(LocalGrid(client_app, 4), record(model()), num_rounds=2)
    arrays, keep = arrays_of(result.arrays), strategy.mask.keep
    return {
        "prunable": {name: kept.size for name, kept in keep.items()},
        "kept": sum(int(kept.sum()) for kept in keep.values()),
        "pruned and not zero": sum(int(np.count_nonzero(arrays[name][~kept])) for name, kept in keep.items()),
        "kept and zero": sum(int((arrays[name][kept] == 0).sum()) for name, kept in keep.items()),
        "explored": strategy.ledger.replies["exploration"],
        "trained": strategy.ledger.replies["train"],
        "failures": strategy.ledger.failure_counts(),
        "bytes": {name: array.tobytes().hex() for name, array in arrays.items()},
    }


print(json.dumps({"library": autoflip_flwr.__file__, "message": run(message_app()), "numpy": run(numpy_app())}))
"""


def call(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command that sees the installed packages of its own Python only."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(command, cwd=cwd, env=clean | environment, capture_output=True, text=True, timeout=300)


def output(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = call(*command, cwd=cwd, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def source_files() -> list[str]:
    """The files of the project: those that git knows or does not ignore; in an unpacked sdist all but caches."""
    if (ROOT / ".git").exists():
        names = output("git", "ls-files", "-coz", "--exclude-standard", cwd=ROOT).split("\0")
    else:
        names = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if not is_cache(path.relative_to(ROOT))]
    return sorted(name for name in set(names) if (ROOT / name).is_file() and name != "PKG-INFO")


def is_cache(path: Path) -> bool:
    return "__pycache__" in path.parts or (path.parts[0].startswith(".") and path.name != ".gitignore")


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A copy of the project with litter in it, and its true files."""
    folder, files = tmp_path_factory.mktemp("project") / "autoflip-flwr", source_files()
    for name in LITTER:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    return folder, files


@pytest.fixture(scope="session")
def dist(project: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    output(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, project[0], cwd=folder)
    return folder


@pytest.fixture(scope="session")
def wheel(dist: Path) -> Path:
    return dist / f"{STEM}-py3-none-any.whl"


@pytest.fixture(scope="session")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return email.message_from_bytes(archive.read(f"{STEM}.dist-info/METADATA"))


@pytest.fixture(scope="session")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a new environment with the wheel and what it requires; from uv's cache where that has it all."""
    folder = tmp_path_factory.mktemp("bare")
    output(find_uv_bin(), "venv", "--python", sys.executable, "venv", cwd=folder)
    install = (find_uv_bin(), "pip", "install", "--python", folder / "venv" / "bin" / "python", wheel)
    if call(*install, "--offline", cwd=folder).returncode != 0:
        output(*install, cwd=folder)
    return folder / "venv" / "bin"


# --- what is released ------------------------------------------------------------------------------------------------


def test_two_files_are_built(dist):
    assert sorted(path.name for path in dist.iterdir()) == [f"{STEM}-py3-none-any.whl", f"{STEM}.tar.gz"]


def test_the_wheel_holds_the_package_and_nothing_else(wheel, project):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if not name.endswith("/")}
    info = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
    package = {name for name in project[1] if name.startswith("autoflip_flwr/")}
    assert "autoflip_flwr/py.typed" in package
    assert {Path(name).suffix for name in package} == {".py", ".typed"}
    assert held == package | {f"{STEM}.dist-info/{name}" for name in info}


def test_the_sdist_holds_what_runs_and_tests_the_app_and_nothing_else(dist, project):
    with tarfile.open(dist / f"{STEM}.tar.gz") as archive:
        members = [member for member in archive.getmembers() if not member.isdir()]
    assert all(member.isfile() for member in members)
    expected = {name for name in project[1] if name in SDIST_FILES or name.partition("/")[0] in SDIST_FOLDERS}
    assert expected >= SDIST_FILES
    assert {member.name for member in members} == {f"{STEM}/{name}" for name in expected | {"PKG-INFO"}}


def test_the_fab_holds_the_app_and_nothing_else(project, tmp_path):
    output(Path(sys.executable).with_name("flwr"), "build", "--app", project[0], cwd=tmp_path, FLWR_HOME=str(tmp_path))
    (fab,) = tmp_path.glob("*.fab")
    with zipfile.ZipFile(fab) as archive:
        held = set(archive.namelist())
    modules = {name for name in project[1] if name.startswith("autoflip_flwr/") and name.endswith(".py")}
    assert held == FAB_FILES | modules | {
        name for name in project[1] if name.startswith("configs/") and name.endswith(".toml")
    }


def test_twine_has_nothing_to_say_against_it(dist):
    done = output(sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir(), cwd=dist, NO_COLOR="1")
    assert done.count("PASSED") == 2


def test_the_metadata_are_those_of_the_project(metadata):
    assert metadata["Name"] == PROJECT["name"]
    assert metadata["Version"] == PROJECT["version"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata.get_payload(decode=True) == (ROOT / "README.md").read_bytes()


def test_the_library_requires_flower_and_numpy_only(metadata):
    required = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    base = {item.name for item in required if item.marker is None or item.marker.evaluate({"extra": ""})}
    assert base == {"flwr", "numpy"}
    assert metadata.get_all("Provides-Extra") == [
        "app",
        "checkpoint",
        "dev",
        "finetune",
        "mlflow",
        "tensorboard",
        "wandb",
    ]


OTHER_ROOMS = ("torch", "experiment", "launch")
STORED = ("storage.checkpoint", "storage.exploration_file", "storage.sealed")
"""Modules that have an extra of their own."""

# --- where nothing else is installed ---------------------------------------------------------------------------------


def test_the_bare_environment_lacks_what_is_optional(bare, tmp_path):
    code = f"import importlib.util; print([name for name in {OPTIONAL} if importlib.util.find_spec(name)])"
    assert output(bare / "python", "-c", code, cwd=tmp_path).strip() == "[]"


def test_every_module_of_the_library_can_be_imported_there(bare, wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        paths = [Path(name) for name in archive.namelist()]
    ours = [path for path in paths if path.parts[0] == "autoflip_flwr" and path.suffix == ".py"]
    library = [path for path in ours if path.parts[1] not in OTHER_ROOMS]
    names = [".".join(path.with_suffix("").parts) for path in library]
    assert len(names) > 40
    for module in STORED:
        names.remove(f"autoflip_flwr.{module}")
    output(bare / "python", "-c", f"import importlib\nfor name in {names}: importlib.import_module(name)", cwd=tmp_path)


@pytest.mark.parametrize("module", STORED)
def test_what_is_stored_says_there_which_extra_it_needs(module, bare, tmp_path):
    code = f"try: import autoflip_flwr.{module}\nexcept ModuleNotFoundError as error: print(error)"
    assert 'pip install "autoflip-flwr[checkpoint]"' in output(bare / "python", "-c", code, cwd=tmp_path)


@pytest.mark.parametrize("tracker", ["MLflow", "TensorBoard", "WandB"])
def test_a_tracker_says_there_which_extra_it_needs(tracker, bare, tmp_path):
    code = f"from autoflip_flwr import {tracker}\ntry: {tracker}()\nexcept ModuleNotFoundError as error: print(error)"
    told = output(bare / "python", "-c", code, cwd=tmp_path)
    assert f"pip install 'autoflip-flwr[{tracker.lower()}]'" in told


def test_a_federation_prunes_there(bare, tmp_path):
    shutil.copy(ROOT / "tests" / "apps.py", tmp_path)
    (tmp_path / "run.py").write_text(RUN)
    found = json.loads(output(bare / "python", "run.py", cwd=tmp_path).splitlines()[-1])
    assert Path(found["library"]).is_relative_to(bare.parent)
    assert found["numpy"] == found["message"]
    assert found["message"].pop("bytes").keys() == {"hidden.weight", "hidden.bias", "steps", "out.weight"}
    assert found["message"] == {
        "prunable": {"hidden.weight": 48, "out.weight": 18},
        "kept": 33,
        "pruned and not zero": 0,
        "kept and zero": 0,
        "explored": 4,
        "trained": 8,
        "failures": {"rejected": 0, "errors": 0, "absent": 0},
    }


def test_the_command_explains_itself_there(bare, tmp_path):
    for arguments in (["--help"], ["run", "--help"], ["report", "--help"]):
        assert output(bare / "autoflip", *arguments, cwd=tmp_path).startswith("usage: autoflip")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("run", "a simulation needs Ray: pip install 'autoflip-flwr[app]'"),
        ("report", "a report needs matplotlib: pip install 'autoflip-flwr[app]'"),
    ],
)
def test_the_command_says_what_to_install_there(bare, project, command, message, tmp_path):
    done = call(bare / "autoflip", command, project[0], cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"autoflip: error: {message}\n")


def test_the_helpers_for_pytorch_say_there_what_is_missing(bare, tmp_path):
    done = call(bare / "python", "-c", "import autoflip_flwr.torch", cwd=tmp_path)
    assert done.returncode == 1
    assert "No module named 'torch'" in done.stderr.splitlines()[-1]
