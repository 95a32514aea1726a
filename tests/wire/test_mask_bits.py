import math
import tracemalloc
import zlib
from contextlib import suppress
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoflip_flwr.core.layout import ArraySpec, Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.wire import mask_bits
from autoflip_flwr.wire.mask_change import CHANGES, decode_change

SHAPES = ((), (0,), (0, 3), (3, 0), (1,), (5,), (300,), (2, 3), (4, 1), (1, 9), (12, 7), (2, 1, 3), (3, 5, 2, 2))
DENSITIES = (0.0, 0.01, 0.1, 0.3, 0.7, 0.99, 1.0)
UNIT_SHAPES = ((16, 3, 3, 3), (16,), (32, 16, 3, 3), (80, 20), (80, 16), (80,), (10, 32))  # conv, bias, LSTM, linear
CODES = (*mask_bits.ENCODINGS, *CHANGES)

quick = settings(deadline=None, max_examples=150)


def layout_of(*shapes: tuple[int, ...], prunable: bool = True) -> Layout:
    return Layout(tuple(ArraySpec(f"a{i}", shape, "float32", prunable) for i, shape in enumerate(shapes)))


def mask_of(*flags: int) -> Mask:
    return Mask(layout_of((len(flags),)), np.packbits(np.array(flags, bool)).tobytes())


def random_mask(layout: Layout, density: float, seed: int) -> Mask:
    random = np.random.default_rng(seed)
    return Mask.from_bool(layout, {s.name: np.asarray(random.random(s.shape) < density) for s in layout.prunable})


def unit_mask(layout: Layout, density: float, seed: int) -> Mask:
    """Random kept units and inputs of each array."""
    random = np.random.default_rng(seed)
    keep = {}
    for spec in layout.prunable:
        keep[spec.name] = np.ones(spec.shape, bool)
        for axis, size in enumerate(spec.shape[:2]):
            kept = random.random(size) < density
            keep[spec.name] &= kept.reshape([size if i == axis else 1 for i in range(len(spec.shape))])
    return Mask.from_bool(layout, keep)


def stored(data: bytes) -> bytes:
    """A zlib stream."""
    return zlib.compress(data)


def decoded(layout: Layout, code: str, data: bytes) -> bytes:
    """Decode with either of the two decoders; what comes out must be a mask."""
    if code in CHANGES:
        result = decode_change(random_mask(layout, 0.5, 0), code, data)
    else:
        result = mask_bits.decode(layout, code, data)
    Mask(layout, result)
    return result


def encodings_of(mask: Mask) -> dict[str, bytes]:
    """All encodings that can hold a mask, whether or not ``encode`` would choose them."""
    flags = np.unpackbits(np.frombuffer(mask.bits, np.uint8), count=mask.layout.prunable_size).view(bool)
    found = {"bitmap": stored(mask.bits), "gaps": stored(mask_bits._to_gaps(flags))}
    if mask.is_full:
        found["full"] = b""
    if (units := mask_bits._to_units(mask)) is not None:
        found["units"] = stored(units)
    return found


@st.composite
def masks(draw: st.DrawFn, units: bool = False) -> Mask:
    rows = draw(st.lists(st.tuples(st.sampled_from(SHAPES), st.booleans()), max_size=6))
    layout = Layout(tuple(ArraySpec(f"a{i}", shape, "float32", pruned) for i, (shape, pruned) in enumerate(rows)))
    make = unit_mask if units else random_mask
    return make(layout, draw(st.sampled_from(DENSITIES)), draw(st.integers(0, 999)))


# What travels


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], []),
        ([0, 0, 0], []),
        ([1, 1, 1], [0, 0, 0]),
        ([0, 1, 0, 0, 1, 0], [1, 2]),
        ([0] * 254 + [1], [254]),
        ([0] * 255 + [1], [255, 0]),
        ([0] * 256 + [1, 0, 1], [255, 1, 1]),
        ([0] * 511 + [1] + [0] * 600, [255, 255, 1]),
    ],
    ids=["no entries", "none kept", "all kept", "gaps", "254", "255", "256", "511, and more at the end"],
)
def test_gaps_count_the_pruned_entries_before_each_kept_one(flags: list[int], expected: list[int]):
    assert list(mask_bits._to_gaps(np.array(flags, bool))) == expected
    assert mask_bits._from_gaps(stored(bytes(expected)), len(flags)).tolist() == flags


def test_the_bitmap_is_the_masks_bits():
    mask = mask_of(1, 0, 1, 1, 0, 0, 1, 0, 1)
    assert mask_bits.decode(mask.layout, "bitmap", stored(b"\xb2\x80")) == mask.bits == b"\xb2\x80"


def test_units_are_the_bits_of_axis_0_then_those_of_axis_1_of_each_array():
    layout = layout_of((2, 9, 1, 2), (3,), (4, 1), (0, 7), ())
    rows, columns = np.array([True, False]), np.arange(9) != 7
    keep = {
        "a0": np.broadcast_to(np.outer(rows, columns)[:, :, None, None], (2, 9, 1, 2)),
        "a1": np.array([False, True, True]),
        "a2": np.array([[True], [False], [False], [True]]),
        "a3": np.zeros((0, 7), bool),
        "a4": np.array(True),
    }
    mask = Mask.from_bool(layout, keep)
    expected = bytes([0b1000_0000, 0b1111_1110, 0b1000_0000, 0b0110_0000, 0b1001_0000, 0b1000_0000])
    assert mask_bits._to_units(mask) == expected
    assert mask_bits.decode(layout, "units", stored(expected)) == mask.bits


def test_a_full_mask_needs_no_data():
    for size in (0, 1, 7, 8, 9):
        mask = Mask.full(layout_of((size,)))
        assert mask_bits.encode(mask) == ("full", b"")
        assert mask_bits.decode(mask.layout, "full", b"") == mask.bits


# There and back


@quick
@given(mask=masks())
def test_any_mask_comes_back(mask: Mask):
    encoding, data = mask_bits.encode(mask)
    assert encoding in mask_bits.ENCODINGS
    assert mask_bits.decode(mask.layout, encoding, data) == mask.bits
    for other, data in encodings_of(mask).items():
        assert mask_bits.decode(mask.layout, other, data) == mask.bits, other


@quick
@given(mask=masks(units=True))
def test_any_mask_of_whole_units_comes_back_as_units(mask: Mask):
    units = mask_bits._to_units(mask)
    assert units is not None
    assert mask_bits.decode(mask.layout, "units", stored(units)) == mask.bits


@pytest.mark.parametrize(
    "size", [mask_bits._BATCH - 1, mask_bits._BATCH, mask_bits._BATCH + 1, 2 * mask_bits._BATCH + 3]
)
@pytest.mark.parametrize("density", [0.0, 0.001, 1.0])
def test_gaps_longer_than_a_batch_come_back(size: int, density: float):
    flags = np.random.default_rng(0).random(size) < density
    assert (mask_bits.decode_flags(mask_bits.encode_flags(flags), size) == flags).all()


# The choice, and the size


def entropy_bytes(count: int, density: float) -> float:
    return -count * sum(p * math.log2(p) for p in (density, 1 - density) if p) / 8


@pytest.mark.parametrize("density", [0.02, 0.05, 0.1, 0.12, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9])
def test_a_random_mask_is_within_5_percent_of_its_entropy(density: float):
    mask = random_mask(layout_of((400, 500)), density, 0)
    encoding, data = mask_bits.encode(mask)
    assert encoding == ("gaps" if density <= 0.12 else "bitmap")
    assert len(data) <= 1.05 * entropy_bytes(200_000, mask.density)


@pytest.mark.parametrize("density", [0.0, 0.001, 0.05, 0.2, 0.6, 0.999])
def test_no_other_encoding_is_much_smaller_than_the_chosen_one(density: float):
    for mask in (
        random_mask(layout_of((300, 200), (600,)), density, 0),
        unit_mask(layout_of((30, 20, 3, 3), (60, 30)), density, 0),
    ):
        assert len(mask_bits.encode(mask)[1]) <= 1.02 * min(map(len, encodings_of(mask).values())) + 10


def test_whole_units_cost_two_bits_for_each_channel_at_most():
    layout = layout_of(*UNIT_SHAPES)
    mask = unit_mask(layout, 0.5, 0)
    encoding, data = mask_bits.encode(mask)
    told = sum(sum(shape[:2]) for shape in UNIT_SHAPES)
    assert encoding == "units"
    assert len(data) <= told / 8 + 20


def test_the_shared_channels_of_a_deep_model_are_told_once():
    random = np.random.default_rng(0)
    channels = [random.random(512) < 0.5 for _ in range(11)]
    keep = {
        f"a{i}": np.broadcast_to(np.outer(out, into)[:, :, None], (512, 512, 2))
        for i, (into, out) in enumerate(pairwise(channels))
    }
    mask = Mask.from_bool(layout_of(*[(512, 512, 2)] * 10), keep)
    encoding, data = mask_bits.encode(mask)
    assert encoding == "units"
    assert len(data) <= 11 * 512 / 8 * 1.15


def test_one_entry_that_differs_makes_a_mask_of_units_an_unstructured_one():
    mask = unit_mask(layout_of(*UNIT_SHAPES), 0.5, 0)
    for i in (0, len(mask.bits) - 1):
        flipped = bytes(byte ^ (0x80 if at == i else 0) for at, byte in enumerate(mask.bits))
        other = Mask(mask.layout, flipped)
        assert mask_bits._to_units(other) is None
        assert mask_bits.decode(mask.layout, *mask_bits.encode(other)) == flipped


def test_regular_masks_cost_next_to_nothing():
    flags = np.zeros((2000, 100), bool)
    flags[::3, ::2] = flags[1::3, 1::2] = True
    mask = Mask.from_bool(layout_of((2000, 100)), {"a0": flags})
    assert len(mask_bits.encode(mask)[1]) < 1000


# Hostile senders


LAYOUT = layout_of((3, 5, 2), (4, 1), (7,))  # 41 entries
SIZES = {"bitmap": 6, "units": 4, "dropped-bitmap": -(-random_mask(LAYOUT, 0.5, 0).kept // 8)}


@quick
@given(code=st.sampled_from(CODES), data=st.binary(max_size=60), packed=st.booleans())
def test_any_bytes_give_a_mask_or_a_value_error(code: str, data: bytes, packed: bool):
    with suppress(ValueError):
        decoded(LAYOUT, code, stored(data) if packed else data)


@quick
@given(mask=masks(), at=st.integers(0, 10**6), value=st.integers(0, 255))
def test_damaged_and_cut_data_give_a_mask_or_a_value_error(mask: Mask, at: int, value: int):
    for encoding, data in encodings_of(mask).items():
        if not data:
            continue
        with pytest.raises(ValueError, match="the mask's"):
            mask_bits.decode(mask.layout, encoding, data[: at % len(data)])
        damaged = bytearray(data)
        damaged[at % len(data)] = value
        with suppress(ValueError):
            decoded(mask.layout, encoding, bytes(damaged))


@pytest.mark.parametrize("code", CODES[1:])
def test_bytes_after_the_stream_are_refused(code: str):
    good = stored(bytes(SIZES.get(code, 0)))
    decoded(LAYOUT, code, good)
    for after in (b"\0", good):
        with pytest.raises(ValueError, match="do not hold what is expected"):
            decoded(LAYOUT, code, good + after)


@pytest.mark.parametrize("code", CODES[1:])
def test_a_preset_dictionary_is_refused(code: str):
    stream = zlib.compressobj(zdict=bytes(100))
    data = stream.compress(bytes(SIZES.get(code, 0))) + stream.flush()
    with pytest.raises(ValueError, match="the mask's"):
        decoded(LAYOUT, code, data)


@pytest.mark.parametrize("code", SIZES)
@pytest.mark.parametrize("more", [-1, 1])
def test_data_of_the_wrong_length_is_refused(code: str, more: int):
    with pytest.raises(ValueError, match="do not hold what is expected"):
        decoded(LAYOUT, code, stored(bytes(SIZES[code] + more)))


@pytest.fixture(scope="module")
def bomb() -> bytes:
    return stored(bytes(100 * 2**20))


@pytest.mark.parametrize("code", CODES)
def test_a_bomb_is_refused_before_it_is_inflated(code: str, bomb: bytes):
    layout = layout_of((1000, 1000))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"the mask's|expected none"):
        decoded(layout, code, bomb)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * 2**20


def test_the_longest_gaps_that_can_be_true_take_a_few_bytes_for_each_entry():
    layout = layout_of((8 * 2**20,))
    data = stored(bytes(layout.prunable_size))
    tracemalloc.start()
    assert mask_bits.decode(layout, "gaps", data) == b"\xff" * 2**20
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 * layout.prunable_size


@pytest.mark.parametrize("code", ["gaps", "difference"])
@pytest.mark.parametrize(
    "gaps", [[41], [0, 40], [0] * 42, [254], [255], [40, 255]], ids=["41", "42nd", "42 kept", "254", "skip", "end"]
)
def test_gaps_beyond_the_last_entry_are_refused(code: str, gaps: list[int]):
    with pytest.raises(ValueError, match=r"beyond the 41 entries|do not hold"):
        decoded(LAYOUT, code, stored(bytes(gaps)))


def test_the_last_entry_can_be_kept():
    assert mask_bits.decode(LAYOUT, "gaps", stored(bytes([40]))) == bytes([0, 0, 0, 0, 0, 0x80])


@pytest.mark.parametrize(
    ("code", "data"),
    [("bitmap", bytes([0, 0, 0, 0, 0, 0x40])), *(("units", bytes([*[0] * i, 1, *[0] * (3 - i)])) for i in range(4))],
)
def test_unused_bits_that_are_set_are_refused(code: str, data: bytes):
    with pytest.raises(ValueError, match="unused bits"):
        decoded(LAYOUT, code, stored(data))


def test_a_full_mask_with_data_is_refused():
    with pytest.raises(ValueError, match="expected none"):
        mask_bits.decode(LAYOUT, "full", stored(b""))


@pytest.mark.parametrize("encoding", ["", "raw", "zlib", "difference", "FULL", "x" * 10**6])
def test_an_unknown_encoding_is_refused_and_not_quoted_at_length(encoding: str):
    with pytest.raises(ValueError, match="must be one of full, bitmap, gaps, units") as error:
        mask_bits.decode(LAYOUT, encoding, b"")
    assert len(str(error.value)) < 100


def test_a_layout_of_huge_empty_arrays_does_not_make_units_allocate():
    layout = layout_of((2**40, 0), (0, 2**40), (2, 2))
    assert mask_bits.decode(layout, "units", stored(bytes([0x80, 0x40]))) == bytes([0x40])


# inflate


def test_inflate_gives_up_to_the_limit():
    data = stored(b"12345")
    assert mask_bits.inflate(data, 5, "x", exact=True) == mask_bits.inflate(data, 99, "x", exact=False) == b"12345"
    assert mask_bits.inflate(stored(b""), 0, "x", exact=True) == b""
    for limit, exact in [(4, True), (4, False), (6, True), (0, False)]:
        with pytest.raises(ValueError, match=r"the thing: .* do not hold what is expected"):
            mask_bits.inflate(data, limit, "the thing", exact=exact)
