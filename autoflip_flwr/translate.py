"""Between the wrapped strategy's messages and the wire's: what leaves is packed, what comes is judged and unpacked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from logging import WARNING

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from numpy.typing import NDArray

from autoflip_flwr import firewall, wire
from autoflip_flwr.layout import Arrays
from autoflip_flwr.ledger import Ledger
from autoflip_flwr.mask import Mask


def to_record(arrays: Mapping[str, NDArray[np.generic]]) -> ArrayRecord:
    """Arrays by name -> Flower's record of them."""
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


def to_arrays(record: ArrayRecord) -> Arrays:
    """Flower's record of arrays -> arrays by name (copies)."""
    return {name: array.numpy() for name, array in record.items()}


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
    ledger : Ledger
        Counts the replies that are left out.
    """

    def __init__(
        self, mask: Mask, initial: Arrays, *, packed: bool, integers: bool, weight_key: str, ledger: Ledger
    ) -> None:
        self.mask = mask
        self.shown = [spec.name for spec in mask.layout.specs if spec.floating or integers]
        self._packed = packed
        self._weight_key = weight_key
        self._ledger = ledger
        self._integers = {spec.name: initial[spec.name] for spec in mask.layout.specs if not spec.floating}
        self._confirmed: dict[int, str] = {}
        self._encoded: tuple[str, ConfigRecord] = ("", ConfigRecord())

    def to_strategy(self, packed: Mapping[str, NDArray[np.generic]]) -> ArrayRecord:
        """Packed arrays -> the arrays as the strategy sees them."""
        arrays = packed if self._packed else self.mask.scatter(packed)
        return to_record({name: arrays[name] for name in self.shown})

    def from_strategy(self, record: ArrayRecord) -> Arrays:
        """What the strategy holds -> full arrays, pruned, in the strategy's dtypes and the model's order."""
        arrays = to_arrays(record) | self._integers
        return self.mask.scatter(arrays) if self._packed else self.mask.apply(arrays)

    def outgoing(self, messages: Iterable[Message], phase: str, round_: int) -> list[Message]:
        """Pack the strategy's messages; the mask goes along to every node that has not confirmed it."""
        batch = list(messages)
        head = wire.header(phase, round_, self.mask, **wire.weight_key(self._weight_key))
        values: dict[int, ArrayRecord] = {}
        for message in batch:
            content = RecordDict(dict(message.content))
            if len(content.array_records) != 1:
                raise ValueError(f"{len(content.array_records)} ArrayRecords in a message of the strategy, expected 1")
            key, record = next(iter(content.array_records.items()))
            if id(record) not in values:  # strategies put one record into all of their messages
                values[id(record)] = self._to_wire(record)
            content[key] = values[id(record)]
            content[wire.HEADER] = head
            if self._confirmed.get(message.metadata.dst_node_id) != self.mask.digest:
                content[wire.MASK] = self._mask_record()
            message.content = content
        return batch

    def repeat(self, message: Message, reply: Message) -> Message | None:
        """The message again, with the mask, if the node says that it lacks it."""
        head = reply.content.get(wire.HEADER) if reply.has_content() else None
        if head is None or head.get("status") != wire.MASK_MISSING or wire.MASK in message.content:
            return None
        content = RecordDict({**message.content, wire.MASK: self._mask_record()})
        sent = message.metadata
        return Message(content, sent.dst_node_id, sent.message_type, ttl=sent.ttl, group_id=sent.group_id)

    def incoming(self, replies: Iterable[Message], round_: int) -> list[Message]:
        """The train replies that count, as the strategy expects them, then the error replies."""
        seen: dict[int, tuple[float, Arrays]] = {}

        def accept(reply: Message) -> RecordDict:
            judged = firewall.judge(reply, mask=self.mask, phase=wire.TRAIN, round_=round_, weight_key=self._weight_key)
            seen[id(reply)] = judged.weight, {name: judged.packed[name] for name in self._integers}
            content = _without_ours(reply)
            content[judged.key] = self.to_strategy(judged.packed)
            return content

        admitted = self._admit(replies, round_, accept)
        counted = [seen[id(reply)] for reply in admitted if not reply.has_error()]
        if counted:
            _, integers = max(counted, key=lambda weighed: weighed[0])
            self._integers = {name: np.array(array) for name, array in integers.items()}
        return admitted

    def incoming_evaluate(self, replies: Iterable[Message], round_: int) -> list[Message]:
        """The evaluate replies that count, without our header, then the error replies."""

        def accept(reply: Message) -> RecordDict:
            firewall.judge_header(reply, mask=self.mask, phase=wire.EVALUATE, round_=round_)
            firewall.judge_metrics(reply, self._weight_key)
            return _without_ours(reply)

        return self._admit(replies, round_, accept)

    def _mask_record(self) -> ConfigRecord:
        # compressing a large mask takes a while, and a new mask goes to every node
        if self._encoded[0] != self.mask.digest:
            self._encoded = (self.mask.digest, wire.encode_mask(self.mask))
        return self._encoded[1]

    def _to_wire(self, record: ArrayRecord) -> ArrayRecord:
        arrays = to_arrays(record) | self._integers
        return wire.pack(self.mask, arrays if self._packed else self.mask.gather(arrays))

    def _admit(self, replies: Iterable[Message], round_: int, accept: Callable[[Message], RecordDict]) -> list[Message]:
        counted: list[Message] = []
        errors: list[Message] = []
        for reply in replies:
            if reply.has_error():
                errors.append(reply)
                if reply.error.code == wire.MOD_REFUSED:
                    log(
                        WARNING,
                        "round %d: node %d: %s",
                        round_,
                        reply.metadata.src_node_id,
                        firewall.explain(reply.error),
                    )
                continue
            try:
                reply.content = accept(reply)
            except wire.WireError as error:
                self._quarantine(reply, round_, str(error))
                continue
            self._confirmed[reply.metadata.src_node_id] = self.mask.digest
            counted.append(reply)
        return self._alike(counted, round_) + errors

    def _alike(self, replies: list[Message], round_: int) -> list[Message]:
        """Those that agree with most on the names of records and metrics: Flower's strategies insist on it."""
        names = [_names(reply.content) for reply in replies]
        if len(set(names)) <= 1 or not self._weight_key:
            return replies
        usual = Counter(names).most_common(1)[0][0]
        for reply, own in zip(replies, names, strict=True):
            if own != usual:
                self._quarantine(reply, round_, f"its records and metrics {own} differ from most replies' {usual}")
        return [reply for reply, own in zip(replies, names, strict=True) if own == usual]

    def _quarantine(self, reply: Message, round_: int, reason: str) -> None:
        self._ledger.failures["quarantined"] += 1
        log(WARNING, "round %d: left out the reply of node %d: %s", round_, reply.metadata.src_node_id, reason)


def _without_ours(reply: Message) -> RecordDict:
    return RecordDict({key: record for key, record in reply.content.items() if key != wire.HEADER})


def _names(content: RecordDict) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return tuple(
        sorted(
            (key, tuple(sorted(record)) if isinstance(record, MetricRecord) else ()) for key, record in content.items()
        )
    )
