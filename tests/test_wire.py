import io
import json
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import given, settings
from hypothesis import strategies as st

from autoflip_flwr import wire
from autoflip_flwr.layout import ArraySpec, Layout
from autoflip_flwr.mask import Mask
from autoflip_flwr.wire import WireError

DTYPES = ("float16", "float32", "float64", "int8", "uint64", "bool")
SHAPES = ((), (0,), (1,), (5,), (2, 3), (3, 0), (2, 1, 3))
Arrays = dict[str, np.ndarray]

quick = settings(deadline=None, max_examples=60)


@st.composite
def messages(draw: st.DrawFn) -> tuple[Mask, Arrays]:
    """A mask and a packed model."""
    rows = draw(st.lists(st.tuples(st.sampled_from(SHAPES), st.sampled_from(DTYPES), st.booleans()), max_size=6))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    density = draw(st.sampled_from([0.0, 0.3, 1.0]))
    model = {f"a{i}": np.asarray(rng.normal(size=shape) > 0).astype(dtype) for i, (shape, dtype, _) in enumerate(rows)}
    layout = Layout.of(model, prunable=lambda name, _: rows[int(name[1:])][2], output=None)
    mask = Mask.from_bool(layout, {s.name: np.asarray(rng.random(s.shape) < density) for s in layout.prunable}, 3)
    return mask, mask.gather(model)


LAYOUT = Layout.of(
    {"w": np.zeros((2, 2), np.float32), "n": np.zeros(2, np.int64), "b": np.zeros(2, np.float32)}, output=None
)
MASK = Mask.from_bool(LAYOUT, {"w": np.array([[True, False], [True, True]])}, version=5)
PACKED = {"w": np.array([1, 2, 3], np.float32), "n": np.array([7, 8]), "b": np.array([4, 5], np.float32)}


def same(one: Arrays, two: Arrays) -> None:
    assert list(one) == list(two)
    for name, array in one.items():
        np.testing.assert_array_equal(array, two[name], err_msg=name, strict=True)


def sent(content: RecordDict) -> RecordDict:
    """What arrives at the other side."""
    proto = type(recorddict_to_proto(content)).FromString(recorddict_to_proto(content).SerializeToString())
    return recorddict_from_proto(proto)


def image(array: np.ndarray, pickled: bool = False) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=pickled)
    return file.getvalue()


def values(data: bytes) -> ArrayRecord:
    """A message's values whose float32 part is ``data``."""
    return ArrayRecord({"float32": Array("float32", (5,), "numpy.ndarray", data), "int64": Array(np.array([7, 8]))})


def mask_record(**changes: Any) -> ConfigRecord:
    return ConfigRecord({**wire.encode_mask(MASK), **changes})


def layout_record(layout: object) -> ConfigRecord:
    text = layout if isinstance(layout, bytes) else json.dumps(layout).encode()
    return mask_record(layout=zlib.compress(text), encoding="full", bits=b"")


def use(mask: Mask) -> None:
    """All that a client does with a mask."""
    zeros = {s.name: np.zeros(mask.packed_shape(s.name), s.dtype) for s in mask.layout.specs}
    assert len(mask.digest) == 64
    same(mask.gather(mask.scatter(wire.unpack(mask, wire.pack(mask, zeros)))), zeros)


# Values


def test_values_travel_as_one_flat_array_for_each_dtype_in_the_order_of_the_model():
    record = wire.pack(MASK, PACKED)
    assert {name: array.numpy().tolist() for name, array in record.items()} == {
        "float32": [1, 2, 3, 4, 5],
        "int64": [7, 8],
    }


@quick
@given(message=messages())
def test_any_packed_model_arrives_as_it_was_sent(message: tuple[Mask, Arrays]):
    mask, packed = message
    same(wire.unpack(mask, sent(RecordDict({"x": wire.pack(mask, packed)}))["x"]), packed)


def test_unpacked_values_are_read_only_views_of_the_message():
    record = wire.pack(MASK, PACKED)
    unpacked = wire.unpack(MASK, record)
    for name, array in unpacked.items():
        data = record[LAYOUT[name].dtype].data
        assert np.shares_memory(array, np.frombuffer(data, np.uint8))
        assert not array.flags.writeable


def test_values_are_cast_to_the_dtypes_of_the_model_whatever_their_byte_order():
    record = wire.pack(MASK, {name: array.astype(">f8") for name, array in PACKED.items()})
    same(wire.unpack(MASK, record), PACKED)


def test_pack_refuses_an_array_of_another_shape_by_name():
    with pytest.raises(WireError, match="'w'"):
        wire.pack(MASK, {**PACKED, "w": np.zeros(4, np.float32)})


GOOD = np.arange(5, dtype=np.float32)
HEADER = b"{'descr': '<f4', 'fortran_order': False, 'shape': (5,), }"


def forged(header: bytes, payload: bytes = GOOD.tobytes(), version: bytes = b"\x01\x00") -> bytes:
    header = header + b"\n"
    return b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header + payload


def test_the_forged_header_is_read_where_nothing_is_wrong_with_it():
    assert wire.unpack(MASK, values(forged(HEADER)))["b"].tolist() == [3, 4]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\x93NUMPY\x01\x00", id="magic alone"),
        pytest.param(b"\x93NUMPY\x01\x00\xff\xff", id="header longer than the message"),
        pytest.param(image(GOOD)[:-1], id="a byte short"),
        pytest.param(image(GOOD) + b"\0", id="a byte too long"),
        pytest.param(image(GOOD[:4]), id="an entry short"),
        pytest.param(image(np.arange(6, dtype=np.float32)), id="an entry too long"),
        pytest.param(image(GOOD.astype(np.float64)), id="wrong dtype"),
        pytest.param(image(GOOD.view(np.int32)), id="wrong dtype of the same size"),
        pytest.param(image(GOOD.astype(">f4")), id="big-endian"),
        pytest.param(image(GOOD.reshape(1, 5)), id="2-D"),
        pytest.param(image(np.float32(1)), id="0-d"),
        pytest.param(image(np.asfortranarray(np.zeros((5, 2), np.float32))), id="fortran order"),
        pytest.param(forged(HEADER.replace(b"False", b"True")), id="fortran order, 1-D"),
        pytest.param(image(np.array([{}] * 5), pickled=True), id="pickled objects"),
        pytest.param(image(np.zeros(5, [("x", "<f4")])), id="structured dtype"),
        pytest.param(image(np.array(["abcd"] * 5)), id="strings"),
        pytest.param(b"not an array", id="not an array"),
        pytest.param(forged(HEADER, version=b"\x02\x00"), id="other npy version"),
        pytest.param(forged(HEADER.replace(b"5", b"9223372036854775808")), id="shape beyond 64 bits"),
        pytest.param(forged(HEADER.replace(b"5", b"-5")), id="negative shape"),
        pytest.param(forged(HEADER.replace(b"5", b"9" * 5000)), id="shape of 5000 digits"),
        pytest.param(forged(HEADER.replace(b"5", b"5,5")), id="two dimensions"),
        pytest.param(forged(HEADER.replace(b"5", b"__import__('os').abort()")), id="code in the header"),
        pytest.param(forged(HEADER[:-1]), id="header cut off"),
        pytest.param(forged(b"\xff" * 40), id="header not text"),
    ],
)
def test_values_that_are_not_what_is_expected_give_a_wire_error(data: bytes):
    with pytest.raises(WireError, match="float32 values are"):
        wire.unpack(MASK, values(data))


def test_a_bool_that_is_neither_0_nor_1_gives_a_wire_error():
    mask = Mask.full(Layout.of({"flag": np.zeros(2, bool)}))
    record = ArrayRecord({"bool": Array("bool", (2,), "numpy.ndarray", image(np.array([True, False]))[:-1] + b"\x07")})
    with pytest.raises(WireError, match="bool"):
        wire.unpack(mask, record)


@pytest.mark.parametrize(
    "record",
    [
        ArrayRecord(),
        ArrayRecord({"float32": Array(GOOD)}),
        ArrayRecord({"float32": Array(GOOD), "int64": Array(np.array([7, 8])), "float64": Array(np.zeros(1))}),
        ArrayRecord({"w": Array(GOOD), "n": Array(np.array([7, 8]))}),
        ConfigRecord(),
        None,
    ],
    ids=["empty", "missing dtype", "extra dtype", "dense names", "other record", "no record"],
)
def test_a_record_without_exactly_the_dtypes_of_the_model_gives_a_wire_error(record: object):
    with pytest.raises(WireError, match="packed values"):
        wire.unpack(MASK, record)


@st.composite
def mutations(draw: st.DrawFn, data: bytes) -> bytes:
    """``data`` with bits flipped, bytes replaced, cut or repeated."""
    damaged = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(damaged) - 1, 0)))
        match draw(st.sampled_from(["flip", "replace", "cut", "repeat"])):
            case "flip" if damaged:
                damaged[at] ^= 1 << draw(st.integers(0, 7))
            case "replace" if damaged:
                damaged[at] = draw(st.sampled_from(b"\0\xff01289[]{}(),:-\"' "))
            case "cut":
                del damaged[at : at + draw(st.integers(1, 200))]
            case _:
                damaged[at:at] = damaged[at : at + 1]
    return bytes(damaged)


@settings(deadline=None, max_examples=300)
@given(data=mutations(image(GOOD)))
def test_damaged_values_give_a_wire_error_or_values_of_the_right_shape_and_dtype(data: bytes):
    try:
        unpacked = wire.unpack(MASK, values(data))
    except WireError:
        return
    assert {name: (array.shape, array.dtype) for name, array in unpacked.items()} == {
        name: (array.shape, array.dtype) for name, array in PACKED.items()
    }


# Masks


@quick
@given(message=messages())
def test_any_mask_arrives_as_it_was_sent(message: tuple[Mask, Arrays]):
    mask, _ = message
    arrived = wire.decode_mask(sent(RecordDict({"m": wire.encode_mask(mask)}))["m"])
    assert arrived == mask
    assert (arrived.digest, arrived.version) == (mask.digest, 3)


@pytest.mark.parametrize(
    ("encoding", "size"), [("full", 0), ("raw", 8), ("zlib", 20)], ids=["all kept", "no pattern", "a pattern"]
)
def test_the_shortest_encoding_is_used(encoding: str, size: int):
    layout = Layout.of({"w": np.zeros((64, 1 if encoding == "raw" else 64), np.float32)})
    keep = {
        "full": np.ones(layout["w"].shape, bool),
        "raw": np.random.default_rng(1).random(layout["w"].shape) < 0.5,
        "zlib": np.zeros(layout["w"].shape, bool),
    }[encoding]
    mask = Mask.from_bool(layout, {"w": keep})
    record = wire.encode_mask(mask)
    assert record["encoding"] == encoding
    assert len(record.get("bits", b"")) <= size
    assert wire.decode_mask(record).bits == mask.bits


def test_names_may_be_any_text():
    mask = Mask.full(Layout.of({"конв/0\n\"'": np.zeros((2, 2)), "": np.zeros(1)}, output=None))
    assert wire.decode_mask(wire.encode_mask(mask)) == mask


PACKED_LAYOUT = wire.encode_mask(MASK)["layout"]


@pytest.mark.parametrize(
    "record",
    [
        pytest.param(None, id="no record"),
        pytest.param(MetricRecord({"layout": 1}), id="other record"),
        pytest.param(ConfigRecord(), id="empty"),
        pytest.param(mask_record(layout="text"), id="layout not bytes"),
        pytest.param(mask_record(bits=[1, 2]), id="bits not bytes"),
        pytest.param(mask_record(encoding=b"raw"), id="encoding not text"),
        pytest.param(mask_record(version=True), id="version not an int"),
        pytest.param(mask_record(version=1.0), id="version a float"),
        pytest.param(mask_record(encoding="lzma"), id="unknown encoding"),
        pytest.param(mask_record(encoding="raw", bits=b""), id="no bits"),
        pytest.param(mask_record(encoding="raw", bits=b"\xb0\0"), id="a byte too many"),
        pytest.param(mask_record(encoding="raw", bits=b"\xb8"), id="unused bits set"),
        pytest.param(mask_record(encoding="zlib", bits=b"\xb0"), id="not compressed"),
        pytest.param(mask_record(encoding="zlib", bits=b""), id="nothing compressed"),
        pytest.param(mask_record(encoding="zlib", bits=zlib.compress(b"")), id="compressed nothing"),
        pytest.param(mask_record(encoding="zlib", bits=zlib.compress(b"\xb0\0")), id="compressed too many"),
        pytest.param(mask_record(encoding="zlib", bits=zlib.compress(b"\xb0")[:-1]), id="compressed, cut off"),
        pytest.param(mask_record(encoding="zlib", bits=zlib.compress(b"\xb0") + b"x"), id="compressed, longer"),
        pytest.param(mask_record(encoding="full", bits=b"\xb0"), id="full, but with bits"),
        pytest.param(mask_record(layout=b""), id="no layout"),
        pytest.param(mask_record(layout=PACKED_LAYOUT[:-1]), id="layout cut off"),
        pytest.param(mask_record(layout=PACKED_LAYOUT + b"x"), id="layout longer"),
        pytest.param(mask_record(layout=b"[]"), id="layout not compressed"),
    ],
)
def test_a_malformed_mask_record_gives_a_wire_error(record: object):
    with pytest.raises(WireError):
        wire.decode_mask(record)


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
        wire.decode_mask(layout_record(layout))


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
        mask = wire.decode_mask(layout_record(layout))
    except WireError:
        return
    use(mask)


JSON = zlib.decompress(PACKED_LAYOUT)


@settings(deadline=None, max_examples=200)
@given(text=mutations(JSON))
def test_a_damaged_layout_gives_a_wire_error_or_a_usable_mask(text: bytes):
    try:
        mask = wire.decode_mask(layout_record(text))
    except WireError:
        return
    use(mask)


@settings(deadline=None, max_examples=200)
@given(data=st.data(), encoding=st.sampled_from(["raw", "zlib"]))
def test_a_damaged_mask_record_gives_a_wire_error_or_a_usable_mask(data: st.DataObject, encoding: str):
    bits = MASK.bits if encoding == "raw" else zlib.compress(MASK.bits)
    damaged = data.draw(st.sampled_from(["layout", "bits"]))
    fields = {"layout": PACKED_LAYOUT, "bits": bits}
    fields[damaged] = data.draw(mutations(fields[damaged]))
    try:
        mask = wire.decode_mask(mask_record(**fields, encoding=encoding))
    except WireError:
        return
    use(mask)


@pytest.mark.parametrize("field", ["bits", "layout"])
def test_a_zlib_bomb_is_not_inflated(field: str):
    bomb = zlib.compress(bytes(4 * wire.MAX_LAYOUT_BYTES), 9)
    record = mask_record(**{field: bomb}, encoding="zlib")
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match="do not hold what is expected"):
            wire.decode_mask(record)
        assert tracemalloc.get_traced_memory()[1] < (2**18 if field == "bits" else 2.5 * wire.MAX_LAYOUT_BYTES)
    finally:
        tracemalloc.stop()


def test_a_layout_at_the_limit_of_entries_is_read_without_allocating_them():
    layout = Layout((ArraySpec("w", (wire.MAX_ENTRIES,), "float32", False),))
    assert wire.decode_mask(wire.encode_mask(Mask(layout, b""))).layout == layout


# Headers


def test_a_header_arrives_as_it_was_sent():
    content = sent(RecordDict({wire.HEADER: wire.header(wire.TRAIN, 4, MASK, status="ok")}))
    assert dict(wire.read_header(content) or {}) == {
        "format": 1,
        "phase": "train",
        "round": 4,
        "digest": MASK.digest,
        "version": 5,
        "status": "ok",
    }


def test_a_header_without_a_mask_has_no_digest():
    assert set(wire.header(wire.HELLO, 0)) == {"format", "phase", "round"}


def test_a_message_without_a_header_is_not_one_of_ours():
    assert wire.read_header(RecordDict({"config": ConfigRecord({"format": 1})})) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "wire format 2, this side speaks 1: install the same"),
        ({"format": "1"}, "wire format '1'"),
        ({"format": [1]}, "wire format"),
        ({"phase": "fit"}, "phase 'fit'"),
        ({"phase": ["train"]}, "phase"),
        ({"round": "1"}, "round"),
        ({"round": 1.0}, "round"),
        ({"round": True}, "round"),
    ],
)
def test_a_header_that_is_wrong_gives_a_wire_error(change: dict[str, Any], message: str):
    record = ConfigRecord({**wire.header(wire.TRAIN, 1), **change})
    with pytest.raises(WireError, match=message):
        wire.read_header(RecordDict({wire.HEADER: record}))


@pytest.mark.parametrize("key", ["format", "phase", "round"])
def test_a_header_that_lacks_a_key_gives_a_wire_error(key: str):
    record = ConfigRecord({k: v for k, v in wire.header(wire.TRAIN, 1).items() if k != key})
    with pytest.raises(WireError, match=key):
        wire.read_header(RecordDict({wire.HEADER: record}))


def test_a_header_of_another_kind_gives_a_wire_error():
    with pytest.raises(WireError, match="must be a ConfigRecord"):
        wire.read_header(RecordDict({wire.HEADER: MetricRecord({"format": 1})}))
