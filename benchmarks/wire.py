"""Count the bytes of one pruned round's messages, made by the real strategy and mod, for a model of a given size.

    python -m benchmarks.wire --params 1700000 --density 0.3

The last line is one JSON object. ``upload_bytes`` and ``download_bytes`` are the serialised messages of one client and
round once it has the mask. Their limits are 1.01 x the values that travel (with never-pruned ones, in their dtypes)
+ 2 KiB. ``mask_bytes`` is the mask record that is sent once, ``mask_entropy_bytes`` the minimum for its density,
``dense_bytes`` Flower's own message of the full model, ``exploration_upload_bytes`` an explorer's reply. ``values``
holds, for each format of the values, how many times smaller an upload and a download are than float32's.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import numpy as np
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from autoflip_flwr import AutoFlip, autoflip_mod
from autoflip_flwr.core.choices import CODED
from autoflip_flwr.core.layout import Arrays
from autoflip_flwr.core.methods import LossExploration
from autoflip_flwr.costs.ledger import phase_of
from autoflip_flwr.costs.message_size import message_bytes, record_bytes
from autoflip_flwr.testing import LocalGrid
from autoflip_flwr.wire.keys import MASK_RECORD
from autoflip_flwr.wire.records import to_arrays, to_record


def twocnn(parameters: int) -> Arrays:
    """Return arrays of a TwoCNN (two convolutions, two linear layers) of about this size, with h found by bisection."""

    def shapes(h: int) -> dict[str, tuple[int, ...]]:
        return {
            "conv1.weight": (h, 1, 5, 5),
            "conv1.bias": (h,),
            "conv2.weight": (2 * h, h, 5, 5),
            "conv2.bias": (2 * h,),
            "fc1.weight": (512, 98 * h),
            "fc1.bias": (512,),
            "fc2.weight": (10, 512),
            "fc2.bias": (10,),
        }

    def size(h: int) -> int:
        return sum(math.prod(shape) for shape in shapes(h).values())

    h = min(range(1, 2000), key=lambda h: abs(size(h) - parameters))
    random = np.random.default_rng(0)
    return {name: random.normal(scale=0.05, size=shape).astype(np.float32) for name, shape in shapes(h).items()}


def client_app() -> ClientApp:
    """Return a client that changes every parameter a little."""
    app = ClientApp(mods=[autoflip_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        random = np.random.default_rng(context.node_id)
        arrays = to_arrays(message.content["arrays"])  # type: ignore[arg-type]
        moved = {
            name: array + random.normal(scale=0.01, size=array.shape).astype(array.dtype)
            for name, array in arrays.items()
        }
        metrics = MetricRecord({"num-examples": 100, "train-loss": 1.0})
        return Message(RecordDict({"arrays": to_record(moved), "metrics": metrics}), reply_to=message)

    return app


def measure(parameters: int, density: float, kind: str = "float32") -> dict[str, Any]:
    """Run an exploration and two pruned rounds with two nodes. Take the sizes from the messages of the second round."""
    replies: list[Message] = []
    grid = LocalGrid(client_app(), 2, tamper=lambda reply: replies.append(reply) or reply)  # type: ignore[func-returns-value]
    initial = twocnn(parameters)
    method = LossExploration.static()  # the second round's density is the last one's
    strategy = AutoFlip(FedAvg(fraction_evaluate=0.0), sparsity=round(1 - density, 12), method=method, values=kind)
    down: dict[str, list[int]] = {}  # bytes of the last exchange of each phase
    up: dict[str, list[int]] = {}
    push = grid.push_messages

    def pushing(messages):  # type: ignore[no-untyped-def]
        phase = phase_of(messages[0])
        down[phase] = [message_bytes(message) for message in messages]
        ids = push(messages)
        up[phase] = [message_bytes(reply) for reply in replies[-len(messages) :]]
        return ids

    grid.push_messages = pushing  # type: ignore[method-assign]
    strategy.start(grid, to_record(initial), num_rounds=2)
    mask = strategy.mask
    assert mask is not None
    values = sum(
        (mask.kept_by_name[spec.name] if spec.prunable else spec.size) * np.dtype(spec.dtype).itemsize
        for spec in mask.layout.specs
    )
    limit = math.floor(1.01 * values + 2048)
    first = next(message.content for message in grid.sent if phase_of(message) == "train")
    p = mask.density
    entropy = 0.0 if p in (0, 1) else -(p * math.log2(p) + (1 - p) * math.log2(1 - p))
    return {
        "parameters": sum(array.size for array in initial.values()),
        "density": p,
        "values_bytes": values,
        "upload_bytes": max(up["train"]),
        "upload_limit_bytes": limit,
        "download_bytes": max(down["train"]),
        "download_limit_bytes": limit,
        "mask_bytes": record_bytes(first, MASK_RECORD),
        "mask_entropy_bytes": math.ceil(entropy * mask.layout.prunable_size / 8),
        "exploration_upload_bytes": max(up["exploration"]),
        "dense_bytes": message_bytes(Message(RecordDict({"arrays": to_record(initial)}), 1, "train")),
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=int, default=1_700_000, help="about so many parameters (default: 1.7 million)")
    parser.add_argument("--density", type=float, default=0.3, help="share of the prunable parameters that is kept")
    options = parser.parse_args()
    found = measure(options.params, options.density)
    found["values"] = {}
    for kind in CODED:
        coded = measure(options.params, options.density, kind)
        found["values"][kind] = {
            f"{way}_times_smaller": round(found[f"{way}_bytes"] / coded[f"{way}_bytes"], 3)
            for way in ("upload", "download")
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
