"""The wire format is what ``golden/wire-<format>.json`` holds, byte for byte, and what ``docs/wire.md`` says.

A change of the format takes a new number and a new file: ``python -m tests.wire.test_golden_bytes`` writes it. What is
compressed is compared as it was before, since builds of zlib differ in what they make of it.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord

from autoflip_flwr.core.choices import VALUES
from autoflip_flwr.core.layout import ArraySpec, Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.request import Request
from autoflip_flwr.wire import mask_record
from autoflip_flwr.wire.base_record import base_digest, check_base, decode_base, encode_base
from autoflip_flwr.wire.keys import FORMAT, HEADER
from autoflip_flwr.wire.mask_change import CHANGES
from autoflip_flwr.wire.messages import make_header, pack_deltas, pack_values, read_header, unpack_deltas, unpack_values
from autoflip_flwr.wire.records import fingerprint, make_array
from autoflip_flwr.wire.request import pack_statistics, read_ask, unpack_statistics

FILE = Path(__file__).parents[1] / "golden" / f"wire-{FORMAT}.json"
WHOLE = ("full", "bitmap", "gaps", "units")
MASKS = (*WHOLE, *CHANGES)  # the changes are from "bitmap"
HEX = "hex:"
ASK = ["gradient pruned float32", "saliency all log8", "mine kept float32"]


def asked() -> tuple[Request, ...]:
    return read_ask({"ask": ASK})


def read(thing: Any) -> Any:
    """A part of the file, its bytes as bytes."""
    if isinstance(thing, dict):
        return {key: read(value) for key, value in thing.items()}
    if isinstance(thing, list):
        return [read(value) for value in thing]
    return bytes.fromhex(thing[len(HEX) :]) if isinstance(thing, str) and thing.startswith(HEX) else thing


def encode(plain: dict[str, Any]) -> dict[str, Any]:
    """What the code makes of the file's plain values."""
    layout = Layout(tuple(ArraySpec(name, tuple(shape), *rest) for name, shape, *rest in plain["layout"]))
    masks = {
        name: Mask(layout, np.packbits(np.array(list(keep), "u1")).tobytes(), version=3)
        for name, keep in plain["keep"].items()
    }
    packed = {spec.name: np.array(plain["packed"][spec.name], spec.dtype) for spec in layout.specs}
    values = {kind: pack_values(masks["bitmap"], packed, kind) for kind in VALUES}
    moves = {name: np.array(array, "f4").reshape(layout[name].shape) for name, array in plain["moves"].items()}
    base = {
        name: np.array(array, layout[name].dtype).reshape(layout[name].shape) for name, array in plain["base"].items()
    }
    told = {request.name: moves for request in asked()}
    records = {
        name: mask_record.encode_mask(mask, None if name in WHOLE else masks["bitmap"]) for name, mask in masks.items()
    }
    own = ("format", "phase", "round")
    headers = [
        make_header(head["phase"], head["round"], **{key: head[key] for key in head if key not in own})
        for head in plain["headers"]
    ]
    long = ArrayRecord({"uint8": make_array([np.arange(20_000).astype(np.uint8)])})
    return {
        "header_bytes": [head.deflate() for head in headers],
        "digests": {name: mask.digest for name, mask in masks.items()},
        "masks": {name: dict(record) for name, record in records.items()},
        "values": {kind: {key: array.data for key, array in record.items()} for kind, record in values.items()},
        "move_bytes": {key: array.data for key, array in pack_deltas(masks["full"], moves).items()},
        "fingerprints": {"int8": fingerprint(values["int8"]), "long": fingerprint(long)},
        "base_bytes": {key: array.data for key, array in encode_base(layout, base).items()},
        "base_digest": base_digest(layout, base),
        "statistics": {name: array.data for name, array in pack_statistics(masks["bitmap"], asked(), told).items()},
    }


# --- this code reads and writes the golden bytes ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return read(json.loads(FILE.read_text("utf-8")))


@pytest.fixture(scope="module")
def encoded(golden) -> dict[str, Any]:
    return encode(golden)


@pytest.fixture(scope="module")
def masks(golden) -> dict[str, Mask]:
    found: dict[str, Mask] = {}
    for name in MASKS:
        found[name] = mask_record.decode_mask(ConfigRecord(golden["masks"][name]), found.get("bitmap"))
    return found


def record_of(data: dict[str, bytes]) -> ArrayRecord:
    return ArrayRecord({key: Array(key, (), "numpy.ndarray", image) for key, image in data.items()})


def inflated(record: dict[str, Any]) -> dict[str, Any]:
    return {key: zlib.decompress(part) if isinstance(part, bytes) else part for key, part in record.items()}


def test_headers_are_the_golden_ones(golden, encoded):
    assert encoded["header_bytes"] == golden["header_bytes"]
    heads = [read_header({HEADER: ConfigRecord.inflate(data)}) for data in golden["header_bytes"]]
    assert [dict(head) for head in heads] == golden["headers"]


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_the_golden_ones(name, golden, encoded, masks):
    mask = masks[name]
    assert inflated(encoded["masks"][name]) == inflated(golden["masks"][name])
    assert [[s.name, list(s.shape), s.dtype, s.prunable] for s in mask.layout.specs] == golden["layout"]
    keep = np.concatenate([kept.reshape(-1) for kept in mask.keep.values()])
    assert "".join(map(str, keep.astype(int))) == golden["keep"][name]
    assert encoded["digests"][name] == mask.digest == golden["digests"][name]
    assert (golden["masks"][name]["encoding"], mask.version) == (name, 3)


@pytest.mark.parametrize("kind", VALUES)
def test_values_are_the_golden_ones(kind, golden, encoded, masks):
    assert encoded["values"][kind] == golden["values"][kind]
    packed = unpack_values(masks["bitmap"], record_of(golden["values"][kind]), kind)
    assert {name: array.tolist() for name, array in packed.items()} == golden["packed"]
    assert [array.dtype.name for array in packed.values()] == [row[2] for row in golden["layout"]]


def test_moves_are_the_golden_ones(golden, encoded, masks):
    for data in (golden["move_bytes"], encoded["move_bytes"]):
        moves = unpack_deltas(masks["full"], record_of(data))
        assert list(moves) == ["conv.weight", "fc.weight", "fc.bias", "half.weight"]
        for name, array in moves.items():
            np.testing.assert_allclose(
                array.reshape(-1), golden["moves"][name], rtol=1e-5 * masks["full"].layout[name].prunable
            )


def test_fingerprints_are_the_golden_ones(golden, encoded):
    assert encoded["fingerprints"] == golden["fingerprints"]


def test_the_base_is_the_golden_one(golden, encoded, masks):
    assert encoded["base_bytes"] == golden["base_bytes"]
    assert encoded["base_digest"] == golden["base_digest"]
    layout = masks["bitmap"].layout
    base = decode_base(layout, record_of(golden["base_bytes"]))
    assert {name: array.reshape(-1).tolist() for name, array in base.items()} == golden["base"]
    check_base(layout, record_of(golden["base_bytes"]), golden["base_digest"])


# --- a reader that is written from docs/wire.md alone, in plain Python -----------------------------------------------


def payload(image: bytes) -> bytes:
    return image[10 + struct.unpack("<H", image[8:10])[0] :]


def in_the_order_of_the_wire(golden: dict[str, Any], dtype: str) -> list[list[Any]]:
    return sorted((row for row in golden["layout"] if row[2] == dtype), key=lambda row: not row[3])


def quoted(name: str) -> str:
    short = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    units = [unit for (unit,) in struct.iter_unpack("<H", name.encode("utf-16-le"))]
    return f'"{"".join(short.get(chr(u)) or (chr(u) if 32 <= u < 127 else f"{chr(92)}u{u:04x}") for u in units)}"'


def test_the_page_is_enough_for_a_mask_and_its_digest(golden):
    record = golden["masks"]["gaps"]
    layout = json.loads(zlib.decompress(record["layout"]))
    keep, position = ["0"] * sum(math.prod(shape) for _, shape, _, prunable in layout if prunable), 0
    for byte in zlib.decompress(record["bits"]):
        position += byte
        if byte < 255:
            keep[position] = "1"
            position += 1
    assert "".join(keep) == golden["keep"]["gaps"]
    bits = "".join(keep) + "0" * (-len(keep) % 8)
    rows = [
        f'[{quoted(name)}, [{", ".join(map(str, shape))}], "{dtype}", {("false", "true")[prunable]}]'
        for name, shape, dtype, prunable in layout
    ]
    data = f"[{', '.join(rows)}]".encode("ascii") + b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    assert hashlib.sha256(data).hexdigest() == golden["digests"]["gaps"]


def test_the_page_is_enough_for_what_is_dropped(golden):
    kept = [i for i, flag in enumerate(golden["keep"]["bitmap"]) if flag == "1"]
    for name in ("dropped-gaps", "dropped-bitmap"):
        record, dropped = golden["masks"][name], set()
        data = zlib.decompress(record["bits"])
        if name == "dropped-bitmap":
            dropped = {i for i in range(len(kept)) if data[i // 8] >> 7 - i % 8 & 1}
        else:
            position = 0
            for byte in data:
                position += byte
                if byte < 255:
                    dropped.add(position)
                    position += 1
        left = {at for i, at in enumerate(kept) if i not in dropped}
        assert "".join("01"[i in left] for i in range(len(golden["keep"][name]))) == golden["keep"][name]
        assert record.keys() == {"encoding", "base", "bits", "version"}
        assert record["base"] == golden["digests"]["bitmap"]


def test_statistics_are_the_golden_ones(golden, encoded, masks):
    mask = masks["bitmap"]
    for data in (golden["statistics"], encoded["statistics"]):
        found = unpack_statistics(mask, asked(), record_of(data))
        for request in asked():
            for name, keep in mask.keep.items():
                wanted = {"all": True, "kept": keep, "pruned": ~keep}[request.over]
                expected = np.where(wanted, np.array(golden["moves"][name]).reshape(keep.shape), 0)
                np.testing.assert_allclose(found[request.name][name], expected, rtol=1e-5)


def test_the_page_is_enough_for_statistics(golden):
    keep = [flag == "0" for flag in golden["keep"]["bitmap"]]
    moves = [value for name, _, _, prunable in golden["layout"] if prunable for value in golden["moves"][name]]
    data = payload(golden["statistics"]["gradient"])
    pruned = [value for value, wanted in zip(moves, keep, strict=True) if wanted]
    np.testing.assert_allclose(struct.unpack(f"<{len(pruned)}f", data), pruned, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_page_is_enough_for_8_bit_values(dtype, golden):
    rows = in_the_order_of_the_wire(golden, dtype)
    kept = sum(len(golden["packed"][name]) for name, _, _, prunable in rows if prunable)
    blocks, data = -(-kept // 256), payload(golden["values"]["int8"][dtype])
    scales = struct.unpack(f"<{blocks}f", data[: 4 * blocks])
    codes = struct.unpack(f"{kept}b", data[len(data) - kept :])
    others = [data[at : at + 2] for at in range(4 * blocks, len(data) - kept, 2)]
    values = [scales[i // 256] * code for i, code in enumerate(codes)]
    values += [struct.unpack("<f", b"\0\0" + half)[0] for half in others]
    assert values == [value for name, *_ in rows for value in golden["packed"][name]]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64"])
def test_the_page_is_enough_for_moves(dtype, golden):
    rows = in_the_order_of_the_wire(golden, dtype) if dtype.startswith("float") else []
    data = payload(golden["move_bytes"][dtype])
    head = 8 * sum(prunable for *_, prunable in rows)
    ranges, whole = struct.iter_unpack("<2f", data[:head]), zlib.decompress(data[head:])
    for name, shape, _, prunable in rows:
        form = f"<{math.prod(shape)}{'b' if prunable else 'f'}"
        own, whole = struct.unpack(form, whole[: struct.calcsize(form)]), whole[struct.calcsize(form) :]
        if prunable:
            top, step = next(ranges)
            own = [math.copysign(top * math.exp((abs(k) - 127) * step), k) if k else 0.0 for k in own]
            np.testing.assert_allclose(own, golden["moves"][name], rtol=1e-5)
        else:
            assert list(own) == golden["moves"][name]
    assert not whole
    assert not list(ranges)


def test_the_page_is_enough_for_a_base_and_its_digest(golden):
    digest, data = hashlib.sha256(), {}
    for dtype, form in (("float32", "f"), ("float16", "e")):
        whole = payload(golden["base_bytes"][dtype])
        for name, shape, _, prunable in in_the_order_of_the_wire(golden, dtype):
            if prunable:
                size = math.prod(shape) * struct.calcsize(form)
                data[name], whole = whole[:size], whole[size:]
                assert list(struct.unpack(f"<{math.prod(shape)}{form}", data[name])) == golden["base"][name]
        assert not whole
    for name, shape, dtype, prunable in golden["layout"]:
        if prunable:
            sizes = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
            digest.update(f"{name} {dtype} ({sizes})\n".encode() + data[name])
    assert digest.hexdigest() == golden["base_digest"]


def test_the_page_is_enough_for_a_fingerprint(golden):
    found = 0
    for image in golden["values"]["int8"].values():
        found = zlib.crc32(image[:: len(image) // 4096 | 1], found)
    assert found == golden["fingerprints"]["int8"]
    text = b"{'descr': '|u1', 'fortran_order': False, 'shape': (20000,), }".ljust(117) + b"\n"
    image = b"\x93NUMPY\1\0" + struct.pack("<H", 118) + text + bytes(i % 256 for i in range(20_000))
    assert zlib.crc32(image[:: len(image) // 4096 | 1]) == golden["fingerprints"]["long"]


# --- the file --------------------------------------------------------------------------------------------------------


def plain() -> dict[str, Any]:
    """A tiny model, masks, values that every coding holds exactly, moves that lie on log8's codes, headers."""
    layout = [
        ["conv.weight", [4, 3, 2, 2], "float32", True],
        ["zähler", [], "int64", False],
        ["fc.bias", [20], "float32", False],
        ["fc.weight", [20, 16], "float32", True],
        ["half.weight", [2, 5], "float16", True],
    ]
    entry = np.arange(378)
    bitmap = entry % 7 != 3
    units = [np.zeros(shape, bool) for _, shape, _, prunable in layout if prunable]
    for array, rows, columns in zip(units, ([0, 2], range(10), [1]), ([0, 1], range(3, 16), [0, 2, 4]), strict=True):
        array[np.ix_(rows, columns)] = True
    keep = {
        "full": entry >= 0,
        "bitmap": bitmap,
        "gaps": np.isin(entry, [0, 5, 261, 262, 377]),  # 255 pruned entries between the second and the third
        "units": np.concatenate([array.reshape(-1) for array in units]),
        "difference": bitmap ^ np.isin(entry, [3, 100, 300]),
        "dropped-gaps": bitmap & ~np.isin(entry, [1, 302, 377]),  # 257 kept entries between the first two
        "dropped-bitmap": bitmap & (entry % 3 > 0),
    }
    conv, fc, half = (int(bitmap[start:stop].sum()) for start, stop in ((0, 48), (48, 368), (368, 378)))
    block = [(37 * i % 255 - 127) / 64 for i in range(256)]
    values = block + [value / 16 for value in block]  # the second block of int8 has another scale
    sizes = [0.5 * math.exp((k - 127) * 0.05) for k in (1, 1, 1, *range(4, 90, 2), 127)]
    column = [0.25 * math.exp((k - 127) * 0.03) for k in (1, 1, *range(60, 77), 127)]
    head, digest = {"format": FORMAT}, "0123456789abcdef" * 4
    asked = {"weight-key": "num-examples", "values": "bfloat16"}
    return {
        "layout": layout,
        "keep": {name: "".join(map(str, flags.astype(int))) for name, flags in keep.items()},
        "packed": {
            "conv.weight": values[:conv],
            "zähler": 2**40 + 3,
            "fc.bias": [(i - 10) / 8 for i in range(20)],
            "fc.weight": values[conv : conv + fc],
            "half.weight": values[:half],
        },
        "moves": {
            "conv.weight": [0.0, *(float(f"{size * (-1) ** i:.8g}") for i, size in enumerate(sizes))],
            "fc.bias": [0.25, -0.25] * 10,
            "fc.weight": [float(f"{move:.8g}") for size in column for move in (*[0.0] * 15, size)],
            "half.weight": [0.0] * 10,
        },
        "headers": [
            {**head, "phase": "hello", "round": 0},
            {**head, "phase": "hello", "round": 0, "partition": 4, "num-partitions": 10},
            {**head, "phase": "explore", "round": 0, **asked, "reply": "log8", "digest": digest, "version": 0},
            {**head, "phase": "train", "round": 7, **asked, "reply": "int8", "digest": digest, "version": 3},
            {**head, "phase": "train", "round": 7, "digest": digest, "fingerprint": 4023233417, "values": "int8"},
            {**head, "phase": "evaluate", "round": 7, "status": "mask-missing"},
            {**head, "phase": "hello", "round": 0, "base": "given"},
            {**head, "phase": "explore", "round": 0, "digest": digest, "version": 0, "base": digest[::-1]},
            {**head, "phase": "train", "round": 7, "digest": digest, "version": 3, "base": digest[::-1]},
            {**head, "phase": "train", "round": 7, "status": "base-missing"},
            {**head, "phase": "evaluate", "round": 7, "status": "mask-and-base-missing"},
            {**head, "phase": "explore", "round": 0, "reply": "none", "digest": digest, "ask": ["saliency all log8"]},
            {**head, "phase": "train", "round": 7, "digest": digest, "ask": ASK},
        ],
        "base": {
            "conv.weight": [(i % 31 - 15) / 16 for i in range(48)],
            "fc.weight": [(i % 63 - 31) / 32 for i in range(320)],
            "half.weight": [(i - 5) / 4 for i in range(10)],
        },
    }


def main() -> None:
    values = plain()
    parts = [
        f'"{name}": {json.dumps(part, ensure_ascii=False, default=lambda data: HEX + data.hex())}'
        for name, part in (values | encode(values)).items()
    ]
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text("{\n" + ",\n".join(parts) + "\n}\n", "utf-8")


if __name__ == "__main__":
    main()
