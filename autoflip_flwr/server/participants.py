"""Find the explorers among the nodes that a round samples, before its mask is chosen."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from logging import WARNING

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from autoflip_flwr.core.layout import Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.method import Method
from autoflip_flwr.core.statistics import Accumulator, Statistics
from autoflip_flwr.replies.check import read_answer
from autoflip_flwr.server.exploration import Reports, asked_of, names_of
from autoflip_flwr.server.grid import OrderedGrid
from autoflip_flwr.wrapped.template import messages_of_copy


class Explorers:
    """The explorers of a run, each with its report.

    Reports stay in the bytes in which they came: with log8 a byte or less per explorer and prunable parameter.

    Parameters
    ----------
    reports : dict[int, tuple[float, ArrayRecord]]
        What each explorer reported.
    grid : OrderedGrid
        The nodes.
    method : Method
        Says what of a report is averaged.
    layout : Layout
        The model's arrays.
    deltas : str
        How reports are quantised, see :func:`~autoflip_flwr.server.exploration.explore`.
    """

    def __init__(self, reports: Reports, grid: OrderedGrid, method: Method, layout: Layout, deltas: str) -> None:
        self._reports, self._grid, self._method = reports, grid, method
        self._everything, self._deltas = Mask.full(layout), deltas
        self._copies = True
        self._drawn: set[int] | None = None

    def sampled(
        self, strategy: Strategy, round_: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Statistics | None:
        """Return the average over the explorers that the strategy samples in a round. A copy of it is asked.

        ``None`` where that is none or all of them, or where the strategy cannot be copied, which is logged once.
        """
        if not self._copies:
            return None
        try:
            messages = messages_of_copy(strategy, round_, arrays, config, grid)
        except Exception as error:  # it holds a lock or file that cannot be copied, say
            self._copies = False
            log(
                WARNING,
                "could not copy %s to see which nodes it samples (%r); masks come from all explorers",
                type(strategy).__name__,
                error,
            )
            return None
        self._drawn = {message.metadata.dst_node_id for message in messages}
        names = names_of(self._grid)
        return self.among({names.get(node, node) for node in self._drawn})

    def among(self, names: Collection[int]) -> Statistics | None:
        """Return the average over the explorers of these stable names; ``None`` where that is none or all of them."""
        chosen = [report for name, report in self._reports.items() if name in names]
        if len(chosen) in (0, len(self._reports)):
            return None
        requests, coding = asked_of(self._method, self._deltas)
        layout = self._everything.layout
        statistics = Accumulator(layout, self._method.squares)
        for weight, record in chosen:
            found = read_answer(record, mask=self._everything, requests=requests, kind=coding)
            statistics.add(weight, self._method.look(layout, found))
        return statistics.result()

    def compare(self, round_: int, messages: Iterable[Message]) -> None:
        """Log a warning if the strategy's messages go to other nodes than those of its copy in this round."""
        drawn, self._drawn = self._drawn, None
        if drawn is not None and drawn != {message.metadata.dst_node_id for message in messages}:
            log(
                WARNING,
                "round %d: the strategy has sampled other nodes than its copy did, and the mask comes from the "
                "explorers among the latter: nodes came or left, or it draws with a generator that no copy shares",
                round_,
            )
