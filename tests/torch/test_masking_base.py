"""PyTorch models that stand at a base outside the mask: whatever trains them, the pruned weights come back to it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from autoflip_flwr import Layout, Mask, Subspace
from autoflip_flwr.torch import apply_mask, masked_training

OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1),
    "Adam with weight decay": lambda parameters: torch.optim.Adam(parameters, lr=0.1, weight_decay=0.1),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.3),
    "LBFGS": lambda parameters: torch.optim.LBFGS(parameters, lr=0.1),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def arrays_of(model) -> dict[str, np.ndarray]:
    return {name: value.detach().clone().float().cpu().numpy() for name, value in model.state_dict().items()}


def subspace_of(arrays, base=None, seed=0) -> Subspace:
    layout, draw = Layout.of(arrays), np.random.default_rng(seed)
    mask = Mask.from_bool(layout, {spec.name: draw.random(spec.shape) < 0.5 for spec in layout.prunable})
    values = {name: np.array(arrays[name] if base is None else base[name]) for name in layout.prunable_names}
    for array in values.values():
        array.flags.writeable = False  # as the views of a message are
    return Subspace(mask, values)


def stands(model, subspace, exact=True):
    for name, array in arrays_of(model).items():
        if name in subspace.mask.keep:
            pruned = ~subspace.mask.keep[name]
            base = subspace.base[name][pruned]
            assert (array[pruned] == base).all() if exact else np.allclose(array[pruned], base, rtol=0.01)


def step(model, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(4, 6, dtype=next(model.parameters()).dtype)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_pruned_weights_come_back_after_every_step_and_kept_ones_train(make):
    model = network()
    before = arrays_of(model)
    subspace = subspace_of(before)
    optimizer = make(model.parameters())
    with masked_training(model, subspace):
        for _ in range(3):
            step(model, optimizer)
            stands(model, subspace)
    for name, keep in subspace.mask.keep.items():
        assert (arrays_of(model)[name][keep] != before[name][keep]).all()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_kept_ones_train_as_where_the_pruned_ones_are_no_parameters(make):
    model, alone = network(), network()
    subspace = subspace_of(arrays_of(model))
    kept = {name: torch.tensor(subspace.mask.keep[name]) for name in subspace.mask.keep}
    frozen = {name: torch.tensor(subspace.base[name]) for name in kept}
    free = {name: nn.Parameter(value.detach()[kept[name]]) for name, value in alone.named_parameters() if name in kept}
    others = {name: value for name, value in alone.named_parameters() if name not in kept}
    optimizers = make(model.parameters()), make([*free.values(), *others.values()])

    def whole(name):
        return frozen[name].masked_scatter(kept[name], free[name])

    def closure():
        optimizers[1].zero_grad()
        loss = torch.func.functional_call(alone, {name: whole(name) for name in kept} | others, torch.ones(4, 6))
        loss = loss.square().sum()
        loss.backward()
        return loss

    with masked_training(model, subspace):
        for _ in range(3):
            step(model, optimizers[0])
            optimizers[1].step(closure)
    for name in kept:
        torch.testing.assert_close(dict(model.named_parameters())[name], whole(name), rtol=1e-4, atol=1e-5)


def test_pruned_gradients_are_zero_before_anything_reads_them():
    model = network()
    subspace = subspace_of(arrays_of(model))
    masked_training(model, subspace)
    model(torch.ones(4, 6)).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name in subspace.mask.keep:
            pruned = torch.tensor(~subspace.mask.keep[name])
            assert not parameter.grad[pruned].any()
            assert parameter.grad[~pruned].any()


def test_it_is_set_at_once_and_for_weights_that_are_loaded_later():
    model, other = network(), network()
    base = {name: array + 1 for name, array in arrays_of(model).items()}
    subspace = subspace_of(arrays_of(model), base)
    masked_training(model, subspace)
    stands(model, subspace)
    model.load_state_dict(other.state_dict())
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer)
    stands(model, subspace)


def test_apply_mask_sets_it_in_place():
    model = network()
    base = {name: array + 1 for name, array in arrays_of(model).items()}
    before, subspace = arrays_of(model), subspace_of(arrays_of(model), base)
    apply_mask(model, subspace)
    stands(model, subspace)
    for name, keep in subspace.mask.keep.items():
        assert (arrays_of(model)[name][keep] == before[name][keep]).all()
    apply_mask(model, subspace.mask)  # a mask alone is zero outside
    assert not any(arrays_of(model)[name][~keep].any() for name, keep in subspace.mask.keep.items())


def test_parameters_that_are_replaced_are_found_again():
    model = network()
    subspace = subspace_of(arrays_of(model))
    masked_training(model, subspace)
    model.load_state_dict({name: value.clone() + 1 for name, value in model.state_dict().items()}, assign=True)
    step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    stands(model, subspace)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_another_precision_and_back(dtype):
    model = network()
    subspace = subspace_of(arrays_of(model))
    with masked_training(model, subspace):
        model.to(dtype)
        step(model, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1))
        stands(model, subspace, exact=dtype == torch.float64)
        model.float()
        step(model, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1))
        stands(model, subspace)


def test_tied_weights_stand_at_the_base_of_what_either_name_prunes():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
            self.second.weight = self.first.weight

        def forward(self, values):
            return self.second(self.first(values))

    model = Tied()
    arrays = arrays_of(model)
    subspace = subspace_of(arrays)
    with masked_training(model, subspace):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.ones(2, 5)).sum().backward()
        optimizer.step()
    pruned = ~subspace.mask.keep["first.weight"] | ~subspace.mask.keep["second.weight"]
    assert (model.first.weight.detach().numpy() == arrays["first.weight"])[pruned].all()
    assert (model.first.weight.detach().numpy() != arrays["first.weight"])[~pruned].all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_models_that_move():
    model = network()
    subspace = subspace_of(arrays_of(model))
    with masked_training(model, subspace):
        model.cuda()
        optimizer = torch.optim.Adam(model.parameters())
        optimizer.zero_grad()
        model(torch.ones(4, 6).cuda()).sum().backward()
        optimizer.step()
        stands(model, subspace)


def test_parameters_without_a_model_and_a_copy_that_is_free():
    model = network()
    subspace = subspace_of(arrays_of(model))
    masked_training(dict(model.named_parameters()), subspace)
    free = copy.deepcopy(model)
    for each in (model, free):
        step(each, torch.optim.SGD(each.parameters(), lr=0.1, weight_decay=0.5))
    stands(model, subspace)
    with pytest.raises(AssertionError):
        stands(free, subspace)
