"""Small client apps in NumPy for the in-process tests: a least-squares model with an integer counter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp

from autoflip_flwr import autoflip_mod, current_subspace
from autoflip_flwr.core.budget import BUDGETS
from autoflip_flwr.core.layout import Arrays, Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.methods import LossExploration
from autoflip_flwr.core.selection import narrowed, select, widened
from autoflip_flwr.core.statistics import Accumulator, Exploration
from autoflip_flwr.wire.keys import PHASE_KEY

NO_FAILURES = {"rejected": 0, "errors": 0, "absent": 0}


class Killed(BaseException):
    """As if the process had been killed."""


def model(seed: int = 0) -> Arrays:
    random = np.random.default_rng(seed)
    return {
        "hidden.weight": random.normal(size=(6, 8)).astype(np.float32),
        "hidden.bias": np.zeros(6, np.float32),
        "steps": np.array(0, np.int64),
        "out.weight": random.normal(size=(3, 6)).astype(np.float32),
    }


def record(arrays: Arrays) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


def arrays_of(record_: ArrayRecord) -> Arrays:
    return {name: array.numpy() for name, array in record_.items()}


def same_bytes(left: Arrays, right: Arrays) -> None:
    """Two models have the same arrays in the same order, bit for bit."""
    assert list(left) == list(right)
    for name in left:
        assert (left[name].dtype, left[name].shape) == (right[name].dtype, right[name].shape), name
        assert left[name].tobytes() == right[name].tobytes(), name


def step(arrays: Arrays, context: Context, round_: int, exploring: bool) -> Arrays:
    """A made-up local training that depends on (phase, round, partition) and keeps to the mask."""
    part = int(context.node_config["partition-id"])
    random = np.random.default_rng([int(exploring), round_, part])
    subspace = current_subspace(context)
    result = {}
    for name, array in arrays.items():
        if array.dtype.kind == "i":
            result[name] = array + 1 + part
            continue
        array = array.astype(np.float32)  # strategies such as FedAdam send float64; a client casts to its model
        moved = (array * 0.9 + 0.1 * random.normal(size=array.shape)).astype(np.float32)
        keep = None if subspace is None else subspace.mask.keep.get(name)
        outside = 0 if subspace is None or subspace.base is None else subspace.base.get(name, 0)
        result[name] = moved if keep is None else np.where(keep, moved, outside).astype(array.dtype)
    return result


def examples(context: Context) -> int:
    return 10 + 7 * int(context.node_config["partition-id"])


def message_app(seen: Callable[[Message, Context], None] | None = None, mods: list | None = None) -> ClientApp:
    """A Message-API app; ``seen`` looks at what its own code gets."""
    app = ClientApp(mods=[autoflip_mod] if mods is None else mods)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if seen is not None:
            seen(message, context)
        config = message.content["config"]
        new = step(arrays_of(message.content["arrays"]), context, max(config["server-round"], 1), PHASE_KEY in config)
        metrics = MetricRecord({"num-examples": examples(context), "train-loss": 1.0})
        return Message(RecordDict({"arrays": record(new), "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        if seen is not None:
            seen(message, context)
        metrics = MetricRecord({"num-examples": examples(context), "loss": 0.5})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def numpy_app(made: list[int] | None = None, mods: list | None = None, floats: bool = False) -> ClientApp:
    """The same client as a ``NumPyClient``; ``made`` collects a node id for each client that is made.

    Flower's clipping mods fail on integers: with ``floats`` the model has no counter.
    """
    names = [name for name, array in model().items() if array.dtype.kind == "f" or not floats]

    class Client(NumPyClient):
        def __init__(self, context: Context) -> None:
            self.context = context

        def fit(self, parameters, config):
            arrays = dict(zip(names, parameters, strict=True))
            new = step(arrays, self.context, max(config["server-round"], 1), PHASE_KEY in config)
            return list(new.values()), examples(self.context), {"train-loss": 1.0}

        def evaluate(self, parameters, config):
            return 0.5, examples(self.context), {}

    def client_fn(context: Context):
        if made is not None:
            made.append(context.node_id)
        return Client(context).to_client()

    return ClientApp(client_fn=client_fn, mods=[autoflip_mod] if mods is None else mods)


def choose(
    layout: Layout,
    score: Mapping[str, np.ndarray],
    sparsity: float,
    scope: str = "global",
    tied: Mapping[str, str] | None = None,
    **options: Any,
) -> Mask:
    """The mask that keeps the highest scores, in the budget of a sparsity."""
    inner = narrowed(layout, tied or {}, ())
    return widened(layout, select(inner, score, BUDGETS[scope](inner, sparsity), **options), tied or {}, ())


def explored(layout: Layout, answers: Iterable[tuple[float, Arrays]], *, per_client: bool = False) -> Exploration:
    """What these explorers found: each one's weight and deltas."""
    method = LossExploration.static(normalisation="per-client" if per_client else "none")
    statistics = Accumulator(layout, method.squares)
    for weight, deltas in answers:
        statistics.add(weight, method.look(layout, {"delta": deltas}))
    return Exploration.of(statistics.result())
