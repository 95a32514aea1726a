"""Tricks of training under a mask, each by hand: powerpropagation, extrusion, warm-up, feedback of what is cut off."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from torch import nn

from autoflip_flwr import Layout, Mask
from autoflip_flwr.core.subspace import Subspace
from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.data.dataset import Inputs
from autoflip_flwr.experiment.examples import Examples, Shared
from autoflip_flwr.experiment.extrusion import Extrusion
from autoflip_flwr.experiment.feedback import CutOff
from autoflip_flwr.experiment.powerpropagation import as_weights, to_theta
from autoflip_flwr.experiment.rules import ConfigError
from autoflip_flwr.experiment.training import train
from autoflip_flwr.experiment.warmup import Rising
from autoflip_flwr.wire.keys import EXTRUDE_BELOW_KEY, EXTRUSION_KEY

START = [[1.0, -2.0], [0.5, 3.0]]


def linear() -> nn.Linear:
    model = nn.Linear(2, 2)
    model.weight.data, model.bias.data = torch.tensor(START), torch.tensor([0.5, -0.5])
    return model


def examples(count: int = 4) -> Examples:
    x = np.random.default_rng(0).normal(size=(count, 2)).astype(np.float32)
    return Examples(Shared(x, np.arange(count, dtype=np.int64) % 2), Inputs("signal", (2,)))


def trained(
    model: nn.Module,
    *,
    mask: Subspace | None = None,
    epochs: int = 1,
    extrusion: Extrusion | None = None,
    warmup: float = 0.0,
    **own: object,
) -> None:
    config = Config(**{"optimizer": "sgd", "batch_size": 4, **own})
    plain = {"patience": None, "lr": 0.5, "weight_decay": 0.0, "seed": 1}
    train(model, examples(), config, mask=mask, epochs=epochs, extrusion=extrusion, warmup=warmup, **plain)


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


def test_extrusion_adds_the_gradient_on_small_kept_entries_alone() -> None:
    model = linear()
    model.weight.data *= torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    asked = {EXTRUDE_BELOW_KEY: 3.0, EXTRUSION_KEY: 0.25}
    extrusion = Extrusion.asked(asked, model, half().mask)
    assert extrusion is not None
    model.weight.grad = torch.ones(2, 2)
    extrusion.add_gradients()
    assert model.weight.grad.tolist() == [[1.5, 1.0], [1.25, 1.0]]  # 2 x 0.25 x 1, 0, 2 x 0.25 x 0.5, and 3 is no less
    assert model.bias.grad is None
    assert Extrusion.asked({}, model, half().mask) is None
    assert Extrusion.asked(asked, model, None) is None


def test_extrusion_is_part_of_training() -> None:
    plain, drawn = linear(), linear()
    asked = {EXTRUDE_BELOW_KEY: 0.6, EXTRUSION_KEY: 0.1}
    trained(plain, mask=half())
    trained(drawn, mask=half(), extrusion=Extrusion.asked(asked, drawn, half().mask))
    less = torch.tensor([[0.0, 0.0], [0.5 * 2 * 0.1 * 0.5, 0.0]])
    assert torch.allclose(plain.weight - drawn.weight, less, atol=1e-6)


def test_extrusion_needs_one_threshold_for_all() -> None:
    with pytest.raises(ConfigError, match=r"extrusion = 0.1: needs drop-by = 'magnitude' and drop-scope = 'global'"):
        Config(schedule="gradual", extrusion=0.1, drop_scope="layer")
    assert Config(schedule="static", extrusion=0.1, drop_scope="layer").in_effect("extrusion") == 0.0


def test_the_learning_rate_rises_over_the_steps_of_the_warmup() -> None:
    optimizer = torch.optim.SGD(linear().parameters(), lr=0.8)
    rising, rates = Rising(optimizer, 3), []
    for _ in range(6):
        rising.before_step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    none = Rising(optimizer, 0)
    none.before_step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.8)


def test_a_round_warms_up_over_a_share_of_its_steps() -> None:
    warm, plain = linear(), linear()
    trained(warm, warmup=1.0)
    trained(plain)
    start = torch.tensor(START)
    assert torch.allclose(warm.weight - start, (plain.weight - start) / 2, atol=1e-6)  # one step, at half the rate
    trained(warm := linear(), warmup=0.4, epochs=1)
    assert torch.equal(warm.weight, plain.weight)  # 0.4 of a step is none


def test_what_is_cut_off_comes_back_in_the_next_round_outside_the_mask_alone() -> None:
    context = Context(1, 1, {}, RecordDict(), {})
    first = linear()
    cut = CutOff(first, half().mask, context)
    cut.put_back()
    assert first.weight.tolist() == START  # nothing is remembered yet
    first.weight.data += torch.tensor([[0.5, 0.25], [0.5, 0.5]])
    cut.remember()
    again = linear()
    CutOff(again, half().mask, context).put_back()
    assert again.weight.tolist() == [[1.0, -1.75], [0.5, 3.0]]
    less = Mask.from_bool(half().mask.layout, {"weight": np.array([[False, True], [True, True]])})
    other = linear()
    cut = CutOff(other, less, context)
    cut.put_back()
    assert other.weight.tolist() == START  # the mask keeps the remembered entry now
    cut.remember()
    last = linear()
    CutOff(last, half().mask, context).put_back()
    assert last.weight.tolist() == START
