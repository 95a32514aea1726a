import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoflip_flwr.experiment.config import ConfigError
from autoflip_flwr.experiment.data import load
from autoflip_flwr.experiment.partition import partition

module = importlib.import_module("autoflip_flwr.experiment.partition")
ROOT = Path(__file__).resolve().parents[2]
SPLITS = ("iid", "dirichlet", "pathological")


def split_of(labels: np.ndarray | None = None, **changes: Any) -> tuple[np.ndarray, ...]:
    given: dict[str, Any] = {
        "dataset": "digits",
        "split": "dirichlet",
        "num_partitions": 10,
        "seed": 1,
        "alpha": 0.3,
        "classes_per_client": 2,
    }
    return partition(load("digits").y_train if labels is None else labels, **(given | changes))


def same(one: tuple[np.ndarray, ...], two: tuple[np.ndarray, ...]) -> bool:
    return len(one) == len(two) and all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def assert_split(parts: tuple[np.ndarray, ...], examples: int, clients: int) -> None:
    assert len(parts) == clients
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(examples))
    for part in parts:
        assert part.dtype == np.int64
        assert len(part)
        assert (np.diff(part) > 0).all()


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AUTOFLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("clients", [5, 10, 50])
def test_every_digit_goes_to_one_client(split: str, clients: int) -> None:
    assert_split(split_of(split=split, num_partitions=clients, alpha=0.5), 1437, clients)


@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.sampled_from([-3, 0, 4, 9]), min_size=1, max_size=60),
    split=st.sampled_from(SPLITS),
    clients=st.integers(1, 12),
    classes=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_split_is_complete_or_refused(labels: list[int], split: str, clients: int, classes: int, seed: int) -> None:
    y = np.array(labels)
    try:
        parts = split_of(y, split=split, num_partitions=clients, classes_per_client=classes, alpha=1.0, seed=seed)
    except ConfigError:
        return
    assert_split(parts, len(y), clients)
    if split == "pathological":
        assert {len(np.unique(y[part])) for part in parts} == {classes}


@pytest.mark.parametrize("split", SPLITS)
def test_seed_decides(split: str, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = split_of(split=split)
    monkeypatch.setenv("AUTOFLIP_CACHE", str(fresh_cache / "second"))
    assert same(split_of(split=split), first)
    assert not same(split_of(split=split, seed=2), first)


@pytest.mark.parametrize(("clients", "classes"), [(5, 2), (10, 1), (20, 2), (3, 4), (1, 10), (60, 3)])
def test_pathological_clients_have_few_classes_and_every_class_a_client(clients: int, classes: int) -> None:
    y = load("digits").y_train
    parts = split_of(split="pathological", num_partitions=clients, classes_per_client=classes)
    held = [set(y[part].tolist()) for part in parts]
    assert {len(each) for each in held} == {classes}
    assert set.union(*held) == set(range(10))


def test_few_pathological_clients_get_classes_by_seed() -> None:
    y = load("digits").y_train
    pairs = {
        frozenset(y[part].tolist())
        for seed in range(4)
        for part in split_of(split="pathological", num_partitions=5, seed=seed)
    }
    assert len(pairs) > 5


def test_iid_clients_are_even_and_mixed() -> None:
    y = load("digits").y_train
    parts = split_of(split="iid")
    assert sorted(map(len, parts)) == [143] * 3 + [144] * 7
    assert all(len(np.unique(y[part])) == 10 for part in parts)


def test_alpha_sets_the_skew() -> None:
    y = load("digits").y_train

    def largest_share(alpha: float) -> float:
        return float(np.mean([np.bincount(y[p]).max() / len(p) for p in split_of(alpha=alpha)]))

    assert largest_share(0.1) > 0.4
    assert largest_share(1000.0) < 0.2


def test_real_mnist(data_dir: str) -> None:
    y = load("mnist", data_dir).y_train
    parts = split_of(y, dataset="mnist", num_partitions=20)
    assert_split(parts, 60_000, 20)
    assert min(map(len, parts)) >= 10


def test_cached_split_is_read_without_flwr_datasets(fresh_cache: Path) -> None:
    code = (
        "import sys, numpy as np\n"
        "from autoflip_flwr.experiment.partition import partition\n"
        "parts = partition(np.arange(100) % 10, dataset='d', split='iid', num_partitions=4, seed=1, alpha=1.0,\n"
        "                  classes_per_client=2)\n"
        "print(len(parts), 'datasets' in sys.modules, 'torch' in sys.modules)\n"
    )
    split_of(np.arange(100) % 10, dataset="d", split="iid", num_partitions=4, alpha=1.0)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["4", "False", "False"]
    assert len(list(fresh_cache.rglob("*"))) == 2  # the folder and its one file


def test_each_argument_has_its_own_cache_entry(fresh_cache: Path) -> None:
    y = np.arange(200) % 10
    changes: list[dict[str, Any]] = [{}, {"dataset": "other"}, {"split": "iid"}, {"num_partitions": 9}, {"seed": 2}]
    changes += [{"alpha": 0.9}, {"classes_per_client": 3}]
    for change in changes:
        split_of(y, **({"alpha": 1.0} | change))
    split_of(y[::-1], alpha=1.0)
    assert len(list(fresh_cache.rglob("*.npz"))) == len(changes) + 1


def _garbage(path: Path, _: np.ndarray) -> None:
    path.write_bytes(b"not a zip")


def _truncated(path: Path, _: np.ndarray) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def _empty(path: Path, _: np.ndarray) -> None:
    path.write_bytes(b"")


def _flipped(path: Path, _: np.ndarray) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def _missing(path: Path, indices: np.ndarray) -> None:
    np.savez(path, indices=indices)


def _other_clients(path: Path, indices: np.ndarray) -> None:
    np.savez(path, indices=indices, sizes=np.array([len(indices) - 1, 1]))


def _not_covering(path: Path, indices: np.ndarray) -> None:
    sizes = np.full(10, len(indices) // 10)
    np.savez(path, indices=np.zeros(sizes.sum(), np.int64), sizes=sizes)


def _fractions(path: Path, indices: np.ndarray) -> None:
    np.savez(path, indices=indices, sizes=np.full(10, len(indices) / 10))


def _pickled(path: Path, indices: np.ndarray) -> None:
    np.savez(path, indices=indices.astype(object), sizes=np.full(10, 1))


@pytest.mark.parametrize(
    "damage", [_garbage, _truncated, _empty, _flipped, _missing, _other_clients, _not_covering, _fractions, _pickled]
)
def test_damaged_cache_is_recomputed(fresh_cache: Path, damage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = split_of()
    (path,) = fresh_cache.rglob("*.npz")
    damage(path, np.concatenate(expected))
    assert same(split_of(), expected)
    monkeypatch.setattr(module, "_compute", lambda *_: pytest.fail("not repaired"))
    assert same(split_of(), expected)


def test_unwritable_cache_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = split_of()
    (tmp_path / "file").touch()
    monkeypatch.setenv("AUTOFLIP_CACHE", str(tmp_path / "file"))
    assert same(split_of(), expected)


def test_neither_network_nor_output(
    fresh_cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("went online"))
    for split in SPLITS:
        split_of(split=split)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "shards"}, "split = 'shards': must be one of iid, dirichlet, pathological"),
        ({"num_partitions": 0}, "cannot split the 1437 examples of digits between 0 clients"),
        ({"num_partitions": 1438, "split": "iid"}, "cannot split the 1437 examples of digits between 1438 clients"),
        ({"seed": -1}, "seed = -1: must be an integer >= 0"),
        ({"alpha": 0.0}, "alpha = 0.0: must be a finite number > 0"),
        ({"alpha": float("nan")}, "alpha = nan: must be a finite number > 0"),
        ({"alpha": 1e-4}, "dirichlet split of digits: no draw left each of 10 clients 2 or more examples"),
        ({"split": "pathological", "classes_per_client": 11}, "classes-per-client = 11: must be within 1 to 10"),
        ({"split": "pathological", "classes_per_client": 0}, "classes-per-client = 0: must be within 1 to 10"),
        (
            {"split": "pathological", "num_partitions": 4},
            "classes-per-client = 2: must be at least 3, so that 4 client",
        ),
        ({"split": "pathological", "num_partitions": 1400}, "a class has fewer examples than clients that need it"),
    ],
)
def test_impossible_splits(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        split_of(**changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_alpha_beyond_the_range_of_floats() -> None:
    with pytest.raises(ConfigError, match="dirichlet split of digits"):
        split_of(alpha=1e308)


def test_labels_must_be_a_vector() -> None:
    with pytest.raises(ConfigError, match="labels must be one-dimensional"):
        split_of(np.zeros((4, 1), np.int64))
