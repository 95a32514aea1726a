"""The `autoflip` command: what it refuses, what it hands on, and two real runs."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import uuid
from pathlib import Path
from typing import Any

import pytest
from projects import write_project

from autoflip_flwr.core.choices import DATASETS
from autoflip_flwr.experiment.rules import Value
from autoflip_flwr.launch import cli, remote
from autoflip_flwr.launch.screen import Screen
from autoflip_flwr.launch.superlink import Resources

ROOT = Path(__file__).parents[2]

SERVER = """
import logging
import time

import numpy as np
from flwr.app import ArrayRecord
from flwr.common.logger import log
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid, context):
    if context.run_config["failure"]:
        log(logging.ERROR, "autoflip: error: note = %r: is too short", context.run_config["note"])
        raise ValueError("unusable")
    print("the server app runs", flush=True)
    time.sleep(context.run_config["pause"])
    strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=3)
    result = strategy.start(grid, ArrayRecord([np.zeros(2)]), num_rounds=1)
    print(context.run_config["note"], "mean", result.arrays.to_numpy_ndarrays()[0].tolist())
"""

CLIENT = """
import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    arrays, metrics = ArrayRecord([np.ones(2)]), MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
"""


class Recorder:
    """Stands in for `run_app`."""

    def __init__(self, reason: str = "") -> None:
        self.reason = reason
        self.calls: list[tuple[Path, dict[str, Any], Resources, bool]] = []

    def __call__(self, app: Path, run_config: str, resources: Resources, screen: Screen, keep_logs: bool) -> str:
        self.calls.append((app, tomllib.loads(run_config), resources, keep_logs))
        return self.reason


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(cli, "run_app", recorder)
    return recorder


@pytest.fixture
def tiny_app(tmp_path: Path) -> Path:
    config = 'note = ""\nfailure = false\npause = 0.0'
    return write_project(tmp_path / "tiny-app", server=SERVER, client=CLIENT, config=config)


def exit_code(*arguments: str) -> int:
    try:
        return cli.main(arguments)
    except SystemExit as ending:
        return int(ending.code or 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-c", "sparsity=1.2"], "sparsity = 1.2: must be a number in [0, 1)"),
        (
            ["-c", "dataset='foo'"],
            f"dataset = 'foo': must be one of {', '.join(DATASETS)}, or module:callable",
        ),
        (["-c", "sparsty=0.5"], "sparsty = 0.5: no such setting; did you mean sparsity?"),
        (["-c", "a.b=0.5"], None),
        (["-c", "lr=0.1", "-c", "seed=2 gamma=-1"], "gamma = -1.0: must be a number >= 0"),
        (["-c", "name=abc"], 'name=abc: not a TOML value (a string needs quotes: name="...")'),
        (["-c", "name"], "-c 'name': 'name' is not a key=value pair (no spaces around '=')"),
        (["-c", "lr = 0.1"], "-c 'lr = 0.1': 'lr' is not a key=value pair (no spaces around '=')"),
        (["-c", "lr=[0.1]"], "lr = [0.1]: must be a boolean, a number or a string"),
        (["-c", "lr=2026-11-22"], "lr = datetime.date(2026, 11, 22): must be a boolean, a number or a string"),
        (
            ["-c", "data-dir='no/such'"],
            f"data-dir = '{Path.cwd()}/no/such': must be an existing folder; docs/data.md says with which files",
        ),
        (
            ["--nodes", "1"],
            "min-explorers = 2: must not be more than nodes = 1; for a mask of 1 node, min-explorers=1",
        ),
        (
            ["-c", "min-explorers=11"],
            "min-explorers = 11: must not be more than nodes = 10; for a mask of 10 nodes, min-explorers=10",
        ),
        (
            ["-c", 'data-dir="C:\\Data"'],
            'data-dir="C:\\Data": not a TOML value (a path needs quotes, and no backslashes between double ones: '
            'data-dir="C:/Data")',
        ),
        (
            ["-c", "data-dir=C:\\Data"],
            "data-dir=C:\\Data: not a TOML value (a path needs quotes, and no backslashes between double ones: "
            'data-dir="C:/Data")',
        ),
        (
            ["-c", 'output-dir="C:\\temp"'],
            f"output-dir = '{Path.cwd()}/C:\\temp': holds a control character. In double quotes a backslash begins an "
            "escape: write a Windows path with forward slashes, or in single quotes",
        ),
        (["--nodes", "0"], "argument --nodes: must be an integer >= 1, not '0'"),
        (["--cpus", "0.5"], "argument --cpus: must be an integer >= 1, not '0.5'"),
        (["--gpus", "nan"], "argument --gpus: must be a number >= 0, not 'nan'"),
        (["--config", "no-such.toml"], "no-such.toml: No such file or directory"),
        (["--config", str(ROOT / "tests")], f"{ROOT / 'tests'}: Is a directory"),
        (["no-such-app"], "no-such-app: no Flower app there (no pyproject.toml)"),
        (["--wrong"], "unrecognized arguments: --wrong"),
    ],
)
def test_refusals(
    arguments: list[str], message: str | None, recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    app = [] if arguments[0] == "no-such-app" else [str(ROOT)]
    assert exit_code("run", *app, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("autoflip: error: ")
    assert error.count("\n") == 1
    if message is not None:
        assert error == f"autoflip: error: {message}\n"
    assert recorder.calls == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr = ", "recipe.toml: not a TOML file: Invalid value (at end of document)"),
        ("lr = -1", "lr = -1.0: must be a number > 0"),
        ("[lr]\nx = 1", "lr.x = 1: no such setting"),
        ("lr = [1]", "lr = [1]: must be a boolean, a number or a string"),
    ],
)
def test_refused_recipes(
    text: str, message: str, recorder: Recorder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    assert exit_code("run", str(ROOT), "--config", str(tmp_path / "recipe.toml")) == 2
    assert message in capsys.readouterr().err
    assert recorder.calls == []


def test_a_recipe_that_is_no_text(recorder: Recorder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.toml").write_bytes(b"\xff\xfe\x00")
    assert exit_code("run", str(ROOT), "--config", str(tmp_path / "recipe.toml")) == 2
    assert "recipe.toml: not a TOML file" in capsys.readouterr().err


def test_what_is_handed_on(recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "recipe.toml").write_text('lr = 0.5\nseed = 7\ndata-dir = "data"\nname = "from-file"\n')
    monkeypatch.chdir(tmp_path)
    arguments = ["--config", "recipe.toml", "-c", "lr=0.25 nodes=4", "-c", "name='it'", "--gpus", "0", "--cpus", "2"]
    assert exit_code("run", str(ROOT), *arguments, "--keep-logs") == 0
    settings = {
        "lr": 0.25,
        "seed": 7,
        "name": "it",
        "nodes": 4,
        "data-dir": str(tmp_path / "data"),
        "output-dir": str(tmp_path / "runs"),
    }
    assert recorder.calls == [(ROOT, settings, Resources(4, 2, 0.0), True)]


def test_number_of_nodes(recorder: Recorder) -> None:
    for arguments in ([], ["-c", "nodes=4"], ["-c", "nodes=4", "--nodes", "6"]):
        assert exit_code("run", str(ROOT), *arguments) == 0
    assert [call[2].nodes for call in recorder.calls] == [10, 4, 6]
    assert [call[1]["nodes"] for call in recorder.calls] == [10, 4, 6]


def test_settings_of_another_app_pass_unchecked(recorder: Recorder, tiny_app: Path) -> None:
    assert exit_code("run", str(tiny_app), "-c", "note='runs' sub.key=7 sparsity=3 data-dir='x'") == 0
    settings = {"note": "runs", "sub": {"key": 7}, "sparsity": 3, "data-dir": "x"}
    assert recorder.calls == [(tiny_app, settings, Resources(10, 1, 0.0), False)]


class There:
    """Stands in for `run_app_on`."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Path, dict[str, Any]]] = []

    def __call__(self, connection: str, app: Path, run_config: str, screen: Screen) -> str:
        self.calls.append((connection, app, tomllib.loads(run_config)))
        return ""


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Flower's configuration knows a SuperLink by the name of site."""
    (tmp_path / "config.toml").write_text('[superlink.site]\naddress = "127.0.0.1:18000"\n')
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch, site: None) -> There:
    there = There()
    monkeypatch.setattr(cli, "run_app_on", there)
    return there


def test_a_superlink_gets_paths_as_they_are(recorder: Recorder, there: There, tiny_app: Path) -> None:
    settings = "data-dir='no/such' exploration='/no/such' output-dir='out'"
    assert exit_code("run", str(ROOT), "--superlink", "site", "--nodes", "3", "-c", settings) == 0
    assert exit_code("run", str(ROOT), "--superlink", "site") == 0
    assert exit_code("run", str(tiny_app), "--superlink", "site", "-c", "nodes=7 any=1") == 0
    handed = {"data-dir": "no/such", "exploration": "/no/such", "output-dir": "out", "nodes": 3}
    assert there.calls == [("site", ROOT, handed), ("site", ROOT, {}), ("site", tiny_app, {"nodes": 7, "any": 1})]
    assert recorder.calls == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-c", "model='nope'"], "model = 'nope': must be one of"),
        (["--nodes", "1"], "min-explorers = 2: must not be more than nodes = 1"),
        (["--cpus", "2"], "--cpus, --gpus and --keep-logs are of the simulation: not with --superlink"),
        (["--gpus", "0"], "--cpus, --gpus and --keep-logs are of the simulation: not with --superlink"),
        (["--keep-logs"], "--cpus, --gpus and --keep-logs are of the simulation: not with --superlink"),
    ],
)
def test_what_is_refused_for_a_superlink(
    arguments: list[str], message: str, there: There, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("run", str(ROOT), "--superlink", "site", *arguments) == 2
    assert message in capsys.readouterr().err
    assert there.calls == []


def test_nodes_of_another_app_are_not_ours_to_set(
    there: There, tiny_app: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("run", str(tiny_app), "--superlink", "site", "--nodes", "3") == 2
    assert "--nodes with --superlink is a setting of autoflip-flwr" in capsys.readouterr().err
    assert there.calls == []


FLWR = """#!{python}
import json, os, sys
calls = open(os.path.join(os.path.dirname(__file__), "calls"), "a+")
calls.seek(0)
asked = calls.read().count("list")
calls.write(sys.argv[1] + "\\n")
answers = {answers!r}
if sys.argv[1] == "log":
    print("autoflip: error: lr = 0: is wrong" if "fail" in answers[-1] else "all is well")
else:
    print(answers[min(asked, len(answers) - 1)] if sys.argv[1] == "list" else {started!r})
"""


def listed(status: str, details: str = "N/A") -> str:
    return json.dumps({"runs": [{"status": status, "status-details": details}]})


STARTED = '{"success": true, "run-id": "12"}'


@pytest.mark.parametrize(
    ("started", "answers", "reason"),
    [
        (STARTED, [listed("running"), "no JSON", listed("finished:completed")], ""),
        (STARTED, [listed("finished:failed", "it fell over")], "lr = 0: is wrong; it fell over"),
        (STARTED, [listed("finished:stopped")], "finished:stopped"),
        (STARTED, ["no JSON"], "the SuperLink has not answered for 1 s; whether run 12 goes on is not known"),
        ('{"success": false, "error-message": "no such name"}', [""], "the run was not started: no such name"),
        ("a wall of words", [""], "the run was not started: a wall of words"),
    ],
)
def test_the_end_of_a_run_on_a_superlink(
    started: str, answers: list[str], reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "flwr").write_text(FLWR.format(python=sys.executable, answers=answers, started=started))
    (tmp_path / "flwr").chmod(0o755)
    monkeypatch.setattr(remote, "TOOLS", tmp_path)
    monkeypatch.setattr(remote, "POLL_INTERVAL", 0.01)
    monkeypatch.setattr(remote, "SILENCE_LIMIT", 1.0)
    assert remote.run_app_on("site", tmp_path, "lr = 1\n", Screen(sys.stdout)) == reason


def test_an_interrupted_command_leaves_the_run_on_a_superlink(
    monkeypatch: pytest.MonkeyPatch, site: None, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: str) -> str:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
        return ""

    monkeypatch.setattr(remote, "_ask", lambda *_: {"success": True, "run-id": "12"})
    monkeypatch.setattr(remote, "_follow", interrupt)
    assert exit_code("run", str(ROOT), "--superlink", "site") == 130
    assert "run 12 goes on; flwr log 12 site shows it, flwr stop 12 site ends it" in capsys.readouterr().err


def test_a_failed_run(recorder: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    recorder.reason = "no idea"
    assert exit_code("run", str(ROOT)) == 1
    assert capsys.readouterr().err == "autoflip: the run failed: no idea\n"


def test_toml_round_trip() -> None:
    settings: dict[str, Value] = {"a": True, "b": 3, "c": 1e-05, "d": 'q"\\\n\x7f\x00é🙂', "e": "", "f": 1e300}
    assert tomllib.loads(cli.to_toml(settings)) == settings


class Started:
    """The command as a process of its own, whose processes and files can be told from all others."""

    def __init__(self, cwd: Path, *arguments: str) -> None:
        self.mark = f"AUTOFLIP_TEST={uuid.uuid4()}"
        self.temporary = Path(tempfile.mkdtemp(dir="/tmp"))  # short, so that the command makes its home in it
        name, value = self.mark.split("=")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "autoflip_flwr.launch.cli", "run", *arguments],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(self.temporary), name: value},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )

    def end(self) -> tuple[int, str, str]:
        output, error = self.process.communicate(timeout=300)
        return self.process.returncode, output, error

    def close(self) -> None:
        assert self.left_behind() == []
        self.temporary.rmdir()

    def left_behind(self) -> list[str]:
        found = [str(path) for path in self.temporary.iterdir()]
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                # Ray writes over its workers' environment, but these name its folder or the SuperLink's port.
                seen = (folder / "environ").read_bytes() + (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if self.mark.encode() in seen or str(self.temporary).encode() in seen:
                found.append(str(folder))
        return found


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


@pytest.mark.runs
@needs_proc
def test_a_real_run(tiny_app: Path) -> None:
    run = Started(tiny_app.parent, "tiny-app", "--nodes", "3", "-c", "note='a \"b\"'")
    code, output, error = run.end()
    assert (code, error) == (0, ""), output
    assert 'a "b" mean [1.0, 1.0]' in output
    run.close()


@pytest.mark.runs
@needs_proc
def test_a_real_run_that_fails(tiny_app: Path) -> None:
    run = Started(tiny_app.parent, "tiny-app", "--nodes", "3", "-c", "failure=true note='x'")
    code, output, error = run.end()
    assert code == 1, output
    assert error.startswith("autoflip: the run failed: note = 'x': is too short; ")
    assert "unusable" in error
    run.close()


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run(tiny_app: Path, number: signal.Signals, code: int) -> None:
    run = Started(tiny_app.parent, "tiny-app", "--nodes", "3", "-c", "pause=300.0")
    assert run.process.stdout is not None
    while "the server app runs" not in run.process.stdout.readline():
        assert run.process.poll() is None
    time.sleep(12)  # Ray and its workers start meanwhile
    assert len(run.left_behind()) > 8
    run.process.send_signal(number)
    assert run.end()[0] == code
    run.close()
