"""Statistics on the wire: what is asked for comes back, exactly or nearly, and nothing else is believed."""

import zlib

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from autoflip_flwr.core.layout import Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.request import Request
from autoflip_flwr.wire.mask_bits import encode_flags
from autoflip_flwr.wire.records import WireError, make_array, view_of
from autoflip_flwr.wire.request import ask_entry, pack_statistics, read_ask, to_report, unpack_statistics

MODEL = {
    "w": np.zeros((3, 4), np.float32),
    "b": np.zeros(3, np.float32),
    "v": np.zeros((2, 2), np.float64),
    "n": np.array(1),
}
LAYOUT = Layout.of(MODEL)
MASK = Mask.from_bool(LAYOUT, {"w": np.arange(12).reshape(3, 4) % 3 == 0, "v": np.ones((2, 2), bool)})
FOUND = {"w": np.arange(12.0).reshape(3, 4) - 5, "v": np.array([[1.0, -2], [3, 0]])}


def asked(over: str, code: str = "float32") -> tuple[Request, ...]:
    return (Request("gradient", over, code),)


@pytest.mark.parametrize("over", ["all", "kept", "pruned"])
@pytest.mark.parametrize("code", ["float32", "log8"])
def test_what_is_asked_for_comes_back_and_zero_elsewhere(over: str, code: str):
    record = pack_statistics(MASK, asked(over, code), {"gradient": FOUND})
    found = unpack_statistics(MASK, asked(over, code), record)["gradient"]
    for name, values in FOUND.items():
        wanted = {"all": True, "kept": MASK.keep[name], "pruned": ~MASK.keep[name]}[over]
        expected = np.where(wanted, values, 0)
        np.testing.assert_allclose(found[name], expected, rtol=0.05 if code == "log8" else 0)
        assert found[name].dtype == np.float32


def test_bytes_are_those_of_the_entries_alone():
    sizes = {
        over: len(pack_statistics(MASK, asked(over), {"gradient": FOUND})["gradient"].data) - 128
        for over in ("all", "kept", "pruned")
    }
    assert sizes == {"all": 4 * 16, "kept": 4 * 8, "pruned": 4 * 8}


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_mask_and_any_values_come_back(data: st.DataObject):
    keep = {
        name: np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n))) for name, n in (("w", 12), ("v", 4))
    }
    mask = Mask.from_bool(LAYOUT, {name: flags.reshape(MODEL[name].shape) for name, flags in keep.items()})
    values = {
        name: np.array(
            data.draw(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=n, max_size=n)), np.float32
        )
        for name, n in (("w", 12), ("v", 4))
    }
    full = {name: each.reshape(MODEL[name].shape) for name, each in values.items()}
    over = data.draw(st.sampled_from(["all", "kept", "pruned"]))
    found = unpack_statistics(mask, asked(over), pack_statistics(mask, asked(over), {"gradient": full}))["gradient"]
    for name, each in full.items():
        wanted = {"all": True, "kept": mask.keep[name], "pruned": ~mask.keep[name]}[over]
        assert found[name].tobytes() == np.where(wanted, each, np.float32(0)).tobytes()


def test_deltas_need_no_report():
    requests = (Request("delta"), Request("saliency", "all"))
    assert to_report(requests) == (Request("saliency", "all"),)
    assert list(pack_statistics(MASK, requests, {"saliency": FOUND})) == ["saliency"]


def test_the_header_tells_what_is_asked():
    requests = (Request("gradient", "pruned", "float32"), Request("saliency", "all"))
    entry = ask_entry(requests)
    assert entry == {"ask": ["gradient pruned float32", "saliency all log8"]}
    assert read_ask(ConfigRecord(entry)) == requests
    assert ask_entry(()) == {}
    assert read_ask({}) == ()


@pytest.mark.parametrize(
    "ask",
    [
        "gradient all log8",
        ["gradient all"],
        ["gradient  all log8"],
        ["gradient all log8 more"],
        ["gradient most log8"],
        ["gradient all int8"],
        [" all log8"],
        ["g" * 65 + " all log8"],
        ["gradient all log8", "gradient kept log8"],
        [f"s{i} all log8" for i in range(17)],
        [1, 2],
        [b"gradient all log8"],
        7,
    ],
)
def test_another_header_is_refused(ask: object):
    with pytest.raises(WireError):
        read_ask({"ask": ask})


GOOD = pack_statistics(MASK, asked("kept"), {"gradient": FOUND})


@pytest.mark.parametrize(
    "record",
    [
        None,
        ConfigRecord(),
        ArrayRecord(),
        ArrayRecord({**GOOD, "more": GOOD["gradient"]}),
        ArrayRecord({"other": GOOD["gradient"]}),
        ArrayRecord({"gradient": make_array([np.zeros(7, np.float32)])}),
        ArrayRecord({"gradient": make_array([np.zeros(9, np.float32)])}),
        ArrayRecord({"gradient": make_array([np.zeros(8, np.float64)])}),
        ArrayRecord({"gradient": make_array([np.full(8, np.nan, np.float32)])}),
        ArrayRecord({"gradient": make_array([np.full(8, np.inf, np.float32)])}),
        ArrayRecord({"gradient": make_array([np.full(8, 2e36, np.float32)])}),
        ArrayRecord({"gradient": make_array([np.zeros((2, 4), np.float32)], (2, 4))}),
    ],
)
@pytest.mark.parametrize("code", ["float32", "log8"])
def test_another_record_is_refused(record: object, code: str):
    with pytest.raises(WireError):
        unpack_statistics(MASK, asked("kept", code), record)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e37])
@pytest.mark.parametrize("code", ["float32", "log8"])
def test_what_is_not_finite_is_not_packed(value: float, code: str):
    bad = {name: array.copy() for name, array in FOUND.items()}
    bad["w"][0, 0] = value
    with pytest.raises(WireError, match="statistic 'gradient'"):
        pack_statistics(MASK, asked("kept", code), {"gradient": bad})
    bad = {name: array.copy() for name, array in FOUND.items()}
    bad["w"][0, 1] = value  # nobody asks for it
    pack_statistics(MASK, asked("kept", code), {"gradient": bad})


# --- top entries ----------------------------------------------------------------------------------------------------


def top(over: str, code: str, share: float = 0.5) -> tuple[Request, ...]:
    return (Request("gradient", over, code, share),)


@pytest.mark.parametrize("code", ["float32", "log8", "places"])
def test_the_largest_entries_come_back_and_no_others(code: str):
    # w keeps 4 entries and prunes 8, v keeps 4: half of the kept ones is 2 of each
    expected = {
        "all": {"w": [0, 11], "v": [1, 2]},
        "kept": {"w": [0, 9], "v": [1, 2]},
        "pruned": {"w": [10, 11], "v": []},
    }
    for over, places in expected.items():
        found = unpack_statistics(MASK, top(over, code), pack_statistics(MASK, top(over, code), {"gradient": FOUND}))[
            "gradient"
        ]
        for name, values in FOUND.items():
            assert np.flatnonzero(found[name]).tolist() == places[name]
            own = found[name].ravel()[places[name]]
            whole = np.ones(len(places[name])) if code == "places" else values.ravel()[places[name]]
            np.testing.assert_allclose(own, whole, rtol=0.05 if code == "log8" else 0)


def test_of_equal_entries_the_earlier_are_taken():
    same = {name: np.ones_like(values) for name, values in FOUND.items()}
    found = unpack_statistics(
        MASK, top("all", "float32"), pack_statistics(MASK, top("all", "float32"), {"gradient": same})
    )
    assert np.flatnonzero(found["gradient"]["w"]).tolist() == [0, 1]


def test_top_entries_cost_their_places_and_a_byte_each():
    model = {"w": np.zeros((300, 400), np.float32)}
    draw = np.random.default_rng(0)
    mask = Mask.from_bool(Layout.of(model), {"w": draw.random((300, 400)) < 0.1})
    found = {"gradient": {"w": draw.normal(size=(300, 400)).astype(np.float32)}}
    sizes = {
        code: len(pack_statistics(mask, top("pruned", code, 0.1), found)["gradient"].data) - 128
        for code in ("places", "log8", "float32")
    }
    number, among = -(-mask.kept // 10), 120_000 - mask.kept
    share = number / among
    entropy = among * -(share * np.log2(share) + (1 - share) * np.log2(1 - share)) / 8
    assert entropy < sizes["places"] < 1.1 * entropy + 40
    assert sizes["log8"] <= sizes["places"] + number + 40
    assert sizes["float32"] == sizes["places"] + 4 * number


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_share_of_any_mask_comes_back(data: st.DataObject):
    keep = {
        name: np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n))) for name, n in (("w", 12), ("v", 4))
    }
    mask = Mask.from_bool(LAYOUT, {name: flags.reshape(MODEL[name].shape) for name, flags in keep.items()})
    share, over = data.draw(st.integers(1, 10**6 - 1)) / 10**6, data.draw(st.sampled_from(["all", "kept", "pruned"]))
    (request,) = asking = read_ask(
        ask_entry(top(over, data.draw(st.sampled_from(["float32", "log8", "places"])), share))
    )
    assert request.top == share
    found = unpack_statistics(mask, asking, pack_statistics(mask, asking, {"gradient": FOUND}))["gradient"]
    for name, own in keep.items():
        size = {"all": own.size, "kept": own.sum(), "pruned": own.size - own.sum()}[over]
        assert np.count_nonzero(found[name]) <= min(size, -(-own.sum() * round(share * 10**6) // 10**6))


def test_a_share_is_told_in_the_header():
    requests = (Request("gradient", "pruned", "log8", 0.000001), Request("mine", "kept", "places", 0.25))
    assert ask_entry(requests) == {"ask": ["gradient pruned log8 0.000001", "mine kept places 0.25"]}
    assert read_ask(ask_entry(requests)) == requests


@pytest.mark.parametrize(
    "text",
    [
        "gradient all log8 1",
        "gradient all log8 1.0",
        "gradient all log8 0",
        "gradient all log8 0.0",
        "gradient all log8 0.",
        "gradient all log8 .5",
        "gradient all log8 0.1234567",
        "gradient all log8 -0.5",
        "gradient all log8 5e-1",
        "gradient all log8 0.5 ",
        "gradient all log8 0.5\n",
        "gradient all log8 0.\u0665",
        "gradient all log8 nan",
        "gradient all log8 0.5 0.5",
        "gradient all places",
        "gradient all places 1",
    ],
)
def test_another_share_is_refused(text: str):
    with pytest.raises(WireError, match="perhaps a share below 1 of at most 6 decimals"):
        read_ask({"ask": [text]})


def bad_tops(code: str) -> dict[str, bytes]:
    good = bytes(view_of(pack_statistics(MASK, top("all", code), {"gradient": FOUND})["gradient"], "uint8").data)
    length = int.from_bytes(good[:4], "little")
    places, values = good[4 : 4 + length], good[4 + length :]

    def framed(places: bytes, values: bytes, more: int = 0) -> bytes:
        return (len(places) + more).to_bytes(4, "little") + places + values

    def flags(*indices: int) -> bytes:
        found = np.zeros(16, bool)
        found[list(indices)] = True
        return encode_flags(found)

    return {
        "empty": b"",
        "three bytes": good[:3],
        "places beyond the end": framed(places, values, more=len(values) + 1),
        "a length of 4 GB": b"\xff\xff\xff\xff" + good[4:],
        "a bomb": framed(zlib.compress(bytes(2**20)), values),
        "gaps beyond the entries": framed(zlib.compress(bytes([17, 0, 0, 0])), values),
        "one place too few": framed(flags(0, 11, 13), values),
        "one place too many": framed(flags(0, 3, 11, 13, 14), values),
        "places in another array": framed(flags(0, 13, 14, 15), values),
        "garbage behind": good + b"x",
        **({} if code == "places" else {"a byte short": good[:-1], "no values": framed(places, b"")}),
        **(
            {
                "nan": framed(places, np.array([1, 2, 3, np.nan], "<f4").tobytes()),
                "infinity": framed(places, np.array([1, 2, 3, np.inf], "<f4").tobytes()),
                "too large": framed(places, np.array([1, 2, 3, 2e36], "<f4").tobytes()),
            }
            if code == "float32"
            else {}
        ),
    }


@pytest.mark.parametrize(
    ("code", "what"), [(code, what) for code in ("float32", "log8", "places") for what in bad_tops(code)]
)
def test_other_top_entries_are_refused(code: str, what: str):
    record = ArrayRecord({"gradient": make_array([np.frombuffer(bad_tops(code)[what], np.uint8)])})
    with pytest.raises(WireError, match="statistic 'gradient'"):
        unpack_statistics(MASK, top("all", code), record)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e37])
@pytest.mark.parametrize("code", ["float32", "log8", "places"])
def test_top_entries_that_are_not_finite_are_not_packed(value: float, code: str):
    bad = {name: array.copy() for name, array in FOUND.items()}
    bad["w"][0, 1] = value
    with pytest.raises(WireError, match="statistic 'gradient'"):
        pack_statistics(MASK, top("all", code), {"gradient": bad})
    pack_statistics(MASK, top("kept", code), {"gradient": bad})  # nobody asks for it
