"""Every method of the app, end to end on digits: exact densities in each round, bytes, resuming, what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from apps import NO_FAILURES, Killed, same_bytes
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from torch import nn

from autoflip_flwr import Ledger, Pruned
from autoflip_flwr.core.choices import EXCHANGING, METHODS
from autoflip_flwr.core.layout import Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.participants import Participants
from autoflip_flwr.core.schedules import Gradual
from autoflip_flwr.experiment import client, server, training
from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.data.load import load_for
from autoflip_flwr.experiment.guidance import guided, specs_of
from autoflip_flwr.experiment.models.build import build
from autoflip_flwr.experiment.rules import ConfigError
from autoflip_flwr.experiment.strategies import strategy_of
from autoflip_flwr.server.grid import OrderedGrid
from autoflip_flwr.testing import LocalGrid
from autoflip_flwr.wire import mask_record
from autoflip_flwr.wire.deltas import encode_deltas
from autoflip_flwr.wire.keys import HEADER, MASK_RECORD
from autoflip_flwr.wire.records import to_arrays, to_record

NODES, ROUNDS, SPARSITY = 2, 5, 0.8
SMALL = {
    "num-server-rounds": ROUNDS, "local-epochs": 1, "exploration-epochs": 1, "batch-size": 64, "sparsity": SPARSITY,
    "checkpoints": 0,
}  # fmt: skip
OF_METHOD: dict[str, dict[str, Any]] = {
    "rigl": {"adjust-every": 2, "adjust-until": 1.0},
    "feddst": {"adjust-every": 2, "adjust-until": 1.0, "adjust-share": 0.3, "prune-biases": True},
    "prunefl": {"adjust-every": 2},
    "gradual": {"fall": 0.8, "fall-every": 2},
    "fedprox": {"proximal-mu": 0.01},
}


class Ran:
    """A run of the app's strategy on digits, without a record: what is in force in each round, and what it cost."""

    def __init__(self, method: str, folder: Path, grid: LocalGrid | None = None, **settings: Any) -> None:
        values = {**SMALL, "method": method, **OF_METHOD.get(method, {})}
        values |= {key.replace("_", "-"): value for key, value in settings.items()}
        config = Config.from_run_config(values, check_paths=False)
        self.grid = LocalGrid(client.app, NODES, values) if grid is None else grid
        self.ledger, self.kept, self.models = Ledger(), dict[int, int](), dict[int, Any]()
        self.strategy: Any = strategy_of(config, self.ledger, None, folder)
        data = load_for(config)
        initial = training.get_arrays(build(config.model, data.input_shape, data.classes, config.seed))
        self.result = self.strategy.start(
            OrderedGrid(self.grid, seed=config.seed, ledger=self.ledger),
            to_record(initial),
            num_rounds=config.num_server_rounds,
            evaluate_fn=self.see,
        )

    def see(self, round_: int, arrays: ArrayRecord) -> MetricRecord:
        mask = getattr(self.strategy, "mask", None)
        self.kept[round_] = 0 if mask is None else mask.kept
        self.models[round_] = to_arrays(arrays)
        return MetricRecord({"size": float(sum(np.abs(a).sum() for a in self.models[round_].values()))})

    def asked(self, phase: str) -> dict[tuple[int, int], Message]:
        """Messages of a phase by node and round."""
        return {
            (message.metadata.dst_node_id, int(message.content[HEADER]["round"])): message
            for message in self.grid.sent
            if message.content.get(HEADER, {}).get("phase") == phase
        }


@pytest.mark.runs
@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("autoflip", "fedavg")])
def test_each_method_runs_and_its_densities_are_exact(method: str, tmp_path: Path):
    ran = Ran(method, tmp_path)
    assert ran.ledger.failure_counts() == NO_FAILURES
    assert ran.ledger.replies["train"] == NODES * ROUNDS
    sent = ran.ledger.bytes_by_phase()
    assert sent["total"] == sum(value for key, value in sent.items() if key != "total")
    asks = method in ("snip", "ssfl", "prunefl", "fedlex", "sequential-leak")
    assert (sent["exploration_up"] > 0) == asks
    if method == "fedprox":
        assert not isinstance(ran.strategy, Pruned)
        configs = [message.content["config"] for message in ran.grid.sent if "config" in message.content]
        assert {config.get("proximal-mu") for config in configs if config.get("server-round")} == {0.01}
        return
    mask = ran.strategy.mask
    size = mask.layout.prunable_size
    kept = size - math.floor(SPARSITY * size)
    if method == "fedlex":
        assert set(ran.kept.values()) == {size}
    elif method == "gradual":  # a step before rounds 3 and 5, to the target in the second
        middle = size - int(round(1 - (0.2 + 0.8 / 8), 9) * size)
        assert list(ran.kept.values()) == [size, size, size, middle, middle, kept]
    else:
        assert list(ran.kept.values()) == [kept] * (ROUNDS + 1)
    assert mask.version == (2 if method in (*EXCHANGING, "gradual") else 0)  # new masks in rounds 3 and 5
    for name, keep in mask.keep.items():
        assert not ran.models[ROUNDS][name][~keep].any()
    requests = {round_: message.content[HEADER].get("ask") for (_, round_), message in ran.asked("train").items()}
    told = {
        "rigl": ["gradient pruned log8 "],
        "feddst": ["smallness kept places ", "gradient pruned places "],
        "prunefl": ["gradient-square all log8"],
    }.get(method, [])
    for round_, request in requests.items():
        expected = told if round_ in (2, 4) else []
        assert [text[: len(start)] for text, start in zip(request or [], expected, strict=True)] == expected


@pytest.mark.runs
@pytest.mark.parametrize("values", ["bfloat16", "int8"])
def test_fedavg_travels_in_fewer_bytes(values: str, tmp_path: Path):
    plain, coded = (Ran("fedavg", tmp_path, num_server_rounds=2, values=kind) for kind in ("float32", values))
    assert type(plain.strategy) is FedAvg
    up = [ran.ledger.bytes_by_phase()["train_up"] for ran in (plain, coded)]
    assert up[1] / up[0] == pytest.approx({"bfloat16": 0.5, "int8": 0.27}[values], abs=0.03)
    assert coded.strategy.mask.is_full
    for name, array in plain.models[1].items():
        moved, off = (np.abs(array - other).mean() for other in (plain.models[0][name], coded.models[1][name]))
        assert off < 0.2 * moved


@pytest.mark.runs
@pytest.mark.parametrize("method", ["rigl", "gradual"])
def test_a_run_that_goes_on_ends_like_one_that_was_not_interrupted(method: str, tmp_path: Path):
    def dying(in_round: int) -> LocalGrid:
        grid = LocalGrid(client.app, NODES, {**SMALL, "method": method, **OF_METHOD[method]})
        push = grid.push_messages

        def pushed(messages: list[Message]) -> list[str]:
            if any(message.content[HEADER]["round"] == in_round for message in messages):
                raise Killed
            return push(messages)

        grid.push_messages = pushed  # type: ignore[method-assign, assignment]
        return grid

    whole = Ran(method, tmp_path / "whole", checkpoints=2)
    with pytest.raises(Killed):
        Ran(method, tmp_path / "cut", dying(3), checkpoints=2)  # a new mask is in force, no reply has come under it
    resumed = Ran(method, tmp_path / "cut", checkpoints=2, resume="cut")
    assert list(resumed.models) == [3, 4, 5]
    for round_, model in resumed.models.items():
        same_bytes(model, whole.models[round_])
    assert resumed.strategy.mask.digest == whole.strategy.mask.digest


@pytest.mark.runs
def test_guidance_travels_once_and_again_to_a_node_that_has_lost_it(tmp_path: Path):
    values = {**SMALL, "method": "fedlex"}
    # the node loses its state before its message of round 2, the fourth that it gets
    grid = LocalGrid(client.app, NODES, values, forget=lambda node, handled: (node, handled) == (101, 3))
    ran = Ran("fedlex", tmp_path, grid, num_server_rounds=4)
    got = {key: "guidance" in message.content["config"] for key, message in ran.asked("train").items()}
    assert [got[100, round_] for round_ in range(1, 5)] == [True, False, False, False]
    assert [got[101, round_] for round_ in range(1, 5)] == [True, False, True, False]
    assert [(each["kind"], each["round"], each["node"]) for each in ran.ledger.incidents] == [("errors", 2, 1)]
    assert "this node has no guidance" in str(ran.ledger.incidents[0]["reason"])


@pytest.mark.runs
def test_explorers_of_the_leak_pass_one_model_on_and_leave_no_exploration_to_others(tmp_path: Path):
    values = {**SMALL, "method": "sequential-leak", "num-server-rounds": 1, "output-dir": str(tmp_path)}
    grid = LocalGrid(client.app, NODES, values)
    path = server.run(grid, Config.from_run_config(values))
    first, second = (each for each in grid.sent if each.content[HEADER]["phase"] == "explore")
    assert (first.metadata.dst_node_id, second.metadata.dst_node_id) == (100, 101)
    w0, w1 = (np.asarray(each.content["arrays"]["float32"].numpy()) for each in (first, second))
    assert np.abs(w1 - w0).max() > 1e-3  # the second begins with what the first has trained
    assert not (path / "exploration.safetensors").exists()
    assert json.loads((path / "summary.json").read_text())["method"] == "sequential-leak"


def test_the_schedule_of_the_settings_is_the_methods(tmp_path: Path):
    for settings, schedules in (
        ({"schedule": "participants"}, (Participants(every=1),)),
        ({"schedule": "gradual+participants", "adjust-every": 3}, (Gradual(), Participants(every=3))),
    ):
        strategy: Any = strategy_of(Config.from_run_config(settings), Ledger(), None, tmp_path)
        assert strategy.method.schedules == schedules


# --- the client's side ----------------------------------------------------------------------------------------------


def test_guidance_scales_gradients_and_stays_with_the_node():
    model = nn.Linear(2, 2)
    layout = Layout.of({name: each.detach().numpy() for name, each in model.named_parameters()})
    context = Context(1, 1, {}, RecordDict(), {})
    context.state[HEADER] = ConfigRecord({"phase": "train"})
    context.state[MASK_RECORD] = mask_record.encode_mask(Mask.full(layout))
    factor = np.array([[1.0, 0.5], [0.25, 0.0]], np.float32)
    x = torch.tensor([[1.0, 2.0]])

    def gradient(config: dict[str, Any]) -> list[list[float]]:
        model.zero_grad()
        with guided(model, context, config):
            model(x).sum().backward()
        return model.weight.grad.tolist()

    with pytest.raises(RuntimeError, match="this node has no guidance"):
        gradient({})
    coded = encode_deltas(specs_of(layout), {"weight": factor}).tobytes()
    expected = pytest.approx(np.array([[1.0, 1.0], [0.25, 0.0]]), rel=0.03)
    assert np.array(gradient({"guidance": coded})) == expected
    assert np.array(gradient({})) == expected
    model.zero_grad()
    model(x).sum().backward()  # outside the block nothing is scaled
    assert model.weight.grad.tolist() == [[1.0, 2.0], [1.0, 2.0]]
    for other in (b"", coded[:-1], coded + b"x"):
        with pytest.raises(ValueError, match="deltas"):
            gradient({"guidance": other})


# --- what is refused before anything runs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"method": "fedprox", "server-momentum": 0.9}, "method = 'fedprox': needs server-momentum = 0"),
        ({"method": "fedprox"}, "proximal-mu = 0.0: with method = 'fedprox' it must be above 0"),
        (
            {"method": "gradual", "fall-every": 20},
            "fall-every = 20: with num-server-rounds = 20 the density would never",
        ),
        ({"method": "prunefl"}, "adjust-every = 50: with num-server-rounds = 20 the mask would never change"),
        ({"method": "rigl", "num-server-rounds": 10}, "adjust-every = 10: with num-server-rounds = 10 the mask would"),
        ({"method": "feddst"}, "adjust-every = 15: with num-server-rounds = 20 the mask would never change"),
        ({"method": "fedavg", "resume": "x"}, "needs checkpoints > 0, and a method that is not 'fedavg' or 'fedprox'"),
        (
            {"schedule": "participants", "exploration": "x"},
            "exploration = 'x': holds averages over its explorers, and schedule = 'participants' needs what each",
        ),
        (
            {"schedule": "gradual+participants", "rank-by": "random"},
            r"rank-by = 'random': does nothing with schedule = 'gradual\+participants'",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], text: str):
    with pytest.raises(ConfigError, match=text):
        Config.from_run_config(settings, check_paths=False)


def test_settings_that_go_together_are_not():
    for settings in (
        {"method": "rigl"},
        {"method": "rigl", "sparsity": 0.0, "num-server-rounds": 3},
        {"method": "fedavg", "values": "int8", "resume": "x"},
        {"method": "fedprox", "proximal-mu": 0.1, "values-up": "bfloat16"},
    ):
        Config.from_run_config(settings, check_paths=False)
