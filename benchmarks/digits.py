"""A small real problem in NumPy: scikit-learn's handwritten digits, an MLP, and Flower's strategies tuned to it.

The tests and benchmarks that run every strategy of Flower share it. 20 rounds with ten nodes take a second or two in
this process. The model learns, so any harm that the mask does to a strategy shows in the accuracy. All randomness
follows from (seed, exploring or not, round, partition).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.clientapp.typing import Mod
from flwr.serverapp.strategy import (
    Bulyan,
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
    QFedAvg,
    Strategy,
)
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from autoflip_flwr import apply_mask, current_subspace
from autoflip_flwr.core.layout import Arrays
from autoflip_flwr.wire.keys import EPOCHS_KEY, PHASE_KEY
from autoflip_flwr.wire.records import to_arrays, to_record

NODES = 10
CLASSES, PIXELS, HIDDEN = 10, 64, 32
TEST_EXAMPLES = 360
BATCH, LEARNING_RATE = 16, 0.3

Floats = NDArray[np.float32]
Weights = dict[str, Floats]


@dataclass(frozen=True)
class Digits:
    """Images (n, 64) in [0, 1] and labels (n,), for training and for testing."""

    train: tuple[Floats, NDArray[np.int64]]
    test: tuple[Floats, NDArray[np.int64]]


@functools.cache
def load() -> Digits:
    """Return the data set, always with the same split."""
    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(labels))
    test, train = order[:TEST_EXAMPLES], order[TEST_EXAMPLES:]
    return Digits((images[train], labels[train]), (images[test], labels[test]))


@functools.cache
def partitions(nodes: int = NODES, alpha: float | None = 1.0, seed: int = 0) -> tuple[NDArray[np.int64], ...]:
    """Return indices of each node's training examples: label-skewed by Dirichlet(``alpha``), never empty.

    ``alpha=None``: IID shards of the same size (a remainder is dropped).
    """
    labels = load().train[1]
    random = np.random.default_rng([seed, nodes])
    if alpha is None:
        order = random.permutation(len(labels))
        return tuple(order[: len(labels) // nodes * nodes].reshape(nodes, -1))
    while True:
        pieces = [
            np.split(members, (np.cumsum(random.dirichlet([alpha] * nodes))[:-1] * len(members)).astype(int))
            for members in (random.permutation(np.flatnonzero(labels == label)) for label in range(CLASSES))
        ]
        parts = tuple(np.concatenate(part) for part in zip(*pieces, strict=True))
        if min(map(len, parts)) > 0:
            return parts


def model(seed: int = 0, *, counter: bool = True) -> Arrays:
    """Return the MLP's initial arrays. ``counter`` adds an integer one, as batch normalisation has."""
    random = np.random.default_rng(seed)

    def weight(units: int, inputs: int) -> Floats:
        return random.normal(scale=np.sqrt(2 / inputs), size=(units, inputs)).astype(np.float32)

    arrays: Arrays = {"hidden.weight": weight(HIDDEN, PIXELS), "hidden.bias": np.zeros(HIDDEN, np.float32)}
    if counter:
        arrays["steps"] = np.array(0, np.int64)
    return arrays | {"out.weight": weight(CLASSES, HIDDEN), "out.bias": np.zeros(CLASSES, np.float32)}


def forward(weights: Mapping[str, Floats], images: Floats) -> tuple[Floats, Floats]:
    """Return the hidden units (n, units) and the logits (n, classes) of images (n, pixels)."""
    hidden = np.maximum(images @ weights["hidden.weight"].T + weights["hidden.bias"], 0)
    return hidden, hidden @ weights["out.weight"].T + weights["out.bias"]


def loss_and_gradients(weights: Weights, images: Floats, labels: NDArray[np.int64]) -> tuple[float, Weights]:
    """Return the mean cross entropy of a batch, and its gradients."""
    hidden, logits = forward(weights, images)
    logits -= logits.max(axis=1, keepdims=True)
    log_shares = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    rows = np.arange(len(labels))
    error = np.exp(log_shares)
    error[rows, labels] -= 1
    error /= len(labels)
    back = (error @ weights["out.weight"]) * (hidden > 0)
    return float(-log_shares[rows, labels].mean()), {
        "hidden.weight": back.T @ images,
        "hidden.bias": back.sum(axis=0),
        "out.weight": error.T @ hidden,
        "out.bias": error.sum(axis=0),
    }


def train(
    start: Weights,
    images: Floats,
    labels: NDArray[np.int64],
    random: np.random.Generator,
    *,
    epochs: int = 1,
    masked: Context | None = None,
    proximal_mu: float = 0.0,
) -> tuple[Weights, float, int]:
    """Train by mini-batch SGD in float32. Return new weights, the mean training loss, and the number of steps.

    ``masked`` is the context whose mask is applied after every step. ``proximal_mu`` is FedProx's.
    """
    weights = {name: array.copy() for name, array in start.items()}
    losses, subspace = [], None if masked is None else current_subspace(masked)
    for _ in range(epochs):
        order = random.permutation(len(labels))
        for batch in (order[first : first + BATCH] for first in range(0, len(order), BATCH)):
            loss, gradients = loss_and_gradients(weights, images[batch], labels[batch])
            losses.append(loss)
            for name, array in weights.items():
                array -= LEARNING_RATE * (gradients[name] + proximal_mu * (array - start[name]))
            if subspace is not None:
                apply_mask(weights, subspace)
    return weights, float(np.mean(losses)), len(losses)


def accuracy(arrays: Mapping[str, NDArray[np.generic]]) -> float:
    """Return the share of test images that are classified correctly."""
    images, labels = load().test
    weights = {name: array.astype(np.float32) for name, array in arrays.items() if array.dtype.kind == "f"}
    return float((forward(weights, images)[1].argmax(axis=1) == labels).mean())


def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Evaluate centrally (Flower's ``evaluate_fn``)."""
    return MetricRecord({"accuracy": accuracy(to_arrays(arrays))})


def client_app(mods: Sequence[Mod], *, masked: bool = True, alpha: float | None = 1.0, seed: int = 0) -> ClientApp:
    """Return a Message-API client with these mods. It trains one epoch, or as many as an exploration asks for.

    ``masked`` says whether it keeps pruned weights fixed while it trains, or ignores the mask.
    """
    app = ClientApp(mods=list(mods))

    @app.train()
    def handle(message: Message, context: Context) -> Message:
        config = message.content.config_records["config"]
        part, nodes = int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
        server_round = max(int(config["server-round"]), 1)  # type: ignore[arg-type]  # explorers draw as in round 1
        mine = partitions(nodes, alpha, seed)[part]
        images, labels = load().train
        arrays = to_arrays(message.content.array_records["arrays"])
        weights, loss, steps = train(
            # FedAdam and QFedAvg send float64
            {name: array.astype(np.float32) for name, array in arrays.items() if array.dtype.kind == "f"},
            images[mine],
            labels[mine],
            np.random.default_rng([seed, PHASE_KEY in config, server_round, part]),
            epochs=int(config.get(EPOCHS_KEY, 1)),  # type: ignore[arg-type]
            masked=context if masked else None,
            proximal_mu=float(config.get("proximal-mu", 0.0)),  # type: ignore[arg-type]
        )
        new = {name: weights[name] if name in weights else array + steps for name, array in arrays.items()}
        metrics = MetricRecord({"num-examples": len(mine), "train_loss": loss})  # QFedAvg reads this key
        return Message(RecordDict({"arrays": to_record(new), "metrics": metrics}), reply_to=message)

    return app


def _averaging(kind: Callable[..., Strategy], **tuned: float) -> Callable[..., Strategy]:
    # no federated evaluation, since Flower's clipping mods answer evaluate messages with an error
    return lambda nodes, **options: kind(**{"fraction_evaluate": 0.0, **tuned, **options})


def _private(kind: Callable[..., Strategy], **tuned: float) -> Callable[..., Strategy]:
    fedavg = _averaging(FedAvg)
    return lambda nodes, **options: kind(
        fedavg(nodes, **options), noise_multiplier=0.05, num_sampled_clients=nodes, **tuned
    )


STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "FedAvg": _averaging(FedAvg),
    "FedAvgM": _averaging(FedAvgM, server_momentum=0.5),
    "FedAdam": _averaging(FedAdam, eta=0.05),
    "FedYogi": _averaging(FedYogi, eta=0.05),
    "FedAdagrad": _averaging(FedAdagrad, eta=0.1),
    "FedProx": _averaging(FedProx, proximal_mu=0.1),
    "QFedAvg": _averaging(QFedAvg, client_learning_rate=1.0),
    "FedMedian": _averaging(FedMedian),
    "FedTrimmedAvg": _averaging(FedTrimmedAvg, beta=0.1),
    "Krum": _averaging(Krum, num_malicious_nodes=1),
    "MultiKrum": lambda nodes, **options: _averaging(MultiKrum, num_malicious_nodes=1, num_nodes_to_select=nodes - 3)(
        nodes, **options
    ),
    "Bulyan": _averaging(Bulyan, num_malicious_nodes=1),
    "DifferentialPrivacyServerSideFixedClipping": _private(
        DifferentialPrivacyServerSideFixedClipping, clipping_norm=1.5
    ),
    "DifferentialPrivacyServerSideAdaptiveClipping": _private(
        DifferentialPrivacyServerSideAdaptiveClipping, initial_clipping_norm=1.5, clip_norm_lr=0.05
    ),
    "DifferentialPrivacyClientSideFixedClipping": _private(
        DifferentialPrivacyClientSideFixedClipping, clipping_norm=1.5
    ),
    "DifferentialPrivacyClientSideAdaptiveClipping": _private(
        DifferentialPrivacyClientSideAdaptiveClipping, initial_clipping_norm=1.5, clip_norm_lr=0.05
    ),
}
"""All of Flower's strategies by name, with settings under which this problem is learnt.

Each takes the number of nodes per round (at least 7). Options by name are FedAvg's, or those of the strategy's own
class. A privacy wrapper passes them to the FedAvg inside.
"""

_MODS: dict[str, list[Mod]] = {
    "DifferentialPrivacyClientSideFixedClipping": [fixedclipping_mod],
    "DifferentialPrivacyClientSideAdaptiveClipping": [adaptiveclipping_mod],
}


def mods_for(name: str) -> list[Mod]:
    """Return Flower's client mods that the strategy needs, to be placed after ``autoflip_mod``."""
    return _MODS.get(name, [])
