"""Find what the wrapped strategy would send in round 1, so that explorers get messages of the same form."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from logging import WARNING

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.logger import log
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
    """Return what the strategy would send in round 1. A copy is asked: the strategy and ``random`` stay unchanged."""
    config = ConfigRecord(dict(config))
    messages: list[Message] = []
    state = random.getstate()
    try:
        messages = list(copy.deepcopy(strategy).configure_train(1, arrays, config, grid))
    except Exception as error:  # it holds a lock or file that cannot be copied, or lacks what its own start sets
        name = type(strategy).__name__
        log(
            WARNING,
            "could not copy %s to see its round-1 messages (%r); explorers receive only train_config",
            name,
            error,
        )
    finally:
        random.setstate(state)
    if messages:
        return Template({message.metadata.dst_node_id: message.content for message in messages}, messages[0].content)
    config[ROUND_KEY] = 1
    arrays_key, config_key = (
        setting(strategy, "arrayrecord_key", "arrays"),
        setting(strategy, "configrecord_key", "config"),
    )
    return Template({}, RecordDict({str(arrays_key): arrays, str(config_key): config}))
