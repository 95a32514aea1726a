"""Federated loss exploration: before round 1, explorers train from the same W0 and report how far they moved."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Collection, Iterator
from logging import INFO, WARNING
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.common.logger import log

from autoflip_flwr.core import evidence
from autoflip_flwr.core.layout import Arrays
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.statistics import Exploration, combine
from autoflip_flwr.costs.ledger import Ledger
from autoflip_flwr.replies.batch import Answer, Judge
from autoflip_flwr.replies.check import MOD_FIRST, explain_error, read_deltas
from autoflip_flwr.replies.norms import Update, joint_norm
from autoflip_flwr.server.grid import OrderedGrid
from autoflip_flwr.wire import mask_record
from autoflip_flwr.wire.base_record import base_entry
from autoflip_flwr.wire.keys import (
    EPOCHS_KEY,
    EXPLORE,
    HEADER,
    MASK_RECORD,
    PATIENCE_KEY,
    PHASE_KEY,
    ROUND_KEY,
    WEIGHT_DECAY_KEY,
)
from autoflip_flwr.wire.messages import make_header, pack_values, value_entries, weight_entry
from autoflip_flwr.wire.records import WireError

if TYPE_CHECKING:
    from autoflip_flwr.storage.checkpoint import Checkpoints  # needs safetensors, which only those who keep some have
from autoflip_flwr.server.plans import ExplorationPlan
from autoflip_flwr.wrapped.template import Template


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
    judge: Judge,
    checkpoints: Checkpoints | None = None,
    per_client: bool = False,
    base: str = "",
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
        How W0 is coded on its way to the explorers, one of :data:`~autoflip_flwr.wire.values.KINDS`.
    seed : int | None
        Makes the choice of explorers reproducible.
    timeout : float | None
        Seconds for each batch. A node that has not answered the roll call explores only where too few others would.
    judge : Judge
        Judges the replies.
    checkpoints : Checkpoints | None
        Where answers are kept as they come; those that are there already are not asked for again.
    per_client : bool
        Also average what ``normalisation="per-client"`` needs.
    base : str
        Digest of what will stand outside the mask, if explorers may keep it: W0. "": nothing of it.

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

    judged: dict[str, Answer | WireError] = {}  # by the message's id: each reply is judged once

    def arrived(message: Message, reply: Message) -> None:
        if reply.has_error():
            return
        try:
            answer = judge.explorer(reply, mask=mask, kind=plan.values, compared=compared, length=length)
        except WireError as error:
            judged[message.metadata.message_id] = error
            return
        judged[message.metadata.message_id] = answer
        if checkpoints is not None:
            cost = Ledger()
            cost.sent(message)
            cost.received(message, reply)
            about = {"update": dataclasses.asdict(answer.update), "cost": cost.exploration_only()}
            checkpoints.add_explorer(names[message.metadata.dst_node_id], about, answer.deltas)

    def answers() -> Iterator[tuple[float, Arrays]]:
        packed = pack_values(mask, mask.gather(initial), kind)
        told = weight_entry(weight_key) | base_entry(base)
        head = make_header(EXPLORE, 0, mask, **told, **value_entries(values=kind, reply=plan.values))
        ours = RecordDict({HEADER: head, MASK_RECORD: mask_record.encode_mask(mask)})
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
            found: dict[int, Answer | WireError] = {}
            for node in batch:
                if (before := kept.get(names[node])) is not None:
                    found[node] = Answer(Update(**before[0]["update"]), before[1])
                elif (reply := came[node]) is None:
                    continue
                elif reply.has_error():
                    problems.setdefault(explain_error(reply.error), []).append(node)
                else:
                    found[node] = judged.pop(str(reply.metadata.reply_to_message_id))
            good, rejected = judge.explorers(found)
            for node, reason in rejected.items():
                problems.setdefault(reason, []).append(node)
            for answer in good.values():
                weight = answer.update.weight if plan.weighting == "examples" else 1.0
                deltas = read_deltas(answer.deltas, mask=mask, kind=plan.values)
                updates.add(deltas)
                yield weight, deltas

    updates = evidence.Updates(mask.layout, initial)
    try:
        found = combine(mask.layout, answers(), per_client=per_client)
    except ValueError as error:
        reasons = _first(problems)
        told = MOD_FIRST in reasons or grid.calls.with_mod
        hint = "" if told else f" (if the clients run without it: {MOD_FIRST})"
        raise RuntimeError(f"the exploration failed: {error}{hint}; {reasons}") from error
    if found.explorers < plan.min_explorers:
        raise RuntimeError(
            f"{found.explorers} of {count} explorers answered, but min_explorers = {plan.min_explorers}; "
            f"{_first(problems)}"
        )
    log(INFO, "exploration: %d of %d explorers answered", found.explorers, count)
    evidence.check_moved(found)
    if doubt := updates.check():
        log(WARNING, "%s", doubt)
    return found


def _content(plan: ExplorationPlan, template: RecordDict, packed: ArrayRecord, ours: RecordDict) -> RecordDict:
    content = RecordDict(dict(template))
    content[next(iter(content.array_records), "arrays")] = packed
    config_key, config = next(iter(content.config_records.items()), ("config", ConfigRecord()))
    told = {ROUND_KEY: 0} if ROUND_KEY in config else {}
    asked: dict[str, float | str] = {
        PHASE_KEY: EXPLORE,
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


def _first(problems: dict[str, list[int]]) -> str:
    told = [f"node {nodes[0]} and {len(nodes) - 1} more: {reason}" for reason, nodes in problems.items()]
    return "; ".join(told[:3]).replace(" and 0 more", "") or "no reply in time"
