import dataclasses
import gzip
import hashlib
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.data.dataset import Data, Inputs
from autoflip_flwr.experiment.data.files import cache_dir
from autoflip_flwr.experiment.data.load import _load, check_data, load, load_for, prepare
from autoflip_flwr.experiment.examples import examples_to_train
from autoflip_flwr.experiment.rules import ConfigError

ROOT = Path(__file__).resolve().parents[2]
MNIST_TRAIN = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
MNIST_TEST = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
RAW = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AUTOFLIP_CACHE", str(tmp_path / "cache"))
    _load.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("went online"))
    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def idx(name: str, data_dir: str) -> np.ndarray:
    content = gzip.decompress((Path(data_dir) / "MNIST" / "raw" / f"{name}.gz").read_bytes())
    return (
        np.frombuffer(content, np.uint8, offset=16).reshape(-1, 28, 28)
        if "images" in name
        else np.frombuffer(content, np.uint8, offset=8)
    )


def listing(folder: Path) -> list[tuple[str, int, int]]:
    return [(str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in sorted([folder, *folder.rglob("*")])]


def stored_in(cache: Path) -> list[str]:
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*"))


MNIST_STORED = [
    "mnist",
    "mnist/arrays.json",
    *(f"mnist/{part}.npy" for part in ("x_test", "x_train", "y_test", "y_train")),
]


def small(shape: tuple[int, ...] = (28, 28)) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {}
    for part, examples in (("train", 20), ("test", 10)):
        arrays[f"x_{part}"] = rng.integers(0, 256, (examples, *shape), dtype=np.uint8)
        arrays[f"y_{part}"] = (np.arange(examples) % 10).astype(np.uint8)
    return arrays


def save(folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder


def save_idx(raw: Path, arrays: dict[str, np.ndarray]) -> None:
    raw.mkdir(parents=True)
    for name, key in zip(RAW, ("x_train", "y_train", "x_test", "y_test"), strict=True):
        array = arrays[key]
        header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
        (raw / name).write_bytes(header + array.tobytes())


def test_digits() -> None:
    data = load("digits")
    assert (data.name, data.classes, data.input_shape) == ("digits", 10, (1, 8, 8))
    assert data.x_train.shape == (1437, 8, 8, 1)
    assert data.x_test.shape == (360, 8, 8, 1)
    assert np.bincount(data.y_train).tolist() == [142, 146, 142, 146, 145, 145, 145, 143, 139, 144]
    assert np.bincount(data.y_test).tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    assert np.unique(data.x_train).tolist() == [round(v * 255 / 16 + 1e-9) for v in range(17)]
    assert sha256(data.x_train) == "c74011e1ef81bfc8e50c8dbcd1fd529c9a66033660a82396541db5147180f282"
    assert sha256(data.y_test) == "723b354289d5bac3a0b9b879aa5c84bb66f8501f3d3042116f87aa5a7d98b1bc"
    batch, _ = examples_to_train(data).batch(torch.arange(len(data.y_train)))
    assert float(batch.mean()) == pytest.approx(0, abs=2e-4)
    assert float(batch.std()) == pytest.approx(1, abs=2e-4)


def test_digits_split_keeps_every_image_once() -> None:
    from sklearn.datasets import load_digits

    data = load("digits")
    ours = np.concatenate([data.x_train, data.x_test]).reshape(1797, 64)
    theirs = load_digits().data
    scaled = np.floor(theirs * 255 / 16 + 0.5).astype(np.uint8)
    assert sorted(map(bytes, ours)) == sorted(map(bytes, scaled))


def test_mnist_is_the_original_and_its_folder_is_not_touched(
    data_dir: str, fresh_cache: Path, no_network: None
) -> None:
    before = listing(Path(data_dir) / "MNIST")
    data = load("mnist", data_dir)
    assert data.input_shape == (1, 28, 28)
    assert np.bincount(data.y_train).tolist() == MNIST_TRAIN
    assert np.bincount(data.y_test).tolist() == MNIST_TEST
    for name, array in zip(RAW, (data.x_train[..., 0], data.y_train, data.x_test[..., 0], data.y_test), strict=True):
        assert np.array_equal(array, idx(name, data_dir))
    assert listing(Path(data_dir) / "MNIST") == before
    assert stored_in(fresh_cache) == MNIST_STORED
    assert isinstance(data.x_train, np.memmap)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b"\0" * 30),
        lambda path: np.save(path, np.zeros(3, np.uint8)),
        lambda path: path.with_name("arrays.json").write_text("{"),
        lambda path: path.with_name("arrays.json").write_text('{"format": 0}'),
    ],
)
def test_a_damaged_cache_is_repaired(fresh_cache: Path, damage: Any) -> None:
    expected = np.array(load("digits").x_test)  # a copy, since the file it maps is damaged
    before = stored_in(fresh_cache)
    damage(fresh_cache / "digits" / "x_test.npy")
    _load.cache_clear()
    assert np.array_equal(load("digits").x_test, expected)
    assert stored_in(fresh_cache) == before
    _load.cache_clear()
    assert isinstance(load("digits").x_test, np.memmap)


def test_what_was_stored_once_is_not_downloaded(data_dir: str, fresh_cache: Path, no_network: None) -> None:
    expected = load("mnist", data_dir).y_test
    _load.cache_clear()
    assert np.array_equal(load("mnist").y_test, expected)


_LOAD = """
import sys, time
from pathlib import Path
from autoflip_flwr.experiment.data.load import load
Path(sys.argv[2], sys.argv[3]).touch()
while len(list(Path(sys.argv[2]).iterdir())) < 2:
    time.sleep(0.001)
data = load("mnist", sys.argv[1])
print(int(data.x_train.sum(dtype="int64")), int(data.y_test.sum()))
"""


@pytest.mark.runs
def test_two_processes_load_first_at_once(data_dir: str, fresh_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "ready").mkdir()
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _LOAD, data_dir, str(tmp_path / "ready")]
    both = [subprocess.Popen([*command, str(i)], env=env, stdout=subprocess.PIPE, text=True) for i in range(2)]
    said = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    total = int(idx(RAW[0], data_dir).sum(dtype=np.int64)), int(idx(RAW[3], data_dir).sum(dtype=np.int64))
    assert said == [f"{total[0]} {total[1]}\n"] * 2
    assert stored_in(fresh_cache) == MNIST_STORED


def test_cifar10_is_memory_mapped(data_dir: str) -> None:
    data = load("cifar10", data_dir)
    assert isinstance(data.x_train, np.memmap)
    assert (data.input_shape, data.x_train.shape, data.x_test.shape) == (
        (3, 32, 32),
        (50000, 32, 32, 3),
        (10000, 32, 32, 3),
    )
    assert np.bincount(data.y_train).tolist() == [5000] * 10
    assert np.bincount(data.y_test).tolist() == [1000] * 10
    assert data.y_train[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert data.y_train.dtype == data.y_test.dtype == np.int64
    assert np.array_equal(data.x_test[-5:], np.load(Path(data_dir) / "cifar10" / "x_test.npy", mmap_mode="r")[-5:])


def test_loaded_once_and_read_only(data_dir: str) -> None:
    for data in (load("digits"), load("cifar10", data_dir)):
        assert load(dataset=data.name, data_dir=data_dir) is data
        for name in ("x_train", "y_train", "x_test", "y_test"):
            with pytest.raises(ValueError, match="read-only"):
                getattr(data, name)[0] = 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.classes = 2  # type: ignore[misc]


@pytest.mark.parametrize("folder", [".", "mnist"])
@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 1)])
def test_npy_files_come_first(tmp_path: Path, folder: str, shape: tuple[int, ...], fresh_cache: Path) -> None:
    arrays = small(shape)
    save(tmp_path / "data" / folder, arrays)
    save_idx(tmp_path / "data" / "MNIST" / "raw", {name: array[:3] for name, array in small().items()})
    data = load("mnist", str(tmp_path / "data"))
    assert np.array_equal(data.x_train, arrays["x_train"].reshape(20, 28, 28, 1))
    assert data.y_test.tolist() == list(range(10))
    assert not fresh_cache.exists()


@pytest.mark.parametrize(("dataset", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_torchvision_layout(tmp_path: Path, dataset: str, folder: str, fresh_cache: Path, no_network: None) -> None:
    arrays = small()
    save_idx(tmp_path / folder / "raw", arrays)
    data = load(dataset, str(tmp_path))
    assert data.name == dataset
    assert np.array_equal(data.x_test[..., 0], arrays["x_test"])
    assert np.array_equal(data.y_train, arrays["y_train"])
    assert isinstance(data.x_train, np.memmap)
    (folder_of,) = fresh_cache.iterdir()
    assert folder_of.name.startswith(f"{dataset}-")


def test_torchvision_layout_is_checked(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    save_idx(raw, small() | {"y_train": np.full(20, 11, np.uint8)})
    with pytest.raises(ConfigError, match=r"MNIST: y_train: expected labels 0 to 9, found 11 to 11"):
        load("mnist", str(tmp_path))
    (raw / RAW[0]).write_bytes(b"\0" * 30)
    with pytest.raises(ConfigError, match=r"MNIST: torchvision cannot read it: "):
        load("mnist", str(tmp_path))


def test_cifar100_is_read_as_torchvision_reads_it(
    tmp_path: Path, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hashlib
    import pickle

    from torchvision.datasets import CIFAR100

    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    images = {part: rng.integers(0, 256, (count, 3072), dtype=np.uint8) for part, count in (("train", 12), ("test", 4))}
    for part, x in images.items():
        content = pickle.dumps({"data": x, "fine_labels": [90 + i % 10 for i in range(len(x))]})
        (folder / part).write_bytes(content)
        monkeypatch.setattr(CIFAR100, f"{part}_list", [[part, hashlib.md5(content).hexdigest()]])
    meta = pickle.dumps({"fine_label_names": [str(i) for i in range(100)]})
    (folder / "meta").write_bytes(meta)
    monkeypatch.setattr(
        CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": hashlib.md5(meta).hexdigest()}
    )
    data = load("cifar100", str(tmp_path))
    assert (data.classes, data.input_shape) == (100, (3, 32, 32))
    assert np.array_equal(data.x_train, images["train"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    assert data.y_test.tolist() == [90, 91, 92, 93]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x_train": np.zeros((20, 28, 28))},
            r"x_train.npy: expected uint8 \(N, 28, 28, 1\) or \(N, 28, 28\) for mnist",
        ),
        ({"x_test": np.zeros((10, 32, 32, 3), np.uint8)}, r"x_test.npy: .*, found uint8 \(10, 32, 32, 3\)"),
        ({"x_train": np.zeros((0, 28, 28), np.uint8)}, r"x_train.npy: .*, found uint8 \(0, 28, 28\)"),
        ({"x_train": np.array(3, np.uint8)}, r"x_train.npy: .*, found uint8 \(\)"),
        (
            {"y_train": np.zeros(19, int)},
            r"y_train.npy: expected integers \(20,\), one per example, found int64 \(19,\)",
        ),
        ({"y_train": np.zeros((20, 10), int)}, r"y_train.npy: .*, found int64 \(20, 10\)"),
        ({"y_test": np.zeros(10)}, r"y_test.npy: .*, found float64 \(10,\)"),
        ({"y_test": np.full(10, 10)}, r"y_test.npy: expected labels 0 to 9, found 10 to 10"),
        ({"y_train": np.full(20, -1)}, r"y_train.npy: expected labels 0 to 9, found -1 to -1"),
        ({"y_train": np.full(20, "a", object)}, r"y_train.npy: expected a plain .npy array: "),
    ],
)
def test_wrong_npy_files(tmp_path: Path, change: dict[str, np.ndarray], message: str) -> None:
    save(tmp_path, small() | change)
    with pytest.raises(ConfigError, match=message) as caught:
        load("mnist", str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_truncated_npy_file(tmp_path: Path) -> None:
    path = save(tmp_path, small((32, 32, 3))) / "x_train.npy"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ConfigError, match=r"x_train.npy: expected a plain .npy array"):
        load("cifar10", str(tmp_path))


def test_missing_files_are_named(tmp_path: Path, data_dir: str, no_network: None) -> None:
    save(tmp_path, {"x_train": small()["x_train"]})
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    (tmp_path / "MNIST" / "raw" / f"{RAW[0]}.gz").touch()
    with pytest.raises(ConfigError, match="holds no mnist") as caught:
        load("mnist", str(tmp_path))
    for name in (str(tmp_path), "x_train.npy", "y_test.npy", *RAW, ".gz"):
        assert name in str(caught.value)
    with pytest.raises(ConfigError, match=r"holds no cifar10; looked for .*cifar-10-batches-py"):
        load("cifar10", str(tmp_path))
    with pytest.raises(ConfigError, match=r"holds no fashion_mnist; looked for .*FashionMNIST"):
        load("fashion_mnist", data_dir)


def test_altered_cifar_pickles_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"altered")
    with pytest.raises(ConfigError, match="holds no cifar10"):
        load("cifar10", str(tmp_path))


def test_damaged_originals_are_named(tmp_path: Path, data_dir: str, fresh_cache: Path, no_network: None) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in RAW:
        (raw / f"{name}.gz").symlink_to(Path(data_dir, "MNIST", "raw", f"{name}.gz"))
    (raw / f"{RAW[1]}.gz").unlink()
    (raw / f"{RAW[1]}.gz").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match=rf"{RAW[1]}.gz: damaged, its md5 is not the original's"):
        load("mnist", str(tmp_path))
    assert not fresh_cache.exists()


@pytest.mark.parametrize("dataset", ["mnist", "fashion_mnist", "cifar10", "cifar100"])
def test_no_network_to_download_with(dataset: str, fresh_cache: Path, no_network: None) -> None:
    with pytest.raises(ConfigError, match=rf"cannot download {dataset} \(no network\?\); give data-dir") as caught:
        load(dataset)
    assert "no route to host" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(fresh_cache.iterdir())


def test_unwritable_cache(tmp_path: Path, data_dir: str, monkeypatch: pytest.MonkeyPatch, no_network: None) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("AUTOFLIP_CACHE", str(tmp_path / "file"))
    _load.cache_clear()
    assert np.bincount(load("mnist", data_dir).y_test).tolist() == MNIST_TEST  # in memory
    with pytest.raises(ConfigError, match=r"cannot write to the cache folder .*file \(set AUTOFLIP_CACHE\)"):
        load("mnist")


def test_unknown_data_set_or_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dataset = 'svhn': must be one of digits, .*, own, or module:callable"):
        load("svhn")
    with pytest.raises(ConfigError, match=r"data-dir = '.*absent': must be an existing folder"):
        load("mnist", str(tmp_path / "absent"))
    for dataset in ("femnist", "shakespeare", "har", "own"):
        with pytest.raises(
            ConfigError, match=rf"dataset = '{dataset}': give data-dir, or \$AUTOFLIP_DATA, a folder that"
        ):
            load(dataset)
        with pytest.raises(ConfigError, match=rf"data-dir = '.*': holds no {dataset}; looked for "):
            load(dataset, str(tmp_path))


def test_input_size_and_augmentation_are_of_images(data_dir: str) -> None:
    data = load_for(Config(dataset="cifar10", data_dir=data_dir, input_size=24, augment="flip"))
    assert data.inputs._replace(mean=(), std=()) == Inputs("image", (3, 24, 24), augment="flip")
    assert data.x_train is load("cifar10", data_dir).x_train
    with pytest.raises(ConfigError, match="input-size = 9: must be at most 8, as in digits"):
        load_for(Config(input_size=9))
    with pytest.raises(ConfigError, match="dataset = 'har': holds no images, so input-size must be 0"):
        load_for(Config(dataset="har", model="har-cnn", data_dir=data_dir, augment="flip"))


def test_what_is_prepared_is_checked(tmp_path: Path, fresh_cache: Path) -> None:
    prepare(Config(nodes=10))
    assert stored_in(fresh_cache)[0] == "digits"
    with pytest.raises(ConfigError, match="cannot split the 1437 examples of digits between 1500 clients"):
        prepare(Config(nodes=1500))
    wrong = Config(dataset="mnist", data_dir=str(save(tmp_path / "wrong", small((9, 9)))))
    for check in (prepare, check_data):
        with pytest.raises(ConfigError, match=r"x_train.npy: expected uint8 \(N, 28, 28, 1\)"):
            check(wrong)


@pytest.mark.parametrize("dataset", ["digits", "har"])
def test_no_process_but_the_first_imports_what_made_the_data(dataset: str, data_dir: str, fresh_cache: Path) -> None:
    load(dataset, data_dir)
    code = (
        "import sys\nfrom autoflip_flwr.experiment.data.load import load\n"
        f"data = load({dataset!r}, sys.argv[1])\n"
        "print(type(data.x_train).__name__, sorted({'sklearn', 'torchvision', 'torch', 'flwr'} & set(sys.modules)))"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, data_dir], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "memmap []\n"


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("AUTOFLIP_CACHE", "~/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/home/someone/own")
    monkeypatch.delenv("AUTOFLIP_CACHE")
    assert cache_dir() == Path("/xdg/autoflip-flwr")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path("/home/someone/.cache/autoflip-flwr")


def test_input_shape_is_channels_first() -> None:
    x, y = np.zeros((1, 4, 5, 3), np.uint8), np.zeros(1, np.int64)
    assert Data("any", x, y, x, y, 2, Inputs("image", (3, 4, 5))).input_shape == (3, 4, 5)
