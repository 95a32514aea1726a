"""Compare the seconds of a pruned round with those of a FedAvg round of the shipped app, simulated and deployed.

    python -m benchmarks.round --part all

simulation: `autoflip run` on MNIST, 20 nodes, 5 per round, batches of 350, one local epoch, the small CNN.
deployment: a SuperLink with two SuperNodes on 127.0.0.1, with few optimisation steps, the same in both methods. The
models are the small CNN on digits, and ResNet-18 with BatchNorm and with GroupNorm on 16 synthetic images of
CIFAR-10's shape.

The methods take turns, AutoFLIP first, `--repeats` times each. Seconds come from the run's record, with central
evaluation: the median of the rounds after the first (in which the mask travels and clients load their data), then the
median of the repeats. Start-up (from the command to the server app's first exchange that counts) and exploration are
reported separately. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from autoflip_flwr.experiment.record.circumstances import source_commit
from autoflip_flwr.experiment.rules import Value
from autoflip_flwr.launch import cli
from benchmarks import recipes
from benchmarks.loopback import Loopback

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("autoflip", "fedavg")
SEED = 1
RUN_LIMIT = 3600.0  # seconds per run

Settings = dict[str, Value]
Row = dict[str, Any]

_SHORT: Settings = {**recipes.STATIC, "seed": SEED, "local-epochs": 1, "exploration-epochs": 1, "node-timeout": 300}

SIMULATION: Settings = {**_SHORT, "batch-size": 350, "explorers": 0.25}
"""Settings that override configs/mnist.toml."""

_FEW_STEPS: Settings = {**_SHORT, "nodes": 2, "split": "iid", "fraction-evaluate": 0}
DEPLOYMENT: dict[str, Settings] = {
    "cnn": {**_FEW_STEPS, "dataset": "digits", "batch-size": 64},
    "resnet18": {**_FEW_STEPS, "dataset": "cifar10", "batch-size": 8},
    "resnet18-gn": {**_FEW_STEPS, "dataset": "cifar10", "batch-size": 8},
}
"""Settings by model. ResNet-18: 8 examples per node, hence one step per round."""

LIMITS = {
    ("simulation", "cnn"): 1.10,
    ("deployment", "cnn"): 1.10,
    ("deployment", "resnet18"): 0.6,
    ("deployment", "resnet18-gn"): 0.75,
}


@dataclass(frozen=True)
class Timing:
    """The seconds of one run (a list for its rounds), and its final test accuracy."""

    startup: float
    exploration: float
    rounds: tuple[float, ...]
    accuracy: float
    traffic: int = 0

    @property
    def round(self) -> float:
        """Median of the rounds after the first."""
        return statistics.median(self.rounds[1:])


def read_timing(record: Path, began: float, traffic: int = 0) -> Timing:
    """Read the record of a run whose command was given at `began` (seconds since the epoch).

    `traffic` is the bytes that Flower counted. Raise ValueError for a record with fewer than two rounds, or with
    failures, since such rounds cannot be compared.
    """
    lines = [json.loads(line) for line in (record / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = [line for line in lines if line["phase"] == "train"]
    if [line["round"] for line in trained] != list(range(len(trained))) or len(trained) < 3:
        raise ValueError(f"{record}: expected rounds 0, 1, 2, ..., found {[line['round'] for line in trained]}")
    if any(trained[-1]["failures"].values()):
        raise ValueError(f"{record}: replies are missing: {trained[-1]['failures']}")
    explored = [line["seconds"] for line in lines if line["phase"] == "exploration"]
    return Timing(
        # the server app writes its settings right before its clock starts
        startup=(record / "config.json").stat().st_mtime - began,
        exploration=explored[-1] if explored else 0.0,
        rounds=tuple(after["seconds"] - before["seconds"] for before, after in itertools.pairwise(trained)),
        accuracy=trained[-1]["accuracy"],
        traffic=traffic,
    )


def row(part: str, model: str, found: Mapping[str, Sequence[Timing]]) -> Row:
    """Return the result of one model from the paired repeats of both methods."""
    autoflip, fedavg = (statistics.median(each.round for each in found[method]) for method in METHODS)
    ratio, limit = autoflip / fedavg, LIMITS[part, model]
    pairs = [a.round / b.round for a, b in zip(*(found[method] for method in METHODS), strict=True)]
    every = [each for method in METHODS for each in found[method]]
    result: Row = {
        "part": part,
        "model": model,
        "autoflip_s": autoflip,
        "fedavg_s": fedavg,
        "ratio": ratio,
        "limit": limit,
        "within_limit": ratio <= limit,
        "ratio_spread": [min(pairs), max(pairs)],
        "autoflip_spread_s": _spread(each.round for each in found["autoflip"]),
        "fedavg_spread_s": _spread(each.round for each in found["fedavg"]),
        "startup_s": statistics.median(each.startup for each in every),
        "exploration_s": statistics.median(each.exploration for each in found["autoflip"]),
        "first_round_s": {m: statistics.median(each.rounds[0] for each in found[m]) for m in METHODS},
        "accuracy": {m: found[m][-1].accuracy for m in METHODS},
        "rounds": len(every[0].rounds),
        "repeats": len(pairs),
    }
    if part == "deployment":
        result["network_bytes"] = {m: found[m][-1].traffic for m in METHODS}
    return result


def _spread(values: Iterator[float]) -> list[float]:
    every = list(values)
    return [min(every), max(every)]


def compare(part: str, model: str, repeats: int, run: Callable[[str, Path], int]) -> Row:
    """Run both methods in turn. `run` takes a method and the folder for its record, and returns Flower's bytes."""
    found: dict[str, list[Timing]] = {method: [] for method in METHODS}
    for repeat in range(1, repeats + 1):
        for method in METHODS:
            with tempfile.TemporaryDirectory() as folder:
                began = time.time()
                traffic = run(method, Path(folder))
                (record,) = Path(folder).iterdir()
                last = read_timing(record, began, traffic)
            found[method].append(last)
            rounds = ", ".join(f"{each:.2f}" for each in last.rounds)
            print(
                f"{part}, {model}, {method} {repeat}/{repeats}: {last.round:.2f} s a round ({rounds}), start-up "
                f"{last.startup:.1f} s, exploration {last.exploration:.1f} s, accuracy {last.accuracy:.4f}",
                file=sys.stderr,
                flush=True,
            )
    return row(part, model, found)


def simulate(rounds: int, repeats: int) -> Row:
    """Run the simulation part with the app's own command."""
    data = os.environ.get("AUTOFLIP_DATA") or str(ROOT.parent / "shared" / "data")
    common: Settings = {**SIMULATION, "num-server-rounds": rounds, "data-dir": data}

    def run(method: str, folder: Path) -> int:
        settings: Settings = {**common, "method": method, "output-dir": str(folder)}
        pairs = [f"-c{key}={json.dumps(value)}" for key, value in settings.items()]
        with redirect_stdout(io.StringIO()) as output:  # our own last line must be the result
            code = cli.main(["run", str(ROOT), "--config", str(ROOT / "configs" / "mnist.toml"), *pairs])
        if code:
            raise RuntimeError(f"autoflip run: exit code {code}\n{output.getvalue()[-4000:]}")
        return 0  # Flower counts no traffic in a simulation

    return compare("simulation", "cnn", repeats, run)


def deploy(rounds: int, repeats: int, models: Sequence[str]) -> Iterator[Row]:
    """Run the deployment part, with one SuperLink for all runs."""
    with tempfile.TemporaryDirectory() as data, Loopback(nodes=2) as loopback:
        make_images(Path(data))
        common: Settings = {"num-server-rounds": rounds, "data-dir": data}
        for model in models:

            def run(method: str, folder: Path, model: str = model) -> int:
                settings = {**common, **DEPLOYMENT[model], "model": model, "method": method, "output-dir": str(folder)}
                return int(loopback.run(ROOT, settings, RUN_LIMIT)["network-traffic"]["total-bytes"])

            yield compare("deployment", model, repeats, run)


def make_images(folder: Path, examples: int = 16, test_examples: int = 20) -> None:
    """Write a data folder in CIFAR-10's format, with noise as images and the labels in turn."""
    random = np.random.default_rng(SEED)
    for part, count in (("train", examples), ("test", test_examples)):
        np.save(folder / f"x_{part}.npy", random.integers(0, 256, (count, 32, 32, 3), np.uint8))
        np.save(folder / f"y_{part}.npy", np.arange(count) % 10)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["simulation", "deployment", "all"], default="all")
    parser.add_argument("--models", nargs="+", choices=list(DEPLOYMENT), default=list(DEPLOYMENT), help="to deploy")
    parser.add_argument("--rounds", type=int, help="rounds of a run, at least 2 (default: simulation 10, deployment 5)")
    parser.add_argument("--repeats", type=int, help="runs of each method (default: simulation 3, deployment 2)")
    options = parser.parse_args()
    if (options.rounds or 2) < 2 or (options.repeats or 1) < 1:
        parser.error("at least 2 rounds and 1 repeat")
    began = time.monotonic()
    rows: list[Row] = []
    if options.part != "deployment":
        rows.append(simulate(options.rounds or 10, options.repeats or 3))
    if options.part != "simulation":
        rows += deploy(options.rounds or 5, options.repeats or 2, options.models)
    result = {
        "rows": rows,
        "versions": {name: metadata.version(name) for name in ("flwr", "ray", "torch", "numpy")},
        "machine": {"python": platform.python_version(), "processor": platform.machine(), "cpus": os.cpu_count()},
        "commit": source_commit(ROOT / "autoflip_flwr"),
        "seconds": time.monotonic() - began,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
