"""Federated fine-tuning in this process: the head alone first, then more of the model, in one of several ways."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn
from torch.nn import functional

from autoflip_flwr import AutoFlip, Exploration, Ledger, LossExploration, Pruned, Random
from autoflip_flwr.core.method import Method
from autoflip_flwr.core.statistics import Statistics
from autoflip_flwr.experiment.data.splits import dirichlet
from autoflip_flwr.testing import LocalGrid
from autoflip_flwr.torch import autoflip_mod_with, masked_training
from autoflip_flwr.wire.keys import EPOCHS_KEY, PHASE_KEY
from benchmarks.finetune_tasks import Examples, Task

NODES, SHARE, ALPHA, LEAST = 10, 0.5, 0.3, 5
"""Half of ten nodes train in a round; their labels are split by Dirichlet(0.3), so that none has less than five."""
HEAD_ROUNDS, BATCH = 20, 8
LAST = 3
"""Rounds at the end whose accuracy counts."""
FIRST_NODE = 2**62  # ids, and so messages, are as long as a deployment's


@dataclass(frozen=True)
class Way:
    """A way to fine-tune.

    Attributes
    ----------
    part : str
        What is trained and travels: `all`, the `head`, or the head and `adapters`.
    density : float
        Share of the prunable weights that is kept; with 1 nothing is pruned.
    outside : str
        What stands outside the mask: `initial` or `zero`.
    gamma : float
        Exponent of the explorers' agreement.
    explorers : float
        Share of the nodes that explore; 0: the mask is random.
    rank : int
        Of the adapters.
    """

    part: str = "all"
    density: float = 1.0
    outside: str = "initial"
    gamma: float = 1.0
    explorers: float = 1.0
    rank: int = 0

    @property
    def method(self) -> Method:
        """How the mask is chosen: once, before training begins at the pretrained values."""
        if not self.explorers:
            return Random()
        return LossExploration.static(explorers=self.explorers, epochs=1, gamma=self.gamma)

    @property
    def rate(self) -> str:
        """Which of a task's learning rates holds."""
        return self.part if self.part != "all" else "dense" if self.density == 1 else "masked"


@dataclass(frozen=True)
class Start:
    """A model before a run, its examples, and the names of the arrays that are trained and travel."""

    net: nn.Module
    train: Examples
    test: Examples
    names: Sequence[str]

    @property
    def arrays(self) -> ArrayRecord:
        """The arrays that travel."""
        state = self.net.state_dict()
        return ArrayRecord({name: state[name] for name in self.names})


Explored = tuple[Exploration | Statistics, dict[str, float]]
"""What the explorers have found, and its cost."""


class Runs:
    """Fine-tune a task in several ways from one seed.

    All ways begin with the same head, which the nodes have trained alone for `HEAD_ROUNDS` rounds, and those with the
    same explorers share an exploration. Each is charged with both.

    Parameters
    ----------
    task : Task
        The model and its data.
    rounds : int
        With one local epoch each, after those of the head.
    seed : int
        Decides the new head, the split, and the order of the examples.
    rates : Mapping[str, float]
        Learning rates that replace the task's own.
    """

    def __init__(self, task: Task, rounds: int, seed: int, rates: Mapping[str, float] | None = None) -> None:
        self._task, self._rounds, self._seed = task, rounds, seed
        self._rates = {**task.rates, **(rates or {})}
        self._parts = dirichlet(task.train[1].numpy(), NODES, seed, alpha=ALPHA, least=LEAST)
        self._explored: dict[float, Explored] = {}

    def row(self, way: Way) -> dict[str, Any]:
        """Run a way and return its accuracy in %, and its bytes in MB (10^6).

        Raises
        ------
        RuntimeError
            If a node failed: the row would not say what it seems to.
        """
        if way.part == "head":
            strategy, accuracies, _ = self._fit(self._head_start, way, HEAD_ROUNDS + self._rounds)
            before = 0
        else:
            strategy, accuracies, _ = self._fit(self._start(way), way, self._rounds)
            before = self._head[1]
        moved, mask = strategy.ledger.bytes_by_phase(), strategy.mask
        assert mask is not None
        return {
            "accuracy": round(100 * statistics.mean(accuracies), 2),
            "mb": round((before + moved["total"]) / 1e6, 2),
            "head_mb": round(before / 1e6, 2),
            "exploration_mb": round((moved["exploration_up"] + moved["exploration_down"]) / 1e6, 2),
            "mask_mb": round(moved["mask_down"] / 1e6, 2),
            "kept": mask.kept,
            "never_pruned": mask.layout.size - mask.layout.prunable_size,
            "size": mask.layout.size,
        }

    @functools.cached_property
    def _head(self) -> tuple[ArrayRecord, int]:
        """The head that the nodes have trained alone, and the bytes that this took."""
        strategy, _, arrays = self._fit(self._head_start, Way("head"), HEAD_ROUNDS)
        return arrays, strategy.ledger.bytes_by_phase()["total"]

    @functools.cached_property
    def _head_start(self) -> Start:
        """The new head, with the features of all examples: the rest does not change."""
        net = self._task.make(self._seed).eval()

        def seen(examples: Examples) -> Examples:
            with torch.no_grad():
                return torch.cat([self._task.features(net, some) for some in batches(examples[0], 100)]), examples[1]

        head = nn.Sequential()
        head.add_module(self._task.head, net.get_submodule(self._task.head))
        return Start(head, seen(self._task.train), seen(self._task.test), list(head.state_dict()))

    def _start(self, way: Way) -> Start:
        net = self._task.make(self._seed)
        net.load_state_dict(self._head[0].to_torch_state_dict(), strict=False)
        names = list(net.state_dict())
        if way.part == "adapters":
            assert self._task.adapt is not None
            net = self._task.adapt(net, way.rank)
            names = [name for name, each in net.named_parameters() if each.requires_grad]
        return Start(net, self._task.train, self._task.test, names)

    def _fit(self, start: Start, way: Way, rounds: int) -> tuple[Pruned, list[float], ArrayRecord]:
        """Return the strategy after its run, the accuracy of the last rounds, and the arrays at the end."""
        accuracies: list[float] = []

        def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            if server_round <= rounds - LAST:
                return None
            start.net.load_state_dict(arrays.to_torch_state_dict(), strict=False)
            accuracies.append(accuracy(start.net, *start.test))
            return MetricRecord({"accuracy": accuracies[-1]})

        with unchanged(start.net):
            strategy = self._strategy(start, way)
            result = strategy.start(self._grid(start, way), start.arrays, rounds, evaluate_fn=evaluate)
        if sum(strategy.ledger.failure_counts().values()):
            raise RuntimeError(f"nodes failed: {strategy.ledger.incidents[0]['reason']}")
        return strategy, accuracies, result.arrays

    def _strategy(self, start: Start, way: Way) -> Pruned:
        strategy = _fedavg()
        if way.density == 1:
            return AutoFlip(strategy, 0.0, seed=self._seed)
        options: dict[str, Any] = {"outside": way.outside, "exclude": f"{self._task.head}.*", "seed": self._seed}
        ledger = Ledger()
        if way.explorers:
            if way.explorers not in self._explored:
                asking = Pruned(_fedavg(), 0.5, method=way.method, **options)
                with unchanged(start.net):
                    asking.start(self._grid(start, way), start.arrays, 0)
                assert asking.exploration is not None
                self._explored[way.explorers] = asking.exploration, asking.ledger.exploration_only()
            options["exploration"], cost = self._explored[way.explorers]
            ledger.charge_exploration(cost)
        return Pruned(strategy, round(1 - way.density, 6), method=way.method, ledger=ledger, **options)

    def _grid(self, start: Start, way: Way) -> LocalGrid:
        # clients have the pretrained model, and the head that they have trained
        base = {name: value.clone() for name, value in start.net.state_dict().items()}
        app = ClientApp(mods=[autoflip_mod_with(base=base)])

        @app.train()
        def handle(message: Message, context: Context) -> Message:
            config = message.content.config_records["config"]
            part = int(context.node_config["partition-id"])
            start.net.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict(), strict=False)
            masked_training(start.net, context)
            exploring = PHASE_KEY in config  # which trains all
            rate = self._rates["dense" if exploring else way.rate]
            draws = [self._seed, exploring, int(config["server-round"]), part]  # type: ignore[arg-type]
            epochs = int(config.get(EPOCHS_KEY, 1))  # type: ignore[arg-type]
            mine = torch.from_numpy(self._parts[part])
            inputs, labels = start.train
            train(start.net, inputs[mine], labels[mine], rate, np.random.default_rng(draws), epochs)
            metrics = MetricRecord({"num-examples": len(mine)})
            return Message(RecordDict({"arrays": start.arrays, "metrics": metrics}), reply_to=message)

        return LocalGrid(app, NODES, serialise=False, first=FIRST_NODE)


def _fedavg() -> FedAvg:
    return FedAvg(fraction_train=SHARE, fraction_evaluate=0.0)


@contextmanager
def unchanged(net: nn.Module) -> Iterator[None]:
    """Set a model back at the end."""
    before = {name: value.clone() for name, value in net.state_dict().items()}
    try:
        yield
    finally:
        net.load_state_dict(before)


def train(
    net: nn.Module, inputs: Tensor, labels: Tensor, rate: float, random: np.random.Generator, epochs: int
) -> None:
    """Train with Adam. Batch normalisation keeps to its statistics: a node has too few examples for others."""
    net.eval()
    optimizer = torch.optim.Adam([each for each in net.parameters() if each.requires_grad], lr=rate, fused=True)
    for _ in range(epochs):
        for batch in batches(torch.from_numpy(random.permutation(len(labels))), BATCH):
            optimizer.zero_grad()
            functional.cross_entropy(net(inputs[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()


@torch.no_grad()
def accuracy(net: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Return the share of examples that are classified correctly."""
    net.eval()
    pairs = zip(batches(inputs, 100), batches(labels, 100), strict=True)
    return sum(int((net(some).argmax(1) == truth).sum()) for some, truth in pairs) / len(labels)


def batches(examples: Tensor, size: int) -> list[Tensor]:
    """Cut a tensor into batches."""
    return [examples[at : at + size] for at in range(0, len(examples), size)]
