"""Ledger of a run: bytes by phase, direction and node as Flower transfers them, failures, seconds, examples, FLOPs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from autoflip_flwr.costs.message_size import Traffic, dense_traffic, message_traffic, record_bytes, reply_traffic
from autoflip_flwr.costs.reason import last_words
from autoflip_flwr.wire.keys import (
    BASE_RECORD,
    EVALUATE,
    EXAMPLES_PROCESSED,
    EXPLORE,
    HEADER,
    HELLO,
    MASK_RECORD,
    TRAIN,
)

CHARGED_PHASES = ("exploration", "train", "evaluate", "other")

LATE = "no reply in time"

MAX_REASON = 300
"""Maximum number of characters noted of a node's error message."""

_PHASE_OF_HEADER = {EXPLORE: "exploration", TRAIN: "train", EVALUATE: "evaluate", HELLO: "other"}


def phase_of(message: Message) -> str:
    """Return the phase that a message is charged to, one of ``CHARGED_PHASES``."""
    head = message.content.get(HEADER) if message.has_content() else None
    if head is not None:
        return _PHASE_OF_HEADER.get(str(head.get("phase")), "other")
    category = message.metadata.message_type.partition(".")[0]
    return category if category in CHARGED_PHASES else "other"


def examples_processed(content: RecordDict) -> int | None:
    """Return the number of processed examples that a reply states, or ``None``; works on unchecked replies."""
    counts = [record.get(EXAMPLES_PROCESSED) for record in content.metric_records.values()]
    return next((int(count) for count in counts if isinstance(count, int | float) and 0 <= count < 2**63), None)


def why_absent(incidents: Iterable[Mapping[str, object]]) -> str:
    """Return why messages have no reply, from the ledger's incidents; each reason once."""
    return "; ".join(dict.fromkeys(str(each["reason"]) for each in incidents if each["kind"] == "absent")) or LATE


def _short(reason: str) -> str:
    """Return the message of a node's exception; only its end if it is long."""
    plain = last_words(reason[-100 * MAX_REASON :])
    return plain if len(plain) <= MAX_REASON else f"... {plain[-MAX_REASON:]}"


def round_of(message: Message) -> int:
    """Return the round of a message, from AutoFLIP's header or else from the config of Flower's strategies; else 0."""
    if not message.has_content():
        return 0
    head = message.content.get(HEADER)
    if isinstance(head, ConfigRecord):
        found = head.get("round")
    else:
        found = next(
            (each["server-round"] for each in message.content.config_records.values() if "server-round" in each), 0
        )
    return found if type(found) is int else 0


@dataclass
class Ledger:
    """Costs of a run so far. ``AutoFlip`` and :class:`~autoflip_flwr.server.grid.OrderedGrid` update it.

    Attributes
    ----------
    up, down : Counter[str]
        Bytes from and to the nodes, by phase (``CHARGED_PHASES``). ``down`` excludes masks (``mask_down``) and the
        values of pruned entries (``base_down``).
    mask_down, base_down : int
        Bytes of mask records, and of base records.
    by_node : dict[int, Counter[str]]
        The same bytes by node id, under the keys of :meth:`bytes_by_node`.
    partitions : dict[int, int]
        Partition ids by node id, as far as they are known.
    failures : Counter[str]
        Number of incidents by kind: ``errors`` (error replies), ``absent`` (no reply in time, or the node has left),
        ``rejected`` (replies rejected by the firewall), and the others.
    examples : Counter[str]
        Examples that clients said they processed, by phase.
    messages, replies : Counter[str]
        Messages sent, and replies received without an error, by phase.
    seconds : dict[str, float]
        Time from sending the messages to the last of their replies, by phase.
    flops_per_example : float
        Floating-point operations of one example, forward and backward, through the dense model.
    incidents : list[dict[str, int or str or None]]
        What went wrong, in order: ``kind`` (``errors``, ``absent``, ``rejected``; ``odd``: the reply is used, though
        its update is unusually long; ``paused``: the node gets no messages for a while; ``unchanged``: the round does
        not change the model), ``phase``, ``round``, ``node`` (its partition id if known, else its node id; ``None`` for
        the whole round) and ``reason``.
    """

    up: Counter[str] = field(default_factory=Counter)
    down: Counter[str] = field(default_factory=Counter)
    mask_down: int = 0
    base_down: int = 0
    by_node: dict[int, Counter[str]] = field(default_factory=dict)
    partitions: dict[int, int] = field(default_factory=dict)
    failures: Counter[str] = field(default_factory=Counter)
    examples: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)
    replies: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    flops_per_example: float = 0.0
    incidents: list[dict[str, int | str | None]] = field(default_factory=list)

    def note(self, kind: str, node: int | None, phase: str, round_: int, reason: str) -> None:
        """Count an incident of ``kind``, and note its node (``None``: the whole round), phase, round and reason."""
        self.failures[kind] += 1
        self.incidents.append(
            {
                "kind": kind,
                "phase": phase,
                "round": round_,
                "node": None if node is None else self.partitions.get(node, node),
                "reason": reason,
            }
        )

    def absent(self, message: Message, reason: str = LATE) -> None:
        """Note that a message has no reply."""
        self.note("absent", message.metadata.dst_node_id, phase_of(message), round_of(message), reason)

    def sent(self, message: Message) -> None:
        """Charge a message to a node, whether or not the node will fetch it."""
        phase = phase_of(message)
        self.messages[phase] += 1
        mask, base = (
            record_bytes(message.content, key) if key in message.content else 0 for key in (MASK_RECORD, BASE_RECORD)
        )
        self._charge(phase, message.metadata.dst_node_id, message_traffic(message), mask, base)

    def received(self, message: Message, reply: Message) -> None:
        """Charge a reply to the phase and the node of the message that it answers."""
        phase, node = phase_of(message), message.metadata.dst_node_id
        if reply.metadata.src_node_id == node:  # otherwise the SuperLink replies for a node that has left
            self._charge(phase, node, reply_traffic(reply))
        if reply.has_error():
            reason = str(reply.error.reason or f"error {reply.error.code}")
            self.note("errors", node, phase, round_of(message), _short(reason))
            return
        self.replies[phase] += 1
        if count := examples_processed(reply.content):
            self.examples[phase] += count

    def absorb(self, earlier: Mapping[str, Any]) -> None:
        """Add the costs of an interrupted run, given by the attributes of its ledger."""
        for name in ("up", "down", "failures", "examples", "messages", "replies"):
            getattr(self, name).update(earlier[name])
        self.mask_down += earlier["mask_down"]
        self.base_down += earlier["base_down"]
        for node, own in earlier["by_node"].items():
            self.by_node.setdefault(node, Counter()).update(own)
        self.partitions = earlier["partitions"] | self.partitions
        for phase, seconds in earlier["seconds"].items():
            self.seconds[phase] += seconds
        self.incidents[:0] = earlier["incidents"]

    def _charge(self, phase: str, node: int, moved: Traffic, mask: int = 0, base: int = 0) -> None:
        down = moved.down - mask - base
        self.up[phase] += moved.up
        self.down[phase] += down
        self.mask_down += mask
        self.base_down += base
        own = self.by_node.setdefault(node, Counter())
        own.update({f"{phase}_up": moved.up, f"{phase}_down": down, "mask_down": mask})
        if base:
            own["base_down"] += base

    def bytes_by_phase(self) -> dict[str, int]:
        """Return ``{"exploration_up": ..., "exploration_down": ..., "mask_down": ..., ..., "total": ...}``.

        The key ``base_down`` is present only if a base was sent.
        """
        table = {
            f"{phase}_{way}": count[phase]
            for phase in CHARGED_PHASES
            for way, count in (("up", self.up), ("down", self.down))
        }
        other = table.pop("other_up") + table.pop("other_down")
        table |= {"mask_down": self.mask_down} | ({"base_down": self.base_down} if self.base_down else {})
        table["other"] = other
        return table | {"total": sum(table.values())}

    def dense_bytes_by_phase(self, model: ArrayRecord) -> dict[str, int]:
        """Return the bytes that the rounds' messages and replies would take with plain FedAvg.

        ``{"train_up": ..., "train_down": ..., "evaluate_up": ..., "evaluate_down": ..., "total": ...}``; FedAvg has
        neither exploration nor masks. ``model`` is the full model that is given to ``start``.
        """
        message, *replies = dense_traffic(model)
        table = {
            f"{phase}_{way}": self.messages[phase] * getattr(message, way) + self.replies[phase] * getattr(reply, way)
            for phase, reply in zip(("train", "evaluate"), replies, strict=True)
            for way in ("up", "down")
        }
        return table | {"total": sum(table.values())}

    def bytes_by_node(self) -> dict[int, dict[str, int]]:
        """Return bytes by node, phase and direction.

        ``{0: {"train_up": ..., "mask_down": ..., "total": ...}, 1: ...}``; the keys are partition ids if known, else
        node ids. Entries that are 0 are omitted. An exploration of an earlier run (:meth:`charge_exploration`) belongs
        to no node.
        """
        table: dict[int, Counter[str]] = {}
        for node, own in self.by_node.items():
            # a node that lost its id returns with another id and the same partition
            table.setdefault(self.partitions.get(node, node), Counter()).update(own)
        return {name: {**+table[name], "total": table[name].total()} for name in sorted(table)}

    def failure_counts(self) -> dict[str, int]:
        """Return ``{"rejected": ..., "errors": ..., "absent": ...}``."""
        return {key: self.failures[key] for key in ("rejected", "errors", "absent")}

    def flops(self) -> dict[str, float]:
        """Return the clients' floating-point operations by phase: processed examples times ``flops_per_example``.

        They are counted for the dense model: an unstructured mask saves bytes, not operations.
        """
        return {
            phase: self.examples[phase] * self.flops_per_example for phase in CHARGED_PHASES if self.examples[phase]
        }

    def exploration_only(self) -> dict[str, float]:
        """Return the costs of the exploration alone, to charge them to a run that reuses it."""
        return {
            "up": self.up["exploration"],
            "down": self.down["exploration"],
            "mask_down": self.mask_down,
            "examples": self.examples["exploration"],
            "messages": self.messages["exploration"],
            "replies": self.replies["exploration"],
            "seconds": self.seconds["exploration"],
        }

    def charge_exploration(self, cost: Mapping[str, float]) -> None:
        """Charge the costs of an earlier run's exploration (from :meth:`exploration_only`)."""
        self.mask_down += int(cost["mask_down"])
        for key in ("up", "down", "examples", "messages", "replies"):
            getattr(self, key)["exploration"] += int(cost[key])
        self.seconds["exploration"] += cost.get("seconds", 0.0)
