"""Track a run's finished rounds, and keep all of its state in checkpoints."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping
from logging import ERROR, INFO, WARNING
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import ArrayRecord, MetricRecord
from flwr.common.logger import log
from flwr.serverapp.strategy import Result, Strategy
from numpy.typing import NDArray

from autoflip_flwr.core.layout import Arrays, Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.method import Method
from autoflip_flwr.core.statistics import Statistics
from autoflip_flwr.core.subspace import Subspace
from autoflip_flwr.costs.ledger import Ledger
from autoflip_flwr.replies.quarantine import Quarantine
from autoflip_flwr.server.exploration import Reports
from autoflip_flwr.server.grid import OrderedGrid
from autoflip_flwr.server.translator import Translator
from autoflip_flwr.storage.codec import decode, encode
from autoflip_flwr.wire.records import to_arrays, to_record
from autoflip_flwr.wrapped.privacy import PrivacyBudget
from autoflip_flwr.wrapped.snapshot import load_strategy_state, strategy_state

if TYPE_CHECKING:
    from autoflip_flwr.storage.checkpoint import Checkpoints  # needs safetensors, which is optional

Evaluate = Callable[[int, ArrayRecord], MetricRecord | None]
ShouldStop = Callable[[int, Result], bool]


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a run that have state of their own, besides the model."""

    strategy: Strategy
    ledger: Ledger
    quarantine: Quarantine
    budget: PrivacyBudget | None
    grid: OrderedGrid
    method: Method


@dataclasses.dataclass
class Progress:
    """A run's finished rounds.

    Attributes
    ----------
    checkpoints : Checkpoints or None
        Where they are kept.
    before : int
        Rounds that were finished before this process. Flower counts the following ones from 1.
    train, evaluate, central : dict[int, MetricRecord]
        Metrics of each round, as in Flower's Result.
    base : dict[str, ndarray] or None
        The values outside the mask of the interrupted run; ``None`` if they were zero or the initial model's.
    """

    checkpoints: Checkpoints | None = None
    before: int = 0
    train: dict[int, MetricRecord] = dataclasses.field(default_factory=dict)
    evaluate: dict[int, MetricRecord] = dataclasses.field(default_factory=dict)
    central: dict[int, MetricRecord] = dataclasses.field(default_factory=dict)
    _saved: dict[str, Any] | None = None
    _arrays: dict[str, NDArray[Any]] = dataclasses.field(default_factory=dict)
    _shadow: Arrays | None = None
    _start: str = ""  # digest of the initial model
    base: Arrays | None = None

    def open(self, settings: Mapping[str, object]) -> bool:
        """Look for an interrupted run of these settings. Return whether it has finished a round (0 is the start)."""
        if self.checkpoints is None:
            return False
        self._start = str(settings["initial"])
        found = self.checkpoints.open(settings)
        if found is not None:
            self._saved, self._arrays, self._shadow, self.base = found
            self.before = self._saved["round"]
            for name in ("train", "evaluate", "central"):
                setattr(self, name, self._read(name))
        return found is not None

    def exploration(self, ledger: Ledger) -> tuple[Statistics, Reports | None] | None:
        """Return the finished exploration of the interrupted run, and its reports if :meth:`explored` was given any.

        Charge its cost if no stored round includes it.
        """
        found = None if self.checkpoints is None else self.checkpoints.read_exploration()
        if found is None:
            return None
        state = found.checkpoint["state"]
        if self._saved is None:
            ledger.absorb(decode(state["ledger"], found.arrays))
        return found.seen, decode(state.get("reports"), found.arrays)

    def explored(self, seen: Statistics, reports: Reports | None, ledger: Ledger) -> None:
        """Store a finished exploration, the single reports if they are needed, and its cost."""
        if self.checkpoints is not None:
            from autoflip_flwr.storage.exploration_file import StoredExploration  # needs safetensors

            arrays: Arrays = {}
            cost = ledger.exploration_only()
            self.checkpoints.write_exploration(
                StoredExploration(
                    seen,
                    self._start,
                    cost=cost,
                    seconds=cost["seconds"],
                    checkpoint={
                        "ledger": encode(vars(ledger), arrays, "ledger"),
                        "reports": encode(reports, arrays, "reports"),
                    },
                    arrays=arrays,
                )
            )

    def mask(self, layout: Layout) -> Mask:
        """Return the mask in force when the run was interrupted."""
        return Mask(layout, *self._read("mask"))

    def next_mask(self, layout: Layout) -> Mask | None:
        """Return the mask that was set but not yet in force, if there was one."""
        found = self._read("next mask")
        return None if found is None else Mask(layout, *found)

    def seen(self) -> Statistics | None:
        """Return what clients reported in the last round that asked for statistics."""
        found = self._read("seen")
        return None if found is None else Statistics(*found)

    def model(self, subspace: Subspace) -> tuple[ArrayRecord, Arrays | None, Arrays]:
        """Return the loop's model, the last values of its pruned entries, and its integer arrays.

        The last values are ``None`` if they are those with which training began.
        """
        return to_record(subspace.unpack(self._read("model"))), self._shadow, self._read("integers")

    def restore(self, parts: Parts) -> None:
        """Restore the parts and the random states."""
        assert self._saved is not None
        load_strategy_state(parts.strategy, self._saved["strategy"], self._arrays)
        parts.ledger.absorb(self._read("ledger"))
        parts.quarantine.load(self._read("quarantine"))
        if parts.budget is not None:
            vars(parts.budget).update(self._read("privacy"))
        parts.grid.exchanges = self._read("exchanges")
        if missing := set(self._read("partitions")) - set(parts.grid.partitions.values()):
            log(
                WARNING,
                "partitions %s were there before and are not now: the end may be another than without the interruption",
                sorted(missing),
            )
        parts.method.load(self._read("method"))
        random.setstate(self._read("random"))
        np.random.set_state(self._read("numpy"))
        log(INFO, "going on after round %d; Flower counts the rounds that follow from 1", self.before)

    def keep(
        self,
        round_: int,
        model: ArrayRecord,
        shadow: Arrays | None,
        base: Arrays | None,
        translator: Translator,
        parts: Parts,
        next_mask: Mask | None,
    ) -> None:
        """Store all state after a round. If that fails, the failure is logged and the run goes on.

        ``shadow`` is as :meth:`model` returns it. ``base`` holds the prunable arrays of the values outside the mask;
        ``None`` if they are zero or the initial model's. ``next_mask`` comes into force with the next round.
        """
        if self.checkpoints is None:
            return
        mask = translator.mask
        arrays: dict[str, NDArray[Any]] = {}
        values: dict[str, object] = {
            "model": mask.gather(to_arrays(model)),  # outside the mask it is zero or the base's value
            "integers": translator.integers,
            "mask": (mask.bits, mask.version),
            "next mask": next_mask and (next_mask.bits, next_mask.version),
            "ledger": vars(parts.ledger),
            "quarantine": parts.quarantine.state(),
            "privacy": None if parts.budget is None else vars(parts.budget),
            "method": parts.method.state(),
            "seen": translator.seen and tuple(translator.seen),
            "exchanges": parts.grid.exchanges,
            "partitions": sorted(parts.grid.partitions.values()),
            "random": random.getstate(),
            "numpy": np.random.get_state(),
            "train": self.train,
            "evaluate": self.evaluate,
            "central": self.central,
        }
        try:
            state = {name: encode(value, arrays, name) for name, value in values.items()}
            state |= {"round": round_, "strategy": strategy_state(parts.strategy, arrays)}
        except ValueError as error:
            log(ERROR, "round %d has no checkpoint: %s", round_, error)
            return
        beside: dict[str, Any] = {} if shadow is None else {"shadow": (mask.version, shadow)}
        beside |= {} if base is None else {"base": base}
        self.checkpoints.write(round_, state, arrays, **beside)

    def evaluation(self, evaluate_fn: Evaluate | None, keep: Callable[[int, ArrayRecord], None]) -> Evaluate:
        """Return what Flower's loop calls before its first round and after each: evaluate, then store the round."""

        def evaluate(flowers_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            if flowers_round == 0 and self.before:
                return None
            round_ = flowers_round + self.before
            if round_ == 0:  # the exploration is over, even if the evaluation fails
                keep(round_, arrays)
            found = None if evaluate_fn is None else evaluate_fn(round_, arrays)
            if found is not None:
                self.central[round_] = found
            if round_:
                keep(round_, arrays)
            return found

        return evaluate

    def stopping(self, should_stop: ShouldStop, model: ArrayRecord) -> ShouldStop:
        """Return what Flower's loop calls after each round: ``should_stop``, given the rounds of the whole run.

        The loop begins with ``model``.
        """

        def stop(flowers_round: int, result: Result) -> bool:
            return should_stop(flowers_round + self.before, self.complete(result, model))

        return stop

    def complete(self, result: Result, model: ArrayRecord) -> Result:
        """Add the rounds before this process to Flower's result. Its arrays are ``model`` if no round gave any."""
        result = dataclasses.replace(result, arrays=result.arrays or model)  # Flower 1.43 does so itself
        if self.before:
            result.train_metrics_clientapp = self.train
            result.evaluate_metrics_clientapp = self.evaluate
            result.evaluate_metrics_serverapp = self.central
        return result

    def _read(self, name: str) -> Any:
        assert self._saved is not None
        return decode(self._saved[name], self._arrays)
