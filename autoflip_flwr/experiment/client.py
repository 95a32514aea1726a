"""The shipped client: a ``NumPyClient`` behind ``autoflip_mod``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from flwr.app import Context
from flwr.client import Client, NumPyClient
from flwr.clientapp import ClientApp
from numpy.typing import NDArray
from torch import nn

from autoflip_flwr import autoflip_mod, current_rate, current_subspace
from autoflip_flwr.experiment import training
from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.data.load import load_for
from autoflip_flwr.experiment.data.partition import partition_by, subset
from autoflip_flwr.experiment.examples import Examples, examples_to_train
from autoflip_flwr.experiment.extrusion import Extrusion
from autoflip_flwr.experiment.feedback import CutOff
from autoflip_flwr.experiment.guidance import guided
from autoflip_flwr.experiment.models.blank import blank
from autoflip_flwr.experiment.models.build import SMALL, build
from autoflip_flwr.experiment.powerpropagation import as_weights
from autoflip_flwr.experiment.precision import check_precision
from autoflip_flwr.experiment.reporting import report_gradients, report_smallness, when_asked
from autoflip_flwr.experiment.rules import ConfigError
from autoflip_flwr.torch import gradients
from autoflip_flwr.wire.keys import (
    EPOCHS_KEY,
    EXAMPLES_PROCESSED,
    PATIENCE_KEY,
    PHASE_KEY,
    WARMUP_KEY,
    WEIGHT_DECAY_KEY,
)


@lru_cache(maxsize=32)
def _examples(config: Config, data_dir: str, part: int, parts: int) -> Examples:
    """Return one node's examples: all of the folder's if `parts` is 0."""
    data = load_for(config, data_dir)
    if parts:
        return examples_to_train(data, partition_by(config, data, parts)[part])
    return examples_to_train(data, subset(data.y_train, config.max_examples_per_class, config.seed))


def _model(config: Config, shape: tuple[int, ...], kind: str, classes: int, device: torch.device) -> nn.Module:
    """Return a model to train. Its parameters do not matter, since each message brings all of its state."""
    model = build(config.model, shape, classes, config.seed, kind=kind).to(device)
    check_precision(model, blank(1, shape, kind, device), config.precision)
    return model


_shared_model = lru_cache(maxsize=2)(_model)


class LocalClient(NumPyClient):
    """Trains the app's model on one node's examples.

    Parameters
    ----------
    config : Config
        The app's settings.
    part : int
        The node's partition, which also enters the seed of all its randomness.
    examples : Examples
        Its examples.
    classes : int
        How many classes the data set has.
    context : Context
        The node's context, which holds the mask in force and what the server asks for.
    """

    def __init__(self, config: Config, part: int, examples: Examples, classes: int, context: Context) -> None:
        self._config, self._part, self._context = config, part, context
        device = training.choose_device(config.device)
        self._examples = examples.to(device)
        inputs = examples.inputs
        # the nodes of a process share a model, but for the user's own, which may keep something from one to the next
        make = _model if ":" in config.model else _shared_model
        self._model = make(config, inputs.shape, inputs.kind, classes, device)
        self._threads = 1 if config.model in SMALL else None  # so results do not depend on the number of CPUs

    def fit(
        self, parameters: list[NDArray[Any]], config: dict[str, Any]
    ) -> tuple[list[NDArray[Any]], int, dict[str, Any]]:
        """Train from these parameters; in the exploration phase, as explorers do."""
        training.set_arrays(self._model, parameters)
        exploring = PHASE_KEY in config
        round_ = max(int(config.get("server-round", 1)), 1)  # 0 while exploring, with round 1's learning rate
        seed = training.seed_of(self._config.seed, int(exploring), round_, self._part)
        subspace = current_subspace(self._context)
        asked, more = "" if exploring else when_asked(self._context), 0
        with training.threads(self._threads):
            if exploring and EPOCHS_KEY not in config:  # no training: the server asks for gradients
                done = self._report(seed)
            else:
                if asked == "before":
                    more = self._report(seed).examples
                cut_off = None
                if subspace is not None and self._config.in_effect("cut_feedback"):
                    cut_off = CutOff(self._model, subspace.mask, self._context)
                    cut_off.put_back()
                with self._scaled(config, exploring):
                    done = training.train(
                        self._model,
                        self._examples,
                        self._config,
                        epochs=int(config[EPOCHS_KEY]) if exploring else self._config.local_epochs,
                        patience=int(config[PATIENCE_KEY]) if exploring else None,
                        weight_decay=float(config.get(WEIGHT_DECAY_KEY, self._config.weight_decay)),
                        lr=self._config.lr * self._config.lr_decay ** (round_ - 1) * current_rate(self._context),
                        # explorers are drawn to nothing, as they have no weight decay: their deltas are the measurement
                        proximal_mu=0.0 if exploring else float(config.get("proximal-mu", self._config.proximal_mu)),
                        mask=subspace if cut_off is None else None,
                        seed=seed,
                        extrusion=Extrusion.asked(config, self._model, None if subspace is None else subspace.mask),
                        warmup=float(config.get(WARMUP_KEY, 0.0)),
                    )
                if cut_off is not None:
                    cut_off.remember()
                if asked == "after":
                    report_smallness(self._model, self._context)
                    more = self._report(seed).examples
        arrays = list(training.get_arrays(self._model).values())
        metrics = {"train-loss": done.loss, "epochs": done.epochs, EXAMPLES_PROCESSED: done.examples + more}
        return arrays, len(self._examples), metrics

    def _report(self, seed: int) -> training.Trained:
        with as_weights(self._model, self._config.in_effect("powerpropagation")):
            return report_gradients(self._model, self._examples, self._config, self._context, seed)

    def _scaled(self, config: dict[str, Any], exploring: bool) -> AbstractContextManager[None]:
        """Return the block in which to train: it scales gradients, or reports an explorer's."""
        if exploring:
            return gradients(self._model, self._context)  # nothing, unless the server asks for them
        return guided(self._model, self._context, config) if self._config.method == "fedlex" else nullcontext()

    def evaluate(self, parameters: list[NDArray[Any]], config: dict[str, Any]) -> tuple[float, int, dict[str, Any]]:
        """Return loss and accuracy of these parameters on the node's own examples."""
        training.set_arrays(self._model, parameters)
        power = self._config.in_effect("powerpropagation")
        with training.threads(self._threads), as_weights(self._model, power):
            loss, accuracy = training.evaluate(self._model, self._examples)
        return loss, len(self._examples), {"accuracy": accuracy}


def client_fn(context: Context) -> Client:
    """Make the client of a node. ``data-dir`` in the node config overrides that in the run config.

    Nodes that have the whole data set and ``num-partitions`` in their node config each train on their partition. A node
    with its own ``data-dir`` and no ``num-partitions`` trains on all of that folder.
    """
    config = Config.from_run_config(context.run_config, check_paths=False)
    node = context.node_config
    part, parts = node.get("partition-id"), node.get("num-partitions", 0 if "data-dir" in node else None)
    if type(part) is not int or type(parts) is not int or part < 0 or ("num-partitions" in node and part >= parts):
        raise ConfigError(
            f"node config partition-id = {part}, num-partitions = {parts}: must be numbers, the first less; "
            "only a node with a data-dir may do without num-partitions"
        )
    data_dir = str(node.get("data-dir", config.resolved_data_dir))
    examples = _examples(config, data_dir, part, parts)
    return LocalClient(config, part, examples, load_for(config, data_dir).classes, context).to_client()


app = ClientApp(client_fn=client_fn, mods=[autoflip_mod])
