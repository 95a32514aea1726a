"""Ways to divide labelled examples between nodes: pure functions of the labels and a seed, in NumPy.

`iid`, `dirichlet` and `pathological` give, index by index, what flwr-datasets 0.6.1 gives for the examples in a seeded
order; tests compare them. Its import takes many seconds, which each process of a simulation would pay.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Parts = list[Indices]

DRAWS = 11
"""Times that a Dirichlet split is drawn until every node has enough examples, as in flwr-datasets."""


class SplitError(ValueError):
    """These labels cannot be split in this way. The message says why, and what to change."""


def iid(labels: NDArray[np.integer[Any]], nodes: int, seed: int) -> Parts:
    """Deal the examples evenly, in a random order."""
    return np.array_split(_order(len(labels), seed)[0], nodes)


def dirichlet(labels: NDArray[np.integer[Any]], nodes: int, seed: int, *, alpha: float, least: int) -> Parts:
    """Divide each class in proportions drawn from Dirichlet(`alpha`), again until each node has `least` examples.

    Source: Yurochkin et al., "Bayesian Nonparametric Federated Learning of Neural Networks", 2019, without balancing.
    """
    order, _ = _order(len(labels), seed)
    classes = np.unique(labels, return_inverse=True)[1][order]
    rng = np.random.default_rng(seed)
    by_class = [np.flatnonzero(classes == each) for each in range(classes.max() + 1)]
    for _ in range(DRAWS):
        parts: list[list[Indices]] = [[] for _ in range(nodes)]
        for members in by_class:
            ends = np.cumsum(rng.dirichlet(np.full(nodes, alpha))) * len(members)
            with np.errstate(invalid="ignore"):  # an alpha beyond the range of floats, which the caller tells
                cuts = ends.astype(np.int64)[:-1]
            for part, piece in zip(parts, np.split(members, cuts), strict=True):
                part.append(piece)
        found = [np.concatenate(part) for part in parts]
        if min(map(len, found)) >= least:
            return [order[part] for part in found]
    raise SplitError(
        f"no draw left each of {nodes} clients {least} or more examples; raise alpha, lower min-examples, or use fewer "
        "clients"
    )


def pathological(labels: NDArray[np.integer[Any]], nodes: int, seed: int, *, classes_per_client: int) -> Parts:
    """Give each node exactly `classes_per_client` classes. Each class is divided evenly between its nodes.

    Source: Li et al., "Federated Learning on Non-IID Data Silos", 2021: node i's first class is i modulo their number,
    and more are drawn. Fewer nodes than classes would miss classes so. They get one-class parts, dealt in turn (our
    reading).
    """
    order, rng = _order(len(labels), seed)
    classes = np.unique(labels, return_inverse=True)[1]
    number = int(classes.max()) + 1
    if nodes >= number:
        drawn = np.random.default_rng(seed)
        held = []
        for node in range(nodes):
            mine = [node % number]
            while len(mine) < classes_per_client:
                each = int(drawn.choice(number, size=1)[0])
                if each not in mine:
                    mine.append(each)
            held.append(mine)
        return [order[part] for part in _of_classes(classes[order], held, nodes)]
    classes = rng.permutation(number)[classes]
    count = nodes * classes_per_client
    found = _of_classes(classes[order], [[part % number] for part in range(count)], nodes)
    return [
        order[np.concatenate(found[start : start + classes_per_client])]
        for start in range(0, count, classes_per_client)
    ]


def shards(labels: NDArray[np.integer[Any]], nodes: int, seed: int, *, shards_per_node: int) -> Parts:
    """Sort the examples by class, cut them into equal shards, and deal each node `shards_per_node` of them.

    Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", 2017.
    """
    count = nodes * shards_per_node
    if count > len(labels):
        raise SplitError(f"{count} shards need as many examples, and there are {len(labels)}; lower shards-per-node")
    order, rng = _order(len(labels), seed)
    pieces = np.array_split(order[np.argsort(np.asarray(labels)[order], kind="stable")], count)
    dealt = rng.permutation(count).reshape(nodes, shards_per_node)
    return [np.concatenate([pieces[shard] for shard in mine]) for mine in dealt]


def quantity(labels: NDArray[np.integer[Any]], nodes: int, seed: int, *, spread: float, least: int) -> Parts:
    """Deal the examples in a random order, in amounts in proportion to log-normal draws, on top of `least` each.

    `spread` is the standard deviation of the logarithm of those amounts; 0 is an even split.
    """
    free = len(labels) - nodes * least
    if free < 0:
        raise SplitError(
            f"{nodes} clients of {least} or more examples need {nodes * least}, and there are {len(labels)}; lower "
            "min-examples or use fewer clients"
        )
    order, rng = _order(len(labels), seed)
    weights = np.exp(spread * rng.standard_normal(nodes))
    ends = np.rint(np.cumsum(weights / weights.sum()) * free).astype(np.int64)
    ends[-1] = free
    return np.split(order, (ends + least * np.arange(1, nodes + 1))[:-1])


def natural(owners: NDArray[np.integer[Any]], nodes: int, seed: int, *, least: int) -> Parts:
    """Give each node the examples of one owner: a writer, a speaker, a person.

    With fewer nodes than owners, a random choice of owners takes part (our reading); the others' examples are not used.
    Owners with fewer than `least` examples never take part.
    """
    every = np.argsort(owners, kind="stable")
    ids, starts, counts = np.unique(owners[every], return_index=True, return_counts=True)
    fit = np.flatnonzero(counts >= least)
    if len(fit) < nodes:
        raise SplitError(
            f"{nodes} clients, and only {len(fit)} of {len(ids)} owners have {least} or more examples; use at most "
            f"{len(fit)} clients"
        )
    chosen = np.sort(np.random.default_rng(seed).permutation(fit)[:nodes])
    return [every[starts[owner] : starts[owner] + counts[owner]] for owner in chosen]


def _order(examples: int, seed: int) -> tuple[Indices, np.random.Generator]:
    rng = np.random.default_rng(seed)
    return rng.permutation(examples), rng


def _of_classes(classes: Indices, held: list[list[int]], nodes: int) -> Parts:
    """Divide each class evenly between the parts that hold it."""
    parts: list[list[Indices]] = [[] for _ in held]
    for each in range(classes.max() + 1):
        holders = [part for part, mine in enumerate(held) if each in mine]
        members = np.flatnonzero(classes == each)
        if len(holders) > len(members):
            raise SplitError(
                f"a class has fewer examples than clients that need it; use fewer than {nodes} clients or more data"
            )
        for part, piece in zip(holders, np.array_split(members, len(holders)) if holders else [], strict=True):
            parts[part].append(piece)
    return [np.concatenate(part) for part in parts]
