"""Compare accuracy by traffic: FedAvg and AutoFLIP at several densities, mean over seeds. Explorations and masks count.

The shipped app runs on one data set, in this process, one client after another. The densities of a seed share one
exploration, whose cost is added to each. Runs that are already in ``--output`` are not repeated. The last line is JSON.

    python -m benchmarks.accuracy --config configs/cifar10.toml --nodes 20 --seeds 3 --plot accuracy-by-mb.png
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from autoflip_flwr.experiment.rules import Value
from benchmarks import recipes, tables
from benchmarks.sparsity import LAST, run

COLOURS = ("#222222", "#0072b2", "#d55e00", "#009e73", "#cc79a7")


def made(folder: Path) -> list[dict[str, Any]] | None:
    """Return the lines of a complete run's record: each round's accuracy and bytes so far."""
    found = list(folder.glob("*/summary.json"))
    if not found:
        return None
    lines = (found[0].parent / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["phase"] == "train"]


def measure(base: dict[str, Value], nodes: int, densities: Sequence[float], seeds: int, output: Path) -> dict[str, Any]:
    """Return each run's lines, by name and seed."""
    found: dict[str, Any] = {}
    for seed in range(1, seeds + 1):
        settings: dict[str, Value] = {**base, "seed": seed, "nodes": nodes}
        exploration = ""
        for density in (1.0, *densities):
            name = "FedAvg" if density == 1 else f"density {density:g}"
            folder = output / f"{name} {seed}"
            if made(folder) is None:
                method: dict[str, Value] = {"method": "fedavg"}
                if density < 1:
                    method = {"sparsity": round(1 - density, 6), "exploration": exploration}
                run({**settings, **method, "output-dir": str(folder)}, nodes)
            if density < 1 and not exploration:
                exploration = str(next(folder.glob("*/exploration.safetensors")).absolute())
            found.setdefault(name, {})[seed] = made(folder)
    return found


def row(name: str, runs: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return mean and standard deviation over the seeds."""
    last = [100 * statistics.mean(line["accuracy"] for line in lines[-LAST:]) for lines in runs.values()]
    total = [lines[-1]["bytes"]["total"] / 1e6 for lines in runs.values()]
    spread = round(statistics.stdev(last), 2) if len(last) > 1 else None
    return {
        "run": name,
        "accuracy": round(statistics.mean(last), 2),
        "sd": spread,
        "mb": round(statistics.mean(total), 1),
    }


def plot(found: dict[str, Any], title: str, path: Path) -> None:
    """Draw each run's mean accuracy by its mean traffic, round by round."""
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.subplots()
    for (name, runs), colour, marker in zip(found.items(), COLOURS, "os^Dv", strict=False):
        mb = np.mean([[line["bytes"]["total"] / 1e6 for line in lines] for lines in runs.values()], axis=0)
        accuracy = 100 * np.array([[line["accuracy"] for line in lines] for lines in runs.values()])
        label = name if name == "FedAvg" else f"AutoFLIP, {name}"
        axes.plot(mb, accuracy.mean(axis=0), color=colour, marker=marker, markersize=3.5, linewidth=1.6, label=label)
        axes.fill_between(mb, accuracy.min(axis=0), accuracy.max(axis=0), color=colour, alpha=0.12, linewidth=0)
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel("Sent so far, both ways (MB), exploration and masks included")
    axes.set_ylabel("Test accuracy (%)")
    axes.set_xlim(left=0)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--densities", default="0.3,0.1", help="separated by commas")
    recipes.add_arguments(parser)
    parser.add_argument("--output", type=Path, default=Path("runs/accuracy"), help="folder of the runs")
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="also draw accuracy by traffic")
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = recipes.settings_of(options.config, options.pairs)
    densities = [float(value) for value in options.densities.split(",")]
    found = measure(base, options.nodes, densities, options.seeds, options.output)
    if options.plot:
        plot(found, f"{base['dataset']}, mean and range of {options.seeds} seeds", options.plot)
    rows = [row(name, runs) for name, runs in found.items()]
    tables.head(["run", "accuracy", "MB"])
    for each in rows:
        tables.row([each["run"], f"{each['accuracy']} ± {each['sd']}", each["mb"]])
    print(json.dumps({"rows": rows, "settings": {key: value for key, value in base.items() if value != ""}}))


if __name__ == "__main__":
    main()
