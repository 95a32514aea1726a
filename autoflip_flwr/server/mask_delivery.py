"""Track which node has which mask, and send the mask in force to every node that has not confirmed it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from flwr.app import ConfigRecord, Message, RecordDict

from autoflip_flwr.core.mask import Mask
from autoflip_flwr.wire import mask_record
from autoflip_flwr.wire.keys import MASK_RECORD
from autoflip_flwr.wire.records import array_bytes

KEPT_MASKS = 32
"""Number of earlier masks that are kept at most, so that nodes that have one of them get only the change."""


class MaskDelivery:
    """Put the mask in force into the messages of the nodes that may lack it.

    Parameters
    ----------
    mask : Mask
        The mask in force; assign another one to change it.
    """

    def __init__(self, mask: Mask) -> None:
        self._mask = mask
        self._confirmed: dict[int, str] = {}  # node -> digest
        self._older: dict[str, Mask] = {}  # by digest
        self._encoded: dict[str, ConfigRecord] = {}  # by the digest of the mask from which it tells the change

    @property
    def mask(self) -> Mask:
        """The mask in force."""
        return self._mask

    @mask.setter
    def mask(self, mask: Mask) -> None:
        bare = dataclasses.replace(self._mask)  # without its cached indices
        held = set(self._confirmed.values()) - {mask.digest}
        older = [each for each in (self._older | {bare.digest: bare}).items() if each[0] in held]
        self._older = dict(older[-KEPT_MASKS:])
        self._mask, self._encoded = mask, {}

    def confirm(self, nodes: Iterable[int]) -> None:
        """Note that these nodes have the mask in force."""
        self._confirmed |= dict.fromkeys(nodes, self._mask.digest)

    def put(self, content: RecordDict, node: int) -> None:
        """Put the mask into the content of a message to a node that has not confirmed it.

        Raises
        ------
        WireError
            If the mask keeps so small a share of so large a model that clients would reject it.
        """
        had = self._confirmed.get(node, "")
        if had != self._mask.digest:
            entries, full = self._mask.layout.prunable_size, self._mask.is_full
            mask_record.check_entries(entries, array_bytes(content), full=full)
            content[MASK_RECORD] = self._record(had)

    def whole(self, message: Message) -> ConfigRecord | None:
        """Return the whole mask for a node that lacks it after this message; ``None`` if the message contained it."""
        had = message.content.get(MASK_RECORD)
        return self._record() if had is None or mask_record.base_of(had) else None

    def _record(self, had: str = "") -> ConfigRecord:
        """Return the mask's record for a node that has the mask of digest ``had``: the change if it is smaller."""
        # compressing a large mask takes a while, and a new mask goes to every node
        if "" not in self._encoded:
            self._encoded[""] = mask_record.encode_mask(self._mask)
        whole = self._encoded[""]
        if had in self._older and had not in self._encoded:
            change = mask_record.encode_mask(self._mask, self._older[had])
            self._encoded[had] = min(change, whole, key=ConfigRecord.count_bytes)
        return self._encoded.get(had, whole)
