"""Between the wrapped strategy's messages and the wire's: what leaves is packed, what comes is judged and unpacked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from logging import WARNING
from typing import NamedTuple

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.logger import log
from numpy.typing import NDArray

from autoflip_flwr.average import weighted_mean
from autoflip_flwr.core.layout import Arrays
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.costs.ledger import examples_processed
from autoflip_flwr.replies.check import Judged, compared_values, explain_error, judge_header, judge_update, judge_weight
from autoflip_flwr.replies.likeness import Likeness
from autoflip_flwr.replies.norms import Update, joint_norm
from autoflip_flwr.replies.quarantine import Quarantine
from autoflip_flwr.wire import mask_record
from autoflip_flwr.wire.keys import EVALUATE, HEADER, MASK_MISSING, MASK_RECORD, MOD_REFUSED, TRAIN
from autoflip_flwr.wire.messages import (
    arrays_of,
    flatten,
    make_header,
    pack_values,
    read_vectors,
    split_vectors,
    value_entries,
    weight_entry,
)
from autoflip_flwr.wire.records import WireError, array_bytes, to_arrays, to_record
from autoflip_flwr.wire.values import is_coded

KEPT_MASKS = 4
"""So many masks before the one in force are kept, for nodes that need the difference alone."""

_NUDGE = 1e-7
"""Its square is a normal float32."""


def model_of(record: ArrayRecord) -> Arrays:
    """The arrays of a model that can be pruned; ``ValueError`` if none of them holds floating-point numbers."""
    coded = sorted({array.stype for array in record.values()} - {"numpy.ndarray"})
    arrays = {} if coded else to_arrays(record)
    kinds = coded or sorted({array.dtype.name for array in arrays.values()})
    if not any(array.dtype.kind == "f" for array in arrays.values()):
        raise ValueError(
            f"nothing to prune: the model is {len(record)} arrays of {', '.join(kinds) or 'nothing'}, and AutoFlip "
            "prunes floating-point ones; a model that travels as bytes, as XGBoost's does, runs with its strategy alone"
        )
    return arrays


class Sent(NamedTuple):
    """What a node was sent: exact floating vectors, what its reply's are added to, the norm of those compared."""

    exact: Arrays
    base: Arrays
    norm: float


class Translator:
    """Speaks the strategy's language on one side and the wire's on the other, under the mask in force.

    Parameters
    ----------
    mask : Mask
        The mask in force; assign another one to change it.
    initial : dict[str, ndarray]
        The full model; its integer and bool arrays are kept here, since no strategy averages them.
    packed : bool
        Whether the strategy sees packed arrays or full ones.
    integers : bool
        Whether it sees integer and bool arrays; what it makes of them is not used.
    weight_key : str
        Metric by which replies are weighed; "" where the strategy has none, and asks nothing of metrics.
    quarantine : Quarantine
        Takes the replies that are left out.
    needed : Mapping[str, float]
        Metrics that the strategy needs of each train reply, with the least value of each.
    averaged : Collection[str]
        Phases whose metrics Flower's own mean averages.
    nudges : bool
        Whether an update of exactly zero is made a tiny one, for a strategy that divides by its norm.
    down, up : str
        How values are coded on their way to the nodes and back, of :data:`~autoflip_flwr.wire.values.KINDS`.
    """

    def __init__(
        self,
        mask: Mask,
        initial: Arrays,
        *,
        packed: bool,
        integers: bool,
        weight_key: str,
        quarantine: Quarantine,
        needed: Mapping[str, float] | None = None,
        averaged: Collection[str] = (TRAIN, EVALUATE),
        nudges: bool = False,
        down: str = "float32",
        up: str = "float32",
    ) -> None:
        self._mask = mask
        self.shown = [spec.name for spec in mask.layout.specs if spec.floating or integers]
        self._packed = packed
        self._weight_key = weight_key
        self._needed = dict(needed or {})
        self._quarantine, self._nudges = quarantine, nudges
        self._likeness = Likeness(averaged)
        self._down, self._up = down, up
        self.integers = {spec.name: initial[spec.name] for spec in mask.layout.specs if not spec.floating}
        self._sent: dict[int, Sent] = {}  # by node
        self._confirmed: dict[int, str] = {}  # node -> digest
        self._older: dict[str, Mask] = {}  # by digest
        self._encoded: dict[str, ConfigRecord] = {}  # by the digest of the mask that it is the difference from

    @property
    def mask(self) -> Mask:
        """The mask in force."""
        return self._mask

    @mask.setter
    def mask(self, mask: Mask) -> None:
        bare = dataclasses.replace(self._mask)  # without its indices
        kept = [*self._older.items(), (bare.digest, bare)][-KEPT_MASKS:]
        self._older = {digest: older for digest, older in kept if digest != mask.digest}
        self._mask, self._encoded = mask, {}

    def to_strategy(self, packed: Mapping[str, NDArray[np.generic]]) -> ArrayRecord:
        """Packed arrays -> the arrays as the strategy sees them."""
        arrays = packed if self._packed else self.mask.scatter(packed)
        return to_record({name: arrays[name] for name in self.shown})

    def from_strategy(self, record: ArrayRecord) -> Arrays:
        """What the strategy holds -> full arrays, pruned, in the strategy's dtypes and the model's order."""
        arrays = to_arrays(record) | self.integers
        return self.mask.scatter(arrays) if self._packed else self.mask.apply(arrays)

    def outgoing(self, messages: Iterable[Message], phase: str, round_: int) -> list[Message]:
        """Pack the strategy's messages; the mask goes along to every node that has not confirmed it.

        Raises
        ------
        ValueError
            If the strategy's messages do not hold one ArrayRecord each, or the mask keeps so little of so large a
            model that no client would believe it.
        """
        batch = list(messages)
        self._sent = {}
        coding = value_entries(values=self._down, reply="float32" if phase == EVALUATE else self._up)
        head = make_header(phase, round_, self.mask, **weight_entry(self._weight_key), **coding)
        values: dict[int, tuple[ArrayRecord, Sent]] = {}
        for message in batch:
            content = RecordDict(dict(message.content))
            if len(content.array_records) != 1:
                raise ValueError(f"{len(content.array_records)} ArrayRecords in a message of the strategy, expected 1")
            key, record = next(iter(content.array_records.items()))
            if id(record) not in values:  # strategies put one record into all of their messages
                values[id(record)] = self._to_wire(record)
            node = message.metadata.dst_node_id
            content[key], self._sent[node] = values[id(record)]
            content[HEADER] = head
            if self._confirmed.get(node) != self.mask.digest:
                mask_record.check_entries(self.mask.layout.prunable_size, array_bytes(content), full=self.mask.is_full)
                content[MASK_RECORD] = self._mask_record(self._confirmed.get(node, ""))
            message.content = content
        return batch

    def repeat(self, message: Message, reply: Message) -> Message | None:
        """The message again, with the mask, if the node says that it lacks it."""
        head = reply.content.get(HEADER) if reply.has_content() else None
        had = message.content.get(MASK_RECORD)
        whole = had is not None and not mask_record.base_of(had)
        if head is None or head.get("status") != MASK_MISSING or whole:
            return None
        content = RecordDict({**message.content, MASK_RECORD: self._mask_record()})
        sent = message.metadata
        return Message(content, sent.dst_node_id, sent.message_type, ttl=sent.ttl, group_id=sent.group_id)

    def incoming(self, replies: Iterable[Message], round_: int) -> list[Message]:
        """The train replies that count, as the strategy expects them, then the error replies."""
        admitted, judged = self._judge(replies, round_)
        for reply, found in zip(admitted, judged, strict=False):  # errors come last
            arrays = arrays_of(self.mask, found.vectors)
            if found.norm == 0 and self._nudges:
                arrays = _nudged(arrays)
            reply.content[found.key] = self.to_strategy(arrays)
        return admitted

    def average(self, replies: Iterable[Message], round_: int) -> tuple[list[Message], Arrays | None]:
        """The train replies that count, their metrics without their arrays, and FedAvg's mean: full, pruned arrays."""
        admitted, judged = self._judge(replies, round_)
        if not judged:
            return admitted, None
        weights = [found.weight for found in judged]
        mean = {
            dtype: weighted_mean([found.vectors[dtype] for found in judged], weights)
            for dtype in judged[0].vectors
            if np.dtype(dtype).kind == "f"
        }
        return admitted, self.mask.scatter(split_vectors(self.mask, mean) | self.integers)

    def _judge(self, replies: Iterable[Message], round_: int) -> tuple[list[Message], list[Judged]]:
        """The replies that count, with an empty record for their arrays, then the errors; what the former hold.

        Integer and bool arrays become those of the reply with the largest weight.
        """
        seen: dict[int, Judged] = {}
        updates: dict[int, Update] = {}

        def accept(reply: Message) -> RecordDict:
            node = reply.metadata.src_node_id
            if node not in self._sent:
                raise WireError("nothing was sent to this node in this round")
            sent = self._sent[node]
            judged = judge_update(
                reply,
                mask=self.mask,
                round_=round_,
                weight_key=self._weight_key,
                sent=sent.exact,
                kind=self._up,
                base=sent.base,
                max_weight=self._quarantine.rules.max_examples,
                needed=self._needed,
            )
            seen[node] = judged
            processed = examples_processed(reply.content)
            updates[node] = Update(judged.kept_norm, judged.weight, processed, sent.norm)
            return RecordDict({**_without_ours(reply), judged.key: ArrayRecord()})

        counted, errors = self._admit(replies, TRAIN, round_, accept)
        nodes = [reply.metadata.src_node_id for reply in counted]
        far = self._quarantine.judge_norms({node: updates[node] for node in nodes}, TRAIN, round_)
        counted = self._without(far, counted, TRAIN, round_)
        if self._weight_key:
            self._likeness.drop_disputed(counted, TRAIN, round_)
        judged = [seen[reply.metadata.src_node_id] for reply in counted]
        for reply in counted:
            self._quarantine.clear(reply.metadata.src_node_id)
        if judged and self.integers:
            largest = max(judged, key=lambda found: found.weight).vectors
            counters = {dtype: vector for dtype, vector in largest.items() if np.dtype(dtype).kind != "f"}
            self.integers = {name: np.array(values) for name, values in arrays_of(self.mask, counters).items()}
        return counted + errors, judged

    def incoming_evaluate(self, replies: Iterable[Message], round_: int) -> list[Message]:
        """The evaluate replies that count, without our header, then the error replies; a weight of 0 does not count."""

        def accept(reply: Message) -> RecordDict | None:
            judge_header(reply, mask=self.mask, phase=EVALUATE, round_=round_)
            return _without_ours(reply) if judge_weight(reply, self._weight_key, or_none=True) else None

        counted, errors = self._admit(replies, EVALUATE, round_, accept)
        if self._weight_key:
            self._likeness.drop_disputed(counted, EVALUATE, round_)
        return counted + errors

    def _mask_record(self, had: str = "") -> ConfigRecord:
        """The mask's record for a node that has the mask of that digest: the difference where that is smaller."""
        # compressing a large mask takes a while, and a new mask goes to every node
        if "" not in self._encoded:
            self._encoded[""] = mask_record.encode_mask(self.mask)
        whole = self._encoded[""]
        if had in self._older and had not in self._encoded:
            difference = mask_record.encode_mask(self.mask, self._older[had])
            self._encoded[had] = min(difference, whole, key=ConfigRecord.count_bytes)
        return self._encoded.get(had, whole)

    def _to_wire(self, record: ArrayRecord) -> tuple[ArrayRecord, Sent]:
        """The message's values, and what its reply is read and judged by.

        A reply's values are added to the server's exact ones where it holds an update. A reply in full is corrected by
        what the coding of the message has changed, so that rounding the values on their way down shifts where a client
        starts, but never adds up in the model.
        """
        arrays = to_arrays(record) | self.integers
        packed = arrays if self._packed else self.mask.gather(arrays)
        sent = pack_values(self.mask, packed, self._down)
        flat = flatten(self.mask, packed)
        exact = {dtype: values for dtype, values in flat.items() if values.dtype.kind == "f"}
        base = {}
        if not self._down == self._up == "float32":
            read = read_vectors(self.mask, sent, self._down)
            for dtype, values in exact.items():
                if is_coded(self._up, dtype):
                    base[dtype] = values
                elif is_coded(self._down, dtype):
                    base[dtype] = values - read[dtype].whole()
        parts = [values[: compared_values(self.mask, dtype)] for dtype, values in exact.items()]
        return sent, Sent(exact, base, joint_norm(parts))

    def _admit(
        self, replies: Iterable[Message], phase: str, round_: int, accept: Callable[[Message], RecordDict | None]
    ) -> tuple[list[Message], list[Message]]:
        """The replies that count, each judged alone and then beside the others, and the error replies.

        ``accept`` returns what of a reply the strategy is to see, or ``None`` to skip it without a word.
        """
        counted: list[Message] = []
        errors: list[Message] = []
        answered: set[int] = set()
        for reply in replies:
            node = reply.metadata.src_node_id
            if reply.has_error():
                errors.append(reply)
                if reply.error.code == MOD_REFUSED:
                    log(WARNING, "round %d: node %d: %s", round_, node, explain_error(reply.error))
                continue
            try:
                if node in answered:
                    raise WireError("the node has answered before")
                content = accept(reply)
            except WireError as error:
                self._quarantine.strike(node, phase, round_, str(error))
                continue
            answered.add(node)
            self._confirmed[node] = self.mask.digest
            if content is not None:
                reply.content = content
                counted.append(reply)
        # without a weight key the strategy asks nothing of metrics
        other = self._likeness.unlike(counted, phase) if self._weight_key else {}
        return self._without(other, counted, phase, round_), errors

    def _without(self, bad: Mapping[int, str], replies: list[Message], phase: str, round_: int) -> list[Message]:
        """The replies but for those of the nodes that are ``bad``, with the reason of each."""
        for node, reason in bad.items():
            self._quarantine.strike(node, phase, round_, reason)
        return [reply for reply in replies if reply.metadata.src_node_id not in bad]


def _nudged(arrays: Arrays) -> Arrays:
    """The arrays with one value moved by about its last digit."""
    name, values = next((name, values) for name, values in arrays.items() if values.size and values.dtype.kind == "f")
    moved = values.copy()
    flat = moved.reshape(-1)
    flat[0] += max(abs(float(flat[0])) * 2 * float(np.finfo(str(flat.dtype)).eps), _NUDGE)
    return arrays | {name: moved}


def _without_ours(reply: Message) -> RecordDict:
    return RecordDict({key: record for key, record in reply.content.items() if key != HEADER})
