"""Measure bytes and time of ResNet-18's masks on the wire, and compare them with the masks' entropy.

    python -m benchmarks.mask

The masks are random ones of several densities, one of whole units (half of the channels, the same ones in all layers
that share them) and the difference of two masks. ``bytes`` is the mask alone. ``record_bytes`` is the record in which
it travels: it also holds the model's layout, or for a difference the digest of the other mask. ``entropy_bytes`` is
the minimum for a random mask of this density (for a difference: of this share of changes). The last line is one JSON
object.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import RecordDict
from numpy.typing import NDArray
from torchvision.models import resnet18

from autoflip_flwr.core.layout import ArraySpec, Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.costs.message_size import record_bytes
from autoflip_flwr.wire import mask_bits, mask_record
from autoflip_flwr.wire.keys import MASK_RECORD

DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
CHANGED = 0.02

T = TypeVar("T")


def resnet18_layout() -> Layout:
    """Return the layout of torchvision's ResNet-18 for 10 classes, with buffers. Weights of >= 2 axes are pruned."""
    with torch.device("meta"):
        state = resnet18(num_classes=10).state_dict()
    return Layout(
        tuple(ArraySpec(name, tuple(x.shape), str(x.dtype).split(".")[1], x.dim() > 1) for name, x in state.items())
    )


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
        return mask_bits.encode(fresh) if base is None else ("difference", mask_bits.encode_difference(fresh, base))

    def decode() -> bytes:
        return (
            mask_bits.decode(mask.layout, encoding, data) if base is None else mask_bits.decode_difference(base, data)
        )

    encode_ms, (encoding, data) = _best(code)
    decode_ms, found = _best(decode)
    assert found == mask.bits
    count = mask.layout.prunable_size
    share = mask.density
    if base is not None:
        share = sum(int(np.count_nonzero(mask.keep[name] != keep)) for name, keep in base.keep.items()) / count
    entropy = -count * sum(p * math.log2(p) for p in (share, 1 - share) if p) / 8
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


def _best(call: Callable[[], T]) -> tuple[float, T]:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        result = call()
        times.append(1000 * (time.perf_counter() - start))
    return min(times), result


def _line(values: Mapping[str, Any]) -> str:
    return " ".join(f"{value!s:>{max(len(key), 13)}}" for key, value in values.items())


def main() -> None:
    """Print a table, then the JSON object."""
    random = np.random.default_rng(0)
    layout = resnet18_layout()
    before = random_mask(layout, 0.3, random)
    rows = [row("random", random_mask(layout, density, random)) for density in DENSITIES]
    rows += [
        row("units", unit_mask(layout, random)),
        row(f"{CHANGED:.0%} changed", flipped(before, CHANGED, random), before),
    ]
    for values in ({key: key for key in rows[0]}, *rows):
        print(_line(values))
    print(json.dumps({"entries": layout.prunable_size, "rows": rows}))


if __name__ == "__main__":
    main()
