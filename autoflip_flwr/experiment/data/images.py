"""Image sets: scikit-learn's digits, `.npy` arrays, torchvision's files and the gzipped originals of MNIST."""

from __future__ import annotations

import gzip
import hashlib
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.experiment.data.dataset import Arrays, Data, Inputs, data_of
from autoflip_flwr.experiment.data.files import ARRAYS, KNOWN, Found, Known, cache_dir
from autoflip_flwr.experiment.data.reading import one_line, plain_array
from autoflip_flwr.experiment.data.statistics import pixel_statistics
from autoflip_flwr.experiment.data.stored import stored
from autoflip_flwr.experiment.rules import ConfigError


def digits() -> Data:
    """Return scikit-learn's digits in a fixed stratified 80/20 split."""
    return image_data("digits", stored("digits", (), _digits), "scikit-learn: ")


def known_images(dataset: str, found: Found) -> Data:
    """Read a known image set in the form in which it was found.

    Raises
    ------
    ConfigError
        For files that are damaged or of another shape, and no network for a download.
    """
    known = KNOWN[dataset]
    if found.form == "npy":
        arrays: Arrays = {name: plain_array(path) for name, path in zip(ARRAYS, found.files, strict=True)}
        return image_data(dataset, arrays, f"{found.folder}{os.sep}", ".npy")
    if found.form == "torchvision":
        arrays = stored(dataset, found.files, partial(_from_torchvision, known, found.folder.parent))
    elif found.form == "originals":
        arrays = stored(dataset, (), partial(_from_originals, known, found.files))
    else:
        arrays = stored(dataset, (), partial(_download, dataset))
    return image_data(dataset, arrays, f"{found.folder}: ")


def image_data(dataset: str, arrays: Arrays, where: str, suffix: str = "") -> Data:
    """Check images and labels of a known set; `where` + name + `suffix` names an array in an error."""
    known = KNOWN[dataset]
    height, width, channels = known.image
    shapes = [known.image] if channels > 1 else [known.image, (height, width)]
    shaped = dict(arrays)
    for name in ("x_train", "x_test"):
        x = arrays[name]
        if x.dtype != np.uint8 or x.shape[1:] not in shapes or not len(x):
            wanted = " or ".join(f"(N, {', '.join(map(str, shape))})" for shape in shapes)
            wrong = f"{where}{name}{suffix}"
            raise ConfigError(f"{wrong}: expected uint8 {wanted} for {dataset}, found {x.dtype} {x.shape}")
        shaped[name] = x.reshape(len(x), *known.image)
    mean, std = known.mean, known.std
    if not mean:
        found = (arrays["mean"], arrays["std"]) if "mean" in arrays else pixel_statistics(shaped["x_train"])
        mean, std = tuple(found[0].tolist()), tuple(found[1].tolist())
    inputs = Inputs("image", (channels, height, width), mean, std)
    return data_of(dataset, shaped, inputs, known.classes, where, suffix)


def _digits() -> Arrays:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    # Scale 0..16 to the nearest integer in 0..255.
    x = ((bunch.images.astype(np.int64) * 255 + 8) // 16).astype(np.uint8)[..., None]
    y = bunch.target.astype(np.int64)
    train, test = train_test_split(np.arange(len(y)), test_size=0.2, random_state=0, stratify=y)
    train.sort()
    test.sort()
    return {"x_train": x[train], "y_train": y[train], "x_test": x[test], "y_test": y[test]}


def _from_torchvision(known: Known, root: Path, download: bool = False) -> Arrays:
    # Here, not above: torchvision is slow to import.
    import torchvision.datasets

    loader = getattr(torchvision.datasets, known.loader)
    arrays: dict[str, NDArray[Any]] = {}
    for part in ("train", "test"):
        try:
            found = loader(str(root), train=part == "train", download=download)
        except Exception as error:  # parsers raise all kinds of errors on damaged files
            if download:
                raise
            raise ConfigError(f"{root / known.folder}: torchvision cannot read it: {one_line(error)}") from error
        arrays |= {f"x_{part}": np.asarray(found.data), f"y_{part}": np.asarray(found.targets)}
    return arrays


def _from_originals(known: Known, files: tuple[Path, ...]) -> Arrays:
    arrays = {}
    for name, path, md5 in zip(ARRAYS, files, known.originals, strict=True):
        content = path.read_bytes()
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
            raise ConfigError(f"{path}: damaged, its md5 is not the original's {md5}")
        offset, shape = (16, known.image[:2]) if name.startswith("x") else (8, ())
        arrays[name] = np.frombuffer(gzip.decompress(content), np.uint8, offset=offset).reshape(-1, *shape)
    return arrays


def _download(dataset: str) -> Arrays:
    cache = cache_dir()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{dataset}-", dir=cache) as folder:
            try:
                return _from_torchvision(KNOWN[dataset], Path(folder), download=True)
            except Exception as error:  # urllib, http, ssl, tarfile and torchvision each raise their own
                raise ConfigError(
                    f"cannot download {dataset} (no network?); give data-dir a folder that has it: {one_line(error)}"
                ) from error
    except OSError as error:
        raise ConfigError(f"cannot write to the cache folder {cache} (set AUTOFLIP_CACHE): {error}") from error
