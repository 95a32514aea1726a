import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoflip_flwr.core.choices import CODED
from autoflip_flwr.wire.values import BLOCK, CHUNK, Coded, Vector, coded_size, encode, is_coded

quick = settings(deadline=None, max_examples=100)


def vector(*numbers: float) -> np.ndarray:
    return np.array(numbers, np.float32)


def decoded(kind: str, data: np.ndarray, kept: int, size: int) -> np.ndarray:
    return Coded(data, kind, kept, size).read(0, size)


def there_and_back(kind: str, numbers: np.ndarray, kept: int | None = None) -> np.ndarray:
    """What arrives of a vector; by default all its values are kept ones of pruned arrays."""
    kept = numbers.size if kept is None else kept
    return decoded(kind, encode(kind, numbers, kept), kept, numbers.size)


def int8_bytes(scales: list[float], others: bytes, codes: list[int]) -> bytes:
    return struct.pack(f"<{len(scales)}f", *scales) + others + struct.pack(f"{len(codes)}b", *codes)


# What is coded, and its size


@pytest.mark.parametrize(
    ("kind", "dtypes"),
    [
        ("float32", []),
        ("bfloat16", ["float32", "float64"]),
        ("float16", ["float32", "float64"]),
        ("int8", ["float16", "float32", "float64"]),
    ],
)
def test_floating_values_are_coded_where_that_makes_them_smaller(kind: str, dtypes: list[str]):
    known = ("float16", "float32", "float64", "int8", "int64", "uint16", "bool")
    assert [dtype for dtype in known if is_coded(kind, dtype)] == dtypes


@pytest.mark.parametrize(
    ("kind", "kept", "size", "expected"),
    [
        ("bfloat16", 3, 5, 10),
        ("float16", 0, 5, 10),
        ("int8", 0, 0, 0),
        ("int8", 0, 5, 10),
        ("int8", 1, 1, 5),
        ("int8", 256, 256, 260),
        ("int8", 257, 260, 8 + 257 + 6),
    ],
)
def test_the_size_is_known_beforehand(kind: str, kept: int, size: int, expected: int):
    assert coded_size(kind, kept, size) == expected
    assert encode(kind, np.ones(size, np.float32), kept).shape == (expected,)


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_a_resnet_18_is_nearly_four_times_or_exactly_twice_smaller(density: float):
    kept, others = int(density * 11_164_352), 9_610  # convolutions and output; normalisation and its bias
    size = kept + others
    assert 4 * size / coded_size("int8", kept, size) > 3.8
    for kind in ("bfloat16", "float16"):
        assert 4 * size / coded_size(kind, kept, size) == 2


# Exact bytes


@pytest.mark.parametrize(
    ("value", "half"),
    [
        (0.0, 0x0000),
        (-0.0, 0x8000),
        (1.0, 0x3F80),
        (-2.0, 0xC000),
        (1 + 2**-7, 0x3F81),
        (1 + 2**-8, 0x3F80),  # ties to even
        (1 + 3 * 2**-8, 0x3F82),
        (-1 - 3 * 2**-8, 0xBF82),
        (1 + 2**-8 + 2**-23, 0x3F81),
        (1 + 3 * 2**-8 - 2**-23, 0x3F81),
        (2 - 2**-8, 0x4000),  # carries into the exponent
        (2.0**-133, 0x0001),  # the smallest
        (2.0**-134, 0x0000),
        (3 * 2.0**-134, 0x0002),
        (3.4e38, 0x7F62),  # cut to 3e38
        (-3.4e38, 0xFF62),
    ],
)
def test_bfloat16_is_the_upper_half_of_float32_to_nearest_ties_to_even(value: float, half: int):
    data = encode("bfloat16", vector(value), 1)
    assert data.tobytes() == struct.pack("<H", half)
    assert decoded("bfloat16", data, 1, 1).tobytes() == struct.pack("<I", half << 16)


@pytest.mark.parametrize(
    ("value", "half"),
    [
        (0.0, 0x0000),
        (-0.0, 0x8000),
        (1.0, 0x3C00),
        (-2.0, 0xC000),
        (2049.0, 0x6800),  # ties to even
        (2051.0, 0x6802),
        (2.0**-24, 0x0001),
        (2.0**-25, 0x0000),
        (65504.0, 0x7BFF),
        (65505.0, 0x7BFF),
        (65520.0, 0x7BFF),  # cut to the largest: IEEE would round it to infinity
        (1e30, 0x7BFF),
        (-1e30, 0xFBFF),
    ],
)
def test_float16_is_ieee_half_precision_and_cut_to_its_range(value: float, half: int):
    data = encode("float16", vector(value), 1)
    assert data.tobytes() == struct.pack("<H", half)
    assert decoded("float16", data, 1, 1)[0] == np.uint16(half).view(np.float16)


def test_int8_is_a_scale_for_each_block_then_the_other_values_then_the_codes():
    numbers = vector(127, 1, 0.4, 0.5, 1.5, -0.5, -2.5, -126.6, 0, 3, 1 + 2**-8)
    data = encode("int8", numbers, 9)
    others = struct.pack("<HH", 0x4040, 0x3F80)
    assert data.tobytes() == int8_bytes([1.0], others, [127, 1, 0, 0, 2, 0, -2, -127, 0])
    assert decoded("int8", data, 9, 11).tolist() == [127, 1, 0, 0, 2, 0, -2, -127, 0, 3, 1]


def test_the_scale_is_the_blocks_largest_size_over_127():
    data = encode("int8", vector(0.5, -2, 1), 3)
    scale = np.float32(2) / np.float32(127)
    assert data.tobytes() == int8_bytes([scale], b"", [32, -127, 64])  # 31.75, -127, 63.5 ties to even
    assert decoded("int8", data, 3, 3).tolist() == [scale * np.float32(code) for code in (32, -127, 64)]


def test_each_256_kept_values_have_a_scale_of_their_own():
    numbers = np.concatenate([np.full(256, 127, np.float32), np.full(256, -254, np.float32), vector(0.127, 0.001)])
    data = encode("int8", numbers, numbers.size)
    scale = np.float32(0.127) / np.float32(127)
    assert data.tobytes() == int8_bytes([1, 2, scale], b"", [127] * 256 + [-127] * 256 + [127, 1])
    np.testing.assert_allclose(decoded("int8", data, 514, 514), numbers, rtol=1e-6, atol=0)


def test_a_block_of_zeros_has_scale_0_and_does_not_disturb_the_next():
    numbers = np.zeros(258, np.float32)
    numbers[256:] = 127, -127
    assert encode("int8", numbers, 258).tobytes() == int8_bytes([0, 1], b"", [0] * 256 + [127, -127])


@pytest.mark.parametrize("peak", [1e-45, 1e-38, 9e-31])
def test_a_block_whose_largest_value_is_next_to_nothing_is_one_of_zeros(peak: float):
    assert encode("int8", vector(peak, -peak, 0), 3).tobytes() == int8_bytes([0], b"", [0, 0, 0])


@pytest.mark.parametrize("peak", [1.1e-30, 1e-20, 2.9e38])
def test_the_smallest_and_the_largest_blocks_keep_their_values(peak: float):
    numbers = vector(peak, -peak, 0)
    np.testing.assert_allclose(there_and_back("int8", numbers), numbers, rtol=1e-6, atol=0)


def test_what_is_beyond_the_largest_value_is_cut():
    largest = np.finfo(np.float32).max
    np.testing.assert_allclose(there_and_back("int8", vector(largest, -largest)), [3e38, -3e38], rtol=1e-6)
    for kind in CODED:
        others = there_and_back(kind, np.array([1e300, -1e300]), kept=0)
        np.testing.assert_allclose(others, [3e38, -3e38], rtol=2**-8)
    assert there_and_back("float16", np.array([1e300, -1e300])).tolist() == [65504, -65504]


@pytest.mark.parametrize("kind", CODED)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_coded(value: float, dtype: str, kind: str):
    for at, kept in ((0, 2), (1, 2), (1, 1), (1, 0)):
        numbers = np.ones(2, dtype)
        numbers[at] = value
        with pytest.raises(ValueError, match="NaN or infinity cannot be coded as"):
            encode(kind, numbers, kept)


@pytest.mark.parametrize("kind", CODED)
def test_values_that_are_never_pruned_are_coded_in_bfloat16(kind: str):
    numbers = vector(5, 1e-20, 1e20, 1 + 2**-8, -0.0)
    expected = there_and_back("bfloat16", numbers)
    assert there_and_back(kind, numbers, kept=0).tobytes() == expected.tobytes()
    assert there_and_back(kind, np.append(vector(7), numbers), kept=1)[1:].tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", CODED)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.filterwarnings("error")
def test_vectors_of_any_precision_are_coded_alike_and_left_as_they_are(kind: str, dtype: str):
    numbers = np.random.default_rng(0).normal(size=700).astype(np.float16)
    own = numbers.astype(dtype)
    own.flags.writeable = False
    assert encode(kind, own, 600).tobytes() == encode(kind, numbers.astype(np.float32), 600).tobytes()
    assert (own == numbers).all()


@pytest.mark.parametrize("kind", CODED)
@pytest.mark.parametrize("kept", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 300])
def test_a_long_vector_is_coded_as_its_blocks_are(kind: str, kept: int):
    numbers = np.random.default_rng(kept).normal(size=kept + 7).astype(np.float32)
    expected = [
        there_and_back(kind, numbers[start : min(start + 100 * BLOCK, kept)]) for start in range(0, kept, 100 * BLOCK)
    ]
    arrived = there_and_back(kind, numbers, kept)
    np.testing.assert_array_equal(arrived[:kept], np.concatenate(expected))
    np.testing.assert_array_equal(arrived[kept:], there_and_back("bfloat16", numbers[kept:]))


@pytest.mark.parametrize("kind", CODED)
def test_a_vector_of_nothing_is_no_bytes(kind: str):
    assert encode(kind, vector(), 0).tobytes() == b""
    assert there_and_back(kind, vector()).shape == (0,)


# Errors of rounding

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
small = st.floats(-(2.0**15), 2.0**15, width=32)
vectors = st.lists(floats | small, max_size=20).map(lambda numbers: np.array(numbers, np.float32))


@quick
@given(numbers=vectors)
def test_bfloat16_is_right_to_a_256th(numbers: np.ndarray):
    exact = np.clip(numbers, -3e38, 3e38).astype(np.float64)
    error = np.abs(there_and_back("bfloat16", numbers) - exact)
    assert (error <= np.maximum(2**-8 * np.abs(exact), 2.0**-134)).all()


@quick
@given(numbers=vectors)
def test_float16_is_right_to_a_2048th_within_its_range(numbers: np.ndarray):
    exact = np.clip(numbers, -65504, 65504).astype(np.float64)
    error = np.abs(there_and_back("float16", numbers) - exact)
    assert (error <= np.maximum(2**-11 * np.abs(exact), 2.0**-25)).all()


def check_int8(numbers: np.ndarray) -> None:
    """Each kept value is right to half of its block's scale, and a last bit."""
    arrived = there_and_back("int8", numbers)
    for start in range(0, numbers.size, BLOCK):
        block = np.clip(numbers[start : start + BLOCK], -3e38, 3e38).astype(np.float64)
        error = np.abs(arrived[start : start + BLOCK] - block)
        peak = np.abs(block).max()
        if peak < 1e-30:
            assert not arrived[start : start + BLOCK].any()
        else:
            assert error.max() <= peak / 254 * (1 + 1e-4)
            assert error[np.abs(block) == peak].max() <= 2**-22 * peak


@quick
@given(numbers=vectors)
def test_int8_is_right_to_half_of_the_blocks_scale(numbers: np.ndarray):
    check_int8(numbers)


@quick
@given(seed=st.integers(0, 999), size=st.integers(1, 3 * BLOCK), spread=st.sampled_from([0.0, 1.0, 30.0]))
def test_int8_is_right_to_half_of_each_blocks_scale(seed: int, size: int, spread: float):
    random = np.random.default_rng(seed)
    numbers = random.normal(size=size) * 10.0 ** (spread * random.normal(size=size) / 3)
    check_int8(np.clip(numbers, -3.4e38, 3.4e38).astype(np.float32))


@quick
@given(numbers=vectors, kind=st.sampled_from(CODED), kept=st.integers(0, 20))
def test_what_has_arrived_arrives_again_as_it_is(numbers: np.ndarray, kind: str, kept: int):
    kept = min(kept, numbers.size)
    once = there_and_back(kind, numbers, kept)
    np.testing.assert_allclose(there_and_back(kind, once, kept), once, rtol=1e-6, atol=0)


# Reading in parts


@quick
@given(
    kind=st.sampled_from(CODED),
    kept=st.integers(0, 4 * BLOCK),
    others=st.integers(0, 40),
    ends=st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)),
)
def test_any_range_is_that_of_the_whole(kind: str, kept: int, others: int, ends: tuple[int, int]):
    size = kept + others
    numbers = np.random.default_rng(kept).normal(size=size).astype(np.float32)
    coded = Coded(encode(kind, numbers, kept), kind, kept, size)
    start, stop = sorted(end % (size + 1) for end in ends)
    part = coded.read(start, stop)
    assert part.dtype == np.float32
    np.testing.assert_array_equal(part, coded.read(0, size)[start:stop])


@pytest.mark.parametrize("kind", CODED)
def test_what_is_read_belongs_to_the_reader(kind: str):
    coded = Coded(encode(kind, np.ones(300, np.float32), 280), kind, 280, 300)
    for start, stop in ((0, 300), (10, 20), (285, 290)):
        part = coded.read(start, stop)
        part[:] = 9
        assert (coded.read(start, stop) == 1).all()


@pytest.mark.parametrize("kind", CODED)
def test_a_message_may_lie_at_an_odd_address(kind: str):
    numbers = np.random.default_rng(0).normal(size=300).astype(np.float32)
    data = encode(kind, numbers, 270)
    shifted = np.frombuffer(b"x" + data.tobytes(), np.uint8, offset=1)
    np.testing.assert_array_equal(decoded(kind, shifted, 270, 300), decoded(kind, data, 270, 300))


# Hostile senders


@pytest.mark.parametrize("at", [0, 1, CHUNK - 1, CHUNK, CHUNK + 9])
@pytest.mark.parametrize(
    ("kind", "halves"), [("bfloat16", (0x7F80, 0xFF80, 0x7FC0, 0xFFFF)), ("float16", (0x7C00, 0xFC00, 0x7E00, 0xFFFF))]
)
def test_halves_of_kept_values_that_are_not_finite_are_refused(kind: str, halves: tuple[int, ...], at: int):
    data = encode(kind, np.ones(CHUNK + 10, np.float32), CHUNK + 10)
    for half in halves:
        data.view("<u2")[at] = half
        with pytest.raises(ValueError, match="it holds NaN or infinity"):
            Coded(data, kind, CHUNK + 10, CHUNK + 10)


@pytest.mark.parametrize("kind", CODED)
@pytest.mark.parametrize("half", [0x7F80, 0xFF80, 0x7FC0, 0x7F81])
def test_halves_of_other_values_that_are_not_finite_are_refused(kind: str, half: int):
    data = encode(kind, np.ones(5, np.float32), 3)
    data[4 if kind == "int8" else 6 :][2:4] = np.frombuffer(struct.pack("<H", half), np.uint8)
    with pytest.raises(ValueError, match="it holds NaN or infinity"):
        Coded(data, kind, 3, 5)


@pytest.mark.parametrize("scale", [np.nan, -np.nan, np.inf, -np.inf, -1.0, -1e-45, 2.4e36, 3e38])
def test_scales_that_are_not_sizes_are_refused(scale: float):
    data = encode("int8", np.ones(300, np.float32), 300)
    data[4:8] = np.frombuffer(struct.pack("<f", scale), np.uint8)
    with pytest.raises(ValueError, match=r"a scale is not a number in \[0, 2.4e36\]"):
        Coded(data, "int8", 300, 300)


def test_the_largest_scale_and_the_smallest_code_are_finite():
    data = np.frombuffer(int8_bytes([2.36e36, -0.0], b"", [-128] * 257), np.uint8)
    read = decoded("int8", data, 257, 257)
    assert np.isfinite(read).all()
    assert not read[256:].any()


@settings(deadline=None, max_examples=300)
@given(kind=st.sampled_from(CODED), kept=st.integers(0, 6), others=st.integers(0, 3), data=st.data())
def test_any_bytes_of_the_right_length_give_finite_values_or_a_value_error(
    kind: str, kept: int, others: int, data: st.DataObject
):
    count = coded_size(kind, kept, kept + others)
    content = np.frombuffer(data.draw(st.binary(min_size=count, max_size=count)), np.uint8)
    try:
        read = decoded(kind, content, kept, kept + others)
    except ValueError:
        return
    assert read.shape == (kept + others,)
    assert np.isfinite(read).all()


# Vectors


def vector_of(numbers: np.ndarray, dtype: str, base: np.ndarray | None = None) -> Vector:
    return Vector(dtype, numbers.size, lambda start, stop: numbers[start:stop], base)


def test_a_vector_without_coding_or_base_is_read_without_a_copy():
    numbers = np.arange(6, dtype=np.float64)
    for found in (Vector("float64", 6, numbers), vector_of(numbers, "float64")):
        assert np.shares_memory(found.read(1, 3), numbers)
        assert found.whole().tolist() == [0, 1, 2, 3, 4, 5]
        assert (found.read(2, 2).shape, found.read(4, 6).tolist()) == ((0,), [4, 5])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("kind", CODED)
def test_a_vector_adds_what_is_decoded_to_its_base_in_the_models_precision(kind: str, dtype: str):
    random = np.random.default_rng(1)
    update, base = random.normal(size=600).astype(np.float32), random.normal(size=600).astype(dtype)
    coded = Coded(encode(kind, update, 500), kind, 500, 600)
    found = Vector(dtype, 600, coded.read, base)
    wide = np.promote_types(dtype, np.float32)
    expected = (base.astype(wide) + coded.read(0, 600).astype(wide)).astype(dtype)
    np.testing.assert_array_equal(found.whole(), expected, strict=True)
    np.testing.assert_array_equal(found.read(123, 550), expected[123:550], strict=True)
    assert found.is_finite()


def test_a_coded_vector_without_a_base_has_the_models_dtype():
    coded = Coded(encode("int8", vector(127, 1), 2), "int8", 2, 2)
    found = Vector("float64", 2, coded.read).whole()
    assert (found.dtype, found.tolist()) == (np.float64, [127, 1])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("at", [0, CHUNK - 1, CHUNK, 2 * CHUNK + 4])
def test_a_value_that_is_not_finite_is_found_wherever_it_is(dtype: str, at: int):
    numbers = np.ones(2 * CHUNK + 5, dtype)
    assert vector_of(numbers, dtype).is_finite()
    for value in (np.nan, np.inf, -np.inf):
        numbers[at] = value
        assert not vector_of(numbers, dtype).is_finite()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("dtype", "largest"), [("float16", 65504.0), ("float32", 3.4e38)])
def test_a_sum_beyond_the_models_range_is_not_finite(dtype: str, largest: float):
    update, base = vector(largest, 0), np.array([largest, 0], dtype)
    assert not vector_of(update, dtype, base).is_finite()
    assert vector_of(update[1:], dtype, base[1:]).is_finite()
    infinite = np.array([np.inf, -np.inf], np.float32)
    assert not vector_of(infinite, dtype, -infinite.astype(dtype)).is_finite()


def test_integers_are_finite():
    assert vector_of(np.array([2**62, -1]), "int64").is_finite()
