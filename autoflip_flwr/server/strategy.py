"""The server side: ``AutoFlip``, a Flower strategy that wraps another one."""

from __future__ import annotations

import math
from collections.abc import Callable
from logging import INFO
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from autoflip_flwr.core.layout import AUTO, Arrays, Layout, Output, Rule
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.statistics import Exploration, start_arrays
from autoflip_flwr.core.subspace import Subspace
from autoflip_flwr.costs import savings
from autoflip_flwr.costs.ledger import Ledger
from autoflip_flwr.replies.batch import Judge
from autoflip_flwr.replies.quarantine import Quarantine, ReplyRules
from autoflip_flwr.server.base_delivery import Told
from autoflip_flwr.server.exploration import explore
from autoflip_flwr.server.grid import OrderedGrid
from autoflip_flwr.server.plans import ExplorationPlan, MaskPlan, model_of, warn_of_problems
from autoflip_flwr.server.progress import Parts, Progress
from autoflip_flwr.server.rounds import Rounds
from autoflip_flwr.server.schedule import goes_on, last_values, same_arrays
from autoflip_flwr.server.settings import check
from autoflip_flwr.server.translator import Translator
from autoflip_flwr.wire.base_record import base_digest
from autoflip_flwr.wire.records import to_record
from autoflip_flwr.wrapped import loop, optimizer_state, privacy, traits
from autoflip_flwr.wrapped.template import template_of

if TYPE_CHECKING:
    from autoflip_flwr.storage.checkpoint import Checkpoints  # needs safetensors, which only those who keep some have


class AutoFlip(Rounds):
    """Prune the model before training, informed by the clients, then train in the subspace that is kept.

    Implements AutoFLIP (arXiv 2405.10271). Before the first round, explorers train from the same initial parameters
    and report how far each parameter moved; the server makes one global mask of it; then the wrapped strategy samples,
    weighs and averages as it always does, while messages carry the kept values only. The clients run
    :func:`~autoflip_flwr.client.mod.autoflip_mod`. Without a ``mask_schedule`` the mask is static.

    Parameters
    ----------
    strategy : Strategy (default: FedAvg())
        Any Message-API strategy. AutoFlip is always outermost: ``AutoFlip(DP(strategy))``.
    sparsity : float (default: 0.7)
        Share of the prunable parameters to prune, in [0, 1); 0 skips the exploration.
    scope : str (default: "global")
        One quantile over all prunable parameters, or ``"layer"``: one for each array.
    normalisation : str (default: "none")
        Of the deviations: ``"none"``, ``"layer"`` (the authors' code) or ``"per-client"`` (FedLEx).
    gamma : float (default: 1.0)
        Power of the client agreement, >= 0 (our reading).
    initial : str (default: "scratch")
        Start from the pruned initial parameters, or from ``"scouts"``, the pruned average of the explorers.
    outside : str (default: "zero")
        What stands outside the mask: ``"zero"``, which is pruning proper, or ``"initial"``, the value with which
        training began (the initial parameters as given, or the explorers' average). That is for fine-tuning a
        pretrained model, which zeros would ruin, and where only bytes matter: no computation or memory is saved.
        Clients are sent these values once, unless they explored from them or have the same file
        (:func:`~autoflip_flwr.client.mod.autoflip_mod_with`).
    biases : bool (default: False)
        Prune biases too (the authors' code does).
    prunable : str, Sequence[str], Callable[[str, tuple[int, ...]], bool] or None
        Which arrays are pruned: shell-style patterns of their names, or a function of name and shape; default: those
        that are weights (:mod:`autoflip_flwr.core.weights`).
    exclude : the same, or None
        Which of those are not, e.g. ``["embedding.*", "*.pos"]``.
    output : str, Sequence[str], Mapping[str, int] or None (default: "auto")
        Weights of which each unit keeps an incoming weight: names or patterns, or these with the axis of their units;
        default: those that can be outputs (:mod:`autoflip_flwr.core.outputs`).
    prune_unmoved : bool (default: False)
        Prune what no explorer moved (first of all) instead of keeping it whole.
    explorers, min_explorers, exploration_rounds, exploration_epochs, exploration_patience, exploration_weighting, \
exploration_values
        See :class:`~autoflip_flwr.server.plans.ExplorationPlan`.
    exploration_timeout : float or None
        Seconds for each batch of explorers, > 0; default: the rounds' ``timeout``.
    exploration : Exploration or None
        The result of an earlier exploration from the same initial parameters: nobody explores.
    exploration_public : bool (default: False)
        Declares that what explorers send may be known: under a differential-privacy wrapper they explore only then.
    mask : Mask or None
        A ready mask: nobody explores and nothing is chosen.
    mask_schedule : Callable[[int, Mask, Arrays], Mask or None] or None
        Called before each round with as many as it takes by position of its number, the mask in force and the model
        (full arrays by name); a mask that it returns replaces the one in force. Coordinates that grow again resume from
        their last value.
    coordinates : str (default: "auto")
        What the wrapped strategy sees: ``"packed"`` (1-D arrays of kept values under the arrays' own names),
        ``"dense"`` (full arrays) or ``"auto"``: packed where its methods and metric functions are Flower's own.
        Integer and bool arrays are never averaged: they come from the valid reply with the most examples.
    values : str (default: "float32")
        How values travel: ``"float32"`` (as the model has them), ``"bfloat16"`` or ``"float16"`` (half the bytes),
        or ``"int8"`` (a quarter). Coded replies hold the client's update; with int8 what rounding loses of it is kept
        in the node's state and added to the next.
    values_up, values_down : str or None
        The same for replies alone, and for messages alone; default: ``values``.
    seed : int or None
        Makes the choice of nodes reproducible.
    nodes : int or None
        How many nodes are expected, >= 1: the exploration waits for them. Default: as many as the nodes' own
        ``num-partitions`` says, else until no new one has come for some seconds; never fewer than the wrapped strategy
        needs.
    node_timeout : float or None (default: 60.0)
        Seconds without a new node, > 0, after which a run goes on without those that are still expected; ``None``: the
        rounds' ``timeout``, which holds for those that the wrapped strategy needs in any case.
    ledger : Ledger or None
        Where bytes and failures are counted.
    rules : ReplyRules or None
        Which replies are left out beyond those that are malformed, and what follows
        (:class:`~autoflip_flwr.replies.quarantine.ReplyRules`); default: its own defaults.
    checkpoints : Checkpoints or None
        Where all state is kept after each finished round, so that a
        run which was interrupted goes on from there and ends bit for bit like one that was not. With int8 replies what
        rounding has lost (see ``values``) is forgotten there.

    Attributes
    ----------
    strategy, sparsity, ..., checkpoints
        Every parameter under its own name. One that is set is checked at once and holds for the next ``start``; while
        rounds run only ``mask`` can be set.
    mask : Mask or None
        The mask in force; one that is set while rounds run is, from the next one on.
    exploration : Exploration or None
        What the explorers found.
    ledger : Ledger
        Bytes and failures so far.
    privacy : Budget or None
        What the rounds of a differential-privacy wrapper have spent (:class:`~autoflip_flwr.wrapped.privacy.Budget`).

    Raises
    ------
    TypeError
        If a parameter is of another type.
    ValueError
        If one is out of range, or two do not go together.

    Examples
    --------
    >>> strategy = AutoFlip(FedAvg(fraction_evaluate=0.5), sparsity=0.7)
    >>> # in the ServerApp's main function: strategy.start(grid, initial_arrays, num_rounds=20)
    """

    def __init__(
        self,
        strategy: Strategy | None = None,
        *,
        sparsity: float = 0.7,
        scope: str = "global",
        normalisation: str = "none",
        gamma: float = 1.0,
        initial: str = "scratch",
        outside: str = "zero",
        biases: bool = False,
        prunable: Rule | None = None,
        exclude: Rule | None = None,
        output: Output | None = AUTO,
        prune_unmoved: bool = False,
        explorers: float = 1.0,
        min_explorers: int = 2,
        exploration_rounds: int = 1,
        exploration_epochs: int = 5,
        exploration_patience: int = 2,
        exploration_weighting: str = "uniform",
        exploration_values: str = "log8",
        exploration_timeout: float | None = None,
        exploration: Exploration | None = None,
        exploration_public: bool = False,
        mask: Mask | None = None,
        mask_schedule: Callable[..., Mask | None] | None = None,
        coordinates: str = "auto",
        values: str = "float32",
        values_up: str | None = None,
        values_down: str | None = None,
        seed: int | None = None,
        nodes: int | None = None,
        node_timeout: float | None = 60.0,
        ledger: Ledger | None = None,
        rules: ReplyRules | None = None,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self.strategy, self.mask, self.exploration = strategy, mask, exploration  # type: ignore[assignment]
        self.sparsity, self.scope, self.normalisation, self.gamma = sparsity, scope, normalisation, gamma
        self.initial, self.outside, self.biases = initial, outside, biases
        self.prunable, self.exclude, self.output = prunable, exclude, output
        self.prune_unmoved = prune_unmoved
        self.explorers, self.min_explorers = explorers, min_explorers
        self.exploration_rounds, self.exploration_epochs = exploration_rounds, exploration_epochs
        self.exploration_patience, self.exploration_weighting = exploration_patience, exploration_weighting
        self.exploration_values, self.exploration_public = exploration_values, exploration_public
        self.mask_schedule, self.coordinates = mask_schedule, coordinates
        self.values, self.values_up, self.values_down = values, values_up, values_down
        self.nodes, self.node_timeout, self.exploration_timeout = nodes, node_timeout, exploration_timeout
        self.seed, self.checkpoints = seed, checkpoints
        self.ledger, self.rules = ledger, rules  # type: ignore[assignment]
        check(self._arguments())
        self.privacy = privacy.budget_of(self.strategy)
        self._made_from: tuple[MaskPlan, ExplorationPlan, Exploration | None] = (
            self.mask_plan,
            self.exploration_plan,
            exploration,
        )
        self._moved_by: Exploration | None = None
        self._progress = Progress()
        self._quarantine = Quarantine(self.rules, self.ledger)
        self._round = 0
        self._packed = traits.resolve(coordinates, self.strategy) == "packed"
        self._integers = False
        self._translator, self._shadow, self._base, self._changed = None, {}, None, None
        self._fresh, self._asked, self._noted = True, 0, 0
        self._running = self._in_rounds = False
        self._ready = True

    def summary(self) -> None:
        """Log the settings, then those of the wrapped strategy."""
        log(INFO, "\t├──> AutoFlip settings:")
        log(INFO, "\t│\t├── Mask: %s", "none yet" if self.mask is None else f"density {self.mask.density:.4f}")
        log(INFO, "\t│\t├── Sparsity: %s (%s)", self.sparsity, self.scope)
        log(INFO, "\t│\t├── Outside the mask: %s", self.outside)
        log(INFO, "\t│\t├── Normalisation: %s, agreement power %s", self.normalisation, self.gamma)
        log(INFO, "\t│\t├── Values: %s up, %s down", self._up, self._down)
        log(INFO, "\t│\t└── Coordinates: %s", "packed" if self._packed else "dense")
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
        **own: Any,
    ) -> Result:
        """Explore, choose the mask, then run ``num_rounds`` pruned rounds; see :meth:`Strategy.start`.

        ``timeout`` (seconds) holds for each round, and for each exploration batch where ``exploration_timeout`` does
        not. ``evaluate_fn(0, arrays)`` sees the start under the mask, in full arrays. A wrapped strategy with a
        ``start`` of its own gets those of these parameters that it has, by name, and ``own``.

        Raises
        ------
        ValueError
            If the model cannot be pruned as asked, or explorers would work outside the noise of a differential-privacy
            wrapper, before any client works.
        CheckpointError
            If a checkpoint is in the way, damaged or of another run.
        TypeError
            If an argument is of another type, or neither Flower's ``start`` nor the wrapped strategy's takes it.
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
        loop.check(grid, initial_arrays, given)
        # a strategy with a loop of its own keeps it
        own_loop = type(self.strategy).start is not Strategy.start
        start = loop.twin(self.strategy, methods_of=self).start if own_loop else super().start
        loop.bind(start, given, own)
        self._running = True
        try:
            progress, first = self._prepare(given)
            args, named = loop.bind(start, given, own)
            result = start(*args, **named)
        finally:
            self._running = self._in_rounds = False
        if given["grid"] is not grid:  # who brings the facade, as the shipped app does, has a summary of its own
            self._tell_savings(initial_arrays)
        return result if own_loop else progress.complete(result, first)

    def _tell_savings(self, initial_arrays: ArrayRecord) -> None:
        sent, dense = self.ledger.bytes_by_phase(), self.ledger.dense_bytes_by_phase(initial_arrays)
        for line in savings.lines(sent, dense, pruned=not self._started.mask.is_full):
            log(INFO, "%s", line)

    def _prepare(self, given: dict[str, Any]) -> tuple[Progress, ArrayRecord]:
        """All that comes before the rounds; puts what their loop is to get into ``given``."""
        previous, initial = self._translator, model_of(given["initial_arrays"])
        if previous is not None:  # a second start, from what FedAdam, say, has made float64 of
            initial = previous.mask.layout.cast(initial)
        packed, self._packed = self._packed, traits.resolve(self.coordinates, self.strategy) == "packed"
        self._integers = not self._packed and traits.shows_integers(self.strategy)
        layout = self.mask_plan.layout(initial)
        self._let_go(layout)
        self.mask_plan.rehearse(layout, initial, self.mask, self.exploration)
        self._quarantine = Quarantine(self.rules, self.ledger)
        if self._explores and not self.exploration_public:
            privacy.check_exploration(self.strategy)
        progress = self._progress = Progress(self.checkpoints)
        resumed = progress.open(self._decisive(layout, initial, packed=self._packed))
        timeout = math.inf if given["timeout"] is None else given["timeout"]
        facade = self._connect(given["grid"], timeout)
        everything = Mask.full(layout)
        own = vars(self)  # what is chosen here is not of the user's setting
        going_on = previous is not None and goes_on(previous.subspace, initial)
        full = last_values(previous.mask, self._shadow, initial) if previous is not None and going_on else initial
        began = self._base if going_on and self._base is not None else initial
        if self._explores:
            own["exploration"] = progress.exploration(self.ledger)
        if self._explores and not resumed:
            config = given["train_config"] or ConfigRecord()
            named = began if self.outside == "initial" and self.initial == "scratch" else None
            own["exploration"] = self._explore(facade, everything, initial, config, timeout, named)
            progress.explored(own["exploration"], self.ledger)
        if resumed:
            own["mask"] = progress.mask(layout)
        elif self.mask is None and self.exploration is not None:
            own["mask"] = self.mask_plan.choose(layout, initial, self.exploration)
        own["mask"] = mask = everything if self.mask is None else self.mask
        self._made_from = (self.mask_plan, self.exploration_plan, self.exploration)
        log(INFO, "mask: %d of %d prunable parameters kept", mask.kept, layout.prunable_size)
        if self.initial == "scouts" and self.exploration is not None and self.exploration is not self._moved_by:
            full, self._moved_by = start_arrays(full, self.exploration), self.exploration
            began = full
        stored = None if began is initial else {spec.name: began[spec.name] for spec in layout.prunable}
        if resumed:
            stored = progress.base
            began = initial if stored is None else {**initial, **stored}
        self._shadow, self._base = full, began if self.outside == "initial" else None
        subspace = Subspace(mask, self._base)
        warn_of_problems(subspace)
        if previous is not None and not resumed and same_arrays(previous.mask.layout, full):
            moved = previous.shown, previous.mask, subspace, full
            optimizer_state.carry_state(self.strategy, *moved, packed=self._packed, was_packed=packed)
        self._translator = translator = self._translate(mask, full, self._base, facade.bases)
        facade.repeat = translator.repeat
        first = to_record(subspace.project(full))
        anchor = initial if self._base is None else self._base
        parts = Parts(self.strategy, self.ledger, self._quarantine, self.privacy, facade)
        if resumed:
            first, shadow, translator.integers = progress.model(subspace)
            self._shadow = anchor if shadow is None else shadow
            own["mask"] = progress.next_mask(layout) or mask
            progress.restore(parts)
            if self._up == "int8":
                log(INFO, "what rounding had lost of the nodes' updates is forgotten: int8 replies begin without it")

        def keep(round_: int, arrays: ArrayRecord) -> None:
            shadow = None if self._shadow is anchor else self._shadow
            base = None if self._base is None else stored
            next_mask = None if self.mask is translator.mask else self.mask
            progress.keep(round_, arrays, shadow, base, translator, parts, next_mask)

        self._fresh, self._asked, self._changed, self._in_rounds = progress.before == 0, 0, None, True
        given |= {"grid": facade, "initial_arrays": first, "num_rounds": max(given["num_rounds"] - progress.before, 0)}
        if self.checkpoints is not None:
            given["evaluate_fn"] = progress.evaluation(given["evaluate_fn"], keep)
        return progress, first

    def _let_go(self, layout: Layout) -> None:
        """Let go of a mask and an exploration that were made under other settings than those of now."""
        mask_plan, exploration_plan, exploration = self._made_from
        if self._brought["exploration"] is None and self.exploration is not None:
            known = [self.exploration.deviation]
            if self.normalisation == "per-client":
                known.append(self.exploration.normalised)
            lacks = any(each.keys() != {spec.name for spec in layout.prunable} for each in known)
            if lacks or exploration_plan != self.exploration_plan:
                vars(self)["exploration"] = None
        if self._brought["mask"] is None and (mask_plan != self.mask_plan or exploration is not self.exploration):
            vars(self)["mask"] = None

    def _connect(self, grid: Grid, timeout: float) -> OrderedGrid:
        """The facade of the grid; the nodes that are expected are there where it matters who takes part."""
        facade = grid if isinstance(grid, OrderedGrid) else OrderedGrid(grid, seed=self.seed)
        facade.ledger = self.ledger
        needed = traits.nodes_needed(self.strategy)
        facade.choose = lambda nodes: self._quarantine.active(nodes, self._round, needed)
        if not facade.calls.begun and (self._explores or self.seed is not None or self.checkpoints is not None):
            try:
                facade.roll_call(
                    minimum=traits.nodes_waited_for(self.strategy),
                    expected=self.nodes or 0,
                    fewest=max(needed, self.exploration_plan.min_explorers) if self._explores else needed,
                    timeout=min(self.node_timeout or timeout, timeout),
                    longest=timeout,
                )
            except RuntimeError as error:
                raise RuntimeError(
                    f"{error}: start more nodes, or lower min_available_nodes and min_train_nodes of the strategy"
                ) from error
        return facade

    def _explore(
        self,
        facade: OrderedGrid,
        everything: Mask,
        initial: Arrays,
        config: ConfigRecord,
        timeout: float,
        base: Arrays | None,
    ) -> Exploration:
        seen = self._translate(everything, initial).to_strategy(everything.gather(initial))
        return explore(
            self.exploration_plan,
            facade,
            initial,
            template_of(self.strategy, seen, config, facade),
            mask=everything,
            weight_key=traits.weight_key_of(self.strategy),
            kind=self._down,
            seed=self.seed,
            timeout=self.exploration_timeout or timeout,
            judge=self._judge(),
            checkpoints=self.checkpoints,
            per_client=self.normalisation == "per-client",
            base="" if base is None else base_digest(everything.layout, base),
        )

    @property
    def _explores(self) -> bool:
        return self.mask is None and self.exploration is None and self.mask_plan.sparsity > 0

    def _translate(
        self, mask: Mask, initial: Arrays, base: Arrays | None = None, told: Told | None = None
    ) -> Translator:
        return Translator(
            mask,
            initial,
            packed=self._packed,
            integers=self._integers,
            weight_key=traits.weight_key_of(self.strategy),
            judge=self._judge(),
            nudges=traits.divides_by_norm(self.strategy),
            down=self._down,
            up=self._up,
            base=base,
            told=told,
        )

    def _judge(self) -> Judge:
        return Judge(
            self._quarantine,
            weight_key=traits.weight_key_of(self.strategy),
            needed=traits.metrics_needed(self.strategy),
            averaged=traits.metrics_averaged(self.strategy),
        )
