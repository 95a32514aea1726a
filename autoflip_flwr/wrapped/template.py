"""Find what the wrapped strategy would send in a round, by asking a copy of it."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from logging import INFO, WARNING, LogRecord

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.logger import FLOWER_LOGGER, log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from autoflip_flwr.wire.keys import (
    ROUND_KEY,
)
from autoflip_flwr.wrapped.traits import setting


@dataclass(frozen=True)
class Template:
    """The content that the wrapped strategy would send in round 1, to each node it selects and to any other."""

    by_node: dict[int, RecordDict]
    other: RecordDict


def template_of(strategy: Strategy, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Template:
    """Return what the strategy would send in round 1, so that explorers get messages of the same form."""
    messages: list[Message] = []
    try:
        messages = messages_of_copy(strategy, 1, arrays, config, grid)
    except Exception as error:  # it holds a lock or file that cannot be copied, or lacks what its own start sets
        name = type(strategy).__name__
        log(
            WARNING,
            "could not copy %s to see its round-1 messages (%r); explorers receive only train_config",
            name,
            error,
        )
    if messages:
        return Template({message.metadata.dst_node_id: message.content for message in messages}, messages[0].content)
    config = ConfigRecord({**config, ROUND_KEY: 1})
    arrays_key, config_key = (
        setting(strategy, "arrayrecord_key", "arrays"),
        setting(strategy, "configrecord_key", "config"),
    )
    return Template({}, RecordDict({str(arrays_key): arrays, str(config_key): config}))


def messages_of_copy(
    strategy: Strategy, round_: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
) -> list[Message]:
    """Return what a copy of the strategy would send in a round.

    The strategy, ``random`` and NumPy's global generator stay unchanged. So the strategy itself then draws the same
    nodes, if it draws with these or with a generator that is copied along. What ``configure_train`` logs as INFO is
    left out, since the strategy will log it again.

    Raises
    ------
    Exception
        If the strategy cannot be copied (it holds a lock or a file, say), or whatever its copy raises.
    """
    states = random.getstate(), np.random.get_state()
    FLOWER_LOGGER.addFilter(_not_twice)
    try:
        return list(copy.deepcopy(strategy).configure_train(round_, arrays, ConfigRecord(dict(config)), grid))
    finally:
        FLOWER_LOGGER.removeFilter(_not_twice)
        random.setstate(states[0])
        np.random.set_state(states[1])


def _not_twice(record: LogRecord) -> bool:
    return record.levelno > INFO or record.funcName != "configure_train"
