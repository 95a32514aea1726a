"""The switches of training: precision, clipped gradients, and FedProx's term; each of them respects the mask."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from torch import nn

from autoflip_flwr import Layout, Mask
from autoflip_flwr.core.subspace import Subspace
from autoflip_flwr.experiment import client, precision, server
from autoflip_flwr.experiment.config import Config, ConfigError
from autoflip_flwr.experiment.data.dataset import Inputs
from autoflip_flwr.experiment.examples import Examples, Shared
from autoflip_flwr.experiment.models.build import build
from autoflip_flwr.experiment.precision import check_precision, has_bfloat16, output
from autoflip_flwr.experiment.training import train
from autoflip_flwr.testing import LocalGrid
from autoflip_flwr.wire.keys import EPOCHS_KEY, PATIENCE_KEY, PHASE_KEY

START = [[1.0, -2.0], [0.5, 3.0]]


def linear() -> nn.Module:
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.tensor(START)
    return model


def examples(count: int = 4) -> Examples:
    x = np.random.default_rng(0).normal(size=(count, 2)).astype(np.float32)
    return Examples(Shared(x, np.arange(count, dtype=np.int64) % 2), Inputs("signal", (2,)))


def trained(model: nn.Module, *, mask: Subspace | None = None, epochs: int = 1, mu: float = 0.0, **own: object) -> None:
    config = Config(optimizer="sgd", batch_size=4, **own)
    plain = {"epochs": epochs, "patience": None, "lr": 0.5, "weight_decay": 0.0, "seed": 1}
    train(model, examples(), config, mask=mask, proximal_mu=mu, **plain)


def gradient(weight: torch.Tensor) -> torch.Tensor:
    x, y = examples().batch(torch.arange(4))
    weight = weight.clone().requires_grad_()
    nn.functional.cross_entropy(x @ weight.T, y).backward()
    return weight.grad


def half() -> Subspace:
    kept = {"weight": np.array([[True, False], [True, True]])}
    return Subspace(Mask.from_bool(Layout.of({"weight": np.array(START, np.float32)}), kept))


def test_the_proximal_term_draws_to_the_start_from_the_second_step_on() -> None:
    start, model = torch.tensor(START), linear()
    trained(model, epochs=2, mu=0.3)
    once = start - 0.5 * gradient(start)
    twice = once - 0.5 * (gradient(once) + 0.3 * (once - start))
    assert torch.allclose(model.weight, twice, atol=1e-6)


def test_a_longer_gradient_is_clipped_to_its_norm_and_a_shorter_one_is_not() -> None:
    start = torch.tensor(START)
    found = gradient(start)
    for norm, factor in ((0.1, 0.1 / found.norm()), (10.0, 1.0)):
        model = linear()
        trained(model, clip_norm=norm)
        assert torch.allclose(model.weight, start - 0.5 * factor * found, atol=1e-5)


def test_the_norm_is_that_of_kept_gradients_and_the_term_is_among_what_is_clipped() -> None:
    model, keep = linear(), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    trained(model, mask=half(), epochs=2, mu=5.0, clip_norm=0.1)
    at = start = torch.tensor(START) * keep
    for _ in range(2):
        found = (gradient(at) + 5.0 * (at - start)) * keep
        at = at - 0.5 * found * min(1.0, 0.1 / found.norm())
    assert torch.allclose(model.weight, at, atol=1e-5)
    assert model.weight[0, 1] == 0


@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_in_bfloat16_parameters_logits_and_gradients_stay_float32(name: str) -> None:
    seen = []
    model = build(name, (1, 8, 8), 10, 0)
    model.get_submodule("fc1").register_forward_hook(lambda *given: seen.append(given[2].dtype))
    logits = output(model, torch.ones(2, 1, 8, 8), "bfloat16")
    logits.sum().backward()
    assert seen == [torch.bfloat16]
    assert {logits.dtype, *(p.dtype for p in model.parameters()), *(p.grad.dtype for p in model.parameters())} == {
        torch.float32
    }
    exact = output(model, torch.ones(2, 1, 8, 8), "float32")
    assert 0 < (exact - logits).abs().max() < 0.05


def test_training_in_bfloat16_keeps_the_mask_and_comes_near_float32() -> None:
    exact, rough = linear(), linear()
    trained(exact, mask=half(), epochs=5)
    trained(rough, mask=half(), epochs=5, precision="bfloat16")
    assert rough.weight[0, 1] == 0
    assert rough.weight.dtype == torch.float32
    assert 0 < (exact.weight - rough.weight).abs().max() < 0.02


def test_a_model_that_cannot_be_computed_in_bfloat16_is_refused() -> None:
    class Picky(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if torch.is_autocast_enabled("cpu"):
                raise RuntimeError("no such kernel. Set VERBOSE for more")
            return super().forward(x)

    model = Picky(2, 2)
    assert check_precision(model, torch.zeros(1, 2), "float32") == ""
    told = r"precision = 'bfloat16': PyTorch cannot compute this model in it on this machine's cpu \(no such kernel\);"
    with pytest.raises(ConfigError, match=told):
        check_precision(model, torch.zeros(1, 2), "bfloat16")
    assert model.training


@pytest.mark.parametrize(("there", "warned"), [(True, False), (None, False), (False, True)])
def test_a_cpu_without_the_instructions_is_warned_of(
    there: bool | None, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda: there)
    assert bool(check_precision(linear(), torch.zeros(1, 2), "bfloat16")) == warned
    assert check_precision(linear(), torch.zeros(1, 2), "float32") == ""


@pytest.mark.parametrize(
    ("text", "there"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 amx_tile\n", True),
        ("Features\t: fp asimd bf16 sve\n", True),
        ("model name : bf16\nflags\t\t: fpu avx2 avx512f\n", False),
    ],
)
def test_instructions_are_read_from_the_flags(text: str, there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    has_bfloat16.cache_clear()
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
    assert has_bfloat16() is there
    has_bfloat16.cache_clear()


def moved(given: dict[str, object], **own: object) -> np.ndarray:
    one = client.LocalClient(
        Config(model="mlp", local_epochs=2, **own), 0, examples(32), 2, Context(1, 1, {}, RecordDict(), {})
    )
    start = [value.numpy().copy() for value in one._model.state_dict().values()]
    arrays, _, _ = one.fit(start, given)
    return np.concatenate([array.ravel() for array in arrays])


def test_a_message_says_how_strongly_to_draw_else_the_setting_does_and_explorers_are_free() -> None:
    plain, by_setting = moved({"server-round": 1}), moved({"server-round": 1}, proximal_mu=0.5)
    assert (plain != by_setting).any()
    assert (moved({"server-round": 1, "proximal-mu": 0.5}) == by_setting).all()
    assert (moved({"server-round": 1, "proximal-mu": 0.0}, proximal_mu=0.5) == plain).all()
    exploring = {PHASE_KEY: "explore", EPOCHS_KEY: 2, PATIENCE_KEY: 2, "server-round": 0}
    assert (moved({**exploring, "proximal-mu": 0.5}, proximal_mu=0.5) == moved(exploring)).all()


@pytest.mark.runs
def test_a_run_with_all_switches(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = {"output-dir": str(tmp_path), "num-server-rounds": 2, "exploration-epochs": 1, "local-epochs": 1}
    values |= {"model": "mlp", "precision": "bfloat16", "clip-norm": 1.0, "proximal-mu": 0.01}
    with caplog.at_level(logging.WARNING):
        path = server.run(LocalGrid(client.app, 2, values), Config.from_run_config(values))
    assert (path / "summary.json").exists()
    assert ("no instructions for it" in caplog.text) == (has_bfloat16() is False)
