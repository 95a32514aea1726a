"""Judge the replies of one exchange: each alone, then against the others. Each rejected one is a strike for its node.

The replies of the exploration and of the rounds are all judged here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from logging import WARNING
from typing import NamedTuple

from flwr.app import ArrayRecord, Message, RecordDict
from flwr.common.logger import log

from autoflip_flwr.core.layout import Arrays
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.request import DELTA, Request
from autoflip_flwr.costs.ledger import examples_processed
from autoflip_flwr.replies.check import (
    Judged,
    explain_error,
    judge_answer,
    judge_header,
    judge_update,
    judge_weight,
    read_answer,
)
from autoflip_flwr.replies.likeness import Likeness
from autoflip_flwr.replies.norms import Update, find_outliers, joint_norm
from autoflip_flwr.replies.quarantine import Quarantine
from autoflip_flwr.wire.keys import EVALUATE, HEADER, MOD_REFUSED, STATISTICS, TRAIN
from autoflip_flwr.wire.records import WireError
from autoflip_flwr.wire.request import to_report, unpack_statistics


class Sent(NamedTuple):
    """What a node was sent: the exact floating vectors, those its reply is added to, and the norm to compare with."""

    exact: Arrays
    base: Arrays
    norm: float


class Batch(NamedTuple):
    """The judged replies of an exchange.

    Parameters
    ----------
    counted : list[Message]
        The replies that count, in order, as the strategy may see them. Train replies hold an empty record in place of
        their arrays.
    judged : list[Judged]
        The values of the train replies that count.
    errors : list[Message]
        The error replies.
    accepted : list[int]
        Nodes whose replies are well-formed and show that the node has the mask.
    reported : dict[int, ArrayRecord]
        Statistics of the train replies that count, by node.
    """

    counted: list[Message]
    judged: list[Judged]
    errors: list[Message]
    accepted: list[int]
    reported: dict[int, ArrayRecord]


@dataclass(frozen=True)
class Answer:
    """A reply of round 0 that may be counted: what its norm is judged by, and its record as received."""

    update: Update
    record: ArrayRecord


class Judge:
    """Judges replies, and remembers what is needed of earlier rounds.

    Parameters
    ----------
    quarantine : Quarantine
        Records the rejected replies.
    weight_key : str
        Metric by which replies are weighted; "" if the strategy has none. Then metrics are not checked.
    needed : Mapping[str, float] | None
        Metrics that the strategy needs from each train reply, with the smallest allowed value of each.
    averaged : Collection[str]
        Phases whose metrics are averaged by Flower's own mean.
    """

    def __init__(
        self,
        quarantine: Quarantine,
        *,
        weight_key: str,
        needed: Mapping[str, float] | None = None,
        averaged: Collection[str] = (TRAIN, EVALUATE),
    ) -> None:
        self._quarantine, self._weight_key, self._needed = quarantine, weight_key, dict(needed or {})
        self._likeness = Likeness(averaged)

    def train(
        self,
        replies: Iterable[Message],
        *,
        mask: Mask,
        round_: int,
        sent: Mapping[int, Sent],
        kind: str,
        requests: tuple[Request, ...] = (),
    ) -> Batch:
        """Judge the train replies to what was ``sent`` to the nodes. ``kind`` says how their values are quantised.

        Requested statistics may be missing: such a reply counts without them.
        """
        seen: dict[int, Judged] = {}
        reported: dict[int, ArrayRecord] = {}
        lengths: dict[int, Update] = {}
        updates: dict[int, Update] = {}

        def accept(reply: Message) -> RecordDict:
            node = reply.metadata.src_node_id
            if node not in sent:
                raise WireError("nothing was sent to this node in this round")
            judged = judge_update(
                reply,
                mask=mask,
                round_=round_,
                weight_key=self._weight_key,
                sent=sent[node].exact,
                kind=kind,
                base=sent[node].base,
                max_weight=self._quarantine.rules.max_examples,
                needed=self._needed,
            )
            statistics = reply.content.get(STATISTICS)
            if to_report(requests) and statistics is not None:
                arrays = unpack_statistics(mask, requests, statistics)
                norm = joint_norm(array for each in arrays.values() for array in each.values())
                lengths[node] = Update(norm, 1.0, None, 0.0)
                reported[node] = reply.content.array_records[STATISTICS]
            seen[node] = judged
            updates[node] = Update(judged.kept_norm, judged.weight, examples_processed(reply.content), sent[node].norm)
            return RecordDict({**_without_ours(reply), judged.key: ArrayRecord()})

        batch = self._admit(replies, TRAIN, round_, accept)
        nodes = [reply.metadata.src_node_id for reply in batch.counted]
        far = self._quarantine.judge_norms({node: updates[node] for node in nodes}, TRAIN, round_)
        counted = self._without(far, batch.counted, TRAIN, round_)
        self._drop_disputed(counted, TRAIN, round_)
        nodes = [reply.metadata.src_node_id for reply in counted]
        for node in nodes:
            self._quarantine.clear(node)
        return batch._replace(
            counted=counted,
            judged=[seen[node] for node in nodes],
            reported=self._credible({node: reported[node] for node in nodes if node in reported}, lengths, round_),
        )

    def _credible(
        self, reported: dict[int, ArrayRecord], lengths: Mapping[int, Update], round_: int
    ) -> dict[int, ArrayRecord]:
        """Return the statistics without those that are far larger than the others'. The nodes' replies still count."""
        far, _ = find_outliers({node: lengths[node] for node in reported}, self._quarantine.rules.norm_factor, 0.0)
        for node, reason in far.items():
            reason = reason.replace("its update", "the statistics that it reports")
            log(WARNING, "%s, round %d: dropped the statistics of node %d: %s", TRAIN, round_, node, reason)
        return {node: record for node, record in reported.items() if node not in far}

    def evaluate(self, replies: Iterable[Message], *, mask: Mask, round_: int) -> Batch:
        """Judge evaluate replies. One with a weight of 0 does not count, but its node gets no strike."""

        def accept(reply: Message) -> RecordDict | None:
            judge_header(reply, mask=mask, phase=EVALUATE, round_=round_)
            return _without_ours(reply) if judge_weight(reply, self._weight_key, or_none=True) else None

        batch = self._admit(replies, EVALUATE, round_, accept)
        self._drop_disputed(batch.counted, EVALUATE, round_)
        return batch

    def explorer(
        self,
        reply: Message,
        *,
        mask: Mask,
        requests: tuple[Request, ...],
        kind: str,
        compared: Collection[str],
        length: float,
    ) -> Answer:
        """Judge a single reply of round 0 as soon as it arrives.

        Parameters
        ----------
        reply : Message
            A reply without an error.
        mask : Mask
            A mask that keeps everything.
        requests : tuple[Request, ...]
            The requested statistics.
        kind : str
            How its deltas must be quantised; ``"none"`` if it must have none.
        compared : Collection[str]
            Names of the arrays that enter the compared norms.
        length : float
            Norm of these arrays in W0.

        Raises
        ------
        WireError
            If it must be rejected, with the reason.
        """
        weight, record = judge_answer(
            reply,
            mask=mask,
            weight_key=self._weight_key,
            requests=requests,
            kind=kind,
            max_weight=self._quarantine.rules.max_examples,
        )
        found = read_answer(record, mask=mask, requests=requests, kind=kind)
        deltas = found.get(DELTA)
        judged = [deltas] if deltas is not None else list(found.values())
        if not math.isfinite(joint_norm(array for arrays in judged for array in arrays.values())):
            raise WireError("the norm of its deltas overflows")
        norm = joint_norm(arrays[name] for arrays in judged for name in compared if name in arrays)
        model = 0.0 if deltas is None else length  # statistics do not scale with the model's norm
        return Answer(Update(norm, weight, examples_processed(reply.content), model), record)

    def explorers(self, answers: Mapping[int, Answer | WireError]) -> tuple[dict[int, Answer], dict[int, str]]:
        """Compare the explorers of a batch. Return the answers that count, and the rejected nodes with the reasons."""
        rejected = {node: str(answer) for node, answer in answers.items() if isinstance(answer, WireError)}
        good = {node: answer for node, answer in answers.items() if isinstance(answer, Answer)}
        rejected |= self._quarantine.judge_norms(
            {node: answer.update for node, answer in good.items()}, "exploration", 0
        )
        for node, reason in rejected.items():
            self._quarantine.strike(node, "exploration", 0, reason)
        return {node: answer for node, answer in good.items() if node not in rejected}, rejected

    def _admit(
        self, replies: Iterable[Message], phase: str, round_: int, accept: Callable[[Message], RecordDict | None]
    ) -> Batch:
        """Judge each reply alone, then against the others. Return those that count, and the error replies.

        ``accept`` returns the part of a reply that the strategy may see, or ``None`` to skip the reply silently.
        """
        counted: list[Message] = []
        errors: list[Message] = []
        accepted: list[int] = []
        for reply in replies:
            node = reply.metadata.src_node_id
            if reply.has_error():
                errors.append(reply)
                if reply.error.code == MOD_REFUSED:
                    log(WARNING, "round %d: node %d: %s", round_, node, explain_error(reply.error))
                continue
            try:
                if node in accepted:
                    raise WireError("the node has answered before")
                content = accept(reply)
            except WireError as error:
                self._quarantine.strike(node, phase, round_, str(error))
                continue
            accepted.append(node)
            if content is not None:
                reply.content = content
                counted.append(reply)
        # without a weight key metrics are not checked
        other = self._likeness.unlike(counted, phase) if self._weight_key else {}
        return Batch(self._without(other, counted, phase, round_), [], errors, accepted, {})

    def _without(self, bad: Mapping[int, str], replies: list[Message], phase: str, round_: int) -> list[Message]:
        """Return the replies without those of the ``bad`` nodes, each of which gets a strike with its reason."""
        for node, reason in bad.items():
            self._quarantine.strike(node, phase, round_, reason)
        return [reply for reply in replies if reply.metadata.src_node_id not in bad]

    def _drop_disputed(self, counted: list[Message], phase: str, round_: int) -> None:
        if self._weight_key:
            self._likeness.drop_disputed(counted, phase, round_)


def _without_ours(reply: Message) -> RecordDict:
    return RecordDict({key: record for key, record in reply.content.items() if key not in (HEADER, STATISTICS)})
