"""Attack FedAvg and two of Flower's robust strategies, under AutoFLIP's static mask, with clients that send lies.

    python -m benchmarks.attacks --rounds 20 --sparsity 0.7 --seeds 5

Two of the ten clients attack from the exploration on. ``sign`` returns the values it was sent minus its own update,
``noise`` returns these values plus Gaussian noise of standard deviation 1. Their replies have the right format and
finite values. So only the norm (``--norm-factor 10``; AutoFlip's default is 1000) or the wrapped strategy can tell them
from honest ones.
It runs on all cores and prints one row of a markdown table per strategy. The last line is one JSON object. Accuracy is
measured on the server's test images, as the mean of the last five rounds and over the seeds. Without ``--alpha`` the
clients' data are IID, since Krum keeps one client's model, which alone costs accuracy if labels are skewed.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.serverapp.strategy import FedAvg, FedTrimmedAvg, Krum, Strategy
from numpy.typing import NDArray

from autoflip_flwr import AutoFlip, autoflip_mod
from autoflip_flwr.core.methods import LossExploration
from autoflip_flwr.replies.quarantine import ReplyRules
from autoflip_flwr.testing import LocalGrid
from autoflip_flwr.wire.records import to_arrays, to_record
from benchmarks import digits, tables
from benchmarks.strategies import LAST, prepare

ATTACKERS = 2
STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "FedAvg": lambda: FedAvg(fraction_evaluate=0.0),
    "FedTrimmedAvg": lambda: FedTrimmedAvg(fraction_evaluate=0.0, beta=0.2),
    "Krum": lambda: Krum(fraction_evaluate=0.0, num_malicious_nodes=ATTACKERS),
}

Floats = NDArray[np.floating]
Lie = Callable[[Floats, Floats, np.random.Generator], Floats]
ATTACKS: dict[str, Lie | None] = {
    "none": None,
    "sign": lambda sent, trained, draw: 2 * sent - trained,
    "noise": lambda sent, trained, draw: sent + draw.normal(size=sent.shape).astype(sent.dtype),
}


def attacker(lie: Lie, seed: int) -> Mod:
    """Return a mod, to be placed after ``autoflip_mod``, that makes the first clients falsify their floating arrays."""

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        part = int(context.node_config["partition-id"])
        if part >= ATTACKERS:
            return call_next(message, context)
        sent = to_arrays(message.content.array_records["arrays"])
        server_round = int(message.content.config_records["config"]["server-round"])  # type: ignore[arg-type]
        reply = call_next(message, context)
        draw = np.random.default_rng([seed, max(server_round, 1), part])  # an explorer's lie is that of round 1
        trained = to_arrays(reply.content.array_records["arrays"])
        lies = {
            name: lie(sent[name], array, draw) if array.dtype.kind == "f" else array  # type: ignore[arg-type]
            for name, array in trained.items()
        }
        reply.content["arrays"] = to_record(lies)
        return reply

    return mod


def accuracy(
    name: str, attack: str, rounds: int, sparsity: float, alpha: float | None, seed: int, norm_factor: float
) -> float:
    """Return the accuracy of one run in its last rounds."""
    random.seed(seed)
    lie = ATTACKS[attack]
    app = digits.client_app([autoflip_mod] + ([] if lie is None else [attacker(lie, seed)]), alpha=alpha, seed=seed)
    method, rules = LossExploration.static(epochs=5), ReplyRules(norm_factor=norm_factor)
    strategy = AutoFlip(STRATEGIES[name](), sparsity=sparsity, method=method, rules=rules)
    result = strategy.start(
        LocalGrid(app, digits.NODES), to_record(digits.model(seed)), rounds, evaluate_fn=digits.evaluate
    )
    found = [float(record["accuracy"]) for record in result.evaluate_metrics_serverapp.values()]  # type: ignore[arg-type]
    return float(np.mean(found[-LAST:]))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="federated rounds of a run (default: 20)")
    parser.add_argument("--sparsity", type=float, default=0.7, help="share of the prunable parameters to prune")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0, 1, ... to average over (default: 5)")
    parser.add_argument("--alpha", type=float, help="skew the labels so, by Dirichlet (default: equal shards)")
    parser.add_argument("--norm-factor", type=float, default=math.inf, help="of ReplyRules (default: judges no norms)")
    options = parser.parse_args()
    tables.head(["strategy", *ATTACKS])
    table: dict[str, dict[str, float]] = {}
    with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=prepare) as pool:
        jobs = {
            (name, attack): [
                pool.submit(
                    accuracy,
                    name,
                    attack,
                    options.rounds,
                    options.sparsity,
                    options.alpha,
                    seed,
                    options.norm_factor,
                )
                for seed in range(options.seeds)
            ]
            for name in STRATEGIES
            for attack in ATTACKS
        }
        for name in STRATEGIES:
            table[name] = {a: float(np.mean([job.result() for job in jobs[name, a]])) for a in ATTACKS}
            tables.row([name, *(f"{100 * share:.1f}" for share in table[name].values())])
    print(
        json.dumps(
            {
                **vars(options),
                "norm_factor": str(options.norm_factor),
                "nodes": digits.NODES,
                "attackers": ATTACKERS,
                "accuracy": table,
            }
        )
    )


if __name__ == "__main__":
    main()
