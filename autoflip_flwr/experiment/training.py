"""Train and evaluate the shipped app's models locally."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from autoflip_flwr.core.subspace import Subspace
from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.examples import Examples
from autoflip_flwr.experiment.extrusion import Extrusion
from autoflip_flwr.experiment.powerpropagation import as_weights
from autoflip_flwr.experiment.precision import output
from autoflip_flwr.experiment.rules import ConfigError
from autoflip_flwr.experiment.startup import light_imports
from autoflip_flwr.experiment.warmup import Rising
from autoflip_flwr.torch import masked_training


@dataclass(frozen=True)
class Trained:
    """The result of a local training: mean loss of the last epoch, epochs run, and total examples processed."""

    loss: float
    epochs: int
    examples: int


def seed_of(seed: int, *parts: int) -> int:
    """Return a seed in [0, 2**63) that depends on all arguments and nothing else."""
    return int(np.random.SeedSequence([seed, *parts]).generate_state(1, np.uint64)[0]) >> 1


def choose_device(device: str) -> torch.device:
    """Return the device. ``"auto"`` takes CUDA if available, else MPS, else the CPU.

    Raises
    ------
    ConfigError
        If the requested device does not exist.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return torch.device(next(name for name, available in there.items() if available))
    if not there[device]:
        raise ConfigError(f"device = '{device}': not available here; auto takes what there is")
    return torch.device(device)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let PyTorch compute with ``count`` threads in this block; ``None`` leaves their number unchanged."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train(
    model: nn.Module,
    examples: Examples,
    config: Config,
    *,
    epochs: int,
    patience: int | None,
    lr: float,
    weight_decay: float,
    mask: Subspace | None,
    seed: int,
    proximal_mu: float = 0.0,
    extrusion: Extrusion | None = None,
    warmup: float = 0.0,
) -> Trained:
    """Train in place with a fresh optimizer.

    Batch normalisation cannot train on a single example, so a last batch of one joins the batch before it. A node with
    only one example trains with the running statistics, and leaves them unchanged.

    Parameters
    ----------
    model : nn.Module
        The model, on the device to train on.
    examples : Examples
        On the same device. They are augmented, where they say so.
    config : Config
        Optimizer, batch size, precision, clipping and powerpropagation.
    epochs : int
        Maximum number of epochs.
    patience : int | None
        Stop after this many epochs without a better mean training loss; ``None`` never stops early.
    lr : float
        Learning rate.
    weight_decay : float
        Weight decay of the optimizer.
    mask : Subspace | None
        Applied after every optimizer step.
    seed : int
        Seed for the order of the examples, and their augmentation.
    proximal_mu : float (0.0)
        The gradients are those of the loss plus proximal_mu / 2 * ||w - w_start||^2 (FedProx, arXiv 1812.06127), where
        w_start are the parameters before this training. The loss that is returned lacks this term.
    extrusion : Extrusion | None
        Adds its gradients in each step. The loss that is returned lacks this term, too.
    warmup : float (0.0)
        Share of the steps of all ``epochs`` in which the learning rate rises, in [0, 1].
    """
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    with light_imports():  # torch.optim loads torch's compiler
        optimizer = _optimizer(model, config, lr, weight_decay)
    loss_of = nn.CrossEntropyLoss()
    power = config.in_effect("powerpropagation")
    best, since_best, loss, done = math.inf, 0, math.nan, 0
    model.train()
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if len(examples) == 1:
        for norm in norms:
            norm.eval()
    with masked_training(model, mask):
        steps = epochs * len(batches(torch.arange(len(examples)), config.batch_size, single=not norms))
        rising = Rising(optimizer, round(warmup * steps))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        start = [parameter.detach().clone() for parameter in trained] if proximal_mu else []
        while done < epochs:
            done += 1
            total = 0.0
            every = torch.randperm(len(examples), generator=order).to(examples.device)
            for rows in batches(every, config.batch_size, single=not norms):
                optimizer.zero_grad()
                x, y = examples.batch(rows, generator=order)
                with as_weights(model, power):
                    batch_loss = loss_of(output(model, x, config.precision), y)
                    batch_loss.backward()
                if proximal_mu:
                    _draw_to(start, trained, proximal_mu)
                if extrusion is not None:
                    extrusion.add_gradients()
                if config.clip_norm:
                    nn.utils.clip_grad_norm_(trained, config.clip_norm)
                rising.before_step()
                optimizer.step()
                total += batch_loss.item() * len(rows)
            loss = total / len(examples)
            since_best = 0 if loss < best else since_best + 1
            best = min(best, loss)
            if patience is not None and since_best >= patience:
                break
    return Trained(loss, done, done * len(examples))


def pass_over(model: nn.Module, examples: Examples, batch_size: int, seed: int, most: int | None = None) -> Trained:
    """Run all examples forward and backward once, without training. Normalisation statistics stay as they are.

    The parameters are those of :func:`train`. Nothing is augmented. Only the first ``most`` minibatches of a random
    order are run, if it is given.
    """
    model.eval()
    total, count = 0.0, 0
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    for rows in order.split(batch_size)[:most]:  # type: ignore[no-untyped-call]
        model.zero_grad()
        x, y = examples.batch(rows)
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item() * len(rows)
        count += len(rows)
    model.zero_grad()
    return Trained(total / count, 1, count)


def batches(order: torch.Tensor, size: int, *, single: bool) -> list[torch.Tensor]:
    """Split the examples of an epoch.

    Parameters
    ----------
    order : Tensor
        int64 (N,), the examples' indices.
    size : int
        Examples per batch.
    single : bool
        Whether the last batch may be one example; else it joins the batch before it.
    """
    parts = list(order.split(size))  # type: ignore[no-untyped-call]
    if not single and len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


@torch.no_grad()
def _draw_to(start: list[torch.Tensor], trained: list[nn.Parameter], mu: float) -> None:
    """Add the gradient mu * (w - w_start). It is zero for pruned parameters, which a mask keeps where they began."""
    for before, parameter in zip(start, trained, strict=True):
        if parameter.grad is not None:
            parameter.grad.add_(parameter - before, alpha=mu)


def _optimizer(model: nn.Module, config: Config, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    fused = parameters[0].device.type in ("cpu", "cuda")  # one pass over the parameters: a fifth of the time
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay, fused=fused)
    return torch.optim.SGD(parameters, lr=lr, momentum=config.momentum, weight_decay=weight_decay, fused=fused)


@torch.inference_mode()
def evaluate(model: nn.Module, examples: Examples, batch_size: int = 128) -> tuple[float, float]:
    """Return the mean cross-entropy, and the accuracy in [0, 1]. The examples are on the model's device."""
    model.eval()
    loss, right = 0.0, 0
    for rows in torch.arange(len(examples), device=examples.device).split(batch_size):  # type: ignore[no-untyped-call]
        x, y = examples.batch(rows)
        output = model(x)
        loss += nn.functional.cross_entropy(output, y, reduction="sum").item()
        right += int((output.argmax(1) == y).sum())
    return loss / len(examples), right / len(examples)


def set_arrays(model: nn.Module, arrays: list[NDArray[np.generic]]) -> None:
    """Load a model's state from arrays in the order of its state dict, cast to its dtypes.

    Raises
    ------
    ValueError
        If their number or a shape does not match.
    """
    state = model.state_dict()
    if len(arrays) != len(state):
        raise ValueError(f"{len(arrays)} arrays for a model of {len(state)}")
    for (name, tensor), array in zip(state.items(), arrays, strict=True):
        if tuple(array.shape) != tuple(tensor.shape):
            raise ValueError(f"array {name!r} has shape {array.shape}, the model's has {tuple(tensor.shape)}")
        tensor.copy_(torch.from_numpy(np.array(array)))


def get_arrays(model: nn.Module) -> dict[str, NDArray[np.generic]]:
    """Return copies of the model's state on the CPU, by name."""
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in model.state_dict().items()}
