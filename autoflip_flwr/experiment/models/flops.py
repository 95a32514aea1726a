"""What a training step of a model costs."""

from __future__ import annotations

import copy

from torch import nn

from autoflip_flwr.experiment.inputs import kind_of
from autoflip_flwr.experiment.models.blank import blank


def flops_per_example(model: nn.Module, input_shape: tuple[int, ...], *, kind: str | None = None) -> int:
    """Count the floating-point operations of one training example, forward and backward.

    Convolutions and matrix products are counted, those inside an LSTM too, a multiply-add as 2. Element-wise layers,
    embeddings and the gradient with respect to the input are not. Only a copy is run, without storage; the model itself
    is neither changed nor kept. A model of a user's own that cannot run without storage is copied and run on the CPU.
    There PyTorch counts nothing for recurrent layers.

    Parameters
    ----------
    model : Module
        The model. Frozen parameters count as trained.
    input_shape : tuple of int
        Shape of one example.
    kind : str | None (None)
        What the data set says that an example is: `image`, `signal` or `text`. None: the number of dimensions says it.

    Returns
    -------
    int
        FLOPs, forward plus backward.
    """
    kind = kind_of(input_shape, kind)
    try:
        return _count(model, input_shape, kind, "meta")
    except (RuntimeError, NotImplementedError):
        return _count(model, input_shape, kind, "cpu")


def _count(model: nn.Module, input_shape: tuple[int, ...], kind: str, device: str) -> int:
    # Evaluation mode costs the same, and lets batch normalisation accept a single example.
    shadow = copy.deepcopy(model).to(device).eval().requires_grad_(True)
    from torch.utils.flop_counter import FlopCounterMode  # here, not above: it loads a compiler clients do without

    counter = FlopCounterMode(display=False)
    with counter:
        shadow(blank(1, input_shape, kind, device)).sum().backward()
    return int(counter.get_total_flops())
