"""Image data sets as plain uint8 arrays, read from a folder or fetched with torchvision's own loaders."""

import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.core.choices import DATASETS
from autoflip_flwr.experiment.config import ConfigError
from autoflip_flwr.experiment.datafiles import (
    ARRAYS,
    DIGITS,
    KNOWN,
    Known,
    cache_dir,
    has_originals,
    not_found,
    npy_folder,
)

_CLASSES = 10


class Inputs(NamedTuple):
    """How raw examples become what a model takes.

    Attributes
    ----------
    kind : str
        `image`: uint8 (N, H, W, C) becomes float32 (n, C, H, W) in units of `std`. `signal`: float (N, C, ...)
        becomes float32 of the same shape in units of `std`. `text`: integers (N, T) become int64 (n, T).
    shape : tuple of int
        Shape of one example as the model takes it.
    mean, std : tuple of float
        One for each of the C channels, for images of pixels scaled to [0, 1]. Empty: values stay as they are.
    """

    kind: str
    shape: tuple[int, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class ImageData:
    """One data set, read-only and shared by everything in the process.

    `x_train`, `x_test`: uint8 (N, H, W, C), memory-mapped where they come from `.npy` files.
    `y_train`, `y_test`: int64 (N,), in [0, classes).
    `mean`, `std`: C floats each, of the pixels scaled to [0, 1].
    """

    name: str
    x_train: NDArray[np.uint8]
    y_train: NDArray[np.int64]
    x_test: NDArray[np.uint8]
    y_test: NDArray[np.int64]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def inputs(self) -> Inputs:
        """How images become what models take: float32 (C, H, W) each."""
        height, width, channels = self.x_train.shape[1:]
        return Inputs("image", (channels, height, width), self.mean, self.std)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example as models take it."""
        return self.inputs.shape


def load(dataset: str, data_dir: str = "") -> ImageData:
    """Load a data set, once per process.

    Parameters
    ----------
    dataset : str
        `digits` (scikit-learn's own, a fixed stratified 80/20 split), `mnist`, `fashion_mnist` or `cifar10`.
    data_dir : str ("")
        Folder to search, never written to: for `x_train.npy`, `y_train.npy`, `x_test.npy`, `y_test.npy` in it or in its
        subfolder `<dataset>`, then for torchvision's own layout, then for the four original `.gz` files of MNIST or
        Fashion-MNIST (unpacked into `cache_dir()`). Empty: torchvision downloads into `cache_dir()`, once. `digits`
        needs none.

    Raises
    ------
    ConfigError
        For an unknown data set, files missing, damaged or of another shape, or no network for the download.
    """
    return _load(dataset, "" if dataset == "digits" else data_dir)


@lru_cache(maxsize=4)
def _load(dataset: str, data_dir: str) -> ImageData:
    if dataset == "digits":
        return _digits()
    if dataset not in KNOWN:
        raise ConfigError(f"dataset = {dataset!r}: must be one of {', '.join(DATASETS)}")
    known = KNOWN[dataset]
    if not data_dir:
        return _image_data(dataset, known, _through_cache(dataset, known, {}), f"{cache_dir() / known.folder}: ")
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise ConfigError(f"data-dir = {data_dir!r}: must be an existing folder")
    if (folder := npy_folder(dataset, root)) is not None:
        return _image_data(dataset, known, _from_npy(folder), f"{folder}{os.sep}", ".npy")
    arrays = _from_torchvision(known, root)
    if arrays is None and (archives := _originals(known, root)):
        arrays = _through_cache(dataset, known, archives)
    if arrays is None:
        raise ConfigError(not_found(dataset, known, root))
    return _image_data(dataset, known, arrays, f"{root / known.folder}: ")


def _digits() -> ImageData:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    # Scale 0..16 to the nearest integer in 0..255.
    x = ((bunch.images.astype(np.int64) * 255 + 8) // 16).astype(np.uint8)[..., None]
    y = bunch.target.astype(np.int64)
    train, test = train_test_split(np.arange(len(y)), test_size=0.2, random_state=0, stratify=y)
    train.sort()
    test.sort()
    arrays = {"x_train": x[train], "y_train": y[train], "x_test": x[test], "y_test": y[test]}
    return _image_data("digits", DIGITS, arrays, "scikit-learn: ")


def _image_data(dataset: str, known: Known, arrays: dict[str, Any], where: str, suffix: str = "") -> ImageData:
    """Check the arrays' shapes, dtypes and labels; `where` + name + `suffix` names an array in an error."""
    checked: dict[str, Any] = {}
    height, width, channels = known.image
    shapes = [known.image] if channels > 1 else [known.image, (height, width)]
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        found = f"{where}x_{part}{suffix}"
        if x.dtype != np.uint8 or x.shape[1:] not in shapes or not len(x):
            wanted = " or ".join(f"(N, {', '.join(map(str, shape))})" for shape in shapes)
            raise ConfigError(f"{found}: expected uint8 {wanted} for {dataset}, found {x.dtype} {x.shape}")
        found = f"{where}y_{part}{suffix}"
        if y.dtype.kind not in "iu" or y.shape != (len(x),):
            raise ConfigError(f"{found}: expected integers ({len(x)},), one per image, found {y.dtype} {y.shape}")
        if y.min() < 0 or y.max() >= _CLASSES:
            raise ConfigError(f"{found}: expected labels 0 to {_CLASSES - 1}, found {y.min()} to {y.max()}")
        x, y = x.reshape(len(x), *known.image), np.array(y, np.int64)
        x.flags.writeable = y.flags.writeable = False
        checked |= {f"x_{part}": x, f"y_{part}": y}
    return ImageData(name=dataset, classes=_CLASSES, mean=known.mean, std=known.std, **checked)


def _from_npy(folder: Path) -> dict[str, Any]:
    arrays = {}
    for name in ARRAYS:
        path = folder / f"{name}.npy"
        try:
            arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ConfigError(f"{path}: expected a plain .npy array: {_one_line(error)}") from error
    return arrays


def _loader(known: Known) -> Any:
    # Here, not above: torchvision is slow to import, and digits and .npy arrays do not need it.
    import torchvision.datasets

    return getattr(torchvision.datasets, known.loader)


def _from_torchvision(known: Known, root: Path, download: bool = False) -> dict[str, Any] | None:
    """Read `root` with torchvision's loader; None where it finds its files missing (or, CIFAR-10, altered)."""
    if not download and not (root / known.folder).is_dir():
        return None
    loader = _loader(known)
    arrays: dict[str, Any] = {}
    for part in ("train", "test"):
        try:
            found = loader(str(root), train=part == "train", download=download)
        except Exception as error:  # parsers raise all kinds of errors on damaged files
            if download:
                raise
            if isinstance(error, RuntimeError) and "not found" in str(error):
                return None
            raise ConfigError(f"{root / known.folder}: torchvision cannot read it: {_one_line(error)}") from error
        arrays |= {f"x_{part}": np.asarray(found.data), f"y_{part}": np.asarray(found.targets)}
    return arrays


def _originals(known: Known, root: Path) -> dict[str, Path]:
    """Return the four original `.gz` files by name, or {} if one is missing. Raise an error for altered ones."""
    if not has_originals(known, root):
        return {}
    from torchvision.datasets.utils import check_integrity

    raw = root / known.folder / "raw"
    resources: list[tuple[str, str]] = _loader(known).resources
    for name, md5 in resources:
        # For an altered file torchvision would try a download.
        if not check_integrity(raw / name, md5):
            raise ConfigError(f"{raw / name}: damaged, its md5 is not the original's {md5}")
    return {name: raw / name for name, _ in resources}


def _through_cache(dataset: str, known: Known, archives: dict[str, Path]) -> dict[str, Any]:
    """Read the data set from the cache folder. Fill that first from `archives` or, if these are empty, by download.

    Several processes may do so at once: each works in its own folder, and the first to finish renames it into place.
    """
    cache = cache_dir()
    if (cached := _cached(known)) is not None:
        return cached
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{dataset}-", dir=cache) as name:
            own = Path(name)
            for file, path in archives.items():
                raw = own / known.folder / "raw"
                raw.mkdir(parents=True, exist_ok=True)
                (raw / file).write_bytes(path.read_bytes())
            arrays = _downloaded(dataset, known, own)
            for archive in own.rglob("*.gz"):
                archive.unlink()
            with suppress(OSError):  # nothing there yet, or a damaged folder
                if _cached(known) is None:
                    (cache / known.folder).rename(own / "damaged")
            with suppress(OSError):  # another process was first
                (own / known.folder).rename(cache / known.folder)
            return arrays
    except OSError as error:
        raise ConfigError(f"cannot write to the cache folder {cache} (set AUTOFLIP_CACHE): {error}") from error


def _cached(known: Known) -> dict[str, Any] | None:
    with suppress(ConfigError):
        return _from_torchvision(known, cache_dir())
    return None


def _downloaded(dataset: str, known: Known, root: Path) -> dict[str, Any]:
    """Let torchvision complete `root`: it unpacks the originals that are there, and downloads the others."""
    try:
        arrays = _from_torchvision(known, root, download=True)
    except Exception as error:  # urllib, http, ssl, tarfile and torchvision each raise their own
        raise ConfigError(
            f"cannot download {dataset} (no network?); give data-dir a folder that has it: {_one_line(error)}"
        ) from error
    assert arrays is not None
    return arrays


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
