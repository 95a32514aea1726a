"""Train in float32 and in bfloat16 autocast: seconds per step on one thread, and accuracy after a short training.

Both begin from the same model and see the same batches. They take turns, an epoch each, in this process, so that the
ratio of their times holds on a busy machine too. ``ratio`` is bfloat16's seconds per step by float32's: below 1 it is
faster. A case is a model and its data set. The last line is JSON.

    python -m benchmarks.precision --cases twocnn:cifar10 resnet8-gn:cifar10 har-cnn:har --data-dir DIR
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from typing import Any

import numpy as np
import torch

from autoflip_flwr.core.choices import PRECISIONS
from autoflip_flwr.experiment import training
from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.data.load import load
from autoflip_flwr.experiment.examples import examples_to_test, examples_to_train
from autoflip_flwr.experiment.models.blank import blank
from autoflip_flwr.experiment.models.build import build
from autoflip_flwr.experiment.precision import check_precision, has_bfloat16
from autoflip_flwr.experiment.rules import ConfigError
from benchmarks import tables

TESTED = 2000
COLUMNS = {
    "model": "model",
    "dataset": "data set",
    "steps": "steps",
    "float32_ms": "float32, ms a step",
    "bfloat16_ms": "bfloat16, ms a step",
    "ratio": "ratio",
    "float32_accuracy": "float32, accuracy %",
    "bfloat16_accuracy": "bfloat16, accuracy %",
}


def measure(case: str, data_dir: str, batch_size: int, examples: int, epochs: int) -> dict[str, Any]:
    """Return one case's row.

    Parameters
    ----------
    case : str
        `MODEL:DATASET`, as the app names them.
    data_dir : str
        Folder of the data.
    batch_size, examples, epochs : int
        How long to train: on so many training examples, chosen at random. At most `TESTED` others are tested.
    """
    model, dataset = case.split(":")
    data = load(dataset, data_dir)
    choose = np.random.default_rng(0).permutation
    seen = examples_to_train(data, np.sort(choose(len(data.y_train))[:examples]))
    test = examples_to_test(data, np.sort(choose(len(data.y_test))[:TESTED]))
    nets = {}
    for precision in PRECISIONS:
        nets[precision] = build(model, data.input_shape, data.classes, 1, kind=data.inputs.kind)
        check_precision(nets[precision], blank(1, data.input_shape, data.inputs.kind), precision)
    steps = math.ceil(len(seen) / batch_size)
    seconds: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    for epoch in range(epochs):
        for precision, net in nets.items():
            config = Config(batch_size=batch_size, precision=precision)
            plain: dict[str, Any] = {"patience": None, "lr": 0.001, "weight_decay": 0.0, "mask": None}
            began = time.perf_counter()
            training.train(net, seen, config, epochs=1, seed=epoch, **plain)
            seconds[precision].append((time.perf_counter() - began) / steps)
    row: dict[str, Any] = {"model": model, "dataset": dataset, "batch_size": batch_size, "steps": steps * epochs}
    for precision, net in nets.items():
        row[f"{precision}_ms"] = round(1000 * statistics.median(seconds[precision]), 2)
        row[f"{precision}_accuracy"] = round(100 * training.evaluate(net, test)[1], 2)
    # of neighbours, since the machine's load changes
    pairs = zip(seconds["bfloat16"], seconds["float32"], strict=True)
    return {**row, "ratio": round(statistics.median(slow / plain for slow, plain in pairs), 3)}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = ["twocnn:cifar10", "resnet8-gn:cifar10", "har-cnn:har"]
    parser.add_argument("--cases", nargs="+", metavar="MODEL:DATASET", default=cases)
    parser.add_argument("--data-dir", default=os.environ.get("AUTOFLIP_DATA", ""), help="default: $AUTOFLIP_DATA")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--examples", type=int, default=1000, help="training examples")
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, refused = [], {}
    tables.head(COLUMNS.values())
    for case in options.cases:
        try:
            rows.append(measure(case, options.data_dir, options.batch_size, options.examples, options.epochs))
            tables.row(rows[-1][key] for key in COLUMNS)
        except ConfigError as error:
            refused[case] = str(error)
            print(f"{case}: {error}", file=sys.stderr)
    about = {"cpu_has_bfloat16": has_bfloat16(), "torch": torch.__version__}
    print(json.dumps({**about, "rows": rows, "refused": refused}))


if __name__ == "__main__":
    main()
