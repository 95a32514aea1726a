"""Report the gradient statistics that the server asks for, for PyTorch clients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from flwr.app import Context
from torch import nn

from autoflip_flwr.client.context import subspace_and_layout
from autoflip_flwr.client.report import current_request, report
from autoflip_flwr.torch.names import Names
from autoflip_flwr.torch.targets import target_of

_STATISTICS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "gradient": lambda gradient, _: gradient,
    "gradient-square": lambda gradient, _: gradient**2,
    "saliency": lambda gradient, weight: (gradient * weight.detach()).abs(),
}


@contextmanager
def gradients(
    model: nn.Module | Mapping[str, torch.Tensor], context: Context, *, names: Names | None = None
) -> Iterator[None]:
    """Report the gradients of the ``backward`` calls in this block, where the server asks for them.

    Each call counts as one minibatch. The mean over all of them is reported: of the gradient (``"gradient"``), of its
    square (``"gradient-square"``), or of ``|gradient x weight|`` (``"saliency"``). Gradients are read before
    :func:`~autoflip_flwr.torch.masked_training` sets those of pruned weights to zero. If the server asks for nothing,
    nothing is done.

    Parameters
    ----------
    model, names
        As in :func:`~autoflip_flwr.torch.masked_training`.
    context : Context
        The context of the Flower client.

    Raises
    ------
    ValueError
        If the model lacks a prunable array that the server sent, or no ``backward`` was called in the block.

    Examples
    --------
    >>> # in the client's train function, with a batch that the server's question is answered by:
    >>> # with gradients(model, context):
    >>> #     loss(model(x), y).backward()
    """
    asked = [each.name for each in current_request(context) if each.name in _STATISTICS]
    _, layout = subspace_and_layout(context)
    if not asked or layout is None:
        yield
        return
    parameters = target_of(model, names, lambda _: None).find(layout)
    sums = {name: {key: torch.zeros_like(each) for key, each in parameters.items()} for name in asked}
    calls = dict.fromkeys(parameters, 0)

    def watch(key: str, weight: torch.Tensor) -> Callable[[torch.Tensor], None]:
        def add(gradient: torch.Tensor) -> None:
            dense = gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
            calls[key] += 1
            for name in asked:
                sums[name][key] += _STATISTICS[name](dense, weight)

        return add

    handles = [
        each.register_hook(watch(key, each))  # type: ignore[no-untyped-call]
        for key, each in parameters.items()
        if each.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    most = max(calls.values(), default=0)
    if not most:
        raise ValueError("no gradient came in the block of gradients(...): call backward() in it")
    for name in asked:
        report(context, name, {key: (each / most).float().cpu().numpy() for key, each in sums[name].items()})
