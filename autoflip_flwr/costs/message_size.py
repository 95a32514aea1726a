"""Compute the bytes that Flower transfers for a message, from the lengths of its parts.

They are the bytes that a deployment transfers between a node and the SuperLink, in both directions, and that
``flwr list --format json`` reports as the run's network traffic. For a message to a node:

- down: its objects as Flower serialises them, and one protobuf message with its metadata and the tree of object ids;
- up: the node's request for the message.

For a node's reply:

- up: its objects, and one protobuf message with its metadata and the tree of object ids;
- down: the SuperLink's answer, which lists the objects that the node must push.

Each message counts separately: an object that several nodes fetch counts for each, as in Flower. Sizes are computed
from lengths; only small records are serialised or hashed. HTTP headers, heartbeats, empty polls and the app's archive
(FAB) are counted neither here nor by Flower.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict

# An object is "<class> <ids of its children> <length>\0<body>". An id is a SHA-256 in hex; equal siblings count once.

_CHUNK = int(os.getenv("FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", str(5 * 2**20)))  # Flower's chunk size of arrays
_SMALL = 4096
_NO_ID = "0" * 64
_EMPTY = RecordDict()


class Traffic(NamedTuple):
    """Bytes up and down for one message or reply."""

    up: int
    down: int


class _Size(NamedTuple):
    """Size of an object with its children: bytes of the objects, bytes of the tree of ids, number of objects."""

    content: int
    tree: int
    objects: int


def message_traffic(message: Message) -> Traffic:
    """Return the bytes transferred for a message to a node."""
    size, metadata = _message(message)
    return Traffic(_node(message.metadata.dst_node_id), size.content + metadata + _proto(size.tree))


def reply_traffic(reply: Message) -> Traffic:
    """Return the bytes transferred for a node's reply."""
    size, metadata = _message(reply)
    runtime = _proto(8)
    receipt = _proto(2) + _proto(_proto(64) + 2) + _proto(36)  # time of the next connection, a result, a session id
    return Traffic(
        size.content + metadata + _proto(size.tree) + _node(reply.metadata.src_node_id) + runtime,
        receipt + size.objects * _proto(64),
    )


def message_bytes(message: Message) -> int:
    """Return the bytes of a message in its own direction: down to a node, or up if it is a reply."""
    return reply_traffic(message).up if message.metadata.reply_to_message_id else message_traffic(message).down


def dense_traffic(model: ArrayRecord) -> tuple[Traffic, Traffic, Traffic]:
    """Return the bytes of plain FedAvg for a model: a message to a node, a train reply, and an evaluation reply.

    Clients are assumed to return a loss and their number of examples. The model's arrays are assumed to be pairwise
    different, although some may be equal before training.
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
    """Return the bytes of the serialised objects of one record of a message."""
    record = content[key]
    return _array_record(record).content if isinstance(record, ArrayRecord) else len(record.deflate())


def _varint(value: int) -> int:
    return max(1, -(-value.bit_length() // 7))


def _proto(size: int) -> int:
    """Return the bytes of a protobuf field with ``size`` bytes of content."""
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
        # only arrays with equal last bytes are compared in full; the full data of small ones is the key already
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
    """Return the size of the message's objects, and of its metadata (and error) as sent with the tree of ids."""
    hollow = copy.copy(message)
    if message.has_content():
        hollow.content = _EMPTY
    own = hollow.deflate()
    body = own[own.index(b"\0") + 1 :]
    # the body is a protobuf message; its first field is the metadata without the message id
    metadata = body[1] if body[1] < 128 else body[1] - 128 + (body[2] << 7)
    sent = len(body) - _proto(metadata) + _proto(metadata + _proto(64))
    if not message.has_content():
        return _Size(len(own), _proto(64), 1), _proto(sent)
    content = _record_dict(message.content)
    size = _Size(len(own) + content.content, _proto(64) + _proto(content.tree), 1 + content.objects)
    return size, _proto(sent + _proto(0))  # an empty field in place of the content, which the objects hold
