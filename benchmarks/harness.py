"""Measure what a suite's run costs beside its training: messages, masks, judging, evaluation and the record.

The shipped app runs as in a suite, in this process with one thread. The same number of training steps is then timed in
a bare PyTorch loop: the same model, fused optimiser and batches, with normalised images in memory, no mask and nothing
federated. The loop runs once before and once after the app. `ratio` is the app's seconds divided by the loop's mean;
`cpu_ratio` is the same for CPU seconds, which other processes disturb less. The last line is JSON.

    python -m benchmarks.harness
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.data.load import load_for
from autoflip_flwr.experiment.examples import examples_to_train
from autoflip_flwr.experiment.models.build import build
from autoflip_flwr.experiment.rules import Value
from autoflip_flwr.experiment.suite.worker import run_in_process
from benchmarks import recipes

OWN: dict[str, Value] = {
    "dataset": "cifar10",
    "model": "twocnn",
    "split": "iid",  # each node has as many examples
    "nodes": 20,
    "fraction-train": 0.25,
    "explorers": 0.25,
    "exploration-epochs": 1,
    "num-server-rounds": 5,
    "local-epochs": 1,
    "lr": 0.001,
    "batch-size": 50,
}


def bare(config: Config, clients: int, examples: int) -> tuple[float, float]:
    """Train clients one after another, each one epoch on so many examples. Return seconds, and CPU seconds."""
    data = load_for(config)
    images, labels = examples_to_train(data).batch(torch.arange(len(data.y_train)))
    model = build(config.model, data.inputs.shape, data.classes, config.seed)
    loss_of = torch.nn.CrossEntropyLoss()
    began, cpu = time.perf_counter(), time.process_time()
    for _ in range(clients):
        optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
        for rows in torch.randperm(examples).split(config.batch_size):  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            loss_of(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    return time.perf_counter() - began, time.process_time() - cpu


def measure(settings: Mapping[str, Value]) -> dict[str, Any]:
    """Run the loop, the app, and the loop again. Return their seconds and ratios."""
    config = Config.from_run_config(settings)
    data = load_for(config)
    each = len(data.y_train) // config.nodes
    small = Config.from_run_config({**settings, "dataset": "digits", "model": "cnn", "num-server-rounds": 1})
    with tempfile.TemporaryDirectory() as output:
        run_in_process(small, Path(output) / "warm")  # loads what is loaded once per process
        explorers = config.asked * config.exploration_epochs
        per_round = round(config.fraction_train * config.nodes) * config.local_epochs
        clients = explorers + per_round * config.num_server_rounds
        before = bare(config, clients, each)
        began, cpu = time.perf_counter(), time.process_time()
        folder = run_in_process(config, Path(output) / "run")
        app = time.perf_counter() - began, time.process_time() - cpu
        after = bare(config, clients, each)
        told = json.loads((folder / "summary.json").read_text())
    flops = sum(told["flops"].values())
    loop = [statistics.mean(pair) for pair in zip(before, after, strict=True)]
    return {
        "ratio": round(app[0] / loop[0], 3),
        "cpu_ratio": round(app[1] / loop[1], 3),
        "app_seconds": round(app[0], 1),
        "loop_seconds": [round(before[0], 1), round(after[0], 1)],
        "steps": clients * -(-each // config.batch_size),
        "seconds": {part: round(value, 2) for part, value in told["seconds"].items()},
        "round_seconds": round(told["seconds"]["train"] / config.num_server_rounds, 2),
        "gflop": round(flops / 1e9),
        "settings": {key: value for key, value in settings.items() if value != Config().as_dict()[key]},
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    recipes.add_pairs(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.WARNING)
    print(json.dumps(measure(recipes.settings_of(None, options.pairs, OWN))))


if __name__ == "__main__":
    main()
