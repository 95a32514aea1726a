"""The shipped app as a deployment runs it, on this machine's loopback: the ledger against Flower's own count."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from apps import NO_FAILURES
from projects import write_project

from autoflip_flwr.launch import superlink
from benchmarks.loopback import Loopback

REPOSITORY = Path(__file__).parents[1]
TOLERANCE = 0.01

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def loopback():
    with Loopback(nodes=2) as running:
        yield running


@pytest.mark.parametrize("method", ["autoflip", "fedavg"])
def test_the_ledger_is_what_flower_says_its_nodes_received_and_sent(loopback, tmp_path, method):
    settings = {
        "method": method,
        "sparsity": 0.7,
        "nodes": 2,
        "num-server-rounds": 3,
        "local-epochs": 1,
        "exploration-epochs": 1,
        "output-dir": str(tmp_path),
    }
    entry = loopback.run(REPOSITORY, settings, timeout=600)
    (folder,) = tmp_path.iterdir()
    told = json.loads((folder / "summary.json").read_text())
    traffic, nodes = entry["network-traffic"], told["bytes_by_node"]
    assert nodes.keys() == {"0", "1"}
    up = sum(size for own in nodes.values() for key, size in own.items() if key.endswith("_up"))
    down = sum(size for own in nodes.values() for key, size in own.items() if key.endswith("_down"))
    print(f"{method}: up {up} of {traffic['inbound-bytes']}, down {down} of {traffic['outbound-bytes']} bytes")
    assert up == pytest.approx(traffic["inbound-bytes"], rel=TOLERANCE)
    assert down == pytest.approx(traffic["outbound-bytes"], rel=TOLERANCE)
    assert told["bytes"]["total"] == up + down == sum(own["total"] for own in nodes.values())
    assert told["failures"] == NO_FAILURES
    phases = {"exploration", "train"} if method == "autoflip" else {"train"}
    for key in ("flops", "exchange_seconds"):
        assert told[key].keys() == phases
        assert all(value > 0 for value in told[key].values())


CLIENT = """\
import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from autoflip_flwr import autoflip_mod

def forget(message, context, call_next):
    if context.node_config["partition-id"] == 0 and message.content["config"].get("server-round") == 3:
        context.state = RecordDict() if "autoflip.forgot" not in context.state else context.state
        context.state["autoflip.forgot"] = MetricRecord({"times": 1})
    return call_next(message, context)

app = ClientApp(mods=[forget, autoflip_mod])

@app.train()
def train(message, context):
    arrays = {name: array.numpy() for name, array in message.content["arrays"].items()}
    random = np.random.default_rng(context.node_config["partition-id"])
    moved = {name: Array((a + random.normal(size=a.shape)).astype(a.dtype)) for name, a in arrays.items()}
    content = {"arrays": ArrayRecord(moved), "metrics": MetricRecord({"num-examples": 1})}
    return Message(RecordDict(content), reply_to=message)
"""

SERVER = """\
import json
import os
import signal
import threading
import time
from pathlib import Path
import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from autoflip_flwr import AutoFlip, Mask

app = ServerApp()

@app.main()
def main(grid, context):
    masks = []

    def schedule(round_):  # in round 5 one coordinate goes and another one comes
        if round_ != 5:
            return None
        keep = strategy.mask.keep["w"].copy().reshape(-1)
        keep[[np.flatnonzero(keep)[0], np.flatnonzero(~keep)[0]]] ^= True
        return Mask.from_bool(strategy.mask.layout, {"w": keep.reshape(200, 100)}, version=1)

    inner = FedAvg(fraction_evaluate=0.0, min_train_nodes=2, min_available_nodes=2)
    strategy = AutoFlip(inner, sparsity=0.5, mask_schedule=schedule)
    start = np.random.default_rng(0).normal(size=(200, 100)).astype(np.float32)
    result = strategy.start(grid, ArrayRecord({"w": Array(start)}), num_rounds=5)
    told = {"replies": strategy.ledger.replies, "messages": strategy.ledger.messages,
            "failures": strategy.ledger.failure_counts(), "mask_down": strategy.ledger.mask_down,
            "outside": int(np.count_nonzero(result.arrays["w"].numpy()[~strategy.mask.keep["w"]]))}
    Path(context.run_config["out"]).write_text(json.dumps(told))
"""


def test_a_node_that_forgot_and_one_that_is_new_get_the_mask_in_the_same_round(loopback, tmp_path):
    folder = write_project(tmp_path / "forgetful", server=SERVER, client=CLIENT, config='out = ""')
    replaced = threading.Thread(target=_replace_a_node_in_round_2, args=(loopback,))
    replaced.start()
    loopback.run(folder, {"out": str(tmp_path / "told.json")}, timeout=600)
    replaced.join()
    told = json.loads((tmp_path / "told.json").read_text())
    print(told)
    assert told["outside"] == 0
    # of the node that was stopped, if it was at work; up to Flower 1.42 the SuperLink says so
    lost = told["failures"]["errors"] + told["failures"]["absent"]
    assert lost <= 1
    assert told["failures"]["rejected"] == 0
    # one message more than 2 a round: to the node that said that it lacked the mask
    assert told["messages"]["train"] == 11
    assert told["replies"]["train"] == 11 - lost
    whole = 200 * 100 / 8
    assert (
        4 * whole < told["mask_down"] < 4 * whole + 1500
    )  # two at first, the one that forgot, the new one; 2 differences


def _replace_a_node_in_round_2(loopback: Loopback) -> None:
    name = f"run-{loopback._runs}"
    while not (loopback.logs / f"{name}.log").exists() or "ROUND 2/5]" not in loopback.tail(name):
        time.sleep(0.2)
    old = loopback.processes[2]
    os.killpg(old.pid, signal.SIGTERM)
    old.wait(60)
    options = old.args[old.args.index("--superlink") :]
    loopback.processes[2] = loopback._serve("supernode", "supernode-new", superlink._free_port(), *options)
