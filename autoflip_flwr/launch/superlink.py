"""Run a Flower app on its own simulation SuperLink, and leave no process behind.

`flwr run` alone starts a SuperLink that outlives the run, and exits with 0 even if the run failed. `run_app` therefore
starts its own SuperLink on a free port, shows the run's log, asks for its true status and stops all that it started.
"""

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from autoflip_flwr.costs.reason import COLOURS
from autoflip_flwr.launch.screen import Screen

TOOLS = Path(sys.executable).parent
CONNECTION = "autoflip"
LOG = "superlink.log"
START_LIMIT = 120.0  # seconds until the SuperLink answers; importing Flower alone may take 30 on a small, busy machine
STATUS_LIMIT = 60.0  # seconds between the end of the log and the final status
TERM_LIMIT = 8.0  # seconds between SIGTERM and SIGKILL
KILL_LIMIT = 5.0

_Identity = tuple[int, str]  # pid and start time, since pids are reused


@dataclass(frozen=True)
class Resources:
    """`nodes` SuperNodes (>= 1), and per client `cpus` CPUs (>= 1) and `gpus` GPUs (>= 0, may be a fraction)."""

    nodes: int = 10
    cpus: int = 1
    gpus: float = 0.0


@dataclass(frozen=True)
class _Process:
    identity: _Identity
    parent: int
    zombie: bool


def run_app(app: Path, run_config: str, resources: Resources, screen: Screen, keep_logs: bool = False) -> str:
    """Run the Flower app in folder `app` and show its log.

    Parameters
    ----------
    app : Path
        Folder with the app's pyproject.toml.
    run_config : str
        TOML document whose values replace the app's defaults; may be empty.
    resources : Resources
        Size of the simulation.
    screen : Screen
        Where the log is shown.
    keep_logs : bool (False)
        Keep the SuperLink's log, and print its path.

    Returns
    -------
    str
        "" for a completed run, else the reason for its failure. SIGINT raises KeyboardInterrupt, SIGTERM and SIGHUP
        raise SystemExit, in each case after everything is stopped.
    """
    with _stage(keep_logs) as home:
        return _run(app, run_config, resources, screen, home)


def _run(app: Path, run_config: str, resources: Resources, screen: Screen, home: Path) -> str:
    cpus = "a CPU" if resources.cpus == 1 else f"{resources.cpus} CPUs"
    gpus = f" and {resources.gpus:g} GPU" if resources.gpus else ""
    nodes = "1 node" if resources.nodes == 1 else f"{resources.nodes} nodes"
    screen.say(f"starting the simulation: {nodes}, {cpus}{gpus} for each client; up to a minute")
    port = _free_port()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n\n'
        f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    environment = _environment(home)
    command = [f"{TOOLS}/flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
    log = home / LOG
    with log.open("wb") as file:
        superlink = subprocess.Popen(
            [*command, "--disable-runtime-dependency-installation"],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=environment,
            start_new_session=True,
        )
    trouble = _wait_until_healthy(superlink, port)
    if trouble:
        lines = log.read_text(errors="replace").split("\n")
        return "; ".join([trouble, *[line.strip() for line in lines if line.strip()][-3:]])

    arguments = [str(app), CONNECTION, "--stream", "--federation-config"]
    arguments.append(
        f"num-supernodes={resources.nodes} client-resources-num-cpus={resources.cpus} "
        f"client-resources-num-gpus={resources.gpus}"
    )
    if run_config:
        (home / "run-config.toml").write_text(run_config, encoding="utf-8")
        arguments += ["-c", str(home / "run-config.toml")]
    failure = stream([f"{TOOLS}/flwr", "run", *arguments], environment, screen)
    found = _final_status(environment)
    if found is None:
        gone = superlink.poll()
        return failure if gone is None else f"the SuperLink exited with code {gone}"
    status, details = found
    return "" if status == "finished:completed" else screen.reason(details or status)


def stream(command: list[str], environment: Mapping[str, str], screen: Screen) -> str:
    """Show a command's output. Return the error that Flower shows in a box before the run, else the last line."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**environment, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,  # Ctrl-C in a terminal must reach only us: we stop the rest in order
        encoding="utf-8",
        errors="replace",
    )
    box: list[str] = []  # text of the box in which Flower's command line shows an error before the run begins
    last, begun = "", False
    assert process.stdout is not None
    try:
        for line in process.stdout:
            plain = COLOURS.sub("", line).strip()
            last = plain or last
            if begun or not plain.startswith(("│", "╭", "╰")):
                screen.feed(line)
                begun = begun or bool(plain and not plain.startswith("Using SuperLink"))
            elif plain.startswith("│"):
                box.append(plain.strip("│ "))
    finally:
        process.stdout.close()
        screen.close()
    process.wait()
    return " ".join(filter(None, box)) or last


def _final_status(environment: Mapping[str, str]) -> tuple[str, str] | None:
    """Return status and details of the one run; None if there is no run or the SuperLink does not answer."""
    limit = time.monotonic() + STATUS_LIMIT
    while True:
        command = [f"{TOOLS}/flwr", "list", CONNECTION, "--format", "json"]
        answer = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, env=environment, start_new_session=True, check=False
        )
        try:
            runs = json.loads(answer.stdout)["runs"]
        except (ValueError, KeyError):
            return None
        if not runs:
            return None
        status, details = str(runs[0]["status"]), str(runs[0]["status-details"])
        if status.startswith("finished") or time.monotonic() > limit:
            return status, "" if details == "N/A" else details
        time.sleep(0.5)


def _wait_until_healthy(superlink: "subprocess.Popen[bytes]", port: int) -> str:
    """Wait until the SuperLink answers. Return what is wrong, "" if nothing."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    limit = time.monotonic() + START_LIMIT
    while time.monotonic() < limit:
        if superlink.poll() is not None:
            return f"the SuperLink exited with code {superlink.returncode} while starting"
        with suppress(OSError), opener.open(f"http://127.0.0.1:{port}/health", timeout=2):
            return ""
        time.sleep(0.1)
    return f"the SuperLink did not answer within {START_LIMIT:.0f} seconds"


def _environment(home: Path) -> dict[str, str]:
    environment = dict(os.environ)
    environment.pop("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", None)
    # The SuperLink finds its helper processes by PATH only.
    environment["PATH"] = os.pathsep.join([str(TOOLS), environment.get("PATH", os.defpath)])
    for name in ("NO_PROXY", "no_proxy"):
        environment[name] = ",".join(filter(None, ["127.0.0.1", environment.get(name)]))
    environment.setdefault("RAY_TMPDIR", str(home))
    return environment | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_DEDUP_LOGS": "0",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _stage(keep_logs: bool) -> Iterator[Path]:
    """Yield a temporary Flower home. At the end remove it, and stop every process started since."""
    endings = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    spared = {each.identity for each in _descendants(os.getpid(), set())}
    before = {number: signal.getsignal(number) for number in endings}
    adopting = _adopt_orphans(True)
    # Ray keeps sockets there, whose paths the operating system limits to about 100 characters.
    home = Path(tempfile.mkdtemp(prefix="autoflip-", dir=None if len(tempfile.gettempdir()) <= 17 else "/tmp"))
    try:
        for number in endings:
            signal.signal(number, _end)
        yield home
    finally:
        for number in endings:
            signal.signal(number, signal.SIG_IGN)
        _stop_descendants(spared)
        _adopt_orphans(adopting)
        if keep_logs and (home / LOG).exists():
            descriptor, kept = tempfile.mkstemp(prefix="autoflip-superlink-", suffix=".log")
            os.close(descriptor)
            shutil.copyfile(home / LOG, kept)
            print(f"autoflip: the SuperLink's log is {kept}", flush=True)
        shutil.rmtree(home, ignore_errors=True)
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, _: object) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def _adopt_orphans(adopt: bool) -> bool:
    """Make this process the parent of its descendants' orphans, so that none escapes. Return the previous setting.

    Flower and Ray start processes in their own sessions. Only Linux lets us keep track of those.
    """
    if sys.platform != "linux":
        return False
    set_child_subreaper, get_child_subreaper = 36, 37
    library, was = ctypes.CDLL(None), ctypes.c_int()
    library.prctl(get_child_subreaper, ctypes.byref(was), 0, 0, 0)
    library.prctl(set_child_subreaper, int(adopt), 0, 0, 0)
    return bool(was.value)


def _stop_descendants(spared: set[_Identity]) -> None:
    """End all descendants of this process except the spared ones: SIGTERM first, then SIGKILL for those that remain."""
    ours = {each.identity for each in _descendants(os.getpid(), spared)}
    for number, seconds in ((signal.SIGTERM, TERM_LIMIT), (signal.SIGKILL, KILL_LIMIT)):
        limit = time.monotonic() + seconds
        signalled: set[_Identity] = set()
        while time.monotonic() < limit:
            ours |= {each.identity for each in _descendants(os.getpid(), spared)}
            alive = [each for each in _processes() if each.identity in ours]
            for each in alive:
                if each.zombie and each.parent == os.getpid():
                    with suppress(ChildProcessError):
                        os.waitpid(each.identity[0], os.WNOHANG)
                elif not each.zombie and each.identity not in signalled:
                    signalled.add(each.identity)
                    with suppress(ProcessLookupError):
                        os.kill(each.identity[0], number)
            if not alive:
                return
            time.sleep(0.05)


def _descendants(root: int, spared: set[_Identity]) -> list[_Process]:
    children: dict[int, list[_Process]] = {}
    for each in _processes():
        if each.identity not in spared:
            children.setdefault(each.parent, []).append(each)
    found = list(children.get(root, []))
    for each in found:  # grows during the loop
        found += children.get(each.identity[0], [])
    return found


def _processes() -> list[_Process]:
    if not Path("/proc/self/stat").exists():
        command = ["ps", "-A", "-o", "pid=,ppid=,stat=,lstart="]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rows = (line.split(None, 3) for line in listing.splitlines())
        return [_Process((int(pid), started), int(parent), state[0] == "Z") for pid, parent, state, started in rows]
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):  # the process has ended
                # After the name, which may hold spaces and brackets: state, parent, ..., start time as the 20th.
                state, parent, *more = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
                found.append(_Process((int(folder.name), more[17]), int(parent), state == "Z"))
    return found
