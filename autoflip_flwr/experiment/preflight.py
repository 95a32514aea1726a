"""Check what can be checked before a run is started. Each check takes a moment, without PyTorch or Ray."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import tomllib
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.data.files import KNOWN, store_of
from autoflip_flwr.experiment.imported import check_module
from autoflip_flwr.experiment.rules import ConfigError, shown
from autoflip_flwr.trackers.packages import lacks

if TYPE_CHECKING:
    from autoflip_flwr.core.layout import Arrays
    from autoflip_flwr.experiment.record.folder import RunRecord
    from autoflip_flwr.storage.exploration_file import StoredExploration

CONNECT_LIMIT = 3.0  # seconds within which the source of a download must answer
SMI_LIMIT = 5.0


def check(config: Config, gpus: float) -> None:
    """Reject settings of the shipped app that cannot work on this machine.

    Parameters
    ----------
    config : Config
        Its paths exist already.
    gpus : float
        GPUs per client.

    Raises
    ------
    ConfigError
        For a device that does not exist or that clients would not get, a folder that cannot be written, a tracker whose
        package is missing, a model of the user's own whose module is not there, a data set that is neither there nor
        can be downloaded, and a run or an exploration with other settings.
    """
    check_device(config.device, gpus)
    check_trackers(config)
    check_writable(Path(config.output_dir))
    if ":" in config.model:
        check_module("model", config.model)
    check_data(config)
    if config.exploration:
        earlier_exploration(config, None)
    if config.resume:
        resumable(config)


def check_resources(cpus: int, gpus: float) -> None:
    """Raise ``ConfigError`` for more CPUs or GPUs per client than this machine has."""
    there = os.cpu_count()
    if there is not None and cpus > there:
        raise ConfigError(f"--cpus {cpus}: this machine has {there}, and each client would wait for so many")
    found = cuda_devices()
    if found is not None and gpus > found:
        has = f"only {found}" if found else "no GPU that CUDA can see"
        raise ConfigError(f"--gpus {gpus:g}: this machine has {has}; leave --gpus out to train on the CPU")


def check_device(device: str, gpus: float) -> None:
    """Raise ``ConfigError`` for a device that does not exist, that PyTorch cannot use, or that Ray would hide."""
    if device == "mps" and sys.platform != "darwin":
        raise ConfigError("device = 'mps': only macOS has it; auto takes what there is")
    if device != "cuda":
        return
    if cuda_devices() == 0:
        raise ConfigError("device = 'cuda': no GPU that CUDA can see; auto takes what there is")
    if torch_without_cuda():
        raise ConfigError("device = 'cuda': the installed PyTorch is built without CUDA; auto takes what there is")
    if not gpus:
        raise ConfigError("device = 'cuda': clients see a GPU only with a share of it, e.g. --gpus 0.25")


def cuda_devices() -> int | None:
    """Return how many NVIDIA GPUs a process may use; None if unknown (AMD's GPUs, too, are called cuda by PyTorch)."""
    if sys.platform == "darwin":
        return 0
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None and allowed.strip() in ("", "-1"):
        return 0
    if Path("/dev/kfd").exists():
        return None
    found = len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) or len(list(Path("/dev").glob("nvidia[0-9]*")))
    if not found and shutil.which("nvidia-smi"):  # Windows, or Linux in WSL
        try:
            listed = subprocess.run(
                ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=SMI_LIMIT, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        found = listed.stdout.count("GPU ")
    return found if allowed is None else min(found, len(allowed.split(",")))


def torch_without_cuda() -> bool:
    """Return whether the installed PyTorch is built for the CPU only."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return False
    try:
        text = (Path(found.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return False
    built = re.findall(r"^(?:cuda|hip)\b[^=\n]*= *(.*)$", text, re.MULTILINE)
    return bool(built) and all(value.strip() == "None" for value in built)


def check_writable(folder: Path) -> None:
    """Raise ``ConfigError`` if ``folder`` cannot be made and written to. Nothing is left behind."""
    there = folder.absolute()
    while not there.exists() and not there.is_symlink() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise ConfigError(f"output-dir = {shown(str(folder))}: {there} is in the way, and is no folder")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ConfigError(f"output-dir = {shown(str(folder))}: cannot write to {there}: {error.strerror}") from None


def check_trackers(config: Config) -> None:
    """Raise ``ConfigError`` if the package of a tracker is not installed."""
    for name in config.tracker_names:
        if words := lacks(name):
            raise ConfigError(f"trackers = {shown(config.trackers)}: {words}")


def check_data(config: Config) -> None:
    """Raise ``ConfigError`` if the data set is malformed, or neither there nor can be downloaded.

    Files that must be converted first are only looked for.
    """
    from autoflip_flwr.experiment.data.load import check_data  # here, not above: it loads NumPy

    found = check_data(config)
    if found is None or found.form != "download" or store_of(config.dataset).is_dir():
        return
    if trouble := unreachable(KNOWN[config.dataset].host):
        raise ConfigError(
            f"dataset = {shown(config.dataset)}: it is not here, and cannot be downloaded ({trouble}); "
            "give data-dir, or $AUTOFLIP_DATA, a folder that has it"
        )


def unreachable(url: str) -> str:
    """Return why the host of ``url``, or the proxy before it, cannot be reached in a moment; "" if it can."""
    parts = urllib.parse.urlsplit(url)
    host = str(parts.hostname)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(host):
        parts = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    where = (str(parts.hostname), parts.port or (443 if parts.scheme == "https" else 80))
    trouble = [f"{where[0]} does not answer within {CONNECT_LIMIT:g} s"]

    def connect() -> None:
        try:
            socket.create_connection(where, CONNECT_LIMIT).close()
            trouble[0] = ""
        except OSError as error:
            trouble[0] = f"{where[0]}: {error.strerror or error}"

    # in a thread, since a name lookup has no time limit
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT_LIMIT)
    return trouble[0]


def earlier_exploration(config: Config, initial: Arrays | None) -> StoredExploration:
    """Return the exploration to reuse; ``ConfigError`` if the file has none, or one of another initial model.

    ``initial`` is ``None`` if the model is not made yet. Then the settings that it is made from are compared.
    """
    from autoflip_flwr.storage.exploration_file import ExplorationFileError, read_exploration  # slow to load

    try:
        return read_exploration(config.exploration, initial, settings=config.of_start())
    except ExplorationFileError as error:
        raise ConfigError(f"exploration = {shown(config.exploration)}: {error.reason}") from error


def resumable(config: Config) -> RunRecord:
    """Return the record of the run to resume; ``ConfigError`` if it has other settings or cannot be resumed."""
    from autoflip_flwr.experiment.record.folder import RunRecord  # here, not above: it is slow to load

    record = RunRecord(Path(config.resume).resolve())
    try:
        before = dict(record.about()["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"resume = '{config.resume}': not the record of a run ({error!r})") from error
    for key, value in config.decisive().items():
        if before.get(key, value) != value:
            raise ConfigError(f"resume = '{config.resume}': {key} was {before[key]!r} there, and is now {value!r}")
    if record.has_rounds() and not any((record.path / "checkpoint").glob("round-*.safetensors")):
        raise ConfigError(f"resume = '{config.resume}': it has rounds, but none of their checkpoints: begin a new run")
    return record


def check_superlink(name: str) -> None:
    """Raise ``ConfigError`` if Flower's ``config.toml`` has no SuperLink of this name.

    A missing file is no error: Flower creates one with its own names.
    """
    path = Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr") / "config.toml"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8")).get("superlink", {})
    except FileNotFoundError:
        names = ["local", "supergrid"]
    except (OSError, ValueError) as error:
        raise ConfigError(f"--superlink {name}: {path} cannot be read: {error}") from None
    else:
        names = [key for key, value in table.items() if isinstance(value, dict)]
    if name not in names:
        raise ConfigError(
            f"--superlink {name}: {path} has no [superlink.{name}]; it has {', '.join(names) or 'none'} "
            "(docs/deployment.md says how to name one)"
        )
