"""Ask the nodes for their partitions, and wait until the expected nodes are connected."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from logging import INFO, WARNING

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.common.logger import log

from autoflip_flwr.wire.keys import HEADER, HELLO
from autoflip_flwr.wire.messages import make_header

SETTLE = 10.0
"""Seconds without a new node after which waiting ends, if no node reports how many there are."""

ANSWERS = 15.0
"""Least seconds without a new node or answer after which nodes that have not answered count as mute."""

SLOWER = 3.0
"""A later answer may take this many times as long as the first, so that a busy machine does not exclude a node."""

EVERY = 10.0
"""Seconds between two log lines on which nodes the run waits for."""


class RollCall:
    """Ask each node for its ``partition-id`` and ``num-partitions``, once.

    Parameters
    ----------
    push : Callable[[list[Message]], Iterable[str]]
        Sends messages; returns the ids of those that were accepted.
    pull : Callable[[list[str]], list[Message]]
        Fetches the replies that have come to the messages of these ids.
    received : Callable[[Message, Message], None]
        Called with each message and its reply.

    Attributes
    ----------
    partitions : dict[int, int]
        Partition id by node id, of the nodes that have reported it.
    with_mod : set[int]
        Ids of the nodes whose answers came from ``autoflip_mod``.
    """

    def __init__(
        self,
        push: Callable[[list[Message]], Iterable[str]],
        pull: Callable[[list[str]], list[Message]],
        received: Callable[[Message, Message], None],
    ) -> None:
        self._push, self._pull, self._received = push, pull, received
        self.partitions: dict[int, int] = {}
        self.with_mod: set[int] = set()
        self._told: Counter[int] = Counter()
        self._greeted: set[int] = set()
        self._refused: dict[int, float] = {}  # time at which a node's hello was refused
        self._asked: dict[str, Message] = {}  # unanswered hellos, by message id

    @property
    def begun(self) -> bool:
        """Whether any node has been asked."""
        return bool(self._greeted or self._refused)

    @property
    def num_partitions(self) -> int:
        """Number of partitions that most nodes report (0: none does); one wrong node cannot delay the others."""
        return max(self._told, key=lambda count: self._told[count], default=0)

    @property
    def mute(self) -> set[int]:
        """The nodes that have not answered yet."""
        return {message.metadata.dst_node_id for message in self._asked.values()}

    def greet(self, nodes: Iterable[int]) -> int:
        """Ask the nodes not asked before, without waiting. Return how many answers have come since the last call.

        A node whose message the SuperLink refuses is asked again, :data:`EVERY` seconds later at the earliest.
        """
        now = time.monotonic()
        recent = {node for node, when in self._refused.items() if now - when < EVERY}
        if new := sorted(set(nodes) - self._greeted - recent):
            head = {HEADER: make_header(HELLO, 0)}
            hellos = [Message(RecordDict({**head, "config": ConfigRecord()}), node, MessageType.TRAIN) for node in new]
            taken = set(filter(None, self._push(hellos)))
            asked = {hello.metadata.message_id: hello for hello in hellos if hello.metadata.message_id in taken}
            self._asked |= asked
            self._greeted |= {hello.metadata.dst_node_id for hello in asked.values()}
            self._refused |= dict.fromkeys(set(new) - self._greeted, now)
        replies = self._pull(list(self._asked)) if self._asked else []
        for reply in replies:
            message = self._asked.pop(reply.metadata.reply_to_message_id, None)
            if message is not None:
                self._received(message, reply)
                self._learn(reply)
        return len(replies)

    def wait(
        self,
        connected: Callable[[], Iterable[int]],
        *,
        minimum: int = 1,
        expected: int = 0,
        fewest: int = 1,
        timeout: float = 60.0,
        longest: float | None = None,
    ) -> set[int]:
        """Wait until the expected nodes are connected and have answered. The log says at once how many are expected.

        The number of expected nodes is given by the caller, or else by the nodes' ``num-partitions``. If neither is
        known, waiting ends when no new node has come for :data:`SETTLE` seconds. The wait for an answer ends after
        :data:`ANSWERS` seconds, or :data:`SLOWER` times as long as the first answer took (while nobody has answered,
        :data:`SLOWER` times ``timeout``). A node without an answer is then :attr:`mute`, but may answer later.

        Parameters
        ----------
        connected : Callable[[], Iterable[int]]
            The nodes that are connected now.
        minimum : int
            Smallest number of nodes with which the run can go on.
        expected : int
            How many nodes are expected; 0: as many as the nodes report.
        fewest : int
            How many are expected at least, if no node reports how many.
        timeout : float
            Seconds without a new node after which the run goes on with the connected nodes, if these are ``minimum``.
        longest : float | None
            Seconds without a new node after which waiting for ``minimum`` fails; ``None``: ``timeout``.

        Returns
        -------
        set[int]
            Ids of the nodes that are connected.

        Raises
        ------
        RuntimeError
            If fewer than ``minimum`` nodes have connected in time.
        """
        started = came = time.monotonic()
        asked = heard = 0.0  # times of the first hello and of the last answer
        most, said = 0, _Said()
        # a first client process takes long to start
        patience = min(timeout, ANSWERS) if len(self._greeted) > len(self._asked) else SLOWER * timeout
        while True:
            nodes = set(connected())
            answers, now = self.greet(nodes), time.monotonic()
            asked = asked or (now if nodes else 0.0)
            if answers and not heard:
                patience = max(min(timeout, ANSWERS), SLOWER * (now - asked))
            heard = now if answers else heard
            if len(nodes) > most:
                most, came = len(nodes), now
            known = expected or self.num_partitions
            wanted = max(minimum, known or fewest)
            # fewer than the strategy needs, although the nodes report that there are more, or do not report
            lacking = len(nodes) < min(minimum, known or minimum)
            limit = timeout if longest is None or not lacking else longest
            late = now - came > limit
            # if all nodes answer without autoflip_mod, none can explore: fail at once instead of waiting
            settled = known > 0 or (heard > 0 and not self.with_mod) or now - came > min(SETTLE, timeout)
            all_there = len(nodes) >= wanted and settled
            waited_for = self.mute & nodes
            if (late or all_there) and (not waited_for or now - max(came, heard) > patience):
                break
            if late or all_there:
                said.say(f"waiting for answers: {len(nodes - waited_for)} of {len(nodes)} nodes have answered")
            elif len(nodes) < wanted:
                said.say(f"waiting for nodes: {len(nodes)} of {wanted} connected")
            else:
                said.say(f"waiting for nodes: {len(nodes)} connected; none says yet how many there are")
            time.sleep(pause(started))
        if len(nodes) < minimum:
            raise RuntimeError(f"{len(nodes)} nodes have connected within {limit:g} s, but {minimum} are needed")
        if len(nodes) < wanted:
            log(WARNING, "%d of %d nodes have connected: no new one for %g s, going on", len(nodes), wanted, limit)
        log(INFO, "%d node%s connected", len(nodes), " is" if len(nodes) == 1 else "s are")
        self._warn(nodes)
        return nodes

    def _warn(self, nodes: set[int]) -> None:
        if mute := sorted(self.mute & nodes):
            log(WARNING, "nodes %s are connected, but have not answered: going on without waiting for them", mute)
        claims = Counter(self.partitions[node] for node in nodes & self.partitions.keys())
        for partition in (partition for partition, count in claims.items() if count > 1):
            alike = sorted(node for node in nodes if self.partitions.get(node) == partition)
            log(
                WARNING,
                "nodes %s all say that they have partition %d: give each its own partition-id",
                alike,
                partition,
            )

    def _learn(self, reply: Message) -> None:
        head = reply.content.get(HEADER) if reply.has_content() else None
        if not isinstance(head, ConfigRecord):
            return
        self.with_mod.add(reply.metadata.src_node_id)
        partition, count = head.get("partition"), head.get("num-partitions")
        if type(partition) is int and partition >= 0:
            self.partitions[reply.metadata.src_node_id] = partition
        if type(count) is int and count > 0:
            self._told[count] += 1


class _Said:
    """Logs which nodes a run waits for: at once, on a change (once per second), and every :data:`EVERY` seconds."""

    def __init__(self) -> None:
        self._text, self._when = "", 0.0

    def say(self, text: str) -> None:
        since = time.monotonic() - self._when
        if not self._text or since > EVERY or (text != self._text and since > 1):
            log(INFO, "%s", text)
            self._text, self._when = text, time.monotonic()


def pause(started: float) -> float:
    """Return the seconds until replies are pulled again: a twentieth of the time waited so far, from 0.02 s to 1 s."""
    return min(max((time.monotonic() - started) / 20, 0.02), 1.0)
