"""Time a client's process, from its start and from its message to its reply, with and without the mod.

    python -m benchmarks.startup [--models cnn resnet18] [--repeats 9]

In a deployment every message is served by its own process. Here it works like `flwr-clientapp`, without the network: it
loads what that command loads, takes one serialised message and context, loads an `@app.train` PyTorch client, runs it
(one step of SGD on 8 synthetic images) and serialises the reply and the context. The cases are

- plain: it is sent the dense arrays,
- mask cached: with `autoflip_mod` and `masked_training`, it is sent packed arrays; the mask is in its context,
- mask along: the same, but the mask comes with the message, as it does once per node.

The cases take turns. A row compares medians of seconds: from the process's start to the reply; from the message's
arrival in the process to the reply (what is loaded before is the same); of the client app's work without loading it;
and of CPU time. The first two have limits. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp.strategy import FedAvg, Strategy

from autoflip_flwr import AutoFlip, Layout, Mask, autoflip_mod
from autoflip_flwr.experiment.record.circumstances import source_commit
from autoflip_flwr.testing import LocalGrid
from autoflip_flwr.wire.keys import HEADER, MASK_RECORD
from benchmarks import startup_client

ROOT = Path(__file__).resolve().parents[1]
PLAIN, CACHED, ALONG = "plain", "mask cached", "mask along"
LIMIT = 1.15
DENSITY = 0.3

Times = dict[str, float]


def write_messages(folder: Path, model: str) -> dict[str, Path]:
    """Write the messages of the three cases, as a server sends them. Return the files by case."""
    files = {case: folder / f"{model}-{case.replace(' ', '-')}" for case in (PLAIN, CACHED, ALONG)}
    initial = ArrayRecord(startup_client.network(model).state_dict())
    layout = Layout.of({name: array.numpy() for name, array in initial.items()})
    random = np.random.default_rng(1)
    keep = {spec.name: random.random(spec.shape, np.float32) < DENSITY for spec in layout.prunable}
    autoflip = AutoFlip(_fedavg(), mask=Mask.from_bool(layout, keep))

    def keep_message(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if message.content.array_records:
            packed = HEADER in message.content
            case = (ALONG if MASK_RECORD in message.content else CACHED) if packed else PLAIN
            startup_client.save(files[case], message, context)
        return call_next(message, context)

    _serve(_fedavg(), ClientApp(mods=[keep_message]), initial)
    _serve(autoflip, ClientApp(mods=[keep_message, autoflip_mod]), initial)
    return files


def _fedavg() -> FedAvg:
    return FedAvg(fraction_evaluate=0.0)


def _serve(strategy: Strategy, app: ClientApp, initial: ArrayRecord) -> None:
    """Run two rounds with clients that return what they get. The mask comes with the first round."""

    @app.train()
    def train(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": 8})
        return Message(RecordDict({"arrays": message.content["arrays"], "metrics": metrics}), reply_to=message)

    strategy.start(LocalGrid(app), initial, num_rounds=2)


def serve(case: str, file: Path, model: str) -> Times:
    """Serve one message in one process. Return its seconds."""
    command = [sys.executable, "-m", "benchmarks.startup_client", str(file), model]
    command += ["dense" if case == PLAIN else "masked", str(time.monotonic())]
    environment = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{model}, {case}: exit code {done.returncode}\n{done.stderr[-4000:]}")
    found: Times = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(model: str, repeats: int) -> list[dict[str, Any]]:
    """Return the rows of one model."""
    with tempfile.TemporaryDirectory() as folder:
        files = write_messages(Path(folder), model)
        cases = list(files)
        serve(PLAIN, files[PLAIN], model)  # from here on the modules' files are in the disk cache
        serve(CACHED, files[CACHED], model)
        found: dict[str, list[Times]] = {case: [] for case in cases}
        for repeat in range(repeats):
            turn = repeat % len(cases)
            for case in cases[turn:] + cases[:turn]:
                found[case].append(serve(case, files[case], model))
                print(f"{model}, {case}, {repeat + 1}/{repeats}: {found[case][-1]}", file=sys.stderr, flush=True)
    return [row(f"{model}, {case}", found[case], found[PLAIN]) for case in (CACHED, ALONG)]


def row(case: str, ours: Sequence[Times], plain: Sequence[Times]) -> dict[str, Any]:
    """Return a row that compares a case with the plain client."""
    result: dict[str, Any] = {"case": case}
    for name, key in (("", "start"), ("message_", "message"), ("handle_", "handle"), ("cpu_", "cpu")):
        mine, other = (statistics.median(times[key] for times in each) for each in (ours, plain))
        pairs = [a[key] / b[key] for a, b in zip(ours, plain, strict=True)]
        result |= {f"{name}ours_s": round(mine, 4), f"{name}plain_s": round(other, 4)}
        result |= {f"{name}ratio": round(mine / other, 4)}
        result |= {f"{name}ratio_spread": [round(min(pairs), 3), round(max(pairs), 3)]}
    within = max(result["ratio"], result["message_ratio"]) <= LIMIT
    return {**result, "limit": LIMIT, "within": within, "repeats": len(ours)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=startup_client.MODELS, default=list(startup_client.MODELS))
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error("at least 1 repeat")
    result = {
        "rows": [row for model in options.models for row in measure(model, options.repeats)],
        "density": DENSITY,
        "versions": {name: metadata.version(name) for name in ("flwr", "torch", "numpy")},
        "machine": {"python": platform.python_version(), "processor": platform.machine(), "cpus": os.cpu_count()},
        "commit": source_commit(ROOT / "autoflip_flwr"),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
