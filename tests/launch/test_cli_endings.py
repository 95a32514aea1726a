"""What the command says at the end of a run that has failed or was interrupted, and that it warns of idle settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autoflip_flwr.experiment.record.folder import RunRecord
from autoflip_flwr.launch import cli
from autoflip_flwr.launch.screen import Screen

ROOT = Path(__file__).parents[2]


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    return RunRecord.create(tmp_path, "a b", {"name": "a b", "method": "autoflip"})


def ending_with(end, record: RunRecord):
    """A stand-in for a run that says where its record is, and then ends."""

    def run(app: Path, run_config: str, resources: object, screen: Screen, keep_logs: bool) -> str:
        screen.feed(f"INFO :      run record: {record.path}\n")
        return end()

    return run


def interrupted() -> str:
    raise KeyboardInterrupt


def test_a_failed_run_has_its_report_and_the_reason_is_the_last_line(record, monkeypatch, capfd):
    monkeypatch.setattr(cli, "run_app", ending_with(lambda: "the SuperLink exited with code 1", record))
    assert cli.main(["run", str(ROOT)]) == 1
    said = capfd.readouterr()
    assert said.out.splitlines() == [
        f"run record: {record.path}",
        f"run record: {record.path}",
        f"report: {record.path / 'report.html'}",
    ]
    assert said.err == "autoflip: the run failed: the SuperLink exited with code 1\n"
    assert "<strong>the SuperLink exited with code 1</strong>" in (record.path / "report.html").read_text("utf-8")


def test_an_interrupted_run_tells_how_to_go_on(record, monkeypatch, capfd):
    (record.path / "checkpoint").mkdir()
    (record.path / "checkpoint" / "round-00002.safetensors").write_bytes(b"")
    monkeypatch.setattr(cli, "run_app", ending_with(interrupted, record))
    assert cli.main(["run", str(ROOT), "--nodes", "4", "-c", "name='a-b'"]) == 130
    said = capfd.readouterr()
    assert said.err == "autoflip: interrupted\n"
    command = said.out.splitlines()[-1].removeprefix("to go on with it: ").partition("autoflip run ")[2]
    assert command == f"{ROOT} --nodes 4 -c 'name='\"'\"'a-b'\"'\"'' -c 'resume=\"{record.path}\"'"
    assert json.loads((record.path / "failure.json").read_text())["reason"] == "interrupted"


def test_the_apps_own_reason_stays(record, monkeypatch):
    record.fail("no explorer answered")
    monkeypatch.setattr(cli, "run_app", ending_with(lambda: "finished:failed", record))
    assert cli.main(["run", str(ROOT)]) == 1
    assert json.loads((record.path / "failure.json").read_text())["reason"] == "no explorer answered"


def test_typed_settings_that_do_nothing_are_warned_of_and_those_of_a_recipe_are_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "run_app", lambda *_: "")
    (tmp_path / "recipe.toml").write_text("sparsity = 0.5\n")
    recipe = ["run", str(ROOT), "--config", str(tmp_path / "recipe.toml")]
    assert cli.main([*recipe, "-c", 'method="fedavg" gamma=0']) == 0
    assert capsys.readouterr().err == (
        "autoflip: warning: gamma does nothing with method = 'fedavg', only with 'autoflip' or 'sequential-leak'\n"
    )
