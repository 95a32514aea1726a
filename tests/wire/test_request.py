"""Statistics on the wire: what is asked for comes back, exactly or nearly, and nothing else is believed."""

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from autoflip_flwr.core.layout import Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.request import Request
from autoflip_flwr.wire.records import WireError, make_array
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
