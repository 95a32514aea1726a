"""Find the training losses that clients report among their metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from flwr.app import Message


def losses_of(replies: Iterable[Message], names: Mapping[int, int]) -> dict[int, float]:
    """Return each reply's training loss: its first metric with "loss" in its name. Replies without one are left out.

    Parameters
    ----------
    replies : Iterable[Message]
        Train replies that count, and error replies.
    names : Mapping[int, int]
        Partition ids by node. A node that is not among them goes by its own id.
    """
    found = {}
    for reply in replies:
        if reply.has_error():
            continue
        for record in reply.content.metric_records.values():
            losses = [value for name, value in record.items() if "loss" in name.lower() and isinstance(value, float)]
            if losses:
                node = reply.metadata.src_node_id
                found[names.get(node, node)] = losses[0]
                break
    return found
