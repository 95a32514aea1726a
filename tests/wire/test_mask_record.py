import json
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from apps import same_bytes
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from test_messages import LAYOUT, MASK, Arrays, messages, mutations, quick, sent

from autoflip_flwr.core.layout import ArraySpec, Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.wire import mask_record
from autoflip_flwr.wire.mask_change import encode_change
from autoflip_flwr.wire.messages import pack_values, unpack_values
from autoflip_flwr.wire.records import WireError

ENCODED = {"bitmap": zlib.compress(b"\xb0"), "gaps": zlib.compress(b"\0\1\0"), "units": zlib.compress(b"\xc0\xc0")}
"""Bits of masks of ``LAYOUT``: the first two of ``MASK``, the last of a full one."""


def record_with(**changes: Any) -> ConfigRecord:
    return ConfigRecord({**mask_record.encode_mask(MASK), **changes})


def layout_record(layout: object) -> ConfigRecord:
    text = layout if isinstance(layout, bytes) else json.dumps(layout).encode()
    return record_with(layout=zlib.compress(text), encoding="full", bits=b"")


def use(mask: Mask) -> None:
    """All that a client does with a mask."""
    zeros = {s.name: np.zeros(mask.packed_shape(s.name), s.dtype) for s in mask.layout.specs}
    assert len(mask.digest) == 64
    same_bytes(mask.gather(mask.scatter(unpack_values(mask, pack_values(mask, zeros)))), zeros)


# A mask that stands alone


@quick
@given(message=messages())
def test_any_mask_arrives_as_it_was_sent(message: tuple[Mask, Arrays]):
    mask, _ = message
    arrived = mask_record.decode_mask(sent(RecordDict({"m": mask_record.encode_mask(mask)}))["m"])
    assert arrived == mask
    assert (arrived.digest, arrived.version) == (mask.digest, 3)


SHAPE = (64, 64)
SHAPES = {
    "full": np.ones(SHAPE, bool),
    "bitmap": np.random.default_rng(1).random(SHAPE) < 0.5,
    "gaps": np.random.default_rng(1).random(SHAPE) < 0.05,
    "units": np.random.default_rng(1).random((64, 1)) < np.full(SHAPE, 0.5),
}


@pytest.mark.parametrize(
    ("encoding", "size"), [("full", 0), ("bitmap", 540), ("gaps", 190), ("units", 30)], ids=list(SHAPES)
)
def test_the_encoding_is_the_one_that_suits_the_mask(encoding: str, size: int):
    layout = Layout.of({"w": np.zeros(SHAPE, np.float32)})
    mask = Mask.from_bool(layout, {"w": SHAPES[encoding]}, version=2)
    record = mask_record.encode_mask(mask)
    assert record["encoding"] == encoding
    assert len(record.get("bits", b"")) <= size
    assert set(record) == {"layout", "encoding", "version"} | ({"bits"} if size else set())
    assert mask_record.decode_mask(record).bits == mask.bits


@pytest.mark.parametrize("encoding", ENCODED)
def test_bits_may_be_written_in_any_encoding(encoding: str):
    expected = Mask.full(LAYOUT) if encoding == "units" else MASK
    found = mask_record.decode_mask(record_with(encoding=encoding, bits=ENCODED[encoding]))
    assert (found.bits, found.version) == (expected.bits, 5)


def test_a_mask_that_stands_alone_has_no_base():
    assert mask_record.base_of(mask_record.encode_mask(MASK)) == ""
    for nothing in (None, ConfigRecord(), MetricRecord({"base": 1}), "base"):
        assert mask_record.base_of(nothing) == ""


def test_masks_are_decoded_once_and_kept_apart_by_content():
    assert mask_record.decode_mask(record_with()) is mask_record.decode_mask(record_with())
    assert mask_record.decode_mask(record_with(version=6)).version == 6
    assert mask_record.decode_mask(record_with()).version == 5


def test_names_may_be_any_text():
    mask = Mask.full(Layout.of({"конв/0\n\"'": np.zeros((2, 2)), "": np.zeros(1)}, output=None))
    assert mask_record.decode_mask(mask_record.encode_mask(mask)) == mask


PACKED_LAYOUT = mask_record.encode_mask(MASK)["layout"]


@pytest.mark.parametrize(
    "record",
    [
        pytest.param(None, id="no record"),
        pytest.param(MetricRecord({"layout": 1}), id="other record"),
        pytest.param(ConfigRecord(), id="empty"),
        pytest.param(record_with(layout="text"), id="layout not bytes"),
        pytest.param(record_with(bits=[1, 2]), id="bits not bytes"),
        pytest.param(record_with(encoding=b"bitmap"), id="encoding not text"),
        pytest.param(record_with(encoding=["full"]), id="encoding a list"),
        pytest.param(record_with(version=True), id="version not an int"),
        pytest.param(record_with(version=1.0), id="version a float"),
        pytest.param(record_with(encoding="lzma"), id="unknown encoding"),
        pytest.param(record_with(encoding="raw", bits=b"\xb0"), id="an encoding of format 1"),
        pytest.param(record_with(encoding="zlib", bits=zlib.compress(b"\xb0")), id="the other one of format 1"),
        pytest.param(record_with(encoding="x" * 10**6), id="an encoding of a million letters"),
        pytest.param(record_with(bits=b""), id="no bits"),
        pytest.param(record_with(encoding="bitmap", bits=b"\xb0"), id="bits, not compressed"),
        pytest.param(record_with(encoding="bitmap", bits=zlib.compress(b"")), id="no bits, compressed"),
        pytest.param(record_with(encoding="bitmap", bits=zlib.compress(b"\xb0\0")), id="a byte too many"),
        pytest.param(record_with(encoding="bitmap", bits=zlib.compress(b"\xb8")), id="unused bits set"),
        pytest.param(record_with(encoding="gaps", bits=b"\0\1\0"), id="gaps, not compressed"),
        pytest.param(record_with(encoding="gaps", bits=zlib.compress(b"\0\1\1")), id="gaps beyond the end"),
        pytest.param(record_with(encoding="gaps", bits=zlib.compress(bytes(5))), id="more gaps than entries"),
        pytest.param(record_with(encoding="units", bits=zlib.compress(b"\xc0")), id="units of axis 0 alone"),
        pytest.param(record_with(encoding="units", bits=zlib.compress(b"\xc0\xc0\0")), id="units of a third axis"),
        pytest.param(record_with(encoding="units", bits=zlib.compress(b"\xe0\xc0")), id="unused bits of units set"),
        *(pytest.param(record_with(encoding=code, bits=b""), id=f"no {code}") for code in ENCODED),
        *(
            pytest.param(record_with(encoding=code, bits=data[:-1]), id=f"{code}, cut off")
            for code, data in ENCODED.items()
        ),
        *(
            pytest.param(record_with(encoding=code, bits=data + b"x"), id=f"{code}, longer")
            for code, data in ENCODED.items()
        ),
        pytest.param(record_with(encoding="full", bits=b"\xb0"), id="full, but with bits"),
        pytest.param(record_with(layout=b""), id="no layout"),
        pytest.param(record_with(layout=PACKED_LAYOUT[:-1]), id="layout cut off"),
        pytest.param(record_with(layout=PACKED_LAYOUT + b"x"), id="layout longer"),
        pytest.param(record_with(layout=b"[]"), id="layout not compressed"),
    ],
)
def test_a_malformed_mask_record_gives_a_wire_error(record: object):
    with pytest.raises(WireError):
        mask_record.decode_mask(record)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"{", id="broken JSON"),
        pytest.param(b"\xff\xfe\xff", id="not UTF-8"),
        pytest.param(b"[" * 100_000, id="deep nesting, open"),
        pytest.param(b"[" * 990 + b"]" * 990, id="nesting near the limit"),
        pytest.param(b'[["w",' + b"[" * 980 + b"]" * 980 + b',"float32",1]]', id="deep shape"),
        pytest.param(None, id="null"),
        pytest.param(7, id="a number"),
        pytest.param("text", id="text"),
        pytest.param({"abcd": 1}, id="an object"),
        pytest.param([7], id="row not a list"),
        pytest.param([["w", [2], "float32"]], id="row too short"),
        pytest.param([["w", [2], "float32", 1, 1]], id="row too long"),
        pytest.param([[7, [2], "float32", 1]], id="name not text"),
        pytest.param([[["w"], [2], "float32", 1]], id="name a list"),
        pytest.param([["w", 2, "float32", 1]], id="shape a number"),
        pytest.param([["w", None, "float32", 1]], id="shape null"),
        pytest.param([["w", "22", "float32", 1]], id="shape text"),
        pytest.param([["w", [2.0], "float32", 1]], id="size a float"),
        pytest.param([["w", [True], "float32", 1]], id="size a bool"),
        pytest.param(b'[["w",[NaN],"float32",1]]', id="size NaN"),
        pytest.param(b'[["w",[1e999],"float32",1]]', id="size infinite"),
        pytest.param([["w", [-1], "float32", 1]], id="negative size"),
        pytest.param([["w", [-2, -2], "float32", 1]], id="negative sizes, positive product"),
        pytest.param([["w", [2], "float128", 1]], id="unknown dtype"),
        pytest.param([["w", [2], "object", 0]], id="object dtype"),
        pytest.param([["w", [2], ">f4", 1]], id="dtype code"),
        pytest.param([["w", [2], {"a": 1}, 1]], id="dtype an object"),
        pytest.param([["w", [2], "int64", 1]], id="prunable integers"),
        pytest.param([["w", [2], "float32", 1]] * 2, id="twice the same name"),
        pytest.param([["w", [2**33, 2], "float32", 1]], id="too many entries"),
        pytest.param([["w", [2**32], "int8", 0], ["x", [2**32 + 1], "int8", 0]], id="too many entries together"),
        pytest.param([["w", [10**4000] * 2, "float32", 0]], id="sizes of 4000 digits"),
        pytest.param(b'[["w",[' + b"9" * 5000 + b'],"float32",0]]', id="a size of 5000 digits"),
        pytest.param([["w", [0, 2**70], "float32", 0]], id="empty, but with a size beyond 64 bits"),
        pytest.param([["w", [0, 2**33, 2**33], "float32", 0]], id="empty, but with sizes NumPy refuses"),
        pytest.param([["w", [1] * 65, "float32", 0]], id="more dimensions than NumPy has"),
        pytest.param([["w", [9] * 50_000, "float32", 0]], id="50000 dimensions"),
    ],
)
def test_a_layout_that_is_not_what_is_expected_gives_a_wire_error(layout: object):
    with pytest.raises(WireError):
        mask_record.decode_mask(layout_record(layout))


json_values = st.recursive(
    st.sampled_from([None, True, False, 0, 1, 3, -1, 2**40, 10**30, 0.5, "", "w", "float32", "int64", "bool"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["a", "abcd"]), inner, max_size=2),
    max_leaves=8,
)
rows = st.tuples(
    st.sampled_from(["a", "b", "c"]) | json_values,
    st.lists(st.sampled_from([0, 1, 3]), max_size=3) | json_values,
    st.sampled_from(["float16", "float32", "int64", "bool"]) | json_values,
    st.sampled_from([0, 1]) | json_values,
)


@settings(deadline=None, max_examples=200)
@given(layout=json_values | st.lists(rows, max_size=3))
def test_any_json_as_layout_gives_a_wire_error_or_a_usable_mask(layout: object):
    try:
        mask = mask_record.decode_mask(layout_record(layout))
    except WireError:
        return
    use(mask)


JSON = zlib.decompress(PACKED_LAYOUT)


@settings(deadline=None, max_examples=200)
@given(text=mutations(JSON))
def test_a_damaged_layout_gives_a_wire_error_or_a_usable_mask(text: bytes):
    try:
        mask = mask_record.decode_mask(layout_record(text))
    except WireError:
        return
    use(mask)


@settings(deadline=None, max_examples=200)
@given(data=st.data(), encoding=st.sampled_from([*ENCODED, "full"]))
def test_a_damaged_mask_record_gives_a_wire_error_or_a_usable_mask(data: st.DataObject, encoding: str):
    damaged = data.draw(st.sampled_from(["layout", "bits"]))
    fields = {"layout": PACKED_LAYOUT, "bits": ENCODED.get(encoding, b"")}
    fields[damaged] = data.draw(mutations(fields[damaged]))
    try:
        mask = mask_record.decode_mask(record_with(**fields, encoding=encoding))
    except WireError:
        return
    use(mask)


@settings(deadline=None, max_examples=200)
@given(encoding=st.sampled_from([*ENCODED, "full"]), content=st.binary(max_size=8), packed=st.booleans())
def test_any_bits_give_a_wire_error_or_a_usable_mask(encoding: str, content: bytes, packed: bool):
    try:
        mask = mask_record.decode_mask(
            record_with(encoding=encoding, bits=zlib.compress(content) if packed else content)
        )
    except WireError:
        return
    use(mask)


@pytest.mark.parametrize(("field", "encoding"), [("layout", "bitmap"), *(("bits", code) for code in ENCODED)])
def test_a_zlib_bomb_is_not_inflated(field: str, encoding: str):
    bomb = zlib.compress(bytes(4 * mask_record.MAX_LAYOUT_BYTES), 9)
    record = record_with(**{field: bomb}, encoding=encoding)
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match="do not hold what is expected"):
            mask_record.decode_mask(record)
        assert tracemalloc.get_traced_memory()[1] < (2**18 if field == "bits" else 2.5 * mask_record.MAX_LAYOUT_BYTES)
    finally:
        tracemalloc.stop()


def test_a_layout_at_the_limit_of_entries_is_read_without_allocating_them():
    layout = Layout((ArraySpec("w", (mask_record.MAX_ENTRIES,), "float32", False),))
    assert mask_record.decode_mask(mask_record.encode_mask(Mask(layout, b""))).layout == layout


# The difference from a mask that the node has

RANDOM = np.random.default_rng(3)
LARGE = Layout.of({"w": np.zeros((60, 50), np.float32), "b": np.zeros(60, np.float32)}, output=None)
KEEP = RANDOM.random((60, 50)) < 0.3
BASE = Mask.from_bool(LARGE, {"w": KEEP}, version=1)
NEXT = Mask.from_bool(LARGE, {"w": KEEP ^ (RANDOM.random((60, 50)) < 0.01)}, version=2)


def difference(**changes: Any) -> ConfigRecord:
    return ConfigRecord({**mask_record.encode_mask(NEXT, BASE), **changes})


def test_a_difference_holds_no_layout_and_names_its_base():
    record = difference()
    assert set(record) == {"encoding", "base", "bits", "version"}
    assert (record["encoding"], record["version"]) == ("difference", 2)
    assert mask_record.base_of(record) == record["base"] == BASE.digest
    assert record.count_bytes() < mask_record.encode_mask(NEXT).count_bytes() / 2


def test_a_difference_arrives_where_its_base_is():
    arrived = sent(RecordDict({"m": difference()}))["m"]
    found = mask_record.decode_mask(arrived, BASE)
    assert found == NEXT
    assert (found.digest, found.version) == (NEXT.digest, 2)
    assert found.layout is BASE.layout
    assert mask_record.decode_mask(arrived, Mask(LARGE, BASE.bits, version=77)) == NEXT  # whatever the base's version


@quick
@given(message=messages(), seed=st.integers(0, 99), density=st.sampled_from([0.0, 0.02, 0.5, 1.0]))
def test_any_difference_arrives(message: tuple[Mask, Arrays], seed: int, density: float):
    base, _ = message
    random = np.random.default_rng(seed)
    keep = {s.name: np.asarray(random.random(s.shape) < density) for s in base.layout.prunable}
    mask = Mask.from_bool(base.layout, keep, version=4)
    record = sent(RecordDict({"m": mask_record.encode_mask(mask, base)}))["m"]
    assert mask_record.decode_mask(record, base) == mask


def test_a_difference_without_its_base_gives_a_wire_error():
    for base in (None, NEXT, MASK, Mask.full(LARGE)):
        with pytest.raises(WireError, match="the change from one that is not here"):
            mask_record.decode_mask(difference(), base)


def test_a_difference_of_masks_of_other_layouts_cannot_be_made():
    with pytest.raises(ValueError, match="same layout"):
        mask_record.encode_mask(MASK, BASE)


def test_a_mask_that_stands_alone_is_read_whatever_the_node_has():
    for base in (BASE, NEXT, MASK):
        assert mask_record.decode_mask(mask_record.encode_mask(NEXT), base) == NEXT


def test_a_layout_in_a_difference_is_not_read():
    bomb = zlib.compress(bytes(4 * mask_record.MAX_LAYOUT_BYTES), 9)
    for layout in (b"", b"x", bomb, PACKED_LAYOUT, "text"):
        assert mask_record.decode_mask(difference(layout=layout), BASE) == NEXT


SIZE = LARGE.prunable_size
_, GAPS = encode_change(NEXT, BASE)


@pytest.mark.parametrize(
    "record",
    [
        pytest.param(difference(bits="text"), id="bits not bytes"),
        pytest.param(difference(bits=[1]), id="bits a list"),
        pytest.param(difference(bits=b""), id="no bits"),
        pytest.param(ConfigRecord({k: v for k, v in difference().items() if k != "bits"}), id="bits missing"),
        pytest.param(difference(bits=GAPS[:-1]), id="cut off"),
        pytest.param(difference(bits=GAPS + b"x"), id="longer"),
        pytest.param(difference(bits=zlib.decompress(GAPS)), id="not compressed"),
        pytest.param(difference(bits=zlib.compress(bytes(SIZE + 1))), id="more gaps than entries"),
        pytest.param(difference(bits=zlib.compress(b"\xff" * SIZE)), id="gaps beyond the end"),
        pytest.param(difference(bits=zlib.compress(bytes([0] * (SIZE - 1) + [1]))), id="one entry beyond the end"),
        pytest.param(difference(version=True), id="version not an int"),
        pytest.param(difference(version="2"), id="version text"),
        pytest.param(ConfigRecord({k: v for k, v in difference().items() if k != "version"}), id="version missing"),
        pytest.param(difference(base=""), id="no base"),
        pytest.param(difference(base=BASE.digest[:-1]), id="base cut off"),
        pytest.param(difference(base=BASE.digest.encode()), id="base not text"),
        pytest.param(difference(base=[BASE.digest]), id="base a list"),
        pytest.param(difference(base=0), id="base a number"),
        pytest.param(ConfigRecord({k: v for k, v in difference().items() if k != "base"}), id="base missing"),
        pytest.param(difference(encoding="gaps"), id="a difference said to stand alone"),
        pytest.param(difference(encoding="full"), id="a difference said to be full"),
        pytest.param(difference(encoding=b"difference"), id="encoding not text"),
        pytest.param(MetricRecord({"base": 1}), id="other record"),
    ],
)
def test_a_malformed_difference_gives_a_wire_error(record: object):
    with pytest.raises(WireError):
        mask_record.decode_mask(record, BASE)


def test_the_last_entry_can_differ():
    stream = zlib.compress(b"\xff" * (SIZE // 255) + bytes([SIZE % 255 - 1]))
    found = mask_record.decode_mask(difference(bits=stream), BASE)
    assert np.flatnonzero(found.keep["w"].ravel() != KEEP.ravel()).tolist() == [SIZE - 1]


@settings(deadline=None, max_examples=200)
@given(data=mutations(GAPS) | mutations(zlib.decompress(GAPS)).map(zlib.compress) | st.binary(max_size=40))
def test_hostile_bits_of_a_difference_give_a_wire_error_or_a_usable_mask(data: bytes):
    try:
        mask = mask_record.decode_mask(difference(bits=data), BASE)
    except WireError:
        return
    use(mask)


def test_a_zlib_bomb_in_a_difference_is_not_inflated():
    record = difference(bits=zlib.compress(bytes(2**26), 9))
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match="do not hold what is expected"):
            mask_record.decode_mask(record, BASE)
        assert tracemalloc.get_traced_memory()[1] < 2**18
    finally:
        tracemalloc.stop()


def test_the_longest_difference_that_can_be_true_takes_a_few_bytes_for_each_entry():
    layout = Layout.of({"w": np.zeros((2**12, 2**11), np.float32)})
    base = Mask.full(layout)
    record = ConfigRecord(
        {"encoding": "difference", "base": base.digest, "bits": zlib.compress(bytes(2**23)), "version": 1}
    )
    tracemalloc.start()
    try:
        assert mask_record.decode_mask(record, base).bits == bytes(2**20)
        assert tracemalloc.get_traced_memory()[1] < 6 * 2**23
    finally:
        tracemalloc.stop()
