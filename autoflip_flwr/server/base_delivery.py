"""Track which nodes hold the base, and send it only to those that are known to lack it."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from autoflip_flwr.core.layout import Arrays, Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.wire.base_record import base_digest, encode_base
from autoflip_flwr.wire.keys import BASE_RECORD, EXPLORE, GIVEN, HEADER, HELLO, MISSING

Told = dict[int, str]
"""By node: the digest of the base that it holds, ``GIVEN`` for a model that its user provides, "" for none."""

_LONGEST = 64  # characters of a digest: a longer one is ignored


def learn(told: Told, message: Message, reply: Message) -> None:
    """Note what a reply says about the base that its node holds.

    These are replies to hello, replies to an exploration that names a base, and replies that report a missing base. A
    node that lies harms only itself: it is sent exactly what it reports as missing.
    """
    head = _head_of(reply)
    if head is None:
        return
    asked = message.content.config_records.get(HEADER, ConfigRecord())
    lacks = BASE_RECORD in missing_of(reply)
    if lacks or asked.get("phase") == HELLO or (asked.get("phase") == EXPLORE and "base" in asked):
        base = head.get("base")
        known = isinstance(base, str) and len(base) <= _LONGEST and not lacks
        told[message.metadata.dst_node_id] = str(base) if known else ""


def missing_of(reply: Message) -> tuple[str, ...]:
    """Return the names of the records that a reply reports as missing at its node."""
    head = _head_of(reply)
    status = None if head is None else head.get("status")
    return MISSING.get(status, ()) if isinstance(status, str) else ()


def _head_of(reply: Message) -> ConfigRecord | None:
    head = reply.content.get(HEADER) if reply.has_content() else None
    return head if isinstance(head, ConfigRecord) else None


class BaseDelivery:
    """Name the base in headers, and put it into the messages of the nodes that lack it.

    A node of which nothing is known may hold it. If not, it says so, and is sent the base in the same round.

    Parameters
    ----------
    layout : Layout
        The model's arrays.
    arrays : dict[str, ndarray] | None
        The values outside the mask: full arrays by name. ``None``: zero, then no base is named or sent.
    told : dict[int, str]
        What the nodes have reported so far; updated here.
    """

    def __init__(self, layout: Layout, arrays: Arrays | None, told: Told) -> None:
        self.arrays = arrays
        self._layout, self._told = layout, told
        self._digest = "" if arrays is None else base_digest(layout, arrays)
        self._encoded: ArrayRecord | None = None

    def digest(self, mask: Mask) -> str:
        """Return the digest that messages under a mask name; "" if only zeros, or nothing, is outside the mask."""
        return "" if mask.is_full else self._digest

    def confirm(self, nodes: Iterable[int], mask: Mask) -> None:
        """Note that these nodes have worked under this mask, and so hold the base that its messages name."""
        if digest := self.digest(mask):
            self._told |= dict.fromkeys(nodes, digest)

    def put(self, content: RecordDict, node: int, mask: Mask) -> None:
        """Put the base into the content of a message to a node that is known to lack it."""
        if self.digest(mask) and self._told.get(node, GIVEN) not in (self._digest, GIVEN):
            content[BASE_RECORD] = self.record

    @property
    def record(self) -> ArrayRecord:
        """The base's record; it is made once, and only if a node lacks it."""
        if self._encoded is None:
            self._encoded = encode_base(self._layout, self.arrays or {})
        return self._encoded
