"""The ledger: bytes of the serialised messages by phase and direction, failures, and examples processed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from flwr.app import Message, MetricRecord, RecordDict

from autoflip_flwr import wire

EXAMPLES_PROCESSED = "examples-processed"
"""Metric in which a client may say how many examples it ran forward and backward (epochs count each time)."""

PHASES = ("exploration", "train", "evaluate", "other")

_PHASE_OF_HEADER = {wire.EXPLORE: "exploration", wire.TRAIN: "train", wire.EVALUATE: "evaluate", wire.HELLO: "other"}


def message_bytes(message: Message) -> int:
    """Bytes of a message as Flower stores and moves it: its serialised objects, equal ones once.

    Flower's list of the objects (about 140 bytes an object) and HTTP framing come on top.
    """
    return _object_bytes(message)


def record_bytes(content: RecordDict, key: str) -> int:
    """Bytes of one record of a message."""
    return _object_bytes(content[key])


def _object_bytes(root: object) -> int:
    return sum(dict(_objects(root)).values())


def _objects(root: object) -> Iterator[tuple[str, int]]:
    for child in (root.children or {}).values():  # type: ignore[attr-defined]
        yield from _objects(child)
    yield root.object_id, len(root.deflate())  # type: ignore[attr-defined]


def phase_of(message: Message) -> str:
    """The phase that a message is charged to, one of ``PHASES``."""
    head = message.content.get(wire.HEADER) if message.has_content() else None
    if head is not None:
        return _PHASE_OF_HEADER.get(str(head.get("phase")), "other")
    category = message.metadata.message_type.partition(".")[0]
    return category if category in PHASES else "other"


@dataclass
class Ledger:
    """What a run has cost so far. ``AutoFlip`` and :class:`~autoflip_flwr.grid.OrderedGrid` keep it.

    Attributes
    ----------
    up, down : Counter[str]
        Bytes from and to the nodes, by phase (``PHASES``). Masks count in ``mask_down``, not in ``down``.
    mask_down : int
        Bytes of mask records.
    failures : Counter[str]
        ``errors`` (error replies), ``absent`` (no reply in time), ``quarantined`` (replies left out by the firewall).
    examples : Counter[str]
        Examples that clients said they processed, by phase.
    messages, replies : Counter[str]
        Messages sent, and replies received without an error, by phase.
    """

    up: Counter[str] = field(default_factory=Counter)
    down: Counter[str] = field(default_factory=Counter)
    mask_down: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    examples: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)
    replies: Counter[str] = field(default_factory=Counter)

    def sent(self, message: Message) -> None:
        """Charge a message to a node."""
        self.messages[phase_of(message)] += 1
        mask = record_bytes(message.content, wire.MASK) if wire.MASK in message.content else 0
        self.mask_down += mask
        self.down[phase_of(message)] += message_bytes(message) - mask

    def received(self, phase: str, reply: Message) -> None:
        """Charge a reply from a node to the phase of the message that it answers."""
        if reply.has_error():
            self.failures["errors"] += 1
            return
        self.up[phase] += message_bytes(reply)
        self.replies[phase] += 1
        for record in reply.content.values():
            if isinstance(record, MetricRecord) and isinstance(count := record.get(EXAMPLES_PROCESSED), int | float):
                self.examples[phase] += int(count)

    def bytes_by_phase(self) -> dict[str, int]:
        """``{"exploration_up": ..., "exploration_down": ..., "mask_down": ..., ..., "total": ...}``."""
        table = {
            f"{phase}_{way}": count[phase] for phase in PHASES for way, count in (("up", self.up), ("down", self.down))
        }
        other = table.pop("other_up") + table.pop("other_down")
        table |= {"mask_down": self.mask_down, "other": other}
        return table | {"total": sum(table.values())}

    def failure_counts(self) -> dict[str, int]:
        """``{"quarantined": ..., "errors": ..., "absent": ...}``."""
        return {key: self.failures[key] for key in ("quarantined", "errors", "absent")}

    def exploration_only(self) -> dict[str, int]:
        """What the exploration alone has cost, to be charged again to a run that reuses it."""
        return {
            "up": self.up["exploration"],
            "down": self.down["exploration"],
            "mask_down": self.mask_down,
            "examples": self.examples["exploration"],
            "messages": self.messages["exploration"],
            "replies": self.replies["exploration"],
        }

    def charge_exploration(self, cost: dict[str, int]) -> None:
        """Charge an exploration that an earlier run has made (:meth:`exploration_only`)."""
        self.mask_down += cost["mask_down"]
        for key in ("up", "down", "examples", "messages", "replies"):
            getattr(self, key)["exploration"] += cost[key]
