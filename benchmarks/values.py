"""Measure accuracy and bytes by how values travel: as float32, bfloat16, float16 or int8, in both directions.

The shipped app runs on one data set, in this process, one client after another. Each seed has one exploration and one
float32 run that all formats share. Accuracy is the mean of the last five rounds. ``loss`` is float32's accuracy minus
the format's, over the same seeds; ``standard_error`` is that of their mean difference. A format is ``within`` its limit
if the loss is at most 0.3 points or two standard errors. ``times_smaller`` compares the train messages, up and down,
with float32's. The last line is JSON.

    python -m benchmarks.values --dataset mnist --data-dir DIR --seeds 3 --rounds 40
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoflip_flwr.core.choices import VALUES
from autoflip_flwr.experiment.data.dataset import Data
from autoflip_flwr.experiment.data.load import load
from autoflip_flwr.experiment.rules import Value
from benchmarks import recipes, tables
from benchmarks.recipes import ROOT
from benchmarks.sparsity import run

LIMIT = 0.3
COLUMNS = {
    "values": "values",
    "accuracy": "accuracy %",
    "loss": "loss against float32",
    "standard_error": "standard error",
    "up_times_smaller": "up, times smaller",
    "down_times_smaller": "down, times smaller",
}


def cut(data: Data, examples: int, folder: str) -> None:
    """Write the first examples of a data set, which are not sorted, in the form that the app reads."""
    for part, count in (("train", examples), ("test", examples // 4)):
        np.save(Path(folder, f"x_{part}.npy"), getattr(data, f"x_{part}")[:count])
        np.save(Path(folder, f"y_{part}.npy"), getattr(data, f"y_{part}")[:count])


def measure(base: dict[str, Value], nodes: int, seeds: int) -> list[dict[str, Any]]:
    """Return a row for each format of the values."""
    found: dict[str, list[tuple[float, dict[str, Any]]]] = {kind: [] for kind in VALUES}
    with tempfile.TemporaryDirectory() as output:
        for seed in range(1, seeds + 1):
            exploration = ""
            for kind in VALUES:
                settings = {**base, "seed": seed, "output-dir": output, "values": kind, "exploration": exploration}
                folder, accuracy, told = run(settings, nodes)
                exploration = exploration or str(folder / "exploration.safetensors")
                found[kind].append((accuracy, told["bytes"]))
                print(f"seed {seed}, {kind}: {accuracy:.2f} %, {told['seconds_total']:.0f} s", file=sys.stderr)
    return [_row(kind, found[kind], found["float32"]) for kind in VALUES]


def _row(
    kind: str, runs: list[tuple[float, dict[str, Any]]], plain: list[tuple[float, dict[str, Any]]]
) -> dict[str, Any]:
    losses = [before - after for (before, _), (after, _) in zip(plain, runs, strict=True)]
    loss = statistics.mean(losses)
    error = statistics.stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else 0.0
    return {
        "values": kind,
        "accuracy": round(statistics.mean(accuracy for accuracy, _ in runs), 2),
        "accuracies": [round(accuracy, 2) for accuracy, _ in runs],
        "loss": round(loss, 2),
        "standard_error": round(error, 2),
        "within": loss <= max(LIMIT, 2 * error),
        **{
            f"{way}_times_smaller": round(
                sum(moved[f"train_{way}"] for _, moved in plain) / sum(moved[f"train_{way}"] for _, moved in runs), 3
            )
            for way in ("up", "down")
        },
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="mnist", choices=["mnist", "cifar10"])
    parser.add_argument("--data-dir", default="", help="folder of the data; default: $AUTOFLIP_DATA")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--examples", type=int, default=20_000, help="training examples; a quarter of it tests")
    recipes.add_pairs(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    own: dict[str, Value] = {"split": "dirichlet", "alpha": 0.3, "local-epochs": 1, "num-server-rounds": options.rounds}
    own |= {"exploration-epochs": 2, "lr": 0.001}
    base = recipes.settings_of(ROOT / "configs" / f"{options.dataset}.toml", options.pairs, own)
    with tempfile.TemporaryDirectory() as folder:
        cut(load(options.dataset, options.data_dir or os.environ.get("AUTOFLIP_DATA", "")), options.examples, folder)
        rows = measure({**base, "data-dir": folder}, int(base["nodes"]), options.seeds)
    tables.head(COLUMNS.values())
    for row in rows:
        tables.row(row[key] for key in COLUMNS)
    print(json.dumps({"rows": rows, "settings": {key: value for key, value in base.items() if value != ""}}))


if __name__ == "__main__":
    main()
