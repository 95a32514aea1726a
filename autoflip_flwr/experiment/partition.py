"""Split a labelled data set between clients with flwr-datasets' partitioners, once per machine."""

import hashlib
import importlib.metadata
import json
import math
import os
import tempfile
import warnings
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.core.choices import SPLITS
from autoflip_flwr.experiment.config import Config, ConfigError
from autoflip_flwr.experiment.datafiles import cache_dir

Indices = NDArray[np.int64]


def partition(
    labels: NDArray[np.integer[Any]],
    *,
    dataset: str,
    split: str,
    num_partitions: int,
    seed: int,
    alpha: float,
    classes_per_client: int,
) -> tuple[Indices, ...]:
    """Split the examples between clients: every example goes to exactly one client, and no client gets none.

    The result depends on the arguments only. It is cached in `cache_dir()`, because flwr-datasets takes many seconds
    to import, in every actor of a simulation.

    Parameters
    ----------
    labels : ndarray
        Integers (N,), the class of each example.
    dataset : str
        Name of the data set, for the cache and the errors.
    split : str
        `iid`; `dirichlet`: each class is divided in proportions drawn from Dirichlet(alpha); `pathological`: each
        client gets exactly `classes_per_client` classes, and every class gets a client.
    num_partitions : int
        Number of clients, at most N.
    seed : int
        At least 0. It draws the order of the examples and, depending on the split, proportions or classes.
    alpha : float
        Parameter of the Dirichlet split, > 0; the smaller, the more skewed.
    classes_per_client : int
        Parameter of the pathological split, at most the number of classes.

    Returns
    -------
    tuple of ndarray
        One ascending int64 array of indices into `labels` for each client.

    Raises
    ------
    ConfigError
        If the arguments, or the data, allow no such split.
    """
    classes: Indices = np.ascontiguousarray(labels, dtype=np.int64)
    wanted = {
        "dataset": dataset,
        "split": split,
        "num_partitions": num_partitions,
        "seed": seed,
        "alpha": alpha,
        "classes_per_client": classes_per_client,
    }
    _check(classes, dataset, split, num_partitions, seed, alpha, classes_per_client)
    key = json.dumps(wanted | {"flwr-datasets": importlib.metadata.version("flwr-datasets")}, sort_keys=True)
    digest = hashlib.sha256(key.encode() + b"\0" + classes.tobytes()).hexdigest()
    path = cache_dir() / "partitions" / f"{digest}.npz"
    parts = _read(path, len(classes), num_partitions)
    if parts is None:
        parts = _compute(classes, dataset, split, num_partitions, seed, alpha, classes_per_client)
        with suppress(OSError):  # without a writable cache the split is only slower
            _write(path, parts)
    return parts


def partition_by(config: Config, labels: Indices, num_partitions: int) -> tuple[Indices, ...]:
    """Call :func:`partition` with the settings. The server and every client get the same split."""
    return partition(
        labels,
        dataset=config.dataset,
        split=config.split,
        num_partitions=num_partitions,
        seed=config.seed,
        alpha=config.alpha,
        classes_per_client=config.classes_per_client,
    )


def _check(
    labels: Indices, dataset: str, split: str, clients: int, seed: int, alpha: float, classes_per_client: int
) -> None:
    if labels.ndim != 1:
        raise ConfigError(f"{dataset}: labels must be one-dimensional, not {labels.shape}")
    if split not in SPLITS:
        raise ConfigError(f"split = {split!r}: must be one of {', '.join(SPLITS)}")
    if not 1 <= clients <= len(labels):
        raise ConfigError(f"cannot split the {len(labels)} examples of {dataset} between {clients} clients")
    if seed < 0:
        raise ConfigError(f"seed = {seed}: must be an integer >= 0")
    if split == "dirichlet" and not (alpha > 0 and math.isfinite(alpha)):
        raise ConfigError(f"alpha = {alpha}: must be a finite number > 0")
    if split == "pathological":
        classes = len(np.unique(labels))
        if not 1 <= classes_per_client <= classes:
            raise ConfigError(
                f"classes-per-client = {classes_per_client}: must be within 1 to {classes}, as {dataset} has"
            )
        if clients * classes_per_client < classes:
            raise ConfigError(
                f"classes-per-client = {classes_per_client}: must be at least {-(-classes // clients)}, so that "
                f"{clients} clients hold all {classes} classes of {dataset}"
            )


def _compute(
    labels: Indices, dataset: str, split: str, clients: int, seed: int, alpha: float, classes_per_client: int
) -> tuple[Indices, ...]:
    # Read when the libraries are first imported. The hub is not needed here.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    from datasets import Dataset
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, PathologicalPartitioner

    rng = np.random.default_rng(seed)
    # The partitioners take consecutive examples in the order given (and the iid one has no seed).
    order = rng.permutation(len(labels))
    classes = np.unique(labels, return_inverse=True)[1]
    per_client = 1
    if split == "iid":
        partitioner = IidPartitioner(clients)
        reason = ""
    elif split == "dirichlet":
        # A fiftieth of an even share, so that draws rarely have to be repeated, but at most a small batch.
        smallest = max(1, min(10, len(labels) // (50 * clients)))
        partitioner = DirichletPartitioner(
            clients, "label", alpha, min_partition_size=smallest, self_balancing=False, shuffle=False, seed=seed
        )
        reason = f"no draw left each of {clients} clients {smallest} or more examples; raise alpha or use fewer clients"
    else:
        reason = f"a class has fewer examples than clients that need it; use fewer than {clients} clients or more data"
        mode = "first-deterministic"  # client i's first class is i modulo their number; more are drawn
        if clients < classes.max() + 1:
            # That would miss classes. One-class parts, dealt in turn, do not, and never repeat a class within a client.
            mode, per_client, classes_per_client = "deterministic", classes_per_client, 1
            classes = rng.permutation(classes.max() + 1)[classes]
        partitioner = PathologicalPartitioner(
            clients * per_client, "label", classes_per_client, mode, shuffle=False, seed=seed
        )
    partitioner.dataset = Dataset.from_dict({"index": order, "label": classes[order]})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one per repeated draw
            pieces = [_index(partitioner.load_partition(i)) for i in range(clients * per_client)]
    except ValueError as error:
        raise ConfigError(f"{split} split of {dataset}: {reason}") from error
    parts = tuple(np.sort(np.concatenate(pieces[i : i + per_client])) for i in range(0, len(pieces), per_client))
    if not _is_split(parts, len(labels)):
        raise ConfigError(
            f"{split} split of {dataset}: the partitioner lost examples; alpha = {alpha} is out of its range"
        )
    return parts


def _index(rows: Any) -> Indices:
    return np.asarray(rows.with_format("numpy")[:]["index"], dtype=np.int64)


def _is_split(parts: tuple[Indices, ...], examples: int) -> bool:
    """Return whether the parts are ascending, not empty, and hold each example exactly once."""
    every = np.sort(np.concatenate(parts))
    ascending = all(len(part) and (np.diff(part) > 0).all() for part in parts)
    return ascending and np.array_equal(every, np.arange(examples))


def _read(path: Path, examples: int, clients: int) -> tuple[Indices, ...] | None:
    """Read a cached split; None if there is none or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            indices, sizes = stored["indices"], stored["sizes"]
        if indices.dtype != np.int64 or sizes.shape != (clients,) or sizes.sum() != len(indices):
            return None
        parts = tuple(np.split(indices, np.cumsum(sizes)[:-1]))
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error):
        return None
    return parts if _is_split(parts, examples) else None


def _write(path: Path, parts: tuple[Indices, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A rename, because other processes may be writing or reading the same file.
    with tempfile.TemporaryDirectory(prefix=".partition-", dir=path.parent) as own:
        file = Path(own) / path.name
        np.savez(file, indices=np.concatenate(parts), sizes=np.array([len(part) for part in parts]))
        file.replace(path)
