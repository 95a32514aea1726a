"""Run round 0: before training, explorers work from the same W0 and report what the method asks for."""

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
from autoflip_flwr.core.choices import LOG8
from autoflip_flwr.core.layout import Arrays
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.method import Method, check_requests
from autoflip_flwr.core.request import DELTA, Request
from autoflip_flwr.core.statistics import Accumulator, Exploration, Statistics
from autoflip_flwr.costs.ledger import Ledger, why_absent
from autoflip_flwr.replies.batch import Answer, Judge
from autoflip_flwr.replies.check import MOD_FIRST, explain_error, read_answer
from autoflip_flwr.replies.norms import Update, joint_norm
from autoflip_flwr.server.grid import OrderedGrid
from autoflip_flwr.wire import mask_record
from autoflip_flwr.wire.base_record import base_entry
from autoflip_flwr.wire.keys import (
    EXPLORE,
    HEADER,
    MASK_RECORD,
    NOTHING,
    PHASE_KEY,
    ROUND_KEY,
)
from autoflip_flwr.wire.messages import make_header, pack_values, value_entries, weight_entry
from autoflip_flwr.wire.records import WireError
from autoflip_flwr.wire.request import ask_entry, to_report
from autoflip_flwr.wrapped.template import Template

if TYPE_CHECKING:
    from autoflip_flwr.storage.checkpoint import Checkpoints  # needs safetensors, which is optional

Reports = dict[int, tuple[float, ArrayRecord]]
"""What each explorer reported, by its stable name (:func:`names_of`): its weight in averages, its record as it came."""


def explore(
    method: Method,
    grid: OrderedGrid,
    initial: Arrays,
    template: Template,
    *,
    mask: Mask,
    weight_key: str,
    kind: str,
    deltas: str,
    seed: int | None,
    timeout: float | None,
    judge: Judge,
    checkpoints: Checkpoints | None = None,
    base: str = "",
    reports: Reports | None = None,
) -> Statistics:
    """Ask explorers for what the method needs in round 0.

    Parameters
    ----------
    method : Method
        Says what to ask, and how many explorers.
    grid : OrderedGrid
        The nodes, and the ledger for the costs.
    initial : dict[str, ndarray]
        W0, the full model.
    template : Template
        What the wrapped strategy would send in round 1. Its ArrayRecords are replaced by W0, its round by 0.
    mask : Mask
        A mask that keeps everything.
    weight_key : str
        Metric that holds an explorer's number of examples.
    kind : str
        How W0 is quantised on its way to the explorers, one of :data:`~autoflip_flwr.core.choices.VALUES`.
    deltas : str
        ``"log8"``: statistics are quantised as the method asks; ``"float32"``: they are not quantised.
    seed : int | None
        Makes the choice of explorers reproducible.
    timeout : float | None
        Seconds per batch. A node that has not answered the roll call explores only if there are too few others.
    judge : Judge
        Judges the replies.
    checkpoints : Checkpoints | None
        Where answers are kept as they come. Answers that are already there are not asked for again.
    base : str
        Digest of W0 if explorers should keep it, since its values will stand outside the mask; "" if not.
    reports : dict[int, tuple[float, ArrayRecord]] | None
        Gets the report of each explorer that counts; ``None``: single reports are not kept.

    Raises
    ------
    RuntimeError
        If fewer than ``min_explorers`` nodes are connected or answer, or if most of them returned updates instead of
        weights.
    """
    requests, coding = asked_of(method, deltas)
    kept = {} if checkpoints is None else checkpoints.explorers()
    if kept:
        log(INFO, "exploration: %d answers have come before the interruption", len(kept))
    for about, _ in kept.values():
        grid.ledger.charge_exploration(about["cost"])
    names = names_of(grid)
    gone = {name: name for name in kept.keys() - names.values()}
    names |= gone
    nodes = sorted(names, key=names.__getitem__) if gone else list(names)
    if len(nodes) < method.min_explorers:
        raise RuntimeError(
            f"min_explorers = {method.min_explorers}, but only {len(nodes)} nodes are connected: start more, or let "
            f"fewer explore (min_explorers={max(len(nodes), 1)})"
        )
    count = max(method.asked(len(nodes)), len(kept))
    able = [node for node in nodes if node not in grid.calls.mute or names[node] in kept]
    nodes = able if len(able) >= method.min_explorers else nodes
    count = min(len(nodes), count)
    chosen = _sample(nodes, count, seed, {node for node in nodes if names[node] in kept})
    problems: dict[str, list[int]] = {}  # reason -> nodes
    compared = mask.layout.prunable_names or [spec.name for spec in mask.layout.specs if spec.floating]
    length = joint_norm(initial[name] for name in compared)

    judged: dict[str, Answer | WireError] = {}  # by message id: each reply is judged once

    def arrived(message: Message, reply: Message) -> None:
        if reply.has_error():
            return
        try:
            answer = judge.explorer(reply, mask=mask, requests=requests, kind=coding, compared=compared, length=length)
        except WireError as error:
            judged[message.metadata.message_id] = error
            return
        judged[message.metadata.message_id] = answer
        if checkpoints is not None:
            cost = Ledger()
            cost.sent(message)
            cost.received(message, reply)
            about = {"update": dataclasses.asdict(answer.update), "cost": cost.exploration_only()}
            checkpoints.add_explorer(names[message.metadata.dst_node_id], about, answer.record)

    def answers() -> Iterator[tuple[float, dict[str, Arrays]]]:
        packed = pack_values(mask, mask.gather(initial), kind)
        head = make_header(
            EXPLORE,
            0,
            mask,
            **weight_entry(weight_key),
            **base_entry(base),
            **value_entries(values=kind, reply=coding),
            **ask_entry(to_report(requests)),
        )
        ours = RecordDict({HEADER: head, MASK_RECORD: mask_record.encode_mask(mask)})
        contents: dict[int, RecordDict] = {}  # strategies put the same record into many messages

        def content(node: int) -> RecordDict:
            own = template.by_node.get(node, template.other)
            if id(own) not in contents:
                contents[id(own)] = _content(method, own, packed, ours)
            return contents[id(own)]

        batches = [chosen[start :: method.batches] for start in range(min(method.batches, count))]
        for number, batch in enumerate(batches, 1):
            log(INFO, "[EXPLORATION %d/%d] %d explorers", number, len(batches), len(batch))
            missing = [node for node in batch if names[node] not in kept]
            messages = [Message(content(node), node, MessageType.TRAIN, group_id="exploration") for node in missing]
            replies = {reply.metadata.reply_to_message_id: reply for reply in grid.exchange(messages, timeout, arrived)}
            came = {message.metadata.dst_node_id: replies.get(message.metadata.message_id) for message in messages}
            came_back: dict[int, Answer | WireError] = {}
            for node in batch:
                if (before := kept.get(names[node])) is not None:
                    came_back[node] = Answer(Update(**before[0]["update"]), before[1])
                elif (reply := came[node]) is None:
                    continue
                elif reply.has_error():
                    problems.setdefault(explain_error(reply.error), []).append(node)
                else:
                    came_back[node] = judged.pop(str(reply.metadata.reply_to_message_id))
            good, rejected = judge.explorers(came_back)
            for node, reason in rejected.items():
                problems.setdefault(reason, []).append(node)
            for node, answer in good.items():
                weight = answer.update.weight if method.weighting == "examples" else 1.0
                if reports is not None:
                    reports[names[node]] = weight, answer.record
                found = read_answer(answer.record, mask=mask, requests=requests, kind=coding)
                if DELTA in found:
                    updates.add(found[DELTA])
                yield weight, found

    updates = evidence.Updates(mask.layout, initial)
    statistics = Accumulator(mask.layout, method.squares)
    number = 0
    for weight, found in answers():
        statistics.add(weight, method.look(mask.layout, found))
        number += 1
    if not number:
        reasons = _first(problems, grid.ledger)
        told = MOD_FIRST in reasons or grid.calls.with_mod
        hint = "" if told else f" (if the clients run without it: {MOD_FIRST})"
        raise RuntimeError(f"the exploration failed: no explorer answered{hint}; {reasons}")
    if number < method.min_explorers:
        raise RuntimeError(
            f"{number} of {count} explorers answered, but min_explorers = {method.min_explorers}; "
            f"{_first(problems, grid.ledger)}"
        )
    log(INFO, "exploration: %d of %d explorers answered", number, count)
    seen = statistics.result()
    if DELTA in seen.mean_square:
        evidence.check_moved(Exploration.of(seen))
    if doubt := updates.check():
        log(WARNING, "%s", doubt)
    return seen


def asked_of(method: Method, deltas: str) -> tuple[tuple[Request, ...], str]:
    """Return a method's requests of round 0, and how the deltas among them are quantised (``"none"``: there are none).

    ``deltas`` is as in :func:`explore`.
    """
    requests = tuple(each if deltas == LOG8 else each._replace(code=deltas) for each in check_requests(method, 0))
    return requests, next((each.code for each in requests if each.name == DELTA), NOTHING)


def _content(method: Method, template: RecordDict, packed: ArrayRecord, ours: RecordDict) -> RecordDict:
    content = RecordDict(dict(template))
    content[next(iter(content.array_records), "arrays")] = packed
    config_key, config = next(iter(content.config_records.items()), ("config", ConfigRecord()))
    told = {ROUND_KEY: 0} if ROUND_KEY in config else {}
    asked = {PHASE_KEY: EXPLORE} | {f"{HEADER}-{name}": value for name, value in method.config().items()}
    content[config_key] = ConfigRecord({**config, **told, **asked})
    return RecordDict({**content, **ours})


def names_of(grid: OrderedGrid) -> dict[int, int]:
    """Map each node to a stable name: its partition id if unique, else its node id."""
    nodes = grid.get_node_ids()
    told = {node: grid.partitions.get(node, node) for node in nodes}
    claims = Counter(told.values())
    return {node: name if claims[name] == 1 else node for node, name in told.items()}


def _sample(nodes: list[int], count: int, seed: int | None, sure: Collection[int]) -> list[int]:
    """Draw ``count`` of the nodes, in their order, including those that are ``sure``."""
    if count == len(nodes):
        return nodes
    # with a generator of its own, so that the wrapped strategy's sampling is the same with and without AutoFLIP
    drawn = random.Random(None if seed is None else f"{seed}/explorers").sample(nodes, count)
    others = [node for node in drawn if node not in sure][: count - len(sure)]
    return [node for node in nodes if node in sure or node in others]


def _first(problems: dict[str, list[int]], ledger: Ledger) -> str:
    told = [f"node {nodes[0]} and {len(nodes) - 1} more: {reason}" for reason, nodes in problems.items()]
    return "; ".join(told[:3]).replace(" and 0 more", "") or why_absent(
        each for each in ledger.incidents if each["phase"] == "exploration"
    )
