"""Run every strategy of Flower on handwritten digits: alone, under AutoFLIP with nothing pruned, and by a static mask.

    python -m benchmarks.strategies --rounds 20 --sparsity 0.7 --seeds 3

It runs on all cores and prints one row of a markdown table per strategy. The last line is one JSON object. Accuracy is
measured on the server's test images, as the mean of the last five rounds and over the seeds. ``masked`` clients keep
pruned weights at zero while they train, ``dense`` ones ignore the mask. Saved bytes are those of all messages, compared
with AutoFlip with nothing pruned: once for the rounds and the mask only, once with the exploration.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
from flwr.clientapp.typing import Mod
from flwr.serverapp.strategy import Strategy

from autoflip_flwr import AutoFlip, autoflip_mod
from autoflip_flwr.core.layout import Arrays
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.methods import LossExploration
from autoflip_flwr.testing import LocalGrid
from autoflip_flwr.wire.records import to_arrays, to_record
from benchmarks import digits, tables

LAST = 5
Row = dict[str, str | bool | float]

COLUMNS = {
    "strategy": "strategy",
    "runs": "runs",
    "equal": "equals it at sparsity 0",
    "respected": "mask respected",
    "alone": "alone %",
    "masked": "pruned, masked clients %",
    "dense": "pruned, dense clients %",
    "saved": "bytes saved %",
    "saved_with_exploration": "with exploration %",
}


@dataclass(frozen=True)
class Run:
    """The final model of a run, its accuracy by round, and whether every round averaged every node's reply."""

    arrays: Arrays
    accuracies: list[float]
    complete: bool

    @property
    def accuracy(self) -> float:
        """Mean accuracy of the last rounds."""
        return float(np.mean(self.accuracies[-LAST:]))


def run(strategy: Strategy, mods: Sequence[Mod], rounds: int, seed: int, *, masked: bool = True) -> Run:
    """Run a strategy on the digits, in this process."""
    random.seed(seed)
    np.random.seed(seed)  # differential privacy draws its noise with it
    app = digits.client_app(mods, masked=masked, seed=seed)
    # floats only: plain QFedAvg fails on an integer counter
    initial = to_record(digits.model(seed, counter=False))
    result = strategy.start(LocalGrid(app, digits.NODES), initial, rounds, evaluate_fn=digits.evaluate)
    accuracies = [float(record["accuracy"]) for record in result.evaluate_metrics_serverapp.values()]  # type: ignore[arg-type]
    failed = sum(strategy.ledger.failure_counts().values()) if isinstance(strategy, AutoFlip) else 0
    complete = len(result.train_metrics_clientapp) == rounds and not failed
    return Run(to_arrays(result.arrays), accuracies[1:], complete)


def same(left: Arrays, right: Arrays) -> bool:
    """Return whether names, dtypes and bytes are equal."""
    return [(name, array.dtype, array.tobytes()) for name, array in left.items()] == [
        (name, array.dtype, array.tobytes()) for name, array in right.items()
    ]


def respected(arrays: Arrays, mask: Mask | None) -> bool:
    """Return whether everything outside the mask is zero."""
    return mask is not None and not any(arrays[name][~keep].any() for name, keep in mask.keep.items())


def share_saved(pruned: AutoFlip, full: AutoFlip, *, exploration: bool) -> float:
    """Return the share of bytes that pruning saves."""

    def total(strategy: AutoFlip) -> int:
        table = strategy.ledger.bytes_by_phase()
        return table["total"] - (0 if exploration else table["exploration_up"] + table["exploration_down"])

    return 1 - total(pruned) / total(full)


def one_seed(name: str, rounds: int, sparsity: float, seed: int) -> Row:
    """Run a strategy four times: alone, under AutoFlip with nothing pruned, and pruned with either client."""
    make, behind = digits.STRATEGIES[name], digits.mods_for(name)
    mods = [autoflip_mod, *behind]
    full, masked, dense = (
        AutoFlip(make(digits.NODES), sparsity=share, method=LossExploration.static(epochs=5, public=True))
        for share in (0.0, sparsity, sparsity)
    )
    alone = run(make(digits.NODES), behind, rounds, seed)
    unpruned = run(full, mods, rounds, seed)
    runs = {"masked": run(masked, mods, rounds, seed), "dense": run(dense, mods, rounds, seed, masked=False)}
    return {
        "runs": all(each.complete for each in (alone, unpruned, *runs.values())),
        "equal": same(alone.arrays, unpruned.arrays) and alone.accuracies == unpruned.accuracies,
        "respected": respected(runs["masked"].arrays, masked.mask) and respected(runs["dense"].arrays, dense.mask),
        "alone": alone.accuracy,
        **{kind: each.accuracy for kind, each in runs.items()},
        "saved": share_saved(masked, full, exploration=False),
        "saved_with_exploration": share_saved(masked, full, exploration=True),
    }


def summarise(name: str, found: Sequence[Row]) -> Row:
    """Return a row of the table: conditions that must hold for every seed, and means of the rest."""
    row: Row = {"strategy": name}
    for key, first in found[0].items():
        values = [each[key] for each in found]
        row[key] = all(values) if isinstance(first, bool) else float(np.mean(values))  # type: ignore[arg-type]
    return row


def cell(value: str | bool | float) -> str:
    """Return a value as the table shows it."""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return value if isinstance(value, str) else f"{100 * value:.1f}"


def prepare() -> None:
    """Set up a process that runs strategies: little logging, fast garbage collection."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    gc.freeze()  # QFedAvg and Bulyan make Flower collect garbage once per reply: let it skip the modules


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="federated rounds of a run (default: 20)")
    parser.add_argument("--sparsity", type=float, default=0.7, help="share of the prunable parameters to prune")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... to average over (default: 3)")
    options = parser.parse_args()
    tables.head(COLUMNS.values())
    rows = []
    with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=prepare) as pool:
        jobs = {
            name: [pool.submit(one_seed, name, options.rounds, options.sparsity, seed) for seed in range(options.seeds)]
            for name in digits.STRATEGIES
        }
        for name, seeds in jobs.items():
            rows.append(summarise(name, [job.result() for job in seeds]))
            tables.row(cell(rows[-1][key]) for key in COLUMNS)
    print(json.dumps({**vars(options), "nodes": digits.NODES, "rows": rows}))


if __name__ == "__main__":
    main()
