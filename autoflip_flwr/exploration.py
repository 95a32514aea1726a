"""Federated loss exploration: before round 1, explorers train from the same W0 and report how far they moved."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from logging import INFO, WARNING
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.common.logger import log
from flwr.serverapp.strategy import Strategy

from autoflip_flwr import evidence, firewall, maskrecord, wire
from autoflip_flwr.coordinates import setting
from autoflip_flwr.grid import OrderedGrid
from autoflip_flwr.guidance import Exploration, combine
from autoflip_flwr.layout import Arrays
from autoflip_flwr.ledger import Ledger, examples_processed, why_absent
from autoflip_flwr.mask import Mask
from autoflip_flwr.mod import EPOCHS_KEY, PATIENCE_KEY, PHASE_KEY, WEIGHT_DECAY_KEY
from autoflip_flwr.norms import Update, joint_norm
from autoflip_flwr.quarantine import Quarantine

if TYPE_CHECKING:
    from autoflip_flwr.checkpoint import Checkpoints  # needs safetensors, which only those who keep some have

WEIGHTINGS = ("uniform", "examples")
VALUES = ("log8", "float32")
ROUND_KEY = "server-round"
"""Key of the round in the config records of Flower's strategies; it is 0 in the exploration."""


@dataclass(frozen=True)
class ExplorationPlan:
    """Who explores, and how.

    Parameters
    ----------
    explorers : float
        Share of the connected nodes that explore, in (0, 1].
    min_explorers : int
        The mask is made from those that answer, if they are at least this many.
    rounds : int
        Number of batches, of different explorers each, all starting from W0.
    epochs, patience : int
        Sent to the explorers: at most so many epochs, stopping after ``patience`` epochs without a better mean
        training loss.
    weighting : str
        ``"uniform"`` (the authors' code) or ``"examples"``, by number of examples (our reading).
    values : str
        How explorers' moves travel: ``"log8"``, a byte a parameter or less (:mod:`autoflip_flwr.moves`), or
        ``"float32"``, as the model has them.
    """

    explorers: float = 1.0
    min_explorers: int = 2
    rounds: int = 1
    epochs: int = 5
    patience: int = 2
    weighting: str = "uniform"
    values: str = "log8"

    def __post_init__(self) -> None:
        if not 0 < self.explorers <= 1:
            raise ValueError(f"explorers = {self.explorers}: must be a share in (0, 1]")
        for name in ("min_explorers", "rounds", "epochs", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        for name, allowed in (("weighting", WEIGHTINGS), ("values", VALUES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be one of {', '.join(allowed)}")


def explore(
    plan: ExplorationPlan,
    grid: OrderedGrid,
    initial: Arrays,
    template: Template,
    *,
    mask: Mask,
    weight_key: str,
    kind: str,
    seed: int | None,
    timeout: float | None,
    quarantine: Quarantine,
    checkpoints: Checkpoints | None = None,
    per_client: bool = False,
) -> Exploration:
    """Run the exploration.

    Parameters
    ----------
    plan : ExplorationPlan
        Who explores, and how.
    grid : OrderedGrid
        The nodes, and the ledger that is charged.
    initial : dict[str, ndarray]
        W0, the full model.
    template : Template
        What the wrapped strategy would send in round 1; its ArrayRecords are replaced by W0, its round by 0.
    mask : Mask
        A mask that keeps everything.
    weight_key : str
        Metric that holds an explorer's number of examples.
    kind : str
        How W0 is coded on its way to the explorers, one of :data:`~autoflip_flwr.values.KINDS`.
    seed : int | None
        Makes the choice of explorers reproducible.
    timeout : float | None
        Seconds for each batch. A node that has not answered the roll call explores only where too few others would.
    quarantine : Quarantine
        Takes the replies that are left out.
    checkpoints : Checkpoints | None
        Where answers are kept as they come; those that are there already are not asked for again.
    per_client : bool
        Also average what ``normalisation="per-client"`` needs.

    Raises
    ------
    RuntimeError
        If fewer than ``min_explorers`` nodes are connected or answer, if none of them moved anything, or if most of
        them returned updates instead of weights.
    """
    kept = {} if checkpoints is None else checkpoints.explorers()
    if kept:
        log(INFO, "exploration: %d answers have come before the interruption", len(kept))
    for about, _ in kept.values():
        grid.ledger.charge_exploration(about["cost"])
    names = _names(grid)
    gone = {name: name for name in kept.keys() - names.values()}
    names |= gone
    nodes = sorted(names, key=names.__getitem__) if gone else list(names)
    if len(nodes) < plan.min_explorers:
        raise RuntimeError(
            f"min_explorers = {plan.min_explorers}, but only {len(nodes)} nodes are connected: start more, or let "
            f"fewer explore (min_explorers={max(len(nodes), 1)})"
        )
    count = max(plan.min_explorers, len(kept), round(plan.explorers * len(nodes)))
    able = [node for node in nodes if node not in grid.calls.mute or names[node] in kept]
    nodes = able if len(able) >= plan.min_explorers else nodes
    count = min(len(nodes), count)
    chosen = _sample(nodes, count, seed, {node for node in nodes if names[node] in kept})
    problems: dict[str, list[int]] = {}  # reason -> nodes
    compared = mask.layout.prunable_names or [spec.name for spec in mask.layout.specs if spec.floating]
    length = joint_norm(initial[name] for name in compared)

    def judge(reply: Message) -> Answer:
        weight, moves = firewall.judge_moves(
            reply, mask=mask, weight_key=weight_key, kind=plan.values, max_weight=quarantine.rules.max_examples
        )
        (record,) = reply.content.array_records.values()
        if not math.isfinite(joint_norm(moves.values())):
            raise wire.WireError("the norm of its moves overflows")
        norm = joint_norm(moves[name] for name in compared)
        return Answer(Update(norm, weight, examples_processed(reply.content), length), record)

    judged: dict[str, Answer | wire.WireError] = {}  # by the message's id: each reply is judged once

    def arrived(message: Message, reply: Message) -> None:
        if reply.has_error():
            return
        try:
            answer = judged[message.metadata.message_id] = judge(reply)
        except wire.WireError as error:
            judged[message.metadata.message_id] = error
            return
        if checkpoints is not None:
            cost = Ledger()
            cost.sent(message)
            cost.received(message, reply)
            about = {"update": dataclasses.asdict(answer.update), "cost": cost.exploration_only()}
            checkpoints.add_explorer(names[message.metadata.dst_node_id], about, answer.moves)

    def left_out(node: int, reason: str) -> None:
        quarantine.strike(node, "exploration", 0, reason)
        problems.setdefault(reason, []).append(node)

    def answers() -> Iterator[tuple[float, Arrays]]:
        packed = wire.pack(mask, mask.gather(initial), kind)
        head = wire.header(
            wire.EXPLORE, 0, mask, **wire.weight_key(weight_key), **wire.kinds(values=kind, reply=plan.values)
        )
        ours = RecordDict({wire.HEADER: head, wire.MASK: maskrecord.encode_mask(mask)})
        contents: dict[int, RecordDict] = {}  # strategies put one record into all of their messages, or few

        def content(node: int) -> RecordDict:
            own = template.by_node.get(node, template.other)
            if id(own) not in contents:
                contents[id(own)] = _content(plan, own, packed, ours)
            return contents[id(own)]

        batches = [chosen[start :: plan.rounds] for start in range(min(plan.rounds, count))]
        for number, batch in enumerate(batches, 1):
            log(INFO, "[EXPLORATION %d/%d] %d explorers", number, len(batches), len(batch))
            missing = [node for node in batch if names[node] not in kept]
            messages = [Message(content(node), node, MessageType.TRAIN, group_id="exploration") for node in missing]
            replies = {reply.metadata.reply_to_message_id: reply for reply in grid.exchange(messages, timeout, arrived)}
            came = {message.metadata.dst_node_id: replies.get(message.metadata.message_id) for message in messages}
            good: dict[int, Answer] = {}
            for node in batch:
                if (before := kept.get(names[node])) is not None:
                    good[node] = Answer(Update(**before[0]["update"]), before[1])
                elif (reply := came[node]) is None:
                    continue
                elif reply.has_error():
                    problems.setdefault(firewall.explain(reply.error), []).append(node)
                elif isinstance(answer := judged.pop(str(reply.metadata.reply_to_message_id)), wire.WireError):
                    left_out(node, str(answer))
                else:
                    good[node] = answer
            far = quarantine.judge_norms({node: answer.update for node, answer in good.items()}, "exploration", 0)
            for node, answer in good.items():
                if node in far:
                    left_out(node, far[node])
                    continue
                weight = answer.update.weight if plan.weighting == "examples" else 1.0
                moves = firewall.read_moves(answer.moves, mask=mask, kind=plan.values)
                updates.add(moves)
                yield weight, moves

    updates = evidence.Updates(mask.layout, initial)
    try:
        found = combine(mask.layout, answers(), per_client=per_client)
    except ValueError as error:
        reasons = _first(problems, grid.ledger)
        told = firewall.FIRST in reasons or grid.calls.with_mod
        hint = "" if told else f" (if the clients run without it: {firewall.FIRST})"
        raise RuntimeError(f"the exploration failed: {error}{hint}; {reasons}") from error
    if found.explorers < plan.min_explorers:
        raise RuntimeError(
            f"{found.explorers} of {count} explorers answered, but min_explorers = {plan.min_explorers}; "
            f"{_first(problems, grid.ledger)}"
        )
    log(INFO, "exploration: %d of %d explorers answered", found.explorers, count)
    evidence.check_moved(found)
    updates.check()
    return found


@dataclass(frozen=True)
class Answer:
    """An explorer's reply that may be counted: what its length is judged by, and its moves as they came."""

    update: Update
    moves: ArrayRecord


@dataclass(frozen=True)
class Template:
    """What the wrapped strategy would send in round 1: to each node that it names, and to any other."""

    by_node: dict[int, RecordDict]
    other: RecordDict


def template_of(strategy: Strategy, arrays: ArrayRecord, config: ConfigRecord, grid: OrderedGrid) -> Template:
    """What the strategy would send in round 1, asked of a copy so that neither it nor ``random`` is disturbed."""
    config = ConfigRecord(dict(config))
    messages: list[Message] = []
    state = random.getstate()
    try:
        messages = list(copy.deepcopy(strategy).configure_train(1, arrays, config, grid))
    except Exception as error:  # a lock or a file cannot be copied; what its own start sets is not there yet
        name = type(strategy).__name__
        log(WARNING, "a copy of %s cannot be asked (%r): explorers get the train config alone", name, error)
    finally:
        random.setstate(state)
    if messages:
        return Template({message.metadata.dst_node_id: message.content for message in messages}, messages[0].content)
    config[ROUND_KEY] = 1
    arrays_key, config_key = (
        setting(strategy, "arrayrecord_key", "arrays"),
        setting(strategy, "configrecord_key", "config"),
    )
    return Template({}, RecordDict({str(arrays_key): arrays, str(config_key): config}))


def _content(plan: ExplorationPlan, template: RecordDict, packed: ArrayRecord, ours: RecordDict) -> RecordDict:
    content = RecordDict(dict(template))
    content[next(iter(content.array_records), "arrays")] = packed
    config_key, config = next(iter(content.config_records.items()), ("config", ConfigRecord()))
    told = {ROUND_KEY: 0} if ROUND_KEY in config else {}
    asked: dict[str, float | str] = {
        PHASE_KEY: wire.EXPLORE,
        EPOCHS_KEY: plan.epochs,
        PATIENCE_KEY: plan.patience,
        WEIGHT_DECAY_KEY: 0.0,
    }
    content[config_key] = ConfigRecord({**config, **told, **asked})
    return RecordDict({**content, **ours})


def _names(grid: OrderedGrid) -> dict[int, int]:
    """Connected nodes -> what each is known by when it comes back under another id: the partition that it alone has."""
    nodes = grid.get_node_ids()
    told = {node: grid.partitions.get(node, node) for node in nodes}
    claims = Counter(told.values())
    return {node: name if claims[name] == 1 else node for node, name in told.items()}


def _sample(nodes: list[int], count: int, seed: int | None, sure: Collection[int]) -> list[int]:
    """So many of the nodes, in their order, with those that are ``sure`` among them."""
    if count == len(nodes):
        return nodes
    # drawn from a generator of its own, so that the wrapped strategy's sampling is the same with and without us
    drawn = random.Random(None if seed is None else f"{seed}/explorers").sample(nodes, count)
    others = [node for node in drawn if node not in sure][: count - len(sure)]
    return [node for node in nodes if node in sure or node in others]


def _first(problems: dict[str, list[int]], ledger: Ledger) -> str:
    told = [f"node {nodes[0]} and {len(nodes) - 1} more: {reason}" for reason, nodes in problems.items()]
    return "; ".join(told[:3]).replace(" and 0 more", "") or why_absent(
        each for each in ledger.incidents if each["phase"] == "exploration"
    )
