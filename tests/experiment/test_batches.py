"""A batch of one example in front of batch normalisation, in the app's training and in the examples' loaders."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.data.dataset import Inputs
from autoflip_flwr.experiment.examples import Examples, Shared
from autoflip_flwr.experiment.training import batches, train

EXAMPLES = Path(__file__).parents[2] / "examples"


def sizes(count: int, size: int, *, single: bool) -> list[int]:
    return [len(rows) for rows in batches(torch.arange(count), size, single=single)]


def test_a_last_batch_of_one_joins_the_one_before_it():
    assert sizes(9, 4, single=False) == [4, 5]
    assert sizes(9, 4, single=True) == [4, 4, 1]
    assert sizes(10, 4, single=False) == [4, 4, 2]
    assert sizes(5, 4, single=False) == [5]
    assert sizes(1, 4, single=False) == [1]


@given(count=st.integers(1, 60), size=st.integers(2, 20), single=st.booleans())
def test_every_example_comes_once_and_batches_are_otherwise_as_they_were(count: int, size: int, single: bool):
    order = torch.randperm(count)
    parts, plain = batches(order, size, single=single), order.split(size)
    assert torch.cat(parts).tolist() == order.tolist()
    if single or count % size != 1 or count == 1:
        assert [part.tolist() for part in parts] == [part.tolist() for part in plain]
    else:
        assert len(parts[-1]) == size + 1


def trained(model: nn.Module, count: int, batch_size: int) -> nn.Module:
    x = torch.randn(count, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    plain = {"patience": None, "lr": 0.1, "weight_decay": 0.0, "mask": None, "seed": 1}
    y = np.arange(count, dtype=np.int64) % 2
    examples = Examples(Shared(x.numpy(), y), Inputs("signal", (1, 2, 2)))
    done = train(model, examples, Config(batch_size=batch_size), epochs=2, **plain)
    assert (done.epochs, done.examples) == (2, 2 * count)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    return model


def normalised() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))


def test_a_node_whose_last_batch_is_one_example_trains_through_batch_normalisation():
    model = trained(normalised(), 5, 2)
    assert model[2].num_batches_tracked == 4  # two batches an epoch, of two and three


def test_a_node_with_one_example_trains_on_the_running_statistics_and_leaves_them():
    model = trained(normalised(), 1, 2)
    assert model[2].num_batches_tracked == 0
    assert model[2].running_mean.tolist() == [0, 0, 0]
    assert model[2].running_var.tolist() == [1, 1, 1]
    assert (model[4].weight != normalised()[4].weight).any()


@pytest.mark.parametrize("example", ["pytorch/digits_pytorch", "pytorch-numpyclient/digits_numpyclient"])
def test_the_examples_loaders_have_no_batch_of_one(example: str, monkeypatch: pytest.MonkeyPatch):
    project, package = example.split("/")
    monkeypatch.syspath_prepend(EXAMPLES / project)
    task = importlib.import_module(f"{package}.task")
    found = []
    for node in range(4):
        loaders = task.load_partition(node, 4)
        loader = loaders[0] if isinstance(loaders, tuple) else loaders
        count, last = len(loader.dataset), [len(labels) for _, labels in loader][-1]
        assert last == (count % 32 if count % 32 > 1 else 32)
        found.append(count)
    if project == "pytorch":
        assert found == [273, 225, 361, 288]  # the second one would end with a batch of one
