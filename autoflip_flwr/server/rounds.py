"""Run the rounds: connect Flower's loop with the wrapped strategy, under the mask in force."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from autoflip_flwr.core.layout import Arrays
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.statistics import Statistics, statistics_of
from autoflip_flwr.core.subspace import Subspace
from autoflip_flwr.replies.losses import losses_of
from autoflip_flwr.replies.quarantine import Quarantine, why_none
from autoflip_flwr.server.configured import Configured
from autoflip_flwr.server.first_mask import warn_of_problems
from autoflip_flwr.server.participants import Explorers
from autoflip_flwr.server.progress import Progress
from autoflip_flwr.server.schedule import Schedule, ask_schedule, check_mask, refined
from autoflip_flwr.server.translator import Translator
from autoflip_flwr.wire.keys import EVALUATE, TRAIN
from autoflip_flwr.wire.records import to_arrays, to_record
from autoflip_flwr.wrapped import optimizer_state, privacy, traits
from autoflip_flwr.wrapped.privacy import PrivacyBudget
from autoflip_flwr.wrapped.snapshot import undo_of


class Rounds(Configured):
    """What Flower's loop calls in each round; :class:`~autoflip_flwr.server.strategy.AutoFlip` starts it."""

    mask_schedule: Schedule | None
    privacy: PrivacyBudget | None
    _progress: Progress
    _quarantine: Quarantine
    _packed: bool
    _translator: Translator | None
    _initial: Arrays
    """W0, full arrays by name."""
    _explorers: Explorers | None
    """The explorers with their reports, if the nodes that a round samples decide its mask."""
    _shadow: Arrays
    """The values from which pruned entries grow, as full arrays."""
    _base: Arrays | None
    """The values outside the mask if they are those with which training began, as full arrays; ``None``: zero."""
    _changed: Arrays | None
    """The model of this round, if the round has a new mask."""
    _round: int
    _partitions: Mapping[int, int]
    """Partition ids by node, as far as they are known."""
    _asked: int
    """Number of nodes that this round's messages went to."""
    _noted: int
    """Number of incidents before this round's messages."""
    _fresh: bool
    """Whether no round has sent messages yet."""
    _in_rounds: bool
    """Whether rounds are running, so that the mask may be set although start has not returned."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the wrapped strategy configure the round, in its coordinates, and pack its messages."""
        translator = self._started
        self._round = server_round = server_round + self._progress.before
        self._partitions = getattr(grid, "partitions", {})
        full = self._in_force(server_round, to_arrays(arrays), config, grid)
        record = translator.to_strategy(translator.mask.gather(full))
        messages = self.strategy.configure_train(server_round, record, config, grid)
        outgoing = translator.outgoing(messages, TRAIN, server_round)
        if self._explorers is not None:
            self._explorers.compare(server_round, outgoing)
        self._asked, self._noted = len(outgoing), len(self.ledger.incidents)
        return outgoing

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Judge the replies, and let the wrapped strategy average those that count. Return full arrays.

        Raises
        ------
        RuntimeError
            If no reply of the first round counts.
        """
        record, metrics = self._aggregate(server_round + self._progress.before, replies)
        changed, self._changed = self._changed, None
        if record is None and changed is not None:  # the loop's model is still under the old mask
            record = to_record(changed)
        return record, metrics

    def _aggregate(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        translator = self._started
        plainly = traits.averages_plainly(self.strategy)
        noised = privacy.replies_needed(self.strategy)
        before, longest = translator.integers, self._quarantine.longest
        if plainly:
            counted, mean = translator.average(replies, server_round)
        else:
            counted = translator.incoming(replies, server_round)
        valid = sum(not reply.has_error() for reply in counted)
        if self._fresh and self._asked and not valid:
            raise RuntimeError(
                f"round {server_round}: no reply of {self._asked} nodes counts: "
                f"{why_none(counted, self.ledger.incidents[self._noted :])}"
            )
        self._fresh = self._fresh and not self._asked
        if not self._quarantine.suffices(valid, noised, server_round):
            translator.integers, self._quarantine.longest = before, longest
            privacy.refuse(self.strategy, server_round, self.privacy)
            return None, None
        if plainly:
            _, metrics = self.strategy.aggregate_train(server_round, counted)  # metrics only, there are no arrays
        else:
            undo = undo_of(self.strategy)
            record, metrics = privacy.aggregate(self.strategy, server_round, counted, self.privacy)
            mean = None if record is None else translator.from_strategy(record)
            if mean is not None and not translator.mask.layout.is_finite(mean):
                self._quarantine.keep_model(server_round, "what the strategy has made of the replies is not finite")
                translator.integers, self._quarantine.longest, mean = before, longest, None
                undo()
        if metrics is not None:
            self._progress.train[server_round] = metrics
        self.method.watch(server_round, losses_of(counted, self._partitions))
        return None if mean is None else to_record(mean), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the wrapped strategy configure the evaluation, and pack its messages."""
        translator = self._started
        server_round += self._progress.before
        record = translator.to_strategy(translator.mask.gather(to_arrays(arrays)))
        messages = self.strategy.configure_evaluate(server_round, record, config, grid)
        return translator.outgoing(messages, EVALUATE, server_round)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Judge the replies and let the wrapped strategy aggregate those that count."""
        server_round += self._progress.before
        counted = self._started.incoming_evaluate(replies, server_round)
        metrics = self.strategy.aggregate_evaluate(server_round, counted)
        if metrics is not None:
            self._progress.evaluate[server_round] = metrics
        return metrics

    def initialize_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse Flower's old server API, which calls this first, unless the wrapped strategy has such a method.

        Raises
        ------
        RuntimeError
            Always, unless the wrapped strategy has the method. The message says how to start a run.
        """
        own = getattr(self.strategy, "initialize_parameters", None)
        if own is None:
            raise RuntimeError(
                "AutoFlip works with Flower's Message API, not with ServerAppComponents or start_server: call "
                "strategy.start(grid, initial_arrays) in a function under @app.main() of app = ServerApp()"
            )
        return own(*args, **kwargs)

    def _check_running(self, name: str, value: object) -> None:
        if name != "mask":
            super()._check_running(name, value)
        if not self._in_rounds:
            raise RuntimeError("mask was set before the first round, while AutoFlip finds one: set it before start")
        check_mask(value, self._started.mask.layout, "strategy.mask = ...")

    @property
    def rounds_before(self) -> int:
        """Rounds that were finished before this process, if the run is resumed. Flower counts the others from 1."""
        return self._progress.before

    @property
    def _started(self) -> Translator:
        if self._translator is None:
            raise RuntimeError(
                "AutoFlip.start has not been called: AutoFlip must be the outermost strategy, AutoFlip(DP(strategy)), "
                "and started with its own start method"
            )
        return self._translator

    def _in_force(self, server_round: int, full: Arrays, config: ConfigRecord, grid: Grid) -> Arrays:
        """Return the model under this round's mask: apply one set by the user, the method's, then the schedule's."""
        translator = self._started
        if self.mask is not None and self.mask is not translator.mask:
            full = self._change(self.mask, full, translator)
        if translator.mask.layout.prunable and self._brought["mask"] is None:
            full = self._refine(server_round, full, config, grid)
        if self.mask_schedule is not None:
            new = ask_schedule(self.mask_schedule, server_round, translator.mask, full)
            full = full if new is None else self._change(new, full, translator)
        return full

    def _refine(self, server_round: int, full: Arrays, config: ConfigRecord, grid: Grid) -> Arrays:
        """Return the model under the mask that the method names for this round."""
        translator, explored = self._started, statistics_of(self.exploration)
        sampled: Statistics | None = None
        if self._explorers is not None and self.method.asks_who(server_round):
            record = translator.to_strategy(translator.mask.gather(full))
            sampled = self._explorers.sampled(self.strategy, server_round, record, config, grid) or explored
        if server_round == 1 and sampled is None:
            return full
        new = refined(
            self.method, server_round, translator.mask, full, translator.seen, explored, self._initial, sampled
        )
        return full if new is None else self._change(new, full, translator)

    def _change(self, new: Mask, full: Arrays, translator: Translator) -> Arrays:
        """Put a new mask into force, and return the model under it."""
        old = translator.mask
        if new.digest != old.digest:
            if new.version <= old.version:
                new = dataclasses.replace(new, version=old.version + 1)
            last = self.method.grow_from == "last"
            self._shadow = old.scatter(old.gather(full), into=self._shadow) if last else full
            moved = translator.shown, old, Subspace(new, self._base), self._shadow
            optimizer_state.carry_state(self.strategy, *moved, packed=self._packed)
            translator.mask = new
            warn_of_problems(translator.subspace)
            self._changed = full = translator.subspace.project(self._shadow)
        vars(self)["mask"] = translator.mask
        return full
