"""List the runs and suites of a folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from autoflip_flwr.experiment.record.runs import Run
from autoflip_flwr.experiment.record.suites import Suite, is_suite
from autoflip_flwr.experiment.report.points import final_accuracy, points
from autoflip_flwr.experiment.report.rows import density_of


class Line(NamedTuple):
    """A run or a suite, in words; what is not known is "". ``when`` is in UTC."""

    name: str
    data: str
    method: str
    density: str
    seed: str
    rounds: str
    accuracy: str
    megabytes: str
    state: str
    when: str


HEADS = ("Name", "Data", "Method", "Density", "Seed", "Rounds", "Accuracy", "MB", "State", "When (UTC)")


def lines(folder: Path) -> list[Line]:
    """Return a line for each run and suite in ``folder``, the oldest first.

    If ``folder`` is itself a run it has one line, and if it is a suite each of its runs has one. The accuracy of a run
    is the mean of its last five evaluated rounds.

    Raises ``OSError`` or ``ValueError``, which name the file, for a file that cannot be read.
    """
    if is_suite(folder):
        entries = Suite.read(folder).entries
        found = [_of_run(each.run, each.settings)._replace(name=each.name, state=each.state) for each in entries]
    elif _is_run(folder):
        run = Run.read(folder)
        found = [_of_run(run, run.settings)]
    else:
        inside = sorted(each for each in folder.iterdir() if each.is_dir())
        found = [_of_suite(Suite.read(each)) for each in inside if is_suite(each)]
        runs = [Run.read(each) for each in inside if _is_run(each)]
        found += [_of_run(run, run.settings) for run in runs]
    return sorted(found, key=lambda line: line.when or "9")


def _is_run(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _of_run(run: Run, settings: Mapping[str, Any]) -> Line:
    found, accuracy = run.summary, final_accuracy(points(run))
    density = found.get("density")
    if density is None:  # it has no mask yet
        density = _density(settings)
    total = (found.get("bytes") or {}).get("total")
    return Line(
        run.path.resolve().name,
        " ".join(str(settings[key]) for key in ("dataset", "split") if key in settings),
        str(settings.get("method") or found.get("method") or ""),
        "" if density is None else density_of(1 - density),
        str(settings.get("seed", "")),
        _rounds(found.get("rounds"), settings.get("num-server-rounds")),
        "" if accuracy is None else f"{accuracy:.2%}",
        "" if total is None else f"{total / 1e6:,.2f}",
        run.state,
        _when(run.about.get("started")),
    )


def _of_suite(suite: Suite) -> Line:
    entries = suite.entries
    done = sum(entry.state == "done" for entry in entries)
    failed = sum(entry.state == "failed" for entry in entries)
    state = f"{done} of {len(entries)} done" + (f", {failed} failed" if failed else "")
    settings = [entry.settings for entry in entries]
    return Line(
        f"{suite.path.resolve().name}/",
        _joined(each.get("dataset") for each in settings),
        _joined(each.get("method") for each in settings),
        _joined(density_of(1 - density) for each in settings if (density := _density(each)) is not None),
        _joined(each.get("seed") for each in settings),
        _joined(each.get("num-server-rounds") for each in settings),
        "",
        "",
        state,
        _when(suite.about.get("started")),
    )


def _density(settings: Mapping[str, Any]) -> float | None:
    if settings.get("method") == "fedavg":
        return 1.0
    return 1 - settings["sparsity"] if "sparsity" in settings else None


def _joined(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values if value is not None))


def _rounds(done: object, wanted: object) -> str:
    if not done:
        return ""
    return str(done) if wanted in (None, done) else f"{done} of {wanted}"


def _when(stamp: object) -> str:
    try:
        return f"{datetime.fromisoformat(str(stamp)):%Y-%m-%d %H:%M}"
    except ValueError:
        return ""
