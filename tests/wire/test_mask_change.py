import tracemalloc
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_mask_bits import DENSITIES, entropy_bytes, layout_of, mask_of, masks, quick, random_mask, stored

from autoflip_flwr.core.mask import Mask
from autoflip_flwr.wire import mask_bits
from autoflip_flwr.wire.mask_change import CHANGES, decode_change, encode_change

DROPPED = CHANGES[1:]


def both(mask: Mask, other: Mask) -> Mask:
    """The entries that both masks keep."""
    return Mask(mask.layout, bytes(a & b for a, b in zip(mask.bits, other.bits, strict=True)))


# What travels


def test_what_is_dropped_is_told_among_the_kept_entries_as_gaps_where_it_is_little():
    base = mask_of(*[1, 0] * 300)
    mask = mask_of(*[int(i % 2 == 0 and i not in (4, 10, 522, 598)) for i in range(600)])  # the kept 2, 5, 261, 299
    encoding, data = encode_change(mask, base)
    assert (encoding, list(zlib.decompress(data))) == ("dropped-gaps", [2, 2, 255, 0, 37])
    assert decode_change(base, encoding, data) == mask.bits


def test_what_is_dropped_is_told_among_the_kept_entries_as_bits_where_it_is_more():
    base, mask = mask_of(1, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1), mask_of(1, 0, 0, 1, 0, 1, 1, 1, 1, 1, 0, 1)
    encoding, data = encode_change(mask, base)
    assert (encoding, zlib.decompress(data)) == ("dropped-bitmap", bytes([0b0100_0000, 0b1000_0000]))
    assert decode_change(base, encoding, data) == mask.bits


def test_a_difference_is_the_gaps_of_what_changed_where_something_is_added():
    one, other = mask_of(1, 0, 1, 1, 0), mask_of(1, 1, 1, 0, 0)
    encoding, data = encode_change(one, other)
    assert (encoding, zlib.decompress(data)) == ("difference", bytes([1, 1]))
    assert decode_change(other, "difference", stored(bytes([1, 1]))) == one.bits


@pytest.mark.parametrize("flags", [(), (0, 0), (1, 0, 1)])
def test_no_change_takes_no_data(flags: tuple[int, ...]):
    encoding, data = encode_change(mask_of(*flags), mask_of(*flags))
    assert (encoding, zlib.decompress(data)) == ("dropped-gaps", b"")


def test_the_change_of_masks_of_other_layouts_is_refused():
    with pytest.raises(ValueError, match="same layout"):
        encode_change(Mask.full(layout_of((2, 3))), Mask.full(layout_of((3, 2))))


# There and back


@quick
@given(base=masks(), seed=st.integers(0, 999), density=st.sampled_from(DENSITIES))
def test_any_change_leads_from_one_mask_to_the_other(base: Mask, seed: int, density: float):
    mask = random_mask(base.layout, density, seed)
    assert decode_change(base, *encode_change(mask, base)) == mask.bits
    fewer = both(mask, base)
    encoding, data = encode_change(fewer, base)
    assert encoding in DROPPED
    assert decode_change(base, encoding, data) == fewer.bits


# The size


@pytest.mark.parametrize("share", [0.01, 0.02, 0.05, 0.1, 0.12, 0.13, 0.2, 0.3, 0.4, 0.5, 0.6, 0.9])
@pytest.mark.parametrize("density", [1.0, 0.2])
def test_what_is_dropped_costs_its_entropy_over_the_kept_entries(share: float, density: float):
    base = random_mask(layout_of((1000, int(200 / density))), density, 0)
    mask = both(base, random_mask(base.layout, 1 - share, 1))
    dropped = 1 - mask.kept / base.kept
    encoding, data = encode_change(mask, base)
    assert encoding == ("dropped-gaps" if share < 1 / 8 else "dropped-bitmap")
    assert len(data) <= 1.03 * entropy_bytes(base.kept, dropped) + 50


@pytest.mark.parametrize("share", [0.005, 0.01, 0.02, 0.1])
def test_a_difference_costs_what_has_changed(share: float):
    base = random_mask(layout_of((400, 500)), 0.3, 0)
    changed = random_mask(base.layout, share, 1)
    mask = Mask(base.layout, bytes(a ^ b for a, b in zip(base.bits, changed.bits, strict=True)))
    encoding, data = encode_change(mask, base)
    assert encoding == "difference"
    assert len(data) <= 1.05 * entropy_bytes(200_000, share) + 50


def test_layers_that_lose_different_shares_cost_less_than_all_alike():
    base = Mask.full(layout_of((400, 500), (400, 500)))
    keep = {"a0": random_mask(base.layout, 0.99, 1).keep["a0"], "a1": random_mask(base.layout, 0.7, 1).keep["a1"]}
    mask = Mask.from_bool(base.layout, keep)
    assert len(encode_change(mask, base)[1]) <= 0.9 * entropy_bytes(base.kept, mask.density)


# Hostile senders


BASE = random_mask(layout_of((3, 5, 2), (4, 1), (7,)), 0.5, 1)


@quick
@given(base=masks(), encoding=st.sampled_from(CHANGES), data=st.binary(max_size=60), packed=st.booleans())
def test_any_bytes_give_a_mask_or_a_value_error(base: Mask, encoding: str, data: bytes, packed: bool):
    with suppress(ValueError):
        mask = Mask(base.layout, decode_change(base, encoding, stored(data) if packed else data))
        if encoding in DROPPED:
            assert both(mask, base) == mask


@pytest.mark.parametrize("gaps", [[BASE.kept], [0] * (BASE.kept + 1), [255], [BASE.kept - 1, 0]])
def test_what_leads_beyond_the_kept_entries_is_refused(gaps: list[int]):
    with pytest.raises(ValueError, match=rf"beyond the {BASE.kept} entries|do not hold"):
        decode_change(BASE, "dropped-gaps", stored(bytes(gaps)))
    last = Mask(BASE.layout, decode_change(BASE, "dropped-gaps", stored(bytes([BASE.kept - 1]))))
    assert last.kept == BASE.kept - 1


def test_unused_bits_that_are_set_are_refused():
    assert BASE.kept % 8
    with pytest.raises(ValueError, match="unused bits"):
        decode_change(BASE, "dropped-bitmap", stored(b"\xff" * -(-BASE.kept // 8)))


def test_a_mask_that_keeps_nothing_can_lose_nothing():
    empty = Mask(BASE.layout, bytes(len(BASE.bits)))
    for encoding in DROPPED:
        assert decode_change(empty, encoding, stored(b"")) == empty.bits
        with pytest.raises(ValueError, match="do not hold"):
            decode_change(empty, encoding, stored(b"\0"))


@pytest.mark.parametrize("encoding", ["", "dropped", "gaps", "full", "x" * 10**6])
def test_an_unknown_encoding_is_refused_and_not_quoted_at_length(encoding: str):
    with pytest.raises(ValueError, match="must be one of difference, dropped-gaps, dropped-bitmap") as error:
        decode_change(BASE, encoding, stored(b""))
    assert len(str(error.value)) < 100


@pytest.mark.parametrize("encoding", DROPPED)
def test_the_most_that_can_be_dropped_takes_a_few_bytes_for_each_entry(encoding: str):
    base = Mask.full(layout_of((8 * 2**20,)))
    data = stored(bytes(2**23) if encoding == "dropped-gaps" else b"\xff" * 2**20)
    tracemalloc.start()
    assert decode_change(base, encoding, data) == bytes(2**20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 * 2**23


def test_a_bomb_is_bounded_by_what_the_other_mask_keeps():
    base = random_mask(layout_of((1000, 1000)), 0.01, 0)
    bomb = stored(bytes(2**25))
    tracemalloc.start()
    for encoding in DROPPED:
        with pytest.raises(ValueError, match="do not hold"):
            decode_change(base, encoding, bomb)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * 2**20


def test_gaps_are_taken_up_to_the_share_where_a_bitmap_is_as_small():
    base = Mask.full(layout_of((100_000,)))
    for share in (mask_bits.GAPS_AT_MOST - 0.03, mask_bits.GAPS_AT_MOST + 0.03):
        flags = np.unpackbits(np.frombuffer(random_mask(base.layout, share, 1).bits, np.uint8)).view(bool)
        sizes = [
            len(data) for data in (mask_bits.encode_flags(flags), mask_bits.compress(np.packbits(flags).tobytes()))
        ]
        assert max(sizes) < 1.03 * min(sizes)
