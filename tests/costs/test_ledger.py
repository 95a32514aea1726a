"""The ledger against Flower's own serialisation: by phase, direction and node, to the byte."""

from __future__ import annotations

import json
import time
from collections import Counter
from uuid import uuid4

import numpy as np
import pytest
from apps import message_app, model, numpy_app, record
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.app.message.message import remove_content_from_message
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
    Reconnect,
)
from flwr.proto.node_pb2 import Node
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree

from autoflip_flwr import AutoFlip, Ledger
from autoflip_flwr.core.methods import LossExploration
from autoflip_flwr.costs import message_size
from autoflip_flwr.costs.ledger import phase_of
from autoflip_flwr.costs.message_size import Traffic, message_bytes, message_traffic, record_bytes, reply_traffic
from autoflip_flwr.server.grid import OrderedGrid
from autoflip_flwr.testing import LocalGrid
from autoflip_flwr.wire.keys import (
    BASE_RECORD,
    EVALUATE,
    EXAMPLES_PROCESSED,
    EXPLORE,
    HEADER,
    HELLO,
    MASK_RECORD,
    TRAIN,
)
from autoflip_flwr.wire.messages import make_header

NODES = 4
NODE = 2**63 + 12345  # ids are random 64-bit numbers


@pytest.fixture(autouse=True)
def _task():
    """Messages cannot be made outside of a task."""
    LocalGrid(message_app(), 1)


# --- what Flower moves, from its own protobufs (flwr/superlink/servicer/fleet/fleet_handlers.py) ----------------------


def sizes(message):
    """Bytes of each object of a message by id."""
    return {key: len(part.deflate()) for key, part in get_all_nested_objects(message).items()}


def proto(message):
    sent = message_to_proto(remove_content_from_message(message))
    sent.metadata.message_id = message.object_id
    return sent


def moved_by_message(message):
    tree, size = get_object_tree(message), sizes(message)
    request = PullMessagesRequest(node=Node(node_id=message.metadata.dst_node_id))
    response = PullMessagesResponse(messages_list=[proto(message)], message_object_trees=[tree])
    return Traffic(
        request.ByteSize(), response.ByteSize() + sum(size[part.object_id] for part in iterate_object_tree(tree))
    )


def moved_by_reply(reply):
    size = sizes(reply)
    request = PushMessagesRequest(
        node=Node(node_id=reply.metadata.src_node_id),
        messages_list=[proto(reply)],
        message_object_trees=[get_object_tree(reply)],
        clientapp_runtime_list=[1.5],
    )
    response = PushMessagesResponse(
        reconnect=Reconnect(reconnect=5),
        results={reply.object_id: 0},
        objects_to_push=list(size),
        session_id=str(uuid4()),
    )
    return Traffic(request.ByteSize() + sum(size.values()), response.ByteSize())


# --- one message -----------------------------------------------------------------------------------------------------

draw = np.random.default_rng(0)
CONTENTS = {
    "nothing": {},
    "no arrays": {"arrays": ArrayRecord()},
    "an empty array": {"arrays": record({"a": np.zeros(0, np.float32)})},
    "a model": {"arrays": record(model()), "config": ConfigRecord({"server-round": 3})},
    "equal arrays": {"arrays": record({name: np.zeros(5, np.float32) for name in "abc"} | {"d": np.zeros((5, 1))})},
    "arrays that end alike": {"arrays": record({n: np.array([i] + 99 * [0.0]) for i, n in enumerate("abcab")})},
    "odd names": {"é.weight": record({"schlüssel": np.array(3), 'a "quoted" one': np.ones(2)})},
    "200 arrays": {"arrays": record({f"layer{n}": draw.normal(size=n) for n in range(200)})},
    "three chunks": {"arrays": record({"w": draw.normal(size=1_500_000), "i": np.zeros(1, np.int64)})},
    "equal chunks": {"arrays": record({"w": np.zeros(3_000_000)})},
    "equal records": {"a": ConfigRecord(), "b": ConfigRecord(), "c": record(model()), "d": record(model())},
    "a mask": {MASK_RECORD: ConfigRecord({"bits": bytes(70_000)}), HEADER: make_header(TRAIN, 3)},
    "other array types": {"arrays": ArrayRecord({"a": Array("mine", (2, 3), "my.type", b"12345")})},
    "metrics": {"metrics": MetricRecord({"loss": 0.5, "ints": [1, 2, 300], "n": 7})},
}


def to_node(content, **options):
    return Message(RecordDict(content), NODE, "train", **options)


def reply_to(message, answer):
    message.metadata.__dict__["_message_id"] = message.object_id
    return Message(answer, reply_to=message)


@pytest.mark.parametrize("content", CONTENTS)
def test_a_message_and_its_reply_are_sized_to_the_byte(content):
    message = to_node(CONTENTS[content], group_id="3", ttl=600.0)
    reply = reply_to(message, RecordDict(CONTENTS[content]))
    assert message_traffic(message) == moved_by_message(message)
    assert reply_traffic(reply) == moved_by_reply(reply)
    assert message_bytes(message) == message_traffic(message).down
    assert message_bytes(reply) == reply_traffic(reply).up


@pytest.mark.parametrize("reason", ["", "a client raised", 300 * "long "])
def test_an_error_reply_is_sized_to_the_byte(reason):
    reply = reply_to(to_node({}), Error(2, reason))
    assert reply_traffic(reply) == moved_by_reply(reply)


def test_arrays_are_cut_as_flower_cuts_them():
    assert message_size._CHUNK == FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE


def test_sizing_neither_copies_nor_hashes_arrays():
    message = to_node({"arrays": record(model())})
    message_traffic(message)
    for array in message.content["arrays"].values():
        assert not {"_chunks", "_object_id"} & array.__dict__.keys()


# --- a run -----------------------------------------------------------------------------------------------------------


class Tapped(LocalGrid):
    """Keeps each reply beside its message."""

    def __init__(self, app, nodes=NODES, **options):
        super().__init__(app, nodes, tamper=self._keep, **options)
        self.replies = []

    def _keep(self, reply):
        self.replies.append(Message(reply.content if reply.has_content() else reply.error, reply_to=self.sent[-1]))
        self.replies[-1].__dict__.update(reply.__dict__)  # the strategy will change the content of its own
        return reply


def expected(grid):
    """Bytes by node under the ledger's keys, and all that is not in the serialised objects."""
    table, beside = {}, 0
    for message, reply in zip(grid.sent, grid.replies, strict=True):
        phase, down, up = phase_of(message), moved_by_message(message), moved_by_reply(reply)
        mask = sum(sizes(message.content[MASK_RECORD]).values()) if MASK_RECORD in message.content else 0
        table.setdefault(message.metadata.dst_node_id, Counter()).update(
            {f"{phase}_up": down.up + up.up, f"{phase}_down": down.down + up.down - mask, "mask_down": mask}
        )
        beside += sum(down) + sum(up) - sum(sizes(message).values()) - sum(sizes(reply).values())
    return table, beside


def by_phase(table):
    """The same of all nodes."""
    sums = sum(table.values(), Counter())
    sums["other"] = sums.pop("other_up", 0) + sums.pop("other_down", 0)
    return sums


def run(grid, rounds=3, **options):
    strategy = AutoFlip(FedAvg(), sparsity=0.5, seed=1, **options)
    strategy.start(grid, record(model()), num_rounds=rounds)
    return strategy.ledger


@pytest.mark.parametrize("app", [message_app, numpy_app])
def test_bytes_by_phase_direction_and_node_are_those_of_the_serialised_messages(app):
    grid = Tapped(app())
    told = run(grid)
    table, beside = expected(grid)
    assert told.by_node == table
    assert told.bytes_by_phase() == {**by_phase(table), "total": grid.up + grid.down + beside}
    assert sum(told.up.values()) + sum(told.down.values()) + told.mask_down == grid.up + grid.down + beside
    by_node = told.bytes_by_node()
    assert list(by_node) == list(range(NODES))  # by partition
    for part, own in by_node.items():
        assert own == {**table[100 + part], "total": table[100 + part].total()}
        assert all(own.values())


def test_a_mask_counts_for_the_nodes_that_it_is_sent_to():
    grid = Tapped(message_app(), forget=lambda node, count: node == 102 and count == 5)
    static = LossExploration.static()
    alike, told = run(LocalGrid(message_app(), NODES), method=static), run(grid, method=static)
    assert told.by_node == expected(grid)[0]
    (again,) = [m for m in grid.sent if MASK_RECORD in m.content and m.content[HEADER]["round"] > 1]
    mask = record_bytes(again.content, MASK_RECORD)
    assert mask == sum(sizes(again.content[MASK_RECORD]).values())
    assert told.mask_down == alike.mask_down + mask
    assert told.by_node[102]["mask_down"] == alike.by_node[102]["mask_down"] + mask
    # the message that found no mask, and the node's answer to it, count as well
    assert told.messages.total() == alike.messages.total() + 1
    assert told.by_node[102].total() > alike.by_node[102].total() + mask


def fails(message, context):
    if context.node_id == 101 and message.content["config"]["server-round"] == 2:
        raise RuntimeError("no")


def test_error_replies_of_nodes_count_and_those_of_the_superlink_do_not():
    grid = Tapped(message_app(fails))
    told = run(grid)
    table, beside = expected(grid)
    assert told.by_node == table
    assert told.bytes_by_phase()["total"] == grid.up + grid.down + beside
    assert told.failure_counts() == {"rejected": 0, "errors": 2, "absent": 0}
    assert told.replies["train"] == told.messages["train"] - 1

    class Gone(LocalGrid):
        """Node 101 is gone: the SuperLink answers for it."""

        def pull_messages(self, message_ids):
            replies = super().pull_messages(message_ids)
            for index, reply in enumerate(replies):
                if reply.metadata.src_node_id == 101:
                    replies[index] = Message(Error(5, "node unavailable"), reply_to=reply)
                    replies[index].metadata.__dict__.update(
                        _src_node_id=1, _reply_to_message_id=reply.metadata.reply_to_message_id
                    )
            return replies

    ordered = OrderedGrid(Gone(message_app(), 2))
    batch = messages([100, 101])
    ordered.send_and_receive(batch, timeout=5)
    assert ordered.ledger.failure_counts()["errors"] == 1
    assert ordered.ledger.by_node[101] == {
        "train_up": message_traffic(batch[1]).up,
        "train_down": message_traffic(batch[1]).down,
        "mask_down": 0,
    }


def messages(nodes):
    content = RecordDict({"arrays": record(model()), "config": ConfigRecord({"server-round": 1})})
    return [Message(content, node, "train") for node in nodes]


def test_a_message_counts_if_its_node_stays_away_but_not_if_it_was_never_sent():
    class Deaf(LocalGrid):
        """Node 101 never answers, and no message to node 102 leaves."""

        def push_messages(self, messages):
            return super().push_messages([m for m in messages if m.metadata.dst_node_id != 102])

        def pull_messages(self, message_ids):
            return [reply for reply in super().pull_messages(message_ids) if reply.metadata.src_node_id != 101]

    ordered = OrderedGrid(Deaf(message_app(), 3))
    batch = messages([100, 101, 102])
    ordered.send_and_receive(batch, timeout=0.3)
    told = ordered.ledger
    assert told.failure_counts() == {"rejected": 0, "errors": 0, "absent": 2}
    assert told.by_node.keys() == {100, 101}
    assert told.by_node[101]["train_down"] == message_traffic(batch[1]).down
    assert told.by_node[101]["train_up"] == message_traffic(batch[1]).up < told.by_node[100]["train_up"]
    assert told.seconds["train"] >= 0.3


def test_a_node_that_comes_back_under_another_id_is_one_partition():
    told = Ledger(partitions={7: 0, 8: 1, 9: 0})
    for message in messages([7, 8, 9, 2**60]):
        told.sent(message)
    table = told.bytes_by_node()
    assert list(table) == [0, 1, 2**60]
    assert table[0]["train_down"] == 2 * table[1]["train_down"] == 2 * table[1]["total"] - 2 * table[1]["train_up"]


@pytest.mark.runs
def test_a_thousand_nodes_need_little_room():
    told = Ledger()
    content = {"arrays": record(model()), MASK_RECORD: ConfigRecord({"bits": bytes(10)})}
    for _ in range(3):
        for phase in (HELLO, EXPLORE, TRAIN, EVALUATE):
            for node in range(1000):
                message = Message(RecordDict(content | {HEADER: make_header(phase, 1)}), NODE + node, "train")
                told.sent(message)
                told.received(message, reply_to(message, message.content))
    assert len(json.dumps(told.bytes_by_node())) < 300_000


# --- seconds, FLOPs, and an exploration that is used again -----------------------------------------------------------


def test_seconds_are_those_of_the_exchanges():
    def slow(message, context):
        time.sleep(0.01)

    began = time.monotonic()
    told = run(LocalGrid(message_app(slow), NODES))
    assert told.seconds.keys() == {"other", "exploration", "train", "evaluate"}
    assert told.seconds["exploration"] >= 0.01 * NODES
    assert told.seconds["train"] >= 3 * 0.01 * NODES
    assert sum(told.seconds.values()) < time.monotonic() - began


def test_flops_are_those_of_the_examples_that_clients_processed():
    def answer(reply):
        if reply.has_content() and "metrics" in reply.content and "arrays" in reply.content:
            reply.content["metrics"][EXAMPLES_PROCESSED] = 10
        return reply

    told = run(LocalGrid(message_app(), 2, tamper=answer))
    assert told.flops() == {"exploration": 0.0, "train": 0.0}
    told.flops_per_example = 1.5e6
    assert told.examples == {"exploration": 20, "train": 60}
    assert told.flops() == {"exploration": 3e7, "train": 9e7}


def test_an_exploration_that_is_used_again_is_charged_whole_but_to_no_node():
    costs = []
    strategy = AutoFlip(FedAvg(), sparsity=0.5, seed=1)

    def note(server_round, arrays):
        if server_round == 0:
            costs.append(strategy.ledger.exploration_only())

    strategy.start(LocalGrid(message_app(), NODES), record(model()), num_rounds=1, evaluate_fn=note)
    first, second = strategy.ledger, Ledger()
    second.charge_exploration(json.loads(json.dumps(costs[0])))
    for way in ("exploration_up", "exploration_down"):
        assert second.bytes_by_phase()[way] == first.bytes_by_phase()[way] > 0
    assert second.seconds["exploration"] == first.seconds["exploration"] > 0
    assert second.messages == {"exploration": NODES} == second.replies
    assert second.bytes_by_node() == {}
    # files of earlier versions know no seconds
    del costs[0]["seconds"]
    second.charge_exploration(costs[0])
    assert second.messages["exploration"] == 2 * NODES


def test_what_stands_outside_the_mask_counts_on_its_own():
    grid = Tapped(message_app(), forget=lambda node, count: node == 102 and count == 5)
    told = run(grid, outside="initial", method=LossExploration.static(initial="explorers"))
    table, beside = expected(grid)
    sent = [message for message in grid.sent if BASE_RECORD in message.content]
    assert len(sent) == NODES + 1
    size = record_bytes(sent[0].content, BASE_RECORD)
    assert size == sum(sizes(sent[0].content[BASE_RECORD]).values())
    assert told.base_down == told.bytes_by_phase()["base_down"] == (NODES + 1) * size
    assert told.by_node[102]["base_down"] == 2 * size
    assert told.by_node[101]["base_down"] == size
    assert sum(own.total() for own in told.by_node.values()) == sum(own.total() for own in table.values())
    assert told.bytes_by_phase()["total"] == grid.up + grid.down + beside
    phases = {key: value for key, value in told.bytes_by_phase().items() if key != "total"}
    assert sum(phases.values()) == grid.up + grid.down + beside
    zero = run(LocalGrid(message_app(), NODES), method=LossExploration.static(initial="explorers"))
    assert "base_down" not in zero.bytes_by_phase()
    assert not any("base_down" in own for own in zero.bytes_by_node().values())
