"""Tricks of training under a mask, each by hand: powerpropagation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from autoflip_flwr import Layout, Mask
from autoflip_flwr.core.subspace import Subspace
from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.data.dataset import Inputs
from autoflip_flwr.experiment.examples import Examples, Shared
from autoflip_flwr.experiment.powerpropagation import as_weights, to_theta
from autoflip_flwr.experiment.training import train

START = [[1.0, -2.0], [0.5, 3.0]]


def linear() -> nn.Linear:
    model = nn.Linear(2, 2)
    model.weight.data, model.bias.data = torch.tensor(START), torch.tensor([0.5, -0.5])
    return model


def examples(count: int = 4) -> Examples:
    x = np.random.default_rng(0).normal(size=(count, 2)).astype(np.float32)
    return Examples(Shared(x, np.arange(count, dtype=np.int64) % 2), Inputs("signal", (2,)))


def trained(model: nn.Module, *, mask: Subspace | None = None, epochs: int = 1, **own: object) -> None:
    config = Config(**{"optimizer": "sgd", "batch_size": 4, **own})
    train(model, examples(), config, mask=mask, epochs=epochs, patience=None, lr=0.5, weight_decay=0.0, seed=1)


def half() -> Subspace:
    kept = {"weight": np.array([[True, False], [True, True]])}
    return Subspace(Mask.from_bool(Layout.of({"weight": np.array(START, np.float32)}), kept))


def test_theta_and_the_weights_are_powers_of_each_other() -> None:
    model = linear()
    to_theta(model, 2.0)
    assert torch.allclose(model.weight, torch.tensor([[1.0, -(2**0.5)], [0.5**0.5, 3**0.5]]))
    assert model.bias.tolist() == [0.5, -0.5]
    theta = model.weight.detach().clone()
    with as_weights(model, 2.0):
        assert torch.allclose(model.weight, torch.tensor(START))
    assert torch.equal(model.weight, theta)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_the_explicit_reparametrisation(masked: bool) -> None:
    keep = torch.tensor([[1.0, 0.0], [1.0, 1.0]]) if masked else torch.ones(2, 2)
    model = linear()
    trained(model, mask=half() if masked else None, epochs=3, powerpropagation=1.5)
    theta = (torch.tensor(START) * keep).requires_grad_()
    bias = torch.tensor([0.5, -0.5], requires_grad=True)
    x, y = examples().batch(torch.arange(4))
    for _ in range(3):
        loss = nn.functional.cross_entropy(x @ (theta.sign() * theta.abs() ** 1.5).T + bias, y)
        by_theta, by_bias = torch.autograd.grad(loss, [theta, bias])
        with torch.no_grad():
            theta -= 0.5 * keep * by_theta.nan_to_num()
            bias -= 0.5 * by_bias
    assert torch.allclose(model.weight, theta, atol=1e-6)
    assert torch.allclose(model.bias, bias, atol=1e-6)
    assert (model.weight[0, 1] == 0) == masked


def test_an_exponent_of_one_changes_no_bit_nor_does_one_of_another_method() -> None:
    plain, one, other = linear(), linear(), linear()
    trained(plain, mask=half(), epochs=3)
    trained(one, mask=half(), epochs=3, powerpropagation=1.0)
    trained(other, mask=half(), epochs=3, powerpropagation=1.5, method="magnitude")
    assert torch.equal(plain.weight, one.weight)
    assert torch.equal(plain.weight, other.weight)
