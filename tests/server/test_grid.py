"""The grid facade: roll call, order, ttl, absence; and the private names of Flower that the tests stand on."""

from __future__ import annotations

import pytest
from apps import NO_FAILURES, message_app, model, record
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.differential_privacy import KEY_NORM_BIT

from autoflip_flwr import _flower, testing
from autoflip_flwr.server.grid import OrderedGrid
from autoflip_flwr.testing import LocalGrid
from autoflip_flwr.wire.keys import MOD_REFUSED
from autoflip_flwr.wrapped import traits


def messages(grid, nodes):
    content = RecordDict({"arrays": record(model()), "config": ConfigRecord({"server-round": 1})})
    return [Message(content, node, "train") for node in nodes]


class Growing(LocalGrid):
    """Shows one node more each time it is asked, up to all."""

    shown = 0

    def get_node_ids(self):
        self.shown += 1
        return super().get_node_ids()[::-1][: self.shown]


class Deaf(LocalGrid):
    """Node 101 never answers."""

    def pull_messages(self, message_ids):
        return [reply for reply in super().pull_messages(message_ids) if reply.metadata.src_node_id != 101]


def test_roll_call_waits_for_as_many_nodes_as_the_nodes_say():
    grid = OrderedGrid(Growing(message_app(), 5), seed=1)
    assert grid.roll_call(minimum=2, timeout=10) == [100, 101, 102, 103, 104]
    assert grid.partitions == {100 + part: part for part in range(5)}
    assert grid.num_partitions == 5


def test_roll_call_of_too_few_nodes_says_how_many_came():
    with pytest.raises(RuntimeError, match=r"2 nodes have connected within 0.3 s, but 4 are needed"):
        OrderedGrid(LocalGrid(message_app(), 2)).roll_call(minimum=4, timeout=0.3)


def test_roll_call_goes_on_with_fewer_than_all_partitions():
    grid = LocalGrid(message_app(), 4)
    del grid.contexts[101]
    assert OrderedGrid(grid).roll_call(minimum=2, timeout=0.3) == [100, 102, 103]


class Filling(LocalGrid):
    """Its last node connects late."""

    late, slow = True, False

    def get_node_ids(self):
        return super().get_node_ids()[: -1 if self.late else None]

    def pull_messages(self, message_ids):
        return [] if self.slow else super().pull_messages(message_ids)


def test_a_node_that_comes_after_the_roll_call_is_asked_for_its_partition_without_waiting():
    inside = Filling(message_app(), 3)
    grid = OrderedGrid(inside)
    assert grid.roll_call(minimum=2, timeout=0.3) == [100, 101]
    inside.late, inside.slow = False, True
    assert grid.get_node_ids() == [100, 101, 102]
    assert grid.partitions == {100: 0, 101: 1}
    inside.slow = False
    assert grid.get_node_ids() == [100, 101, 102]
    assert grid.partitions == {100: 0, 101: 1, 102: 2}
    assert grid.ledger.messages["other"] == grid.ledger.replies["other"] == len(inside.sent) == 3
    bytes_by_node = grid.ledger.bytes_by_node()
    assert grid.ledger.up["other"] == sum(own["other_up"] for own in bytes_by_node.values())
    grid.push_messages(messages(grid, [102]))
    assert list(grid.ledger.bytes_by_node()) == [0, 1, 2]


def test_a_roll_call_that_is_out_of_time_waits_a_little_for_answers_and_learns_later_ones(monkeypatch):
    monkeypatch.setattr("autoflip_flwr.server.roll_call.ANSWERS", 0.2)
    inside = Filling(message_app(), 3)
    inside.late, inside.slow = False, True
    grid = OrderedGrid(inside)
    assert grid.roll_call(minimum=2, timeout=0.1) == [100, 101, 102]
    assert grid.partitions == {}
    inside.slow = False
    grid.get_node_ids()
    assert grid.partitions == {100: 0, 101: 1, 102: 2}
    assert grid.ledger.failure_counts() == NO_FAILURES


def test_without_a_roll_call_nobody_is_asked():
    inside = LocalGrid(message_app(), 3)
    assert OrderedGrid(inside).get_node_ids() == [100, 101, 102]
    assert not inside.sent


def test_nodes_without_the_mod_come_last():
    grid = OrderedGrid(LocalGrid(message_app(mods=[]), 3))
    assert sorted(grid.roll_call(minimum=3, timeout=5)) == [100, 101, 102]
    assert grid.partitions == {}


def test_replies_come_in_the_order_of_their_messages():
    grid = OrderedGrid(LocalGrid(message_app(), 4, arrange=lambda replies: sorted(replies, key=id)))
    for nodes in ([103, 100, 102, 101], [101, 103, 100, 102]):
        replies = grid.send_and_receive(messages(grid, nodes), timeout=5)
        assert [reply.metadata.src_node_id for reply in replies] == nodes
    assert grid.exchanges == 2


def test_a_node_that_does_not_answer_in_time_is_absent_and_its_message_expires():
    grid = OrderedGrid(Deaf(message_app(), 3))
    sent = messages(grid, [100, 101, 102])
    replies = grid.send_and_receive(sent, timeout=0.3)
    assert [reply.metadata.src_node_id for reply in replies] == [100, 102]
    assert grid.ledger.failure_counts() == {"quarantined": 0, "errors": 0, "absent": 1}
    assert all(message.metadata.ttl == 0.3 for message in sent)


def test_the_local_grid_is_as_strict_as_deployment():
    with pytest.raises(TypeError, match="must be a list"):
        LocalGrid(message_app(), 1).push_messages(message for message in [])


def test_flowers_private_names_and_error_codes_are_still_there():
    assert traits.NORM_BIT == KEY_NORM_BIT
    assert all(hasattr(_flower, name) for name in _flower.__all__)
    assert MOD_REFUSED == ErrorCode.MOD_FAILED_PRECONDITION
    assert testing.CLIENT_APP_RAISED == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
