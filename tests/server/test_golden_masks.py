"""The masks and models that AutoFLIP makes are those of ``golden/masks.json``, digest by digest.

The file was made before the package was divided into rooms. ``python -m tests.server.test_golden_masks`` writes it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedMedian, Strategy

from autoflip_flwr import AutoFlip, autoflip_mod
from autoflip_flwr.core.choices import NORMALISATIONS, WEIGHTINGS
from autoflip_flwr.core.methods import LossExploration
from autoflip_flwr.server.settings import Values
from autoflip_flwr.testing import LocalGrid

FILE = Path(__file__).parents[1] / "golden" / "masks.json"

Arrays = dict[str, np.ndarray]

SHAPES = {
    "conv.weight": (8, 3, 3, 3),
    "conv.bias": (8,),
    "norm.weight": (8,),
    "norm.running_mean": (8,),
    "body.weight": (16, 72),
    "body.bias": (16,),
    "tied.weight": (12, 16),
    "head.weight": (12, 16),
    "frozen.weight": (5, 12),
}
STRATEGIES = {
    "FedAvg": lambda: FedAvg(fraction_train=0.75, fraction_evaluate=0.0),
    "FedAvgM": lambda: FedAvgM(fraction_evaluate=0.0, server_momentum=0.9, server_learning_rate=0.1),
    "FedAdam": lambda: FedAdam(fraction_evaluate=0.0, eta=0.01),
    "FedMedian": lambda: FedMedian(fraction_evaluate=0.0),
}
MASKS: dict[str, dict[str, Any]] = {
    f"{scope} {normalisation} {gamma} {sparsity} {weighting}": {
        "sparsity": sparsity,
        "method": LossExploration.static(scope=scope, normalisation=normalisation, gamma=gamma, weighting=weighting),
    }
    for scope, normalisation, gamma, sparsity, weighting in itertools.product(
        ("global", "layer"), NORMALISATIONS, (0.0, 1.0, 0.5), (0.3, 0.9), WEIGHTINGS
    )
}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "int8": {"values": "int8"},
    "bfloat16 down": {"values": Values(down="bfloat16")},
    "dense": {"coordinates": "dense"},
    "scouts": {"method": LossExploration.static(initial="explorers")},
    "unmoved, biases": {"method": LossExploration.static(prune_unmoved=True), "biases": True},
    "float32 deltas": {"values": Values(deltas="float32"), "method": LossExploration.static(batches=2)},
    "few explorers": {"method": LossExploration.static(explorers=0.5), "output": None},
    "schedule": {"mask_schedule": lambda round_, mask, _: every_other(mask) if round_ == 2 else None},
}


def every_other(mask: Any) -> Any:
    """The mask with each second entry of the body's weights turned round."""
    keep = {name: np.array(flags) for name, flags in mask.keep.items()}
    keep["body.weight"].reshape(-1)[::2] ^= True
    return type(mask).from_bool(mask.layout, keep)


def initial() -> Arrays:
    rng = np.random.default_rng(1)
    arrays: Arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    arrays["head.weight"] = arrays["tied.weight"].copy()
    return {**arrays, "steps": np.array(3)}


def client() -> ClientApp:
    """Clients whose work depends on their partition, the round and the phase alone."""
    app = ClientApp(mods=[autoflip_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        arrays = {name: array.numpy() for name, array in message.content["arrays"].items()}
        config, part = message.content["config"], int(context.node_config["partition-id"])
        common = np.random.default_rng(7)
        own = np.random.default_rng([part, int(config["server-round"]), int("autoflip-phase" in config)])
        for name, shape in SHAPES.items():
            if not name.startswith("frozen"):
                step = 0.02 * common.standard_normal(shape) + 0.01 * own.standard_normal(shape)
                arrays[name] = (arrays[name] + step).astype(np.float32)
        arrays["head.weight"] = arrays["tied.weight"].copy()
        arrays["steps"] = np.asarray(arrays["steps"] + 1)
        metrics = MetricRecord({"num-examples": 10 + 5 * part, "train-loss": 1.0})
        return Message(RecordDict({"arrays": ArrayRecord(to_flower(arrays)), "metrics": metrics}), reply_to=message)

    return app


def to_flower(arrays: Arrays) -> Any:
    from flwr.app import Array

    return {name: Array(array) for name, array in arrays.items()}


def digest(arrays: Arrays) -> str:
    found = hashlib.sha256()
    for name, array in arrays.items():
        found.update(f"{name} {array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def run(strategy: Strategy, rounds: int, **settings: Any) -> dict[str, Any]:
    """The mask's and the model's digest, and the bytes of the messages (compressed parts as zlib made them here)."""
    settings = {"sparsity": 0.6, "method": LossExploration.static(), "seed": 3, "nodes": 4} | settings
    autoflip = AutoFlip(strategy, **settings)
    result = autoflip.start(
        LocalGrid(client(), 4), ArrayRecord(to_flower(initial())), rounds, train_config=ConfigRecord({"lr": 0.1})
    )
    assert autoflip.mask is not None
    found = {"mask": autoflip.mask.digest, "kept": autoflip.mask.kept}
    if rounds:
        found["model"] = digest({name: array.numpy() for name, array in result.arrays.items()})
        found["train bytes up"] = autoflip.ledger.bytes_by_phase()["train_up"]
    return found


def made() -> dict[str, Any]:
    found: dict[str, Any] = {f"mask: {name}": run(FedAvg(), 0, **settings) for name, settings in MASKS.items()}
    for strategy, make in STRATEGIES.items():
        for name, settings in MODELS.items():
            found[f"model: {strategy}, {name}"] = run(make(), 3, **settings)
    return found


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads(FILE.read_text("utf-8"))


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_the_golden_ones(name: str, golden: dict[str, Any]):
    assert run(FedAvg(), 0, **MASKS[name]) == golden[f"mask: {name}"]


@pytest.mark.runs
@pytest.mark.parametrize("settings", MODELS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_models_are_the_golden_ones(strategy: str, settings: str, golden: dict[str, Any]):
    assert run(STRATEGIES[strategy](), 3, **MODELS[settings]) == golden[f"model: {strategy}, {settings}"]


def main() -> None:
    rows = [f"{json.dumps(name)}: {json.dumps(found)}" for name, found in made().items()]
    FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n", "utf-8")


if __name__ == "__main__":
    main()
