"""The exploration of AutoFLIP's published code: explorers train one shared model, one after another.

This is sequential central training, and the rounds begin with the trained model. It is here to show what that head
start is worth, not to be compared with methods that begin from W0.
"""

from __future__ import annotations

import random
from dataclasses import replace
from logging import WARNING

import numpy as np
from flwr.app import ConfigRecord
from flwr.common.logger import log

from autoflip_flwr.core.layout import Arrays
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.request import DELTA
from autoflip_flwr.core.statistics import Accumulator, Statistics, start_arrays
from autoflip_flwr.server.grid import OrderedGrid
from autoflip_flwr.server.strategy import AutoFlip


class Relay(AutoFlip):
    """Let each explorer begin with the model of the one before; the delta is that of the last model to W0."""

    def _explore(
        self,
        facade: OrderedGrid,
        everything: Mask,
        initial: Arrays,
        config: ConfigRecord,
        timeout: float,
        base: Arrays | None,
    ) -> Statistics:
        nodes, choose, model, answered = facade.get_node_ids(), facade.choose, initial, 0
        count = self.method.asked(len(nodes))
        drawn = random.Random(None if self.seed is None else f"{self.seed}/explorers").sample(nodes, count)
        template = self._template(facade, everything, initial, config)
        alone = replace(self.method, explorers=1.0, min_explorers=1, batches=1)
        try:
            for node in filter(drawn.__contains__, nodes):
                facade.choose = lambda _, node=node: [node]
                try:
                    found = self._ask(alone, facade, model, template, everything, timeout)
                except RuntimeError as error:
                    log(WARNING, "the model passes node %d by: %s", node, error)
                    continue
                model = start_arrays(model, found.mean[DELTA])
                answered += 1
        finally:
            facade.choose = choose
        if answered < self.method.min_explorers:
            raise RuntimeError(
                f"{answered} of {count} explorers answered, but min_explorers = {self.method.min_explorers}"
            )
        moved = {
            spec.name: np.subtract(model[spec.name], initial[spec.name], dtype=np.float64)
            for spec in everything.layout.specs
            if spec.floating
        }
        statistics = Accumulator(everything.layout, self.method.squares)
        statistics.add(1.0, self.method.look(everything.layout, {DELTA: moved}))
        return statistics.result()._replace(clients=answered)
