"""Coded values, error feedback and mask differences, end to end over an in-process grid."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from apps import NO_FAILURES, arrays_of, message_app, model, record, same_bytes
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    Strategy,
)

from autoflip_flwr import AutoFlip, Layout, Mask, autoflip_mod, current_mask
from autoflip_flwr.client.error_feedback import RESIDUAL, follow_mask
from autoflip_flwr.core.choices import CODED, PACKINGS, VALUES
from autoflip_flwr.core.layout import Arrays
from autoflip_flwr.server.settings import Values
from autoflip_flwr.testing import LocalGrid
from autoflip_flwr.wire import mask_record
from autoflip_flwr.wire.keys import EVALUATE, EXPLORE, HEADER, MASK_RECORD, MOD_REFUSED, TRAIN
from autoflip_flwr.wire.messages import flatten, kept_and_size, make_header, pack_values, unpack_values
from autoflip_flwr.wire.records import fingerprint
from autoflip_flwr.wire.values import Coded, coded_size, encode, is_coded

NODES = 4
WAYS = {
    "up": lambda kind: {"values": Values(up=kind)},
    "down": lambda kind: {"values": Values(down=kind)},
    "both": lambda kind: {"values": kind},
}


def inner(kind: type[FedAvg] = FedAvg, **options) -> FedAvg:
    return kind(fraction_evaluate=0.0, **options)


def halved(arrays: Arrays, seed: int = 4) -> Mask:
    layout = Layout.of(arrays)
    draw = np.random.default_rng(seed)
    return Mask.from_bool(layout, {spec.name: draw.random(spec.shape) < 0.5 for spec in layout.prunable})


@dataclass(frozen=True)
class Reply:
    """A reply as the node has sent it."""

    node: int
    content: RecordDict | None
    error: str = ""


@dataclass
class Run:
    """A finished run: what it gave, and what was sent."""

    strategy: AutoFlip
    grid: LocalGrid
    arrays: Arrays
    replies: list[Reply] = field(default_factory=list)
    models: dict[int, Arrays] = field(default_factory=dict)

    @property
    def failures(self) -> dict[str, int]:
        return self.strategy.ledger.failure_counts()

    def sent(self, node: int, round_: int) -> list[RecordDict]:
        found = [message.content for message in self.grid.sent if message.metadata.dst_node_id == node]
        return [content for content in found if content[HEADER]["round"] == round_]

    def replied(self, node: int, round_: int) -> list[RecordDict]:
        found = [reply.content for reply in self.replies if reply.node == node and reply.content is not None]
        return [content for content in found if content[HEADER]["round"] == round_]


def run(
    strategy: AutoFlip,
    app: ClientApp | None = None,
    start: Arrays | None = None,
    *,
    rounds: int = 3,
    nodes: int = NODES,
    forget: Callable[[int, int], bool] | None = None,
    tamper: Callable[[Message], Message] | None = None,
) -> Run:
    replies: list[Reply] = []
    models: dict[int, Arrays] = {}

    def seen(reply: Message) -> Message:
        content, error = (None, reply.error.reason) if reply.has_error() else (reply.content, "")
        replies.append(Reply(reply.metadata.src_node_id, content, error))
        return reply if tamper is None else tamper(reply)

    grid = LocalGrid(message_app() if app is None else app, nodes, forget=forget, tamper=seen)
    random.seed(7)
    np.random.seed(7)  # differential privacy draws its noise from it
    result = strategy.start(
        grid,
        record(model() if start is None else start),
        num_rounds=rounds,
        timeout=30,
        evaluate_fn=lambda round_, arrays: models.setdefault(round_, arrays_of(arrays)) and None,
    )
    return Run(strategy, grid, arrays_of(result.arrays), replies, models)


def client(work: Callable[[str, np.ndarray, Context, int], np.ndarray]) -> ClientApp:
    """An app whose training is ``work(name, array, context, round)``; it keeps to the mask."""
    app = ClientApp(mods=[autoflip_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        mask = current_mask(context)
        new = {}
        for name, array in arrays_of(message.content["arrays"]).items():
            trained = work(name, array, context, message.content["config"]["server-round"])
            keep = None if mask is None else mask.keep.get(name)
            new[name] = trained if keep is None else np.where(keep, trained, 0).astype(array.dtype)
        metrics = MetricRecord({"num-examples": 10, "train-loss": 1.0})
        return Message(RecordDict({"arrays": record(new), "metrics": metrics}), reply_to=message)

    return app


def distance(left: Arrays, right: Arrays) -> float:
    """The largest difference of two models."""
    return max(float(np.abs(left[name].astype(np.float64) - right[name]).max()) for name in left)


def respects(arrays: Arrays, mask: Mask) -> bool:
    return all(not arrays[name][~keep].any() for name, keep in mask.keep.items())


# --- a run in each coding, each way -----------------------------------------------------------------------------------

MASK = halved(model())
KEPT = MASK.kept
SIZE = KEPT + 6  # the bias is never pruned
# values are within 3 of 0, updates within 0.7
TOLERANCE = {"bfloat16": 2**-7, "float16": 2**-9, "int8": 3 / 254}


@functools.cache
def uncoded(coordinates: str) -> Arrays:
    return run(AutoFlip(inner(), mask=MASK, coordinates=coordinates)).arrays


@pytest.mark.parametrize("coordinates", PACKINGS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", CODED)
def test_a_coded_run_ends_near_the_uncoded_one_and_keeps_to_the_mask(kind: str, way: str, coordinates: str):
    expected = uncoded(coordinates)
    coded = run(AutoFlip(inner(), mask=MASK, coordinates=coordinates, **WAYS[way](kind)))
    assert coded.failures == NO_FAILURES
    for arrays in coded.models.values():
        assert respects(arrays, MASK)
    assert list(coded.arrays) == list(expected)
    assert all(coded.arrays[name].dtype == array.dtype for name, array in expected.items())
    assert 0 < distance(coded.arrays, expected) < TOLERANCE[kind]
    assert coded.arrays["steps"] == expected["steps"] == 3 * NODES
    assert coded.strategy.mask.digest == MASK.digest


@pytest.mark.parametrize("kind", CODED)
def test_replies_are_bytes_of_the_size_known_beforehand_and_messages_are_not(kind: str):
    found = run(AutoFlip(inner(), mask=MASK, values=Values(up=kind)))
    assert len(found.replies) == 3 * NODES
    for reply in found.replies:
        shapes = {key: (array.dtype, array.shape) for key, array in reply.content["arrays"].items()}
        assert shapes == {"float32": ("uint8", (coded_size(kind, KEPT, SIZE),)), "int64": ("int64", (1,))}
        assert reply.content[HEADER]["values"] == kind
    for message in found.grid.sent:
        assert message.content["arrays"]["float32"].dtype == "float32"
        assert message.content[HEADER]["reply"] == kind
        assert "values" not in message.content[HEADER]


@pytest.mark.parametrize("kind", CODED)
def test_messages_are_bytes_of_the_size_known_beforehand_and_replies_are_not(kind: str):
    found = run(AutoFlip(inner(), mask=MASK, values=Values(down=kind)))
    for message in found.grid.sent:
        shapes = {key: (array.dtype, array.shape) for key, array in message.content["arrays"].items()}
        assert shapes == {"float32": ("uint8", (coded_size(kind, KEPT, SIZE),)), "int64": ("int64", (1,))}
        assert message.content[HEADER]["values"] == kind
        assert "reply" not in message.content[HEADER]
    for reply in found.replies:
        assert reply.content["arrays"]["float32"].dtype == "float32"
        assert "values" not in reply.content[HEADER]


def test_either_way_may_be_coded_differently():
    found = run(AutoFlip(inner(), mask=MASK, values=Values(down="bfloat16", up="int8")))
    assert found.failures == NO_FAILURES
    sizes = {len(message.content["arrays"]["float32"].numpy()) for message in found.grid.sent}
    assert sizes == {coded_size("bfloat16", KEPT, SIZE)}
    sizes = {len(reply.content["arrays"]["float32"].numpy()) for reply in found.replies}
    assert sizes == {coded_size("int8", KEPT, SIZE)}


def test_the_client_gets_what_the_message_holds_and_full_arrays_of_the_models_dtypes():
    seen: list[Arrays] = []
    app = message_app(lambda message, context: seen.append(arrays_of(message.content["arrays"])))
    found = run(AutoFlip(inner(), mask=MASK, values="int8"), app, rounds=1)
    start = MASK.gather(MASK.apply(model()))
    expected = MASK.scatter(unpack_values(MASK, pack_values(MASK, start, "int8"), "int8"))
    assert len(seen) == NODES
    for arrays in seen:
        same_bytes(arrays, {name: np.asarray(array) for name, array in expected.items()})
    assert (
        found.sent(100, 1)[0]["arrays"]["float32"].numpy().tobytes()
        == encode("int8", flatten(MASK, start)["float32"], KEPT).tobytes()
    )


def test_explorers_start_from_what_they_were_sent_and_the_exploration_goes_on():
    for values in ("log8", "float32"):
        found = run(AutoFlip(inner(), sparsity=0.5, values=Values(deltas=values, up="int8", down="int8")))
        exact = run(AutoFlip(inner(), sparsity=0.5, values=Values(deltas="float32")))
        assert found.failures == NO_FAILURES
        moves, expected = (one.strategy.exploration.signed_mean["hidden.weight"] for one in (found, exact))
        assert np.abs(moves - expected).max() < 0.1 * 3 / 254 + 0.05 * np.abs(expected).max()
        assert respects(found.arrays, found.strategy.mask)


def test_evaluation_gets_coded_values_and_answers_without():
    shapes = []

    def look(message: Message, context: Context) -> None:
        if message.metadata.message_type == "evaluate":
            shapes.append({name: array.shape for name, array in arrays_of(message.content["arrays"]).items()})

    found = run(AutoFlip(FedAvg(), mask=MASK, values="int8"), message_app(look), rounds=2)
    assert found.failures == NO_FAILURES
    assert shapes == [{name: array.shape for name, array in model().items()}] * 2 * NODES
    evaluations = [m for m in found.grid.sent if m.content[HEADER]["phase"] == EVALUATE]
    assert {message.content["arrays"]["float32"].dtype for message in evaluations} == {"uint8"}


@pytest.mark.parametrize("kind", ["int4", "float64", "log8", "", "INT8"])
def test_an_unknown_coding_is_refused(kind: str):
    with pytest.raises(ValueError, match=f"values = {kind!r}: must be one of float32, bfloat16, float16, int8"):
        AutoFlip(inner(), values=kind)
    for way in ("up", "down"):
        with pytest.raises(
            ValueError, match=f"values: {way} = {kind!r}: must be one of float32, bfloat16, float16, int8"
        ):
            Values(**{way: kind})


@pytest.mark.parametrize(
    "private",
    [
        DifferentialPrivacyClientSideFixedClipping(inner(), 0.1, 1.0, NODES),
        DifferentialPrivacyClientSideAdaptiveClipping(inner(), 0.1, NODES),
    ],
    ids=["fixed", "adaptive"],
)
def test_updates_that_clients_clip_are_not_rounded(private: Strategy):
    for coding in ({"values": "int8"}, {"values": Values(up="bfloat16")}):
        with pytest.raises(ValueError, match=r"rounding may lengthen an update .* Values\(up='float32'\)"):
            AutoFlip(private, **coding)
    AutoFlip(private, values=Values(down="int8"))
    AutoFlip(private, values=Values(up="float32", down="int8"))


@pytest.mark.parametrize(
    ("phase", "coding"),
    [
        (TRAIN, {"reply": "log8"}),
        (TRAIN, {"values": "log8"}),
        (EVALUATE, {"values": "log8"}),
        (EXPLORE, {"reply": "int8"}),
        (EXPLORE, {"reply": "bfloat16"}),
        (TRAIN, {"values": "int4"}),
    ],
)
def test_the_client_refuses_a_coding_that_does_not_belong_to_the_phase(phase: str, coding: dict[str, str]):
    called: list[int] = []
    grid = LocalGrid(message_app(lambda message, context: called.append(1)), 1)
    content = RecordDict(
        {
            "arrays": pack_values(MASK, MASK.gather(model())),
            "config": ConfigRecord({"server-round": 1}),
            HEADER: make_header(phase, 1, MASK, **coding),
            MASK_RECORD: mask_record.encode_mask(MASK),
        }
    )
    kind = "evaluate" if phase == EVALUATE else "train"
    (reply,) = grid.send_and_receive([Message(content, 100, kind)])
    assert reply.has_error()
    assert reply.error.code == MOD_REFUSED
    assert next(iter(coding.values())) in reply.error.reason
    assert called == []


def of_precision(dtype: str) -> Arrays:
    return {name: array.astype(dtype) if array.dtype.kind == "f" else array for name, array in model().items()}


def shrink(name: str, array: np.ndarray, context: Context, round_: int) -> np.ndarray:
    if array.dtype.kind != "f":
        return array + 1
    draw = np.random.default_rng([round_, context.node_id])
    return (array * 0.9 + 0.1 * draw.normal(size=array.shape)).astype(array.dtype)


@functools.cache
def uncoded_of_precision(dtype: str) -> Arrays:
    start = of_precision(dtype)
    return run(AutoFlip(inner(), mask=halved(start)), client(shrink), start).arrays


@pytest.mark.parametrize("dtype", ["float16", "float64"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", CODED)
def test_models_of_other_precisions_are_coded_where_it_makes_them_smaller(kind: str, way: str, dtype: str):
    start = of_precision(dtype)
    mask = halved(start)
    coded = run(AutoFlip(inner(), mask=mask, **WAYS[way](kind)), client(shrink), start, rounds=3)
    assert coded.failures == NO_FAILURES
    assert {name: array.dtype for name, array in coded.arrays.items()} == {
        name: array.dtype for name, array in start.items()
    }
    assert distance(coded.arrays, uncoded_of_precision(dtype)) < TOLERANCE[kind]
    assert respects(coded.arrays, mask)
    assert coded.arrays["steps"] == 3
    found = coded.replied(100, 1)[0]["arrays"][dtype].dtype
    assert found == ("uint8" if way != "down" and is_coded(kind, dtype) else dtype)
    found = coded.sent(100, 1)[0]["arrays"][dtype].dtype
    assert found == ("uint8" if way != "up" and is_coded(kind, dtype) else dtype)


STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "FedProx": lambda: inner(FedProx, proximal_mu=0.1),
    "FedAvgM": lambda: inner(FedAvgM, server_momentum=0.9, server_learning_rate=0.1),
    "FedAdam": lambda: inner(FedAdam, eta=0.01),
    "FedMedian": lambda: inner(FedMedian),
    "FedTrimmedAvg": lambda: inner(FedTrimmedAvg),
    "server-side clipping": lambda: DifferentialPrivacyServerSideFixedClipping(inner(), 0.0, 1.0, NODES),
    "server-side adaptive": lambda: DifferentialPrivacyServerSideAdaptiveClipping(
        inner(), 0.0, NODES, clipped_count_stddev=0.0
    ),
}


@pytest.mark.parametrize("coordinates", PACKINGS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_any_strategy_gives_nearly_what_it_gives_without_coding(name: str, coordinates: str):
    expected = run(AutoFlip(STRATEGIES[name](), mask=MASK, coordinates=coordinates))
    coded = run(AutoFlip(STRATEGIES[name](), mask=MASK, coordinates=coordinates, values="int8"))
    assert coded.failures == NO_FAILURES
    assert respects(coded.arrays, MASK)
    # FedAdam divides by the size of the change: a small error of a small change may be a whole step
    assert distance(coded.arrays, expected.arrays) < (0.05 if name == "FedAdam" else 2 * TOLERANCE["int8"])
    assert coded.arrays["steps"] == 3 * NODES


# --- what rounding loses ----------------------------------------------------------------------------------------------

LINE = {"w": np.zeros((1, 300), np.float32)}
FULL = Mask.full(Layout.of(LINE))
TINY = 1e-3


def leap(name: str, array: np.ndarray, context: Context, round_: int) -> np.ndarray:
    """One large move, back and forth, next to constant ones far below half a step of it (1 / 254)."""
    moved = array + np.float32(TINY)
    moved[0, [0, 256]] = array[0, [0, 256]] + (1 if round_ % 2 else -1)
    return moved


def residual(grid: LocalGrid, node: int, mask: Mask, dtype: str = "float32") -> np.ndarray:
    kept, size = kept_and_size(mask, mask.layout.by_dtype[dtype])
    data = grid.contexts[node].state[RESIDUAL][dtype]
    return Coded(np.frombuffer(data, np.uint8), "int8", kept, size).read(0, size)


def test_with_feedback_small_moves_arrive_in_the_long_run():
    rounds = 20
    found = run(AutoFlip(inner(), mask=FULL, values="int8"), client(leap), LINE, rounds=rounds, nodes=2)
    assert found.failures == NO_FAILURES
    for round_, arrays in found.models.items():
        small = np.delete(arrays["w"][0], [0, 256])
        assert np.abs(small - round_ * TINY).max() < 1 / 254 + 1e-4, round_
    assert np.abs(found.arrays["w"][0, [0, 256]]).max() < 1e-6
    for node in found.grid.contexts:
        assert np.abs(residual(found.grid, node, FULL)).max() <= 1 / 254 * (1 + 1e-3)


def test_without_state_small_moves_are_lost_but_nothing_else():
    found = run(
        AutoFlip(inner(), mask=FULL, values="int8"),
        client(leap),
        LINE,
        rounds=10,
        nodes=2,
        forget=lambda node, count: True,
    )
    assert found.failures == NO_FAILURES
    small = np.delete(found.arrays["w"][0], [0, 256])
    assert not small.any()  # each of them is rounded to nothing, each time
    assert np.abs(found.arrays["w"][0, [0, 256]]).max() < 1e-6


@pytest.mark.parametrize("lost", [1, 5, 9])
def test_a_node_that_loses_its_state_loses_the_remainder_alone(lost: int):
    def start(forget: Callable[[int, int], bool] | None) -> Run:
        strategy = AutoFlip(inner(), mask=FULL, values="int8")
        return run(strategy, client(leap), LINE, rounds=12, nodes=2, forget=forget)

    kept, forgot = start(None), start(lambda node, count: node == 101 and count == lost)
    assert forgot.failures == NO_FAILURES
    for round_, arrays in forgot.models.items():
        if round_ <= lost:
            same_bytes(arrays, kept.models[round_])
        # one node's remainder, half of the average, and what is being rounded on either side
        assert distance(arrays, kept.models[round_]) < 0.5 / 254 + 1 / 127, round_
    repeated = [content for content in forgot.sent(101, lost + 1) if MASK_RECORD in content]
    assert len(repeated) == 1


def test_the_state_holds_the_remainder_in_int8():
    found = run(AutoFlip(inner(), mask=MASK, values=Values(up="int8")), rounds=1)
    for node, context in found.grid.contexts.items():
        lost = context.state[RESIDUAL]
        assert lost["digest"] == MASK.digest
        assert {key: len(value) for key, value in lost.items() if key != "digest"} == {
            "float32": coded_size("int8", KEPT, SIZE)
        }
        (reply,) = found.replied(node, 1)
        coded = Coded(reply["arrays"]["float32"].numpy(), "int8", KEPT, SIZE).read(0, SIZE)
        peak = np.abs(coded[:KEPT]).max()
        assert 0 < np.abs(residual(found.grid, node, MASK)[:KEPT]).max() <= peak / 254 * (1 + 2e-2)


@pytest.mark.parametrize("kind", [kind for kind in VALUES if kind != "int8"])
def test_other_codings_keep_nothing_in_the_state(kind: str):
    found = run(AutoFlip(inner(), mask=MASK, values=kind))
    assert all(RESIDUAL not in context.state for context in found.grid.contexts.values())


def test_a_reply_is_the_update_and_the_remainder_and_leaves_a_new_one():
    """The sum of what was sent and what is left is the sum of the updates, whatever they are."""

    def work(name: str, array: np.ndarray, context: Context, round_: int) -> np.ndarray:
        return np.asarray(array + np.random.default_rng([round_, 5]).normal(size=array.shape), np.float32)

    found = run(AutoFlip(inner(), mask=FULL, values=Values(up="int8")), client(work), LINE, rounds=5, nodes=2)
    sums = sum(np.random.default_rng([round_, 5]).normal(size=(1, 300)) for round_ in range(1, 6))[0]
    sent = sum(
        Coded(found.replied(100, round_)[0]["arrays"]["float32"].numpy(), "int8", 300, 300).read(0, 300)
        for round_ in range(1, 6)
    )
    # the remainder is itself in int8: each round it is right to half of its own step
    np.testing.assert_allclose(sent + residual(found.grid, 100, FULL), sums, rtol=0, atol=5 * (4 / 254) / 254)
    np.testing.assert_allclose(found.arrays["w"][0], sent, rtol=0, atol=1e-5)


def first_halves() -> tuple[Mask, Mask, Mask]:
    """Three masks of as many entries each; the first and the last are the same."""
    masks = []
    for at in (0, 1, 0):
        keep = np.arange(300).reshape(1, 300) % 2 == at
        keep[0, :2] = True
        masks.append(Mask.from_bool(FULL.layout, {"w": keep}))
    return tuple(masks)


def test_a_mask_that_changes_discards_the_remainder():
    small = 0.003  # 0.38 steps: twice that is rounded to one

    def work(name: str, array: np.ndarray, context: Context, round_: int) -> np.ndarray:
        moved = array + np.float32(small)
        moved[0, :2] = array[0, :2] + 1
        return moved

    def codes(schedule: dict[int, Mask]) -> list[np.ndarray]:
        strategy = AutoFlip(inner(), mask=first_halves()[0], mask_schedule=schedule.get, values=Values(up="int8"))
        found = run(strategy, client(work), LINE, rounds=3, nodes=2)
        assert found.failures == NO_FAILURES
        assert found.grid.contexts[100].state[RESIDUAL]["digest"] == strategy.mask.digest
        return [found.replied(100, i)[0]["arrays"]["float32"].numpy()[4:].view(np.int8)[2:] for i in (1, 2, 3)]

    _, odd, even = first_halves()
    assert [set(each.tolist()) for each in codes({})] == [{0}, {1}, {0}]
    assert [set(each.tolist()) for each in codes({2: odd})] == [{0}, {0}, {1}]
    assert [set(each.tolist()) for each in codes({2: odd, 3: even})] == [{0}, {0}, {0}]


@pytest.mark.parametrize(
    "state",
    [
        {"digest": FULL.digest},
        {"digest": FULL.digest, "float32": b""},
        {"digest": FULL.digest, "float32": bytes(3)},
        {"digest": "another", "float32": bytes(308)},
        {},
    ],
    ids=["no values", "empty", "another length", "another mask", "nothing"],
)
def test_a_remainder_that_does_not_fit_is_left_out(state: dict):
    def work(name: str, array: np.ndarray, context: Context, round_: int) -> np.ndarray:
        if round_ == 2:
            context.state[RESIDUAL] = ConfigRecord(state)
        return leap(name, array, context, round_)

    found = run(AutoFlip(inner(), mask=FULL, values=Values(up="int8")), client(work), LINE, rounds=2, nodes=2)
    assert found.failures == NO_FAILURES
    assert not np.delete(found.arrays["w"][0], [0, 256]).any()


# --- rounding on the way down -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CODED)
@pytest.mark.parametrize("coordinates", PACKINGS)
def test_rounding_on_the_way_down_does_not_add_up_where_clients_return_what_they_got(kind: str, coordinates: str):
    still = client(lambda name, array, context, round_: array)
    start = MASK.apply(model())
    found = run(AutoFlip(inner(), mask=MASK, coordinates=coordinates, values=Values(down=kind)), still, rounds=10)
    for arrays in found.models.values():
        assert distance(arrays, start) < 1e-5
    assert found.sent(100, 1)[0]["arrays"]["float32"].dtype == "uint8"
    seen = unpack_values(MASK, found.sent(100, 1)[0]["arrays"], kind)
    assert np.abs(seen["hidden.weight"] - MASK.gather(start)["hidden.weight"]).max() > 1e-4  # clients saw other values


@pytest.mark.parametrize("kind", CODED)
def test_clients_that_return_what_they_got_leave_the_model_as_it_is_to_the_bit_where_updates_are_coded(kind: str):
    still = client(lambda name, array, context, round_: array)
    found = run(AutoFlip(inner(), mask=MASK, values=kind), still, rounds=10, nodes=2)
    for arrays in found.models.values():
        same_bytes(arrays, MASK.apply(model()))  # a mean of two equal values is exact


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_rounding_on_the_way_down_does_not_add_up_in_other_precisions(dtype: str):
    still = client(lambda name, array, context, round_: array)
    start = {name: array.astype(dtype) for name, array in model().items() if array.dtype.kind == "f"}
    mask = halved(start)
    found = run(AutoFlip(inner(), mask=mask, values=Values(down="int8")), still, start, rounds=10, nodes=2)
    assert distance(found.arrays, mask.apply(start)) < (0.02 if dtype == "float16" else 1e-12)


# --- replies that must not count --------------------------------------------------------------------------------------


def spoiled(value: float, node: int = 102) -> ClientApp:
    def work(name: str, array: np.ndarray, context: Context, round_: int) -> np.ndarray:
        if array.dtype.kind != "f":
            return array + 1
        moved = (0.9 * array).astype(array.dtype)
        if context.node_id == node and name == "hidden.bias":
            moved[2] = value
        return moved

    return client(work)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", CODED)
def test_an_update_that_is_not_finite_is_refused_by_the_client_and_the_round_goes_on(
    kind: str, value: float, caplog: pytest.LogCaptureFixture
):
    found = run(AutoFlip(inner(), mask=MASK, values=Values(up=kind)), spoiled(value))
    assert found.failures == {"rejected": 0, "errors": 3, "absent": 0}
    errors = [(reply.node, reply.error) for reply in found.replies if reply.error]
    reason = "autoflip_mod: the client returned float32 values with NaN or infinity"
    assert errors == [(102, reason)] * 3
    assert f"node 102: {reason}" in caplog.text
    assert (
        distance(found.arrays, run(AutoFlip(inner(), mask=MASK, values=Values(up=kind)), spoiled(0, -1)).arrays) < 1e-6
    )
    assert RESIDUAL not in found.grid.contexts[102].state


def test_a_client_that_recovers_counts_again_with_the_remainder_from_before():
    def work(name: str, array: np.ndarray, context: Context, round_: int) -> np.ndarray:
        moved = leap(name, array, context, round_)
        if round_ == 2 and context.node_id == 101:
            moved[0, 5] = np.nan
        return moved

    found = run(AutoFlip(inner(), mask=FULL, values="int8"), client(work), LINE, rounds=3, nodes=2)
    assert found.failures == {"rejected": 0, "errors": 1, "absent": 0}
    left = {node: np.delete(residual(found.grid, node, FULL), [0, 256]).max() for node in (100, 101)}
    assert left == {100: pytest.approx(3 * TINY, abs=1e-4), 101: pytest.approx(2 * TINY, abs=1e-4)}


def tampered(change: Callable[[RecordDict], None]) -> Callable[[Message], Message]:
    def tamper(reply: Message) -> Message:
        if reply.metadata.src_node_id == 102:
            content = RecordDict(dict(reply.content))
            change(content)
            reply.content = content
        return reply

    return tamper


def says(kind: str | None) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        if kind is None:
            del content[HEADER]["values"]
        else:
            content[HEADER]["values"] = kind

    return change


def holds(data: Callable[[np.ndarray], np.ndarray], kind: str | None = None) -> Callable[[RecordDict], None]:
    """Other bytes, with the fingerprint that fits them."""

    def change(content: RecordDict) -> None:
        packed = arrays_of(content["arrays"])
        packed["float32"] = data(packed["float32"])
        content["arrays"] = record(packed)
        content[HEADER]["fingerprint"] = fingerprint(content["arrays"])
        if kind is not None:
            content[HEADER]["values"] = kind

    return change


def with_nan_scale(data: np.ndarray) -> np.ndarray:
    data = data.copy()
    data[:4] = 0xFF
    return data


@pytest.mark.parametrize(
    ("asked", "change", "reason"),
    [
        pytest.param("int8", says(None), "quantised as 'float32', expected 'int8'", id="says nothing"),
        pytest.param("int8", says("bfloat16"), "quantised as 'bfloat16', expected 'int8'", id="says another"),
        pytest.param("int8", says("log8"), "quantised as 'log8', expected 'int8'", id="says moves"),
        pytest.param("int8", says("int4"), "values 'int4': must be one of", id="says an unknown one"),
        pytest.param("bfloat16", says("float16"), "quantised as 'float16', expected 'bfloat16'", id="of the same size"),
        pytest.param("float32", says("int8"), "quantised as 'int8', expected 'float32'", id="coded unasked"),
        pytest.param("int8", holds(lambda data: data[:-1]), "uint8 values are", id="too short"),
        pytest.param("int8", holds(lambda data: np.append(data, data[:1])), "uint8 values are", id="too long"),
        pytest.param("int8", holds(lambda data: data.astype(np.float32)), "uint8 values are", id="not bytes"),
        pytest.param("int8", holds(lambda data: np.zeros(SIZE, np.float32)), "uint8 values are", id="not coded"),
        pytest.param("int8", holds(with_nan_scale), "a scale is not a number", id="a scale of NaN"),
        pytest.param("float16", holds(with_nan_scale), "it holds NaN or infinity", id="a half of NaN"),
        pytest.param(
            "int8",
            holds(lambda data: np.zeros(coded_size("bfloat16", KEPT, SIZE), np.uint8), "bfloat16"),
            "quantised as 'bfloat16', expected 'int8'",
            id="really coded otherwise",
        ),
    ],
)
def test_a_reply_that_is_not_coded_as_asked_is_left_out(
    asked: str, change: Callable[[RecordDict], None], reason: str, caplog: pytest.LogCaptureFixture
):
    found = run(AutoFlip(inner(), mask=MASK, values=asked), spoiled(0, -1), tamper=tampered(change))
    assert found.failures == {"rejected": 3, "errors": 0, "absent": 0}
    assert "rejected the reply of node 102" in caplog.text
    assert reason in caplog.text
    others = run(AutoFlip(inner(), mask=MASK, values=asked), spoiled(0, -1), nodes=2)
    assert distance(found.arrays, others.arrays) < 1e-5  # all nodes move alike


def test_an_update_that_leads_beyond_the_models_range_is_left_out(caplog: pytest.LogCaptureFixture):
    def change(content: RecordDict) -> None:
        packed = arrays_of(content["arrays"])
        packed["float32"] = encode("bfloat16", np.full(SIZE, 3e38, np.float32), KEPT)
        content["arrays"] = record(packed)
        content[HEADER]["fingerprint"] = fingerprint(content["arrays"])

    start = {name: np.full_like(array, 3e38) if name == "hidden.bias" else array for name, array in model().items()}
    still = client(lambda name, array, context, round_: array)
    found = run(
        AutoFlip(inner(), mask=MASK, values=Values(up="bfloat16")), still, start, tamper=tampered(change), rounds=1
    )
    assert found.failures == {"rejected": 1, "errors": 0, "absent": 0}
    assert "array 'hidden.bias' holds NaN or infinity" in caplog.text
    assert np.isfinite(found.arrays["hidden.bias"]).all()


# --- mask differences -------------------------------------------------------------------------------------------------

WIDE = {"w": np.random.default_rng(0).normal(size=(40, 50)).astype(np.float32), "b": np.zeros(40, np.float32)}


def drift(count: int) -> list[Mask]:
    """Masks of which each differs from the one before it in twelve entries."""
    draw = np.random.default_rng(1)
    keep = draw.random((40, 50)) < 0.3
    masks = []
    for _ in range(count):
        masks.append(Mask.from_bool(Layout.of(WIDE), {"w": keep.copy()}))
        keep.flat[draw.choice(keep.size, 12, replace=False)] ^= True
    return masks


class Absent(FedAvg):
    """Leaves out nodes in some rounds."""

    def __init__(self, absent: dict[int, set[int]]) -> None:
        super().__init__(fraction_evaluate=0.0)
        self.absent = absent

    def configure_train(self, server_round, arrays, config, grid):
        messages = super().configure_train(server_round, arrays, config, grid)
        away = self.absent.get(server_round, set())
        return [message for message in messages if message.metadata.dst_node_id not in away]


def drifting(
    masks: list[Mask], *, values: str = "float32", absent: dict[int, set[int]] | None = None, rounds: int = 0, **options
) -> Run:
    """A run whose mask is another one each round."""
    schedule = {round_: mask for round_, mask in enumerate(masks, 1) if round_ > 1}
    strategy = AutoFlip(Absent(absent or {}), mask=masks[0], mask_schedule=schedule.get, values=values)

    def work(name: str, array: np.ndarray, context: Context, round_: int) -> np.ndarray:
        return np.asarray(0.9 * array + 0.01 * round_ * (context.node_id - 98), np.float32)

    return run(strategy, client(work), WIDE, rounds=rounds or len(masks), **options)


def counts(found: Run, node: int, round_: int) -> bool:
    """Whether the node's last reply of the round holds values."""
    return "arrays" in found.replied(node, round_)[-1]


@pytest.mark.parametrize("values", ["float32", "int8"])
def test_a_mask_that_changes_a_little_travels_as_the_difference(values: str):
    masks = drift(3)
    found = drifting(masks, values=values, rounds=4)
    assert found.failures == NO_FAILURES
    for node in found.grid.contexts:
        first, *others = (found.sent(node, round_) for round_ in (1, 2, 3))
        whole = first[0][MASK_RECORD]
        assert mask_record.base_of(whole) == ""
        for base, (content,) in zip(masks, others, strict=False):
            difference = content[MASK_RECORD]
            assert difference["encoding"] == "difference"
            assert difference["base"] == base.digest
            assert difference.count_bytes() < whole.count_bytes() / 2
        (last,) = found.sent(node, 4)
        assert MASK_RECORD not in last  # nothing has changed
        stored = mask_record.decode_mask(found.grid.contexts[node].state[MASK_RECORD])
        assert (stored.bits, stored.version) == (masks[2].bits, found.strategy.mask.version)
    for round_ in range(1, 5):
        assert respects(found.models[round_], masks[min(round_, 3) - 1])
        assert all(counts(found, node, round_) for node in found.grid.contexts)


def test_the_result_does_not_depend_on_how_the_mask_travels():
    masks = drift(4)
    expected = drifting(masks)
    assert "difference" in {c[MASK_RECORD]["encoding"] for c in expected.sent(101, 3)}
    same_bytes(expected.arrays, drifting(masks, forget=lambda node, count: True).arrays)


@pytest.mark.parametrize("values", ["float32", "int8"])
def test_a_node_that_has_forgotten_its_mask_gets_the_whole_one_in_the_same_round_and_counts(values: str):
    masks = drift(3)
    found = drifting(masks, values=values, forget=lambda node, count: node == 101 and count == 1)
    assert found.failures == NO_FAILURES
    first, again = found.sent(101, 2)
    assert first[MASK_RECORD]["encoding"] == "difference"
    assert mask_record.base_of(again[MASK_RECORD]) == ""
    assert mask_record.decode_mask(again[MASK_RECORD]).bits == masks[1].bits
    assert [dict(content[HEADER]).get("status") for content in found.replied(101, 2)] == ["mask-missing", None]
    assert counts(found, 101, 2)
    (content,) = found.sent(101, 3)  # the next one is a difference again
    assert content[MASK_RECORD]["base"] == masks[1].digest
    assert len(found.sent(100, 2)) == 1
    if values == "float32":
        same_bytes(found.arrays, drifting(masks).arrays)


def test_a_node_that_was_away_gets_the_difference_from_the_mask_that_it_has():
    masks = drift(5)
    found = drifting(masks, absent={2: {101}, 3: {101, 102}})
    assert found.failures == NO_FAILURES
    assert found.sent(101, 2) == found.sent(101, 3) == []
    for node, base in ((100, masks[2]), (101, masks[0]), (102, masks[1])):
        (content,) = found.sent(node, 4)
        assert content[MASK_RECORD]["encoding"] == "difference"
        assert content[MASK_RECORD]["base"] == base.digest
        assert counts(found, node, 4)
    same_bytes(
        found.arrays,
        drifting(masks, absent={2: {101}, 3: {101, 102}}, forget=lambda node, count: True).arrays,
    )


def test_a_node_that_was_away_for_long_gets_the_change_from_the_mask_that_it_has():
    found = drifting(drift(9), absent={round_: {101} for round_ in range(2, 9)})
    assert found.failures == NO_FAILURES
    (content,) = found.sent(101, 9)
    assert mask_record.base_of(content[MASK_RECORD]) == drift(1)[0].digest
    assert counts(found, 101, 9)


def test_a_node_whose_reply_was_lost_has_a_later_mask_than_the_server_knows():
    def lose(reply: Message) -> Message:
        if reply.metadata.src_node_id == 101 and reply.content[HEADER]["round"] == 2:
            reply.content[HEADER]["digest"] = "0" * 64
        return reply

    masks = drift(3)
    found = drifting(masks, tamper=lose)
    assert found.failures == {"rejected": 1, "errors": 0, "absent": 0}
    first, again = found.sent(101, 3)
    assert first[MASK_RECORD]["base"] == masks[0].digest
    assert mask_record.base_of(again[MASK_RECORD]) == ""
    assert counts(found, 101, 3)


def test_a_mask_that_returns_is_the_difference_from_the_last_one():
    one, other = drift(2)
    found = drifting([one, other, one, other, one])
    assert found.failures == NO_FAILURES
    for round_, base in ((2, one), (3, other), (4, one), (5, other)):
        (content,) = found.sent(100, round_)
        assert content[MASK_RECORD]["base"] == base.digest
    assert respects(found.arrays, one)


def test_a_node_that_was_away_while_the_mask_went_and_came_back_gets_none():
    one, other = drift(2)
    found = drifting([one, other, one], absent={2: {101}})
    assert found.failures == NO_FAILURES
    (content,) = found.sent(101, 3)
    assert MASK_RECORD not in content
    assert counts(found, 101, 3)


def test_a_mask_that_has_little_in_common_with_the_last_one_travels_whole():
    first = drift(1)[0]
    draw = np.random.default_rng(8)
    other = Mask.from_bool(first.layout, {"w": draw.random((40, 50)) < 0.02})
    found = drifting([first, other])
    assert found.failures == NO_FAILURES
    (content,) = found.sent(100, 2)
    assert mask_record.base_of(content[MASK_RECORD]) == ""
    assert respects(found.arrays, other)


def test_what_rounding_has_lost_follows_a_mask_that_changes():
    arrays = {"w": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.arange(2, dtype=np.float32)}
    layout = Layout.of(arrays, output=None)
    old = Mask.from_bool(layout, {"w": np.arange(12).reshape(3, 4) % 2 == 0})
    new = Mask.from_bool(layout, {"w": np.arange(12).reshape(3, 4) % 3 == 0}, version=1)
    kept, size = kept_and_size(old, layout.by_dtype["float32"])
    assert (kept, size) == (6, 8)
    lost = np.array([10, 20, 30, 40, 50, 60, 70, 80], np.float32)  # of w[0, 2, 4, 6, 8, 10] and b
    context = Context(1, 1, {}, RecordDict(), {})
    context.state[MASK_RECORD] = mask_record.encode_mask(old)
    context.state[RESIDUAL] = ConfigRecord({"digest": old.digest, "float32": encode("int8", lost, kept).tobytes()})
    follow_mask(context, old)
    assert context.state[RESIDUAL]["digest"] == old.digest
    follow_mask(context, new)
    found = context.state[RESIDUAL]
    assert found["digest"] == new.digest
    data = np.frombuffer(found["float32"], np.uint8)
    # of w[0, 3, 6, 9], of which 0 and 6 were kept, and b
    expected = np.array([10, 0, 40, 0, 70, 80], np.float32)
    assert Coded(data, "int8", 4, 6).read(0, 6) == pytest.approx(expected, abs=0.5)
    other = Mask.from_bool(Layout.of({"w": arrays["w"]}, output=None), {"w": new.keep["w"]})
    follow_mask(context, other)  # another model: nothing follows
    assert context.state[RESIDUAL]["digest"] == new.digest
