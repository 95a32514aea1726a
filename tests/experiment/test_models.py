import hashlib
import math
import pickle
import re

import pytest
import torch
from torch import nn

from autoflip_flwr.core.choices import MODEL_INPUTS, MODELS
from autoflip_flwr.experiment.models.build import _MAKERS, SMALL, build
from autoflip_flwr.experiment.models.flops import flops_per_example
from autoflip_flwr.experiment.rules import ConfigError

DIGITS, MNIST, CIFAR = (1, 8, 8), (1, 28, 28), (3, 32, 32)
TEXT, HAR = (80,), (9, 128)
FOR_IMAGES = [name for name, kinds in MODEL_INPUTS.items() if "image" in kinds]
LARGE = ("mobilenetv2", "efficientnet-b3")


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("model", "shape", "parameters"),
    [
        ("cnn", DIGITS, 43_626),
        ("cnn", MNIST, 421_642),
        ("cnn", CIFAR, 545_098),
        ("twocnn", DIGITS, 1_663_370),
        ("twocnn", (1, 24, 24), 1_663_370),
        ("resnet18", DIGITS, 11_172_810),
        ("resnet18", CIFAR, 11_173_962),
        ("resnet8-gn", MNIST, 308_074),
        ("resnet8-gn", CIFAR, 308_650),
        ("har-cnn", HAR, 274_822),
        ("mlp", MNIST, 199_210),
        ("lstm-128", TEXT, 80 * 8 + 512 * (8 + 128 + 2) + 80 * (128 + 1)),
    ],
)
def test_parameter_counts(model: str, shape: tuple[int, ...], parameters: int) -> None:
    classes = {HAR: 6, TEXT: 80}.get(shape, 10)
    assert size(build(model, shape, classes, 0)) == parameters


@pytest.mark.parametrize(
    ("model", "shape", "classes", "parameters"),
    [
        ("twocnn", MNIST, 10, 1_663_370),
        ("twocnn", CIFAR, 10, 1_664_970),
        ("twocnn-128", CIFAR, 100, 7_303_524),
        ("femnistcnn", MNIST, 62, 13_180_734),
        ("lstm", TEXT, 80, 819_920),
    ],
)
def test_published_parameter_counts(model: str, shape: tuple[int, ...], classes: int, parameters: int) -> None:
    """Those of the AutoFLIP paper."""
    assert size(build(model, shape, classes, 0)) == parameters


@pytest.mark.parametrize("shape", [DIGITS, MNIST, CIFAR])
@pytest.mark.parametrize("model", [name for name in FOR_IMAGES if name not in LARGE])
def test_models_for_images_take_every_size(model: str, shape: tuple[int, ...]) -> None:
    works(model, shape)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        ("lstm", TEXT),
        ("lstm", (1,)),
        ("lstm-128", (1,)),
        ("har-cnn", HAR),
        ("har-cnn", (1, 1)),
        ("mlp", HAR),
        ("mlp", TEXT),
    ],
)
def test_models_for_text_and_signals(model: str, shape: tuple[int, ...]) -> None:
    works(model, shape)


@pytest.mark.parametrize("model", LARGE)
def test_large_models_take_small_images(model: str) -> None:
    with torch.device("meta"):
        net = _MAKERS[model](CIFAR, 7)
    features = net.get_submodule("features")
    assert features(torch.empty(2, *CIFAR, device="meta")).shape[2:] == (2, 2)
    assert net(torch.empty(2, *CIFAR, device="meta")).shape == (2, 7)


def works(model: str, shape: tuple[int, ...]) -> None:
    """It gives finite logits in evaluation mode, but is in training mode after it has been built."""
    net = build(model, shape, 7, 0)
    assert net.training
    examples = torch.zeros(2, *shape, dtype=torch.int64 if len(shape) == 1 else torch.float32)
    logits = net.eval()(examples)
    assert logits.shape == (2, 7)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()


def test_every_model_has_a_maker() -> None:
    assert tuple(_MAKERS) == MODELS
    assert set(SMALL) <= set(MODELS)


@pytest.mark.parametrize(
    ("model", "shape", "digest"),
    [
        ("cnn", DIGITS, "7dd91e9a3618b23b"),
        ("cnn", CIFAR, "80a6ecc3be36adac"),
        ("twocnn", CIFAR, "a37282b3b2fd7a96"),
    ],
)
def test_a_seed_means_the_same_parameters_as_ever(model: str, shape: tuple[int, ...], digest: str) -> None:
    found = hashlib.sha256()
    for name, value in build(model, shape, 10, 3).state_dict().items():
        found.update(name.encode() + value.numpy().tobytes())
    assert found.hexdigest().startswith(digest)


@pytest.mark.parametrize("model", ["cnn", "twocnn", "resnet18", "resnet8-gn", "mlp", "har-cnn", "lstm", "lstm-128"])
def test_seed_alone_decides_the_parameters_and_nothing_else(model: str) -> None:
    shape = {"har-cnn": HAR, "lstm": TEXT, "lstm-128": TEXT}.get(model, MNIST)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build(model, shape, 10, 3).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    second = build(model, shape, 10, 3).state_dict()
    other = build(model, shape, 10, 4).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    weights = [name for name, value in first.items() if value.ndim > 1]
    assert weights
    assert not any(torch.equal(first[name], other[name]) for name in weights)


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
    with pytest.raises(ConfigError, match=f"model = 'vgg': must be one of {', '.join(MODELS)}, or your own"):
        build("vgg", MNIST, 10, 0)


def test_flops_by_hand() -> None:
    conv1, conv2 = 2 * 64 * 16 * 9, 2 * 16 * 64 * 9 * 16
    linear1, linear2 = 2 * 256 * 128, 2 * 128 * 10
    # Backward costs twice the forward, except at the first layer, whose input needs no gradient.
    expected = 2 * conv1 + 3 * (conv2 + linear1 + linear2)
    assert flops_per_example(build("cnn", DIGITS, 10, 0), DIGITS) == expected == 1_125_888


def test_flops_of_an_lstm_by_hand() -> None:
    length, classes = 3, 5
    steps = length * 2 * 1024 * ((8 + 256) + (256 + 256))
    # The first step's hidden state is no parameter: its gradient is not computed.
    expected = 3 * (steps + 2 * 256 * classes) - 2 * 2 * 1024 * 256
    assert flops_per_example(build("lstm", (length,), classes, 0), (length,)) == expected
    steps = length * 2 * 512 * (8 + 128)
    expected = 3 * (steps + 2 * 128 * classes) - 2 * 512 * 128
    assert flops_per_example(build("lstm-128", (length,), classes, 0), (length,)) == expected


def test_flops_of_signals_and_flat_inputs_by_hand() -> None:
    conv1, conv2 = 2 * 8 * 32 * 2 * 5, 2 * 4 * 64 * 32 * 5
    linear1, linear2 = 2 * 64 * 2 * 128, 2 * 128 * 3
    assert flops_per_example(build("har-cnn", (2, 8), 3, 0), (2, 8)) == 2 * conv1 + 3 * (conv2 + linear1 + linear2)
    for shape, inputs in (((1, 4, 4), 16), ((2, 8), 16), ((4,), 4 * 3)):
        expected = 2 * 2 * inputs * 200 + 3 * 2 * (200 * 200 + 200 * 3)
        assert flops_per_example(build("mlp", shape, 3, 0), shape) == expected


def test_features_without_an_order_are_a_signal_for_the_mlp_alone() -> None:
    net = build("mlp", (5,), 3, 0, kind="signal")
    assert net(torch.zeros(2, 5)).shape == (2, 3)
    assert flops_per_example(net, (5,), kind="signal") == 2 * 2 * 5 * 200 + 3 * 2 * (200 * 200 + 200 * 3)
    with pytest.raises(ConfigError, match=re.escape("not signal of shape (5,); models that do: mlp")):
        build("har-cnn", (5,), 3, 0, kind="signal")


@pytest.mark.parametrize(
    ("model", "shape", "told"),
    [
        ("lstm", CIFAR, "takes text (length,), not image of shape (3, 32, 32); models that do: cnn, twocnn, "),
        ("twocnn", HAR, "takes images (C, H, W), not signal of shape (9, 128); models that do: har-cnn, mlp"),
        ("har-cnn", TEXT, "takes signals (channels, length), not text of shape (80,); models that do: lstm, lstm-"),
    ],
)
def test_a_model_that_does_not_take_the_data_says_what_it_takes(model: str, shape: tuple[int, ...], told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"model = '{model}': {told}")):
        build(model, shape, 10, 0)


@pytest.mark.parametrize(
    ("model", "flops"), [("resnet8-gn", 292_953_600), ("twocnn", 78_515_712), ("resnet18-gn", 3_328_997_376)]
)
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
