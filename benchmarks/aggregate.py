"""Time the server's work on a round's replies: averaging packed values, a BLAS product, and Flower on dense arrays.

    python -m benchmarks.aggregate [--replies 10 100] [--densities 0.3 0.1]

Replies of ResNet-18 size go through the real strategy and mod, in this process. Each row holds, in milliseconds,

- ``ours_ms``: the averaging kernel on the replies' buffers,
- ``ours_total_ms``: the whole ``AutoFlip.aggregate_train``: judging, averaging, the full arrays of the next round,
- ``gemv_ms``: one BLAS product of the weights with the replies as rows of one matrix, limited by memory bandwidth,
- ``flower_fedavg_ms``: Flower's ``FedAvg.aggregate_train`` on dense replies of the same model,
- ``dense_unpack_ms``: unpacking each reply to a dense one first, then Flower's averaging,

and ``peak_mb``, the memory of ``aggregate_train`` including the replies. The last line is a JSON object. Besides
``rows`` it holds the times of choosing a mask from scores, of packing and unpacking one message (and of a plain copy of
its values), and of gathering the values from the full model and scattering them to it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray
from torchvision.models import resnet18

from autoflip_flwr import AutoFlip, Layout, Mask, autoflip_mod
from autoflip_flwr.core.budget import Budget
from autoflip_flwr.core.layout import Arrays
from autoflip_flwr.core.selection import select
from autoflip_flwr.server.average import weighted_mean
from autoflip_flwr.testing import LocalGrid
from autoflip_flwr.wire.messages import flatten, pack_values, read_vectors, unpack_values
from autoflip_flwr.wire.records import to_arrays, to_record

DISTINCT = 10
"""Number of different dense replies. Further ones repeat these, which fit no cache either."""

WARM = 0.2
"""Seconds of warm-up before each timing."""


def model(width: int = 64) -> Arrays:
    """Return arrays of a ResNet-18 of this width with 10 classes, without the counters of batch normalisation."""
    random = np.random.default_rng(0)
    state = resnet18(num_classes=10, width_per_group=64).state_dict()
    scale = width / 64

    def widened(shape: Iterable[int]) -> tuple[int, ...]:
        return tuple(size if size < 32 else round(size * scale) for size in shape)

    return {
        name: random.normal(scale=0.05, size=widened(tensor.shape)).astype(np.float32)
        for name, tensor in state.items()
        if tensor.is_floating_point()
    }


def random_mask(layout: Layout, density: float) -> Mask:
    """Return a mask of about this density."""
    random = np.random.default_rng(1)
    keep = {spec.name: random.random(spec.shape, np.float32) < density for spec in layout.prunable}
    return Mask.from_bool(layout, keep)


def client_app() -> ClientApp:
    """Return a client that changes every parameter a little."""
    app = ClientApp(mods=[autoflip_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        node = context.node_id
        arrays = to_arrays(message.content["arrays"])  # type: ignore[arg-type]
        moved = {name: np.multiply(array, np.float32(1 + 0.001 * (node % 7))) for name, array in arrays.items()}
        metrics = MetricRecord({"num-examples": 50 + node % 13, "train-loss": 1.0})
        return Message(RecordDict({"arrays": to_record(moved), "metrics": metrics}), reply_to=message)

    return app


def timed(work: Callable[[], object], repeats: int = 15) -> float:
    """Return the median milliseconds of ``work``, after a warm-up."""
    time.sleep(0.3)  # BLAS threads spin for a while after a product
    warm = time.perf_counter() + WARM
    while time.perf_counter() < warm:  # the system needs some time to spread threads over the CPUs
        work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return round(1000 * statistics.median(times), 2)


def gemv_ms(vectors: list[NDArray[Any]], weights: list[float]) -> float:
    """Time one BLAS product of the weights with the replies as rows of one matrix."""
    matrix = np.stack(vectors)
    factors = np.array(weights, np.float32) / np.float32(sum(weights))
    return timed(lambda: factors @ matrix)


class Measured(AutoFlip):
    """A strategy that measures on the replies of its one round."""

    row: dict[str, Any]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Time the parts, then do what the strategy does."""
        batch = list(replies)
        contents = [reply.content for reply in batch]
        assert self.mask is not None
        vectors = [read_vectors(self.mask, content["arrays"])["float32"] for content in contents]
        weights = [float(content["metrics"]["num-examples"]) for content in contents]  # type: ignore[arg-type]
        row: dict[str, Any] = {"replies": len(batch), "density": round(self.mask.density, 4)}
        row["gemv_ms"] = gemv_ms([vector.whole() for vector in vectors], weights)
        row["ours_ms"] = timed(lambda: weighted_mean(vectors, weights))

        def whole() -> tuple[ArrayRecord | None, MetricRecord | None]:
            for reply, content in zip(batch, contents, strict=True):
                reply.content = content
            return AutoFlip.aggregate_train(self, server_round, batch)

        row["ours_total_ms"] = timed(whole, 5)
        replies_mb = sum(len(data.data) for content in contents for data in content["arrays"].values()) / 1e6  # type: ignore[union-attr, misc]
        tracemalloc.start()
        result = whole()
        row["peak_mb"] = round(replies_mb + tracemalloc.get_traced_memory()[1] / 1e6, 1)
        tracemalloc.stop()
        row["replies_mb"] = round(replies_mb, 1)
        row["model_mb"] = round(sum(spec.size for spec in self.mask.layout.specs) * 4 / 1e6, 1)
        row["dense_unpack_ms"] = self._dense_unpack(batch, contents)
        row["flower_fedavg_ms"] = self._dense(batch, contents)
        self.row = row
        return result

    def _dense_unpack(self, batch: list[Message], contents: list[RecordDict]) -> float:
        mask = self.mask
        assert mask is not None

        def unpacked(content: RecordDict) -> RecordDict:
            full = mask.scatter(unpack_values(mask, content["arrays"]))
            return RecordDict({"arrays": to_record(full), "metrics": content["metrics"]})

        def work() -> None:
            for reply, content in zip(batch, contents, strict=True):
                reply.content = unpacked(content)
            FedAvg().aggregate_train(1, batch)

        return timed(work, 3 if len(batch) <= DISTINCT else 1)

    def _dense(self, batch: list[Message], contents: list[RecordDict]) -> float:
        assert self.mask is not None
        full = [
            to_record(self.mask.scatter(unpack_values(self.mask, content["arrays"]))) for content in contents[:DISTINCT]
        ]
        for index, (reply, content) in enumerate(zip(batch, contents, strict=True)):
            reply.content = RecordDict({"arrays": full[index % DISTINCT], "metrics": content["metrics"]})
        return timed(lambda: FedAvg().aggregate_train(1, batch), 3)


def measure(replies: int, density: float) -> dict[str, Any]:
    """Return one row."""
    initial = model()
    layout = Layout.of(initial)
    strategy = Measured(FedAvg(fraction_evaluate=0.0), mask=random_mask(layout, density))
    strategy.start(LocalGrid(client_app(), replies), to_record(initial), num_rounds=1)
    row = strategy.row
    row["within"] = {
        "ours <= 2 gemv": row["ours_ms"] <= 2 * row["gemv_ms"],
        "dense_unpack >= 20 ours": row["dense_unpack_ms"] >= 20 * row["ours_ms"],
        "ours_total <= flower_fedavg / 3": row["ours_total_ms"] <= row["flower_fedavg_ms"] / 3,
        "peak <= replies + 3 model": row["peak_mb"] <= row["replies_mb"] + 3 * row["model_mb"],
    }
    return row


def other_work(density: float) -> dict[str, Any]:
    """Time choosing a mask, and packing and unpacking a message, of a larger model."""
    initial = model()
    layout = Layout.of(initial)
    mask = random_mask(layout, density)
    random = np.random.default_rng(2)
    score = {spec.name: random.random(spec.shape) for spec in layout.prunable}
    packed = mask.gather(initial)
    flat = flatten(mask, packed)["float32"]
    record = pack_values(mask, packed)
    mask.scatter(packed)  # the mask's indices are made once
    large = model(96)
    large_layout = Layout.of(large)
    large_mask = random_mask(large_layout, density)
    back = large_mask.scatter(unpack_values(large_mask, pack_values(large_mask, large_mask.gather(large))))
    same = all(np.array_equal(back[name], array) for name, array in large_mask.apply(large).items())
    large_score = {spec.name: random.random(spec.shape) for spec in large_layout.prunable}
    return {
        "scores": layout.prunable_size,
        "choose_ms": timed(lambda: select(layout, score, Budget.whole(layout, 1 - density)), 3),
        "copy_ms": timed(flat.copy, 25),
        "pack_and_unpack_ms": timed(lambda: unpack_values(mask, pack_values(mask, packed)), 25),
        "unpack_ms": timed(lambda: unpack_values(mask, record), 25),
        "gather_ms": timed(lambda: mask.gather(initial)),
        "scatter_ms": timed(lambda: mask.scatter(packed)),
        "large": {
            "parameters": large_layout.size,
            "arrives_as_sent": same,
            "choose_ms": timed(lambda: select(large_layout, large_score, Budget.whole(large_layout, 1 - density)), 1),
        },
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replies", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.3, 0.1])
    options = parser.parse_args()
    rows = []
    for replies in options.replies:
        for density in options.densities:
            rows.append(measure(replies, density))
            print(rows[-1], file=sys.stderr)
    print(json.dumps({"rows": rows, **other_work(0.3)}))


if __name__ == "__main__":
    main()
