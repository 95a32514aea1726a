"""A facade of Flower's grid: reproducible sampling, replies in message order, time limits, and the ledger."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from autoflip_flwr.costs.ledger import LATE, Ledger, phase_of
from autoflip_flwr.server.base_delivery import Told, learn
from autoflip_flwr.server.roll_call import RollCall, pause
from autoflip_flwr.server.waiting import Waiting

REFUSED = "the SuperLink refused the message: the node has left"
UNSENT = "the message was not sent: Flower's log says why"
GONE = "no reply: the node has left"

REPEATS = 2
"""How often a message may be sent again in one exchange: a node may lack the mask, and then the base."""

LOOK = 10.0
"""Seconds between checks whether the nodes whose replies are awaited are still connected."""


class OrderedGrid(Grid):
    """Wrap a grid so that a Flower strategy on top of it gives the same result each time.

    - ``get_node_ids`` lists the nodes by partition id once those are known (:meth:`roll_call`). It asks nodes that come
      later for theirs, without waiting for the answer, and lists them last until then. With a seed it also seeds
      :mod:`random` with the seed and the number of exchanges so far: Flower's strategies draw their sample right after.
    - ``send_and_receive`` returns the replies in the order of their messages, whatever order they came in. It gives
      messages the time limit as their ttl (a late node then skips them), logs progress if it takes long, and charges
      both directions to the ledger.

    Parameters
    ----------
    grid : Grid
        Flower's grid.
    seed : int | None
        Makes sampling reproducible. ``None`` leaves :mod:`random` alone.
    ledger : Ledger | None
        Where bytes and failures are counted; a new one by default.
    """

    def __init__(self, grid: Grid, *, seed: int | None = None, ledger: Ledger | None = None) -> None:
        self._grid = grid
        self._seed = seed
        self.ledger = ledger if ledger is not None else Ledger()
        self.exchanges = 0
        self.repeat: Callable[[Message, Message], Message | None] | None = None
        """Given a message and its reply, the message to send instead in the same exchange, or ``None``."""
        self.observe: Callable[[str, list[Message]], None] | None = None
        """Called after each exchange with its phase (see :mod:`autoflip_flwr.costs.ledger`) and its replies."""
        self.choose: Callable[[list[int]], list[int]] | None = None
        """Given the connected nodes, return those that may get messages."""
        self._unanswered: dict[str, None] = {}  # ids of what push_messages has sent
        self.bases: Told = {}
        """What the nodes have reported about the base that they hold."""
        self.calls = RollCall(self._push, self.pull_messages, self._received)

    @property
    def partitions(self) -> dict[int, int]:
        """Partition id by node id, of the nodes that have reported it."""
        return self.calls.partitions

    @property
    def num_partitions(self) -> int:
        """Number of partitions that most nodes report; 0 if none does."""
        return self.calls.num_partitions

    def set_run(self, run: object) -> None:
        """Forward to the grid."""
        self._grid.set_run(run)  # type: ignore[arg-type]

    @property
    def run(self):  # type: ignore[no-untyped-def]
        """Run information (Flower's own type, which has no public name)."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Return the connected nodes: in the grid's order before a roll call, in that of their partitions after it."""
        nodes = list(self._grid.get_node_ids())
        if self.calls.begun:
            self.calls.greet(nodes)
        if self.partitions:
            nodes.sort(key=lambda node: (self.partitions.get(node, math.inf), node))
        if self.choose is not None:
            nodes = self.choose(nodes)
        if self._seed is not None:
            random.seed(f"{self._seed}/{self.exchanges}")
        return nodes

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages. Return their ids in order, ``""`` for one that the SuperLink refuses."""
        ids = self._push(list(messages))
        self._unanswered |= dict.fromkeys(filter(None, ids))
        return ids

    def _push(self, batch: list[Message]) -> list[str]:
        ids = list(self._grid.push_messages(batch))
        pushed = set(filter(None, ids))
        self.ledger.partitions |= self.partitions  # here, since AutoFlip.start sets its own ledger
        for message in batch:
            if message.metadata.message_id in pushed:
                self.ledger.sent(message)
        return ids

    def pull_messages(  # type: ignore[override]  # Flower 1.43's parameters
        self, reply_to_message_ids: Iterable[str] | None = None, *, message_ids: Iterable[str] | None = None
    ) -> list[Message]:
        """Fetch the replies that have come to these messages. ``message_ids`` is the older name of the same parameter.

        ``None`` means all messages sent by :meth:`push_messages` whose replies have not been fetched.
        """
        if message_ids is not None:
            if reply_to_message_ids is not None:
                raise TypeError("pull_messages was given reply_to_message_ids and message_ids: give it one of them")
            reply_to_message_ids = message_ids
        ids = list(self._unanswered if reply_to_message_ids is None else reply_to_message_ids)
        replies = list(self._grid.pull_messages(ids)) if ids else []
        for reply in replies:
            self._unanswered.pop(reply.metadata.reply_to_message_id, None)
        return replies

    def _received(self, message: Message, reply: Message) -> None:
        self.ledger.received(message, reply)
        learn(self.bases, message, reply)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages and wait at most ``timeout`` seconds for their replies. Return these in message order."""
        batch, started = list(messages), time.monotonic()
        replies = self.exchange(batch, timeout)
        self.exchanges += 1
        sent, new = {message.metadata.message_id: message for message in batch}, replies
        for _ in range(REPEATS if self.repeat is not None else 0):
            repeats: dict[str, Message] = {}
            for reply in new:
                again = self.repeat and self.repeat(sent[reply.metadata.reply_to_message_id], reply)
                if again is not None:
                    repeats[reply.metadata.reply_to_message_id] = again
            if not repeats:
                break
            left = None if timeout is None else max(timeout - (time.monotonic() - started), 0.1)
            new = self.exchange(list(repeats.values()), left)
            second = {reply.metadata.reply_to_message_id: reply for reply in new}
            # the reply to a repeated message replaces the first one
            healed = [
                second.get(repeats[key].metadata.message_id) if key in repeats else reply
                for reply in replies
                for key in (reply.metadata.reply_to_message_id,)
            ]
            replies = [reply for reply in healed if reply is not None]
            sent = {message.metadata.message_id: message for message in repeats.values()}
        return replies

    def exchange(
        self,
        messages: list[Message],
        timeout: float | None,
        arrived: Callable[[Message, Message], None] | None = None,
    ) -> list[Message]:
        """Do the same as ``send_and_receive``, but not counted as a round's exchange (for explorations and repeats).

        ``arrived`` is called with a message and its reply as soon as the reply is there.
        """
        if not messages:
            return []
        for message in messages:
            if timeout is not None:
                message.metadata.ttl = min(message.metadata.ttl, timeout)
        started, phase = time.monotonic(), phase_of(messages[0])
        deadline = None if timeout is None else started + timeout
        ids = self._push(messages)
        order = {message.metadata.message_id: index for index, message in enumerate(messages)}
        sent = set(filter(None, ids)) & order.keys()
        waiting = set(sent)
        replies: list[Message] = []
        missed: set[str] = set()  # ids of the messages whose nodes were not connected at the last check
        looked = started
        progress = Waiting(messages[0], len(waiting))
        while waiting:
            new = [reply for reply in self.pull_messages(waiting) if reply.metadata.reply_to_message_id in order]
            replies += new
            if arrived is not None:
                for reply in new:
                    arrived(messages[order[reply.metadata.reply_to_message_id]], reply)
            waiting -= {reply.metadata.reply_to_message_id for reply in new}
            if waiting and time.monotonic() - looked > LOOK:
                # Flower 1.42 answers for a node that has left; 1.43 does not, and accepts messages to it. It must be
                # missing twice, since a reply may have come right before the node left.
                there, looked = set(self._grid.get_node_ids()), time.monotonic()
                gone = {key for key in waiting if messages[order[key]].metadata.dst_node_id not in there}
                waiting, missed = waiting - (gone & missed), gone
            if not waiting or (deadline is not None and time.monotonic() > deadline):
                break
            progress.tell(len(replies))
            time.sleep(pause(started))
        self.ledger.seconds[phase] += time.monotonic() - started
        replies.sort(key=lambda reply: order[reply.metadata.reply_to_message_id])
        for reply in replies:
            self._received(messages[order[reply.metadata.reply_to_message_id]], reply)
        answered = {reply.metadata.reply_to_message_id for reply in replies}
        unsent = REFUSED if len(ids) == len(messages) else UNSENT
        for message in messages:
            key = message.metadata.message_id
            if key not in sent:
                self.ledger.absent(message, unsent)
            elif key not in answered:
                self.ledger.absent(message, LATE if key in waiting else GONE)
        if self.observe is not None:
            self.observe(phase, replies)
        return replies

    def roll_call(
        self,
        *,
        minimum: int = 1,
        expected: int = 0,
        fewest: int = 1,
        timeout: float = 60.0,
        longest: float | None = None,
    ) -> list[int]:
        """Wait for the nodes and learn their partitions: see :meth:`~autoflip_flwr.server.roll_call.RollCall.wait`.

        A node that answers later is known from then on. Nodes without ``autoflip_mod`` or without a partition id come
        last, in the order of their node ids.

        Returns
        -------
        list[int]
            The node ids, in order.
        """
        started = time.monotonic()
        try:
            self.calls.wait(
                self._grid.get_node_ids,
                minimum=minimum,
                expected=expected,
                fewest=fewest,
                timeout=timeout,
                longest=longest,
            )
        finally:
            self.ledger.seconds["other"] += time.monotonic() - started
        return self.get_node_ids()
