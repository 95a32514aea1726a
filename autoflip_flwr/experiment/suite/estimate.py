"""Estimate how long runs take, from a few training steps of each kind."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from autoflip_flwr.core.choices import ASKING, EXPLORING
from autoflip_flwr.experiment import training
from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.data.load import load_for
from autoflip_flwr.experiment.data.partition import partition_by
from autoflip_flwr.experiment.evaluation import cost_of_evaluation, evaluated_rounds
from autoflip_flwr.experiment.examples import examples_to_train
from autoflip_flwr.experiment.models.build import build
from autoflip_flwr.experiment.rules import Value
from autoflip_flwr.experiment.suite.state import DONE, RUNNING, WAITING, RunState
from autoflip_flwr.server.waiting import duration

_STEPS = 4
_PER_MESSAGE = 0.02
"""Seconds per message and reply, for what is not training."""

_OF_KIND = (
    "dataset", "max-examples-per-class", "input-size", "augment",
    "model", "optimizer", "batch-size", "precision", "device",
)  # fmt: skip

Kind = tuple[Value, ...]


class Estimates:
    """The expected seconds of runs, by the measured seconds per example of each kind of training.

    Once runs are over, their real seconds correct those that are expected of the others.

    Parameters
    ----------
    speeds : Mapping[Kind, tuple[float, int]]
        Seconds per example, and number of training examples, by :func:`kind_of` a run.
    """

    def __init__(self, speeds: Mapping[Kind, tuple[float, int]]) -> None:
        self._speeds = speeds

    @classmethod
    def measured(cls, configs: Iterable[Config]) -> Estimates:
        """Time a few steps of each kind of training that the runs have. It takes a second or two for each."""
        speeds: dict[Kind, tuple[float, int]] = {}
        for config in configs:
            if kind_of(config) not in speeds:
                speeds[kind_of(config)] = _speed(config)
        return cls(speeds)

    def of(self, run: RunState) -> float:
        """Return the expected seconds of a run; 0 if nothing is known of its kind."""
        config = run.planned.config
        speed, examples = self._speeds.get(kind_of(config), (0.0, 0))
        per_round = config.fraction_train * examples * config.local_epochs
        explored = 0.0
        if config.method in ASKING and not run.exploration:
            epochs = config.exploration_epochs if config.method in EXPLORING else 1
            explored = config.asked / config.nodes * examples * epochs
        cost = cost_of_evaluation(config.test_examples or examples // 5, per_round)
        evaluations = len(evaluated_rounds(config.num_server_rounds, config.evaluate_every, cost))
        rounds = config.num_server_rounds
        messages = config.nodes * (config.fraction_train * rounds + 1) * _PER_MESSAGE
        return speed * (explored + per_round * (rounds + cost * evaluations)) + messages

    def left(self, runs: Sequence[RunState]) -> float:
        """Return the seconds that are left for all runs, made one after another."""
        done = [run for run in runs if run.state == DONE and run.worked is not None]
        expected = sum(self.of(run) for run in done)
        factor = sum(run.worked or 0.0 for run in done) / expected if expected else 1.0
        waiting = sum(self.of(run) for run in runs if run.state == WAITING)
        return factor * (waiting + sum(self.of(run) * (1 - _share(run)) for run in runs if run.state == RUNNING))

    def told(self, run: RunState) -> str:
        """Return the expected duration of a run, for a reader."""
        return duration(self.of(run))

    def told_left(self, runs: Sequence[RunState], workers: int) -> str:
        """Return the duration that is left for all runs, made so many at a time, for a reader."""
        return duration(self.left(runs) / workers)


def kind_of(config: Config) -> Kind:
    """Return what decides the seconds per example, and the number of examples."""
    settings = config.as_dict()
    return tuple(settings[key] for key in _OF_KIND)


def _share(run: RunState) -> float:
    return int(run.last_line().get("round", 0)) / run.planned.config.num_server_rounds


def _speed(config: Config) -> tuple[float, int]:
    data = load_for(config)
    rows = np.concatenate(partition_by(config, data, config.nodes))
    model = build(config.model, data.inputs.shape, data.classes, config.seed, kind=data.inputs.kind)
    model.to(device := training.choose_device(config.device))
    seconds = 0.0
    with training.threads(1):
        for steps in (1, _STEPS):  # the first step also makes what later ones reuse
            some = examples_to_train(data, rows[: steps * config.batch_size]).to(device)
            began = time.perf_counter()
            training.train(
                model, some, config, epochs=1, patience=None, lr=config.lr, weight_decay=config.weight_decay, mask=None,
                seed=0,
            )  # fmt: skip
            seconds = (time.perf_counter() - began) / len(some)
    return seconds, len(rows)
