"""What nobody has thought of: well-formed messages and replies damaged at random, and random bytes to every decoder.

A client answers or refuses, a server counts a reply or leaves it out; nothing else comes out of either.
"""

from __future__ import annotations

import json
import math
import random
import resource
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import forge
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedMedian
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoflip_flwr import AutoFlip, autoflip_mod
from autoflip_flwr.core.choices import DELTAS
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.request import Request
from autoflip_flwr.replies.check import MAX_DELTA, MAX_WEIGHT, judge_answer, read_answer
from autoflip_flwr.testing import LocalGrid
from autoflip_flwr.wire import mask_bits, mask_change, mask_record
from autoflip_flwr.wire.deltas import decode_deltas
from autoflip_flwr.wire.keys import BASE_RECORD, EXPLORE, FORMAT, HEADER, MASK_RECORD, MOD_REFUSED
from autoflip_flwr.wire.messages import pack_values, read_header, unpack_values
from autoflip_flwr.wire.records import WireError, to_arrays, to_record
from autoflip_flwr.wire.values import Coded, coded_size

pytestmark = pytest.mark.runs

MESSAGES, REPLIES, MOVES, MASKS, LAYOUTS, BYTES = 4000, 1500, 1000, 750, 1000, 500
"""Examples of each test; some run for several cases."""


def quick(examples: int) -> settings:
    return settings(
        deadline=None, max_examples=examples, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )


def test_ten_thousand_examples_are_tried():
    assert sum([MESSAGES, REPLIES * len(SERVERS), MOVES * 2, MASKS * len(GOOD_BITS), LAYOUTS, BYTES * 2]) >= 10_000


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Whoever allocates more than a small message justifies gets a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**28, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


# Damage is drawn from a generator of its own, seeded by hypothesis: that is ten times as fast as drawing each choice.
generators = st.integers(0, 2**64).map(random.Random)

INTS: list[Any] = [0, 1, 2, 3, -1, 16, 2**31, 2**33, 2**63 - 1, -(2**63), 2**64 - 1]
FLOATS: list[Any] = [0.0, 0.5, 1.0, 2.0, -1.0, math.nan, math.inf, -math.inf, 1.7e308, 5e-324]
TEXTS: list[Any] = ["", "train", "explore", "evaluate", "full", "gaps", "units", "int8", "log8", "../x", "\0", "\u1234"]
NUMBERS: list[Any] = [*INTS, *FLOATS, [], [1], [1, 2], [0.5], [math.nan]]
VALUES: list[Any] = [*NUMBERS, *TEXTS, True, False, b"", b"x", ["a"], [b"x"], [True]]
ARRAYS = [Array(np.ones(size, code)) for code in ("f4", "f8", "u1", "i8", "?") for size in (0, 1, 2, 15)]


def damaged(good: bytes, draw: random.Random) -> bytes:
    """Some bytes changed, left out or put in; also of what they are the zlib stream of."""
    if draw.random() < 0.5:
        with suppress(zlib.error):
            return zlib.compress(damaged(zlib.decompress(good), draw))
    data = bytearray(good)
    for _ in range(draw.randint(1, 3)):
        at, count = draw.randrange(len(data) + 1), draw.randint(1, 9)
        match draw.choice(["change", "cut", "put", "end"]):
            case "change":
                data[at : at + 1] = draw.randbytes(1)
            case "cut":
                del data[at : at + count]
            case "put":
                data[at:at] = draw.randbytes(count)
            case "end":
                del data[at:]
    return bytes(data)


def wrong(good: RecordDict, draw: random.Random) -> RecordDict:
    """A message with one or a few things wrong."""
    content = good
    for _ in range(draw.randint(1, 3)):
        if not content:
            break
        key = draw.choice(list(content))
        match draw.choice(["drop", "rename", "swap", *["field"] * 9]):
            case "drop":
                content = forge.swap(content, key, None)
            case "rename":
                content = RecordDict({draw.choice(TEXTS) if k == key else k: record for k, record in content.items()})
            case "swap":
                others: list[Any] = [
                    ConfigRecord(),
                    MetricRecord({"format": FORMAT}),
                    ArrayRecord(),
                    *good.values(),
                ]
                content = forge.swap(content, key, draw.choice(others))
            case "field":
                content = forge.swap(content, key, wrong_field(content[key], draw))
    return content


def wrong_field(record: Any, draw: random.Random) -> Any:
    """A record with one field changed, left out or more."""
    fields = dict(record)
    name = draw.choice([*fields, "more"])
    value = fields.get(name)
    if value is not None and draw.random() < 0.15:
        del fields[name]
    elif isinstance(record, ArrayRecord):
        if value is None or draw.random() < 0.25:
            fields[name] = draw.choice(ARRAYS)
        else:
            start = draw.choice([0, 128])  # with the NumPy header, or behind it
            data = value.data[:start] + damaged(value.data[start:], draw)
            fields[name] = Array(draw.choice(TEXTS), (draw.choice(INTS),), draw.choice(TEXTS), data)
    elif isinstance(record, MetricRecord):
        fields[name] = draw.choice(NUMBERS)
    else:
        fields[name] = damaged(value, draw) if isinstance(value, bytes) else draw.choice(VALUES)
    return type(record)(fields)


# The client

WELL_FORMED = [forge.message(phase, kind) for phase in ("train", "explore", "evaluate") for kind in ("float32", "int8")]
WELL_FORMED += [forge.with_base(forge.message(phase)) for phase in ("train", "evaluate")]
WELL_FORMED.append(
    forge.alter(forge.message(), MASK_RECORD, encoding="gaps", bits=zlib.compress(b"\0\1\0\1\0\1\0\1\0\1\0"))
)


@pytest.fixture(scope="module", autouse=True)
def run() -> None:
    """Messages can only be made within a run of Flower."""
    LocalGrid(client)  # type: ignore[arg-type]


def client(message: Message, context: Context) -> Message:
    (arrays,) = message.content.array_records.values()
    new = {name: array + 1 if array.dtype.kind == "f" else array for name, array in to_arrays(arrays).items()}
    metrics = MetricRecord({"num-examples": 10})
    return Message(RecordDict({"arrays": to_record(new), "metrics": metrics}), reply_to=message)


@quick(MESSAGES)
@given(draw=generators)
def test_a_client_answers_or_refuses(little_memory: None, draw: random.Random):
    content, first = wrong(draw.choice(WELL_FORMED), draw), draw.random() < 0.5
    context = Context(1, 100, {"partition-id": 0}, RecordDict(), {})
    if first:
        autoflip_mod(Message(forge.message(), 100, "train"), context, client)
    if HEADER not in content or len(content.array_records.keys() - {BASE_RECORD}) != 1:
        content = RecordDict({**content, HEADER: forge.message()[HEADER]})
    reply = autoflip_mod(Message(content, 100, "train"), context, client)
    if reply.has_error():
        assert reply.error.code == MOD_REFUSED
        assert reply.error.reason.startswith("autoflip_mod: ")
    else:
        assert read_header(reply.content) is not None


# The server

Server = tuple[AutoFlip, Message, list[RecordDict]]
SERVERS = {
    "FedAvg": (FedAvg, "float32"),
    "FedAvg, int8": (FedAvg, "int8"),
    "FedMedian, float16": (FedMedian, "float16"),
}


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest) -> Server:
    """A server that waits for the replies of a round, one of its messages, and good replies."""
    inner, kind = SERVERS[request.param]
    strategy = AutoFlip(inner(), mask=forge.MASK, values=kind)
    grid = LocalGrid(client, num_nodes=3)  # type: ignore[arg-type]
    strategy.start(grid, to_record(forge.MODEL), num_rounds=0)
    message, *_ = strategy.configure_train(1, to_record(forge.MASK.apply(forge.MODEL)), ConfigRecord(), grid)
    return strategy, message, [forge.reply(kind=kind)] * 2


@quick(REPLIES)
@given(draw=generators)
def test_a_server_counts_a_reply_or_leaves_it_out(little_memory: None, server: Server, draw: random.Random):
    strategy, message, good = server
    content = wrong(good[0], draw)
    if isinstance(content.get(HEADER), ConfigRecord) and draw.random() < 0.8:
        content = forge.told(content)
    replies = [Message(RecordDict(dict(records)), reply_to=message) for records in (*good, content)]
    arrays, metrics = strategy.aggregate_train(1, replies)
    assert arrays is not None
    assert metrics is not None
    model = to_arrays(arrays)
    assert list(model) == list(forge.MODEL)
    assert all(np.isfinite(array).all() for array in model.values())


@quick(MOVES)
@given(draw=generators)
@pytest.mark.parametrize("kind", DELTAS)
def test_a_server_takes_an_explorers_moves_or_leaves_them_out(little_memory: None, kind: str, draw: random.Random):
    content = wrong(forge.reply(EXPLORE, kind), draw)
    if isinstance(content.get(HEADER), ConfigRecord):
        content = forge.told(content)
    answer = Message(content, reply_to=Message(RecordDict(), 100, "train"))
    try:
        asked = {"mask": forge.EVERYTHING, "requests": (Request("delta", "all", kind),), "kind": kind}
        weight, held = judge_answer(answer, weight_key="num-examples", **asked)
        moves = read_answer(held, **asked)["delta"]
    except WireError:
        return
    assert 0 < weight <= MAX_WEIGHT
    floats = [moves[spec.name] for spec in forge.LAYOUT.specs if spec.floating]
    assert all((np.abs(array.astype(float)) <= MAX_DELTA).all() for array in floats)


# Decoders


def mask_or_error(record: ConfigRecord, carried: int = 200) -> None:
    try:
        mask = mask_record.decode_mask(record, carried=carried)
    except WireError:
        return
    assert mask.kept <= mask.layout.prunable_size <= 2**20 + 2**11 * carried
    assert len(mask.digest) == 64


LAYOUT = forge.message()[MASK_RECORD]["layout"]
GOOD_BITS = {
    "bitmap": zlib.compress(forge.MASK.bits),
    "gaps": zlib.compress(b"\0\1\0\1\0\1\0\1\0\1\0"),
    "units": zlib.compress(b"\xf0\xf0"),
    "full": b"",
}


@quick(MASKS)
@given(draw=generators, other=st.none() | st.binary(max_size=30), packed=st.booleans())
@pytest.mark.parametrize("encoding", GOOD_BITS)
def test_any_bits_give_a_mask_or_an_error(
    little_memory: None, encoding: str, draw: random.Random, other: bytes | None, packed: bool
):
    data = damaged(GOOD_BITS[encoding], draw) if other is None else zlib.compress(other) if packed else other
    record = ConfigRecord({"layout": LAYOUT, "encoding": encoding, "version": 1, "bits": data})
    mask_or_error(record)


SIZES = st.sampled_from([0, 1, 4, 1000, 2**20, 2**31, 2**33, 2**64, -1, True, 4.0, None, "4", math.nan]) | st.integers(
    0, 9
)
CELLS = st.sampled_from(["", "w", "\ud800", 7, None, [], {}, [[]]]) | st.text(max_size=3)
DTYPES = st.sampled_from(
    ["float16", "float32", "float64", "int64", "bool", "object", "O", "V8", ">f4", "f4", 1, None, []]
)
ROWS = st.tuples(
    CELLS, st.lists(SIZES, max_size=4) | SIZES, DTYPES, st.sampled_from([0, 1, True, 2, -1, 1.0, "1", None])
)


@quick(LAYOUTS)
@given(rows=st.lists(ROWS | CELLS, max_size=4), encoding=st.sampled_from([*GOOD_BITS]), data=st.binary(max_size=4))
def test_any_layout_gives_a_mask_or_an_error(little_memory: None, rows: list[object], encoding: str, data: bytes):
    layout = zlib.compress(json.dumps(rows).encode())
    fields = {"layout": layout, "encoding": encoding, "version": 1, "bits": zlib.compress(data)}
    mask_or_error(ConfigRecord({k: v for k, v in fields.items() if k != "bits" or encoding != "full"}))  # type: ignore[arg-type]


def only_value_errors(work: Callable[[], object]) -> None:
    try:
        work()
    except ValueError:
        return


@quick(BYTES)
@given(
    data=st.binary(max_size=200), kind=st.sampled_from(forge.CODED), kept=st.integers(0, 300), more=st.integers(0, 9)
)
def test_any_bytes_are_values_or_an_error(little_memory: None, data: bytes, kind: str, kept: int, more: int):
    size = coded_size(kind, kept, kept + more)
    padded = np.frombuffer((data * (size // max(len(data), 1) + 1))[:size].ljust(size, b"\0"), np.uint8)
    only_value_errors(lambda: Coded(padded, kind, kept, kept + more).read(0, kept + more))
    for name in forge.MASK.layout.by_dtype:
        record = ArrayRecord({**pack_values(forge.MASK, forge.PACKED), name: Array("", (), "", data)})
        only_value_errors(lambda record=record: unpack_values(forge.MASK, record))


@quick(BYTES)
@given(data=st.binary(max_size=60), packed=st.booleans(), head=st.sampled_from([b"", bytes(16)]))
def test_any_bytes_are_moves_or_a_mask_or_an_error(little_memory: None, data: bytes, packed: bool, head: bytes):
    data = head + (zlib.compress(data) if packed else data)
    only_value_errors(lambda: decode_deltas([spec for spec in forge.LAYOUT.specs if spec.floating], data))
    for encoding in (*mask_change.CHANGES, "pickle"):
        only_value_errors(
            lambda encoding=encoding: Mask(forge.LAYOUT, mask_change.decode_change(forge.MASK, encoding, data))
        )
    for encoding in (*mask_bits.ENCODINGS, "pickle"):
        only_value_errors(lambda encoding=encoding: Mask(forge.LAYOUT, mask_bits.decode(forge.LAYOUT, encoding, data)))
