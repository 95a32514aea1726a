"""FEMNIST and Shakespeare: LEAF's files, texts by speaker, and what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.data import leaf, reading, text
from autoflip_flwr.experiment.data.files import find
from autoflip_flwr.experiment.data.load import load
from autoflip_flwr.experiment.data.partition import partition_by
from autoflip_flwr.experiment.data.text import LETTERS, encode, windows
from autoflip_flwr.experiment.examples import examples_to_train
from autoflip_flwr.experiment.rules import ConfigError

User = dict[str, list[Any]]


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOFLIP_CACHE", str(tmp_path / "cache"))


def write(path: Path, users: dict[str, User]) -> Path:
    """Write LEAF's json. Its `num_samples` may be wrong, as LEAF's own is."""
    content = {"users": list(users), "num_samples": [99] * len(users), "user_data": users}
    path.parent.mkdir(parents=True, exist_ok=True)
    data = json.dumps(content).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def image(level: int) -> list[float]:
    return [level / 255] * 784


def test_femnist_by_writer(tmp_path: Path) -> None:
    write(tmp_path / "femnist" / "train" / "b.json", {"w2": {"x": [image(7)], "y": [61]}, "w0": {"x": [], "y": []}})
    write(tmp_path / "femnist" / "train" / "a.json.gz", {"w1": {"x": [image(255), image(3)], "y": [0, 1]}})
    write(tmp_path / "femnist" / "train" / "c.json", {"w1": {"x": [image(9)], "y": [5]}})
    write(tmp_path / "femnist" / "test" / "a.json", {"w2": {"x": [image(128)], "y": [2]}})
    data = load("femnist", str(tmp_path))
    assert (data.classes, data.input_shape) == (62, (1, 28, 28))
    assert data.x_train[:, 5, 5, 0].tolist() == [255, 3, 7, 9]
    assert (data.y_train.tolist(), data.y_test.tolist()) == ([0, 1, 61, 5], [2])
    assert data.owners is not None
    assert data.owners.tolist() == [0, 0, 1, 0]
    assert isinstance(data.x_train, np.memmap)
    mean = np.array([255, 3, 7, 9]) / 255
    assert data.inputs.mean == (pytest.approx(mean.mean(), rel=1e-5),)
    assert data.inputs.std == (pytest.approx(mean.std(), rel=1e-5),)
    parts = partition_by(Config(dataset="femnist", split="natural"), data, 2)
    assert [part.tolist() for part in parts] == [[0, 1, 3], [2]]


def test_changed_files_are_read_anew(tmp_path: Path) -> None:
    write(tmp_path / "test" / "a.json", {"w": {"x": [image(128)], "y": [2]}})
    for label in (4, 5):
        write(tmp_path / "train" / "a.json", {"w": {"x": [image(7)] * label, "y": [label] * label}})
        assert leaf.femnist(find("femnist", str(tmp_path))).y_train.tolist() == [label] * label


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"a.json: expected a json file: "),
        (b"\xff", r"a.json: expected a json file: "),
        (b"[" * 100_000, r"a.json: expected a json file: "),
        (b"[]", r"a.json: expected LEAF's json, an object with users, num_samples and user_data"),
        ({"users": ["w"]}, r"a.json: expected LEAF's json"),
        ({"users": ["w"], "user_data": {}}, r"a.json: expected lists x and y of one length in user_data of 'w'"),
        ({"users": [3], "user_data": {"3": {}}}, r"a.json: expected lists x and y of one length in user_data of 3"),
        ({"w": {"x": [image(1)], "y": []}}, r"a.json: expected lists x and y of one length in user_data of 'w'"),
        ({"w": {"x": [[0.5] * 783], "y": [1]}}, r"a.json: w: expected images of 784 numbers within 0 and 1 in x"),
        ({"w": {"x": [image(1), [0.5]], "y": [1, 1]}}, r"a.json: w: expected images of 784 numbers within 0 and 1"),
        ({"w": {"x": [[{}] * 784], "y": [1]}}, r"a.json: w: expected images of 784 numbers within 0 and 1"),
        ({"w": {"x": [image(256)], "y": [1]}}, r"a.json: w: expected images of 784 numbers within 0 and 1"),
        ({"w": {"x": [[float("nan")] * 784], "y": [1]}}, r"a.json: w: expected images of 784 numbers within 0 and 1"),
        ({"w": {"x": [image(1)], "y": [62]}}, r"a.json: w: expected integers within 0 and 61 in y"),
        ({"w": {"x": [image(1)], "y": ["1"]}}, r"a.json: w: expected integers within 0 and 61 in y"),
        ({"w": {"x": [], "y": []}}, r"expected examples to train with, found none"),
    ],
)
def test_malformed_femnist(tmp_path: Path, content: Any, message: str) -> None:
    write(tmp_path / "test" / "a.json", {"w": {"x": [image(1)], "y": [1]}})
    path = write(tmp_path / "train" / "a.json", content if isinstance(content, dict) and "w" in content else {})
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif "w" not in content:
        path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message) as caught:
        load("femnist", str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_or_enormous_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "train" / "a.json.gz", {"w": {"x": [image(1)], "y": [1]}})
    write(tmp_path / "test" / "a.json", {"w": {"x": [image(1)], "y": [1]}})
    monkeypatch.setattr(reading, "LARGEST_JSON", 500)
    with pytest.raises(ConfigError, match=r"a.json.gz: expected at most 500 bytes, unpacked"):
        load("femnist", str(tmp_path))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ConfigError, match=r"a.json.gz: expected a json file: "):
        load("femnist", str(tmp_path))


def test_the_vocabulary_is_leafs() -> None:
    assert len(set(LETTERS)) == len(LETTERS) == 80
    assert encode("\n !}").tolist() == [0, 1, 2, 79]
    assert encode("é$漢\ud800").tolist() == [1] * 4


def test_windows_of_a_text() -> None:
    x, y, train, test = windows("ab\n   cd" * 30)  # a line end, with the spaces after it, is one space
    assert x.shape == (70, 80)
    assert "".join(LETTERS[code] for code in x[0]) == ("ab cd" * 16)
    assert [LETTERS[code] for code in y[:6]] == ["a", "b", " ", "c", "d", "a"]
    assert (train, test) == (63, 70)
    assert windows("short")[2:] == (0, 0)
    assert windows("a" * 1080)[2:] == (900, 979)


def test_leafs_own_samples(data_dir: str, tmp_path: Path) -> None:
    """LEAF's sampled windows, and the same ones cut from the text of their speakers."""
    here = Path(data_dir) / "shakespeare"
    for path in here.glob("all_data*"):
        (tmp_path / path.name).symlink_to(path)
    data = load("shakespeare", str(tmp_path))
    assert (len(data.y_train), len(data.y_test), data.classes, data.input_shape) == (41_990, 3881, 80, (80,))
    assert data.owners is not None
    assert np.bincount(data.owners).tolist() == [823, 7528, 2146, 2483, 2340, 6099, 2895, 2533, 1353, 13790]
    texts = reading.read_json(here / "leaf_speakers.json.gz")
    (path,) = here.glob("*_train_*")
    users = [user for user, _, _ in leaf.users_of(path)]
    tests = 0
    for number, user in enumerate(users[:-1]):  # of the last one LEAF has taken a sample
        x, y, train, test = windows(texts[user]["text"])
        assert np.array_equal(x[:train], data.x_train[data.owners == number])
        assert np.array_equal(y[:train], data.y_train[data.owners == number])
        assert np.array_equal(x[test:], data.x_test[tests : tests + len(x) - test])
        tests += len(x) - test
    assert tests == 3881 - 1454
    batch, labels = examples_to_train(data).batch(torch.tensor([0]))
    assert "".join(LETTERS[code] for code in batch[0]).startswith("Here, mighty Theseus. There is a brief how")
    assert LETTERS[int(labels[0])] == "w"


def test_texts_by_speaker(data_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "LEAST_TEXT", 40_000)  # the others take a while
    data = load("shakespeare", data_dir)
    assert data.owners is not None
    counts = np.bincount(data.owners)
    assert len(counts) == len(
        partition_by(Config(dataset="shakespeare", model="lstm", split="natural"), data, len(counts))
    )
    assert counts.min() > 25_000
    assert data.x_train.dtype == np.uint8


def test_tinyshakespeare(data_dir: str, tmp_path: Path) -> None:
    (tmp_path / "tinyshakespeare.txt").symlink_to(Path(data_dir) / "shakespeare" / "tinyshakespeare.txt")
    data = load("shakespeare", str(tmp_path))
    assert data.owners is not None
    assert 100 < data.owners.max() < 300
    first = "".join(LETTERS[code] for code in data.x_train[0])
    assert first == "Before we proceed any further, hear me speak. You are all resolved rather to die"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"A": 3}', r'speakers.json: expected a json object, speaker -> \{"play"'),
        ('{"A": {"text": 3}}', r'speakers.json: expected a json object, speaker -> \{"play"'),
        ('{"A": {"text": "short"}}', r"speakers.json: expected speakers with 1000 or more characters, found none"),
    ],
)
def test_malformed_texts(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "leaf_speakers.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        load("shakespeare", str(tmp_path))


def test_malformed_plays(tmp_path: Path) -> None:
    (tmp_path / "tinyshakespeare.txt").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"tinyshakespeare.txt: expected plain text: "):
        load("shakespeare", str(tmp_path))


def test_malformed_windows(tmp_path: Path) -> None:
    write(tmp_path / "test" / "a.json", {"A": {"x": ["a" * 80], "y": ["b"]}})
    for x, y, message in (("a" * 79, "b", "strings of 80 characters in x"), ("a" * 80, "bb", "single characters in y")):
        write(tmp_path / "train" / "a.json", {"A": {"x": [x], "y": [y]}})
        with pytest.raises(ConfigError, match=f"a.json: A: expected {message}"):
            load("shakespeare", str(tmp_path))
