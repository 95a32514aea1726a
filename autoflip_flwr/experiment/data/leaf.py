"""Data sets as LEAF writes them: json files with `users` and `user_data`, each user's `x` and `y`.

Source: S. Caldas et al., "LEAF: A Benchmark for Federated Settings", 2018.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.experiment.data.dataset import Arrays, Data
from autoflip_flwr.experiment.data.files import KNOWN, Found
from autoflip_flwr.experiment.data.images import image_data, known_images
from autoflip_flwr.experiment.data.reading import read_json
from autoflip_flwr.experiment.data.statistics import pixel_statistics
from autoflip_flwr.experiment.data.stored import stored
from autoflip_flwr.experiment.data.text import WINDOW, encode, text_data
from autoflip_flwr.experiment.rules import ConfigError

Pair = tuple[NDArray[Any], NDArray[Any]]


def femnist(found: Found) -> Data:
    """Return FEMNIST: 28x28 grey images of 62 digits and letters, by writer."""
    if found.form == "npy":
        return known_images("femnist", found)
    arrays = stored("femnist", found.files, partial(_images, found))
    return image_data("femnist", arrays, f"{found.folder}: ")


def leaf_shakespeare(found: Found) -> Data:
    """Return the windows that LEAF has sampled, by speaker."""
    arrays = stored("shakespeare", found.files, partial(_from_files, found.files, _windows_of))
    return text_data(arrays, f"{found.folder}: ")


def users_of(path: Path) -> Iterator[tuple[str, Sequence[Any], Sequence[Any]]]:
    """Yield each user's name, inputs and labels from one of LEAF's files.

    `num_samples` is not read, since LEAF does not always correct it when it drops samples.
    """
    content = read_json(path)
    users = content.get("users") if isinstance(content, dict) else None
    data = content.get("user_data") if isinstance(content, dict) else None
    if not isinstance(users, list) or not isinstance(data, dict):
        raise ConfigError(f"{path}: expected LEAF's json, an object with users, num_samples and user_data")
    for user in users:
        mine = data.get(user) if isinstance(user, str) else None
        x, y = (mine.get("x"), mine.get("y")) if isinstance(mine, dict) else (None, None)
        if not isinstance(x, list) or not isinstance(y, list) or len(x) != len(y):
            raise ConfigError(f"{path}: expected lists x and y of one length in user_data of {user!r}")
        if x:
            yield user, x, y


def _from_files(files: Sequence[Path], convert: Callable[[Sequence[Any], Sequence[Any], str], Pair]) -> Arrays:
    """Convert all users' examples. Files in a folder `train`, or with `_train_` in their names, are for training."""
    pieces: dict[str, list[NDArray[Any]]] = {f"{name}_{part}": [] for part in ("train", "test") for name in "xy"}
    owners: list[NDArray[np.int64]] = []
    numbers: dict[str, int] = {}
    for path in files:
        part = "train" if path.parent.name == "train" or "_train_" in path.name else "test"
        for user, x, y in users_of(path):
            inputs, labels = convert(x, y, f"{path}: {user}")
            pieces[f"x_{part}"].append(inputs)
            pieces[f"y_{part}"].append(labels)
            if part == "train":
                owners.append(np.full(len(labels), numbers.setdefault(user, len(numbers))))
    for part in ("train", "test"):
        if not pieces[f"x_{part}"]:
            raise ConfigError(f"{files[0].parent}: expected examples to {part} with, found none")
    return {"owner_train": np.concatenate(owners)} | {name: np.concatenate(each) for name, each in pieces.items()}


def _images(found: Found) -> Arrays:
    arrays = dict(_from_files(found.files, _images_of))
    mean, std = pixel_statistics(arrays["x_train"])
    return arrays | {"mean": mean, "std": std}


def _images_of(x: Sequence[Any], y: Sequence[Any], where: str) -> Pair:
    height, width, channels = image = KNOWN["femnist"].image
    classes = KNOWN["femnist"].classes
    try:
        pixels = np.asarray(x, np.float64)
    except (ValueError, TypeError):
        pixels = np.zeros(0)
    if pixels.shape != (len(y), height * width * channels) or not ((pixels >= 0) & (pixels <= 1)).all():
        raise ConfigError(f"{where}: expected images of {height * width} numbers within 0 and 1 in x")
    if not all(type(label) is int and 0 <= label < classes for label in y):
        raise ConfigError(f"{where}: expected integers within 0 and {classes - 1} in y")
    return np.rint(pixels * 255).astype(np.uint8).reshape(-1, *image), np.array(y, np.uint8)


def _windows_of(x: Sequence[Any], y: Sequence[Any], where: str) -> Pair:
    if not all(isinstance(each, str) and len(each) == WINDOW for each in x):
        raise ConfigError(f"{where}: expected strings of {WINDOW} characters in x")
    if not all(isinstance(each, str) and len(each) == 1 for each in y):
        raise ConfigError(f"{where}: expected single characters in y")
    return encode("".join(x)).reshape(-1, WINDOW), encode("".join(y))
