"""Augmentation: in training alone, with the generator's numbers alone, and what each choice does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autoflip_flwr.core.choices import AUGMENTS
from autoflip_flwr.experiment.augment import augmented, centred
from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.data.load import load, load_for
from autoflip_flwr.experiment.examples import examples_to_test, examples_to_train


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 200, size: int = 8) -> torch.Tensor:
    """Every pixel says where it is."""
    places = torch.arange(size * size, dtype=torch.uint8).reshape(1, size, size, 1)
    return places.repeat(count, 1, 1, 1)


def test_the_middle():
    assert centred(images(1, 8), (4, 4))[0, :, :, 0].tolist() == [
        [8 * row + col for col in range(2, 6)] for row in range(2, 6)
    ]


def test_flips_are_one_in_two():
    found = augmented(images(), (8, 8), "flip", drawn())
    flipped = (found == images().flip(2)).flatten(1).all(1)
    kept = (found == images()).flatten(1).all(1)
    assert (flipped ^ kept).all()
    assert 70 < int(flipped.sum()) < 130


def test_crops_come_from_everywhere_and_are_whole():
    found = augmented(images(2000), (5, 6), "crop", drawn())[..., 0]
    corners = found[:, 0, 0].long()
    assert sorted(set(corners.tolist())) == [8 * row + col for row in range(4) for col in range(3)]
    expected = corners[:, None, None] + 8 * torch.arange(5)[:, None] + torch.arange(6)
    assert torch.equal(found.long(), expected)


def test_crops_of_the_whole_size_are_padded_with_black():
    raw = images(500) + 1
    found = augmented(raw, (8, 8), "crop", drawn())
    assert found.shape == raw.shape
    assert (found == 0).any()
    assert len({bytes(image.numpy()) for image in found}) > 60  # of 81 places


def test_jitter_changes_brightness_and_contrast_within_the_range():
    raw = torch.full((300, 4, 4, 3), 100, dtype=torch.uint8)
    raw[:, :2] = 140
    found = augmented(raw, (4, 4), "crop-flip-jitter", drawn())
    assert found.dtype == torch.float32
    assert 0 <= float(found.min()) <= float(found.max()) <= 255
    grey = augmented(torch.full((300, 4, 4, 1), 100, dtype=torch.uint8), (2, 2), "crop-flip-jitter", drawn())
    assert 50 <= float(grey.min()) < 60
    assert 140 < float(grey.max()) <= 150
    assert (grey.flatten(1).std(1) < 1e-4).all()


@pytest.mark.parametrize("how", AUGMENTS[1:])
def test_the_generator_decides(how: str):
    raw = images() + 1
    one, same, other = (augmented(raw, (8, 8), how, drawn(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_only_training_is_augmented(data_dir: str):
    data = load_for(Config(dataset="cifar10", data_dir=data_dir, input_size=24, augment="crop-flip-jitter"))
    plain = load("cifar10", data_dir)
    rows = torch.arange(6)
    for examples, whole in ((examples_to_train(data), plain.x_train), (examples_to_test(data), plain.x_test)):
        x, _ = examples.batch(rows)
        middle = np.array(whole[:6, 4:28, 4:28]).transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
        mean, std = (np.array(each, np.float32)[:, None, None] for each in (data.inputs.mean, data.inputs.std))
        assert np.array_equal(x.numpy(), (middle - mean) / std)
        assert x.is_contiguous()
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    random, _ = examples_to_train(data).batch(rows, generator=drawn())
    assert random.shape == (6, 3, 24, 24)
    assert not torch.equal(random, examples_to_train(data).batch(rows)[0])
    assert torch.equal(before, torch.random.get_rng_state())


def test_plain_batches_draw_nothing():
    generator = drawn()
    before = generator.get_state()
    examples_to_train(load("digits")).batch(torch.arange(3), generator=generator)
    assert torch.equal(generator.get_state(), before)
