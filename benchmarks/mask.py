"""Measure bytes and time of masks on the wire, and compare them with the masks' entropy.

    python -m benchmarks.mask

The first table has masks of ResNet-18: random ones of several densities, one of whole units (half of the channels, the
same ones in all layers that share them) and the difference of two masks. ``bytes`` is the mask alone. ``record_bytes``
is the record in which it travels: it also holds the model's layout, or for a change the digest of the other mask.
``entropy_bytes`` is the minimum for a random mask of this density (for a difference: of this share of changes).

The second table has masks of TwoCNN and ResNet-18 that shrink from density 1.0 to 0.1 along a cubic in 36 steps; which
entries are dropped is random. ``steps`` is the number of steps since the node's last mask: 1 if it is asked at every
step. Bytes are means over the steps. ``entropy_bytes`` is the minimum for the choice of the dropped entries among
those that the node's mask keeps. ``ratio`` and ``record_ratio`` divide ``bytes`` and ``record_bytes`` by it.
``whole_bytes`` is the record of the whole mask. Times are those of the slowest step.

Times are milliseconds of CPU. The last line is one JSON object.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np
import torch
from flwr.app import RecordDict
from numpy.typing import NDArray
from torchvision.models import resnet18

from autoflip_flwr.core.layout import ArraySpec, Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.costs.message_size import record_bytes
from autoflip_flwr.experiment.models.convolutional import twocnn
from autoflip_flwr.wire import mask_bits, mask_change, mask_record
from autoflip_flwr.wire.keys import MASK_RECORD

DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
CHANGED = 0.02
STEPS, LAST_DENSITY = 36, 0.1
STEPS_AWAY = (1, 4, 10)

T = TypeVar("T")


def layout_of(make: Callable[[], torch.nn.Module]) -> Layout:
    """Return a model's layout, with buffers. Weights of >= 2 axes are pruned."""
    with torch.device("meta"):
        state = make().state_dict()
    return Layout(
        tuple(ArraySpec(name, tuple(x.shape), str(x.dtype).split(".")[1], x.dim() > 1) for name, x in state.items())
    )


def resnet18_layout() -> Layout:
    """Return the layout of torchvision's ResNet-18 for 10 classes."""
    return layout_of(partial(resnet18, num_classes=10))


def twocnn_layout() -> Layout:
    """Return the layout of TwoCNN for CIFAR-10."""
    return layout_of(partial(twocnn, (3, 32, 32), 10))


def random_mask(layout: Layout, density: float, random: np.random.Generator) -> Mask:
    """Return a mask that keeps each entry with this probability."""
    return Mask(layout, np.packbits(random.random(layout.prunable_size, np.float32) < density).tobytes())


def unit_mask(layout: Layout, random: np.random.Generator) -> Mask:
    """Return a mask that keeps half of the channels of each stage's residual stream, and of each block's inside."""
    channels: dict[str, NDArray[np.bool_]] = {"image": np.ones(3, dtype=bool), "classes": np.ones(10, dtype=bool)}
    keep: dict[str, NDArray[np.bool_]] = {}
    for spec in layout.prunable:
        ends = _ends(spec.name)
        for channel, size in zip(ends, spec.shape[:2], strict=True):
            channels.setdefault(channel, random.permutation(size) < size // 2)
        kept = np.outer(*(channels[channel] for channel in ends))
        keep[spec.name] = np.broadcast_to(kept.reshape(kept.shape + (1,) * (len(spec.shape) - 2)), spec.shape)
    return Mask.from_bool(layout, keep)


def _ends(name: str) -> tuple[str, str]:
    """Return the names of the output and input channels of a weight of the ResNet."""
    if name == "conv1.weight":
        return "layer1", "image"
    if name == "fc.weight":
        return "classes", "layer4"
    stage, block, layer, *_ = name.split(".")
    before = f"layer{int(stage[-1]) - 1}" if block == "0" and stage != "layer1" else stage
    inside = f"{stage}.{block}"
    return {"conv1": (inside, before), "conv2": (stage, inside), "downsample": (stage, before)}[layer]


def flipped(mask: Mask, share: float, random: np.random.Generator) -> Mask:
    """Return the mask with a share of the entries changed, as many to kept as to pruned."""
    keep = np.unpackbits(np.frombuffer(mask.bits, np.uint8), count=mask.layout.prunable_size)
    for value in (0, 1):
        where = np.flatnonzero(keep == value)
        keep[random.choice(where, int(share * keep.size / 2), replace=False)] ^= 1
    return Mask(mask.layout, np.packbits(keep).tobytes())


def row(name: str, mask: Mask, base: Mask | None = None) -> dict[str, Any]:
    """Encode a mask (with ``base``: the difference from it) and decode it, three times each. Report the best times."""

    def code() -> tuple[str, bytes]:
        fresh = Mask(mask.layout, mask.bits)  # without the mask's caches, which would speed up the encoder
        return mask_bits.encode(fresh) if base is None else mask_change.encode_change(fresh, base)

    def decode() -> bytes:
        return (
            mask_bits.decode(mask.layout, encoding, data)
            if base is None
            else mask_change.decode_change(base, encoding, data)
        )

    encode_ms, (encoding, data) = _best(code)
    decode_ms, found = _best(decode)
    assert found == mask.bits
    count = mask.layout.prunable_size
    share = mask.density
    if base is not None:
        share = sum(int(np.count_nonzero(mask.keep[name] != keep)) for name, keep in base.keep.items()) / count
    entropy = entropy_of(count, share)
    return {
        "mask": name,
        "density": round(mask.density, 4),
        "encoding": encoding,
        "bytes": len(data),
        "record_bytes": record_bytes(RecordDict({MASK_RECORD: mask_record.encode_mask(mask, base)}), MASK_RECORD),
        "entropy_bytes": math.ceil(entropy),
        "ratio": round(len(data) / entropy, 4),
        "encode_ms": round(encode_ms, 1),
        "decode_ms": round(decode_ms, 1),
    }


def entropy_of(count: int, share: float) -> float:
    """Return the bytes that it takes to tell which share of ``count`` entries is meant, if any may be."""
    return -count * sum(p * math.log2(p) for p in (share, 1 - share) if p) / 8


def shrinking_masks(layout: Layout, random: np.random.Generator) -> list[Mask]:
    """Return the masks of a run in which random entries are dropped along a cubic, the full one first."""
    draw = random.random(layout.prunable_size, np.float32)
    densities = [LAST_DENSITY + (1 - LAST_DENSITY) * (1 - step / STEPS) ** 3 for step in range(STEPS + 1)]
    return [Mask(layout, np.packbits(draw < density).tobytes()) for density in densities]


def shrinking_row(model: str, masks: list[Mask], whole: list[int], away: int) -> dict[str, Any]:
    """Encode each mask of a shrinking run for a node whose last mask is ``away`` steps older, and decode it.

    ``whole`` holds the bytes of the records of the whole masks.
    """
    found = []
    for base, mask in zip(masks, masks[away:], strict=False):
        start = time.process_time()
        record = mask_record.encode_mask(mask, base)
        encoded = time.process_time()
        assert mask_record.decode_mask(record, base).bits == mask.bits
        found.append(
            {
                "bytes": len(cast(bytes, record["bits"])),
                "record_bytes": record_bytes(RecordDict({MASK_RECORD: record}), MASK_RECORD),
                "entropy_bytes": entropy_of(base.kept, mask.kept / base.kept),
                "encode_ms": 1000 * (encoded - start),
                "decode_ms": 1000 * (time.process_time() - encoded),
            }
        )
    mean = {key: sum(each[key] for each in found) / len(found) for key in found[0] if key.endswith("bytes")}
    return {
        "model": model,
        "entries": masks[0].layout.prunable_size,
        "steps": away,
        **{key: round(value) for key, value in mean.items()},
        "ratio": round(mean["bytes"] / mean["entropy_bytes"], 4),
        "record_ratio": round(mean["record_bytes"] / mean["entropy_bytes"], 4),
        "whole_bytes": round(sum(whole[away:]) / len(whole[away:])),
        **{key: round(max(each[key] for each in found), 1) for key in ("encode_ms", "decode_ms")},
    }


def _best(call: Callable[[], T]) -> tuple[float, T]:
    times = []
    for _ in range(3):
        start = time.process_time()
        result = call()
        times.append(1000 * (time.process_time() - start))
    return min(times), result


def _line(values: Mapping[str, Any]) -> str:
    return " ".join(f"{value!s:>{max(len(key), 13)}}" for key, value in values.items())


def _print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    for values in ({key: key for key in rows[0]}, *rows):
        print(_line(values))


def main() -> None:
    """Print the two tables, then the JSON object."""
    random = np.random.default_rng(0)
    layout = resnet18_layout()
    before = random_mask(layout, 0.3, random)
    rows = [row("random", random_mask(layout, density, random)) for density in DENSITIES]
    rows += [
        row("units", unit_mask(layout, random)),
        row(f"{CHANGED:.0%} changed", flipped(before, CHANGED, random), before),
    ]
    _print_table(rows)
    shrinking = []
    for name, shrunk in (("TwoCNN", twocnn_layout()), ("ResNet-18", layout)):
        masks = shrinking_masks(shrunk, random)
        whole = [record_bytes(RecordDict({MASK_RECORD: mask_record.encode_mask(mask)}), MASK_RECORD) for mask in masks]
        shrinking += [shrinking_row(name, masks, whole, away) for away in STEPS_AWAY]
    _print_table(shrinking)
    print(json.dumps({"entries": layout.prunable_size, "rows": rows, "shrinking": shrinking}))


if __name__ == "__main__":
    main()
