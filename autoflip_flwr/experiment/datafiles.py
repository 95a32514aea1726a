"""Find the files of a data set without reading them."""

import os
from pathlib import Path
from typing import NamedTuple

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_CIFAR_FILES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")


class Known(NamedTuple):
    """Fixed facts about one data set. `image` is (H, W, C); `loader`, `folder` and `host` are torchvision's."""

    image: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    loader: str
    folder: str
    host: str


DIGITS = Known((8, 8, 1), (0.3054,), (0.3760,), "", "", "")
KNOWN = {
    "mnist": Known((28, 28, 1), (0.1307,), (0.3081,), "MNIST", "MNIST", "https://ossci-datasets.s3.amazonaws.com"),
    "fashion_mnist": Known(
        (28, 28, 1),
        (0.2860,),
        (0.3530,),
        "FashionMNIST",
        "FashionMNIST",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
    ),
    "cifar10": Known(
        (32, 32, 3),
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
        "CIFAR10",
        "cifar-10-batches-py",
        "https://www.cs.toronto.edu",
    ),
}


def cache_dir() -> Path:
    """Return the folder for what is unpacked, downloaded or computed once. It need not exist yet.

    It is `$AUTOFLIP_CACHE`, else `$XDG_CACHE_HOME/autoflip-flwr`, else `~/.cache/autoflip-flwr`.
    """
    if own := os.environ.get("AUTOFLIP_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "autoflip-flwr"


def npy_folder(dataset: str, root: Path) -> Path | None:
    """Return the folder with the data set as `.npy` arrays: `root`, or its subfolder named like the data set."""
    folders = (root, root / dataset)
    return next((each for each in folders if all((each / f"{name}.npy").is_file() for name in ARRAYS)), None)


def has_originals(known: Known, root: Path) -> bool:
    """Return whether the four original `.gz` files of MNIST or Fashion-MNIST are below `root`."""
    raw = root / known.folder / "raw"
    return known.image[2] == 1 and all((raw / f"{name}.gz").is_file() for name in IDX_FILES)


def unpacked(known: Known, root: Path) -> bool:
    """Return whether all files that torchvision reads are below `root`."""
    folder = root / known.folder
    files = [folder / "raw" / name for name in IDX_FILES] if known.image[2] == 1 else [folder / n for n in _CIFAR_FILES]
    return all(path.is_file() for path in files)


def not_found(dataset: str, known: Known, root: Path) -> str:
    """Return the message that `root` does not hold a data set, with what was looked for."""
    files = ", ".join(f"{name}.npy" for name in ARRAYS)
    theirs = known.folder + os.sep
    if known.image[2] == 1:
        theirs += f"raw{os.sep}" + "{" + ", ".join(IDX_FILES) + "}, with or without .gz"
    looked = f"{files} (also in its folder {dataset}) and for {theirs}"
    return f"data-dir = {str(root)!r}: holds no {dataset}; looked for {looked}"
