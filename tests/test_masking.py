import copy
import doctest
import importlib
import pickle
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from autoflip_flwr.layout import Layout
from autoflip_flwr.mask import Mask
from autoflip_flwr.torch import apply_mask, masked_training

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.01, weight_decay=0.1, amsgrad=True),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01, momentum=0.9, centered=True, weight_decay=0.1),
}
each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())

X = torch.randn(16, 1, 6, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(16) % 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def mask_of(model: nn.Module, density: float = 0.4) -> Mask:
    layout = Layout.of({name: value.numpy() for name, value in model.state_dict().items()}, biases=True)
    keep = {s.name: np.arange(s.size).reshape(s.shape) % 5 < 5 * density for s in layout.prunable}
    return Mask.from_bool(layout, keep)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(X), Y).backward()
    optimizer.step()


def pruned(model: nn.Module, optimizer: torch.optim.Optimizer, mask: Mask) -> dict[str, list[torch.Tensor]]:
    """Of each masked parameter its pruned entries, then those of its gradient and of the optimizer's state."""
    found = {}
    for name, parameter in model.named_parameters():
        if name in mask.keep:
            state = [value for value in optimizer.state[parameter].values() if value.shape == parameter.shape]
            drop = torch.from_numpy(~mask.keep[name])
            found[name] = [values[drop] for values in (parameter.detach(), parameter.grad, *state)]
    return found


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(two) and all(torch.equal(value, two[name]) for name, value in one.items())


@each_optimizer
def test_pruned_weights_gradients_and_moments_are_zero_after_every_step(
    make: Callable[[nn.Module], torch.optim.Optimizer],
):
    model = network()
    mask, optimizer, before = mask_of(model), make(model), values(model)
    with masked_training(model, optimizer, mask):
        for _ in range(4):
            step(model, optimizer)
            found = pruned(model, optimizer, mask)
            assert set(found) == {"0.weight", "4.weight", "4.bias"}
            for tensors in found.values():
                assert len(tensors) >= 3
                assert not any(tensor.any() for tensor in tensors)
    for name, keep in mask.keep.items():
        moved = (model.state_dict()[name] != before[name]).numpy()
        assert moved[keep].mean() > 0.9


@each_optimizer
def test_moments_from_before_the_mask_are_dropped_with_their_weights(
    make: Callable[[nn.Module], torch.optim.Optimizer],
):
    model = network()
    mask, optimizer = mask_of(model), make(model)
    step(model, optimizer)
    assert all(tensor.any() for tensor in pruned(model, optimizer, mask)["4.weight"])
    with masked_training(model, optimizer, mask):
        step(model, optimizer)
        assert not any(tensor.any() for tensors in pruned(model, optimizer, mask).values() for tensor in tensors)


def test_a_step_that_evaluates_a_closure_keeps_them_at_zero_too():
    model = network()
    mask, optimizer = mask_of(model), OPTIMIZERS["sgd"](model)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    with masked_training(model, optimizer, mask):
        optimizer.step(closure)
        assert not any(tensor.any() for tensors in pruned(model, optimizer, mask).values() for tensor in tensors)


def test_what_is_added_to_gradients_by_hand_is_dropped_too():
    model = network()
    mask, optimizer = mask_of(model), OPTIMIZERS["sgd"](model)
    with masked_training(model, optimizer, mask):
        nn.functional.cross_entropy(model(X), Y).backward()
        for parameter in model.parameters():
            parameter.grad += 1
        optimizer.step()
        assert not any(tensor.any() for tensors in pruned(model, optimizer, mask).values() for tensor in tensors)


def test_two_steps_of_sgd_with_momentum_and_decay_by_hand():
    model = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
    mask = Mask.from_bool(Layout.of({"weight": model.weight.detach().numpy()}), {"weight": np.array([[True, False]])})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    seen = []
    with masked_training(model, optimizer, mask):
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(1, 2, dtype=torch.float64)).sum().backward()
            optimizer.step()
            seen.append(model.weight[0].tolist())
    # gradients 1.1 and 1.089, momentum 1.1 and 0.9 * 1.1 + 1.089
    assert [weight[0] for weight in seen] == pytest.approx([0.89, 0.6821])
    assert [weight[1] for weight in seen] == [0, 0]


@pytest.mark.parametrize("clip", [False, True], ids=["plain", "gradients clipped"])
def test_what_is_kept_trains_as_in_the_smaller_model(clip: bool):
    big, small = nn.Linear(4, 2, dtype=torch.float64), nn.Linear(2, 2, dtype=torch.float64)
    small.load_state_dict({"weight": big.weight[:, [0, 2]], "bias": big.bias})
    keep = np.array([[True, False, True, False]] * 2)
    mask = Mask.from_bool(Layout.of({n: v.numpy() for n, v in big.state_dict().items()}), {"weight": keep})
    x = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for model, inputs, given in ((big, x, mask), (small, x[:, [0, 2]], None)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
        with masked_training(model, optimizer, given):
            for _ in range(5):
                optimizer.zero_grad()
                model(inputs).pow(2).sum().backward()
                if clip:
                    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
    torch.testing.assert_close(big.weight[:, [0, 2]], small.weight, rtol=1e-12, atol=0)
    torch.testing.assert_close(big.bias, small.bias, rtol=1e-12, atol=0)


def test_the_model_is_in_the_subspace_from_the_start():
    model = network()
    mask = mask_of(model)
    with masked_training(model, OPTIMIZERS["sgd"](model), mask):
        for name, keep in mask.keep.items():
            assert not model.state_dict()[name].numpy()[~keep].any()


def test_nothing_is_added_to_the_state_dict():
    model = network()
    names, parameters = list(model.state_dict()), [name for name, _ in model.named_parameters()]
    optimizer = OPTIMIZERS["adam"](model)
    with masked_training(model, optimizer, mask_of(model)):
        step(model, optimizer)
        assert list(model.state_dict()) == names
        assert [name for name, _ in model.named_parameters()] == parameters
        assert list(optimizer.state_dict()) == ["state", "param_groups"]
    assert list(model.state_dict()) == names


def test_deepcopy_and_pickle_work_inside_and_the_copy_is_free():
    model = network()
    mask, optimizer = mask_of(model), OPTIMIZERS["adam"](model)
    with masked_training(model, optimizer, mask):
        step(model, optimizer)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert same(values(twin), values(model))
            step(twin, torch.optim.SGD(twin.parameters(), lr=0.1))
            assert twin.get_parameter("4.weight").detach().numpy()[~mask.keep["4.weight"]].any()
        assert copy.deepcopy(optimizer).state_dict().keys() == optimizer.state_dict().keys()
        step(model, optimizer)
        assert not any(tensor.any() for tensors in pruned(model, optimizer, mask).values() for tensor in tensors)


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_the_hooks_are_gone_afterwards_even_where_training_fails(error: type[Exception] | None):
    model = network()
    mask, optimizer = mask_of(model), torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(error) if error else nullcontext(), masked_training(model, optimizer, mask):
        step(model, optimizer)
        if error:
            raise error
    step(model, optimizer)
    for tensors in pruned(model, optimizer, mask).values():
        assert all(tensor.any() for tensor in tensors)


@each_optimizer
def test_no_mask_and_a_full_mask_train_dense_bit_for_bit(make: Callable[[nn.Module], torch.optim.Optimizer]):
    results = []
    for context in (
        lambda model, optimizer: nullcontext(),
        lambda model, optimizer: masked_training(model, optimizer, None),
        lambda model, optimizer: masked_training(model, optimizer, Mask.full(mask_of(model).layout)),
    ):
        model = network()
        optimizer = make(model)
        with context(model, optimizer):
            for _ in range(3):
                step(model, optimizer)
        results.append(values(model))
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_apply_mask_zeroes_the_pruned_parameters_and_only_those():
    model = network()
    mask, before = mask_of(model), values(model)
    apply_mask(model, mask)
    expected = mask.apply({name: value.numpy() for name, value in before.items()})
    assert same(values(model), {name: torch.from_numpy(array) for name, array in expected.items()})
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("density", [0.4, 1.0], ids=["pruned", "all kept"])
def test_a_parameter_of_another_shape_is_refused_by_name_before_anything_is_changed(density: float):
    mask, model = mask_of(network(), density), network()
    model[4] = nn.Linear(64, 5)
    before = values(model)
    with pytest.raises(ValueError, match=r"parameter '4\.weight' has shape \(5, 64\), the mask \(3, 64\)"):
        apply_mask(model, mask)
    with (
        pytest.raises(ValueError, match=r"parameter '4\.weight'"),
        masked_training(model, OPTIMIZERS["sgd"](model), mask),
    ):
        pytest.fail("trained under a mask that does not fit")
    assert same(values(model), before)


@pytest.mark.parametrize("name", ["autoflip_flwr.mask", "autoflip_flwr.torch.masking"])
def test_the_examples_in_the_docstrings_work(name: str):
    result = doctest.testmod(importlib.import_module(name))
    assert (result.failed, result.attempted > 3) == (0, True)


def test_tied_weights_are_masked_under_either_name():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2, bias=False), "b": torch.nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    arrays = {name: np.ones((2, 2), np.float32) for name in model.state_dict()}
    keep = {"a.weight": np.ones((2, 2), bool), "b.weight": np.array([[True, False], [True, True]])}
    apply_mask(model, Mask.from_bool(Layout.of(arrays), keep))
    assert model["a"].weight[0, 1] == 0
    assert np.count_nonzero(model["a"].weight.detach().numpy()) == 3


def test_a_mask_of_another_model_is_refused():
    mask = Mask.full(Layout.of({"module.weight": np.ones((2, 2), np.float32)}))
    with pytest.raises(ValueError, match="the model has no"):
        apply_mask(torch.nn.Linear(2, 2), mask)
