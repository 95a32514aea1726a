"""Split a data set's training examples between nodes, as the settings say."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.data import splits
from autoflip_flwr.experiment.data.dataset import Data
from autoflip_flwr.experiment.data.splits import Indices, SplitError
from autoflip_flwr.experiment.rules import ConfigError


@lru_cache(maxsize=8)
def partition_by(config: Config, data: Data, nodes: int) -> tuple[Indices, ...]:
    """Split the training examples between nodes. The server and every client get the same split.

    No example goes to two nodes, and no node gets none. The result depends on the arguments only.

    Parameters
    ----------
    config : Config
        Names the split and its settings, among them the seed, `max-examples-per-class` and `max-examples-per-node`.
    data : Data
        The data set.
    nodes : int
        Number of nodes.

    Returns
    -------
    tuple of ndarray
        One ascending int64 array of indices into `data.x_train` for each node.

    Raises
    ------
    ConfigError
        If the settings, or the data, allow no such split.
    """
    rows = subset(data.y_train, config.max_examples_per_class, config.seed)
    owners = None if data.owners is None else data.owners[rows]
    parts = partition(data.y_train[rows], owners, config, nodes)
    return tuple(
        rows[_some(part, config.max_examples_per_node, [config.seed, node])] for node, part in enumerate(parts)
    )


def _some(part: Indices, most: int, seed: list[int]) -> Indices:
    """Return `most` random ones of a node's indices, ascending; all where `most` is 0 or more than there are."""
    if not 0 < most < len(part):
        return part
    return np.sort(np.random.default_rng(seed).permutation(part)[:most])


def subset(labels: Indices, most: int, seed: int) -> Indices:
    """Return ascending indices of at most `most` random examples of each class, of all where `most` is 0."""
    if not most:
        return np.arange(len(labels))
    order = np.random.default_rng([seed, most]).permutation(len(labels))
    chosen = [order[labels[order] == each][:most] for each in np.unique(labels)]
    return np.sort(np.concatenate(chosen))


def partition(
    labels: NDArray[np.integer[Any]], owners: NDArray[np.integer[Any]] | None, config: Config, nodes: int
) -> tuple[Indices, ...]:
    """Split labelled examples: see :func:`partition_by`.

    Parameters
    ----------
    labels : ndarray
        Integers (N,), the class of each example.
    owners : ndarray | None
        Integers (N,), the natural client of each example, if there is one.
    config : Config
        The settings.
    nodes : int
        Number of nodes, at most N.
    """
    classes: Indices = np.ascontiguousarray(labels, dtype=np.int64)
    _check(classes, owners, config, nodes)
    seed, least = config.seed, max(1, config.min_examples)
    try:
        if config.split == "iid":
            found = splits.iid(classes, nodes, seed)
        elif config.split == "dirichlet":
            # A fiftieth of an even share, so that draws rarely have to be repeated, but at most a small batch.
            usual = max(1, min(10, len(classes) // (50 * nodes)))
            found = splits.dirichlet(classes, nodes, seed, alpha=config.alpha, least=config.min_examples or usual)
        elif config.split == "pathological":
            found = splits.pathological(classes, nodes, seed, classes_per_client=config.classes_per_client)
        elif config.split == "shards":
            found = splits.shards(classes, nodes, seed, shards_per_node=config.shards_per_node)
        elif config.split == "quantity":
            found = splits.quantity(classes, nodes, seed, spread=config.size_spread, least=least)
        else:
            assert owners is not None
            found = splits.natural(owners, nodes, seed, least=least)
    except SplitError as error:
        raise ConfigError(f"{config.split} split of {config.dataset}: {error}") from error
    parts = tuple(np.sort(part) for part in found)
    if not _is_split(parts, len(classes), config.split != "natural"):
        raise ConfigError(
            f"{config.split} split of {config.dataset}: it lost examples; alpha = {config.alpha} is out of its range"
        )
    return parts


def holdings(data: Data, parts: tuple[Indices, ...]) -> dict[str, object]:
    """Return who holds what: `{"classes": names, "counts": for each node its examples of each class}`."""
    counts = [np.bincount(data.y_train[part], minlength=data.classes).tolist() for part in parts]
    return {"classes": [str(each) for each in range(data.classes)], "counts": counts}


def _check(labels: Indices, owners: NDArray[np.integer[Any]] | None, config: Config, nodes: int) -> None:
    dataset = config.dataset
    if labels.ndim != 1:
        raise ConfigError(f"{dataset}: labels must be one-dimensional, not {labels.shape}")
    if not 1 <= nodes <= len(labels):
        raise ConfigError(f"cannot split the {len(labels)} examples of {dataset} between {nodes} clients")
    if config.split == "natural" and owners is None:
        raise ConfigError(f"split = 'natural': {dataset} does not say whose an example is; use another split")
    if config.split == "pathological":
        each, classes = config.classes_per_client, len(np.unique(labels))
        if each > classes:
            raise ConfigError(f"classes-per-client = {each}: must be within 1 to {classes}, as {dataset} has")
        if nodes * each < classes:
            raise ConfigError(
                f"classes-per-client = {each}: must be at least {-(-classes // nodes)}, so that "
                f"{nodes} clients hold all {classes} classes of {dataset}"
            )


def _is_split(parts: tuple[Indices, ...], examples: int, whole: bool) -> bool:
    """Return whether the parts are ascending, not empty, and hold each example once, or, if not `whole`, at most."""
    every = np.concatenate(parts)
    ascending = all(len(part) and (np.diff(part) > 0).all() for part in parts)
    counts = np.bincount(every, minlength=examples)
    return ascending and bool((counts == 1).all() if whole else (counts <= 1).all())
