"""An in-process grid: a server app and a client app in one process, with Flower's serialisation in between if asked."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable

from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from autoflip_flwr._flower import (
    Run,
    TaskIdentity,
    get_all_nested_objects,
    inflate_object_from_contents,
    no_object_id_recompute,
)

CLIENT_APP_RAISED = 2
"""Flower's error code of a client app that raised an exception."""


UUID = 36
"""Length of Flower's ids of messages."""


class LocalGrid(Grid):
    """Run a client app in this process, one node after another.

    It is as strict as Flower's deployment: messages must come as a list, and every message and reply goes through
    Flower's own serialisation, unless ``serialise`` is False.

    Parameters
    ----------
    client_app : ClientApp
        The app that every node runs.
    num_nodes : int
        Nodes ``first``, ``first + 1``, ... with partition ids 0, 1, ...
    run_config : dict[str, bool | int | float | str] | None
        The run config that the nodes see.
    forget : Callable[[int, int], bool] | None
        ``forget(node, n)`` says whether the node loses its state before its ``n``-th message (0 is the first).
    tamper : Callable[[Message], Message] | None
        Changes a reply before the server sees it.
    arrange : Callable[[list[Message]], list[Message]] | None
        Reorders the replies of one pull.
    serialise : bool
        False hands messages over as copies that share the arrays' bytes, which nobody can change. Then they are
        neither counted nor kept here: ``up``, ``down`` and ``sent`` stay empty. The ledger of
        :class:`~autoflip_flwr.server.grid.OrderedGrid` counts all the same what a deployment would carry.
    first : int
        Id of the first node. With a number of 64 bits all ids become as long as those of a deployment, and a ledger
        counts messages as there.

    Attributes
    ----------
    up, down : int
        Bytes of the serialised replies and messages so far.
    sent : list[Message]
        Every message, as the node got it.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_nodes: int = 2,
        run_config: dict[str, bool | int | float | str] | None = None,
        *,
        forget: Callable[[int, int], bool] | None = None,
        tamper: Callable[[Message], Message] | None = None,
        arrange: Callable[[list[Message]], list[Message]] | None = None,
        serialise: bool = True,
        first: int = 100,
    ) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = first, 1, first
        self._run = Run.create_empty(1)
        self._app = client_app
        self._config = dict(run_config or {})
        self._forget, self._tamper, self._arrange, self._serialise = forget, tamper, arrange, serialise
        self._ids = itertools.count(1)
        self._replies: dict[str, Message] = {}
        self._count, self._first = num_nodes, first
        self._id_length = UUID if first >= 2**32 else 1
        self._handled = {first + i: 0 for i in range(num_nodes)}
        self.contexts = {node: self._fresh_context(node) for node in self._handled}
        self.up = self.down = 0
        self.sent: list[Message] = []

    def _fresh_context(self, node: int) -> Context:
        config: dict[str, bool | int | float | str] = {
            "partition-id": node - self._first,
            "num-partitions": self._count,
        }
        return Context(1, node, config, RecordDict(), dict(self._config))

    def _new_id(self) -> str:
        return f"{next(self._ids):0{self._id_length}}"

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """Run information."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """The nodes."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Let the nodes handle the messages at once."""
        if not isinstance(messages, list):
            raise TypeError("messages must be a list: Flower's deployment pushes nothing of a generator")
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = self._new_id()
            if self._serialise:
                (arrived, sent), size = _through_the_wire(message, copies=2)
                self.down += size
                self.sent.append(sent)
            else:
                arrived = _copied(message)
            reply = self._handle(arrived)
            reply.metadata.__dict__["_message_id"] = self._new_id()
            if self._serialise:
                (reply,), size = _through_the_wire(reply, copies=1)
                self.up += size
            else:
                reply = _copied(reply)
            self._replies[message.metadata.message_id] = reply if self._tamper is None else self._tamper(reply)
            ids.append(message.metadata.message_id)
        return ids

    def _handle(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        if self._forget is not None and self._forget(node, self._handled[node]):
            self.contexts[node] = self._fresh_context(node)
        self._handled[node] += 1
        try:
            return self._app(message, self.contexts[node])
        except Exception as error:  # as Flower does: whatever a client raises becomes an error reply
            return Message(Error(CLIENT_APP_RAISED, f"{type(error)}:<'{error}'>"), reply_to=message)

    def pull_messages(  # type: ignore[override]  # Flower 1.43's parameters
        self, reply_to_message_ids: Iterable[str] | None = None, *, message_ids: Iterable[str] | None = None
    ) -> list[Message]:
        """The replies to these messages, all by default; ``message_ids`` is the same, by the older name."""
        if message_ids is not None:
            if reply_to_message_ids is not None:
                raise TypeError("pull_messages was given reply_to_message_ids and message_ids: give it one of them")
            reply_to_message_ids = message_ids
        wanted = list(self._replies if reply_to_message_ids is None else reply_to_message_ids)
        replies = [self._replies.pop(i) for i in wanted if i in self._replies]
        return replies if self._arrange is None else self._arrange(replies)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push and pull."""
        return self.pull_messages(self.push_messages(messages))


def _copied(message: Message) -> Message:
    """The message with records of its own, as after serialisation; only the arrays' immutable bytes are shared."""
    other = copy.copy(message)
    other.__dict__["_metadata"] = copy.copy(message.metadata)
    if message.has_content():
        records = {
            key: ArrayRecord(dict(record)) if isinstance(record, ArrayRecord) else copy.deepcopy(record)
            for key, record in message.content.items()
        }
        other.content = RecordDict(records)
    return other


def _through_the_wire(message: Message, copies: int) -> tuple[list[Message], int]:
    """The message after Flower's serialisation, so many times, and the bytes of its objects."""
    with no_object_id_recompute():  # as where Flower sends a message: each object is serialised for its own id alone
        contents = {object_id: part.deflate() for object_id, part in get_all_nested_objects(message).items()}
        root = message.object_id
    arrived = []
    for _ in range(copies):
        copy = inflate_object_from_contents(root, contents, keep_object_contents=True)
        assert isinstance(copy, Message)
        copy.metadata.__dict__["_message_id"] = message.metadata.message_id
        arrived.append(copy)
    return arrived, sum(map(len, contents.values()))
