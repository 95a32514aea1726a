"""HAR: arrays by person, UCI's own text files, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.data.files import UCI_SIGNALS
from autoflip_flwr.experiment.data.load import load
from autoflip_flwr.experiment.data.partition import partition_by
from autoflip_flwr.experiment.examples import examples_to_test, examples_to_train
from autoflip_flwr.experiment.rules import ConfigError


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOFLIP_CACHE", str(tmp_path / "cache"))


def test_har_by_person(data_dir: str) -> None:
    data = load("har", data_dir)
    assert (data.name, data.classes, data.input_shape) == ("har", 6, (9, 128))
    subject, test = (np.load(Path(data_dir) / "har" / f"{name}.npy") for name in ("subject", "test"))
    assert data.owners is not None
    assert np.array_equal(data.owners, subject[~test])
    assert len(data.y_test) == test.sum() == 2584
    parts = partition_by(Config(dataset="har", model="har-cnn", split="natural"), data, 30)
    assert [len(part) for part in parts] == np.bincount(subject[~test]).tolist()
    x, _ = examples_to_train(data).batch(torch.arange(len(data.y_train)))
    assert torch.allclose(x.mean((0, 2)), torch.zeros(9), atol=1e-4)
    assert torch.allclose(x.std((0, 2)), torch.ones(9), atol=1e-3)
    whole = np.load(Path(data_dir) / "har" / "x.npy", mmap_mode="r")[test][:3]
    mean, std = (np.array(each, np.float32)[:, None] for each in (data.inputs.mean, data.inputs.std))
    assert np.array_equal(examples_to_test(data).batch(torch.arange(3))[0].numpy(), (whole - mean) / std)


def arrays(count: int = 4) -> dict[str, np.ndarray]:
    x = np.random.default_rng(0).standard_normal((count, 9, 128)).astype(np.float32)
    y = np.arange(count, dtype=np.uint8) % 6
    return {"x": x, "y": y, "subject": y, "test": np.arange(count) == 0}


def nan() -> np.ndarray:
    x = arrays()["x"]
    x[2, 3, 4] = np.nan
    return x


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": np.zeros((4, 128, 9), np.float32)},
            r"x.npy: expected float32 \(N, 9, 128\), found float32 \(4, 128, 9\)",
        ),
        ({"x": np.zeros((4, 9, 128), int)}, r"x.npy: expected float32 \(N, 9, 128\), found int64"),
        ({"x": nan()}, r"x.npy: expected finite numbers, found NaN"),
        ({"y": np.zeros(3, np.uint8)}, r"y.npy: expected integers \(4,\), found uint8 \(3,\)"),
        ({"y": np.full(4, 6)}, r"y_train: expected labels 0 to 5, found 6 to 6"),
        ({"subject": np.zeros(4)}, r"subject.npy: expected integers \(4,\), found float64 \(4,\)"),
        ({"test": np.zeros(4, int)}, r"test.npy: expected bool \(4,\), found int64 \(4,\)"),
        ({"test": np.zeros(4, bool)}, r"test.npy: expected true for some examples"),
        ({"test": np.array(["x"], object)}, r"test.npy: expected a plain .npy array"),
    ],
)
def test_malformed_arrays(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    for name, array in (arrays() | change).items():
        np.save(tmp_path / f"{name}.npy", array)
    with pytest.raises(ConfigError, match=message) as caught:
        load("har", str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def uci(root: Path) -> Path:
    """UCI's files for 3 examples to train with, and 2 to test with."""
    for part, count in (("train", 3), ("test", 2)):
        folder = root / "UCI HAR Dataset" / part
        (folder / "Inertial Signals").mkdir(parents=True)
        for number, name in enumerate(UCI_SIGNALS):
            rows = [[number + example + step / 100 for step in range(128)] for example in range(count)]
            lines = [" ".join(f"{value: .7e}" for value in row) for row in rows]
            (folder / "Inertial Signals" / f"{name}_{part}.txt").write_text("\n".join(lines) + "\n")
        (folder / f"y_{part}.txt").write_text("".join(f"{1 + example}\n" for example in range(count)))
        (folder / f"subject_{part}.txt").write_text("5\n" * (count - 1) + "30\n")
    return root / "UCI HAR Dataset"


def test_ucis_text_files(tmp_path: Path) -> None:
    uci(tmp_path)
    data = load("har", str(tmp_path))
    assert data.x_train.shape == (3, 9, 128)
    assert data.x_train[1, :, 50].tolist() == pytest.approx([number + 1.5 for number in range(9)])
    assert (data.y_train.tolist(), data.y_test.tolist()) == ([0, 1, 2], [0, 1])
    assert data.owners is not None
    assert data.owners.tolist() == [0, 0, 1]
    assert isinstance(data.x_train, np.memmap)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train/y_train.txt", "1\n2\n", r"body_acc_x_train.txt: expected 2 lines, as y_train.txt has, found 3"),
        ("train/y_train.txt", "1\n0\n2\n", r"y_train.txt: expected 3 integers from 1 on"),
        ("train/y_train.txt", "1\n7\n2\n", r"y_train: expected labels 0 to 5, found 0 to 6"),
        ("test/subject_test.txt", "1\n", r"subject_test.txt: expected 2 integers from 1 on"),
        ("test/subject_test.txt", "1\n1.5\n", r"subject_test.txt: expected 2 integers from 1 on"),
        ("train/Inertial Signals/body_acc_y_train.txt", "1 2\n" * 3, r"body_acc_y_train.txt: expected lines of 128"),
        ("train/Inertial Signals/body_acc_y_train.txt", "a b\n", r"body_acc_y_train.txt: expected lines of 128"),
        ("train/Inertial Signals/body_acc_y_train.txt", "", r"body_acc_y_train.txt: expected lines of 128"),
    ],
)
@pytest.mark.filterwarnings("ignore:loadtxt")
def test_malformed_text(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = uci(tmp_path) / name
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load("har", str(tmp_path))
