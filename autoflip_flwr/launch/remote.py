"""Run a Flower app on an existing SuperLink, and report how the run ended.

`flwr run --stream` exits with 0 even if the run failed. `run_app_on` therefore submits the run, shows its log, and
then asks the SuperLink until the run has finished.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoflip_flwr.launch import superlink
from autoflip_flwr.launch.screen import Screen
from autoflip_flwr.launch.superlink import TOOLS

SILENCE_LIMIT = 120.0  # seconds without an answer from the SuperLink after which we give up
POLL_INTERVAL = 2.0  # seconds


def run_app_on(connection: str, app: Path, run_config: str, screen: Screen) -> str:
    """Run the Flower app in folder `app` on the SuperLink that Flower's `config.toml` calls `connection`.

    The log is shown on the screen. Ctrl-C, SIGTERM and SIGHUP end only this command: the run goes on.

    Returns
    -------
    str
        "" for a completed run, else the reason for its failure.
    """
    with superlink._stage(keep_logs=False) as home:
        options = []
        if run_config:
            (home / "run-config.toml").write_text(run_config, encoding="utf-8")
            options = ["-c", str(home / "run-config.toml")]
        answer = _ask("run", str(app), connection, *options)
        if not answer.get("success") or not answer.get("run-id"):
            return f"the run was not started: {answer.get('error-message') or answer}"
        run_id = str(answer["run-id"])
        screen.say(f"autoflip: run {run_id} on {connection}")
        try:
            return _follow(run_id, connection, screen)
        except (KeyboardInterrupt, SystemExit):
            print(
                f"autoflip: run {run_id} goes on; flwr log {run_id} {connection} shows it, "
                f"flwr stop {run_id} {connection} ends it",
                file=sys.stderr,
            )
            raise


def _follow(run_id: str, connection: str, screen: Screen) -> str:
    """Show the log, then wait until the run ends, which is later than the log (much later if the log was cut off)."""
    superlink.stream([f"{TOOLS}/flwr", "log", run_id, connection, "--stream"], os.environ, screen)
    heard = time.monotonic()
    while time.monotonic() < heard + SILENCE_LIMIT:
        answer = _ask("list", "--run-id", run_id, connection)
        if runs := answer.get("runs"):
            heard = time.monotonic()
            status, details = str(runs[0]["status"]), str(runs[0]["status-details"])
            if status.startswith("finished"):
                found = status if details == "N/A" else details
                return "" if status == "finished:completed" else screen.reason(found)
        time.sleep(POLL_INTERVAL)
    return f"the SuperLink has not answered for {SILENCE_LIMIT:.0f} s; whether run {run_id} goes on is not known"


def _ask(*arguments: str) -> Mapping[str, Any]:
    """Return the JSON answer of `flwr <arguments>`; if it is not JSON, the output as an `error-message`."""
    command = [f"{TOOLS}/flwr", *arguments, "--format", "json"]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, start_new_session=True, check=False
    )
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        return {"error-message": " ".join((done.stdout + done.stderr).split())}
    return answer
