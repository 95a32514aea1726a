"""Models that change after the mask has been put in force: parameters replaced, blocks nested, models that compare."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from threads import errors_in_threads
from torch import nn

from autoflip_flwr import Layout, Mask
from autoflip_flwr.torch import masked_training

START = [[1.0, 2.0], [3.0, 4.0]]
KEEP = {"left": [[True, False], [True, False]], "right": [[False, True], [False, True]]}
LEFT, RIGHT, DENSE = [[0.5, 0], [2.5, 0]], [[0, 1.5], [0, 3.5]], [[0.5, 1.5], [2.5, 3.5]]
"""The weight after one step from ``START``."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor(START))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def mask(side: str = "left") -> Mask:
    layout = Layout.of({"layer.weight": np.zeros((2, 2), np.float32)})
    return Mask.from_bool(layout, {"layer.weight": np.array(KEEP[side])})


def step(model: Net, optimizer: torch.optim.Optimizer | None = None) -> list[list[float]]:
    """The weight after a step, from ``START``, in which each kept entry loses a half."""
    with torch.no_grad():
        model.layer.weight.copy_(torch.tensor(START))
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.5)
    optimizer.zero_grad()
    model(torch.ones(1, 2, dtype=model.layer.weight.dtype)).sum().backward()
    optimizer.step()
    return model.layer.weight.tolist()


# Parameters that are replaced


def tied(model: Net) -> None:
    model.other = nn.Linear(2, 2, bias=False)
    model.layer.weight = model.other.weight


def converted(flag: str) -> Callable[[Net], object]:
    def convert(model: Net) -> None:
        setter, getter = (
            getattr(torch.__future__, f"{do}_{flag}_module_params_on_conversion") for do in ("set", "get")
        )
        before = getter()
        setter(True)
        try:
            model.double()
        finally:
            setter(before)

    return convert


REPLACED: dict[str, Callable[[Net], object]] = {
    "load_state_dict": lambda model: model.load_state_dict({"layer.weight": torch.ones(2, 2)}, assign=True),
    "a parameter": lambda model: setattr(model.layer, "weight", nn.Parameter(torch.ones(2, 2))),
    "a module": lambda model: setattr(model, "layer", nn.Linear(2, 2, bias=False)),
    "tied weights": tied,
    "swapped": lambda model: torch.utils.swap_tensors(model.layer.weight, nn.Parameter(torch.ones(2, 2))),
    "converted, overwritten": converted("overwrite"),
    "converted, swapped": converted("swap"),
    "converted": lambda model: model.double(),
    "wrapped within": lambda model: setattr(model, "layer", nn.DataParallel(model.layer)),
}
each_way = pytest.mark.parametrize("replace", REPLACED.values(), ids=REPLACED.keys())


def weight(model: Net) -> nn.Parameter:
    return next(p for name, p in model.named_parameters() if name.startswith("layer."))


def steps(model: Net, optimizer: torch.optim.Optimizer, count: int = 3) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.ones(1, 2, dtype=weight(model).dtype)).sum().backward()
        optimizer.step()


@each_way
@pytest.mark.parametrize("before", [0, 1], ids=["at once", "after a step"])
def test_parameters_that_were_replaced_train_under_the_mask(replace: Callable[[Net], object], before: int):
    model = Net()
    masked_training(model, mask())
    steps(model, torch.optim.SGD(model.parameters(), lr=0.5), before)
    replace(model)
    with torch.no_grad():
        weight(model).copy_(torch.tensor(START))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
    steps(model, optimizer)
    assert (weight(model) == 0).tolist() == [[False, True], [False, True]]
    weight(model).grad = None
    model(torch.ones(1, 2, dtype=weight(model).dtype)).sum().backward()
    assert weight(model).grad.tolist() == [[1, 0], [1, 0]]  # masked as soon as they are there
    assert optimizer.state[weight(model)]["momentum_buffer"][:, 1].tolist() == [0, 0]


@each_way
def test_replaced_parameters_may_be_replaced_again(replace: Callable[[Net], object]):
    model = Net()
    masked_training(model, mask())
    for _ in range(2):
        replace(model)
        steps(model, torch.optim.SGD(model.parameters(), lr=0.3))
        assert (weight(model)[:, 1] == 0).all()
        assert (weight(model)[:, 0] != 0).all()


def test_parameters_are_found_again_by_a_map_of_names():
    for names in ({"w": "layer.weight"}, "the parameter"):
        model = Net()
        layout = Layout.of({"w": np.zeros((2, 2), np.float32)})
        given = {"w": model.layer.weight} if isinstance(names, str) else names
        masked_training(model, Mask.from_bool(layout, {"w": np.array(KEEP["left"])}), names=given)
        model.layer.weight = nn.Parameter(torch.ones(2, 2))
        assert step(model) == LEFT


def test_the_parameters_of_a_wrapped_model_are_found_again_after_the_wrapper_has_gone():
    model = Net()
    masked_training(nn.DataParallel(model), mask())
    gc.collect()
    model.layer.weight = nn.Parameter(torch.ones(2, 2))
    assert step(model) == LEFT


@pytest.mark.parametrize(
    ("replace", "text"),
    [
        (lambda model: setattr(model, "layer", nn.Linear(2, 3, bias=False)), r"'layer.weight' has shape \(3, 2\)"),
        (
            lambda model: model._modules.update(layer2=model._modules.pop("layer")),
            r"the model has no \['layer.weight'\]",
        ),
    ],
    ids=["another shape", "another name"],
)
def test_a_replacement_that_does_not_fit_is_refused_at_the_next_step(replace: Callable[[Net], object], text: str):
    model = Net()
    masked_training(model, mask())
    replace(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"replaced after masked_training no longer fit: .*{text}"):
            optimizer.step()
    masked_training(model, None)
    optimizer.step()


def test_an_optimizer_of_another_model_does_not_mind_a_replacement_that_does_not_fit():
    broken, model = Net(), Net()
    masked_training(broken, mask())
    masked_training(model, mask("right"))
    broken.layer = nn.Linear(2, 3, bias=False)
    assert step(model) == RIGHT


def test_threads_may_replace_the_parameters_of_models_of_their_own():
    def work() -> None:
        for _ in range(15):
            model = Net()
            masked_training(model, mask())
            for _ in range(3):
                model.load_state_dict({"layer.weight": torch.ones(2, 2)}, assign=True)
                assert step(model) == LEFT
                model.register_parameter("more", nn.Parameter(torch.ones(1)))
                del model.more

    assert errors_in_threads(work) == []


# Blocks within blocks


def test_after_a_block_the_mask_from_before_is_in_force():
    model = Net()
    with masked_training(model, mask("left")):
        with masked_training(model, mask("right")):
            assert step(model) == RIGHT
            with masked_training(model, None):
                assert step(model) == DENSE
            assert step(model) == RIGHT
        assert step(model) == LEFT
    assert step(model) == DENSE


def test_after_a_block_that_fails_too():
    model = Net()
    masked_training(model, mask("left"))
    with pytest.raises(RuntimeError), masked_training(model, mask("right")):
        raise RuntimeError
    assert model.layer.weight.tolist() == [[0, 0], [0, 0]]  # it was in either subspace
    assert step(model) == LEFT


def test_moments_of_the_inner_block_are_dropped():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=1.0)
    with masked_training(model, mask("left")):
        with masked_training(model, mask("right")):
            step(model, optimizer)
        step(model, optimizer)
    assert optimizer.state[model.layer.weight]["momentum_buffer"].tolist() == [[1, 0], [1, 0]]


def test_a_call_takes_the_place_of_all_that_were_before():
    model = Net()
    with masked_training(model, mask("left")):
        masked_training(model, mask("right"))
        assert step(model) == RIGHT
    assert step(model) == RIGHT  # the block ended before, and the call holds until the next one
    masked_training(model, None)
    assert step(model) == DENSE


def test_what_is_removed_does_not_come_back():
    model = Net()
    outer = masked_training(model, mask("left"))
    with masked_training(model, mask("right")) as inner:
        inner.remove()
        assert step(model) == DENSE
        outer.remove()
    assert step(model) == DENSE


def test_blocks_may_end_in_another_order():
    model = Net()
    outer, inner = ExitStack(), ExitStack()
    outer.enter_context(masked_training(model, mask("left")))
    inner.enter_context(masked_training(model, mask("right")))
    outer.close()
    assert step(model) == RIGHT
    inner.close()
    assert step(model) == DENSE


def test_a_block_may_outlive_its_model():
    model = Net()
    with masked_training(model, mask("left")), masked_training(model, mask("right")), masked_training(model, None):
        del model
        gc.collect()
    assert step(Net()) == DENSE


def test_calls_do_not_pile_up():
    model, masks = Net(), []
    for side in ("left", "right", "left"):
        one = mask(side)
        masked_training(model, one)
        masks.append(weakref.ref(one))
        del one
    gc.collect()
    assert [reference() is None for reference in masks] == [True, True, False]


# Parameters in place of a model


def test_parameters_hold_as_a_model_does():
    model, other = Net(), Net()
    given = {"layer.weight": model.layer.weight}
    masked_training(given, mask("left"))
    masked_training({"layer.weight": other.layer.weight}, mask("right"))
    assert (step(model), step(other)) == (LEFT, RIGHT)
    with masked_training(given, mask("right")):
        assert step(model) == RIGHT
    assert step(model) == LEFT
    masked_training(given, None)
    assert (step(model), step(other)) == (DENSE, RIGHT)


def test_parameters_are_not_kept_alive():
    model = Net()
    masked_training({"layer.weight": model.layer.weight}, mask())
    assert step(model) == LEFT
    gone = weakref.ref(model.layer.weight)
    del model
    gc.collect()
    assert gone() is None


# Models that compare as they like


class Equal(Net):
    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 1


class Unhashable(Net):
    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not to be compared")


@pytest.mark.parametrize("kind", [Equal, Unhashable])
def test_models_are_told_apart_by_what_they_are(kind: type[Net]):
    one, two = kind(), kind()
    masked_training(one, mask("left"))
    masked_training(two, mask("right"))
    found = [step(model, torch.optim.SGD([model.layer.weight], lr=0.5)) for model in (one, two)]
    assert found == [LEFT, RIGHT]
    one.layer.weight = nn.Parameter(torch.ones(2, 2))
    assert step(one, torch.optim.SGD([one.layer.weight], lr=0.5)) == LEFT
    gone = weakref.ref(one)
    del one
    gc.collect()
    assert gone() is None
