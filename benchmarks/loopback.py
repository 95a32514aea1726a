"""Run a SuperLink and SuperNodes on 127.0.0.1, as a deployment does: every message is served by its own process.

    with Loopback(nodes=2) as loopback:
        entry = loopback.run(Path("."), {"num-server-rounds": 1}, timeout=300)
        print(entry["network-traffic"])  # {"inbound-bytes": ..., "outbound-bytes": ..., "total-bytes": ...}

Flower counts the objects of the run's messages that SuperNodes push (inbound) and pull (outbound), and the bodies of
the requests and answers that announce them. It does not count HTTP headers, the app, or the traffic between server app
and SuperLink.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from autoflip_flwr.experiment.rules import Value
from autoflip_flwr.experiment.toml import to_toml
from autoflip_flwr.launch import superlink

READY_LIMIT = 180.0  # seconds to wait for the SuperNodes to be online
TAIL = 40  # log lines shown with an error


class Loopback:
    """A context manager: in its block a SuperLink and SuperNodes run on free ports, and the nodes are registered.

    However the block ends, all processes started in it are stopped, and their children. Use it in the main thread.

    Parameters
    ----------
    nodes : int (2)
        Number of SuperNodes, each with `partition-id` and `num-partitions` in its node config.
    node_configs : Sequence[Mapping[str, Value]] | None
        Further entries of the node configs, one mapping per node.
    folder : Path | None
        Existing folder for the logs (`superlink.log`, `supernode-0.log`, ..., `run-0.log`, ...). None: a temporary one.
    options : Sequence[str]
        More options of the SuperLink.
    """

    def __init__(
        self,
        nodes: int = 2,
        node_configs: Sequence[Mapping[str, Value]] | None = None,
        folder: Path | None = None,
        options: Sequence[str] = (),
    ) -> None:
        self._configs: list[dict[str, Value]] = [
            {**own, "partition-id": part, "num-partitions": nodes}
            for part, own in zip(range(nodes), node_configs or [{}] * nodes, strict=True)
        ]
        self._folder, self._runs, self._options = folder, 0, options

    def __enter__(self) -> Loopback:
        with ExitStack() as stack:
            self.home = stack.enter_context(superlink._stage(keep_logs=False))
            self.logs = self.home if self._folder is None else self._folder.resolve()
            self._environment = superlink._environment(self.home)
            self._environment |= {"FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "PYTHONUNBUFFERED": "1"}
            self._environment.pop("PYTHONDONTWRITEBYTECODE", None)  # cache bytecode: each message starts a Python
            self._environment["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"] = "0.2"  # seconds; Flower's default is 1
            # As if each node had its own machine: threads that compete for CPUs waste time.
            self._environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // len(self._configs)))
            port = superlink._free_port()
            (self.home / "config.toml").write_text(
                f'[superlink.{superlink.CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
            )
            self.processes = [self._serve("superlink", "superlink", port, *self._options)]
            if trouble := superlink._wait_until_healthy(self.processes[0], port):
                raise RuntimeError(f"{trouble}\n{self.tail('superlink')}")
            for part, config in enumerate(self._configs):
                pairs = " ".join(to_toml({key: config[key]}).strip().replace(" = ", "=", 1) for key in config)
                options = ["--superlink", f"127.0.0.1:{port}", "--node-config", pairs]
                self.processes.append(self._serve("supernode", f"supernode-{part}", superlink._free_port(), *options))
            self._wait_for_nodes()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        for process in self.processes:  # other processes reap them
            process.poll()

    def run(self, app: Path, settings: Mapping[str, Value], timeout: float) -> dict[str, Any]:
        """Run the Flower app in folder `app` with these settings, and wait at most `timeout` seconds for it.

        Paths in the settings must be absolute. Return the run's entry of `flwr list --format json`, with the path of
        its output as "log". Raise RuntimeError, with the end of that output, if it is not `finished:completed` in time.
        """
        name = f"run-{self._runs}"
        self._runs, began = self._runs + 1, time.monotonic()
        (config := self.home / f"{name}.toml").write_text(to_toml(settings), encoding="utf-8")
        # This waits at almost no cost. Polling `flwr list` would start a Python each time, and slow the run.
        command = ["flwr", "run", str(app.resolve()), superlink.CONNECTION, "--stream"]
        client = self._popen([*command, *(["-c", str(config)] if settings else [])], name)
        try:
            client.wait(timeout)
        except subprocess.TimeoutExpired:
            client.kill()
            client.wait()
        started = re.search(r"Successfully started run (\d+)", self._log(name).read_text(errors="replace"))
        if not started:
            raise RuntimeError(f"the run was not started\n{self.tail(name)}")
        while True:  # the output ends a moment before the run does
            entry: dict[str, Any] = self._flwr("list", "--run-id", started[1])["runs"][0]
            if entry["status"].startswith("finished") or time.monotonic() > began + timeout:
                break
        if entry["status"] != "finished:completed":
            if not entry["status"].startswith("finished"):
                self._flwr("stop", started[1])
            found = f"the run is {entry['status']} ({entry['status-details']}) after {time.monotonic() - began:.0f} s"
            raise RuntimeError(f"{found}\n{self.tail(name)}")
        return {**entry, "log": str(self._log(name))}

    def tail(self, name: str) -> str:
        """Return the last lines of a log, by its name without the suffix."""
        return "\n".join(self._log(name).read_text(errors="replace").splitlines()[-TAIL:])

    def _log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def _serve(self, kind: str, log: str, port: int, *options: str) -> subprocess.Popen[bytes]:
        return self._popen([f"flower-{kind}", "--insecure", "--host", "127.0.0.1", "--port", str(port), *options], log)

    def _popen(self, command: Sequence[str], log: str) -> subprocess.Popen[bytes]:
        with self._log(log).open("wb") as out:
            return subprocess.Popen(
                [f"{superlink.TOOLS}/{command[0]}", *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=self._environment,
                cwd=self.home,  # so that no module here shadows one of the app that nodes are sent
                start_new_session=True,
            )

    def _flwr(self, *arguments: str) -> dict[str, Any]:
        command = [f"{superlink.TOOLS}/flwr", *arguments, superlink.CONNECTION, "--format", "json"]
        done = subprocess.run(command, capture_output=True, text=True, env=self._environment, cwd=self.home)
        with suppress(ValueError):
            answer = dict(json.loads(done.stdout))
            if answer.get("success", True):
                return answer
        raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")

    def _wait_for_nodes(self) -> None:
        limit, online = time.monotonic() + READY_LIMIT, 0
        while online < len(self._configs):
            ended = next((number for number, each in enumerate(self.processes) if each.poll() is not None), None)
            if ended is not None or time.monotonic() > limit:
                log = f"supernode-{ended - 1}" if ended else "superlink"
                raise RuntimeError(f"{online} of {len(self._configs)} SuperNodes are online\n{self.tail(log)}")
            online = sum(node["status"] == "online" for node in self._flwr("supernode", "list")["nodes"])
