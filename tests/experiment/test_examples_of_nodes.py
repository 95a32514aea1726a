"""Batches of examples: the same bits as normalising whole arrays, without a copy of the data for each node."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autoflip_flwr.experiment.data.dataset import Data, Inputs
from autoflip_flwr.experiment.data.load import load
from autoflip_flwr.experiment.examples import Examples, Shared, examples_to_test, examples_to_train


def normalised(data: Data, x: np.ndarray) -> np.ndarray:
    out = np.array(x.transpose(0, 3, 1, 2), dtype=np.float32, order="C")
    out /= np.float32(255)
    out -= np.asarray(data.inputs.mean, np.float32)[:, None, None]
    out /= np.asarray(data.inputs.std, np.float32)[:, None, None]
    return out


@pytest.mark.parametrize("dataset", ["digits", "mnist", "cifar10"])
def test_batches_have_the_bits_of_whole_normalised_arrays(dataset: str, data_dir: str):
    data = load(dataset, data_dir)
    rng = np.random.default_rng(0)
    mine = np.sort(rng.choice(len(data.y_train), 300, replace=False))
    whole = torch.from_numpy(normalised(data, data.x_train[mine]))
    examples = examples_to_train(data, mine)
    assert len(examples) == 300
    assert examples.labels.tolist() == data.y_train[mine].tolist()
    for rows in torch.from_numpy(rng.permutation(300)).split(77):
        x, y = examples.batch(rows)
        assert torch.equal(x, whole[rows])
        assert x.is_contiguous()
        assert x.shape[1:] == data.input_shape
        assert y.tolist() == data.y_train[mine[rows]].tolist()
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    test, labels = examples_to_test(data).batch(torch.arange(5))
    assert torch.equal(test, torch.from_numpy(normalised(data, data.x_test[:5])))
    assert labels.tolist() == data.y_test[:5].tolist()


def test_a_batch_is_what_torchvision_makes(data_dir: str):
    from torchvision.transforms import Compose, Normalize, ToTensor

    data = load("cifar10", data_dir)
    transform = Compose([ToTensor(), Normalize(data.inputs.mean, data.inputs.std)])
    batch, _ = examples_to_train(data).batch(torch.arange(40, 44))
    assert torch.equal(batch, torch.stack([transform(image) for image in np.array(data.x_train[40:44])]))


def test_a_batch_may_be_empty():
    x, y = examples_to_train(load("digits")).batch(torch.arange(0))
    assert (x.shape, y.shape) == ((0, 1, 8, 8), (0,))


def test_nodes_share_the_arrays(data_dir: str):
    data = load("cifar10", data_dir)
    one, two = (examples_to_train(data, np.array([i, i + 1])) for i in range(2))
    there = data.x_train.ctypes.data  # the mapped file itself
    assert one._x.data_ptr() == two._x.data_ptr() == examples_to_train(data)._x.data_ptr() == there
    assert one.to(torch.device("cpu")) is one


def test_a_second_device_gets_the_arrays_once():
    data = load("digits")
    device = torch.device("meta")
    one, two = (examples_to_train(data, np.array([i])).to(device) for i in range(2))
    assert one._x is two._x
    x, y = one.batch(torch.tensor([0]))
    assert (x.device, y.device, x.shape) == (device, device, (1, 1, 8, 8))


def test_signals_are_normalised_by_channel():
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    inputs = Inputs("signal", (3, 4), (1.0, 2.0, 3.0), (1.0, 2.0, 4.0))
    batch, y = Examples(Shared(x, np.array([0, 1])), inputs).batch(torch.tensor([1]))
    assert batch.tolist() == [[[11, 12, 13, 14], [7, 7.5, 8, 8.5], [4.25, 4.5, 4.75, 5]]]
    assert y.tolist() == [1]
    assert x.ravel().tolist() == list(range(24))


def test_text_becomes_integers():
    x = np.arange(6, dtype=np.uint8).reshape(2, 3)
    batch, _ = Examples(Shared(x, np.array([0, 1])), Inputs("text", (3,))).batch(torch.tensor([1, 0]))
    assert batch.dtype == torch.int64
    assert batch.tolist() == [[3, 4, 5], [0, 1, 2]]
