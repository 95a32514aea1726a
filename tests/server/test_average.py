"""The averaging kernel against Flower's own FedAvg, alone and inside AutoFlip."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pytest
from apps import arrays_of, message_app, model, record
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import strategy as flowers
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    Strategy,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from autoflip_flwr import AutoFlip, Layout, Mask, autoflip_mod
from autoflip_flwr.core.choices import CODED, PACKINGS, VALUES
from autoflip_flwr.core.layout import Arrays
from autoflip_flwr.server import average, translator
from autoflip_flwr.server.average import weighted_mean
from autoflip_flwr.testing import LocalGrid
from autoflip_flwr.wire.values import CHUNK, Coded, Vector, encode
from autoflip_flwr.wrapped import traits

NODES = 4


@pytest.fixture(scope="module", autouse=True)
def _run() -> None:
    LocalGrid(ClientApp())  # Flower's messages can be made in a run only


def reply(values: np.ndarray, weight: float) -> Message:
    content = {"arrays": ArrayRecord({"x": Array(values)}), "metrics": MetricRecord({"num-examples": weight})}
    return Message(RecordDict(content), 1, "train")


def fedavg(replies: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """The mean that Flower makes of them."""
    messages = [reply(values, weight) for values, weight in zip(replies, weights, strict=True)]
    arrays, _ = FedAvg().aggregate_train(1, messages)
    assert arrays is not None
    return arrays["x"].numpy()


def plain(values: np.ndarray) -> Vector:
    return Vector(values.dtype.name, values.size, values)


def drawn(count: int, size: int, dtype: str, seed: int = 0) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [draw.normal(size=size).astype(dtype) for _ in range(count)]


def same_bits(one: np.ndarray, other: np.ndarray) -> None:
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    assert one.tobytes() == other.tobytes()


def cores(patch: pytest.MonkeyPatch, count: int) -> None:
    patch.setattr(average.os, "sched_getaffinity", lambda _: set(range(count)), raising=False)


# The mean


def test_the_mean_by_hand():
    one, two = np.array([1, 2, 3], np.float32), np.array([5, 2, -1], np.float32)
    assert weighted_mean([plain(one), plain(two)], [3, 1]).tolist() == [2, 2, 2]
    assert weighted_mean([plain(two)], [7]).tolist() == [5, 2, -1]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(
    ("size", "weights"),
    [
        (0, [1, 2]),
        (1, [0.1, 2.5]),
        (CHUNK - 1, [1, 2.5, 3, 4, 5, 6, 7]),
        (CHUNK, [17, 3, 40]),
        (CHUNK + 1, [3]),
        (3 * CHUNK + 5, [17, 3, 40]),
    ],
)
def test_the_mean_is_fedavgs_bit_for_bit_whatever_the_number_of_chunks(size: int, weights: list[float], dtype: str):
    replies = drawn(len(weights), size, dtype)
    same_bits(weighted_mean([plain(values) for values in replies], weights), fedavg(replies, weights))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 64])
def test_the_mean_is_fedavgs_bit_for_bit_whatever_the_number_of_threads(count: int, monkeypatch: pytest.MonkeyPatch):
    cores(monkeypatch, count)
    replies, weights = drawn(3, 2**20 + CHUNK + 3, "float32"), [17, 3, 40]
    same_bits(weighted_mean([plain(values) for values in replies], weights), fedavg(replies, weights))


numbers = st.floats(-60_000, 60_000, width=16) | st.sampled_from([0.0, -0.0, 6e-8, 1.0])
weights = st.integers(1, 10**6) | st.floats(1e-3, 1e6)


@settings(deadline=None, max_examples=80)
@given(
    rows=st.integers(0, 40).flatmap(
        lambda size: st.lists(
            st.tuples(st.lists(numbers, min_size=size, max_size=size), weights), min_size=1, max_size=7
        )
    ),
    dtype=st.sampled_from(["float16", "float32", "float64"]),
    count=st.integers(1, 4),
)
def test_any_mean_is_fedavgs_bit_for_bit(rows: list[tuple[list[float], float]], dtype: str, count: int):
    replies, weights = [np.array(values, dtype) for values, _ in rows], [weight for _, weight in rows]
    with pytest.MonkeyPatch.context() as patch:  # many small chunks, and threads for them
        cores(patch, count)
        patch.setattr(average, "CHUNK", 8)
        patch.setattr(average, "_WORTH_THREADS", 16)
        found = weighted_mean([plain(values) for values in replies], weights)
    same_bits(found, fedavg(replies, weights))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("kind", CODED)
def test_the_mean_of_coded_replies_is_that_of_the_decoded_ones(kind: str, dtype: str):
    size, kept = 2 * CHUNK + 77, 2 * CHUNK - 300
    updates, base = drawn(3, size, "float32"), drawn(1, size, dtype, seed=9)[0]
    vectors = [Vector(dtype, size, Coded(encode(kind, one, kept), kind, kept, size).read, base) for one in updates]
    weights = [5, 2.5, 11]
    found = weighted_mean(vectors, weights)
    same_bits(found, weighted_mean([plain(vector.whole()) for vector in vectors], weights))
    same_bits(found, fedavg([vector.whole() for vector in vectors], weights))


def peak_of(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("count", [1, 4])
def test_memory_is_the_results_and_a_chunk_for_each_thread(count: int, monkeypatch: pytest.MonkeyPatch):
    cores(monkeypatch, count)
    size = 2**20 + 2**19
    vectors = [plain(values) for values in drawn(5, size, "float32")]
    assert peak_of(lambda: weighted_mean(vectors, [1, 2, 3, 4, 5])) < 4 * (size + count * CHUNK) + 2**16


def test_coded_replies_are_decoded_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch):
    cores(monkeypatch, 1)
    size, base = 2**20 + 2**19, np.zeros(2**20 + 2**19, np.float32)
    data = [encode("int8", one, size) for one in drawn(5, size, "float32")]
    vectors = [Vector("float32", size, Coded(one, "int8", size, size).read, base) for one in data]
    assert peak_of(lambda: weighted_mean(vectors, [1, 2, 3, 4, 5])) < 4 * (size + 6 * CHUNK) + 2**16


@pytest.mark.parametrize("at", [0, 2**20 - 1], ids=["this thread", "another one"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_an_error_in_any_thread_reaches_the_caller(count: int, at: int, monkeypatch: pytest.MonkeyPatch):
    def source(start: int, stop: int) -> np.ndarray:
        if start <= at < stop:
            raise MemoryError("no room")
        return np.zeros(stop - start, np.float32)

    cores(monkeypatch, count)
    with pytest.raises(MemoryError, match="no room"):
        weighted_mean([Vector("float32", 2**20, source)], [1])


def test_the_replies_and_the_base_are_left_as_they_are():
    replies, base = drawn(2, 300, "float32"), np.ones(300, np.float32)
    vectors = [Vector("float32", 300, lambda a, b, one=one: one[a:b], base) for one in replies]
    for array in (*replies, base):
        array.flags.writeable = False
    weighted_mean(vectors, [1, 2])
    same_bits(replies[0], drawn(2, 300, "float32")[0])


# In AutoFlip


def precise(dtype: str) -> Arrays:
    """A model in which prunable and other arrays of two precisions, a scalar and counters are mixed."""
    draw = np.random.default_rng(2)
    return {
        "norm.scale": draw.normal(size=5).astype(dtype),
        "hidden.weight": draw.normal(size=(6, 50)).astype(dtype),
        "temperature": np.array(0.7, dtype),
        "seen": np.array([3, 4], np.int32),
        "out.weight": draw.normal(size=(3, 6)).astype(np.float32),
        "flag": np.array(True),
    }


def moving_app() -> ClientApp:
    """Each node moves each floating value by a little, in the model's own precision."""
    app = ClientApp(mods=[autoflip_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        part = int(context.node_config["partition-id"])
        draw = np.random.default_rng([part, int(message.content["config"]["server-round"])])
        new = {
            name: (array + 0.1 * draw.normal(size=array.shape)).astype(array.dtype)
            if array.dtype.kind == "f"
            else array
            for name, array in arrays_of(message.content["arrays"]).items()
        }
        metrics = MetricRecord({"num-examples": 10 + 7 * part, "train-loss": 0.1 * part, "parts": [0.3, 1.0 + part]})
        return Message(RecordDict({"arrays": record(new), "metrics": metrics}), reply_to=message)

    return app


def halved(arrays: Arrays) -> Mask:
    layout = Layout.of(arrays)
    draw = np.random.default_rng(4)
    return Mask.from_bool(layout, {spec.name: draw.random(spec.shape) < 0.5 for spec in layout.prunable})


def inner(kind: type[FedAvg] = FedAvg) -> FedAvg:
    options = {"proximal_mu": 0.25} if kind is FedProx else {}
    return kind(fraction_evaluate=0.0, **options)


def both_ways(
    make: Callable[[], AutoFlip], app: Callable[[], ClientApp], start: Arrays
) -> tuple[list[tuple[Arrays, dict]], list[int]]:
    """Two runs, with the kernel and without it, and how many means the kernel made in each."""
    runs, used = [], []
    for kernel in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            calls: list[int] = []
            patch.setattr(
                translator, "weighted_mean", lambda *args, calls=calls: calls.append(1) or weighted_mean(*args)
            )
            if not kernel:
                patch.setattr(traits, "averages_plainly", lambda _: False)
            random.seed(7)
            result = make().start(LocalGrid(app(), NODES), record(start), num_rounds=3)
        runs.append((arrays_of(result.arrays), result.train_metrics_clientapp))
        used.append(len(calls))
    return runs, used


def check_alike(runs: list[tuple[Arrays, dict]]) -> None:
    (one, metrics), (other, other_metrics) = runs
    assert list(one) == list(other)
    for name in one:
        same_bits(one[name], other[name])
    assert metrics == other_metrics
    assert list(metrics) == [1, 2, 3]


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kind", [FedAvg, FedProx])
def test_the_kernel_changes_no_bit_of_a_run(kind: type[FedAvg], packing: str, values: str):
    mask = halved(model())
    runs, used = both_ways(
        lambda: AutoFlip(inner(kind), mask=mask, coordinates=packing, values=values), message_app, model()
    )
    check_alike(runs)
    assert used == [3, 0]
    assert runs[0][0]["steps"] == 3 * NODES


@pytest.mark.runs
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_the_kernel_changes_no_bit_of_a_model_of_two_precisions(dtype: str, packing: str, values: str):
    start = precise(dtype)
    mask = halved(start)
    runs, used = both_ways(lambda: AutoFlip(inner(), mask=mask, coordinates=packing, values=values), moving_app, start)
    check_alike(runs)
    assert used == [2 * 3, 0]
    assert {name: (array.dtype, array.shape) for name, array in runs[0][0].items()} == {
        name: (array.dtype, array.shape) for name, array in start.items()
    }


def test_the_kernel_changes_no_bit_after_an_exploration_and_with_a_changing_mask():
    other = halved(model())
    runs, _ = both_ways(
        lambda: AutoFlip(inner(), sparsity=0.5, mask_schedule={2: other}.get, seed=1), message_app, model()
    )
    check_alike(runs)


def test_the_kernel_changes_no_bit_where_replies_are_left_out(caplog: pytest.LogCaptureFixture):
    def broken(message: Message, context: Context) -> None:
        if context.node_id == 101:
            raise RuntimeError("no battery")
        if context.node_id == 102:
            message.content["arrays"] = record({**model(), "hidden.bias": np.full(6, np.nan, np.float32)})

    runs, _ = both_ways(lambda: AutoFlip(inner(), mask=halved(model())), lambda: message_app(broken), model())
    check_alike(runs)
    assert "'hidden.bias' holds NaN" in caplog.text
    assert "no battery" in caplog.text


def test_a_round_without_any_reply_that_counts_leaves_the_model():
    def failing(message: Message, context: Context) -> None:
        if message.content["config"]["server-round"] == 2:
            raise RuntimeError("no battery")

    runs, used = both_ways(lambda: AutoFlip(inner(), mask=halved(model())), lambda: message_app(failing), model())
    (one, metrics), (other, other_metrics) = runs
    for name in one:
        same_bits(one[name], other[name])
    assert metrics == other_metrics
    assert list(metrics) == [1, 3]
    assert used == [2, 0]


# Which strategies it is for


class OwnRounds(FedAvg):
    """Chooses its nodes in a way of its own, and averages as FedAvg does."""

    def configure_train(self, *args, **options):
        return list(super().configure_train(*args, **options))[:2]


class OwnMean(FedAvg):
    def aggregate_train(self, server_round: int, replies: Iterable[Message]):
        return super().aggregate_train(server_round, replies)


class OwnMeanOfProx(FedProx):
    aggregate_train = OwnMean.aggregate_train


def own_metrics(contents: list[RecordDict], weight_key: str) -> MetricRecord:
    return MetricRecord({"nodes": len(contents)})


def patched() -> FedAvg:
    strategy = FedAvg()
    strategy.aggregate_train = lambda server_round, replies: (None, None)  # type: ignore[method-assign]
    return strategy


@pytest.mark.parametrize(
    "strategy",
    [FedAvg(), FedProx(), FedAvg(weighted_by_key="n", fraction_train=0.5), OwnRounds()],
    ids=["FedAvg", "FedProx", "with options", "own choice of nodes"],
)
def test_the_kernel_is_for_strategies_that_average_as_fedavg(strategy: Strategy):
    assert traits.averages_plainly(strategy)


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(FedAvgM(), id="FedAvgM"),
        pytest.param(FedMedian(), id="FedMedian"),
        pytest.param(OwnMean(), id="own mean"),
        pytest.param(OwnMeanOfProx(), id="own mean of another class"),
        pytest.param(patched(), id="own mean of an instance"),
        pytest.param(FedAvg(train_metrics_aggr_fn=own_metrics), id="own metrics"),
        pytest.param(FedAvg(train_metrics_aggr_fn=lambda contents, key: MetricRecord()), id="own metrics, a lambda"),
        pytest.param(DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.1, 1.0, 2), id="server-side clipping"),
        pytest.param(DifferentialPrivacyServerSideAdaptiveClipping(FedAvg(), 0.1, 2), id="server-side adaptive"),
        pytest.param(DifferentialPrivacyClientSideFixedClipping(FedAvg(), 0.1, 1.0, 2), id="client-side clipping"),
        pytest.param(DifferentialPrivacyClientSideAdaptiveClipping(FedAvg(), 0.1, 2), id="client-side adaptive"),
    ],
)
def test_the_kernel_is_not_for_strategies_that_look_at_the_replies(strategy: Strategy):
    assert not traits.averages_plainly(strategy)


def test_of_flowers_own_strategies_the_kernel_is_for_two():
    classes = [value for value in vars(flowers).values() if isinstance(value, type) and issubclass(value, Strategy)]
    plainly = set()
    for kind in classes:
        if kind is Strategy:
            continue
        strategy = object.__new__(kind)
        strategy.__dict__.update(vars(FedAvg()))
        if traits.averages_plainly(strategy):
            plainly.add(kind.__name__)
    assert plainly == {"FedAvg", "FedProx"}


@pytest.mark.parametrize("make", [OwnMean, lambda: FedAvg(train_metrics_aggr_fn=own_metrics)])
def test_code_of_the_users_own_gets_the_arrays_of_the_replies(make: Callable[[], FedAvg]):
    seen: list[int] = []

    def look(contents: list[RecordDict], weight_key: str) -> MetricRecord:
        seen.extend(len(content["arrays"]) for content in contents)
        return MetricRecord({"nodes": len(contents)})

    strategy = make()
    strategy.train_metrics_aggr_fn = look
    strategy.fraction_evaluate = 0.0
    AutoFlip(strategy, mask=halved(model())).start(LocalGrid(message_app(), NODES), record(model()), num_rounds=1)
    assert seen == [len(model())] * NODES


def test_a_strategy_with_its_own_choice_of_nodes_averages_with_the_kernel():
    runs, used = both_ways(
        lambda: AutoFlip(OwnRounds(fraction_evaluate=0.0), mask=halved(model())), message_app, model()
    )
    check_alike(runs)
    assert used == [3, 0]
