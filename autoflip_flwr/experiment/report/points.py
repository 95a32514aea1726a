"""Read a run's curve: accuracy by round, MB, GFLOP and second, its final accuracy, and the cost of a target."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from autoflip_flwr.experiment.evaluation import LAST
from autoflip_flwr.experiment.record.runs import Run


class Point(NamedTuple):
    """An evaluation of the global model: its accuracy in [0, 1], and what was spent up to it.

    Megabytes are 10^6 bytes of all messages, both ways. Gigaflops are the clients' 10^9 floating-point operations.
    """

    round: float
    accuracy: float
    megabytes: float
    gigaflops: float
    seconds: float


class Axis(NamedTuple):
    """What a curve is drawn over: a field of `Point`, its title and a word for a figure's title."""

    field: str
    title: str
    word: str


AXES = (
    Axis("round", "Round", "round"),
    Axis("megabytes", "Sent so far, both ways (MB)", "traffic"),
    Axis("gigaflops", "Computed by the clients so far (GFLOP)", "computation"),
    Axis("seconds", "Time so far (s)", "time"),
)


def points(run: Run) -> tuple[Point, ...]:
    """Return the evaluations of a run in the order of their rounds. Round 0 is the start."""
    found = {
        line["round"]: Point(
            line["round"],
            line["accuracy"],
            line["bytes"]["total"] / 1e6,
            sum((line.get("flops") or {}).values()) / 1e9,
            line.get("seconds") or 0.0,
        )
        for line in run.metrics
        if line.get("accuracy") is not None and (line["phase"] == "train" or line["round"] == 0)
    }
    return tuple(found[round_] for round_ in sorted(found))


def final_accuracy(evaluated: Sequence[Point]) -> float | None:
    """Return the mean accuracy of the last five evaluated rounds, the start left out; ``None`` if there is no round."""
    last = [point.accuracy for point in evaluated if point.round > 0][-LAST:]
    return statistics.fmean(last) if last else None


def reached(evaluated: Iterable[Point], target: float) -> Point | None:
    """Return the first evaluation whose accuracy is at least ``target``, or ``None``."""
    return next((point for point in evaluated if point.accuracy >= target), None)


def spread(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation, or ``None`` for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def mean_curve(runs: Sequence[Sequence[Point]]) -> list[tuple[Point, float]]:
    """Average runs over the rounds in which all of them were evaluated.

    Returns each mean point with the sample standard deviation of its accuracy, 0 for a single run.
    """
    by_round = [{point.round: point for point in run} for run in runs]
    shared = sorted(set.intersection(*map(set, by_round))) if by_round else []
    if not shared:
        return []
    found = np.array([[run[round_] for round_ in shared] for run in by_round])  # runs, rounds, fields of a point
    means = found.mean(0).tolist()
    accuracies = found[:, :, Point._fields.index("accuracy")]
    deviations = accuracies.std(0, ddof=1).tolist() if len(runs) > 1 else [0.0] * len(shared)
    return [(Point(*mean), deviation) for mean, deviation in zip(means, deviations, strict=True)]
