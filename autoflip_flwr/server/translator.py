"""Translate between the wrapped strategy's messages and those on the wire: pack messages, unpack replies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict
from numpy.typing import NDArray

from autoflip_flwr.core.layout import Arrays
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.method import Method, check_requests
from autoflip_flwr.core.request import DELTA, Request
from autoflip_flwr.core.statistics import Accumulator, Statistics
from autoflip_flwr.core.subspace import Subspace
from autoflip_flwr.replies.batch import Batch, Judge, Sent
from autoflip_flwr.replies.check import Judged, compared_values
from autoflip_flwr.replies.norms import joint_norm
from autoflip_flwr.server.average import weighted_mean
from autoflip_flwr.server.base_delivery import BaseDelivery, Told, missing_of
from autoflip_flwr.server.mask_delivery import MaskDelivery
from autoflip_flwr.wire.base_record import base_entry
from autoflip_flwr.wire.keys import BASE_RECORD, EVALUATE, HEADER, MASK_RECORD, TRAIN
from autoflip_flwr.wire.messages import (
    MAX_RATE,
    arrays_of,
    flatten,
    make_header,
    pack_values,
    rate_entry,
    read_vectors,
    split_vectors,
    value_entries,
    weight_entry,
)
from autoflip_flwr.wire.records import to_arrays, to_record
from autoflip_flwr.wire.request import ask_entry, to_report, unpack_statistics
from autoflip_flwr.wire.values import is_coded

_NUDGE = 1e-7
"""Size of a tiny update. Its square is still a normal float32."""


class Translator:
    """Packs the strategy's messages and unpacks the replies, under the mask in force.

    Parameters
    ----------
    mask : Mask
        The mask in force; assign another one to change it.
    initial : dict[str, ndarray]
        The full model. Its integer and bool arrays are kept here, since no strategy averages them.
    packed : bool
        Whether the strategy sees packed arrays or full ones.
    integers : bool
        Whether it sees integer and bool arrays. Its result for them is not used.
    weight_key : str
        Metric by which replies are weighted; "" if the strategy has none. Then metrics are not checked.
    judge : Judge
        Judges the replies.
    method : Method
        Says which statistics to ask for in a round.
    nudges : bool
        Whether an update of exactly zero is replaced by a tiny one, for a strategy that divides by its norm.
    down, up : str
        How values are quantised on their way to the nodes and back, one of :data:`~autoflip_flwr.core.choices.VALUES`.
    lr_power : float
        Clients are asked to multiply their learning rate by the density to the power of minus this.
    base : dict[str, ndarray] | None
        The values outside the mask: full arrays by name. ``None``: zero.
    told : dict[int, str] | None
        What the nodes have reported about the base that they hold (:mod:`autoflip_flwr.server.base_delivery`).
    """

    def __init__(
        self,
        mask: Mask,
        initial: Arrays,
        *,
        packed: bool,
        integers: bool,
        weight_key: str,
        judge: Judge,
        method: Method,
        nudges: bool = False,
        down: str = "float32",
        up: str = "float32",
        lr_power: float = 0.0,
        base: Arrays | None = None,
        told: Told | None = None,
    ) -> None:
        self._delivery, self._judge, self._method = MaskDelivery(mask), judge, method
        self._base = BaseDelivery(mask.layout, base, {} if told is None else told)
        self.shown = [spec.name for spec in mask.layout.specs if spec.floating or integers]
        self._packed, self._nudges = packed, nudges
        self._weight_key = weight_key
        self._down, self._up, self._lr_power = down, up, lr_power
        self.integers = {spec.name: initial[spec.name] for spec in mask.layout.specs if not spec.floating}
        self._sent: dict[int, Sent] = {}  # by node
        self._requests: tuple[Request, ...] = ()
        self.seen: Statistics | None = None
        """What clients reported in the last round that asked for statistics."""

    @property
    def mask(self) -> Mask:
        """The mask in force."""
        return self._delivery.mask

    @mask.setter
    def mask(self, mask: Mask) -> None:
        self._delivery.mask = mask

    @property
    def subspace(self) -> Subspace:
        """The mask in force, and the values outside it."""
        return Subspace(self.mask, self._base.arrays)

    @property
    def _rate(self) -> float:
        if self._base.arrays is not None:  # nothing is zero, so the model is as dense as ever
            return 1.0
        return float(min(max(self.mask.density, 1e-9) ** -self._lr_power, MAX_RATE))

    def to_strategy(self, packed: Mapping[str, NDArray[np.generic]]) -> ArrayRecord:
        """Convert packed arrays to the arrays that the strategy sees."""
        arrays = packed if self._packed else self.subspace.unpack(packed)
        return to_record({name: arrays[name] for name in self.shown})

    def from_strategy(self, record: ArrayRecord) -> Arrays:
        """Convert the strategy's arrays to full ones of the subspace, in its dtypes and the model's order."""
        arrays = to_arrays(record) | self.integers
        return self.subspace.unpack(arrays) if self._packed else self.subspace.project(arrays)

    def outgoing(self, messages: Iterable[Message], phase: str, round_: int) -> list[Message]:
        """Pack the strategy's messages.

        Add the mask for every node that has not confirmed it, and the base for nodes that are known to lack it.

        Raises
        ------
        ValueError
            If the strategy's messages do not hold one ArrayRecord each, or the mask keeps so small a share of so large
            a model that clients would reject it.
        """
        batch = list(messages)
        self._sent = {}
        self._requests = check_requests(self._method, round_) if phase == TRAIN else ()
        coding = value_entries(values=self._down, reply="float32" if phase == EVALUATE else self._up)
        named = weight_entry(self._weight_key) | base_entry(self._base.digest(self.mask))
        asked = ask_entry(to_report(self._requests))
        rate = rate_entry(self._rate) if phase == TRAIN else {}
        head = make_header(phase, round_, self.mask, **named, **coding, **asked, **rate)
        values: dict[int, tuple[ArrayRecord, Sent]] = {}
        for message in batch:
            content = RecordDict(dict(message.content))
            if len(content.array_records) != 1:
                raise ValueError(f"{len(content.array_records)} ArrayRecords in a message of the strategy, expected 1")
            key, record = next(iter(content.array_records.items()))
            if id(record) not in values:  # strategies put the same record into many messages
                values[id(record)] = self._to_wire(record)
            node = message.metadata.dst_node_id
            content[key], self._sent[node] = values[id(record)]
            content[HEADER] = head
            self._delivery.put(content, node)
            self._base.put(content, node, self.mask)
            message.content = content
        return batch

    def repeat(self, message: Message, reply: Message) -> Message | None:
        """Return the message again, with what its node reports as missing: the whole mask, the base, or both."""
        lacks, more = missing_of(reply), RecordDict()
        if MASK_RECORD in lacks and (whole := self._delivery.whole(message)) is not None:
            more[MASK_RECORD] = whole
        if BASE_RECORD in lacks and BASE_RECORD not in message.content and self._base.digest(self.mask):
            more[BASE_RECORD] = self._base.record
        if not more:
            return None
        content = RecordDict({**message.content, **more})
        sent = message.metadata
        return Message(content, sent.dst_node_id, sent.message_type, ttl=sent.ttl, group_id=sent.group_id)

    def incoming(self, replies: Iterable[Message], round_: int) -> list[Message]:
        """Return the train replies that count, as the strategy expects them, then the error replies."""
        batch = self._judged(replies, round_)
        for reply, found in zip(batch.counted, batch.judged, strict=True):
            arrays = arrays_of(self.mask, found.vectors)
            if found.norm == 0 and self._nudges:
                arrays = _nudged(arrays)
            reply.content[found.key] = self.to_strategy(arrays)
        return batch.counted + batch.errors

    def average(self, replies: Iterable[Message], round_: int) -> tuple[list[Message], Arrays | None]:
        """Return the train replies that count, without their arrays, and FedAvg's mean of these as full arrays."""
        batch = self._judged(replies, round_)
        counted, judged, errors = batch.counted, batch.judged, batch.errors
        if not judged:
            return counted + errors, None
        weights = [found.weight for found in judged]
        mean = {
            dtype: weighted_mean([found.vectors[dtype] for found in judged], weights)
            for dtype in judged[0].vectors
            if np.dtype(dtype).kind == "f"
        }
        return counted + errors, self.subspace.unpack(split_vectors(self.mask, mean) | self.integers)

    def incoming_evaluate(self, replies: Iterable[Message], round_: int) -> list[Message]:
        """Return the evaluate replies that count, without AutoFLIP's header, then the error replies."""
        batch = self._judge.evaluate(replies, mask=self.mask, round_=round_)
        self._confirm(batch.accepted)
        return batch.counted + batch.errors

    def _confirm(self, nodes: list[int]) -> None:
        self._delivery.confirm(nodes)
        self._base.confirm(nodes, self.mask)

    def _judged(self, replies: Iterable[Message], round_: int) -> Batch:
        """Judge the train replies. Take the integer and bool arrays from the reply with the largest weight."""
        batch = self._judge.train(
            replies, mask=self.mask, round_=round_, sent=self._sent, kind=self._up, requests=self._requests
        )
        self._confirm(batch.accepted)
        if self._requests:
            self.seen = self._statistics(batch)
        if batch.judged and self.integers:
            largest = max(batch.judged, key=lambda found: found.weight).vectors
            counters = {dtype: vector for dtype, vector in largest.items() if np.dtype(dtype).kind != "f"}
            self.integers = {name: np.array(values) for name, values in arrays_of(self.mask, counters).items()}
        return batch

    def _statistics(self, batch: Batch) -> Statistics | None:
        """Return the statistics of the clients whose replies count. Deltas are computed from the replies' values."""
        statistics = Accumulator(self.mask.layout, self._method.squares)
        any_ = False
        for reply, judged in zip(batch.counted, batch.judged, strict=True):
            node = reply.metadata.src_node_id
            found: dict[str, Arrays] = {}
            if any(each.name == DELTA for each in self._requests):
                found[DELTA] = self._deltas(judged, self._sent[node])
            if node in batch.reported:
                found |= unpack_statistics(self.mask, self._requests, batch.reported[node])
            if found:
                weight = judged.weight if self._method.weighting == "examples" else 1.0
                statistics.add(weight, self._method.look(self.mask.layout, found))
                any_ = True
        return statistics.result() if any_ else None

    def _deltas(self, judged: Judged, sent: Sent) -> Arrays:
        """Return a client's delta of each kept entry of the prunable arrays, as full arrays that are 0 elsewhere."""
        flat = {dtype: judged.vectors[dtype].whole() - values for dtype, values in sent.exact.items()}
        full = self.mask.scatter(split_vectors(self.mask, flat) | self.integers)
        return {name: full[name] for name in self.mask.layout.prunable_names}

    def _to_wire(self, record: ArrayRecord) -> tuple[ArrayRecord, Sent]:
        """Return the values for a message, and what its reply is read and judged by.

        If a reply holds an update, it is added to the server's exact values. If it holds full values, they are
        corrected by the message's rounding error. So rounding on the way down shifts where a client starts, but never
        adds up in the model.
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


def _nudged(arrays: Arrays) -> Arrays:
    """Return the arrays with one value changed by about its last digit."""
    name, values = next((name, values) for name, values in arrays.items() if values.size and values.dtype.kind == "f")
    moved = values.copy()
    flat = moved.reshape(-1)
    flat[0] += max(abs(float(flat[0])) * 2 * float(np.finfo(str(flat.dtype)).eps), _NUDGE)
    return arrays | {name: moved}
