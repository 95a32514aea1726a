import math
import pickle

import pytest
import torch
from torch import nn

from autoflip_flwr.core.choices import MODELS
from autoflip_flwr.experiment.config import ConfigError
from autoflip_flwr.experiment.models import build, flops_per_example

DIGITS, MNIST, CIFAR = (1, 8, 8), (1, 28, 28), (3, 32, 32)


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("model", "shape", "parameters"),
    [
        ("cnn", DIGITS, 43_626),
        ("cnn", MNIST, 421_642),
        ("cnn", CIFAR, 545_098),
        ("twocnn", DIGITS, 1_663_370),
        ("twocnn", MNIST, 1_663_370),
        ("twocnn", (1, 24, 24), 1_663_370),
        ("twocnn", CIFAR, 1_664_970),
        ("resnet18", DIGITS, 11_172_810),
        ("resnet18", CIFAR, 11_173_962),
    ],
)
def test_parameter_counts(model: str, shape: tuple[int, int, int], parameters: int) -> None:
    assert size(build(model, shape, 10, 0)) == parameters


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("shape", [DIGITS, MNIST, CIFAR])
def test_every_model_takes_every_input(model: str, shape: tuple[int, int, int]) -> None:
    net = build(model, shape, 7, 0)
    assert net.training
    logits = net.eval()(torch.zeros(2, *shape))
    assert logits.shape == (2, 7)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("model", ["cnn", "twocnn", "resnet18"])
def test_seed_alone_decides_the_parameters_and_nothing_else(model: str) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build(model, MNIST, 10, 3).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    second = build(model, MNIST, 10, 3).state_dict()
    other = build(model, MNIST, 10, 4).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    convolutions = [name for name, value in first.items() if value.ndim == 4]
    assert convolutions
    assert not any(torch.equal(first[name], other[name]) for name in convolutions)


def test_accelerators_are_not_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "manual_seed", lambda _: pytest.fail("reseeds every device"))
    build("cnn", DIGITS, 10, 3)


def test_twocnn_layers_and_initialisation() -> None:
    net = build("twocnn", CIFAR, 10, 0)
    kinds = [type(layer).__name__ for layer in net.children()]
    stage = ["Conv2d", "ReLU", "MaxPool2d"]
    assert kinds == [*stage, *stage, "AdaptiveAvgPool2d", "Flatten", "Linear", "ReLU", "Linear"]
    shapes = [tuple(p.shape) for p in net.parameters() if p.ndim > 1]
    assert shapes == [(32, 3, 5, 5), (64, 32, 5, 5), (512, 3136), (10, 512)]
    # 32 -> conv 30 -> pool 16 -> conv 14 -> pool 8.
    assert net[:6](torch.zeros(1, *CIFAR)).shape == (1, 64, 8, 8)
    for p in net.parameters():
        if p.ndim == 1:
            assert not p.any()
            continue
        field = p[0, 0].numel()
        bound = math.sqrt(6 / ((p.shape[0] + p.shape[1]) * field))
        assert p.abs().max() <= bound
        assert p.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_cnn_has_no_normalisation() -> None:
    kinds = {type(layer) for layer in build("cnn", CIFAR, 10, 0).modules()}
    assert kinds == {nn.Sequential, nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.Flatten, nn.Linear}


def test_resnets_have_the_cifar_stem_and_their_norm() -> None:
    for name, norm in (("resnet18", nn.BatchNorm2d), ("resnet18-gn", nn.GroupNorm)):
        net = build(name, CIFAR, 10, 0)
        norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)]
        assert len(norms) == 20
        assert all(isinstance(m, norm) for m in norms)
        stem, pool = net.get_submodule("conv1"), net.get_submodule("maxpool")
        assert (stem.kernel_size, stem.stride, stem.padding) == ((3, 3), (1, 1), (1, 1))
        assert isinstance(pool, nn.Identity)
        assert size(pickle.loads(pickle.dumps(net))) == 11_173_962
    assert {m.num_groups for m in norms} == {32}
    assert not list(net.buffers())


def test_unknown_model() -> None:
    with pytest.raises(ConfigError, match="model = 'vgg': must be one of cnn, twocnn, resnet18, resnet18-gn"):
        build("vgg", MNIST, 10, 0)


def test_flops_by_hand() -> None:
    conv1, conv2 = 2 * 64 * 16 * 9, 2 * 16 * 64 * 9 * 16
    linear1, linear2 = 2 * 256 * 128, 2 * 128 * 10
    # Backward costs twice the forward, except at the first layer, whose input needs no gradient.
    expected = 2 * conv1 + 3 * (conv2 + linear1 + linear2)
    assert flops_per_example(build("cnn", DIGITS, 10, 0), DIGITS) == expected == 1_125_888


@pytest.mark.parametrize(("model", "flops"), [("twocnn", 78_515_712), ("resnet18-gn", 3_328_997_376)])
def test_flops_of_cifar_models(model: str, flops: int) -> None:
    assert flops_per_example(build(model, CIFAR, 10, 0), CIFAR) == flops


def test_flops_leave_the_model_alone() -> None:
    net = build("resnet18", DIGITS, 10, 0)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    expected = flops_per_example(net, DIGITS)
    assert net.training
    assert all(p.grad is None and p.device.type == "cpu" for p in net.parameters())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    net.requires_grad_(False)
    assert flops_per_example(net, DIGITS) == expected
    assert not any(p.requires_grad for p in net.parameters())
