"""What hostile peers may send. ``python tests/attacks/forge.py`` writes it to ``messages/`` and ``replies/``.

Each file is a whole message (or reply) that is well-formed but for one thing, which its name tells.
"""

from __future__ import annotations

import json
import math
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from records import to_json

from autoflip_flwr.core.choices import CODED, LOG8
from autoflip_flwr.core.layout import Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.wire import mask_record
from autoflip_flwr.wire.base_record import base_digest, encode_base
from autoflip_flwr.wire.keys import BASE_RECORD, EVALUATE, EXPLORE, FORMAT, GIVEN, HEADER, MASK_RECORD, TRAIN
from autoflip_flwr.wire.messages import make_header, pack_deltas, pack_values, value_entries, weight_entry
from autoflip_flwr.wire.records import fingerprint

FOLDER = Path(__file__).parent
MODEL = {
    "w": np.arange(16, dtype=np.float32).reshape(4, 4) / 16,
    "b": np.ones(4, np.float32),
    "n": np.array(3, np.int64),
    "on": np.array([True, False]),
}
LAYOUT = Layout.of(MODEL)
EVERYTHING = Mask.full(LAYOUT)
MASK = Mask.from_bool(LAYOUT, {"w": np.arange(16).reshape(4, 4) % 3 != 1}, version=1)
PACKED = MASK.gather(MODEL)
BASE = {"w": MODEL["w"] + 1}
OTHER = Mask.from_bool(LAYOUT, {"w": np.arange(16).reshape(4, 4) % 3 != 2}, version=2)

Record = ArrayRecord | ConfigRecord | MetricRecord


def message(phase: str = TRAIN, kind: str = "float32") -> RecordDict:
    """A well-formed message of the server."""
    exploring = phase == EXPLORE
    mask = EVERYTHING if exploring else MASK
    reply = LOG8 if exploring else kind
    head = make_header(
        phase, 0 if exploring else 1, mask, **weight_entry("num-examples"), **value_entries(values=kind, reply=reply)
    )
    config = ConfigRecord({"server-round": 1})
    values = pack_values(mask, mask.gather(MODEL), kind)
    return RecordDict({"arrays": values, "config": config, HEADER: head, MASK_RECORD: mask_record.encode_mask(mask)})


def with_base(content: RecordDict) -> RecordDict:
    """The message with what stands outside its mask."""
    named = alter(content, HEADER, base=base_digest(LAYOUT, BASE))
    return swap(named, BASE_RECORD, encode_base(LAYOUT, BASE))


def reply(phase: str = TRAIN, kind: str = "float32") -> RecordDict:
    """A well-formed reply to a message of the server."""
    metrics = MetricRecord({"num-examples": 10, "loss": 0.5})
    if phase == EVALUATE:
        return RecordDict({"metrics": metrics, HEADER: make_header(phase, 1, MASK)})
    if phase == EXPLORE:
        moves = {"w": np.full((4, 4), 0.5, np.float32), "b": np.full(4, -0.5, np.float32)}
        values = (
            pack_deltas(EVERYTHING, moves)
            if kind == LOG8
            else pack_values(EVERYTHING, {**MODEL, "w": MODEL["w"].ravel()})
        )
    else:
        values = pack_values(MASK, PACKED, kind)
    head = make_header(phase, int(phase == TRAIN), EVERYTHING if phase == EXPLORE else MASK)
    content = RecordDict({"arrays": values, "metrics": metrics, HEADER: head})
    return told(content, **value_entries(values=kind))


def told(content: RecordDict, **changes: Any) -> RecordDict:
    """The reply with the fingerprint of what it holds, so that the decoders see it."""
    values = content.array_records
    found = {"fingerprint": fingerprint(next(iter(values.values())))} if values else {}
    return alter(content, HEADER, **found, **changes)


def alter(content: RecordDict, key: str, **changes: Any) -> RecordDict:
    """A record's fields changed; dropped where they are ``None``."""
    old = content[key]
    fields = {name: value for name, value in {**old, **changes}.items() if value is not None}
    return swap(content, key, type(old)(fields))


def swap(content: RecordDict, key: str, record: Record | None) -> RecordDict:
    """A record replaced, or dropped."""
    records = {**content, key: record}
    return RecordDict({name: found for name, found in records.items() if found is not None})


def image(
    payload: bytes, descr: str = "<f4", shape: str = "(15,)", *, order: str = "False", magic: bytes = b"\x93NUMPY\1\0"
) -> bytes:
    """A NumPy file, written by hand."""
    head = f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    head += b" " * (-(len(head) + 11) % 64) + b"\n"
    return magic + struct.pack("<H", len(head)) + head + payload


def array(data: bytes, dtype: str = "float32", shape: tuple[int, ...] = (15,)) -> Array:
    return Array(dtype, shape, "numpy.ndarray", data)


FLOATS = np.concatenate([PACKED["w"], PACKED["b"]]).astype("<f4")
assert FLOATS.size == 15
GOOD = FLOATS.tobytes()
BOMB = zlib.compress(bytes(2**24), 9)
assert len(BOMB) < 2**15


def with_floats(content: RecordDict, floats: Array) -> RecordDict:
    return alter(content, "arrays", float32=floats)


def headers(good: RecordDict) -> dict[str, RecordDict]:
    """Headers that neither side takes."""
    changes: dict[str, dict[str, Any]] = {
        "format-of-another-version": {"format": FORMAT - 1},
        "format-a-float": {"format": float(FORMAT)},
        "format-a-bool": {"format": True},
        "format-a-list": {"format": [FORMAT]},
        "format-huge": {"format": 2**64 - 1},
        "format-missing": {"format": None},
        "phase-unknown": {"phase": "exec"},
        "phase-a-list": {"phase": ["train"]},
        "phase-bytes": {"phase": b"train"},
        "phase-of-10000-letters": {"phase": "train" * 2000},
        "round-a-float": {"round": 1.0},
        "round-a-bool": {"round": True},
        "round-text": {"round": "1"},
        "round-missing": {"round": None},
        "digest-missing": {"digest": None},
        "digest-bytes": {"digest": MASK.digest.encode()},
        "digest-a-list": {"digest": [MASK.digest]},
        "digest-of-another-mask": {"digest": OTHER.digest},
        "values-of-an-unknown-kind": {"values": "pickle"},
        "values-a-list": {"values": ["int8"]},
        "values-of-another-kind-than-they-are": {"values": "int8"},
        "values-of-the-kind-of-moves": {"values": "log8"},
        "base-bytes": {"base": base_digest(LAYOUT, BASE).encode()},
        "base-a-list": {"base": [base_digest(LAYOUT, BASE)]},
        "base-a-number": {"base": 1},
        "base-empty": {"base": ""},
        "base-given": {"base": GIVEN},
        "base-in-upper-case": {"base": base_digest(LAYOUT, BASE).upper()},
        "base-of-65-digits": {"base": base_digest(LAYOUT, BASE) + "0"},
        "base-of-10000-digits": {"base": "0" * 10_000},
    }
    found = {f"header-{name}": alter(good, HEADER, **change) for name, change in changes.items()}
    found["header-of-metrics"] = swap(good, HEADER, MetricRecord({"format": FORMAT, "round": 1}))
    found["header-of-arrays"] = swap(good, HEADER, ArrayRecord({"format": Array(np.zeros(1))}))
    found["header-empty"] = swap(good, HEADER, ConfigRecord())
    return found


def values(good: RecordDict) -> dict[str, RecordDict]:
    """Values that neither side takes."""
    floats = {
        "empty": b"",
        "of-ten-bytes": GOOD[:10],
        "a-byte-short": image(GOOD[:-1]),
        "cut-off-in-the-header": image(GOOD)[:30],
        "with-garbage-behind": image(GOOD + b"garbage"),
        "one-too-few": image(GOOD[:-4], shape="(14,)"),
        "one-too-many": image(GOOD + GOOD[:4], shape="(16,)"),
        "of-length-10-to-the-18": image(GOOD, shape=f"({10**18},)"),
        "of-length-10-to-the-30": image(GOOD, shape=f"({10**30},)"),
        "of-negative-length": image(GOOD, shape="(-15,)"),
        "two-dimensional": image(GOOD, shape="(3, 5)"),
        "without-dimensions": image(GOOD[:4], shape="()"),
        "in-fortran-order": image(GOOD, order="True"),
        "with-a-header-longer-than-all": b"\x93NUMPY\1\0\xff\xff" + image(GOOD)[10:],
        "of-npy-version-2": image(GOOD, magic=b"\x93NUMPY\2\0"),
        "without-npy-magic": image(GOOD, magic=b"\x93PICKL\1\0"),
        "with-code-in-the-header": image(GOOD, shape="(__import__('os').system('true'),)"),
        "pickled": image(pickle.dumps(list(range(15)), 4), descr="|O"),
        "a-bare-pickle": pickle.dumps(list(range(15)), 4),
        **{
            f"of-dtype-{name}": image(GOOD, descr=code)
            for name, code in {
                "big-endian": ">f4",
                "void": "|V4",
                "text": "<U1",
                "object": "|O4",
                "int32": "<i4",
                "named": "float32",
                "complex": "<c8",
            }.items()
        },
        "a-zip-archive": b"PK\3\4" + GOOD,
    }
    found = {f"values-{name}": with_floats(good, array(data)) for name, data in floats.items()}
    found["values-without-a-dtype"] = alter(good, "arrays", float32=None)
    found["values-with-one-dtype-more"] = alter(good, "arrays", float64=Array(np.zeros(1)))
    for name in ("__class__", "../../etc/passwd", "float32\0", "object"):
        key = "".join(letter if letter.isalnum() else "-" for letter in name).strip("-")
        renamed = {**{k: a for k, a in good["arrays"].items() if k != "float32"}, name: good["arrays"]["float32"]}
        found[f"values-under-the-key-{key}"] = swap(good, "arrays", ArrayRecord(renamed))
    found["values-bool-of-2"] = alter(good, "arrays", bool=array(image(b"\2\0", "|b1", "(2,)"), "bool", (2,)))
    found["values-bool-of-floats"] = alter(good, "arrays", bool=array(image(bytes(8), "<f4", "(2,)"), "bool", (2,)))
    found["values-missing"] = swap(good, "arrays", None)
    found["values-of-metrics"] = swap(good, "arrays", MetricRecord({"float32": [1.0]}))
    found["values-twice"] = swap(good, "more", ArrayRecord(dict(good["arrays"])))  # type: ignore[arg-type]
    return found


def coded_values(make: Any) -> dict[str, RecordDict]:
    """Coded values that neither side takes; ``make(kind)`` is well-formed."""
    found = {}
    for kind in CODED:
        good = make(kind)
        data = good["arrays"]["float32"].numpy()
        forged = {"a-byte-short": data[:-1], "a-byte-longer": np.append(data, np.uint8(0)), "all-bits-set": data | 255}
        if kind == "int8":
            for name, scale in (("negative", -1.0), ("nan", math.nan), ("infinite", math.inf), ("too-large", 3e38)):
                forged[f"with-a-scale-{name}"] = np.concatenate(
                    [np.frombuffer(struct.pack("<f", scale), np.uint8), data[4:]]
                )
            forged["without-scales"] = data[4:]
            forged["with-a-scale-too-many"] = np.concatenate([data[:4], data])
        for name, changed in forged.items():
            found[f"values-{kind}-{name}"] = with_floats(good, Array(changed))
        found[f"values-{kind}-of-floats"] = with_floats(good, Array(FLOATS))
    return found


def layout_rows(*rows: Any) -> bytes:
    return zlib.compress(json.dumps(list(rows)).encode(), 9)


def masks(good: RecordDict) -> dict[str, RecordDict]:
    """Mask records that a client does not take."""
    huge = layout_rows(["w", [2**33], "float32", 1])
    layouts = {
        "cut-off": mask_record.encode_mask(MASK)["layout"][:-3],  # type: ignore[index]
        "with-garbage-behind": mask_record.encode_mask(MASK)["layout"] + b"x",  # type: ignore[operator]
        "text": "layout",
        "a-list": [b"x"],
        "not-compressed": b'[["w",[4],"float32",1]]',
        "a-bomb-of-zeros": BOMB,
        "a-bomb-of-empty-lists": zlib.compress(b"[" + b"[]," * 5_000_000 + b"[]]", 9),
        "of-a-million-rows": zlib.compress(b"[" + b'["w",[],"bool",0],' * 10**6 + b'["w",[],"bool",0]]', 9),
        "with-a-name-of-10-megabytes": layout_rows(["w" * 10**7, [4], "float32", 1]),
        "nested-deeply": zlib.compress(b"[" * 200_000, 9),
        "with-a-name-nested-deeply": zlib.compress(b"[[" + b"[" * 900 + b"]" * 900 + b',[4],"float32",1]]'),
        "not-utf-8": zlib.compress(b'[["\xff",[4],"float32",1]]'),
        "in-utf-16": zlib.compress('[["w",[4,4],"float32",1]]'.encode("utf-16")),
        "a-number": zlib.compress(b"7"),
        "an-object": zlib.compress(b'{"__class__":1}'),
        "of-rows-too-short": layout_rows(["w", [4], "float32"]),
        "of-rows-too-long": layout_rows(["w", [4], "float32", 1, 1]),
        "with-a-name-twice": layout_rows(["w", [4], "float32", 1], ["w", [4], "float32", 1]),
        "with-a-name-a-number": layout_rows([1, [4], "float32", 1]),
        "with-a-size-negative": layout_rows(["w", [-4], "float32", 1]),
        "with-sizes-negative-of-a-positive-product": layout_rows(["w", [-4, -4], "float32", 1]),
        "with-a-size-a-float": layout_rows(["w", [4.0], "float32", 1]),
        "with-a-size-a-bool": layout_rows(["w", [True, 4], "float32", 1]),
        "with-a-size-nan": zlib.compress(b'[["w",[NaN],"float32",1]]'),
        "with-a-size-infinite": zlib.compress(b'[["w",[Infinity],"float32",1]]'),
        "with-a-size-of-4000-digits": layout_rows(["w", [10**4000], "float32", 1]),
        "with-sizes-whose-product-overflows": layout_rows(["w", [2**32, 2**32], "float32", 1]),
        "with-sizes-whose-product-overflows-to-0": layout_rows(["w", [2**32, 2**32, 2**32], "float32", 1]),
        "with-a-size-beyond-64-bits-beside-0": layout_rows(["w", [0, 2**70], "float32", 1]),
        "with-50000-axes": layout_rows(["w", [1] * 50_000, "float32", 1]),
        "with-a-shape-text": layout_rows(["w", "44", "float32", 1]),
        **{
            f"of-dtype-{name}": layout_rows(["w", [4, 4], dtype, 0])
            for name, dtype in {
                "object": "object",
                "object-code": "O",
                "void": "V8",
                "big-endian": ">f4",
                "complex": "complex64",
                "list": ["float32"],
                "null": None,
            }.items()
        },
        "with-prunable-integers": layout_rows(["w", [4, 4], "int64", 1]),
        "with-prunable-2": layout_rows(["w", [4, 4], "float32", 2]),
        "with-prunable-text": layout_rows(["w", [4, 4], "float32", "no"]),
    }
    found = {f"layout-{name}": alter(good, MASK_RECORD, layout=data) for name, data in layouts.items()}

    def bits(encoding: object, data: object, **more: Any) -> RecordDict:
        return alter(good, MASK_RECORD, encoding=encoding, bits=data, **more)

    beyond = layout_rows(["w", [2**24, 4], "float32", 1])
    found |= {
        "mask-full-of-2-to-the-33-entries": bits("full", None, layout=huge),
        "mask-full-of-2-to-the-26-entries": bits("full", None, layout=beyond),
        "mask-gaps-of-2-to-the-33-entries": bits("gaps", zlib.compress(b""), layout=huge),
        "mask-gaps-of-2-to-the-26-entries": bits("gaps", zlib.compress(b"\0"), layout=beyond),
        "mask-gaps-of-16-times-2-to-the-29-entries": bits(
            "gaps", zlib.compress(b""), layout=layout_rows(*([str(i), [2**29], "float32", 1] for i in range(16)))
        ),
        "mask-bitmap-of-2-to-the-33-entries": bits("bitmap", BOMB, layout=huge),
        "mask-units-of-2-to-the-32-entries": bits(
            "units", zlib.compress(bytes(2**14)), layout=layout_rows(["w", [2**16, 2**16], "float32", 1])
        ),
        "mask-full-of-a-million-entries-without-values": bits(
            "full", None, layout=layout_rows(["w", [1000, 1000], "float32", 1])
        ),
        "mask-gaps-of-a-million-entries-without-values": bits(
            "gaps", zlib.compress(bytes(10**6)), layout=layout_rows(["w", [1000, 1000], "float32", 1])
        ),
        "mask-bitmap-a-bomb": bits("bitmap", BOMB),
        "mask-gaps-a-bomb": bits("gaps", BOMB),
        "mask-units-a-bomb": bits("units", BOMB),
        "mask-difference-a-bomb": bits("difference", BOMB, base=MASK.digest),
        "mask-difference-cut-off": bits("difference", zlib.compress(b"\0")[:-1], base=MASK.digest),
        "mask-difference-beyond-the-end": bits("difference", zlib.compress(b"\xff"), base=MASK.digest),
        "mask-difference-to-another-mask-than-is-meant": bits("difference", zlib.compress(b"\0"), base=MASK.digest),
        "mask-dropped-gaps-a-bomb": bits("dropped-gaps", BOMB, base=MASK.digest),
        "mask-dropped-gaps-beyond-what-is-kept": bits("dropped-gaps", zlib.compress(b"\x0b"), base=MASK.digest),
        "mask-dropped-bitmap-a-bomb": bits("dropped-bitmap", BOMB, base=MASK.digest),
        "mask-dropped-bitmap-a-byte-short": bits("dropped-bitmap", zlib.compress(b"\0"), base=MASK.digest),
        "mask-dropped-bitmap-a-byte-longer": bits("dropped-bitmap", zlib.compress(bytes(3)), base=MASK.digest),
        "mask-dropped-bitmap-with-unused-bits": bits("dropped-bitmap", zlib.compress(b"\0\x01"), base=MASK.digest),
        "mask-bitmap-a-byte-short": bits("bitmap", zlib.compress(MASK.bits[:-1])),
        "mask-bitmap-a-byte-longer": bits("bitmap", zlib.compress(MASK.bits + b"\0")),
        "mask-bitmap-cut-off": bits("bitmap", zlib.compress(MASK.bits)[:-2]),
        "mask-bitmap-with-a-dictionary": bits("bitmap", b"\x78\xbb\x04\x99\x01\xa5\x01"),
        "mask-gaps-beyond-the-end": bits("gaps", zlib.compress(b"\xff\0")),
        "mask-units-too-few": bits("units", zlib.compress(b"\xf0")),
        "mask-units-with-unused-bits": bits("units", zlib.compress(b"\xff\xff")),
        "mask-full-with-bits": bits("full", zlib.compress(b"\xff\xff")),
        "mask-full-with-the-digest-of-another": bits("full", None),
        "mask-encoding-unknown": bits("pickle", pickle.dumps(MASK.bits)),
        "mask-encoding-a-list": bits(["full"], None),
        "mask-encoding-of-10000-letters": bits("x" * 10_000, None),
        "mask-bits-text": bits("bitmap", "bits"),
        "mask-bits-a-list": bits("bitmap", [1, 2]),
        "mask-version-a-float": alter(good, MASK_RECORD, version=1.0),
        "mask-version-a-bool": alter(good, MASK_RECORD, version=True),
        "mask-version-a-list": alter(good, MASK_RECORD, version=[1]),
        "mask-empty": swap(good, MASK_RECORD, ConfigRecord()),
        "mask-of-metrics": swap(good, MASK_RECORD, MetricRecord({"version": 1})),
        "mask-of-arrays": swap(good, MASK_RECORD, ArrayRecord({"bits": Array(np.zeros(1))})),
    }
    return found


def bases(good: RecordDict) -> dict[str, RecordDict]:
    """Records of what stands outside the mask that a client does not take; ``good`` has a well-formed one."""
    floats = np.ascontiguousarray(BASE["w"]).reshape(-1)
    data = floats.tobytes()

    def changed(position: int, value: float) -> np.ndarray:
        values = floats.copy()
        values[position] = value
        return values

    def meaning(values: np.ndarray) -> RecordDict:
        """With the digest of what came along."""
        content = alter(good, BASE_RECORD, float32=Array(values))
        return alter(content, HEADER, base=base_digest(LAYOUT, {"w": values.reshape(4, 4)}))

    images = {
        "empty": b"",
        "one-too-few": image(data[:-4], shape="(15,)"),
        "one-too-many": image(data + data[:4], shape="(17,)"),
        "a-byte-short": image(data[:-1], shape="(16,)"),
        "with-garbage-behind": image(data + b"garbage", shape="(16,)"),
        "of-length-10-to-the-18": image(data, shape=f"({10**18},)"),
        "of-negative-length": image(data, shape="(-16,)"),
        "in-two-dimensions": image(data, shape="(4, 4)"),
        "of-dtype-int32": image(data, "<i4", "(16,)"),
        "of-dtype-float64": image(data, "<f8", "(8,)"),
        "of-dtype-big-endian": image(data, ">f4", "(16,)"),
        "pickled": image(pickle.dumps(list(range(16)), 4), "|O", "(16,)"),
    }
    found = {f"base-{name}": alter(good, BASE_RECORD, float32=array(bytes_)) for name, bytes_ in images.items()}
    found |= {
        "base-without-a-dtype": swap(good, BASE_RECORD, ArrayRecord()),
        "base-with-the-dtypes-of-the-values": alter(
            good, BASE_RECORD, int64=good["arrays"]["int64"], bool=good["arrays"]["bool"]
        ),
        "base-with-what-is-never-pruned": alter(
            good, BASE_RECORD, float32=Array(np.concatenate([floats, MODEL["b"]]).astype(np.float32))
        ),
        "base-by-array": swap(good, BASE_RECORD, ArrayRecord({"w": Array(BASE["w"])})),
        "base-of-metrics": swap(good, BASE_RECORD, MetricRecord({"float32": [1.0] * 16})),
        "base-a-config": swap(good, BASE_RECORD, ConfigRecord({"float32": data})),
        "base-not-named-in-the-header": alter(good, HEADER, base=None),
        "base-of-another-digest": alter(good, BASE_RECORD, float32=Array(changed(0, 7.0))),
        "base-with-another-sign-of-zero": alter(
            alter(good, BASE_RECORD, float32=Array(changed(3, -0.0))),
            HEADER,
            base=base_digest(LAYOUT, {"w": changed(3, 0.0).reshape(4, 4)}),
        ),
        "base-of-nan": meaning(changed(5, math.nan)),
        "base-infinite": meaning(changed(5, -math.inf)),
    }
    return found


def messages() -> dict[str, RecordDict]:
    """Messages that a client refuses, by name."""
    good, explore = message(), message(EXPLORE)
    found = headers(good) | values(good) | coded_values(lambda kind: message(kind=kind)) | masks(good)
    for name in ("reply-of-an-unknown-kind", "reply-a-number", "reply-of-the-kind-of-moves"):
        value = {"reply-of-an-unknown-kind": "zip", "reply-a-number": 8, "reply-of-the-kind-of-moves": "log8"}[name]
        found[f"header-{name}"] = alter(good, HEADER, reply=value)
    found["explore-reply-of-a-coded-kind"] = alter(explore, HEADER, reply="int8")
    found["explore-with-the-mask-of-training"] = swap(explore, MASK_RECORD, good[MASK_RECORD])
    found |= bases(with_base(good))
    found["explore-with-a-base"] = with_base(explore)
    found["explore-without-values"] = swap(explore, "arrays", None)
    found["evaluate-without-values"] = swap(message(EVALUATE), "arrays", None)
    return found


def replies() -> dict[str, tuple[dict[str, str], RecordDict]]:
    """Replies that the server leaves out, by name: how the server is set up, and the reply."""
    good = reply()
    train = headers(good) | {name: told(content) for name, content in values(good).items()}
    weights: dict[str, dict[str, Any]] = {
        "weight-zero": {"num-examples": 0},
        "weight-negative": {"num-examples": -(2**63)},
        "weight-near-the-largest-float": {"num-examples": 1.7e308},
        "weight-nan": {"num-examples": math.nan},
        "weight-a-list": {"num-examples": [10]},
        "weight-an-empty-list": {"num-examples": []},
        "weight-missing": {"num-examples": None},
    }
    train |= {f"metrics-{name}": alter(good, "metrics", **change) for name, change in weights.items()}
    train |= {
        "metrics-missing": swap(good, "metrics", None),
        "metrics-twice": swap(good, "more", MetricRecord({"num-examples": 10})),
        "metrics-under-another-key": RecordDict(
            {name.replace("metrics", "m"): record for name, record in good.items()}
        ),
        "metrics-a-config": swap(good, "metrics", ConfigRecord({"num-examples": 10})),
        "values-under-another-key": RecordDict({name.replace("arrays", "a"): record for name, record in good.items()}),
        "one-config-more": swap(good, "config", ConfigRecord({"exec": "import os"})),
        "status-mask-missing": alter(good, HEADER, status="mask-missing", digest=None),
        "status-base-missing": alter(good, HEADER, status="base-missing", digest=None),
        "status-mask-and-base-missing": alter(good, HEADER, status="mask-and-base-missing", digest=None),
        "base-come-along": swap(good, BASE_RECORD, encode_base(LAYOUT, BASE)),
        "status-a-list": alter(good, HEADER, status=["mask-missing"], digest=None),
        "header-missing": swap(good, HEADER, None),
        "round-of-another-round": alter(good, HEADER, round=2),
        "round-huge": alter(good, HEADER, round=2**63 - 1),
        "phase-of-another-phase": alter(good, HEADER, phase="evaluate"),
        "fingerprint-missing": alter(good, HEADER, fingerprint=None),
        "fingerprint-text": alter(good, HEADER, fingerprint=str(good[HEADER]["fingerprint"])),
        "fingerprint-a-list": alter(good, HEADER, fingerprint=[good[HEADER]["fingerprint"]]),
        "fingerprint-of-other-values": alter(good, HEADER, fingerprint=1),
        "nothing": RecordDict(),
    }
    for name, value in (("nan", math.nan), ("infinity", -math.inf)):
        bad = FLOATS.copy()
        bad[3] = value
        train[f"values-of-{name}"] = told(with_floats(good, Array(bad)))
    found = {f"train-{name}": ({"phase": "train", "values": "float32"}, content) for name, content in train.items()}
    for kind in CODED:
        coded = {n: c for n, c in coded_values(lambda kind: reply(kind=kind)).items() if n.startswith(f"values-{kind}")}
        coded[f"values-{kind}-not-coded"] = reply()
        found |= {f"train-{n}": ({"phase": "train", "values": kind}, told(content)) for n, content in coded.items()}
    found |= {f"explore-{name}": ({"phase": "explore", "values": k}, told(c)) for name, (k, c) in moves().items()}
    for name, change in (("format-a-float", {"format": float(FORMAT)}), ("digest-missing", {"digest": None})):
        evaluated = alter(reply(EVALUATE), HEADER, **change)  # type: ignore[arg-type]
        found[f"evaluate-header-{name}"] = ({"phase": "evaluate", "values": "float32"}, evaluated)
    return found


def metrics() -> dict[str, tuple[dict[str, str], RecordDict]]:
    """Replies with odd metrics, which count all the same: how the server is set up, and the reply."""
    changes: dict[str, dict[str, Any]] = {
        "train-loss-nan": {"loss": math.nan},
        "train-loss-infinite": {"loss": -math.inf},
        "train-loss-a-list": {"loss": [0.5]},
        "train-loss-an-empty-list": {"loss": []},
        "train-loss-a-list-with-nan": {"loss": [0.5, math.nan]},
        "train-loss-missing": {"loss": None},
        "train-one-more": {"__class__": 1.0},
        "train-examples-processed-nan": {"examples-processed": math.nan},
        "train-examples-processed-infinite": {"examples-processed": math.inf},
        "train-examples-processed-near-the-largest-float": {"examples-processed": 1.7e308},
        "evaluate-loss-nan": {"loss": math.nan},
        "evaluate-loss-a-list": {"loss": [1.0, 2.0]},
    }
    return {
        name: ({"phase": phase, "values": "float32"}, alter(reply(phase), "metrics", **change))
        for name, change in changes.items()
        for phase in (name.partition("-")[0],)
    }


def moves() -> dict[str, tuple[str, RecordDict]]:
    """Explorers' moves that the server does not take: how they should be coded, and the reply."""
    good = reply(EXPLORE, LOG8)
    data = good["arrays"]["float32"].numpy().tobytes()
    assert data[8:9] == b"\x78"

    def log8(changed: bytes) -> tuple[str, RecordDict]:
        return LOG8, with_floats(good, Array(np.frombuffer(changed, np.uint8)))

    def inside(codes: int, *plain: float) -> tuple[str, RecordDict]:
        return log8(data[:8] + zlib.compress(bytes(codes) + struct.pack(f"<{len(plain)}f", *plain)))

    found = {
        "moves-empty": log8(b""),
        "moves-without-codes": log8(data[:8]),
        "moves-cut-off": log8(data[:-1]),
        "moves-with-garbage-behind": log8(data + b"x"),
        "moves-one-too-few": inside(15, *[0.0] * 4),
        "moves-one-too-many": inside(17, *[0.0] * 4),
        "moves-without-what-is-never-pruned": inside(16),
        "moves-of-what-is-never-pruned-one-too-few": inside(16, *[0.0] * 3),
        "moves-of-what-is-never-pruned-nan": inside(16, 0.0, math.nan, 0.0, 0.0),
        "moves-of-what-is-never-pruned-infinite": inside(16, 0.0, 0.0, 0.0, -math.inf),
        "moves-a-bomb": log8(data[:8] + BOMB),
        "moves-not-compressed": log8(data[:8] + bytes(32)),
        "moves-not-coded": (LOG8, with_floats(good, Array(np.zeros(20, np.float32)))),
        "moves-without-a-dtype": (LOG8, alter(good, "arrays", int64=None)),
        "moves-of-integers": (LOG8, alter(good, "arrays", int64=Array(np.ones(9, np.uint8)))),
        "moves-coded-where-they-should-not-be": ("float32", good),
        "values-not-told": (LOG8, alter(good, HEADER, values=None)),
    }
    for name, number in (("nan", math.nan), ("negative", -1.0), ("infinite", math.inf), ("too-large", 2e36)):
        found[f"moves-with-a-range-{name}"] = log8(struct.pack("<f", number) + data[4:])
    plain = reply(EXPLORE)
    for name, number in (("nan", math.nan), ("infinity", math.inf)):
        floats = Array(np.full(20, number, np.float32))
        found[f"moves-of-{name}"] = ("float32", with_floats(plain, floats))
    return found


def write() -> None:
    """Write all files anew."""
    found = {f"messages/{name}": {"records": to_json(content)} for name, content in messages().items()}
    for folder, forged in (("replies", replies()), ("metrics", metrics())):
        for name, (setup, content) in forged.items():
            found[f"{folder}/{name}"] = {**setup, "records": to_json(content)}
    for folder in ("messages", "replies", "metrics"):
        (FOLDER / folder).mkdir(exist_ok=True)
        for old in (FOLDER / folder).glob("*.json"):
            old.unlink()
    for name, described in found.items():
        (FOLDER / f"{name}.json").write_text(json.dumps(described, allow_nan=False) + "\n")


if __name__ == "__main__":
    write()
