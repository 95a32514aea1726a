"""Malformed messages and replies, each in a file, through a real client and a real server."""

from __future__ import annotations

import ast
import functools
import json
import math
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import forge
import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from records import from_json

from autoflip_flwr import AutoFlip, autoflip_mod
from autoflip_flwr.core.choices import DELTAS
from autoflip_flwr.costs.message_size import record_bytes
from autoflip_flwr.server.grid import OrderedGrid
from autoflip_flwr.server.settings import Values
from autoflip_flwr.testing import LocalGrid
from autoflip_flwr.wire import mask_record
from autoflip_flwr.wire.base_record import base_digest
from autoflip_flwr.wire.keys import (
    BASE_RECORD,
    EVALUATE,
    EXPLORE,
    HEADER,
    HELLO,
    MASK_RECORD,
    MOD_REFUSED,
    TRAIN,
)
from autoflip_flwr.wire.messages import make_header
from autoflip_flwr.wire.records import WireError, to_arrays, to_record
from benchmarks import attacks

NODES = (100, 101, 102)
HOSTILE = 101


def files(folder: str) -> Any:
    found = sorted((forge.FOLDER / folder).glob("*.json"))
    return pytest.mark.parametrize("file", found, ids=[file.stem for file in found])


@contextmanager
def little_memory(size: int) -> Iterator[None]:
    """Whoever handles ``size`` bytes from a stranger allocates a fixed amount and a few times as much as he has got."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 2**24 + 64 * size
    finally:
        tracemalloc.stop()


def client(called: list[str]) -> ClientApp:
    """Adds 1 to each float."""
    app = ClientApp(mods=[autoflip_mod])
    metrics = MetricRecord({"num-examples": 10, "loss": 0.5})

    @app.train()
    def train(message: Message, context: Context) -> Message:
        called.append("train")
        arrays = to_arrays(message.content["arrays"])
        new = {name: array + 1 if array.dtype.kind == "f" else array for name, array in arrays.items()}
        return Message(RecordDict({"arrays": to_record(new), "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        called.append("evaluate")
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def test_every_attack_has_its_file():
    expected = {
        "messages": set(forge.messages()),
        "replies": set(forge.replies()),
        "metrics": set(forge.metrics()),
    }
    assert {folder: {file.stem for file in (forge.FOLDER / folder).glob("*")} for folder in expected} == expected


# Messages


def exchange(grid: LocalGrid, content: RecordDict) -> Message:
    (reply,) = grid.send_and_receive([Message(content, 100, "train")])
    return reply


@files("messages")
def test_a_client_refuses_the_message_and_goes_on(file: Path):
    described = json.loads(file.read_text())
    called: list[str] = []
    grid = LocalGrid(client(called), num_nodes=1)
    assert not exchange(grid, forge.message()).has_error()
    with little_memory(file.stat().st_size):
        refusal = exchange(grid, from_json(described["records"]))
    assert refusal.has_error()
    assert refusal.error.code == MOD_REFUSED
    assert refusal.error.reason.startswith("autoflip_mod: ")
    assert len(refusal.error.reason) < 600
    assert called == ["train"]
    again = forge.swap(forge.message(), MASK_RECORD, None)  # the node still has the mask of the first message
    assert exchange(grid, again).content[HEADER].get("status") is None
    assert called == ["train", "train"]


@pytest.mark.parametrize("phase", [EXPLORE, TRAIN, EVALUATE])
@pytest.mark.parametrize("kind", ["float32", *forge.CODED])
def test_the_messages_that_the_attacks_start_from_are_sound(phase: str, kind: str):
    grid = LocalGrid(client([]), num_nodes=1)
    (reply,) = grid.send_and_receive(
        [Message(forge.message(phase, kind), 100, "evaluate" if phase == EVALUATE else "train")]
    )
    assert not reply.has_error()


@pytest.mark.parametrize("phase", [TRAIN, EVALUATE])
@pytest.mark.parametrize("kind", ["float32", *forge.CODED])
def test_the_bases_that_the_attacks_start_from_are_sound(phase: str, kind: str):
    grid = LocalGrid(client([]), num_nodes=1)
    reply = exchange(grid, forge.with_base(forge.message(phase, kind)))
    assert reply.content[HEADER].get("status") is None
    again = forge.swap(forge.with_base(forge.message(phase, kind)), BASE_RECORD, None)
    assert exchange(grid, again).content[HEADER].get("status") is None


def test_a_base_that_is_missing_is_said_to_be_and_so_is_another():
    called: list[str] = []
    grid = LocalGrid(client(called), num_nodes=1)
    good = forge.with_base(forge.message())
    bare = forge.swap(good, BASE_RECORD, None)
    assert exchange(grid, bare).content[HEADER]["status"] == "base-missing"
    assert exchange(grid, good).content[HEADER].get("status") is None
    other = forge.alter(bare, HEADER, base="0" * 64)
    assert exchange(grid, other).content[HEADER]["status"] == "base-missing"
    forgotten = LocalGrid(client(called), num_nodes=1)
    nothing = forge.swap(bare, MASK_RECORD, None)
    assert exchange(forgotten, nothing).content[HEADER]["status"] == "mask-and-base-missing"
    # a base without the mask, whose layout it has, cannot be read
    unread = forge.swap(good, MASK_RECORD, None)
    assert exchange(forgotten, unread).content[HEADER]["status"] == "mask-missing"
    assert called == ["train"]


# Replies


def serve(
    setup: dict[str, str], answer: Callable[[], RecordDict] | None
) -> tuple[AutoFlip, dict[str, np.ndarray], int]:
    """A run of one round, in which one node answers a phase so; the strategy, the model, how many were left out."""
    phase, kind = setup["phase"], setup["values"]
    exploring = phase == EXPLORE
    strategy = AutoFlip(
        FedAvg(min_available_nodes=3),
        mask=None if exploring else forge.MASK,
        values=Values(
            deltas=kind if exploring else "log8",
            up=kind if phase == TRAIN else "float32",
            down=kind if phase == TRAIN else "float32",
        ),
    )

    def tamper(reply: Message) -> Message:
        head = reply.content.get(HEADER) if reply.has_content() else None
        if answer is not None and reply.metadata.src_node_id == HOSTILE and head and head["phase"] == phase:
            reply.content = answer()
        return reply

    grid = LocalGrid(client([]), num_nodes=len(NODES), tamper=tamper)
    result = strategy.start(grid, to_record(forge.MODEL), num_rounds=1)
    assert len(result.train_metrics_clientapp) == len(result.evaluate_metrics_clientapp) == 1
    return strategy, to_arrays(result.arrays), strategy.ledger.failures["rejected"]


@functools.cache
def honest(phase: str, values: str) -> dict[str, np.ndarray]:
    """The model after a run in which all nodes are honest."""
    _, arrays, left_out = serve({"phase": phase, "values": values}, None)
    assert not left_out
    return arrays


@pytest.mark.runs
@files("replies")
def test_a_server_leaves_the_reply_out_and_the_round_goes_on(file: Path):
    described = json.loads(file.read_text())
    expected = honest(described["phase"], described["values"])
    with little_memory(file.stat().st_size):
        strategy, arrays, left_out = serve(described, lambda: from_json(described["records"]))
    assert left_out == 1
    assert list(arrays) == list(expected)
    for name, array in arrays.items():
        assert array.dtype == expected[name].dtype
        np.testing.assert_allclose(array, expected[name], rtol=1e-6)  # a mean of two, not of three
    assert json.dumps(strategy.ledger.bytes_by_phase())
    assert sum(strategy.ledger.examples.values()) == 0


@files("metrics")
def test_a_metric_costs_no_client_its_weights(file: Path):
    described = json.loads(file.read_text())
    _, expected, _ = serve(described, lambda: forge.reply(described["phase"]))
    strategy, arrays, left_out = serve(described, lambda: from_json(described["records"]))
    assert left_out == 0
    assert strategy.ledger.incidents == []
    for name, array in arrays.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-6)
    assert sum(strategy.ledger.examples.values()) == 0


@pytest.mark.parametrize("kind", ["float32", *forge.CODED])
def test_the_train_replies_that_the_attacks_start_from_count(kind: str):
    setup = {"phase": "train", "values": kind}
    assert serve(setup, lambda: forge.reply(kind=kind))[2] == 0


@pytest.mark.parametrize("kind", DELTAS)
def test_the_moves_that_the_attacks_start_from_count(kind: str):
    strategy, _, left_out = serve({"phase": "explore", "values": kind}, lambda: forge.reply(EXPLORE, kind))
    assert left_out == 0
    assert strategy.exploration is not None
    assert strategy.exploration.explorers == 3


def test_the_evaluation_that_the_attacks_start_from_counts():
    assert serve({"phase": "evaluate", "values": "float32"}, lambda: forge.reply(EVALUATE))[2] == 0


@pytest.mark.parametrize("lie", [2**62, -1, True, 0.5, "3", [3]])
def test_a_node_that_lies_about_the_number_of_nodes_keeps_nobody_waiting(lie: Any):
    def tamper(reply: Message) -> Message:
        if reply.metadata.src_node_id == HOSTILE:
            reply.content[HEADER] = make_header(HELLO, 0, **{"num-partitions": lie, "partition": lie})
        return reply

    grid = OrderedGrid(LocalGrid(client([]), num_nodes=3, tamper=tamper))
    assert sorted(grid.roll_call(timeout=60)) == list(NODES)
    assert grid.num_partitions == 3


def lying(change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> tuple[AutoFlip, LocalGrid]:
    """A run that keeps what stands outside the mask, in which one node's headers are changed."""

    def tamper(reply: Message) -> Message:
        if reply.metadata.src_node_id == HOSTILE and reply.has_content():
            changed = change(dict(reply.content[HEADER]))
            if changed is not None:
                reply.content[HEADER] = forge.ConfigRecord(changed)
        return reply

    strategy = AutoFlip(FedAvg(min_available_nodes=3), sparsity=0.5, outside="initial", seed=1)
    grid = LocalGrid(client([]), num_nodes=3, tamper=tamper)
    result = strategy.start(grid, to_record(forge.MODEL), num_rounds=2)
    arrays = to_arrays(result.arrays)
    pruned = ~strategy.mask.keep["w"]
    np.testing.assert_array_equal(arrays["w"][pruned], forge.MODEL["w"][pruned])
    return strategy, grid


def sent_with_base(grid: LocalGrid) -> list[int]:
    return [message.metadata.dst_node_id for message in grid.sent if BASE_RECORD in message.content]


@pytest.mark.parametrize("status", ["base-missing", "mask-and-base-missing"])
def test_a_node_that_always_says_that_it_lacks_the_base_is_sent_it_and_costs_its_own_replies(status: str):
    def change(head: dict[str, Any]) -> dict[str, Any] | None:
        return {**head, "status": status, "digest": ""} if head["phase"] in (TRAIN, EVALUATE) else None

    strategy, grid = lying(change)
    assert set(sent_with_base(grid)) == {HOSTILE}
    assert len(sent_with_base(grid)) <= 4  # at most once for each message
    assert strategy.ledger.failures["rejected"] == 4


@pytest.mark.parametrize("lie", [None, "0" * 64, "given"])
def test_an_explorer_that_lies_about_its_base_is_healed(lie: str | None):
    def change(head: dict[str, Any]) -> dict[str, Any] | None:
        if head["phase"] != EXPLORE:
            return None
        return {**{key: value for key, value in head.items() if key != "base"}, **({"base": lie} if lie else {})}

    strategy, grid = lying(change)
    refused = lie == "given"  # no digest: the reply does not count
    assert strategy.ledger.failures["rejected"] == refused
    assert sent_with_base(grid) == ([] if refused else [HOSTILE])


@pytest.mark.parametrize("lie", [7, 0.5, True, [1], ["0" * 64], b"0", "0" * 64, "1" * 10**6, "given"])
def test_a_node_that_lies_in_its_hello_is_healed(lie: Any):
    strategy, grid = lying(lambda head: {**head, "base": lie} if head["phase"] == HELLO else None)
    assert strategy.ledger.failures["rejected"] == 0
    assert sent_with_base(grid) == []  # it has explored since


def test_who_claims_to_hold_it_and_does_not_says_so_when_it_comes_to_it():
    held = base_digest(forge.LAYOUT, forge.MODEL)
    grid = LocalGrid(
        client([]),
        num_nodes=3,
        tamper=lambda reply: claim(reply, held),
    )
    strategy = AutoFlip(FedAvg(min_available_nodes=3), mask=forge.MASK, outside="initial", seed=1)
    strategy.start(grid, to_record(forge.MODEL), num_rounds=1)
    assert sent_with_base(grid).count(HOSTILE) == 1
    assert not strategy.ledger.incidents


def claim(reply: Message, digest: str) -> Message:
    if reply.metadata.src_node_id == HOSTILE and reply.content[HEADER]["phase"] == HELLO:
        reply.content[HEADER] = forge.ConfigRecord({**reply.content[HEADER], "base": digest})
    return reply


@pytest.mark.runs
@pytest.mark.parametrize("length", [100, 5000])
def test_many_arrays_that_end_alike_are_counted_soon(length: int):
    content = RecordDict(
        {"arrays": ArrayRecord({str(i): forge.array(b"%09d" % i + bytes(length)) for i in range(5000)})}
    )
    started = time.process_time()
    assert record_bytes(content, "arrays") > 5000 * length
    assert time.process_time() - started < 20


def test_a_robust_strategy_withstands_what_the_format_cannot_tell():
    found = {name: attacks.accuracy(name, "noise", 6, 0.7, None, 0, math.inf) for name in ("FedAvg", "FedTrimmedAvg")}
    assert found["FedTrimmedAvg"] > found["FedAvg"]


def test_noise_of_a_large_norm_is_left_out_and_even_the_mean_withstands_it():
    assert attacks.accuracy("FedAvg", "noise", 6, 0.7, None, 0, 10.0) > found_without_rules() + 0.05


def found_without_rules():
    return attacks.accuracy("FedAvg", "noise", 6, 0.7, None, 0, math.inf)


# The size of a mask is justified by what the message carries


def promise(entries: int, carried: int, encoding: str, bits: bytes) -> None:
    layout = forge.layout_rows(["w", [entries], "float32", 1])
    fields = {"layout": layout, "encoding": encoding, "version": 1} | ({"bits": bits} if bits else {})
    mask_record.decode_mask(forge.ConfigRecord(fields), carried=carried)


NO_GAPS = forge.zlib.compress(b"")


def test_a_very_sparse_mask_of_a_large_model_may_come():
    entries, kept = 10**8, 10**5
    promise(entries, kept, "gaps", NO_GAPS)
    promise(2**20, 0, "gaps", NO_GAPS)


@pytest.mark.parametrize(
    ("entries", "carried", "encoding", "bits"),
    [
        (2**20 + 1, 0, "gaps", NO_GAPS),
        (2**20 + 2048 * 1000 + 1, 1000, "gaps", NO_GAPS),
        (2**20 + 1001, 1000, "full", b""),
    ],
)
def test_one_entry_more_than_the_message_justifies_is_refused(entries: int, carried: int, encoding: str, bits: bytes):
    promise(entries - 1, carried, encoding, bits)
    with little_memory(carried), pytest.raises(WireError, match="a client takes 1048576, and"):
        promise(entries, carried, encoding, bits)


def test_a_mask_that_is_known_is_refused_all_the_same_where_the_message_does_not_justify_it():
    promise(2**21, 2**11, "gaps", NO_GAPS)
    with pytest.raises(WireError, match="a client takes 1048576, and"):
        promise(2**21, 100, "gaps", NO_GAPS)


def test_a_server_does_not_send_what_no_client_takes():
    model = {"w": np.zeros((2**11, 2**10), np.float32)}
    layout = forge.Layout.of(model, output=None)
    nearly_empty = forge.Mask(layout, b"\x80" + bytes(2**18 - 1))
    strategy = AutoFlip(FedAvg(), mask=nearly_empty)
    with pytest.raises(ValueError, match="a mask of 2097152 prunable entries with 132 bytes of values"):
        strategy.start(LocalGrid(client([])), to_record(model), num_rounds=1)


@pytest.mark.parametrize("rows", [1, 20_000])
def test_a_layout_of_many_arrays_or_a_long_name_is_read(rows: int):
    long = "encoder.layers" * (10_000 // rows + 1)
    layout = forge.Layout(
        tuple(forge.mask_record.ArraySpec(f"{long}.{i}.weight", (8, 4), "float32", False) for i in range(rows))
    )
    record = mask_record.encode_mask(forge.Mask(layout, b""))
    assert mask_record.decode_mask(record, carried=0).layout == layout


# Nothing is unpickled or evaluated

PACKAGE = Path(mask_record.__file__).parent
EVALUATING = {"eval", "exec", "compile", "__import__"}
PICKLING = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


@pytest.mark.parametrize("module", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_unpickles_or_evaluates(module: Path):
    for node in ast.walk(ast.parse(module.read_text())):
        match node:
            case ast.Import(names=names):
                assert not PICKLING & {alias.name.partition(".")[0] for alias in names}
            case ast.ImportFrom(module=str(name)):
                assert name.partition(".")[0] not in PICKLING
            case ast.Name(id=name):
                assert name not in EVALUATING
            case ast.keyword(arg="allow_pickle", value=value):
                assert isinstance(value, ast.Constant)
                assert value.value is False
            case ast.keyword(arg="weights_only", value=value):
                assert isinstance(value, ast.Constant)
                assert value.value is True
            case ast.Call(func=ast.Attribute(value=ast.Name(id="np" | "numpy"), attr="load"), keywords=keywords):
                assert "allow_pickle" in {keyword.arg for keyword in keywords}
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="load"), keywords=keywords):
                assert "weights_only" in {keyword.arg for keyword in keywords}
