"""Track a run: central evaluation, progress, and the run record, for AutoFLIP and FedAvg alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from logging import INFO
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.common.logger import log
from torch import nn

from autoflip_flwr.core.health import problems
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.costs.ledger import Ledger
from autoflip_flwr.experiment import training
from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.examples import Examples
from autoflip_flwr.experiment.models.flops import flops_per_example
from autoflip_flwr.experiment.powerpropagation import as_weights
from autoflip_flwr.experiment.record.folder import RunRecord
from autoflip_flwr.experiment.record.summary import summary_table
from autoflip_flwr.server.waiting import duration
from autoflip_flwr.wire.records import to_arrays, to_record


class Tracker:
    """Evaluates the model between rounds, and writes the run record while the run goes on.

    Parameters
    ----------
    record : RunRecord
        Where to write.
    config : Config
        The run's settings.
    model : nn.Module
        A model for the evaluation, on the device to use.
    examples : Examples
        The test set, on the model's device.
    ledger : Ledger
        The run's costs so far. It gets the FLOPs of an example from here.
    mask : Callable[[], Mask | None]
        Returns the mask in force.
    evaluated : Collection[int]
        The rounds after which the model is evaluated; 0 is the start.
    exploration_seconds : float
        Duration of an exploration that was reused from an earlier run.
    """

    def __init__(
        self,
        record: RunRecord,
        config: Config,
        model: nn.Module,
        examples: Examples,
        ledger: Ledger,
        mask: Callable[[], Mask | None],
        evaluated: Collection[int],
        exploration_seconds: float = 0.0,
    ) -> None:
        self.record, self._config, self._model, self._ledger, self._mask = record, config, model, ledger, mask
        self._examples, self._evaluated = examples, evaluated
        self._began = self._rounds_began = time.monotonic()
        self.exploration_seconds = exploration_seconds
        self._explored_before = exploration_seconds
        self._accuracies: dict[int, float] = {}
        self._rounds = 0
        self._resumed: list[int] = []
        self._writes = not config.resume  # a resumed record is not written before it is known that it can be resumed
        # counted since the last line of the record
        self._nodes, self._losses, self._incidents = 0, list[float](), 0
        self._evaluating = 0.0  # seconds
        ledger.flops_per_example = flops_per_example(model, examples.inputs.shape, kind=examples.inputs.kind)

    def state(self) -> dict[str, object]:
        """Return the record's state for a checkpoint, as JSON types."""
        return {
            "size": self.record.size(),
            "seconds": self._seconds(),
            "rounds": time.monotonic() - self._rounds_began,
            "evaluating": self._evaluating,
            "exploration": self.exploration_seconds,
            "done": self._rounds,
            "accuracies": list(self._accuracies.items()),
            "resumed": self._resumed,
            "incidents": self._incidents,
        }

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Resume the record of an interrupted run; ``None`` if it finished no round."""
        self._writes = True
        self.record.forget_failure()
        if state is None:
            self.record.shorten(0)
            self.record.goes_on(self._config.as_dict(), 0)
            return
        self.record.shorten(state["size"])
        now = time.monotonic()
        self._began = now - state["seconds"] + self._explored_before
        self._rounds_began, self._evaluating = now - state["rounds"], state["evaluating"]
        self.exploration_seconds = state["exploration"]
        self._accuracies, self._incidents = dict(state["accuracies"]), state["incidents"]
        self._rounds = state["done"]
        self._resumed = [*state["resumed"], self._rounds]
        self.record.goes_on(self._config.as_dict(), self._rounds)

    def observe(self, phase: str, replies: list[Message]) -> None:
        """Note an exchange's replies. Write a line of the record for a batch of explorers."""
        if phase not in ("exploration", "train") or not replies:
            return
        found = [record for reply in replies if reply.has_content() for record in reply.content.metric_records.values()]
        losses = [float(record["train-loss"]) for record in found if isinstance(record.get("train-loss"), int | float)]  # type: ignore[arg-type]
        self._nodes += len(found)  # a round has a second exchange if nodes lacked the mask
        self._losses += [loss for loss in losses if math.isfinite(loss)]  # the replies are not judged yet
        if phase == "exploration":
            self.exploration_seconds = time.monotonic() - self._began
            self._append("exploration", 0, None, None)
            log(INFO, "[exploration] %d explorers, %s sent, %s", len(found), self._sent(), duration(self._seconds()))

    def evaluate(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Test the global model if this is a round to do so; write the round's line, and log progress.

        This is Flower's ``evaluate_fn``. It returns ``None`` for a round without a test.
        """
        if server_round == 0:
            self._rounds_began = time.monotonic()
        self._rounds = server_round
        loss = accuracy = None
        if server_round in self._evaluated:
            began = time.monotonic()
            training.set_arrays(self._model, [array.numpy() for array in arrays.values()])
            with as_weights(self._model, self._config.in_effect("powerpropagation")):
                loss, accuracy = training.evaluate(self._model, self._examples)
            self._accuracies[server_round] = accuracy
            self._evaluating += time.monotonic() - began
        self._append("train", server_round, accuracy, loss)
        rounds = self._config.num_server_rounds
        left = ""
        if 0 < server_round < rounds:
            pace = (time.monotonic() - self._rounds_began) / server_round
            left = f", {duration(pace * (rounds - server_round))} left"
        found = "" if accuracy is None else f" accuracy {accuracy:.4f}, loss {loss:.4f},"
        log(INFO, "[round %d/%d]%s %s sent%s", server_round, rounds, found, self._sent(), left)
        return None if accuracy is None or loss is None else MetricRecord({"accuracy": accuracy, "loss": loss})

    def fail(self, reason: str) -> None:
        """Write the incidents, the reason why the run has ended, and the report."""
        if not self._writes:
            return
        if self._ledger.incidents:
            self.record.write_incidents(self._ledger.incidents)
        self.record.fail(reason)
        _write_report(self.record.path)

    def finish(self, arrays: ArrayRecord) -> Path:
        """Write the summary, the model, the mask and the report. Print the summary table."""
        final, mask, ledger = to_arrays(arrays), self._mask(), self._ledger
        table = ledger.bytes_by_phase()
        replies = ledger.replies["train"]
        trained = {round_: value for round_, value in self._accuracies.items() if round_}
        flops = ledger.flops()
        summary: dict[str, object] = {
            "method": self._config.method,
            "dataset": self._config.dataset,
            "model": self._config.model,
            "rounds": self._rounds,
            "seed": self._config.seed,
            "final_accuracy": trained[max(trained)] if trained else None,
            "best_accuracy": max(trained.values(), default=None),
            "density": 1.0 if mask is None else mask.density,
            "density_all": 1.0 if mask is None else mask.density_all,
            "parameters": sum(array.size for array in final.values()),
            "bytes": table,
            "bytes_by_node": ledger.bytes_by_node(),
            "dense_bytes": ledger.dense_bytes_by_phase(to_record(training.get_arrays(self._model)))["total"],
            "train_up_per_client_round": table["train_up"] / replies if replies else 0.0,
            "flops": flops,
            "flops_total": sum(flops.values()),
            "seconds_total": self._seconds(),
            "seconds": {
                "exploration": self.exploration_seconds,
                "train": time.monotonic() - self._rounds_began - self._evaluating,
                "central_evaluation": self._evaluating,
            },
            "exchange_seconds": {phase: seconds for phase, seconds in ledger.seconds.items() if phase != "other"},
            "failures": ledger.failure_counts(),
            "resumed_after": self._resumed,
            "residuals_restarted": bool(self._resumed)
            and ((self._config.values_up or self._config.values) == "int8" or self._config.in_effect("cut_feedback")),
            "mask": None if mask is None else {"version": mask.version, "digest": mask.digest},
            "mask_problems": [] if mask is None or self._config.outside == "initial" else problems(mask),
            "density_by_layer": {}
            if mask is None
            else {
                spec.name: {"kept": mask.kept_by_name[spec.name], "size": spec.size} for spec in mask.layout.prunable
            },
        }
        self.record.finish(summary, final, None if mask is None else {k: np.array(v) for k, v in mask.keep.items()})
        _write_report(self.record.path)
        log(INFO, "\n%s", summary_table(summary))
        log(INFO, "report: %s", self.record.path / "report.html")
        return self.record.path

    def _append(self, phase: str, round_: int, accuracy: float | None, loss: float | None) -> None:
        mask = self._mask()
        incidents = self._ledger.incidents
        new = incidents[self._incidents :]
        left_out = sum(each["kind"] == "rejected" and each["phase"] == phase for each in new)
        self.record.append(
            {
                "phase": phase,
                "round": round_,
                "accuracy": accuracy,
                "loss": loss,
                "train_loss": float(np.mean(self._losses)) if self._losses else float("nan"),
                "bytes": self._ledger.bytes_by_phase(),
                "flops": self._ledger.flops(),
                "seconds": self._seconds(),
                "density": 1.0 if mask is None else mask.density,
                "nodes": self._nodes - left_out if round_ or phase == "exploration" else 0,
                "failures": self._ledger.failure_counts(),
            }
        )
        if new:
            self.record.write_incidents(incidents)
        self._nodes, self._losses, self._incidents = 0, [], len(incidents)

    def _seconds(self) -> float:
        return self._explored_before + time.monotonic() - self._began

    def _sent(self) -> str:
        megabytes = self._ledger.bytes_by_phase()["total"] / 1e6
        return f"{megabytes:.2f} MB" if megabytes < 100 else f"{megabytes:,.0f} MB"


def _write_report(path: Path) -> None:
    from autoflip_flwr.experiment.report import report  # matplotlib is slow to load, and not needed before

    report.write(path)
