"""Splits of a data set: complete, seeded, and the same as flwr-datasets' where that has them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.data.dataset import Data, Inputs
from autoflip_flwr.experiment.data.load import load
from autoflip_flwr.experiment.data.partition import holdings, partition, partition_by, subset
from autoflip_flwr.experiment.rules import ConfigError

ROOT = Path(__file__).resolve().parents[2]
BY_LABEL = ("iid", "dirichlet", "pathological", "shards", "quantity")
Y = np.arange(200) % 10


def split_of(
    labels: np.ndarray | None = None, nodes: int = 10, owners: np.ndarray | None = None, **changes: Any
) -> tuple[np.ndarray, ...]:
    return partition(load("digits").y_train if labels is None else labels, owners, Config(**changes), nodes)


def same(one: tuple[np.ndarray, ...], two: tuple[np.ndarray, ...]) -> bool:
    return len(one) == len(two) and all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def assert_split(parts: tuple[np.ndarray, ...], examples: int, nodes: int) -> None:
    assert len(parts) == nodes
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(examples))
    for part in parts:
        assert part.dtype == np.int64
        assert len(part)
        assert (np.diff(part) > 0).all()


@pytest.mark.parametrize("split", BY_LABEL)
@pytest.mark.parametrize("nodes", [5, 10, 50])
def test_every_digit_goes_to_one_node(split: str, nodes: int) -> None:
    assert_split(split_of(split=split, nodes=nodes, alpha=0.5), 1437, nodes)


@pytest.mark.parametrize(
    ("split", "nodes", "digest"),
    [
        ("iid", 10, "30276569595a57af"),
        ("iid", 5, "840e0e8518ec8916"),
        ("dirichlet", 10, "7fa127334e63cff9"),
        ("dirichlet", 5, "490f86809e932b01"),
        ("pathological", 10, "cfb93f5d2820fd9d"),
        ("pathological", 5, "2c154c64862b0c72"),
    ],
)
def test_the_splits_of_the_digits_stay_as_they_are(split: str, nodes: int, digest: str) -> None:
    parts = split_of(split=split, nodes=nodes)
    sizes = str([len(part) for part in parts]).encode()
    assert hashlib.sha256(b"".join(part.tobytes() for part in parts) + sizes).hexdigest()[:16] == digest


def _theirs(labels: np.ndarray, split: str, nodes: int, seed: int, alpha: float, each: int) -> list[np.ndarray]:
    """Split with flwr-datasets, which takes consecutive examples in the order given."""
    from datasets import Dataset
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, PathologicalPartitioner

    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    classes = np.unique(labels, return_inverse=True)[1]
    per_node, mode = 1, "first-deterministic"
    if split == "pathological" and nodes < classes.max() + 1:
        per_node, each, mode = each, 1, "deterministic"
        classes = rng.permutation(classes.max() + 1)[classes]
    least = max(1, min(10, len(labels) // (50 * nodes)))
    known = {"shuffle": False, "seed": seed}
    partitioner = {
        "iid": lambda: IidPartitioner(nodes),
        "dirichlet": lambda: DirichletPartitioner(nodes, "label", alpha, least, self_balancing=False, **known),
        "pathological": lambda: PathologicalPartitioner(nodes * per_node, "label", each, mode, **known),
    }[split]()
    partitioner.dataset = Dataset.from_dict({"index": order, "label": classes[order]})
    pieces = [np.asarray(partitioner.load_partition(i)["index"], np.int64) for i in range(nodes * per_node)]
    return [np.sort(np.concatenate(pieces[i : i + per_node])) for i in range(0, len(pieces), per_node)]


@pytest.mark.runs
@pytest.mark.filterwarnings("ignore:The specified min_partition_size")
def test_splits_are_those_of_flwr_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    other = np.random.default_rng(0).choice([-3, 0, 4, 9], 300)
    cases = list(product((other, load("digits").y_train), ("iid", "dirichlet", "pathological"), (3, 10), (1, 7)))
    for labels, split, nodes, seed in cases:
        for alpha, each in ((0.3, 2), (5.0, 4)):
            chosen = {"split": split, "seed": seed, "alpha": alpha, "classes_per_client": each}
            try:
                ours = split_of(labels, nodes, **chosen)
            except ConfigError:
                assert split == "pathological"  # too few nodes for all classes
                continue
            assert same(ours, tuple(_theirs(labels, split, nodes, seed, alpha, each)))


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.sampled_from([-3, 0, 4, 9]), min_size=1, max_size=60),
    split=st.sampled_from(BY_LABEL),
    nodes=st.integers(1, 12),
    classes=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_split_is_complete_or_refused(labels: list[int], split: str, nodes: int, classes: int, seed: int) -> None:
    y = np.array(labels)
    try:
        parts = split_of(y, nodes, split=split, classes_per_client=classes, alpha=1.0, seed=seed)
    except ConfigError:
        return
    assert_split(parts, len(y), nodes)
    if split == "pathological":
        assert {len(np.unique(y[part])) for part in parts} == {classes}


@pytest.mark.parametrize("split", BY_LABEL)
def test_seed_decides(split: str) -> None:
    first = split_of(split=split)
    assert same(split_of(split=split), first)
    assert not same(split_of(split=split, seed=2), first)


@pytest.mark.parametrize(("nodes", "classes"), [(5, 2), (10, 1), (20, 2), (3, 4), (1, 10), (60, 3)])
def test_pathological_nodes_have_few_classes_and_every_class_a_node(nodes: int, classes: int) -> None:
    y = load("digits").y_train
    parts = split_of(split="pathological", nodes=nodes, classes_per_client=classes)
    held = [set(y[part].tolist()) for part in parts]
    assert {len(each) for each in held} == {classes}
    assert set.union(*held) == set(range(10))


def test_few_pathological_nodes_get_classes_by_seed() -> None:
    y = load("digits").y_train
    pairs = {
        frozenset(y[part].tolist()) for seed in range(4) for part in split_of(split="pathological", nodes=5, seed=seed)
    }
    assert len(pairs) > 5


def test_iid_nodes_are_even_and_mixed() -> None:
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


def test_a_least_size_is_drawn_for() -> None:
    assert min(map(len, split_of(alpha=0.3))) < 60
    assert min(map(len, split_of(alpha=0.3, min_examples=60))) >= 60


def test_shards_are_of_one_class_each() -> None:
    parts = split_of(Y, 5, split="shards", shards_per_node=2)
    assert [len(part) for part in parts] == [40] * 5
    assert [len(np.unique(Y[part])) for part in parts] == [2] * 5
    assert [len(np.unique(Y[part])) for part in split_of(Y, 10, split="shards", shards_per_node=1)] == [1] * 10


def test_quantities_are_log_normal_above_the_least() -> None:
    y = np.zeros(100_000, int)
    sizes = np.array([len(part) for part in split_of(y, 200, split="quantity", size_spread=1.0)])
    assert sizes.sum() == 100_000
    assert np.log(sizes).std() == pytest.approx(1.0, abs=0.15)
    assert {len(part) for part in split_of(y, 200, split="quantity", size_spread=0.0)} == {500}
    assert min(len(part) for part in split_of(y, 200, split="quantity", size_spread=3.0, min_examples=20)) >= 20
    assert_split(split_of(y[:10], 10, split="quantity", size_spread=5.0), 10, 10)


def test_natural_nodes_are_owners() -> None:
    owners = np.repeat([3, 7, 8, 9], [5, 60, 20, 15])
    owners = owners[np.random.default_rng(0).permutation(100)]
    parts = split_of(Y[:100], 4, owners, split="natural")
    assert [np.unique(owners[part]).tolist() for part in parts] == [[3], [7], [8], [9]]
    assert [len(part) for part in parts] == [5, 60, 20, 15]
    assert_split(parts, 100, 4)


def test_fewer_nodes_than_owners_are_a_choice_by_the_seed() -> None:
    owners = np.repeat(np.arange(20), 10)
    chosen = {
        tuple(int(owners[part[0]]) for part in split_of(Y, 4, owners, split="natural", seed=seed)) for seed in range(6)
    }
    assert len(chosen) == 6
    assert all(list(each) == sorted(set(each)) for each in chosen)
    few = np.repeat(np.arange(20), [1] * 10 + [19] * 10)
    parts = split_of(Y, 10, few, split="natural", min_examples=10)
    assert [int(few[part[0]]) for part in parts] == list(range(10, 20))


def test_a_subset_has_so_many_of_each_class() -> None:
    y = load("digits").y_train
    rows = subset(y, 20, seed=1)
    assert np.bincount(y[rows]).tolist() == [20] * 10
    assert (np.diff(rows) > 0).all()
    assert not np.array_equal(rows, subset(y, 20, seed=2))
    assert np.array_equal(subset(y, 0, seed=1), np.arange(len(y)))
    assert np.array_equal(subset(np.array([1, 1, 0]), 5, seed=1), np.arange(3))
    parts = partition_by(Config(max_examples_per_class=20), load("digits"), 5)
    assert np.array_equal(np.sort(np.concatenate(parts)), rows)


def test_holdings_count_each_nodes_classes() -> None:
    y = np.array([0, 1, 1, 3])
    data = Data("d", np.zeros((4, 1)), y, np.zeros((0, 1)), y[:0], 4, Inputs("signal", (1,)))
    found = holdings(data, (np.array([0, 1]), np.array([2, 3])))
    assert found == {"classes": ["0", "1", "2", "3"], "counts": [[1, 1, 0, 0], [0, 1, 0, 1]]}


def test_real_mnist(data_dir: str) -> None:
    y = load("mnist", data_dir).y_train
    parts = split_of(y, 20)
    assert_split(parts, 60_000, 20)
    assert min(map(len, parts)) >= 10


def test_a_split_is_light() -> None:
    code = (
        "import sys, numpy as np\n"
        "from autoflip_flwr.experiment.config import Config\n"
        "from autoflip_flwr.experiment.data.partition import partition\n"
        "parts = partition(np.arange(100) % 10, None, Config(split='dirichlet', alpha=1.0), 4)\n"
        "print(len(parts), sorted({'datasets', 'flwr', 'torch'} & set(sys.modules)))\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "4 []\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": 1438, "split": "iid"}, "cannot split the 1437 examples of digits between 1438 clients"),
        ({"nodes": 0}, "cannot split the 1437 examples of digits between 0 clients"),
        ({"alpha": 1e-4}, "dirichlet split of digits: no draw left each of 10 clients 2 or more examples"),
        ({"min_examples": 140}, "dirichlet split of digits: no draw left each of 10 clients 140 or more examples"),
        ({"split": "pathological", "classes_per_client": 11}, "classes-per-client = 11: must be within 1 to 10"),
        ({"split": "pathological", "nodes": 4}, "classes-per-client = 2: must be at least 3, so that 4 client"),
        ({"split": "pathological", "nodes": 1400}, "a class has fewer examples than clients that need it"),
        ({"split": "shards", "nodes": 800}, "shards split of digits: 1600 shards need as many examples, and there"),
        ({"split": "quantity", "min_examples": 150}, "quantity split of digits: 10 clients of 150 or more examples"),
        ({"split": "natural"}, "split = 'natural': digits does not say whose an example is; use another split"),
        (
            {"split": "natural", "owners": np.arange(1437) % 9},
            "natural split of digits: 10 clients, and only 9 of 9 owners have 1 or more examples; use at most 9 ",
        ),
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


def test_a_node_keeps_at_most_so_many_examples_of_its_own():
    data = load("digits")
    whole = partition_by(Config(alpha=1.0), data, 5)
    few = partition_by(Config(alpha=1.0, max_examples_per_node=40), data, 5)
    for all_, some in zip(whole, few, strict=True):
        assert len(some) == min(40, len(all_))
        assert set(some) <= set(all_)
        assert (np.diff(some) > 0).all()
    assert len(set(few[0]) ^ set(whole[0][:40])) > 0
