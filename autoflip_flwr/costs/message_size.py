"""What a message costs: the bytes that Flower moves for it, worked out from lengths.

Bytes are those that a deployment moves between a node and the SuperLink, both ways, and that ``flwr list --format
json`` adds up as the run's network traffic. For a message to a node:

- down: its objects as Flower serialises them, and one protobuf message with its metadata and the tree of their ids;
- up: the node's request for it.

For a node's reply:

- up: its objects, and one protobuf message with its metadata and the tree of their ids;
- down: the SuperLink's answer, which lists the objects that the node is to push.

Each message counts by itself: an object that several nodes fetch counts for each, as in Flower. All of it is worked
out from lengths; nothing is serialised or hashed but small records. HTTP's own headers, heartbeats, empty polls and
the app's archive (FAB) are in neither count.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict

# An object is "<class> <ids of its children> <length>\0<body>"; an id is a SHA-256 in hex, so equal siblings are one.

_CHUNK = int(os.getenv("FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", str(5 * 2**20)))  # Flower cuts arrays, and reads this too
_SMALL = 4096
_NO_ID = "0" * 64
_EMPTY = RecordDict()


class Traffic(NamedTuple):
    """Bytes up and down for one message or reply."""

    up: int
    down: int


class _Size(NamedTuple):
    """An object with all that it holds: bytes of the objects, bytes of the tree of their ids, number of objects."""

    content: int
    tree: int
    objects: int


def message_traffic(message: Message) -> Traffic:
    """Bytes that a message to a node moves."""
    size, metadata = _message(message)
    return Traffic(_node(message.metadata.dst_node_id), size.content + metadata + _proto(size.tree))


def reply_traffic(reply: Message) -> Traffic:
    """Bytes that a node's reply moves."""
    size, metadata = _message(reply)
    runtime = _proto(8)
    receipt = _proto(2) + _proto(_proto(64) + 2) + _proto(36)  # when to connect again, a result, a session's id
    return Traffic(
        size.content + metadata + _proto(size.tree) + _node(reply.metadata.src_node_id) + runtime,
        receipt + size.objects * _proto(64),
    )


def message_bytes(message: Message) -> int:
    """Bytes that a message moves in its own direction: down to a node, up if it is a reply."""
    return reply_traffic(message).up if message.metadata.reply_to_message_id else message_traffic(message).down


def dense_traffic(model: ArrayRecord) -> tuple[Traffic, Traffic, Traffic]:
    """Bytes of plain FedAvg's messages for a model: one to a node, a train reply to it, and an evaluation reply.

    Clients are taken to return a loss and their number of examples, and no two arrays to be equal, as some are that
    training has not reached yet.
    """
    random = np.random.default_rng(0)
    model = ArrayRecord(
        {k: Array(each.dtype, each.shape, each.stype, random.bytes(len(each.data))) for k, each in model.items()}
    )
    message = Message(RecordDict({"arrays": model, "config": ConfigRecord({"server-round": 1})}), 1, MessageType.TRAIN)
    metrics = MetricRecord({"train-loss": 1.0, "num-examples": 1})
    reply = Message(RecordDict({"arrays": model, "metrics": metrics}), reply_to=message)
    evaluation = Message(RecordDict({"metrics": metrics}), reply_to=message)
    return message_traffic(message), reply_traffic(reply), reply_traffic(evaluation)


def record_bytes(content: RecordDict, key: str) -> int:
    """Bytes of the serialised objects of one record of a message."""
    record = content[key]
    return _array_record(record).content if isinstance(record, ArrayRecord) else len(record.deflate())


def _varint(value: int) -> int:
    return max(1, -(-value.bit_length() // 7))


def _proto(size: int) -> int:
    """Bytes of a protobuf field that holds ``size`` bytes."""
    return 1 + _varint(size) + size


def _node(node: int) -> int:
    return _proto(1 + _varint(node))


def _object(kind: type, body: int, children: Iterable[_Size]) -> _Size:
    inner = list(children)
    ids = max(65 * len(inner) - 1, 0)
    return _Size(
        len(kind.__qualname__) + ids + len(str(body)) + 3 + body + sum(child.content for child in inner),
        _proto(64) + sum(_proto(child.tree) for child in inner),
        1 + sum(child.objects for child in inner),
    )


def _array(array: Array) -> _Size:
    data = memoryview(array.data)
    chunks: list[memoryview] = []
    places = []
    for start in range(0, len(data), _CHUNK):
        chunk = data[start : start + _CHUNK]
        if chunk not in chunks:
            chunks.append(chunk)
        places.append(chunks.index(chunk))
    about = {"dtype": array.dtype, "shape": array.shape, "stype": array.stype, "arraychunk_ids": places}
    sizes = [_Size(len("ArrayChunk  ") + len(str(len(c))) + 1 + len(c), _proto(64), 1) for c in chunks]
    return _object(type(array), len(json.dumps(about)), sizes)


def _array_record(record: ArrayRecord) -> _Size:
    distinct: dict[tuple[str, tuple[int, ...], bytes], list[Array]] = {}
    for array in record.values():
        # only arrays that end alike are compared in full, and they are large: else there could be very many of them
        end = array.data[-64:] if len(array.data) > _SMALL else array.data
        alike = distinct.setdefault((array.dtype, array.shape, end), [])
        if array not in alike:
            alike.append(array)
    names = len(json.dumps(dict.fromkeys(record, _NO_ID)))
    return _object(type(record), names, [_array(array) for alike in distinct.values() for array in alike])


def _record_dict(content: RecordDict) -> _Size:
    arrays: list[ArrayRecord] = []
    for record in content.array_records.values():
        if all(list(record.items()) != list(other.items()) for other in arrays):
            arrays.append(record)
    small = {record.deflate() for record in content.values() if not isinstance(record, ArrayRecord)}
    sizes = [_array_record(record) for record in arrays] + [_Size(len(done), _proto(64), 1) for done in small]
    return _object(type(content), len(json.dumps(dict.fromkeys(content, _NO_ID))), sizes)


def _message(message: Message) -> tuple[_Size, int]:
    """The message's objects, and the bytes of its metadata (and error) as sent along with the tree of ids."""
    hollow = copy.copy(message)
    if message.has_content():
        hollow.content = _EMPTY
    own = hollow.deflate()
    body = own[own.index(b"\0") + 1 :]
    # the body is a protobuf message whose first field is the metadata without the message's own id
    metadata = body[1] if body[1] < 128 else body[1] - 128 + (body[2] << 7)
    sent = len(body) - _proto(metadata) + _proto(metadata + _proto(64))
    if not message.has_content():
        return _Size(len(own), _proto(64), 1), _proto(sent)
    content = _record_dict(message.content)
    size = _Size(len(own) + content.content, _proto(64) + _proto(content.tree), 1 + content.objects)
    return size, _proto(sent + _proto(0))  # an empty content stands for the one in the objects
