"""The report of a run that has failed, was interrupted or has gone on, and a summary without empty rows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from autoflip_flwr.experiment.record.folder import RunRecord
from autoflip_flwr.experiment.record.summary import summary_rows
from autoflip_flwr.experiment.report import report

CONFIG = {"name": "demo", "method": "autoflip", "dataset": "digits", "model": "cnn", "num-server-rounds": 2}
NO_BYTES = {
    "exploration_up": 0,
    "exploration_down": 0,
    "mask_down": 0,
    "train_up": 500,
    "train_down": 500,
    "other": 9,
    "total": 1009,
}


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    return RunRecord.create(tmp_path, "demo", CONFIG)


def page(record: RunRecord) -> str:
    return report.write(record.path).read_text("utf-8")


def rows(text: str) -> list[list[str]]:
    """The cells of each row of a page's tables."""
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr[^>]*>(.*?)</tr>", text)]


def test_a_failed_run_has_a_report_with_its_reason(record: RunRecord):
    record.fail("no explorer answered: <why>")
    assert "This run is not complete: <strong>no explorer answered: &lt;why&gt;</strong>" in page(record)
    assert json.loads((record.path / "failure.json").read_text())["reason"] == "no explorer answered: <why>"


def test_a_run_that_is_complete_in_the_end_has_no_failure(record: RunRecord):
    record.fail("it was interrupted")
    record.finish({"method": "autoflip", "rounds": 2}, {}, None)
    assert not (record.path / "failure.json").exists()
    assert "not complete" not in page(record)


def test_a_complete_run_that_has_gone_on_and_failed_is_not_complete(record: RunRecord):
    record.finish({"method": "autoflip", "rounds": 2}, {}, None)
    record.fail("the disk is full")
    assert "<strong>the disk is full</strong>" in page(record)


def test_incidents_are_a_table(record: RunRecord):
    incidents = [
        {"kind": "errors", "phase": "train", "round": 3, "node": 7, "reason": "<bad>"},
        {"kind": "unchanged", "phase": "train", "round": 4, "node": None, "reason": "no reply counts"},
    ]
    record.write_incidents(incidents)
    shown = rows(page(record))
    at = shown.index(["Round", "Phase", "Node", "What", "Reason"])
    assert shown[at + 1 : at + 3] == [
        ["3", "train", "7", "errors", "&lt;bad&gt;"],
        ["4", "train", "-", "unchanged", "no reply counts"],
    ]


def test_of_many_incidents_the_first_are_shown(record: RunRecord):
    record.write_incidents(
        [{"kind": "errors", "phase": "train", "round": n, "node": 0, "reason": ""} for n in range(1203)]
    )
    text = page(record)
    assert text.count("<td>errors</td>") == 200
    assert "1,003 more are in incidents.json." in text


def test_a_run_that_has_gone_on_shows_the_settings_it_ended_with(record: RunRecord):
    record.goes_on({**CONFIG, "num-server-rounds": 9}, 2)
    shown = rows(page(record))
    assert ["num-server-rounds", "9"] in shown
    assert ["resumed.1.after", "2"] in shown


def test_a_fedavg_summary_has_no_empty_rows_and_no_saving():
    rows = dict(
        summary_rows(
            {
                "method": "fedavg",
                "bytes": NO_BYTES,
                "dense_bytes": 1000,
                "seconds_total": 3.0,
                "seconds": {"exploration": 0.0, "train": 2.0},
                "failures": {"rejected": 0, "errors": 0, "absent": 0},
            }
        )
    )
    assert list(rows) == ["Method", "Training, up", "Training, down", "Other", "Total sent", "Time", "Failures"]
    assert rows["Time"] == "3.0 s (train 2.0 s)"
    assert rows["Failures"] == "none"


def test_a_run_that_saved_nothing_says_so():
    rows = dict(summary_rows({"method": "autoflip", "bytes": {"total": 2_000_000}, "dense_bytes": 1_000_000}))
    assert rows["Saving"] == "none: dense FedAvg would be 1.000 MB"
