"""Fine-tune pretrained models in ten nodes: accuracy and bytes of full fine-tuning, AutoFLIP, LoRA and the head alone.

EfficientNet-Lite0 learns MNIST or CIFAR-10, and MiniLM which of five exceptions is raised with the message of an error.
All ways begin with a head that the nodes have trained alone. Its bytes, and those of an exploration, are charged to
each way that needs them. Rows that are in `--output` already are not made again. It needs the packages of the extra
`finetune`. The last line is JSON.

    python -m benchmarks.finetune --data-dir DIR --output results/benchmarks/finetune.json
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import tables
from benchmarks.finetune_runs import Runs, Way
from benchmarks.finetune_tasks import TASKS

WAYS = {
    "full fine-tuning": Way(),
    "head only": Way("head"),
    "0.1": Way(density=0.1),
    "0.02": Way(density=0.02),
    "0.005": Way(density=0.005),
    "0.1, pruned to zero": Way(density=0.1, outside="zero"),
    "LoRA, rank 12": Way("adapters", rank=12),
    "LoRA, rank 3": Way("adapters", rank=3),
    "0.02, random mask": Way(density=0.02, explorers=0.0),
    "0.02, without agreement": Way(density=0.02, gamma=0.0),
    "0.02, 3 of 10 explore": Way(density=0.02, explorers=0.3),
}
"""By name; a number is the density of AutoFLIP's mask, outside of which values stay. The two ranks of LoRA train about
as many values of MiniLM as densities 0.02 and 0.005."""

SIZES = {"mnist": (400, 500, 20), "cifar10": (1000, 1000, 20), "text": (300, 200, 4)}
"""Examples to train with in all nodes, examples to test with, and rounds after those of the head."""

COLUMNS = ("way", "accuracy %", "MB", "of full fine-tuning %", "of it exploring, MB")


def measure(runs: Runs, ways: Mapping[str, Way], found: dict[str, Any], prefix: str, output: Path | None) -> None:
    """Make the rows that are missing in `found["rows"]`, whose keys begin with a prefix, and keep each at once."""
    for name, way in ways.items():
        key = f"{prefix}/{name}"
        if key not in found["rows"]:
            found["rows"][key] = runs.row(way)
            if output is not None:
                output.parent.mkdir(parents=True, exist_ok=True)
                draft = output.with_suffix(".part")
                draft.write_text(json.dumps(found, indent=1) + "\n")
                draft.replace(output)


def summarise(rows: Mapping[str, Mapping[str, Any]], task: str) -> list[dict[str, Any]]:
    """Return a task's table: means over the seeds that have been run, keyed `task/seed/way` in `rows`."""
    table = []
    for name in WAYS:
        mine = {key.split("/")[1]: row for key, row in rows.items() if key.split("/")[::2] == [task, name]}
        if not mine:
            continue
        accuracies = [row["accuracy"] for row in mine.values()]
        mb = statistics.mean(row["mb"] for row in mine.values())
        full = [rows[key]["mb"] for seed in mine if (key := f"{task}/{seed}/full fine-tuning") in rows]
        table.append(
            {
                "task": task,
                "way": name,
                "seeds": len(mine),
                "accuracy": round(statistics.mean(accuracies), 2),
                "sd": round(statistics.stdev(accuracies), 2) if len(mine) > 1 else None,
                "mb": round(mb, 1),
                "share": round(100 * mb / statistics.mean(full), 1) if full else None,
                "exploration_mb": round(statistics.mean(row["exploration_mb"] for row in mine.values()), 1),
            }
        )
    return table


def show(table: Sequence[Mapping[str, Any]]) -> None:
    """Print a task's table."""
    tables.head(COLUMNS)
    for row in table:
        spread = "" if row["sd"] is None else f" ± {row['sd']}"
        tables.row([row["way"], f"{row['accuracy']}{spread}", row["mb"], row["share"], row["exploration_mb"]])


def kept(path: Path | None, sizes: dict[str, list[int]]) -> dict[str, Any]:
    """Return what an earlier benchmark has left, or nothing yet.

    Raises
    ------
    SystemExit
        If one of these tasks had other sizes.
    """
    found: dict[str, Any] = {"sizes": {}, "rows": {}}
    if path is not None and path.exists():
        found = json.loads(path.read_text())
    for task, size in sizes.items():
        if found["sizes"].setdefault(task, size) != size:
            raise SystemExit(
                f"{path}: {task} was made with sizes {found['sizes'][task]}: give them, or another --output"
            )
    return found


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("AUTOFLIP_DATA", ""), help="or $AUTOFLIP_DATA")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["mnist", "text"], help="default: mnist text")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 1, 2, ... to average over (default: 1)")
    parser.add_argument("--ways", nargs="+", metavar="WAY", choices=WAYS, default=list(WAYS), help=", ".join(WAYS))
    told = "; ".join(f"{name} {' '.join(map(str, sizes))}" for name, sizes in SIZES.items())
    columns = ("TRAIN", "TEST", "ROUNDS")
    parser.add_argument("--sizes", type=int, nargs=3, metavar=columns, help=f"examples and rounds; default: {told}")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="keeps each row; an interrupted run goes on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    sizes = {name: options.sizes or list(SIZES[name]) for name in options.tasks}
    found = kept(options.output, sizes)
    for seed in range(1, options.seeds + 1):
        for name in options.tasks:
            train, test, rounds = sizes[name]
            task = TASKS[name](options.data_dir, train, test)
            ways = {way: WAYS[way] for way in options.ways if WAYS[way].rank == 0 or task.adapt is not None}
            measure(Runs(task, rounds, seed), ways, found, f"{name}/{seed}", options.output)
    table = [row for name in options.tasks for row in summarise(found["rows"], name)]
    for name in options.tasks:
        print(f"\n{name}\n")
        show([row for row in table if row["task"] == name])
    print(json.dumps({**found, "table": table}))


if __name__ == "__main__":
    main()
