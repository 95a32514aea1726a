"""Let hooks follow a strategy's run, whatever strategy it is: trackers, and hooks of the user's own."""

from __future__ import annotations

import functools
import inspect
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from logging import WARNING
from typing import Any, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from autoflip_flwr.costs.ledger import Ledger
from autoflip_flwr.server.configured import told
from autoflip_flwr.server.grid import OrderedGrid
from autoflip_flwr.server.strategy import Pruned
from autoflip_flwr.trackers.hook import Hook, Round, Setting
from autoflip_flwr.wrapped import loop
from autoflip_flwr.wrapped.snapshot import settings_of

S = TypeVar("S", bound=Strategy)


def follow(strategy: S, *hooks: Hook, settings: Mapping[str, Setting] | None = None) -> S:
    """Return the strategy with hooks that follow its runs: ``follow(AutoFlip(FedAvg()), TensorBoard("logs"))``.

    It is the same strategy for all else: same class, same attributes, same ``start``. Any Message-API strategy will do,
    also one with its own ``start``. ``AutoFlip`` goes inside: ``follow(AutoFlip(strategy), hook)``.

    After each round a hook is told, in the ``values`` of a :class:`~autoflip_flwr.trackers.hook.Round`, as far as there
    is such a thing:

    - ``train/...``, ``evaluate/...``: the metrics that the strategy has aggregated, by their names; ``central/...``:
      those of ``evaluate_fn``. Numbers alone, no lists.
    - ``bytes/...``: bytes so far, by phase and direction, as the ledger counts them.
    - ``density``: share of the prunable parameters that the mask keeps; 1 without pruning.
    - ``replies/train``, ``replies/evaluate``: replies of this round without an error; ``failures/errors``,
      ``failures/absent``, ``failures/rejected``: those of this round.
    - ``seconds/round``: of this round; ``seconds/exploration``, ``seconds/train``, ``seconds/evaluate``: spent in
      exchanges so far.

    Parameters
    ----------
    strategy : Strategy
        The strategy.
    hooks : Hook
        Trackers (:class:`~autoflip_flwr.trackers.tensorboard.TensorBoard`,
        :class:`~autoflip_flwr.trackers.wandb.WandB`, :class:`~autoflip_flwr.trackers.mlflow.MLflow`), or hooks of your
        own (:class:`~autoflip_flwr.trackers.hook.Hook`).
    settings : Mapping[str, bool | int | float | str] | None
        What hooks are told at the beginning besides the strategy's settings, such as ``context.run_config``.

    Raises
    ------
    TypeError
        If one of them is no hook, or the strategy is followed already.
    """
    if isinstance(strategy, loop.Twin) or not isinstance(strategy, Strategy):
        raise TypeError(f"follow({told(strategy)}, ...): must be given a strategy once, with all of its hooks")
    for hook in hooks:
        if not isinstance(hook, Hook):
            raise TypeError(f"follow(..., {told(hook)}): must be a Hook, such as TensorBoard(folder)")
    return loop.twin(strategy, Following(strategy, hooks, settings or {}), ("start", *loop.METHODS))


class Following:
    """A strategy's ``start`` and round methods, with hooks that are told what happens."""

    def __init__(self, strategy: Strategy, hooks: Iterable[Hook], settings: Mapping[str, Setting]) -> None:
        self._strategy, self._hooks, self._settings = strategy, list(hooks), settings

    def start(self, *args: Any, **named: Any) -> Any:
        """Run the strategy's own ``start``."""
        inner = loop.twin(self._strategy, methods_of=self)
        call = inspect.signature(inner.start).bind(*args, **named)
        self._ledger = self._count(call)
        self._told = {**_settings(self._strategy), **_of_start(call), **self._settings}
        self._listening, self._begun = list(self._hooks), False
        self._arrays: ArrayRecord | None = None
        self._values: dict[str, float] = {}  # what has come in since the last round was told
        self._number, self._complete = 0, False
        self._started = self._since = time.monotonic()
        self._before = self._counts()
        initial = next((each for each in call.arguments.values() if isinstance(each, ArrayRecord)), None)
        self._evaluates = callable(evaluate := call.arguments.get("evaluate_fn"))
        if callable(evaluate):
            call.arguments["evaluate_fn"] = self._watch(evaluate)
        try:
            result = inner.start(*call.args, **call.kwargs)
        except BaseException as error:
            self._end(initial, f"{type(error).__name__}: {' '.join(str(error).split())}")
            raise
        self._end(initial, "")
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Tell the hooks of the round before, then let the strategy configure this one."""
        self._arrays = arrays
        self._tell()
        self._number, self._complete = server_round + self._earlier, False
        return self._strategy.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Let the strategy aggregate, and note its metrics."""
        arrays, metrics = self._strategy.aggregate_train(server_round, replies)
        self._arrays = self._arrays if arrays is None else arrays
        self._note("train", metrics)
        return arrays, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the strategy configure the evaluation."""
        return self._strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Let the strategy aggregate, and note its metrics."""
        metrics = self._strategy.aggregate_evaluate(server_round, replies)
        self._note("evaluate", metrics)
        self._complete = not self._evaluates
        return metrics

    @property
    def _earlier(self) -> int:
        return self._strategy.rounds_before if isinstance(self._strategy, Pruned) else 0

    def _count(self, call: inspect.BoundArguments) -> Ledger:
        """Return the ledger that the messages of the run are charged to. A plain strategy's grid is wrapped for it."""
        if isinstance(self._strategy, Pruned):
            return self._strategy.ledger
        ledger = Ledger()
        for name, value in call.arguments.items():
            if isinstance(value, OrderedGrid):
                ledger = value.ledger
            elif isinstance(value, Grid):
                call.arguments[name] = OrderedGrid(value, ledger=ledger)
        return ledger

    def _watch(self, evaluate: Callable[..., MetricRecord | None]) -> Callable[..., MetricRecord | None]:
        @functools.wraps(evaluate)
        def watched(*args: Any, **named: Any) -> MetricRecord | None:
            metrics = evaluate(*args, **named)
            self._arrays = next((each for each in (*args, *named.values()) if isinstance(each, ArrayRecord)), None)
            self._note("central", metrics)
            self._complete = True
            return metrics

        return watched

    def _note(self, kind: str, metrics: object) -> None:
        if isinstance(metrics, Mapping):
            found = {f"{kind}/{name}": value for name, value in metrics.items()}
            self._values |= {name: float(value) for name, value in found.items() if isinstance(value, int | float)}

    def _tell(self) -> None:
        """Tell the hooks of the round that is over; before the first one, of the beginning."""
        first, self._begun = not self._begun, True
        if first:
            self._call("began", self._told, self._earlier)
        if not (first and self._earlier):  # a resumed run has been told of the round that it goes on after
            self._call("round", Round(self._number, self._values | self._measured(), self._arrays))
        self._values, self._before, self._since = {}, self._counts(), time.monotonic()

    def _end(self, initial: ArrayRecord | None, failure: str) -> None:
        """Tell the hooks of the last round, if it is complete, and of the end; nothing if there was no beginning."""
        if not failure or (self._begun and self._complete):
            self._tell()
        if not self._begun:
            return
        totals = {
            "rounds": float(self._number or self._earlier),
            "bytes": float(self._ledger.bytes_by_phase()["total"]),
            "seconds": time.monotonic() - self._started,
            **{name: float(count) for name, count in self._counts().items()},
        }
        if initial is not None:
            totals["bytes_of_dense"] = float(self._ledger.dense_bytes_by_phase(initial)["total"])
        self._call("ended", totals, failure)

    def _measured(self) -> dict[str, float]:
        ledger, now = self._ledger, self._counts()
        return {
            **{f"bytes/{name}": float(size) for name, size in ledger.bytes_by_phase().items()},
            "density": self._density(),
            **{name: float(now[name] - self._before[name]) for name in now},
            "seconds/round": time.monotonic() - self._since,
            **{f"seconds/{phase}": seconds for phase, seconds in ledger.seconds.items() if phase != "other"},
        }

    def _counts(self) -> Counter[str]:
        replies = {f"replies/{phase}": self._ledger.replies[phase] for phase in ("train", "evaluate")}
        failures = {f"failures/{kind}": number for kind, number in self._ledger.failure_counts().items()}
        return Counter({**replies, **failures})

    def _density(self) -> float:
        mask = self._strategy.mask if isinstance(self._strategy, Pruned) else None
        return 1.0 if mask is None else mask.density

    def _call(self, method: str, *arguments: object) -> None:
        for hook in list(self._listening):
            try:
                getattr(hook, method)(*arguments)
            except Exception as error:  # whatever a tracker meets, the run matters more
                self._listening.remove(hook)
                words = " ".join(str(error).split()) or repr(error)
                log(WARNING, "%s has failed and is left out from now on: %s", type(hook).__name__, words)


def _settings(strategy: Strategy) -> dict[str, Setting]:
    """Return the settings of a strategy and of those inside it, as numbers, flags and text."""
    found: dict[str, Setting] = {}
    if isinstance(strategy, Pruned):
        own = {name: value for name, value in strategy._arguments().items() if value is not None}
        own = {name: own[name] for name in own if name not in ("strategy", "ledger", "checkpoints")}
        found = {name: value if isinstance(value, Setting) else told(value) for name, value in own.items()}
        strategy = strategy.strategy
    for name, own in settings_of(strategy).items():
        found |= {f"{name.partition('.')[2]}.{key}": value for key, value in own.items()}
    return {"strategy": told(strategy), **found}


def _of_start(call: inspect.BoundArguments) -> dict[str, Setting]:
    """Return the number of rounds and the time limit, as far as ``start`` has such parameters."""
    found = {}
    for name, parameter in call.signature.parameters.items():
        value = call.arguments.get(name, parameter.default)
        if name in ("num_rounds", "timeout") and isinstance(value, Setting):
            found[name] = value
    return found
