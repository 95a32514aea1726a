"""The server side: ``AutoFlip``, a Flower strategy that wraps another one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from logging import INFO
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from autoflip_flwr.core.layout import AUTO, Output, Rule
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.method import Method
from autoflip_flwr.core.methods import LossExploration
from autoflip_flwr.core.statistics import Exploration, Statistics
from autoflip_flwr.costs import savings
from autoflip_flwr.costs.ledger import Ledger
from autoflip_flwr.replies.quarantine import Quarantine, ReplyRules
from autoflip_flwr.server.beginning import Beginning
from autoflip_flwr.server.configured import default_method
from autoflip_flwr.server.progress import Progress
from autoflip_flwr.server.settings import Nodes, Values
from autoflip_flwr.wrapped import loop, privacy, traits

if TYPE_CHECKING:
    from autoflip_flwr.storage.checkpoint import Checkpoints  # needs safetensors, which is optional


class Pruned(Beginning):
    """Run a strategy in the subspace that a pruning method keeps; :class:`AutoFlip` is the one with AutoFLIP's method.

    The method chooses a mask before the first round, of what it has asked clients if it asks anything. Then the
    wrapped strategy samples, weighs and averages as it always does, while messages carry the kept values only. The
    clients run :func:`~autoflip_flwr.client.mod.autoflip_mod`.

    Parameters
    ----------
    strategy : Strategy (default: FedAvg())
        Any Message-API strategy. AutoFlip is always outermost: ``AutoFlip(DP(strategy))``.
    sparsity : float or str (default: 0.7)
        Share of the prunable parameters to prune, in [0, 1); with 0 the method has nothing to do. ``"auto"``: the
        density falls until a step costs the clients as much training loss as training wins, to 0.02 at most
        (:class:`~autoflip_flwr.core.schedules.Gradual`). It needs clients that report a metric with "loss" in its name.
    method : Method
        What chooses the masks: :class:`~autoflip_flwr.core.methods.LossExploration` (AutoFLIP),
        :class:`~autoflip_flwr.core.methods.Snip`, :class:`~autoflip_flwr.core.methods.Magnitude`,
        :class:`~autoflip_flwr.core.methods.Random`, or one of your own (:class:`~autoflip_flwr.core.method.Method`).
    prunable : str, Sequence[str], Callable[[str, tuple[int, ...]], bool] or None
        Which arrays are pruned: shell-style patterns of their names, or a function of name and shape; default: those
        that are weights (:mod:`autoflip_flwr.core.weights`).
    exclude : the same, or None
        Which of those are not, e.g. ``["embedding.*", "*.pos"]``.
    biases : bool (default: False)
        Prune biases too (the authors' code does).
    output : str, Sequence[str], Mapping[str, int] or None (default: "auto")
        Weights of which each unit keeps an incoming weight: names or patterns, or these with the axis of their units;
        default: those that can be outputs (:mod:`autoflip_flwr.core.outputs`).
    outside : str (default: "zero")
        What stands outside the mask: ``"zero"``, which is pruning proper, or ``"initial"``, the value with which
        training began (the initial parameters as given, or the explorers' average). That is for fine-tuning a
        pretrained model, which zeros would ruin, and where only bytes matter: no computation or memory is saved.
        Clients are sent these values once, unless they explored from them or have the same file
        (:func:`~autoflip_flwr.client.mod.autoflip_mod_with`).
    lr_power : float (default: 0.25)
        Clients multiply their learning rate by ``density ** -lr_power``, in [0, 1]; 0 leaves it alone. A sparse model
        changes less in a step than a dense one (Dey et al. 2024, SuPar; the power is our measurement, docs/study.md).
        With ``outside="initial"`` nothing is sparse, and the learning rate stays.
        :func:`~autoflip_flwr.torch.masked_training` does so; other clients read
        :func:`~autoflip_flwr.client.context.current_rate`.
    mask : Mask or None
        A ready mask: nobody is asked and nothing is chosen.
    exploration : Exploration or None
        The result of an earlier exploration from the same initial parameters: nobody explores.
    mask_schedule : Callable[[int, Mask, Arrays], Mask or None] or None
        Called before each round with as many as it takes by position of its number, the mask in force and the model
        (full arrays by name); a mask that it returns replaces the one in force. Coordinates that grow again resume from
        their last value, unless the method says otherwise (``grow_from``).
    values : str or Values (default: "float32")
        How values travel, in both directions or in each (:class:`~autoflip_flwr.server.settings.Values`):
        ``"float32"`` (as the model has them), ``"bfloat16"`` or ``"float16"`` (half the bytes), or ``"int8"`` (a
        quarter). Quantised replies hold the client's update; with int8 what rounding loses of it is kept in the node's
        state and added to the next.
    rules : ReplyRules or None
        Which replies are rejected beyond those that are malformed, and what follows
        (:class:`~autoflip_flwr.replies.quarantine.ReplyRules`); default: its own defaults.
    checkpoints : Checkpoints or None
        Where all state is kept after each finished round (:class:`~autoflip_flwr.storage.checkpoint.Checkpoints`), so
        that an interrupted run goes on from there and ends bit for bit like one that was not. With int8 replies what
        rounding has lost (see ``values``) is forgotten there.
    ledger : Ledger or None
        Where bytes and failures are counted.
    seed : int or None
        Makes the choice of nodes reproducible.
    nodes : int, Nodes or None
        How many nodes are expected: the exploration waits for them. With a limit of time:
        :class:`~autoflip_flwr.server.settings.Nodes`. Default: as many as the nodes' own ``num-partitions`` says.
    coordinates : str (default: "auto")
        What the wrapped strategy sees: ``"packed"`` (1-D arrays of kept values under the arrays' own names),
        ``"dense"`` (full arrays) or ``"auto"``: packed where its methods and metric functions are Flower's own.
        Integer and bool arrays are never averaged: they come from the valid reply with the most examples.

    Attributes
    ----------
    strategy, sparsity, ..., coordinates
        Every parameter under its own name. One that is set is checked at once and holds for the next ``start``; while
        rounds run only ``mask`` can be set.
    mask : Mask or None
        The mask in force; one that is set while rounds run is, from the next one on.
    exploration : Exploration, Statistics or None
        What the explorers found.
    ledger : Ledger
        Bytes and failures so far.
    privacy : PrivacyBudget or None
        Privacy budget spent so far under a differential-privacy wrapper
        (:class:`~autoflip_flwr.wrapped.privacy.PrivacyBudget`).

    Raises
    ------
    TypeError
        If a parameter is of another type.
    ValueError
        If one is out of range, or two do not go together.

    Examples
    --------
    >>> from flwr.serverapp.strategy import FedAvg
    >>> from autoflip_flwr.core.methods import Magnitude
    >>> Pruned(FedAvg(), 0.9, method=Magnitude(scope="erk"), seed=1)
    Pruned(FedAvg(), sparsity=0.9, method=Magnitude(scope='erk'), seed=1)
    """

    def __init__(
        self,
        strategy: Strategy | None = None,
        sparsity: float | str = 0.7,
        *,
        method: Method,
        prunable: Rule | None = None,
        exclude: Rule | None = None,
        biases: bool = False,
        output: Output | None = AUTO,
        outside: str = "zero",
        lr_power: float = 0.25,
        mask: Mask | None = None,
        exploration: Exploration | Statistics | None = None,
        mask_schedule: Callable[..., Mask | None] | None = None,
        values: str | Values = "float32",
        rules: ReplyRules | None = None,
        checkpoints: Checkpoints | None = None,
        ledger: Ledger | None = None,
        seed: int | None = None,
        nodes: int | Nodes | None = None,
        coordinates: str = "auto",
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name in self._defaults}
        for name, value in arguments.items():
            setattr(self, name, value)
        self._check(self._arguments())
        self.privacy = privacy.budget_of(self.strategy)
        self._made_from = (self._choosing(), self.method.exploring(), exploration)
        self._moved_by = None
        self._progress = Progress()
        self._quarantine = Quarantine(self.rules, self.ledger)
        self._round = 0
        self._packed = traits.resolve(self.coordinates, self.strategy) == "packed"
        self._integers = False
        self._translator, self._shadow, self._base, self._changed = None, {}, None, None
        self._initial, self._reports, self._explorers = {}, None, None
        self._fresh, self._asked, self._noted = True, 0, 0
        self._running = self._in_rounds = False
        self._ready = True

    def summary(self) -> None:
        """Log the settings as a tree, then those of the wrapped strategy."""
        mask = "none yet" if self.mask is None else f"density {self.mask.density:.4f}"
        lines = [
            f"sparsity={self.sparsity}",
            f"method={self.method!r}",
            *(line for name, line in self._told().items() if name not in ("sparsity", "method", "mask")),
            f"coordinates: {'packed' if self._packed else 'dense'}",
            f"mask: {mask}",
        ]
        log(INFO, "\t├──> %s settings:", type(self).__name__)
        for line in lines[:-1]:
            log(INFO, "\t│\t├── %s", line)
        log(INFO, "\t│\t└── %s", lines[-1])
        self.strategy.summary()

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
        should_stop: Callable[[int, Result], bool] | None = None,
        **own: Any,
    ) -> Result:
        """Explore, choose the mask, then run ``num_rounds`` pruned rounds; see :meth:`Strategy.start`.

        ``timeout`` (seconds) limits each round, and each batch of explorers if the method has no timeout of its own.
        ``evaluate_fn(0, arrays)`` gets the initial model under the mask, as full arrays. ``should_stop(round, result)``
        (from Flower 1.43 on) is called after each round; a run resumed from a checkpoint first calls it for the last
        finished round. A wrapped strategy with its own ``start`` gets those of these parameters that it takes, by name,
        and ``own``.

        Raises
        ------
        ValueError
            Before any client works, if the model cannot be pruned as asked, or if explorers would report without the
            noise of a differential-privacy wrapper.
        CheckpointError
            If a checkpoint is in the way, damaged or of another run.
        TypeError
            If an argument has the wrong type, or neither Flower's ``start`` nor the wrapped strategy's takes it.
        RuntimeError
            If too few nodes are connected, too few explorers answer, or no reply of the first round counts.
        """
        given = {
            "grid": grid,
            "initial_arrays": initial_arrays,
            "num_rounds": num_rounds,
            "timeout": timeout,
            "train_config": train_config,
            "evaluate_config": evaluate_config,
            "evaluate_fn": evaluate_fn,
        }
        # a strategy with its own loop keeps it
        own_loop = type(self.strategy).start is not Strategy.start
        loop.check(grid, initial_arrays, given if own_loop else {**given, "should_stop": should_stop})
        if should_stop is not None:  # a start that does not take it must not get the default
            own["should_stop"] = should_stop
        start = loop.twin(self.strategy, methods_of=self).start if own_loop else super().start
        loop.bind(start, given, own)
        self._running = True
        try:
            progress, first = self._prepare(given)
            if should_stop is not None and progress.before:
                own["should_stop"] = stop = progress.stopping(should_stop, first)
                if given["num_rounds"] and stop(0, Result()):
                    log(INFO, "should_stop ends the run after round %d", progress.before)
                    given["num_rounds"] = 0
            args, named = loop.bind(start, given, own)
            result = start(*args, **named)
        finally:
            self._running = self._in_rounds = False
        if given["grid"] is not grid:  # a caller that passes the facade, as the shipped app does, logs its own summary
            self._tell_savings(initial_arrays)
        return result if own_loop else progress.complete(result, first)

    def _tell_savings(self, initial_arrays: ArrayRecord) -> None:
        sent, dense = self.ledger.bytes_by_phase(), self.ledger.dense_bytes_by_phase(initial_arrays)
        for line in savings.lines(sent, dense, pruned=not self._started.mask.is_full):
            log(INFO, "%s", line)


class AutoFlip(Pruned):
    """Prune the model before training, informed by the clients, then train in the subspace that is kept.

    Implements AutoFLIP (arXiv 2405.10271). Before the first round, explorers train from the same initial parameters
    and report how far each parameter moved; the server makes one global mask of it. By default this mask keeps half of
    the weights, and the density falls to its target while training goes on.

    Parameters
    ----------
    strategy, sparsity, ..., coordinates
        See :class:`Pruned`.
    method : LossExploration or None
        Who explores, how, and what becomes of it (:class:`~autoflip_flwr.core.methods.LossExploration`). Default:
        ``LossExploration()``, with ``schedule=()`` beside a ``mask`` or a ``mask_schedule``; with
        ``outside="initial"`` ``LossExploration.static()``.

    Raises
    ------
    TypeError, ValueError
        As :class:`Pruned` does.

    Examples
    --------
    >>> from flwr.serverapp.strategy import FedAvg
    >>> AutoFlip(FedAvg(), sparsity=0.9, method=LossExploration(epochs=1), values="int8")
    AutoFlip(FedAvg(), sparsity=0.9, method=LossExploration(epochs=1), values='int8')
    >>> # in the ServerApp's main function: strategy.start(grid, initial_arrays, num_rounds=20)
    """

    method: LossExploration

    def __init__(
        self,
        strategy: Strategy | None = None,
        sparsity: float | str = 0.7,
        *,
        method: LossExploration | None = None,
        prunable: Rule | None = None,
        exclude: Rule | None = None,
        biases: bool = False,
        output: Output | None = AUTO,
        outside: str = "zero",
        lr_power: float = 0.25,
        mask: Mask | None = None,
        exploration: Exploration | None = None,
        mask_schedule: Callable[..., Mask | None] | None = None,
        values: str | Values = "float32",
        rules: ReplyRules | None = None,
        checkpoints: Checkpoints | None = None,
        ledger: Ledger | None = None,
        seed: int | None = None,
        nodes: int | Nodes | None = None,
        coordinates: str = "auto",
    ) -> None:
        method = default_method(outside, mask, mask_schedule) if method is None else method
        super().__init__(**{name: value for name, value in locals().items() if name in self._defaults})

    def _check(self, settings: Mapping[str, Any]) -> None:
        super()._check(settings)
        if not isinstance(settings["method"], LossExploration):
            raise TypeError(
                f"AutoFlip(method=): must be a LossExploration; with another method it is Pruned(strategy, "
                f"method={type(settings['method']).__name__}(...))"
            )
