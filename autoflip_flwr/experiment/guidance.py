"""What FedLEx's guidance is to a client: a factor in [0, 1] for each entry of the gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, Context
from torch import nn

from autoflip_flwr.client.context import subspace_and_layout
from autoflip_flwr.core.layout import ArraySpec, Layout
from autoflip_flwr.wire.deltas import decode_deltas

KEY = "guidance"
"""Key of the guidance in the config of a message, and in the node's state."""

_STATE = "guidance"
"""Name of the record of the node's state that keeps it."""


def specs_of(layout: Layout) -> list[ArraySpec]:
    """Return the arrays that have a guidance, as they are encoded."""
    return [ArraySpec(spec.name, spec.shape, "float32", True) for spec in layout.prunable]


@contextmanager
def guided(model: nn.Module, context: Context, config: Mapping[str, Any]) -> Iterator[None]:
    """Scale the gradients of the model by the guidance of the message, or of an earlier one, in this block.

    Raises
    ------
    RuntimeError
        If the node has never got the guidance, or has lost it; the server then sends it with its next message.
    ValueError
        If it is not the guidance of this model.
    """
    if KEY in config:
        context.state[_STATE] = ConfigRecord({KEY: config[KEY]})
    _, layout = subspace_and_layout(context)
    if layout is None or _STATE not in context.state:
        raise RuntimeError("this node has no guidance: it has lost what an earlier message brought")
    found = decode_deltas(specs_of(layout), bytes(context.state.config_records[_STATE][KEY]))  # type: ignore[arg-type]
    handles = []
    for name, parameter in model.named_parameters():  # a weight of two names once
        if name in found:
            factor = torch.from_numpy(np.asarray(found[name])).to(parameter.device)
            handles.append(parameter.register_hook(lambda gradient, factor=factor: gradient * factor))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
