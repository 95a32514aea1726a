"""Average results over seeds, and set each row beside FedAvg and plain gradual pruning."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from autoflip_flwr.core.choices import DENSE, EXCHANGING, METHODS
from autoflip_flwr.experiment.config import Config, setting
from autoflip_flwr.experiment.report.points import Point, final_accuracy, mean_curve, spread
from benchmarks.results_file import Result, in_force

_TOLD = ("dataset", "model", "method", "sparsity", "schedule", "values", "values-up", "values-down")
"""Settings that a row tells in fields of their own, together with the rounds."""
_ROUNDS = "num-server-rounds"


@dataclass(frozen=True)
class Row:
    """Results that differ in their seed alone."""

    settings: Mapping[str, Any]
    results: tuple[Result, ...]

    @property
    def fields(self) -> dict[str, Any]:
        """What the row is of: ``density`` as asked for, and ``schedule`` ``None`` where nothing is pruned."""
        settings, method = self.settings, self.settings["method"]
        up, down = (settings[key] or settings["values"] for key in ("values-up", "values-down"))
        return {
            "data": settings["dataset"],
            "model": settings["model"],
            "method": method,
            "density": 1.0 if method in DENSE else round(1 - settings["sparsity"], 12),
            "schedule": _schedule(settings),
            "values": up if up == down else f"{up} up, {down} down",
            "rounds": settings[_ROUNDS],
        }

    @property
    def accuracies(self) -> list[float]:
        """The accuracy of each run in [0, 1]: the mean of its last five evaluated rounds."""
        return [value for each in self.results if (value := final_accuracy(each.curve)) is not None]

    @property
    def accuracy(self) -> float:
        """The mean accuracy."""
        return statistics.fmean(self.accuracies)

    @property
    def error(self) -> float | None:
        """The standard error of the mean accuracy, or ``None`` for one seed."""
        deviation = spread(self.accuracies)
        return None if deviation is None else deviation / math.sqrt(len(self.accuracies))

    @property
    def megabytes(self) -> float:
        """The mean traffic, in 10^6 bytes of all messages."""
        return statistics.fmean(each.bytes["total"] / 1e6 for each in self.results)

    @property
    def gigaflops(self) -> float:
        """The clients' mean computation."""
        return statistics.fmean(each.gflop for each in self.results)

    @property
    def curve(self) -> list[tuple[Point, float]]:
        """The mean curve without the start, with the standard error of its accuracy."""
        size = math.sqrt(len(self.results))
        return [(at, sd / size) for at, sd in mean_curve([each.curve for each in self.results]) if at.round > 0]

    def accuracy_at(self, megabytes: float) -> float | None:
        """Return the mean accuracy that had been reached with so much traffic, interpolated between evaluated rounds.

        After the end it is the last one, and before the first evaluated round ``None``.
        """
        runs = [[at for at in each.curve if at.round > 0] for each in self.results]
        if any(megabytes < run[0].megabytes for run in runs):
            return None
        return statistics.fmean(
            np.interp(megabytes, [at.megabytes for at in run], [at.accuracy for at in run]) for run in runs
        )


def rows_of(results: Iterable[Result]) -> list[Row]:
    """Group results into rows: by data, model and rounds, then from high density to low, then by method."""
    grouped: dict[str, list[Result]] = {}
    for each in results:
        grouped.setdefault(json.dumps(each.settings, sort_keys=True), []).append(each)
    rows = [Row(group[0].settings, tuple(sorted(group, key=lambda each: each.seed))) for group in grouped.values()]
    return sorted(rows, key=_place)


def told(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return what each row says as JSON values.

    Accuracies are in [0, 1], ``points_to_fedavg`` is in percentage points, and ``mb`` in 10^6 bytes. FedAvg is that of
    the same data, model, training and rounds. Gradual pruning has the same density, too. Both have the app's default
    settings else. What is compared with a missing row is ``None``. ``settings`` are those in which rows of a data set
    differ.
    """
    plain = [row for row in rows if _is_plain(row)]
    return [_told(row, rows, plain) for row in rows]


def _told(row: Row, rows: Sequence[Row], plain: Sequence[Row]) -> dict[str, Any]:
    fields = row.fields
    dense = {key: value for key, value in _training(row).items() if key != "lr-power"}  # it does nothing without a mask
    fedavg = next((each for each in plain if each.fields["method"] == "fedavg" and _training(each) == dense), None)
    same = ("gradual", fields["density"], _training(row))
    gradual = next((e for e in plain if (e.fields["method"], e.fields["density"], _training(e)) == same), None)
    return {
        **fields,
        "seeds": len(row.results),
        "accuracy_mean": round(row.accuracy, 6),
        "accuracy_se": _rounded(row.error, 6),
        "mb": round(row.megabytes, 3),
        "gflop": round(row.gigaflops, 3),
        "share_of_fedavg_mb": fedavg and round(row.megabytes / fedavg.megabytes, 4),
        "points_to_fedavg": fedavg and round(100 * (row.accuracy - fedavg.accuracy), 3),
        "fedavg_accuracy_at_equal_mb": fedavg and _rounded(fedavg.accuracy_at(row.megabytes), 6),
        "gradual_accuracy_at_equal_mb": gradual and _rounded(gradual.accuracy_at(row.megabytes), 6),
        "settings": _apart(row, [each for each in rows if each.fields["data"] == fields["data"]]),
    }


def _schedule(settings: Mapping[str, Any]) -> str | None:
    method = str(settings["method"])
    if method in DENSE:
        return None
    if method == "autoflip":
        return str(settings["schedule"])
    return method if method in ("gradual", *EXCHANGING) else "static"


def _training(row: Row) -> dict[str, Any]:
    """Return the settings of data, model, training and rounds, which every method has."""
    sections = ("Data and nodes", "Model and training", "Rounds")
    return {key: value for key, value in row.settings.items() if _section(key) in sections}


def _is_plain(row: Row) -> bool:
    """Return whether everything else but the density is as the app has it by default."""
    defaults = _defaults(row.settings["method"])
    return all(
        value == defaults[key]
        for key, value in row.settings.items()
        if _section(key) in ("Pruning", "Values") and key not in ("sparsity", "schedule")
    )


@cache
def _defaults(method: str) -> dict[str, Any]:
    enough = 200  # rounds, for methods that change the mask every 50
    return {**Config().as_dict(), **in_force(Config(method=method, num_server_rounds=enough))}


@cache
def _section(key: str) -> object:
    return setting(key).metadata["section"] if key in Config().as_dict() else None


def _apart(row: Row, of_data: Sequence[Row]) -> dict[str, Any]:
    def differs(key: str) -> bool:
        return len({repr(each.settings[key]) for each in of_data if key in each.settings}) > 1

    return {key: value for key, value in row.settings.items() if key not in (*_TOLD, _ROUNDS) and differs(key)}


def _place(row: Row) -> tuple[Any, ...]:
    fields = row.fields
    return (
        *(fields[key] for key in ("data", "model", "rounds")),
        -fields["density"],
        METHODS.index(fields["method"]),
        fields["schedule"] or "",
        fields["values"],
        json.dumps(row.settings, sort_keys=True),
    )


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
