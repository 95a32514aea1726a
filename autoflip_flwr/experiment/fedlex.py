"""FedLEx (arXiv 2506.18640): nothing is pruned, and what explorers found scales the clients' gradients.

The guidance of a parameter, in [0, 1], is the mean over the explorers of their squared deltas, min-max normalised per
explorer and array. The server sends it once to each node that trains, in the config of a round's message, and the node
keeps it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from autoflip_flwr.core.methods import LossExploration
from autoflip_flwr.core.schedule import Schedule
from autoflip_flwr.core.scores import scores
from autoflip_flwr.core.statistics import Exploration, Floats
from autoflip_flwr.experiment.guidance import KEY, specs_of
from autoflip_flwr.server.strategy import Pruned
from autoflip_flwr.wire.deltas import encode_deltas


@dataclass(frozen=True, kw_only=True, repr=False)
class Guidance(LossExploration):
    """Explore, and prune nothing.

    Parameters
    ----------
    explorers, min_explorers, batches, weighting, timeout, public, epochs, patience
        See :class:`~autoflip_flwr.core.methods.LossExploration`.
    normalisation : str
        ``"per-client"`` (FedLEx), or ``"layer"`` (its authors' code).
    """

    normalisation: str = "per-client"
    initial: str = "scratch"
    schedule: Schedule | tuple[Schedule, ...] = ()

    dense = True


class Guided(Pruned):
    """Run a strategy whose messages bring the explorers' guidance to each node that lacks it."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Add the guidance to the messages of the nodes that have not answered with it yet."""
        messages = list(super().configure_train(server_round, arrays, config, grid))
        guidance: bytes | None = None
        for message in messages:
            if message.metadata.dst_node_id in self._guided:
                continue
            if guidance is None:
                guidance = self._encoded()
            key, own = next(iter(message.content.config_records.items()))
            message.content = RecordDict({**message.content, key: ConfigRecord({**own, KEY: guidance})})
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Note which nodes have the guidance: those that have trained with it."""
        batch = list(replies)
        for reply in batch:
            (self._guided.discard if reply.has_error() else self._guided.add)(reply.metadata.src_node_id)
        return super().aggregate_train(server_round, batch)

    @property
    def _guided(self) -> set[int]:
        found: set[int] = vars(self).setdefault("_nodes_with_guidance", set())
        return found

    def _encoded(self) -> bytes:
        assert isinstance(self.exploration, Exploration)
        found = guidance_of(self.exploration, self.method.normalisation)  # type: ignore[attr-defined]
        return encode_deltas(specs_of(self._started.mask.layout), found).tobytes()


def guidance_of(exploration: Exploration, normalisation: str) -> dict[str, Floats]:
    """Return the guidance of each prunable array, in [0, 1]."""
    return scores(exploration, normalisation, gamma=0)
