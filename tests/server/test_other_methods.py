"""Methods in whole runs: what they ask is asked, what clients report decides the mask, and bad reports harm nobody."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from apps import NO_FAILURES, Killed, arrays_of, model, record, same_bytes
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAdam, FedAvg

from autoflip_flwr import (
    Budget,
    Checkpoints,
    Magnitude,
    Mask,
    Method,
    Pruned,
    Random,
    ReplyRules,
    Request,
    Snip,
    autoflip_mod,
    current_mask,
    current_request,
    report,
    select,
)
from autoflip_flwr.core.layout import Arrays, Layout
from autoflip_flwr.testing import LocalGrid
from autoflip_flwr.wire.keys import HEADER, STATISTICS

NODES = 3
GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guide.md"


def saliency(part: int, arrays: Arrays) -> Arrays:
    return {
        name: np.abs(array) * (1 + part) * np.linspace(1, 2, array.size).reshape(array.shape)
        for name, array in arrays.items()
    }


def changing(part: int, arrays: Arrays) -> Arrays:
    """Other weights matter in each round."""
    return {
        name: np.abs(np.sin(np.arange(array.size) * (1 + 100 * np.abs(array).sum()))).reshape(array.shape) + part
        for name, array in arrays.items()
    }


def app(*, silent: tuple[int, ...] = (), says: Any = saliency) -> ClientApp:
    """Clients that report what is asked, but for the silent ones, and move each kept weight by a hundredth."""
    made = ClientApp(mods=[autoflip_mod])

    @made.train()
    def train(message: Message, context: Context) -> Message:
        part = int(context.node_config["partition-id"])
        arrays = {name: array.numpy() for name, array in message.content["arrays"].items()}
        weights = {name: array for name, array in arrays.items() if array.ndim > 1}
        for request in current_request(context) if part not in silent else ():
            report(context, request.name, says(part, weights))
        mask = current_mask(context)
        for name, array in weights.items():
            step = 0.01 * (1 + part) * np.ones_like(array)
            arrays[name] = array + (step if mask is None else step * mask.keep[name])
        content = {
            "arrays": ArrayRecord({name: Array(array) for name, array in arrays.items()}),
            "metrics": MetricRecord({"num-examples": 10 + part}),
        }
        return Message(RecordDict(content), reply_to=message)

    return made


def run(method: Method, rounds: int = 2, grid: LocalGrid | None = None, inner: Any = None, **settings: Any):
    random.seed(1)
    strategy = Pruned(
        FedAvg(fraction_evaluate=0.0) if inner is None else inner,
        method=method,
        **{"sparsity": 0.5, "seed": 1, **settings},
    )
    grid = LocalGrid(app(), NODES) if grid is None else grid
    return strategy, strategy.start(grid, record(model()), num_rounds=rounds), grid


# --- rivals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [Random(seed=3), Magnitude(), Magnitude(scope="erk")])
def test_a_method_that_asks_nothing_sends_nothing_before_training(method: Method):
    strategy, result, grid = run(method)
    assert {message.content[HEADER]["phase"] for message in grid.sent} == {"hello", "train"}
    layout = strategy.mask.layout
    assert strategy.mask.digest == method.first(0.5, layout, model(), None).digest
    assert strategy.ledger.bytes_by_phase()["exploration_up"] == 0
    assert strategy.exploration is None
    for name, keep in strategy.mask.keep.items():
        assert not arrays_of(result.arrays)[name][~keep].any()


def test_snip_ranks_by_what_clients_report_and_sends_no_deltas():
    strategy, _, grid = run(Snip())
    layout, initial = strategy.mask.layout, model()
    mean = {
        spec.name: np.mean([saliency(part, initial)[spec.name] for part in range(NODES)], axis=0)
        for spec in layout.prunable
    }
    expected = select(layout, mean, Budget.whole(layout, 0.5))
    assert sum((strategy.mask.keep[n] != expected.keep[n]).sum() for n in mean) <= 2  # log8 rounds
    exploring = [message for message in grid.sent if message.content[HEADER]["phase"] == "explore"]
    assert [message.content[HEADER]["ask"] for message in exploring] == [["saliency all log8"]] * NODES
    assert "autoflip-epochs" not in exploring[0].content["config"]
    assert strategy.exploration.clients == NODES
    assert strategy.ledger.failure_counts() == NO_FAILURES
    prunable, up = layout.prunable_size, strategy.ledger.bytes_by_phase()["exploration_up"]
    assert up < NODES * (2 * prunable + 2500)  # a byte or less per entry: no model goes up


def test_snip_in_float32_is_exact():
    from autoflip_flwr import Values

    strategy, _, _ = run(Snip(), values=Values(deltas="float32"))
    layout, initial = strategy.mask.layout, model()
    mean = {
        spec.name: np.mean([saliency(part, initial)[spec.name] for part in range(NODES)], axis=0)
        for spec in layout.prunable
    }
    assert strategy.mask.digest == select(layout, mean, Budget.whole(layout, 0.5)).digest


def test_a_client_that_does_not_report_is_left_aside_and_named():
    strategy, _, _ = run(Snip(), grid=LocalGrid(app(silent=(1,)), NODES))
    assert strategy.exploration.clients == NODES - 1
    with pytest.raises(RuntimeError, match="the client reported no saliency: its code must look at current_request"):
        run(Snip(), grid=LocalGrid(app(silent=(0, 1, 2)), NODES))


@pytest.mark.parametrize("factor", [1e12, 1e30])
def test_a_client_that_reports_far_too_much_does_not_decide_the_mask(factor: float):
    def lies(part: int, arrays: Arrays) -> Arrays:
        found = saliency(part, arrays)
        return {name: factor * array[::-1] for name, array in found.items()} if part == 2 else found

    honest, _, _ = run(Snip(), grid=LocalGrid(app(silent=(2,)), NODES))
    strategy, _, _ = run(Snip(), grid=LocalGrid(app(says=lies), NODES))
    assert strategy.mask.digest == honest.mask.digest
    assert strategy.ledger.failure_counts()["rejected"] == 1


# --- a method of one's own ------------------------------------------------------------------------------------------


class Watching(Method):
    """Asks for the pruned entries' statistics and the kept ones' deltas in round 1, and chooses again in round 2."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def request(self, round_: int) -> tuple[Request, ...]:
        return (Request("delta"), Request("gradient", "pruned", "float32")) if round_ == 1 else ()

    def first(self, sparsity: float, layout: Layout, initial: Arrays, seen: Any) -> Mask:
        return Magnitude().first(sparsity, layout, initial, None)

    def refine(self, round_: int, mask: Mask, model: Arrays, seen: Any) -> Mask | None:
        self.seen.append((round_, seen))
        if round_ != 2:
            return None
        score = {name: np.abs(values) for name, values in seen.mean["gradient"].items()}
        return select(mask.layout, score, Budget.whole(mask.layout, 0.5))


def test_rounds_may_ask_too_and_deltas_cost_nothing():
    method = Watching()
    strategy, _, grid = run(method, rounds=3, grid=LocalGrid(app(says=changing), NODES))
    (second, seen), (third, kept) = method.seen
    assert (second, third, seen.clients) == (2, 3, NODES)
    assert kept is seen  # nothing was asked since
    first = Magnitude().first(0.5, strategy.mask.layout, model(), None)
    for name, keep in first.keep.items():
        np.testing.assert_allclose(seen.mean["delta"][name], 0.02 * keep, rtol=1e-4)
        given = {"w": (model()[name] * keep).astype(np.float32)}
        mean = np.mean([changing(part, given)["w"] for part in range(NODES)], axis=0)
        np.testing.assert_allclose(seen.mean["gradient"][name], np.where(keep, 0, mean), rtol=1e-5)
    asked = {message.content[HEADER]["round"]: message.content[HEADER].get("ask") for message in grid.sent}
    assert asked == {0: None, 1: ["gradient pruned float32"], 2: None, 3: None}
    assert strategy.mask.digest != first.digest
    assert strategy.mask.version == 1
    assert strategy.ledger.failure_counts() == NO_FAILURES


def test_updates_of_clients_that_report_nothing_count():
    method = Watching()
    strategy, result, _ = run(method, rounds=3, grid=LocalGrid(app(silent=(0,)), NODES))
    assert method.seen[0][1].clients == NODES  # its deltas are there
    assert strategy.ledger.failure_counts() == NO_FAILURES
    assert strategy.ledger.replies["train"] == 3 * NODES
    assert result.arrays


def test_nodes_that_report_rubbish_in_a_round_are_rejected():
    def tamper(reply: Message) -> Message:
        if reply.has_content() and reply.metadata.src_node_id == 101 and STATISTICS in reply.content:
            reply.content[STATISTICS] = ArrayRecord({"gradient": Array(np.zeros(3, np.float32))})
        return reply

    method = Watching()
    strategy, _, _ = run(method, rounds=2, grid=LocalGrid(app(), NODES, tamper=tamper))
    assert method.seen[0][1].clients == NODES - 1
    assert strategy.ledger.failure_counts()["rejected"] == 1


def test_statistics_far_beyond_the_others_are_dropped_and_the_update_counts(caplog):
    def lies(part: int, arrays: Arrays) -> Arrays:
        return {name: array * (1e20 if part == 1 else 1) for name, array in changing(part, arrays).items()}

    method = Watching()
    strategy, _, _ = run(method, rounds=2, grid=LocalGrid(app(says=lies), NODES), rules=ReplyRules())
    assert max(np.abs(values).max() for values in method.seen[0][1].mean["gradient"].values()) < 1e3
    assert strategy.ledger.failure_counts() == NO_FAILURES
    assert "dropped the statistics of node 101" in caplog.text


def of_the_guide() -> type[Method]:
    section = GUIDE.read_text("utf-8").split("\n## A method of your own\n")[1]
    code = re.search(r"^```python\n(.*?)^strategy =", section, re.MULTILINE | re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    names: dict[str, Any] = {}
    exec(code, names)
    return names["LargestGradients"]


@pytest.mark.parametrize("inner", [FedAvg, FedAdam])
def test_the_guides_method_chooses_again_and_goes_on_after_a_crash(tmp_path, inner):
    def one(folder: Path | None, dies_in: int | None = None, resume: bool = False):
        def evaluate(round_: int, arrays: ArrayRecord) -> MetricRecord:
            if round_ == dies_in:
                raise Killed
            return MetricRecord({"size": float(sum(np.abs(a).sum() for a in arrays_of(arrays).values()))})

        random.seed(1)
        strategy = Pruned(
            inner(fraction_evaluate=0.0),
            0.5,
            method=of_the_guide()(every=2),
            seed=1,
            checkpoints=folder and Checkpoints(folder, resume=resume),
        )
        grid = LocalGrid(app(says=changing), NODES)
        result = strategy.start(grid, record(model()), num_rounds=5, evaluate_fn=evaluate)
        return strategy, result

    whole, expected = one(None)
    assert whole.mask.version == 2  # rounds 3 and 5
    for dies_in in (1, 2, 3, 4):
        folder = tmp_path / str(dies_in)
        with pytest.raises(Killed):
            one(folder, dies_in)
        resumed, result = one(folder, resume=True)
        same_bytes(arrays_of(result.arrays), arrays_of(expected.arrays))
        assert resumed.mask.digest == whole.mask.digest


# --- refused before any client works --------------------------------------------------------------------------------


class Broken(Method):
    def __init__(self, made: Any) -> None:
        self.made = made

    def first(self, sparsity: float, layout: Layout, initial: Arrays, seen: Any) -> Any:
        return self.made(layout)


@pytest.mark.parametrize(
    ("made", "kind", "text"),
    [
        (lambda layout: None, TypeError, "Broken.first returned a NoneType: must be a Mask"),
        (lambda layout: Mask.full(Layout.of({"x": np.zeros((2, 2))})), ValueError, "returned a mask of other arrays"),
        (lambda layout: 1 / 0, ZeroDivisionError, "division"),
    ],
)
def test_a_method_that_cannot_work_is_refused_before_any_client_works(made: Any, kind: type[Exception], text: str):
    grid = LocalGrid(app(), NODES)
    with pytest.raises(kind, match=text):
        run(Broken(made), grid=grid)
    assert grid.sent == []


def test_what_clients_report_is_outside_the_noise_in_every_round():
    private = DifferentialPrivacyServerSideFixedClipping(FedAvg(fraction_evaluate=0.0), 1.0, 1.0, NODES)
    grid = LocalGrid(app(), NODES)
    for method in (Snip(), Watching()):
        with pytest.raises(ValueError, match="outside the noise and the budget"):
            run(method, grid=grid, inner=private)
    assert grid.sent == []
    assert run(Magnitude(), inner=private)[0].privacy.releases == 2


def test_the_tree_of_settings_is_logged(caplog):
    with caplog.at_level("INFO"):
        Pruned(FedAvg(), 0.9, method=Magnitude(scope="erk"), values="int8").summary()
    assert "├──> Pruned settings:" in caplog.text
    assert "method=Magnitude(scope='erk')" in caplog.text
    assert json.dumps("values='int8'")[1:-1] in caplog.text
