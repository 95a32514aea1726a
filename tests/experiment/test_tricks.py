"""Tricks of training under a mask, each by hand: powerpropagation, extrusion, warm-up, feedback of what is cut off."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from safetensors.numpy import load_file
from torch import nn

from autoflip_flwr import Layout, Mask
from autoflip_flwr.core.subspace import Subspace
from autoflip_flwr.experiment import client, server
from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.data.dataset import Inputs
from autoflip_flwr.experiment.data.load import load_for
from autoflip_flwr.experiment.examples import Examples, Shared, examples_to_test
from autoflip_flwr.experiment.extrusion import Extrusion
from autoflip_flwr.experiment.feedback import CutOff
from autoflip_flwr.experiment.models.build import build
from autoflip_flwr.experiment.powerpropagation import as_weights, to_theta
from autoflip_flwr.experiment.rules import ConfigError
from autoflip_flwr.experiment.training import evaluate, set_arrays, train
from autoflip_flwr.experiment.warmup import Rising
from autoflip_flwr.testing import LocalGrid
from autoflip_flwr.wire.keys import EXTRUDE_BELOW_KEY, EXTRUSION_KEY, HEADER, TRAIN, WARMUP_KEY

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


@pytest.mark.parametrize("other", [{"cut_feedback": True}, {"schedule": "gradual+regrow"}])
def test_powerpropagation_is_refused_where_zeros_must_move(other: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"powerpropagation = 1.25: weights of zero never move, .* leave one of the"):
        Config(powerpropagation=1.25, **other)
    assert Config(powerpropagation=1.25, outside="initial", **other).powerpropagation == 1.25


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


@pytest.mark.runs
def test_a_run_with_all_tricks_that_go_together(tmp_path: Path) -> None:
    values = {"output-dir": str(tmp_path), "num-server-rounds": 3, "local-epochs": 1, "exploration-epochs": 1}
    values |= {"model": "mlp", "schedule": "gradual", "fall": 0.7, "checkpoints": 0, "evaluate-every": 3, "nodes": 2}
    values |= {"powerpropagation": 1.25, "extrusion": 0.01, "warmup": 0.5}
    grid, config = LocalGrid(client.app, 2, values), Config.from_run_config(values)
    path = server.run(grid, config)
    sent = [message.content for message in grid.sent if message.content[HEADER]["phase"] == TRAIN]
    told = {content[HEADER]["round"]: set(content["config"]) - {"server-round"} for content in sent}
    extruded = {EXTRUDE_BELOW_KEY, EXTRUSION_KEY}
    assert told == {1: {WARMUP_KEY} | extruded, 2: {WARMUP_KEY} | extruded, 3: {WARMUP_KEY}}
    data = load_for(config)
    model, theta = build("mlp", data.input_shape, data.classes, 1), load_file(path / "model.safetensors")
    set_arrays(model, [theta[name] for name in model.state_dict()])
    with as_weights(model, 1.25):
        _, accuracy = evaluate(model, examples_to_test(data))
    assert json.loads((path / "summary.json").read_text())["final_accuracy"] == accuracy


@pytest.mark.runs
def test_in_a_run_nodes_remember_what_was_cut_off(tmp_path: Path) -> None:
    values = {"output-dir": str(tmp_path), "num-server-rounds": 1, "local-epochs": 1, "exploration-epochs": 1}
    values |= {"model": "mlp", "checkpoints": 0, "nodes": 2, "cut-feedback": True}
    grid = LocalGrid(client.app, 2, values)
    mask = load_file(server.run(grid, Config.from_run_config(values)) / "mask.safetensors")
    for context in grid.contexts.values():
        remembered = {name: array.numpy() for name, array in context.state.array_records["cut-off"].items()}
        assert remembered.keys() == mask.keys()
        assert not any(values[mask[name] == 1].any() for name, values in remembered.items())
        assert all(values.any() for values in remembered.values())
