"""Measure many nodes of which few train: seconds per round and memory of a simulation, for 10, 100 and 1,000 nodes.

    python -m benchmarks.scale --data-dir /data --nodes 10 100 1000 --rounds 30 --plot docs/scale.png

Each size is one ``autoflip run`` of the shipped app: the small CNN on MNIST, IID, one local epoch. A node has 60
examples whatever the number of nodes (at 1,000 nodes, all 60,000). 20 nodes train per round (10 of 10), and as many
explore. The server tests on 1,000 images after each round. So a round's work is the same for 100 and 1,000 nodes, and
only the size of the federation differs. Ray's object store is limited to 500 MB. One row of a markdown table is printed
per size; the last line is one JSON object. If a run fails, or a reply fails or is missing, the benchmark ends.

``seconds_per_round`` is the median over the rounds. ``startup_s`` is the time from the command to the exploration. It
includes the roll call, in which every node answers one small message. ``peak_pss_mb`` is the largest memory of the
command and all that it started (SuperLink, simulation, Ray), sampled every second by the kernel's PSS, which counts a
shared page once. ``shm_mb`` is the largest shared memory, such as the object store. MB are 10^6 bytes. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any
from uuid import uuid4

import numpy as np
from matplotlib.figure import Figure

from autoflip_flwr.experiment.data.load import load
from autoflip_flwr.experiment.rules import Value
from benchmarks import recipes, tables

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES, TEST_EXAMPLES = 60, 1_000
SAMPLED = 20
OBJECT_STORE = 500_000_000  # bytes
MARKER = "AUTOFLIP_SCALE"
Row = dict[str, float]

COLUMNS = {
    "nodes": "nodes",
    "sampled": "a round",
    "rounds": "rounds",
    "seconds_per_round": "seconds per round",
    "startup_s": "start-up s",
    "exploration_s": "exploration s",
    "peak_pss_mb": "peak memory MB",
    "shm_mb": "shared MB",
    "final_accuracy": "accuracy",
}


class MemoryWatch:
    """Samples the memory of a process and of all its descendants, from entering to leaving the context.

    Parameters
    ----------
    root : int
        The process.
    marker : str
        Text in the environment of the process's descendants, by which orphaned ones are found.
    interval : float
        Seconds between samples.

    Attributes
    ----------
    peak, shared : int
        The largest sum of all processes' PSS, and of their shared memory alone, in bytes.
    """

    def __init__(self, root: int, marker: str, interval: float = 1.0) -> None:
        self.peak = self.shared = 0
        self._root, self._marker, self._interval = root, marker.encode(), interval
        self._known: dict[tuple[int, bytes], bool] = {}  # pid and start time -> whether it has the marker
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def family(self) -> set[int]:
        """Return the process, all processes with the marker, and the descendants of all of these."""
        children: dict[int, list[int]] = {}
        found = [self._root]
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                with suppress(OSError):  # it has ended, or belongs to another user
                    # after the name, which may hold spaces and brackets: state, parent, ..., start time as the 20th
                    stat = (folder / "stat").read_bytes().rpartition(b")")[2].split()
                    pid, key = int(folder.name), (int(folder.name), stat[19])
                    children.setdefault(int(stat[1]), []).append(pid)
                    # stored, since Ray's workers overwrite their environment with their title
                    marked = self._known.get(key) or self._marker in (folder / "environ").read_bytes()
                    self._known[key] = marked
                    if marked:
                        found.append(pid)
        for pid in found:  # grows during the loop
            found += children.pop(pid, [])
        return set(found)

    def _watch(self) -> None:
        while True:
            held = [_memory(pid) for pid in self.family()]
            self.peak = max(self.peak, sum(total for total, _ in held))
            self.shared = max(self.shared, sum(shared for _, shared in held))
            if self._over.wait(self._interval):
                return


def _memory(pid: int) -> tuple[int, int]:
    """Return the bytes of a process's PSS, and of the shared memory in it; zeros if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return 0, 0
    table = {key: int(value.split()[0]) * 1024 for key, value in (line.split(":", 1) for line in lines)}
    return table.get("Pss", 0), table.get("Pss_Shmem", 0)


def cut(data_dir: str, nodes: int, folder: Path) -> None:
    """Write a part of the data set into a folder, such that each node gets ``EXAMPLES`` examples."""
    data = load("mnist", data_dir)
    if nodes * EXAMPLES > len(data.y_train):
        raise ValueError(f"--nodes {nodes}: at most {len(data.y_train) // EXAMPLES} get {EXAMPLES} examples each")
    for part, count in (("train", nodes * EXAMPLES), ("test", TEST_EXAMPLES)):
        np.save(folder / f"x_{part}.npy", getattr(data, f"x_{part}")[:count])
        np.save(folder / f"y_{part}.npy", getattr(data, f"y_{part}")[:count])


def settings(nodes: int, rounds: int, data: Path, runs: Path) -> dict[str, Value]:
    """Return the app's settings that differ from its defaults."""
    share = min(1.0, SAMPLED / nodes)
    return {
        **recipes.STATIC,
        "dataset": "mnist",
        "data-dir": str(data),
        "output-dir": str(runs),
        "split": "iid",
        "local-epochs": 1,
        "num-server-rounds": rounds,
        "fraction-train": share,
        "explorers": share,
        "node-timeout": 600.0,
    }


def measure(data_dir: str, nodes: int, rounds: int) -> Row:
    """Run the app once, and measure it.

    Raise ``RuntimeError`` if the run fails, or if a reply is missing or does not count.
    """
    with tempfile.TemporaryDirectory(prefix="scale-") as name:
        own = Path(name)
        # in a process that ends, so that no PyTorch pages are shared with this process, which is not counted
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            pool.submit(cut, data_dir, nodes, own).result()
        pairs = " ".join(f"{key}={json.dumps(value)}" for key, value in settings(nodes, rounds, own, own).items())
        command = [sys.executable, "-m", "autoflip_flwr.launch.cli", "run", "--nodes", str(nodes), "-c", pairs]
        token = uuid4().hex
        # the only way to limit it: no setting of Flower's simulation reaches `object_store_memory` of ray.init
        limit = {"RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(OBJECT_STORE)}
        environment = {**os.environ, **limit, MARKER: token}
        began = time.time()
        with (own / "log").open("wb") as log:
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)
            with MemoryWatch(process.pid, f"{MARKER}={token}") as watch:
                code = process.wait()
        if code:
            raise RuntimeError(f"{nodes} nodes: the run failed\n{(own / 'log').read_text(errors='replace')[-3000:]}")
        (record,) = own.glob("*-autoflip-mnist")
        return read(record, nodes, began) | {"peak_pss_mb": watch.peak / 1e6, "shm_mb": watch.shared / 1e6}


def read(record: Path, nodes: int, began: float) -> Row:
    """Read a run's record. ``began`` is the time at which the command was started."""
    lines = [json.loads(line) for line in (record / "metrics.jsonl").read_text().splitlines()]
    summary: dict[str, Any] = json.loads((record / "summary.json").read_text())
    if any(summary["failures"].values()):
        raise RuntimeError(f"{nodes} nodes: replies are missing: {summary['failures']}")
    ends = [line["seconds"] for line in lines if line["phase"] == "train"]  # the first is that of round 0
    return {
        "nodes": nodes,
        "sampled": lines[-1]["nodes"],
        "rounds": summary["rounds"],
        "seconds_per_round": median(after - before for before, after in pairwise(ends)),
        "startup_s": (record / "config.json").stat().st_mtime - began,
        "exploration_s": summary["seconds"]["exploration"],
        "final_accuracy": summary["final_accuracy"],
    }


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw seconds per round and peak memory against the number of nodes."""
    figure = Figure(figsize=(7.6, 2.8), layout="constrained")
    nodes = [row["nodes"] for row in rows]
    panels = {"seconds_per_round": "Seconds per round", "peak_pss_mb": "Peak memory, GB"}
    for axes, (key, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        values = [row[key] / (1000 if key == "peak_pss_mb" else 1) for row in rows]
        axes.plot(nodes, values, marker="o", color="#2563eb", linewidth=2)
        for row, value in zip(rows, values, strict=True):
            told = f"{value:.2f}" if key == "peak_pss_mb" else f"{value:.2f}\n({row['sampled']:.0f} train)"
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            at = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center"}
            axes.annotate(told, (row["nodes"], value), fontsize=8, bbox=box, **at)
        axes.set(title=title, xlabel="Nodes", xscale="log", ylim=(0, 1.35 * max(values)))
        axes.set_xticks(nodes, [f"{count:,.0f}" for count in nodes])
        axes.minorticks_off()
        axes.margins(x=0.12)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[10, 100, 1000], help="sizes (default: 10 100 1000)")
    parser.add_argument("--rounds", type=int, default=30, help="rounds of each (default: 30)")
    parser.add_argument("--data-dir", default="", help="folder with MNIST (default: $AUTOFLIP_DATA, else download)")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw it")
    options = parser.parse_args()
    data_dir = options.data_dir or os.environ.get("AUTOFLIP_DATA", "")
    tables.head(COLUMNS.values())
    rows: list[Row] = []
    for nodes in options.nodes:
        rows.append({key: round(value, 4) for key, value in measure(data_dir, nodes, options.rounds).items()})
        tables.row(f"{rows[-1][key]:,g}" for key in COLUMNS)
    if options.plot:
        plot(rows, options.plot)
    pace = {row["nodes"]: row["seconds_per_round"] for row in rows}
    ratio = round(pace[1000] / pace[100], 3) if {100, 1000} <= pace.keys() else None
    print(json.dumps({"rows": [{key: row[key] for key in COLUMNS} for row in rows], "ratio_1000_100": ratio}))


if __name__ == "__main__":
    main()
