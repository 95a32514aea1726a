"""Find the files of a data set without reading them, and without NumPy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from autoflip_flwr.core.choices import DATASETS
from autoflip_flwr.experiment.rules import ConfigError

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
HAR_ARRAYS = ("x", "y", "subject", "test")
UCI_SIGNALS = tuple(f"{kind}_{axis}" for kind in ("body_acc", "body_gyro", "total_acc") for axis in "xyz")
ABOUT = "about.json"
TEST_FILE = "test.npz"


class Known(NamedTuple):
    """Fixed facts about an image set.

    `image` is (H, W, C). `files`, below `folder`, are those that torchvision's `loader` reads; `host` has them for
    download. `originals` are their gzipped forms with their md5. Without a mean, it is that of the training data.
    """

    image: tuple[int, int, int]
    classes: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    loader: str = ""
    folder: str = ""
    files: tuple[str, ...] = ()
    host: str = ""
    originals: tuple[str, ...] = ()


_IDX = (
    "raw/train-images-idx3-ubyte",
    "raw/train-labels-idx1-ubyte",
    "raw/t10k-images-idx3-ubyte",
    "raw/t10k-labels-idx1-ubyte",
)
KNOWN = {
    "digits": Known((8, 8, 1), 10, (0.3054,), (0.3760,)),
    "mnist": Known(
        (28, 28, 1),
        10,
        (0.1307,),
        (0.3081,),
        "MNIST",
        "MNIST",
        _IDX,
        "https://ossci-datasets.s3.amazonaws.com",
        (
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3",
            "ec29112dd5afa0611ce80d1b7f02629c",
        ),
    ),
    "fashion_mnist": Known(
        (28, 28, 1),
        10,
        (0.2860,),
        (0.3530,),
        "FashionMNIST",
        "FashionMNIST",
        _IDX,
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        (
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
    ),
    "cifar10": Known(
        (32, 32, 3),
        10,
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
        "CIFAR10",
        "cifar-10-batches-py",
        (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"),
        "https://www.cs.toronto.edu",
    ),
    "cifar100": Known(
        (32, 32, 3),
        100,
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
        "CIFAR100",
        "cifar-100-python",
        ("train", "test", "meta"),
        "https://www.cs.toronto.edu",
    ),
    "femnist": Known((28, 28, 1), 62),
}


class Found(NamedTuple):
    """Where a data set is. `form` is what its files are; `folder` is for errors."""

    form: str
    folder: Path
    files: tuple[Path, ...]


def cache_dir() -> Path:
    """Return the folder for what is unpacked, downloaded or converted once. It need not exist yet.

    It is `$AUTOFLIP_CACHE`, else `$XDG_CACHE_HOME/autoflip-flwr`, else `~/.cache/autoflip-flwr`.
    """
    if own := os.environ.get("AUTOFLIP_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "autoflip-flwr"


def store_of(name: str, digest: str = "") -> Path:
    """Return the folder of arrays in the cache: of a data set of fixed content, or made from files with a digest."""
    return cache_dir() / (f"{name}-{digest}" if digest else name)


def find(dataset: str, data_dir: str) -> Found:
    """Find a data set in a folder, or, for an empty `data_dir`, among what has been downloaded or can be.

    Forms are `npy` (four arrays), `torchvision` (its own files), `originals` (their gzipped forms), `leaf` (LEAF's
    json), `speakers` and `plays` (Shakespeare as text), `windows` and `uci` (HAR), `arrays` and `clients` (your own
    `.npy` or `.npz` files), and `download`.

    Raises
    ------
    ConfigError
        If it is not there.
    """
    if not data_dir:
        if dataset in KNOWN and KNOWN[dataset].host:
            return Found("download", cache_dir(), ())
        raise ConfigError(f"dataset = '{dataset}': give data-dir, or $AUTOFLIP_DATA, a folder that has it")
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise ConfigError(f"data-dir = {data_dir!r}: must be an existing folder")
    finders = {"femnist": _leaf, "shakespeare": _shakespeare, "har": _har, "own": _own}
    found = None
    for folder in (root,) if dataset == "own" else (root, root / dataset):
        found = found or _npy(folder, dataset) or finders.get(dataset, _nothing)(folder)
    found = found or (_of_torchvision(KNOWN[dataset], root) if dataset in KNOWN else None)
    if found is None:
        raise ConfigError(f"data-dir = {str(root)!r}: holds no {dataset}; looked for {_looked_for(dataset)}")
    return found


def _nothing(_: Path) -> Found | None:
    return None


def _all(form: str, folder: Path, files: list[Path]) -> Found | None:
    return Found(form, folder, tuple(files)) if files and all(path.is_file() for path in files) else None


def _npy(folder: Path, dataset: str) -> Found | None:
    return _all("npy", folder, [folder / f"{name}.npy" for name in ARRAYS]) if dataset in KNOWN else None


def _of_torchvision(known: Known, root: Path) -> Found | None:
    folder = root / known.folder
    return _all("torchvision", folder, [folder / name for name in known.files]) or (
        _all("originals", folder, [folder / f"{name}.gz" for name in known.files]) if known.originals else None
    )


def _leaf(folder: Path) -> Found | None:
    """Find LEAF's `train` and `test` folders, also below `data`, or one sampled file of each beside one another."""
    for base in (folder, folder / "data"):
        train, test = _json_files(base / "train"), _json_files(base / "test")
        if train and test:
            return Found("leaf", base, (*train, *test))
    return None


def _json_files(folder: Path, pattern: str = "*") -> list[Path]:
    return sorted([*folder.glob(f"{pattern}.json"), *folder.glob(f"{pattern}.json.gz")])


def _shakespeare(folder: Path) -> Found | None:
    if (found := _leaf(folder)) is not None:
        return found
    if speakers := _json_files(folder, "leaf_speakers"):
        return Found("speakers", folder, (speakers[0],))
    train, test = _json_files(folder, "*_train_*"), _json_files(folder, "*_test_*")
    if train and test:
        return Found("leaf", folder, (*train, *test))
    return _all("plays", folder, [folder / "tinyshakespeare.txt"])


def _har(folder: Path) -> Found | None:
    if found := _all("windows", folder, [folder / f"{name}.npy" for name in HAR_ARRAYS]):
        return found
    for base in (folder, folder / "UCI HAR Dataset"):
        files = []
        for part in ("train", "test"):
            files += [base / part / "Inertial Signals" / f"{name}_{part}.txt" for name in UCI_SIGNALS]
            files += [base / part / f"{name}_{part}.txt" for name in ("y", "subject")]
        if found := _all("uci", base, files):
            return found
    return None


def _own(folder: Path) -> Found | None:
    if found := _all("arrays", folder, [folder / "x_train.npy", folder / "y_train.npy"]):
        more = [folder / f"{name}.npy" for name in ("x_test", "y_test", "owner_train")]
        about = [folder / ABOUT]
        return found._replace(files=(*found.files, *(path for path in more + about if path.is_file())))
    clients = sorted(folder.glob("*.npz"))
    if all(path.name == TEST_FILE for path in clients):
        return None
    about = [folder / ABOUT] if (folder / ABOUT).is_file() else []
    return Found("clients", folder, (*clients, *about))


def _looked_for(dataset: str) -> str:
    """Name the files of a data set, for the error that they are not there."""
    if dataset == "har":
        return (
            f"{', '.join(f'{name}.npy' for name in HAR_ARRAYS)} (also in its folder har), or UCI's own "
            f"train{os.sep}Inertial Signals{os.sep}*.txt, y_train.txt, subject_train.txt and the same for test"
        )
    if dataset == "own":
        return "x_train.npy and y_train.npy, or one .npz file for each client"
    if dataset == "shakespeare":
        return (
            "LEAF's train and test folders of .json or .json.gz files, leaf_speakers.json, *_train_*.json with "
            "*_test_*.json, or tinyshakespeare.txt (also in its folder shakespeare)"
        )
    arrays = f"{', '.join(f'{name}.npy' for name in ARRAYS)} (also in its folder {dataset})"
    if dataset == "femnist":
        return f"{arrays}, or LEAF's train and test folders of .json or .json.gz files"
    known = KNOWN[dataset]
    names = "{" + ", ".join(name.removeprefix("raw/") for name in known.files) + "}"
    theirs = os.path.join(known.folder, "raw", names) if known.originals else os.path.join(known.folder, names)
    return f"{arrays} and for {theirs}{', with or without .gz' if known.originals else ''}"


def check_name(dataset: str) -> None:
    """Raise `ConfigError` for a data set that is neither known nor `module:callable`."""
    if dataset not in DATASETS and ":" not in dataset:
        raise ConfigError(f"dataset = {dataset!r}: must be one of {', '.join(DATASETS)}, or module:callable")
