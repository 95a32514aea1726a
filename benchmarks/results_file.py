"""Write and read the summaries in results/: a JSON file for each suite, without weights, a run on each line."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoflip_flwr.experiment.config import RESULTLESS, Config, setting
from autoflip_flwr.experiment.idle import with_effect
from autoflip_flwr.experiment.record.suites import Entry, Suite
from autoflip_flwr.experiment.report.points import Point, final_accuracy, points
from autoflip_flwr.experiment.rules import ConfigError, Value, allowed
from autoflip_flwr.experiment.toml import parse_pairs

FOLDER = Path(__file__).parents[1] / "results"

_BEFORE: Mapping[str, Value] = {"lr-power": 0.0, "schedule": "static", "rank-by": "deviation", "initial": "scratch"}
"""What the app did before it had these settings, where it is not their default."""


@dataclass(frozen=True)
class Result:
    """A finished run as its suite's summary tells it.

    ``settings`` are those with an effect, as they were in force, but for the seed. ``bytes`` are by phase, with their
    ``total``. ``density`` is that of the prunable parameters at the end. ``gflop`` is of all clients together. The
    seconds of ``curve`` are not known. ``command`` made the suite. ``changed`` says whether the code had changed since
    ``commit``.
    """

    command: str
    settings: Mapping[str, Any]
    seed: int
    started: str
    commit: str | None
    changed: bool | None
    density: float | None
    bytes: Mapping[str, int]
    gflop: float
    curve: tuple[Point, ...]


def in_force(config: Config) -> dict[str, Value]:
    """Return the settings with an effect, but for the seed. None is left to be chosen by the others."""
    settings = with_effect(config)
    del settings["seed"]
    chosen = {name.replace("_", "-"): value for name, value in config.chosen.items()}
    return {key: chosen.get(key, value) for key, value in settings.items()}


def text_of(suite: Suite) -> str:
    """Return the summary of a suite's finished runs, in the suite's order. Seconds and paths are left out.

    A point of a ``curve`` has the round, the accuracy in [0, 1], and the MB and GFLOP that were spent up to it.

    Raises ``ValueError`` if no run is finished, or for settings that the app does not have.
    """
    done = [_line(entry) for entry in suite.entries if entry.state == "done"]
    if not done:
        raise ValueError(f"{suite.path}: no run of this suite is finished; go on with: {suite.command}")
    head = json.dumps({"suite": suite.name, "command": _command(suite.command)})
    return head[:-1] + ', "runs": [\n' + ",\n".join(done) + "\n]}\n"


def read_one(path: Path) -> list[Result]:
    """Return the runs of one summary. Raises ``ValueError`` for a file that is none."""
    try:
        told = json.loads(path.read_text("utf-8"))
        return [_result(told["command"], each) for each in told["runs"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the summary of a suite ({type(error).__name__}: {error})") from None


def read_suite(name: str) -> list[Result]:
    """Return the runs of one suite that are kept. Raises ``ValueError`` for a file that is no summary."""
    return read_one(FOLDER / f"{name}.json")


def read(folder: Path = FOLDER) -> list[Result]:
    """Return the runs of all summaries in a folder. Of runs with the same settings and seed the latest counts.

    Raises ``ValueError`` if there is no summary, and for a file that is none.
    """
    found: dict[str, Result] = {}
    for path in sorted(folder.glob("*.json")):
        for result in read_one(path):
            key = json.dumps([result.settings, result.seed], sort_keys=True)
            if key not in found or found[key].started < result.started:
                found[key] = result
    if not found:
        raise ValueError(f"{folder}: no summaries; make one: python -m benchmarks.results --from FOLDER_OF_A_SUITE")
    return list(found.values())


def _line(entry: Entry) -> str:
    about, summary, evaluated = entry.run.about, entry.run.summary, points(entry.run)
    config = Config.from_run_config(entry.settings, check_paths=False)
    accuracy = final_accuracy(evaluated)
    return json.dumps(
        {
            "settings": in_force(config),
            "seed": config.seed,
            "accuracy": None if accuracy is None else round(accuracy, 6),
            "density": summary["density"],
            "bytes": {phase: size for phase, size in summary["bytes"].items() if size or phase == "total"},
            "gflop": round(summary["flops_total"] / 1e9, 3),
            "started": about["started"],
            "commit": about["commit"],
            "changed": about["dirty"],
            "versions": about["versions"],
            "curve": [
                [each.round, round(each.accuracy, 6), round(each.megabytes, 3), round(each.gigaflops, 3)]
                for each in evaluated
            ],
        }
    )


def _result(command: str, told: Mapping[str, Any]) -> Result:
    return Result(
        command,
        _complete(told["settings"]),
        told["seed"],
        told["started"],
        told["commit"],
        told["changed"],
        told["density"],
        told["bytes"],
        told["gflop"],
        tuple(
            Point(round_, accuracy, megabytes, gigaflops, seconds=0.0)
            for round_, accuracy, megabytes, gigaflops in told["curve"]
        ),
    )


def _complete(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Add the settings that the app has got since, with the values that mean what it did before.

    Settings and values that the app has lost, of what was tried and not kept, stay as they are.
    """
    known = {key: value for key, value in settings.items() if _is_known(key, value)}
    added = in_force(Config.from_run_config({**_BEFORE, **known}, check_paths=False))
    return {**added, **settings}


def _is_known(key: str, value: Value) -> bool:
    try:
        allowed(key, setting(key).metadata["rule"], value)
    except ConfigError:
        return False
    return True


def _command(told: str) -> str:
    """Return the command of a suite without what holds for one machine alone."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("words", nargs="+")
    parser.add_argument("-c", dest="pairs", action="append", default=[])
    for option in ("--output", "--workers"):
        parser.add_argument(option)
    options, _ = parser.parse_known_args(shlex.split(told))
    *words, file = options.words
    file = Path(file).name if Path(file).is_absolute() else file
    given = {key: value for text in options.pairs for key, value in parse_pairs(text).items()}
    pairs = " ".join(f"{key}={json.dumps(value)}" for key, value in given.items() if key not in RESULTLESS)
    return shlex.join([*words, file, *(["-c", pairs] if pairs else [])])
