import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from apps import same_bytes
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import given, settings
from hypothesis import strategies as st

from autoflip_flwr.core.choices import CODED, VALUES
from autoflip_flwr.core.layout import Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.wire.keys import HEADER, HELLO, TRAIN
from autoflip_flwr.wire.messages import (
    flatten,
    kept_and_size,
    make_header,
    pack_deltas,
    pack_values,
    read_header,
    read_vectors,
    split_vectors,
    unpack_deltas,
    unpack_values,
    value_entries,
)
from autoflip_flwr.wire.records import WireError, fingerprint, make_array

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


# Values


def test_values_travel_as_one_flat_array_for_each_dtype():
    record = pack_values(MASK, PACKED)
    assert {name: array.numpy().tolist() for name, array in record.items()} == {
        "float32": [1, 2, 3, 4, 5],
        "int64": [7, 8],
    }


# non-prunable arrays before, between and behind prunable ones
MIXED = Layout.of(
    {
        "first": np.zeros(2, np.float32),
        "w": np.zeros((2, 2), np.float32),
        "half": np.zeros(1, np.float16),
        "scale": np.zeros((), np.float32),
        "n": np.zeros(1, np.int64),
        "u": np.zeros((1, 3), np.float32),
        "v": np.zeros((1, 2), np.float16),
        "last": np.zeros(1, np.float32),
    },
    output=None,
)
MIXED_MASK = Mask.from_bool(
    MIXED,
    {
        "w": np.array([[False, True], [True, False]]),
        "u": np.array([[True, False, False]]),
        "v": np.array([[False, True]]),
    },
)
MIXED_PACKED = {
    "first": np.array([1, 2], np.float32),
    "w": np.array([10, 20], np.float32),
    "half": np.array([5], np.float16),
    "scale": np.array(3, np.float32),
    "n": np.array([9]),
    "u": np.array([30], np.float32),
    "v": np.array([50], np.float16),
    "last": np.array([4], np.float32),
}


def test_kept_values_of_pruned_arrays_come_first_then_the_other_arrays_each_in_the_order_of_the_model():
    assert {dtype: [spec.name for spec in specs] for dtype, specs in MIXED_MASK.layout.by_dtype.items()} == {
        "float32": ["w", "u", "first", "scale", "last"],
        "float16": ["v", "half"],
        "int64": ["n"],
    }
    record = pack_values(MIXED_MASK, MIXED_PACKED)
    assert {name: array.numpy().tolist() for name, array in record.items()} == {
        "float32": [10, 20, 30, 1, 2, 3, 4],
        "float16": [50, 5],
        "int64": [9],
    }
    same_bytes(unpack_values(MIXED_MASK, record), MIXED_PACKED)
    counted = {dtype: kept_and_size(MIXED_MASK, specs) for dtype, specs in MIXED_MASK.layout.by_dtype.items()}
    assert counted == {"float32": (3, 7), "float16": (1, 2), "int64": (0, 1)}


def test_flat_vectors_are_split_into_views_in_the_order_of_the_model():
    flat = flatten(MIXED_MASK, MIXED_PACKED)
    assert flat["float32"].tolist() == [10, 20, 30, 1, 2, 3, 4]
    parts = split_vectors(MIXED_MASK, flat)
    same_bytes(parts, MIXED_PACKED)
    assert all(np.shares_memory(array, flat[MIXED[name].dtype]) for name, array in parts.items())


@quick
@given(message=messages())
def test_any_flat_vectors_are_those_of_the_record(message: tuple[Mask, Arrays]):
    mask, packed = message
    flat = flatten(mask, packed)
    same_bytes(flat, {dtype: vector.whole() for dtype, vector in read_vectors(mask, pack_values(mask, packed)).items()})
    same_bytes(split_vectors(mask, flat), packed)


@pytest.mark.parametrize("shape", [None, (5,), (5, 1)])
def test_parts_become_the_array_that_flower_makes_of_them_together(shape: tuple[int, ...] | None):
    joined = GOOD if shape is None else GOOD.reshape(shape)
    assert make_array([GOOD[:2], GOOD[2:2], GOOD[2:]], shape) == Array(joined)


@quick
@given(message=messages())
def test_any_packed_model_arrives_as_it_was_sent(message: tuple[Mask, Arrays]):
    mask, packed = message
    same_bytes(unpack_values(mask, sent(RecordDict({"x": pack_values(mask, packed)}))["x"]), packed)


def test_unpacked_values_are_read_only_views_of_the_message():
    record = pack_values(MASK, PACKED)
    unpacked = unpack_values(MASK, record)
    for name, array in unpacked.items():
        data = record[LAYOUT[name].dtype].data
        assert np.shares_memory(array, np.frombuffer(data, np.uint8))
        assert not array.flags.writeable


def test_values_are_cast_to_the_dtypes_of_the_model_whatever_their_byte_order():
    record = pack_values(MASK, {name: array.astype(">f8") for name, array in PACKED.items()})
    same_bytes(unpack_values(MASK, record), PACKED)


def test_pack_refuses_an_array_of_another_shape_by_name():
    with pytest.raises(WireError, match="'w'"):
        pack_values(MASK, {**PACKED, "w": np.zeros(4, np.float32)})


GOOD = np.arange(5, dtype=np.float32)
NPY_HEADER = b"{'descr': '<f4', 'fortran_order': False, 'shape': (5,), }"


def forged(header: bytes, payload: bytes = GOOD.tobytes(), version: bytes = b"\x01\x00") -> bytes:
    header = header + b"\n"
    return b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header + payload


def test_the_forged_header_is_read_where_nothing_is_wrong_with_it():
    assert unpack_values(MASK, values(forged(NPY_HEADER)))["b"].tolist() == [3, 4]


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
        pytest.param(forged(NPY_HEADER.replace(b"False", b"True")), id="fortran order, 1-D"),
        pytest.param(image(np.array([{}] * 5), pickled=True), id="pickled objects"),
        pytest.param(image(np.zeros(5, [("x", "<f4")])), id="structured dtype"),
        pytest.param(image(np.array(["abcd"] * 5)), id="strings"),
        pytest.param(b"not an array", id="not an array"),
        pytest.param(forged(NPY_HEADER, version=b"\x02\x00"), id="other npy version"),
        pytest.param(forged(NPY_HEADER.replace(b"5", b"9223372036854775808")), id="shape beyond 64 bits"),
        pytest.param(forged(NPY_HEADER.replace(b"5", b"-5")), id="negative shape"),
        pytest.param(forged(NPY_HEADER.replace(b"5", b"9" * 5000)), id="shape of 5000 digits"),
        pytest.param(forged(NPY_HEADER.replace(b"5", b"5,5")), id="two dimensions"),
        pytest.param(forged(NPY_HEADER.replace(b"5", b"__import__('os').abort()")), id="code in the header"),
        pytest.param(forged(NPY_HEADER[:-1]), id="header cut off"),
        pytest.param(forged(b"\xff" * 40), id="header not text"),
    ],
)
def test_values_that_are_not_what_is_expected_give_a_wire_error(data: bytes):
    with pytest.raises(WireError, match="float32 values are"):
        unpack_values(MASK, values(data))


def test_a_bool_that_is_neither_0_nor_1_gives_a_wire_error():
    mask = Mask.full(Layout.of({"flag": np.zeros(2, bool)}))
    record = ArrayRecord({"bool": Array("bool", (2,), "numpy.ndarray", image(np.array([True, False]))[:-1] + b"\x07")})
    with pytest.raises(WireError, match="bool"):
        unpack_values(mask, record)


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
        unpack_values(MASK, record)


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
        unpacked = unpack_values(MASK, values(data))
    except WireError:
        return
    assert {name: (array.shape, array.dtype) for name, array in unpacked.items()} == {
        name: (array.shape, array.dtype) for name, array in PACKED.items()
    }


# Coded values


# 3 kept and 2 other values: halves; or one scale, two halves and three codes
CODED_SIZES = {"bfloat16": 10, "float16": 10, "int8": 4 + 4 + 3}


def coded(kind: str, mask: Mask = MASK, packed: Arrays = PACKED) -> ArrayRecord:
    return pack_values(mask, packed, kind)


@pytest.mark.parametrize("kind", CODED)
def test_coded_values_travel_as_bytes_and_integers_as_they_are(kind: str):
    record = coded(kind)
    assert {key: (array.dtype, array.shape) for key, array in record.items()} == {
        "float32": ("uint8", (CODED_SIZES[kind],)),
        "int64": ("int64", (2,)),
    }
    unpacked = unpack_values(MASK, sent(RecordDict({"x": record}))["x"], kind)
    assert {name: (array.dtype, array.shape) for name, array in unpacked.items()} == {
        name: (array.dtype, array.shape) for name, array in PACKED.items()
    }
    assert unpacked["n"].tolist() == [7, 8]
    assert unpacked["b"].tolist() == [4, 5]
    np.testing.assert_allclose(unpacked["w"], PACKED["w"], rtol=0, atol=3 / 254)


@pytest.mark.parametrize("kind", CODED)
def test_half_precision_models_are_coded_in_8_bits_only(kind: str):
    record = coded(kind, MIXED_MASK, MIXED_PACKED)
    assert record["float16"].dtype == ("uint8" if kind == "int8" else "float16")
    for name, array in unpack_values(MIXED_MASK, record, kind).items():
        assert (array.dtype, array.shape) == (MIXED_PACKED[name].dtype, MIXED_PACKED[name].shape)
        np.testing.assert_allclose(array, MIXED_PACKED[name], rtol=0, atol=30 / 254 if kind == "int8" else 0)


@quick
@given(message=messages(), kind=st.sampled_from(CODED))
def test_any_coded_model_arrives(message: tuple[Mask, Arrays], kind: str):
    mask, packed = message  # of zeros and ones, which every coding has
    same_bytes(unpack_values(mask, sent(RecordDict({"x": pack_values(mask, packed, kind)}))["x"], kind), packed)


@pytest.mark.parametrize("kind", VALUES)
def test_vectors_add_what_the_values_are_added_to_and_leave_integers(kind: str):
    base = {"float32": np.array([100, 200, 300, 400, 500], np.float32)}
    found = read_vectors(MASK, coded(kind), kind, base)
    np.testing.assert_allclose(found["float32"].whole(), [101, 202, 303, 404, 505], rtol=0, atol=3 / 254)
    np.testing.assert_array_equal(found["float32"].read(1, 4), found["float32"].whole()[1:4])
    assert found["int64"].whole().tolist() == [7, 8]
    assert {dtype: (vector.dtype, vector.size) for dtype, vector in found.items()} == {
        "float32": ("float32", 5),
        "int64": ("int64", 2),
    }


def test_vectors_without_coding_or_base_are_views_of_the_message():
    record = pack_values(MASK, PACKED)
    for dtype, vector in read_vectors(MASK, record).items():
        part = vector.read(0, 2)
        assert np.shares_memory(part, np.frombuffer(record[dtype].data, np.uint8))
        assert not part.flags.writeable


def forged_coding(data: np.ndarray) -> ArrayRecord:
    return ArrayRecord({"float32": Array(data), "int64": Array(np.array([7, 8]))})


@pytest.mark.parametrize("kind", CODED)
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda data: data[:-1], id="a byte short"),
        pytest.param(lambda data: np.append(data, np.uint8(0)), id="a byte too long"),
        pytest.param(lambda data: data[:0], id="nothing"),
        pytest.param(lambda data: data.view(np.int8), id="another dtype"),
        pytest.param(lambda data: data.reshape(1, -1), id="2-D"),
        pytest.param(lambda data: GOOD, id="not coded"),
    ],
)
def test_coded_values_of_another_size_or_dtype_give_a_wire_error(kind: str, change: Callable[[np.ndarray], np.ndarray]):
    with pytest.raises(WireError, match="uint8 values are"):
        unpack_values(MASK, forged_coding(change(coded(kind)["float32"].numpy())), kind)


@pytest.mark.parametrize("kind", CODED)
def test_coded_values_that_are_not_finite_give_a_wire_error_that_names_the_dtype(kind: str):
    data = coded(kind)["float32"].numpy()
    data[:4] = 0xFF
    with pytest.raises(WireError, match=r"the float32 values: (it holds NaN or infinity|a scale is not a number)"):
        unpack_values(MASK, forged_coding(data), kind)


@pytest.mark.parametrize("kind", CODED)
def test_values_that_are_coded_otherwise_than_expected_give_a_wire_error(kind: str):
    with pytest.raises(WireError, match="expected"):
        unpack_values(MASK, coded(kind))
    with pytest.raises(WireError, match="expected"):
        unpack_values(MASK, pack_values(MASK, PACKED), kind)


@settings(deadline=None, max_examples=200)
@given(data=st.data(), kind=st.sampled_from(CODED))
def test_damaged_coded_values_give_a_wire_error_or_finite_values_of_the_right_shape(data: st.DataObject, kind: str):
    damaged = data.draw(mutations(coded(kind)["float32"].data))
    try:
        unpacked = unpack_values(MASK, values(damaged), kind)
    except WireError:
        return
    for name, array in unpacked.items():
        assert (array.shape, array.dtype) == (PACKED[name].shape, PACKED[name].dtype)
        assert np.isfinite(array).all()


def test_the_fingerprint_tells_any_change_of_a_small_record_and_of_all_values_of_a_large_one():
    small = pack_values(MASK, PACKED)
    found = fingerprint(small)
    assert fingerprint(sent(RecordDict({"x": small}))["x"]) == found
    for name, entry in (("w", 0), ("n", 1), ("b", 1)):
        changed = {key: array.copy() for key, array in PACKED.items()}
        changed[name][entry] += 1
        assert fingerprint(pack_values(MASK, changed)) != found
    large = Array(np.ones(200_000, np.float32))
    assert fingerprint(ArrayRecord({"x": large})) != fingerprint(ArrayRecord({"x": Array(large.numpy() * 1.01)}))


# Moves of an explorer

EVERYTHING = Mask.full(MIXED)
MOVES = {
    spec.name: np.full(spec.shape, -0.5 * (i + 1), spec.dtype) for i, spec in enumerate(MIXED.specs) if spec.floating
}


def test_moves_have_the_keys_of_the_message_and_come_back_by_name_in_their_shapes():
    record = pack_deltas(EVERYTHING, MOVES)
    assert {key: array.dtype for key, array in record.items()} == dict.fromkeys(EVERYTHING.layout.by_dtype, "uint8")
    moves = unpack_deltas(EVERYTHING, sent(RecordDict({"x": record}))["x"])
    assert set(moves) == set(MOVES)
    for name, array in moves.items():
        expected = MOVES[name].astype(np.float32) if MIXED[name].prunable else MOVES[name]
        np.testing.assert_array_equal(array, expected, strict=True)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e37])
def test_moves_that_are_not_finite_or_too_large_give_a_wire_error_that_names_the_array(value: float):
    with pytest.raises(WireError, match=r"array 'w' has moved by NaN, infinity or more than 1e\+36"):
        pack_deltas(EVERYTHING, {**MOVES, "w": np.full((2, 2), value, np.float32)})


def moves_record(**changes: np.ndarray | None) -> ArrayRecord:
    record = {**pack_deltas(EVERYTHING, MOVES)}
    for key, data in changes.items():
        record.pop(key, None)
        if data is not None:
            record[key] = Array(data)
    return ArrayRecord(record)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (moves_record(int64=None), "deltas have the keys"),
        (moves_record(bool=np.zeros(1, np.uint8)), "deltas have the keys"),
        (moves_record(float32=np.zeros(9, np.float32)), "uint8 values are 9 of type <f4"),
        (moves_record(float32=np.zeros((1, 9), np.uint8)), "not a one-dimensional"),
        (moves_record(float32=np.zeros(0, np.uint8)), "0 bytes of deltas do not hold the ranges"),
        (moves_record(float32=np.zeros(60, np.uint8)), "the deltas"),
        (moves_record(int64=np.zeros(3, np.uint8)), "the deltas"),
        (moves_record(float16=np.full(60, 0xFF, np.uint8)), "the range of an array's deltas"),
    ],
    ids=["missing dtype", "extra dtype", "floats", "2-D", "no bytes", "zeros", "integers' zeros", "NaN ranges"],
)
def test_moves_that_are_not_what_is_expected_give_a_wire_error(record: ArrayRecord, message: str):
    with pytest.raises(WireError, match=message):
        unpack_deltas(EVERYTHING, record)


# Headers


def test_a_header_arrives_as_it_was_sent():
    content = sent(RecordDict({HEADER: make_header(TRAIN, 4, MASK, status="ok")}))
    assert dict(read_header(content) or {}) == {
        "format": 4,
        "phase": "train",
        "round": 4,
        "digest": MASK.digest,
        "version": 5,
        "status": "ok",
    }


def test_a_header_without_a_mask_has_no_digest():
    assert set(make_header(HELLO, 0)) == {"format", "phase", "round"}


def test_a_header_says_how_values_are_coded_where_they_are():
    assert value_entries(values="int8", reply="bfloat16") == {"values": "int8", "reply": "bfloat16"}
    assert value_entries(values="float32", reply="log8") == {"reply": "log8"}
    head = make_header(TRAIN, 1, MASK, **value_entries(values="int8", reply="float16"))
    found = read_header(sent(RecordDict({HEADER: head})))
    assert found is not None
    assert (found["values"], found["reply"]) == ("int8", "float16")
    assert not {"values", "reply"} & set(make_header(TRAIN, 1, MASK, **value_entries(values="float32")))


def test_a_message_without_a_header_is_not_one_of_ours():
    assert read_header(RecordDict({"config": ConfigRecord({"format": 4})})) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 3}, "wire format 3, this side speaks 4: install the same"),
        ({"format": 5}, "wire format 5, this side speaks 4"),
        ({"format": "4"}, "wire format '4'"),
        ({"format": [4]}, "wire format"),
        ({"phase": "fit"}, "phase 'fit'"),
        ({"phase": ["train"]}, "phase"),
        ({"round": "1"}, "round"),
        ({"round": 1.0}, "round"),
        ({"round": True}, "round"),
        ({"values": "int4"}, "values 'int4': must be one of float32, bfloat16, float16, int8, log8"),
        ({"reply": "int4"}, "reply 'int4': must be one of float32, bfloat16, float16, int8, log8"),
        ({"values": ["int8"]}, "values"),
        ({"reply": 8}, "reply 8"),
        ({"reply": ""}, "reply ''"),
        *(
            ({"rate": rate}, r"rate .*must be a number in \(0, 10000\]")
            for rate in (math.inf, math.nan, 0.0, -2.0, 2, "2")
        ),
    ],
)
def test_a_header_that_is_wrong_gives_a_wire_error(change: dict[str, Any], message: str):
    record = ConfigRecord({**make_header(TRAIN, 1), **change})
    with pytest.raises(WireError, match=message):
        read_header(RecordDict({HEADER: record}))


@pytest.mark.parametrize("key", ["format", "phase", "round"])
def test_a_header_that_lacks_a_key_gives_a_wire_error(key: str):
    record = ConfigRecord({k: v for k, v in make_header(TRAIN, 1).items() if k != key})
    with pytest.raises(WireError, match=key):
        read_header(RecordDict({HEADER: record}))


def test_a_header_of_another_kind_gives_a_wire_error():
    with pytest.raises(WireError, match="must be a ConfigRecord"):
        read_header(RecordDict({HEADER: MetricRecord({"format": 4})}))
