import math
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from apps import choose, explored
from hypothesis import given, settings
from hypothesis import strategies as st

from autoflip_flwr.core.layout import Arrays, ArraySpec, Layout
from autoflip_flwr.core.scores import scores
from autoflip_flwr.wire.deltas import LARGEST, decode_deltas, encode_deltas

quick = settings(deadline=None, max_examples=150)


def spec(*shape: int, name: str = "w", dtype: str = "float32") -> ArraySpec:
    return ArraySpec(name, shape, dtype, True)


def coded(moves: np.ndarray) -> tuple[float, float, list[int]]:
    """Top, step and codes of one array."""
    data = encode_deltas([spec(*moves.shape)], {"w": moves}).tobytes()
    codes = np.frombuffer(zlib.decompress(data[8:]), np.int8)
    return *struct.unpack("<ff", data[:8]), codes.tolist()


def there_and_back(moves: np.ndarray) -> np.ndarray:
    specs = [spec(*moves.shape, dtype=moves.dtype.name)]
    return decode_deltas(specs, encode_deltas(specs, {"w": moves}).tobytes())["w"]


def made(ranges: list[float], codes: bytes) -> bytes:
    """Coded moves by hand."""
    return struct.pack(f"<{len(ranges)}f", *ranges) + zlib.compress(codes)


def random_moves(size: int, seed: int = 0, spread: float = 1.0) -> np.ndarray:
    """Log-normal sizes with random signs."""
    random = np.random.default_rng(seed)
    sizes = np.exp(spread * random.normal(size=size))
    return (sizes * random.choice([-1, 1], size)).astype(np.float32)


# What travels


def test_codes_are_signed_logarithms_from_the_smallest_to_the_largest_move():
    top, step, codes = coded(np.array([1, -0.5, 0, 0.25, -(2.0**-126), 2.0**-125], np.float32))
    assert top == 1
    assert step == pytest.approx(math.log(2))
    assert codes == [127, -126, 0, 125, -1, 2]


def test_coded_moves_are_the_ranges_of_all_arrays_then_one_stream_of_their_codes():
    specs = [spec(2, name="a"), spec(1, 2, name="b"), spec(3, name="c")]
    moves = {
        "c": np.array([0, 0, 0], np.float32),
        "a": np.array([3, -3], np.float32),
        "b": np.array([[0, -0.25]], np.float32),
    }
    data = encode_deltas(specs, moves)
    assert (data.dtype, data.ndim) == (np.uint8, 1)
    assert data[:24].view("<f4").tolist() == [3, 0, 0.25, 0, 0, 0]
    assert zlib.decompress(data[24:].tobytes()) == bytes([127, 129, 0, 129, 0, 0, 0])
    found = decode_deltas(specs, data.tobytes())
    assert list(found) == ["a", "b", "c"]
    for name, values in moves.items():
        np.testing.assert_array_equal(found[name], values, strict=True)


def test_codes_are_read_as_powers_of_the_step_below_the_top():
    data = made([8, math.log(2)], bytes([127, 126, 124, 1, 0, 128, 129, 130, 255]))
    found = decode_deltas([spec(9)], data)["w"]
    assert found.dtype == np.float32
    lowest = 8 * 2.0**-126
    np.testing.assert_allclose(found, [8, 4, 1, lowest, 0, 0, -8, -4, -lowest], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("rest", "code"), [(0.51, 1), (-0.51, -1), (0.49, 0), (-0.49, 0)], ids=["above", "below 0", "half", "minus half"]
)
def test_the_smallest_twentieth_gets_the_lowest_code_or_none(rest: float, code: int):
    moves = np.full(40, 8, np.float32)
    moves[:2] = rest, 1e-20
    moves[2] = 1  # two of forty are a twentieth: the third is the lowest that is told apart
    top, step, codes = coded(moves)
    assert (top, step) == (8, pytest.approx(math.log(8) / 126))
    assert codes == [code, 0, 1] + [127] * 37


def test_arrays_that_nobody_moved_are_zeros():
    assert coded(np.zeros((2, 3), np.float32)) == (0, 0, [0] * 6)
    assert there_and_back(np.zeros((2, 3), np.float32)).tolist() == [[0] * 3] * 2
    assert there_and_back(np.full(3, -0.0, np.float32)).tolist() == [0] * 3


@pytest.mark.parametrize("value", [1.0, -1.0, 1e-45, -1e-30, 0.1, 1e36, -3.25])
@pytest.mark.parametrize("shape", [(), (1,), (3, 2)])
def test_moves_of_one_size_come_back_exactly(value: float, shape: tuple[int, ...]):
    moves = np.full(shape, value, np.float32)
    np.testing.assert_array_equal(there_and_back(moves), moves, strict=True)


def test_models_without_arrays_or_entries_have_no_moves():
    assert decode_deltas([], encode_deltas([], {}).tobytes()) == {}
    assert there_and_back(np.zeros((0, 3), np.float32)).shape == (0, 3)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_moves_of_any_precision_come_back_in_float32(dtype: str):
    moves = random_moves(500).astype(dtype)
    found = there_and_back(moves)
    np.testing.assert_array_equal(found, there_and_back(moves.astype(np.float32)), strict=True)
    assert found.dtype == np.float32


def test_the_moves_are_left_as_they_are():
    moves = random_moves(100)
    before = moves.copy()
    moves.flags.writeable = False
    there_and_back(moves)
    np.testing.assert_array_equal(moves, before)


# Errors of rounding

sizes = st.floats(2.0**-40, 2.0**40, width=32) | st.just(0.0)
arrays = st.lists(st.tuples(sizes, st.booleans()), min_size=1, max_size=60).map(
    lambda rows: np.array([-size if below else size for size, below in rows], np.float32)
)


@quick
@given(moves=arrays)
def test_signs_ranks_and_sizes_are_kept(moves: np.ndarray):
    found = there_and_back(moves)
    size = np.abs(moves).astype(np.float64)
    assert ((np.sign(found) == np.sign(moves)) | (found == 0)).all()
    assert (np.diff(np.abs(found)[np.argsort(size, kind="stable")]) >= 0).all()
    moved = np.sort(size[size > 0])
    if not moved.size:
        assert not found.any()
        return
    low, top = moved[int(0.05 * moved.size)], moved[-1]
    half_step = math.log(top / low) / 126 / 2
    told = size >= low
    error = np.abs(np.log(np.abs(found[told].astype(np.float64)) / size[told]))
    assert (error <= half_step + 3e-5).all()  # float32 logarithms
    rest = ~told & (size > 0)
    assert rest.sum() <= 0.05 * moved.size
    assert (np.abs(found[rest]) <= low * (1 + 3e-5)).all()


@pytest.mark.parametrize("spread", [0.01, 0.5, 1.0, 2.0])
def test_log_normal_moves_are_right_to_a_few_percent(spread: float):
    moves = random_moves(20_000, spread=spread).astype(np.float64)
    found = there_and_back(moves)
    told = np.abs(moves) >= np.quantile(np.abs(moves), 0.051)
    assert (np.sign(found) == np.sign(moves))[told].all()
    assert np.abs(found / moves - 1)[told].max() < 0.025 * spread + 1e-5


def test_100_000_normal_moves_are_smaller_than_a_quarter_of_float32():
    moves = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    assert encode_deltas([spec(100_000)], {"w": moves}).nbytes < 4 * 100_000 / 4


def test_frozen_layers_cost_a_bit_a_parameter_at_most():
    moves = {"w": random_moves(10_000), "frozen": np.zeros(90_000, np.float32)}
    specs = [spec(10_000), spec(90_000, name="frozen")]
    assert encode_deltas(specs, moves).nbytes < 1.1 * 10_000 + 90_000 / 8


# The mask that follows

LAYOUT = Layout.of(
    {
        "conv": np.zeros((32, 16, 3, 3), np.float32),
        "bias": np.zeros(32, np.float32),
        "hidden": np.zeros((64, 300), np.float32),
        "out": np.zeros((10, 64), np.float32),
    }
)


def chosen(answers: list[Arrays]) -> np.ndarray:
    found = explored(LAYOUT, [(1.0, moves) for moves in answers])
    mask = choose(LAYOUT, scores(found, "none", 1.0), 0.7)
    return np.concatenate([keep.ravel() for keep in mask.keep.values()])


@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
def test_the_mask_of_ten_explorers_agrees_with_that_of_float32(spread: float):
    exact = [
        {s.name: random_moves(s.size, 10 * k + i, spread).reshape(s.shape) for i, s in enumerate(LAYOUT.specs)}
        for k in range(10)
    ]
    arrived = [decode_deltas(LAYOUT.specs, encode_deltas(LAYOUT.specs, moves).tobytes()) for moves in exact]
    one, other = chosen(exact), chosen(arrived)
    assert np.count_nonzero(one) == np.count_nonzero(other)
    assert np.count_nonzero(one & other) >= 0.99 * np.count_nonzero(one)


# What cannot be coded


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_moves_that_are_not_finite_are_refused_by_name(value: float, dtype: str):
    moves = {"w": np.ones(3, np.float32), "layer.bias": np.array([0, value], dtype)}
    with pytest.raises(ValueError, match=r"array 'layer.bias' has moved by NaN, infinity or more than 1e\+36"):
        encode_deltas([spec(3), spec(2, name="layer.bias", dtype=dtype)], moves)


@pytest.mark.parametrize("value", [1.1e36, -3e38])
def test_moves_that_are_too_large_are_refused(value: float):
    with pytest.raises(ValueError, match="has moved by"):
        encode_deltas([spec(2)], {"w": np.array([0, value], np.float32)})


# Hostile senders

SPECS = [spec(2, 2), spec(3, name="b")]
RANGES = [1.0, 0.1, 2.0, 0.0]
CODES = bytes([127, 1, 129, 0, 5, 0, 255])
GOOD = made(RANGES, CODES)


def test_the_moves_made_by_hand_are_read_where_nothing_is_wrong_with_them():
    assert {name: values.shape for name, values in decode_deltas(SPECS, GOOD).items()} == {"w": (2, 2), "b": (3,)}


@pytest.mark.parametrize("size", [0, 1, 8, 15])
def test_moves_shorter_than_their_ranges_are_refused(size: int):
    with pytest.raises(ValueError, match=f"{size} bytes of deltas do not hold the ranges of 2 arrays"):
        decode_deltas(SPECS, GOOD[:size])


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("value", [np.nan, -1.0, -1e-45, 1.1e36, np.inf, -np.inf])
def test_ranges_that_are_not_sizes_are_refused(value: float, at: int):
    ranges = [value if i == at else number for i, number in enumerate(RANGES)]
    with pytest.raises(ValueError, match="the range of an array's deltas is not a number"):
        decode_deltas(SPECS, made(ranges, CODES))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(GOOD[:16], id="no codes"),
        pytest.param(GOOD[:-1], id="cut off"),
        pytest.param(GOOD + b"x", id="longer"),
        pytest.param(GOOD + zlib.compress(CODES), id="two streams"),
        pytest.param(GOOD[:16] + CODES, id="not compressed"),
        pytest.param(made(RANGES, b""), id="no code"),
        pytest.param(made(RANGES, CODES[:-1]), id="a code short"),
        pytest.param(made(RANGES, CODES + b"\0"), id="a code too long"),
        pytest.param(made(RANGES[:2], CODES), id="a range short"),
        pytest.param(made([*RANGES, 1, 1], CODES), id="a range too many"),
    ],
)
def test_moves_of_another_length_are_refused(data: bytes):
    with pytest.raises(ValueError, match=r"the deltas|the range"):
        decode_deltas(SPECS, data)


def test_a_bomb_is_refused_before_it_is_inflated():
    bomb = made(RANGES, bytes(2**26))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="do not hold what is expected"):
            decode_deltas(SPECS, bomb)
        assert tracemalloc.get_traced_memory()[1] < 2**18
    finally:
        tracemalloc.stop()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("ranges", [[LARGEST, LARGEST], [LARGEST, 0.0], [0.0, LARGEST], [1e-45, 1e-45]])
def test_the_largest_and_the_smallest_ranges_give_finite_moves(ranges: list[float]):
    found = decode_deltas([spec(256)], made(ranges, bytes(range(256))))["w"]
    assert np.isfinite(found).all()
    assert found[127] == -found[129] == np.float32(ranges[0])


@settings(deadline=None, max_examples=300)
@given(
    data=st.binary(max_size=60)
    | st.tuples(st.lists(st.floats(width=32), min_size=4, max_size=4), st.binary(min_size=6, max_size=8)).map(
        lambda parts: made(*parts)
    )
    | st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)).map(
        lambda damage: GOOD[: damage[0]] + bytes([damage[1]]) + GOOD[damage[0] + 1 :]
    )
)
def test_any_bytes_give_a_value_error_or_finite_moves_of_the_right_shapes(data: bytes):
    try:
        moves = decode_deltas(SPECS, data)
    except ValueError:
        return
    assert {name: (values.shape, values.dtype) for name, values in moves.items()} == {
        "w": ((2, 2), np.float32),
        "b": ((3,), np.float32),
    }
    assert all(np.isfinite(values).all() for values in moves.values())


@quick
@given(seed=st.integers(0, 999), codes=st.binary(min_size=7, max_size=7))
def test_moves_that_are_coded_again_keep_their_signs(seed: int, codes: bytes):
    """What a decoder accepts, an encoder accepts."""
    ranges = np.random.default_rng(seed).uniform(0, 0.5, 4).tolist()
    moves = decode_deltas(SPECS, made(ranges, codes))
    again = decode_deltas(SPECS, encode_deltas(SPECS, moves).tobytes())
    for name, values in moves.items():
        assert ((np.sign(again[name]) == np.sign(values)) | (again[name] == 0)).all()
