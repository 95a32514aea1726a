"""Test honest clients whose updates differ in norm: with FedAvg alone, and under AutoFLIP with nothing pruned.

    python -m benchmarks.honest --rounds 20 --seeds 3

Three situations on MNIST (an MLP in NumPy; the data are in $AUTOFLIP_DATA):

- ``sites``: five clients with 20 examples, and one with 4,000.
- ``stragglers``: FedProx, five clients with 200 examples; three have time for one step per round, two for 25.
- ``sizes``: twelve clients whose numbers of examples are log-normal, from a few to a few thousand.

AutoFLIP runs with its default norm rule and with stricter ones (``--norm-factor``). It prints one row of a markdown
table per rule. The last line is one JSON object. Accuracy is that of the last round on the 10,000 test images, as the
mean over the seeds. Next to it is the number of rejected replies.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from flwr.serverapp.strategy import FedAvg, FedProx, Strategy
from numpy.typing import NDArray

from autoflip_flwr import AutoFlip, autoflip_mod
from autoflip_flwr.core.layout import Arrays
from autoflip_flwr.experiment.data.dataset import Data
from autoflip_flwr.experiment.data.load import load
from autoflip_flwr.replies.quarantine import ReplyRules
from autoflip_flwr.testing import LocalGrid
from autoflip_flwr.wire.records import to_arrays, to_record
from benchmarks import digits, tables

HIDDEN, LEARNING_RATE = 32, 0.05

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Site:
    """A client: its images (n, pixels), labels (n,), steps per round (default: one epoch) and batch size."""

    images: Floats
    labels: NDArray[np.int64]
    steps: int | None = None
    batch: int = digits.BATCH


def client_app(sites: Sequence[Site], seed: int = 0, mods: Sequence[Mod] = (autoflip_mod,)) -> ClientApp:
    """Return a client with plain mini-batch SGD. All randomness follows from (seed, round, partition)."""
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        config = message.content.config_records["config"]
        part = int(context.node_config["partition-id"])
        site, draw = sites[part], np.random.default_rng([seed, int(config["server-round"]), part])  # type: ignore[arg-type]
        start = _floats(message.content.array_records["arrays"])
        weights, losses = {name: array.copy() for name, array in start.items()}, []
        count = len(site.labels)
        order, last = draw.permutation(count), site.steps or -(-count // site.batch)
        for step in range(last):
            batch = order.take(range(step * site.batch, (step + 1) * site.batch), mode="wrap")[:count]
            loss, gradients = digits.loss_and_gradients(weights, site.images[batch], site.labels[batch])
            losses.append(loss)
            for name, array in weights.items():
                pull = float(config.get("proximal-mu", 0.0)) * (array - start[name])  # type: ignore[arg-type]
                array -= np.float32(LEARNING_RATE) * (gradients[name] + pull)
        metrics = MetricRecord({"num-examples": count, "train_loss": float(np.mean(losses))})
        return Message(RecordDict({"arrays": to_record(weights), "metrics": metrics}), reply_to=message)

    return app


def mlp(pixels: int, seed: int = 0) -> Arrays:
    """Return the initial arrays of an MLP with one hidden layer, for ten classes."""
    draw = np.random.default_rng(seed)

    def weight(units: int, inputs: int) -> Floats:
        return draw.normal(scale=np.sqrt(2 / inputs), size=(units, inputs)).astype(np.float32)

    return {
        "hidden.weight": weight(HIDDEN, pixels),
        "hidden.bias": np.zeros(HIDDEN, np.float32),
        "out.weight": weight(digits.CLASSES, HIDDEN),
        "out.bias": np.zeros(digits.CLASSES, np.float32),
    }


def sites_of(sizes: Sequence[int], seed: int) -> list[Site]:
    """Return sites of these sizes, with disjoint training images."""
    order = np.random.default_rng(seed).permutation(len(_mnist().y_train))
    return [_site(part) for part in np.split(order[: sum(sizes)], np.cumsum(sizes)[:-1])]


def stragglers(seed: int) -> list[Site]:
    """Return five sites with 200 images, in batches of 100; three have time for one step per round, two for 25."""
    return [
        dataclasses.replace(site, steps=steps, batch=100)
        for site, steps in zip(sites_of([200] * 5, seed), (1, 1, 1, 25, 25), strict=True)
    ]


def log_normal(seed: int) -> list[Site]:
    """Return twelve sites whose sizes are log-normal, from 4 images to 6,000."""
    sizes = np.random.default_rng(seed).lognormal(mean=4.0, sigma=2.0, size=12)
    return sites_of([int(size) for size in np.clip(sizes, 4, 6000)], seed)


def _mnist() -> Data:
    return load("mnist", os.environ.get("AUTOFLIP_DATA", ""))


def _site(examples: NDArray[np.int64]) -> Site:
    return Site(_pixels(_mnist().x_train[np.sort(examples)]), _mnist().y_train[np.sort(examples)])


def _pixels(images: NDArray[np.uint8]) -> Floats:
    return (images.reshape(len(images), -1) / np.float32(255)).astype(np.float32)


def _fedavg() -> Strategy:
    return FedAvg(fraction_evaluate=0.0)


SITUATIONS: dict[str, tuple[Callable[[int], list[Site]], Callable[[], Strategy]]] = {
    "sites": (lambda seed: sites_of([20] * 5 + [4000], seed), _fedavg),
    "stragglers": (stragglers, lambda: FedProx(fraction_evaluate=0.0, proximal_mu=0.01)),
    "sizes": (log_normal, _fedavg),
}
"""By name: functions that make the sites for a seed, and the strategy."""


def accuracy(sites: Sequence[Site], strategy: Strategy, rounds: int, seed: int) -> tuple[float, int]:
    """Return the accuracy of the last round's model, and the number of rejected replies."""
    random.seed(seed)
    images, labels = _pixels(_mnist().x_test), _mnist().y_test
    grid = LocalGrid(client_app(sites, seed), len(sites))
    result = strategy.start(grid, to_record(mlp(images.shape[1], seed)), rounds)
    guesses = digits.forward(_floats(result.arrays), images)[1].argmax(axis=1)
    left_out = strategy.ledger.failures["rejected"] if isinstance(strategy, AutoFlip) else 0
    return float((guesses == labels).mean()), left_out


def _floats(record: ArrayRecord) -> dict[str, Floats]:
    """Return the arrays as float32, since FedAdam and QFedAvg send float64."""
    return {name: array.astype(np.float32) for name, array in to_arrays(record).items()}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="federated rounds of a run (default: 20)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... to average over (default: 3)")
    parser.add_argument("--norm-factor", type=float, default=[10.0], nargs="*", help="stricter rules (default: 10)")
    options = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    rules = {"default": ReplyRules()} | {f"{each:g}": ReplyRules(norm_factor=each) for each in options.norm_factor}
    methods: dict[str, Callable[[Strategy], Strategy]] = {"alone": lambda inner: inner}
    for name, rule in rules.items():
        methods[f"norm_factor {name}"] = lambda inner, rule=rule: AutoFlip(inner, sparsity=0.0, rules=rule)  # type: ignore[misc]
    tables.head(["situation", *methods])
    table: dict[str, dict[str, dict[str, float]]] = {}
    for situation, (sites, inner) in SITUATIONS.items():
        row = table[situation] = {}
        for name, method in methods.items():
            runs = [accuracy(sites(seed), method(inner()), options.rounds, seed) for seed in range(options.seeds)]
            row[name] = {"accuracy": float(np.mean([run[0] for run in runs])), "left_out": sum(run[1] for run in runs)}
        tables.row([situation, *(f"{100 * cell['accuracy']:.1f} ({cell['left_out']})" for cell in row.values())])
    print(json.dumps({**vars(options), "table": table}))


if __name__ == "__main__":
    main()
