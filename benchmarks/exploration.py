"""Compare explorers' deltas in 8 bits with float32: their bytes, and how far the masks agree.

    python -m benchmarks.exploration --datasets mnist cifar10 --data-dir DIR

The shipped app explores twice with the same seed, in this process: once quantised, once not. ``upload_share`` is the
explorers' upload as a share of dense float32 replies. ``agreement`` is the share of kept entries that both masks keep,
by sparsity and by power of the client agreement (``gamma``). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from typing import Any

import numpy as np
import torch

from autoflip_flwr import Layout, Mask
from autoflip_flwr.core.budget import Budget
from autoflip_flwr.core.scores import scores
from autoflip_flwr.core.selection import select
from autoflip_flwr.core.statistics import Exploration
from autoflip_flwr.experiment import training
from autoflip_flwr.experiment.data.load import load
from autoflip_flwr.experiment.models.build import build
from autoflip_flwr.experiment.rules import Value
from autoflip_flwr.storage.exploration_file import read_exploration
from benchmarks import recipes
from benchmarks.recipes import ROOT
from benchmarks.sparsity import run
from benchmarks.values import cut

SPARSITIES = (0.3, 0.5, 0.7, 0.9)


def agreement(mask: Mask, other: Mask) -> float:
    """Return the share of a mask's kept entries that another mask keeps too."""
    ours, theirs = (np.unpackbits(np.frombuffer(each.bits, np.uint8)) for each in (mask, other))
    return float((ours & theirs).sum() / ours.sum())


def measure(dataset: str, base: dict[str, Value]) -> dict[str, Any]:
    """Return one data set's row."""
    data = load(dataset, str(base["data-dir"]))
    initial = training.get_arrays(build(str(base["model"]), data.input_shape, data.classes, int(base["seed"])))
    layout = Layout.of(initial)
    found, uploads = {}, {}
    with tempfile.TemporaryDirectory() as output:
        for values in ("float32", "log8"):
            settings = {**base, "dataset": dataset, "exploration-values": values, "output-dir": output}
            folder, _, told = run({**settings, "num-server-rounds": 1}, int(base["nodes"]))
            found[values] = Exploration.of(read_exploration(folder / "exploration.safetensors", initial).seen)
            uploads[values] = told["bytes"]["exploration_up"]
    agreements = {}
    for gamma in (1.0, 0.0):
        score = {values: scores(exploration, "none", gamma) for values, exploration in found.items()}
        for sparsity in SPARSITIES:
            masks = [select(layout, score[values], Budget.whole(layout, sparsity)) for values in ("float32", "log8")]
            agreements[f"gamma {gamma:g}, sparsity {sparsity:g}"] = round(agreement(*masks), 4)
    return {
        "dataset": dataset,
        "model": base["model"],
        "parameters": layout.size,
        "upload_share": round(uploads["log8"] / uploads["float32"], 4),
        "agreement": agreements,
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", default=["mnist", "cifar10"])
    parser.add_argument("--data-dir", default="", help="folder of the data; default: $AUTOFLIP_DATA")
    parser.add_argument("--examples", type=int, default=20_000, help="training examples")
    recipes.add_pairs(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for dataset in options.datasets:
        own: dict[str, Value] = {"split": "dirichlet", "alpha": 0.3, "local-epochs": 1}
        base = recipes.settings_of(ROOT / "configs" / f"{dataset}.toml", options.pairs, own)
        with tempfile.TemporaryDirectory() as folder:
            cut(load(dataset, options.data_dir or os.environ.get("AUTOFLIP_DATA", "")), options.examples, folder)
            rows.append(measure(dataset, {**base, "data-dir": folder}))
        print(rows[-1], file=sys.stderr)
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
