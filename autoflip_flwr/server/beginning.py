"""Do all that comes before the rounds: wait for nodes, explore, choose the first mask, or resume a run."""

from __future__ import annotations

import math
from logging import INFO
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, ConfigRecord
from flwr.common.logger import log
from flwr.serverapp import Grid

from autoflip_flwr.core.choices import AUTO_SPARSITY, MOST_SPARSITY
from autoflip_flwr.core.layout import Arrays, Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.method import Method, check_requests
from autoflip_flwr.core.statistics import Exploration, Statistics, named, statistics_of
from autoflip_flwr.core.subspace import Subspace
from autoflip_flwr.replies.batch import Judge
from autoflip_flwr.replies.quarantine import Quarantine
from autoflip_flwr.server.base_delivery import Told
from autoflip_flwr.server.exploration import Reports, explore
from autoflip_flwr.server.first_mask import choose_first, model_of, rehearse, warn_of_problems
from autoflip_flwr.server.grid import OrderedGrid
from autoflip_flwr.server.participants import Explorers
from autoflip_flwr.server.progress import Parts, Progress
from autoflip_flwr.server.rounds import Rounds
from autoflip_flwr.server.schedule import goes_on, last_values, same_arrays
from autoflip_flwr.server.translator import Translator
from autoflip_flwr.wire.base_record import base_digest
from autoflip_flwr.wire.records import to_record
from autoflip_flwr.wrapped import optimizer_state, traits
from autoflip_flwr.wrapped.privacy import check_exploration
from autoflip_flwr.wrapped.template import Template, template_of

if TYPE_CHECKING:
    from autoflip_flwr.storage.checkpoint import Checkpoints  # needs safetensors, which is optional


class Beginning(Rounds):
    """What :meth:`Pruned.start <autoflip_flwr.server.strategy.Pruned.start>` does before Flower's loop begins."""

    sparsity: float | str
    coordinates: str
    outside: str
    lr_power: float
    seed: int | None
    checkpoints: Checkpoints | None
    _integers: bool
    _made_from: tuple[dict[str, Any], object, Exploration | Statistics | None]
    """What the present mask and exploration were made from."""
    _moved_by: Exploration | Statistics | None
    """The exploration whose average is the model that training began with."""
    _reports: Reports | None
    """What each explorer of the present exploration reported; ``None`` if that was not kept."""

    def _prepare(self, given: dict[str, Any]) -> tuple[Progress, ArrayRecord]:
        """Do all that comes before the rounds. Put the arguments for their loop into ``given``."""
        previous, initial = self._translator, model_of(given["initial_arrays"])
        if previous is not None:  # a second start: its model may be float64 by now, as FedAdam makes it
            initial = previous.mask.layout.cast(initial)
        packed, self._packed = self._packed, traits.resolve(self.coordinates, self.strategy) == "packed"
        self._integers = not self._packed and traits.shows_integers(self.strategy)
        layout = self._layout(initial)
        self.method.plan(self._most, given["num_rounds"])
        if self.sparsity == AUTO_SPARSITY:
            self.method.seek()
        who = self._asks_who(given["num_rounds"])
        self._let_go(layout, reports=who)
        rehearse(self.method, self._most, layout, initial, self.mask, statistics_of(self.exploration))
        self._quarantine = Quarantine(self.rules, self.ledger)
        asked = [bool(check_requests(self.method, round_)) for round_ in range(1, given["num_rounds"] + 1)]
        if (self._explores or any(asked)) and not self.method.public:
            check_exploration(self.strategy)
        progress = self._progress = Progress(self.checkpoints)
        resumed = progress.open(self._decisive(layout, initial, packed=self._packed))
        timeout = math.inf if given["timeout"] is None else given["timeout"]
        facade = self._connect(given["grid"], timeout, named=who)
        everything = Mask.full(layout)
        own = vars(self)  # past the setters: what is chosen here is not the user's setting
        going_on = previous is not None and goes_on(previous.subspace, initial)
        full = last_values(previous.mask, self._shadow, initial) if previous is not None and going_on else initial
        began = self._base if going_on and self._base is not None else initial
        if self._explores:
            found = progress.exploration(self.ledger)
            own["exploration"], self._reports = (None, None) if found is None else (named(found[0]), found[1])
        if self._explores and not resumed:
            self._reports = {} if who else None
            config = given["train_config"] or ConfigRecord()
            base = began if self.outside == "initial" and self.method.initial == "scratch" else None
            seen = self._explore(facade, everything, initial, config, timeout, base)
            own["exploration"] = named(seen)
            progress.explored(seen, self._reports, self.ledger)
        self._initial, self._explorers = initial, self._with_reports(facade, layout) if who else None
        if resumed:
            own["mask"] = progress.mask(layout)
        elif self.mask is None and self._most > 0:
            own["mask"] = choose_first(self.method, self._most, layout, initial, statistics_of(self.exploration))
        own["mask"] = mask = everything if self.mask is None else self.mask
        self._made_from = (self._choosing(), self.method.exploring(), self.exploration)
        log(INFO, "mask: %d of %d prunable parameters kept", mask.kept, layout.prunable_size)
        if self.exploration is not self._moved_by:
            moved, self._moved_by = self.method.begin(full, statistics_of(self.exploration)), self.exploration
            began = began if moved is full else moved
            full = moved
        stored = None if began is initial else {spec.name: began[spec.name] for spec in layout.prunable}
        if resumed:
            stored = progress.base
            began = initial if stored is None else {**initial, **stored}
        self._shadow, self._base = full, began if self.outside == "initial" else None
        subspace = Subspace(mask, self._base)
        warn_of_problems(subspace)
        if previous is not None and not resumed and same_arrays(previous.mask.layout, full):
            carried = previous.shown, previous.mask, subspace, full
            optimizer_state.carry_state(self.strategy, *carried, packed=self._packed, was_packed=packed)
        self._translator = translator = self._translate(mask, full, self._base, facade.bases)
        facade.repeat = translator.repeat
        first = to_record(subspace.project(full))
        anchor = initial if self._base is None else self._base
        parts = Parts(self.strategy, self.ledger, self._quarantine, self.privacy, facade, self.method)
        if resumed:
            first, shadow, translator.integers = progress.model(subspace)
            self._shadow = anchor if shadow is None else shadow
            own["mask"], translator.seen = progress.next_mask(layout) or mask, progress.seen()
            progress.restore(parts)
            if self._values.up == "int8":
                log(INFO, "what rounding had lost of the nodes' updates is forgotten: int8 replies begin without it")

        def keep(round_: int, arrays: ArrayRecord) -> None:
            shadow = None if self._shadow is anchor or self.method.grow_from != "last" else self._shadow
            base = None if self._base is None else stored
            next_mask = None if self.mask is translator.mask else self.mask
            progress.keep(round_, arrays, shadow, base, translator, parts, next_mask)

        self._fresh, self._asked, self._changed, self._in_rounds = progress.before == 0, 0, None, True
        given |= {"grid": facade, "initial_arrays": first, "num_rounds": max(given["num_rounds"] - progress.before, 0)}
        if self.checkpoints is not None:
            given["evaluate_fn"] = progress.evaluation(given["evaluate_fn"], keep)
        return progress, first

    def _asks_who(self, rounds: int) -> bool:
        """Return whether the nodes that a round samples decide its mask, and so single reports are needed.

        Raises
        ------
        ValueError
            If there can be none.
        """
        asks = self._brought["mask"] is None and any(map(self.method.asks_who, range(1, rounds + 1)))
        if asks and self._brought["exploration"] is not None:
            raise ValueError(
                "exploration: holds averages over its explorers, and the method asks what each explorer among a "
                "round's nodes reported: leave it out, so that they explore in this run"
            )
        if asks and not self.method.request(0):
            raise ValueError(
                f"{self.method!r}: asks what the explorers among a round's nodes reported, and nobody explores: use "
                "LossExploration(...), or another schedule"
            )
        return asks

    def _with_reports(self, facade: OrderedGrid, layout: Layout) -> Explorers:
        """Return the explorers; raise ``CheckpointError`` if their reports are lost."""
        if self._reports is None:
            from autoflip_flwr.storage.checkpoint import CheckpointError  # needs safetensors

            raise CheckpointError(
                "what each explorer reported is not in the checkpoints, and the masks need it: begin the run anew, in "
                "another folder"
            )
        return Explorers(self._reports, facade, self.method, layout, self._values.deltas)

    def _let_go(self, layout: Layout, *, reports: bool) -> None:
        """Drop a mask and an exploration that were made under other settings than the present ones.

        ``reports`` says whether an exploration without single reports is dropped, too.
        """
        choosing, exploring, exploration = self._made_from
        seen = statistics_of(self.exploration)
        if self._brought["exploration"] is None and seen is not None:
            known = [*seen.mean_square.values(), *(seen.mean.values() if not seen.mean_square else ())]
            lacks = any(each.keys() != set(layout.prunable_names) for each in known)
            if lacks or exploring != self.method.exploring() or (reports and self._reports is None):
                vars(self)["exploration"] = None
        if self._brought["mask"] is None and (choosing != self._choosing() or exploration is not self.exploration):
            vars(self)["mask"] = None

    def _connect(self, grid: Grid, timeout: float, *, named: bool) -> OrderedGrid:
        """Return the facade of the grid. Wait for the expected nodes if it matters who takes part.

        It does if nodes explore, and also if ``named``: then masks depend on which nodes take part.
        """
        facade = grid if isinstance(grid, OrderedGrid) else OrderedGrid(grid, seed=self.seed)
        facade.ledger = self.ledger
        needed = traits.nodes_needed(self.strategy)
        facade.choose = lambda nodes: self._quarantine.active(nodes, self._round, needed)
        matters = named or self._explores or self.seed is not None or self.checkpoints is not None
        if not facade.calls.begun and matters:
            try:
                facade.roll_call(
                    minimum=traits.nodes_waited_for(self.strategy),
                    expected=self._nodes.expected or 0,
                    fewest=max(needed, self.method.min_explorers) if self._explores else needed,
                    timeout=min(self._nodes.timeout or timeout, timeout),
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
    ) -> Statistics:
        kept = "" if base is None else base_digest(everything.layout, base)
        template = self._template(facade, everything, initial, config)
        more = {"checkpoints": self.checkpoints, "base": kept, "reports": self._reports}
        return self._ask(self.method, facade, initial, template, everything, timeout, **more)

    def _template(self, facade: OrderedGrid, everything: Mask, initial: Arrays, config: ConfigRecord) -> Template:
        """Return what the strategy would send to each node in round 1."""
        seen = self._translate(everything, initial).to_strategy(everything.gather(initial))
        return template_of(self.strategy, seen, config, facade)

    def _ask(
        self,
        method: Method,
        facade: OrderedGrid,
        model: Arrays,
        template: Template,
        everything: Mask,
        timeout: float,
        **more: Any,
    ) -> Statistics:
        """Let nodes explore from a model, as ``method`` says."""
        return explore(
            method,
            facade,
            model,
            template,
            mask=everything,
            weight_key=traits.weight_key_of(self.strategy),
            kind=self._values.down,
            deltas=self._values.deltas,
            seed=self.seed,
            timeout=method.timeout or timeout,
            judge=self._judge(),
            **more,
        )

    @property
    def _most(self) -> float:
        """The largest sparsity that the run may reach."""
        return MOST_SPARSITY if isinstance(self.sparsity, str) else self.sparsity

    @property
    def _explores(self) -> bool:
        chooses = self.mask is None and self.exploration is None and (self._most > 0 or self.method.dense)
        return chooses and bool(self.method.request(0))

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
            method=self.method,
            nudges=traits.divides_by_norm(self.strategy),
            down=self._values.down,
            up=self._values.up,
            lr_power=self.lr_power,
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
