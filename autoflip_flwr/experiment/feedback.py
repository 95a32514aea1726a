"""Error feedback for what a mask cuts off: a node trains all entries, sends the kept ones, and remembers the rest.

It is the frozen tail of FLASC (Kuo et al. 2024) with a memory.
"""

from __future__ import annotations

import torch
from flwr.app import Array, ArrayRecord, Context
from torch import nn

from autoflip_flwr.core.mask import Mask

_STATE = "cut-off"
"""Name of the record of the node's state: for each prunable array, what training has added outside the mask."""


class CutOff:
    """What a mask cuts off a node's model, from one of its rounds to the next.

    Parameters
    ----------
    model : nn.Module
        The model as the message brought it.
    mask : Mask
        The mask in force. Its names are those of the model's parameters.
    context : Context
        The node's context, whose state holds what is remembered. Entries that a new mask keeps are forgotten.
    """

    def __init__(self, model: nn.Module, mask: Mask, context: Context) -> None:
        self._context = context
        self._sent: dict[str, tuple[nn.Parameter, torch.Tensor, torch.Tensor]] = {}
        for name, parameter in model.named_parameters():
            if name in mask.keep:
                outside = torch.from_numpy(~mask.keep[name]).to(parameter.device)
                self._sent[name] = parameter, outside, parameter.detach().clone()

    @torch.no_grad()
    def put_back(self) -> None:
        """Add what is remembered to the entries outside the mask; nothing in the node's first round."""
        remembered = self._context.state.get(_STATE)
        if not isinstance(remembered, ArrayRecord):
            return
        for name, (parameter, outside, _) in self._sent.items():
            parameter.add_(torch.from_numpy(remembered[name].numpy().copy()).to(parameter.device) * outside)

    @torch.no_grad()
    def remember(self) -> None:
        """Remember what the entries outside the mask are now, beyond what the message brought."""
        self._context.state[_STATE] = ArrayRecord(
            {
                name: Array(((parameter - sent) * outside).cpu().numpy())
                for name, (parameter, outside, sent) in self._sent.items()
            }
        )
