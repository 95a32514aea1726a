"""Measure accuracy and bytes by sparsity, for clients that train under the mask and for clients that do not.

The shipped app runs on one data set, in this process, one client after another. Each seed has one FedAvg run, one
exploration, and two runs per sparsity that share it. In one the clients train under the mask, as the app does. In the
other they train dense between messages, as in a project that uses only the strategy and the mod. Accuracy is the mean
of the last five rounds. Traffic is a run's upload and download, with and without its exploration. The last line is
JSON.

    python -m benchmarks.sparsity --sparsities 0.5,0.7,0.9 --seeds 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable, Mod

from autoflip_flwr import autoflip_mod
from autoflip_flwr.experiment import client, server
from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.rules import Value
from autoflip_flwr.testing import LocalGrid
from autoflip_flwr.wire.keys import EXPLORE, HEADER
from benchmarks import recipes, tables

LAST = 5


def hide_mask(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Hide the mask from the client's code, so that it trains dense (a mod, placed after ``autoflip_mod``)."""
    head = context.state[HEADER]
    context.state[HEADER] = ConfigRecord({**head, "phase": EXPLORE})  # type: ignore[dict-item]
    reply = call_next(message, context)
    context.state[HEADER] = head
    return reply


def run(settings: Mapping[str, Value], nodes: int, *, masked: bool = True) -> tuple[Path, float, dict[str, Any]]:
    """Run the app once. Return its folder, its accuracy in % (mean of the last rounds), and its summary."""
    mods: list[Mod] = [autoflip_mod] if masked else [autoflip_mod, hide_mask]
    app = ClientApp(client_fn=client.client_fn, mods=mods)
    folder = server.run(LocalGrid(app, nodes, dict(settings)), Config.from_run_config(settings))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    accuracies = [line["accuracy"] for line in lines if line["phase"] == "train"]
    return folder, 100 * statistics.mean(accuracies[-LAST:]), json.loads((folder / "summary.json").read_text())


def measure(base: dict[str, Value], nodes: int, sparsities: list[float], seeds: int) -> list[dict[str, Any]]:
    """Return a row for FedAvg and for each sparsity: mean and standard deviation over the seeds."""
    found: dict[float, list[dict[str, float]]] = {sparsity: [] for sparsity in (0.0, *sparsities)}
    with tempfile.TemporaryDirectory() as output:
        for seed in range(1, seeds + 1):
            settings: dict[str, Value] = {**base, "seed": seed, "output-dir": output, "nodes": nodes}
            _, accuracy, told = run({**settings, "method": "fedavg"}, nodes)
            found[0.0].append({"masked": accuracy, "dense": accuracy, **_traffic(told)})
            exploration = ""
            for sparsity in sparsities:
                pruned = {**settings, "sparsity": sparsity, "exploration": exploration}
                folder, accuracy, told = run(pruned, nodes)
                exploration = exploration or str(folder / "exploration.safetensors")
                _, dense, _ = run({**pruned, "exploration": exploration}, nodes, masked=False)
                found[sparsity].append({"masked": accuracy, "dense": dense, **_traffic(told)})
    return [_row(sparsity, runs) for sparsity, runs in found.items()]


def _traffic(told: dict[str, Any]) -> dict[str, float]:
    moved = told["bytes"]
    return {
        "rounds_mb": (moved["train_up"] + moved["train_down"] + moved["mask_down"]) / 1e6,
        "exploration_mb": (moved["exploration_up"] + moved["exploration_down"]) / 1e6,
    }


def _row(sparsity: float, runs: list[dict[str, float]]) -> dict[str, Any]:
    row: dict[str, Any] = {"sparsity": sparsity}
    for key in runs[0]:
        values = [each[key] for each in runs]
        row[key] = round(statistics.mean(values), 2)
        if key in ("masked", "dense"):
            row[f"{key}_sd"] = round(statistics.stdev(values), 2) if len(values) > 1 else None
    return row


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsities", default="0.3,0.5,0.7,0.8,0.9,0.95", help="separated by commas")
    recipes.add_arguments(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = recipes.settings_of(options.config, options.pairs)
    sparsities = [float(value) for value in options.sparsities.split(",")]
    rows = measure(base, options.nodes, sparsities, options.seeds)
    tables.head(["sparsity", "under the mask", "dense between messages", "MB of the rounds", "MB of the exploration"])
    for row in rows:
        masked, dense = (f"{row[kind]} ± {row[f'{kind}_sd']}" for kind in ("masked", "dense"))
        tables.row([row["sparsity"], masked, dense, row["rounds_mb"], row["exploration_mb"]])
    print(json.dumps({"rows": rows, "settings": {key: value for key, value in base.items() if value != ""}}))


if __name__ == "__main__":
    main()
