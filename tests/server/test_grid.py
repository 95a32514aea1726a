"""The grid facade: roll call, order, ttl, absence; and the private names of Flower that the tests stand on."""

from __future__ import annotations

import time

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

SOON = 20  # seconds: far below a time limit, on a busy machine too


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
    assert grid.ledger.failure_counts() == {"rejected": 0, "errors": 0, "absent": 1}
    assert all(message.metadata.ttl == 0.3 for message in sent)


class Left(LocalGrid):
    """The SuperLink refuses messages to nodes in ``gone``, as Flower 1.42 does: with an empty id at their place."""

    gone = frozenset()

    def push_messages(self, messages):
        ids = iter(super().push_messages([each for each in messages if each.metadata.dst_node_id not in self.gone]))
        for message in messages:
            if message.metadata.dst_node_id in self.gone:  # Flower gives it an id of its own before it sends it
                message.metadata.__dict__["_message_id"] = f"refused {message.metadata.dst_node_id}"
        return ["" if message.metadata.dst_node_id in self.gone else next(ids) for message in messages]


REFUSED = "the SuperLink refused the message: the node has left"


@pytest.mark.parametrize("timeout", [3600, None])
@pytest.mark.parametrize("gone", [{101}, {100, 102}, {100, 101, 102}])
def test_a_message_that_is_refused_is_absent_at_once_and_costs_nothing(gone, timeout):
    inside, began = Left(message_app(), 3), time.monotonic()
    grid, inside.gone = OrderedGrid(inside), gone
    replies = grid.send_and_receive(messages(grid, [102, 100, 101]), timeout=timeout)
    assert time.monotonic() - began < SOON
    there = [node for node in (102, 100, 101) if node not in gone]
    assert [reply.metadata.src_node_id for reply in replies] == there
    assert [(each["kind"], each["node"], each["reason"]) for each in grid.ledger.incidents] == [
        ("absent", node, REFUSED) for node in (102, 100, 101) if node in gone
    ]
    assert grid.ledger.messages["train"] == grid.ledger.replies["train"] == len(there)
    assert grid.ledger.by_node.keys() == set(there)


class Leaving(LocalGrid):
    """As Flower 1.43: nodes in ``gone`` are no longer listed, but messages to them are taken."""

    gone, looks, late = frozenset(), 0, None

    def get_node_ids(self):
        self.looks += 1
        return [node for node in super().get_node_ids() if node not in self.gone]

    def pull_messages(self, message_ids):
        ids = [key for key in message_ids if self._replies[key].metadata.src_node_id not in self.gone]
        if self.looks and self.late:
            ids += [key for key in message_ids if self._replies[key].metadata.src_node_id == self.late]
        return super().pull_messages(ids)


@pytest.mark.parametrize("late", [None, 102])
def test_a_node_that_leaves_without_a_word_does_not_hold_the_others_until_the_timeout(late, monkeypatch):
    monkeypatch.setattr("autoflip_flwr.server.grid.LOOK", 0.05)
    inside, began = Leaving(message_app(), 4), time.monotonic()
    grid, inside.gone, inside.late = OrderedGrid(inside), {101, 102}, late
    replies = grid.send_and_receive(messages(grid, [103, 102, 101, 100]), timeout=3600)
    assert time.monotonic() - began < SOON
    assert inside.looks == 2  # what came before a node left is there at the second look
    assert [reply.metadata.src_node_id for reply in replies] == [103, *([102] if late else []), 100]
    reasons = {each["node"]: each["reason"] for each in grid.ledger.incidents}
    assert reasons == dict.fromkeys({101, 102} - {late}, "no reply: the node has left")
    assert grid.ledger.messages["train"] == 4


def test_messages_that_the_grid_has_no_ids_for_are_absent_too():
    class TooLarge(LocalGrid):
        """As Flower's, where the SuperLink takes no request of that size."""

        def push_messages(self, messages):
            return []

    grid = OrderedGrid(TooLarge(message_app(), 2))
    assert grid.send_and_receive(messages(grid, [100, 101])) == []
    reasons = [each["reason"] for each in grid.ledger.incidents]
    assert reasons == ["the message was not sent: Flower's log says why"] * 2
    assert not grid.ledger.messages


def test_a_repeat_that_is_refused_leaves_the_others():
    inside = Left(message_app(), 3)
    grid = OrderedGrid(inside)

    def again(message, reply):
        inside.gone = {101}
        return messages(grid, [message.metadata.dst_node_id])[0]

    grid.repeat = again
    replies = grid.send_and_receive(messages(grid, [102, 101, 100]))
    assert [reply.metadata.src_node_id for reply in replies] == [102, 100]
    assert [each["reason"] for each in grid.ledger.incidents] == [REFUSED]


def test_a_roll_call_does_not_wait_for_a_node_that_is_refused_and_asks_it_again_later(monkeypatch):
    inside, began = Left(message_app(), 3), time.monotonic()
    grid, inside.gone = OrderedGrid(inside), {101}
    assert grid.roll_call(minimum=2, timeout=3600) == [100, 102, 101]
    assert time.monotonic() - began < SOON
    assert grid.calls.mute == set()
    inside.gone = frozenset()
    assert grid.get_node_ids() == [100, 102, 101]  # not yet
    assert grid.ledger.messages["other"] == 2
    monkeypatch.setattr("autoflip_flwr.server.roll_call.EVERY", 0.0)
    assert grid.get_node_ids() == [100, 101, 102]
    assert grid.ledger.messages["other"] == grid.ledger.replies["other"] == 3
    assert grid.ledger.incidents == []


class Older(LocalGrid):
    """A grid of Flower 1.42 or before, which does not say what no ids at all mean."""

    def pull_messages(self, message_ids):
        assert message_ids
        return super().pull_messages(message_ids)


class Newer(LocalGrid):
    """A grid of Flower 1.43, to which ``message_ids`` is out of date."""

    def pull_messages(self, reply_to_message_ids=None, *, message_ids=None):
        assert message_ids is None
        assert reply_to_message_ids
        return super().pull_messages(reply_to_message_ids)


@pytest.mark.parametrize("kind", [Older, Newer])
def test_replies_are_fetched_as_before_flower_1_43_and_as_since_then(kind):
    grid = OrderedGrid(kind(message_app(), 3))
    grid.roll_call(minimum=3, timeout=5)
    ids = grid.push_messages(messages(grid, [100, 101, 102]))
    (first,) = grid.pull_messages(ids[:1])
    (second,) = grid.pull_messages(message_ids=iter(ids[:2]))
    (third,) = grid.pull_messages(reply_to_message_ids=ids)
    assert [reply.metadata.reply_to_message_id for reply in (first, second, third)] == ids
    assert grid.pull_messages([]) == grid.pull_messages(message_ids=[]) == grid.pull_messages() == []
    with pytest.raises(TypeError, match="give it one of them"):
        grid.pull_messages(ids, message_ids=ids)


@pytest.mark.parametrize("kind", [Older, Newer, Left])
def test_without_ids_all_replies_are_fetched_that_were_not_yet(kind):
    inside = kind(message_app(), 3)
    grid, inside.gone = OrderedGrid(inside), {101}
    ids = grid.push_messages(messages(grid, [100, 101, 102]))
    ids += grid.push_messages(messages(grid, [102]))
    assert ("" in ids) == (kind is Left)
    grid.pull_messages(ids[:1])
    assert {reply.metadata.reply_to_message_id for reply in grid.pull_messages()} == {*ids[1:]} - {""}
    assert grid.pull_messages() == []


def test_without_ids_no_answer_to_the_roll_call_is_taken_away():
    inside = Filling(message_app(), 3)
    inside.late, inside.slow = False, True
    grid = OrderedGrid(inside)
    grid.calls.greet([100, 101, 102])
    inside.slow = False
    assert grid.pull_messages() == []
    grid.calls.greet([])
    assert grid.partitions == {100: 0, 101: 1, 102: 2}


def test_the_local_grid_takes_both_spellings():
    grid = LocalGrid(message_app(), 3)
    ids = grid.push_messages(messages(grid, [100, 101, 102]))
    assert [reply.metadata.src_node_id for reply in grid.pull_messages(message_ids=ids[:1])] == [100]
    assert [reply.metadata.src_node_id for reply in grid.pull_messages(reply_to_message_ids=ids[:2])] == [101]
    assert grid.pull_messages([]) == []
    assert [reply.metadata.src_node_id for reply in grid.pull_messages()] == [102]
    with pytest.raises(TypeError, match="give it one of them"):
        grid.pull_messages(ids, message_ids=ids)


def test_the_local_grid_is_as_strict_as_deployment():
    with pytest.raises(TypeError, match="must be a list"):
        LocalGrid(message_app(), 1).push_messages(message for message in [])


def test_flowers_private_names_and_error_codes_are_still_there():
    assert traits.NORM_BIT == KEY_NORM_BIT
    assert all(hasattr(_flower, name) for name in _flower.__all__)
    assert MOD_REFUSED == ErrorCode.MOD_FAILED_PRECONDITION
    assert testing.CLIENT_APP_RAISED == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
