"""Your own data: arrays in a folder, one file for each client, a function, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.data.dataset import Data
from autoflip_flwr.experiment.data.load import _load, check_data, load, load_for
from autoflip_flwr.experiment.data.partition import partition_by
from autoflip_flwr.experiment.examples import examples_to_train
from autoflip_flwr.experiment.rules import ConfigError


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOFLIP_CACHE", str(tmp_path / "cache"))


RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
SIGNALS = RNG.standard_normal((6, 2, 7)).astype(np.float32)
FEATURES = RNG.standard_normal((6, 3))
TOKENS = RNG.integers(0, 50, (6, 9))
LABELS = np.array([0, 1, 2, 0, 1, 2])


def folder(path: Path, **arrays: Any) -> str:
    path.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(path / f"{name}.npy", array)
    return str(path)


def batch(data: Data) -> torch.Tensor:
    return examples_to_train(data).batch(torch.arange(len(data.y_train)))[0]


@pytest.mark.parametrize(
    ("x", "kind", "shape"),
    [
        (IMAGES, "image", (3, 5, 4)),
        (IMAGES[..., 0], "image", (1, 5, 4)),
        (SIGNALS, "signal", (2, 7)),
        (FEATURES, "signal", (3,)),
        (TOKENS, "text", (9,)),
        (TOKENS.astype(np.int16), "text", (9,)),
    ],
)
def test_a_folder_of_arrays(tmp_path: Path, x: np.ndarray, kind: str, shape: tuple[int, ...]) -> None:
    owners = np.array(["b", "a", "b", "c", "c", "c"])
    where = folder(tmp_path, x_train=x, y_train=LABELS, x_test=x[:2], y_test=LABELS[:2], owner_train=owners)
    data = load_for(Config(dataset="own", data_dir=where))
    assert (data.inputs.kind, data.input_shape) == (kind, shape)
    assert data.classes == (TOKENS.max() + 1 if kind == "text" else 3)
    assert isinstance(data.x_train, np.memmap)
    assert data.owners is not None
    assert data.owners.tolist() == [1, 0, 1, 2, 2, 2]
    parts = partition_by(Config(dataset="own", split="natural"), data, 3)
    assert [part.tolist() for part in parts] == [[1], [0, 2], [3, 4, 5]]
    inputs = batch(data)
    assert inputs.shape[1:] == shape
    if kind == "text":
        assert torch.equal(inputs, torch.from_numpy(TOKENS))
    else:
        dims = (0, *range(2, inputs.ndim))
        assert torch.allclose(inputs.mean(dims), torch.zeros(shape[0]), atol=1e-4)
        assert torch.allclose(inputs.std(dims, correction=0), torch.ones(shape[0]), atol=1e-4)
    assert check_data(Config(dataset="own", data_dir=where)) is not None


def test_facts_that_the_data_do_not_show(tmp_path: Path) -> None:
    where = folder(tmp_path, x_train=SIGNALS, y_train=LABELS)
    (tmp_path / "about.json").write_text('{"classes": 7, "mean": [1, 2.5], "std": [2, 4]}')
    data = load("own", where)
    assert (data.classes, data.inputs.mean, data.inputs.std) == (7, (1, 2.5), (2, 4))
    assert np.allclose(batch(data), (SIGNALS - np.array([[1], [2.5]])) / np.array([[2], [4]]))
    assert (data.x_test.shape, data.y_test.shape, data.owners) == ((0, 2, 7), (0,), None)


def test_a_channel_that_is_constant_stays_finite(tmp_path: Path) -> None:
    data = load("own", folder(tmp_path, x_train=np.full((3, 2), 5.0), y_train=LABELS[:3]))
    assert (data.inputs.mean, data.inputs.std) == ((5.0, 5.0), (1.0, 1.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_train": IMAGES.transpose(0, 3, 1, 2).repeat(2, 3)}, r"x_train.npy: expected images, uint8 \(N, H, W\)"),
        ({"x_train": np.zeros(6)}, r"x_train.npy: expected images, .*; found float64 \(6,\)"),
        ({"x_train": np.zeros((6, 4), np.uint8)}, r"x_train.npy: expected images, .*; found uint8 \(6, 4\)"),
        ({"x_train": np.zeros((6, 4), complex)}, r"x_train.npy: expected images, .*; found complex128 \(6, 4\)"),
        ({"x_train": np.zeros((6, 4), ">f4")}, r"x_train.npy: expected images, .*; found >f4 \(6, 4\)"),
        ({"x_train": np.zeros((0, 4))}, r"x_train.npy: expected images, .*; found float64 \(0, 4\)"),
        ({"x_train": np.array([{}] * 6)}, r"x_train.npy: expected a plain .npy array: .*Python objects"),
        ({"x_train": np.full((6, 2), np.inf)}, r"x_train.npy: expected finite numbers"),
        ({"y_train": LABELS[:5]}, r"y_train.npy: expected integers \(6,\), one per example, found int64 \(5,\)"),
        ({"y_train": LABELS * 1.0}, r"y_train.npy: expected integers \(6,\), one per example, found float64 \(6,\)"),
        ({"y_train": LABELS - 1}, r"y_train.npy: expected labels 0 to 2, found -1 to 1"),
        ({"x_test": SIGNALS[:, :1]}, r"x_test.npy: expected float32 \(N, 2, 7\), as in training, found float32 \(6, 1"),
        ({"owner_train": LABELS * 0.5}, r"owner_train.npy: expected integers or strings \(6,\)"),
    ],
)
def test_malformed_arrays(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"x_train": SIGNALS, "y_train": LABELS, "x_test": SIGNALS, "y_test": LABELS}
    if "x_train" in change:
        given["x_test"] = change["x_train"][:0] if change["x_train"].dtype != object else SIGNALS
    where = folder(tmp_path, **(given | change))
    for read in (lambda: load("own", where), lambda: check_data(Config(dataset="own", data_dir=where))):
        with pytest.raises(ConfigError, match=message) as caught:
            read()
        assert where in str(caught.value)


def test_a_test_set_needs_labels(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"y_test.npy: missing, and x_test.npy is there"):
        load("own", folder(tmp_path, x_train=SIGNALS, y_train=LABELS, x_test=SIGNALS))


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ("[]", "expected a json object with some of classes, mean, std"),
        ('{"colour": 1}', "expected a json object with some of classes, mean, std"),
        ("{", "expected a json file"),
        ('{"classes": 0}', "classes: expected an integer >= 1, found 0"),
        ('{"classes": 2}', "expected labels 0 to 1, found 0 to 2"),
        ('{"mean": [1, 1]}', "expected both of mean and std, or none"),
        ('{"mean": [1, NaN], "std": [1, 1]}', "mean: expected a list of finite numbers"),
        ('{"mean": 1, "std": [1, 1]}', "mean: expected a list of finite numbers"),
        ('{"mean": [1, 1], "std": [1, 0]}', "std: expected numbers above 0"),
        ('{"mean": [1], "std": [1]}', "mean and std: expected 2 numbers each, one for each channel"),
    ],
)
def test_malformed_facts(tmp_path: Path, about: str, message: str) -> None:
    where = folder(tmp_path, x_train=SIGNALS, y_train=LABELS)
    (tmp_path / "about.json").write_text(about)
    with pytest.raises(ConfigError, match=message):
        load("own", where)


def clients(path: Path, files: dict[str, dict[str, Any]]) -> str:
    path.mkdir(parents=True, exist_ok=True)
    for name, arrays in files.items():
        np.savez(path / f"{name}.npz", **arrays)
    return str(path)


def test_a_file_for_each_client(tmp_path: Path) -> None:
    one = {"x": IMAGES[:2], "y": LABELS[:2], "x_test": IMAGES[5:], "y_test": LABELS[5:]}
    two = {"x": IMAGES[2:5], "y": LABELS[2:5]}
    where = clients(tmp_path, {"b": two, "a": one, "test": {"x": IMAGES[:1], "y": LABELS[:1]}})
    data = load("own", where)
    assert data.owners is not None
    assert data.owners.tolist() == [0, 0, 1, 1, 1]
    assert np.array_equal(data.x_train, IMAGES[:5])
    assert (data.y_train.tolist(), data.y_test.tolist()) == ([0, 1, 2, 0, 1], [2, 0])
    assert isinstance(data.x_train, np.memmap)
    assert data.inputs.mean == tuple(pytest.approx(IMAGES[:5, ..., c].mean() / 255, rel=1e-5) for c in range(3))


@pytest.mark.parametrize(
    ("b", "message"),
    [
        ({"x": IMAGES}, r"b.npz: expected arrays x, y and both or none of x_test, y_test; found \['x'\]"),
        ({"x": IMAGES, "y": LABELS, "z": LABELS}, r"b.npz: expected arrays x, y and both or none of x_test, y_test"),
        ({"x": IMAGES, "y": LABELS, "x_test": IMAGES}, r"b.npz: expected arrays x, y and both or none of x_test"),
        ({"x": SIGNALS, "y": LABELS}, r"b.npz: expected uint8 .* in x, as in .*a.npz, found float32 \(6, 2, 7\)"),
        ({"x": IMAGES, "y": LABELS[:3]}, r"b.npz: expected as many in y as in x, found 3 and 6"),
        ({"x": np.array([{}]), "y": LABELS[:1]}, r"b.npz: expected an .npz file of plain arrays: Object arrays"),
    ],
)
def test_malformed_clients(tmp_path: Path, b: dict[str, Any], message: str) -> None:
    where = clients(tmp_path, {"a": {"x": IMAGES, "y": LABELS}, "b": b})
    with pytest.raises(ConfigError, match=message):
        load("own", where)
    (tmp_path / "b.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(ConfigError, match=r"b.npz: expected an .npz file of plain arrays"):
        load("own", where)


def test_a_function_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_small_sets.py").write_text(
        "import json, numpy as np, pathlib\n"
        "def small(data_dir):\n"
        "    facts = json.loads((pathlib.Path(data_dir) / 'facts.json').read_text())\n"
        "    x, y = np.arange(12.0).reshape(6, 2), np.arange(6) % 3\n"
        "    return {'x_train': x, 'y_train': y, 'x_test': x[:1], 'y_test': y[:1], **facts}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "facts.json").write_text(json.dumps({"classes": 4}))
    config = Config(dataset="my_small_sets:small", data_dir=str(tmp_path))
    data = load_for(config)
    assert (data.name, data.classes, data.input_shape) == ("my_small_sets:small", 4, (2,))
    assert data.inputs.mean == (5.0, 6.0)
    assert np.array_equal(data.x_test, [[0.0, 1.0]])
    assert check_data(config) is None


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("no_such_module:load", "no module no_such_module here"),
        ("json:no_such", "the module json has no no_such"),
        ("os:system", r"called with data_dir='', it failed: TypeError: "),
        ("builtins:dict", "expected a dict with x_train, y_train and some of x_test, y_test, owner_train, classes"),
    ],
)
def test_functions_that_give_no_data(dataset: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(dataset)
    assert str(caught.value).startswith(f"dataset = '{dataset}': ")


def test_text_lies_within_the_classes(tmp_path: Path) -> None:
    where = folder(tmp_path, x_train=TOKENS, y_train=LABELS)
    data = load("own", where)
    assert (data.classes, data.inputs.mean) == (int(TOKENS.max()) + 1, ())
    (tmp_path / "about.json").write_text('{"classes": 20}')
    _load.cache_clear()
    with pytest.raises(ConfigError, match=r"x_train.npy: expected integers within 0 and 19, since the classes are the"):
        load("own", where)
