"""Projects that exist: strategies with code of the user's own, clients with other mods, and the wrong order."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
from apps import NO_FAILURES, arrays_of, message_app, model, numpy_app, record, same_bytes
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import (
    LocalDpMod,
    adaptiveclipping_mod,
    arrays_size_mod,
    fixedclipping_mod,
    message_size_mod,
)
from flwr.server.strategy import FedAvg as LegacyFedAvg
from flwr.serverapp.strategy import (
    Bulyan,
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    QFedAvg,
)
from flwr.serverapp.strategy.multikrum import select_multikrum

from autoflip_flwr import AutoFlip, Layout, Mask, apply_mask, autoflip_mod
from autoflip_flwr.core.methods import LossExploration
from autoflip_flwr.testing import LocalGrid
from autoflip_flwr.wire.keys import EXPLORE, HEADER, HELLO, TRAIN

NODES = 4
FULL = {name: array.shape for name, array in model().items()}
FLOATS = {name: shape for name, shape in FULL.items() if name != "steps"}


def shapes(record_: ArrayRecord) -> dict[str, tuple[int, ...]]:
    return {name: array.numpy().shape for name, array in record_.items()}


def start(strategy, grid, rounds=2, **options):
    random.seed(7)
    return strategy.start(grid, record(model()), num_rounds=rounds, **options)


# --- strategies with code of the user's own ---------------------------------------------------------------------------


class Saving(FedAvg):
    """Looks at everything that passes, as one who saves the model does."""

    def __init__(self, **options):
        super().__init__(fraction_evaluate=0.0, **options)
        self.seen: list[dict[str, tuple[int, ...]]] = []
        self.replies: list[RecordDict] = []

    def configure_train(self, server_round, arrays, config, grid):
        self.seen.append(shapes(arrays))
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        self.replies += [reply.content for reply in replies]
        arrays, metrics = super().aggregate_train(server_round, replies)
        self.seen.append(shapes(arrays))
        return arrays, metrics


def test_a_strategy_of_the_users_own_sees_the_records_that_it_would_see_without_autoflip():
    strategy = Saving()
    result = start(AutoFlip(strategy, sparsity=0.5), LocalGrid(message_app(), NODES), rounds=2)
    assert strategy.seen == [FULL] * 4
    assert [list(content) for content in strategy.replies] == [["arrays", "metrics"]] * 2 * NODES
    steps = [int(content["arrays"]["steps"].numpy()) for content in strategy.replies]
    assert (sorted(steps[:NODES]), sorted(steps[NODES:])) == ([1, 2, 3, 4], [5, 6, 7, 8])
    assert arrays_of(result.arrays)["steps"].dtype == np.int64  # though Flower's average makes float64 of them


def test_metric_functions_and_a_selection_rule_see_full_arrays():
    seen = []

    def metrics(records, weight_key):
        seen.extend(shapes(content["arrays"]) for content in records)
        return MetricRecord({"nodes": len(records)})

    result = start(
        AutoFlip(FedAvg(fraction_evaluate=0.0, train_metrics_aggr_fn=metrics), sparsity=0.5),
        LocalGrid(message_app(), NODES),
    )
    assert seen == [FULL] * 2 * NODES
    assert result.train_metrics_clientapp[2] == {"nodes": NODES}
    seen.clear()

    def rule(contents, malicious, count):
        seen.extend(shapes(content["arrays"]) for content in contents)
        return select_multikrum(contents, malicious, count)

    start(AutoFlip(Bulyan(fraction_evaluate=0.0, selection_rule=rule), sparsity=0.5), LocalGrid(message_app(), NODES))
    assert seen == [FULL] * 2 * NODES


@pytest.mark.parametrize("kind", ["QFedAvg", "DP"])
def test_integers_stay_away_from_what_fails_on_them(kind):
    class Own(Saving if kind == "DP" else QFedAvg):
        def aggregate_train(self, server_round, replies):
            return super().aggregate_train(server_round, replies)

    if kind == "DP":
        strategy = own = Own()
        strategy = DifferentialPrivacyServerSideFixedClipping(own, 0.0, 0.1, NODES)
    else:
        strategy = Own(client_learning_rate=0.1, train_loss_key="train-loss", fraction_evaluate=0.0)
    result = start(
        AutoFlip(strategy, sparsity=0.5, method=LossExploration.static(public=True)), LocalGrid(message_app(), NODES)
    )
    assert arrays_of(result.arrays)["steps"] == 2 * NODES
    if kind == "DP":
        assert own.seen == [FLOATS] * 4


class Keeping(FedAvg):
    """Brings its own loop, as Flower's examples do to keep the best model, and calls Flower's in the end."""

    def __init__(self):
        super().__init__(fraction_evaluate=0.0)
        self.best: ArrayRecord | None = None
        self.rounds = 0

    def note(self, arrays):
        self.best = arrays

    def start(self, grid, initial_arrays, num_rounds=3, *args, **kwargs):
        arrays = initial_arrays
        for self.rounds in range(1, num_rounds):
            messages = self.configure_train(self.rounds, arrays, ConfigRecord(), grid)
            arrays, _ = self.aggregate_train(self.rounds, grid.send_and_receive(messages))
            self.note(arrays)
        return super().start(grid, arrays, 1, *args, **kwargs)


def test_a_strategy_with_a_loop_of_its_own_keeps_it():
    strategy = Keeping()
    wrapped = AutoFlip(strategy, sparsity=0.5)
    grid = LocalGrid(message_app(), NODES)
    result = start(wrapped, grid, rounds=3)
    assert strategy.rounds == 2
    phases = [message.content[HEADER]["phase"] for message in grid.sent]
    assert phases == [HELLO] * NODES + [EXPLORE] * NODES + [TRAIN] * 3 * NODES
    for arrays in (arrays_of(strategy.best), arrays_of(result.arrays)):
        assert {name: array.shape for name, array in arrays.items()} == FULL
        assert not any(arrays[name][~keep].any() for name, keep in wrapped.mask.keep.items())


def test_what_a_strategy_offers_on_top_is_there_on_autoflip():
    strategy = AutoFlip(Keeping(), sparsity=0.5)
    strategy.note("here")
    assert strategy.best == "here"
    assert copy.copy(strategy).fraction_train == 1.0
    with pytest.raises(AttributeError, match="'Keeping' object has no attribute 'worst'"):
        strategy.worst  # noqa: B018
    accounted = AutoFlip(clipped(), sparsity=0.5)
    assert accounted.privacy_spent() is None


def test_a_loop_of_its_own_with_nothing_pruned_gives_what_it_gives_alone():
    floats = record({name: array for name, array in model().items() if name in FLOATS})
    random.seed(7)
    expected = Keeping().start(LocalGrid(message_app(mods=[]), NODES), floats, 3)
    random.seed(7)
    result = AutoFlip(Keeping(), sparsity=0.0).start(LocalGrid(message_app(), NODES), floats, 3)
    same_bytes(arrays_of(expected.arrays), arrays_of(result.arrays))


@pytest.mark.parametrize("coordinates", ["auto", "packed"])
def test_the_state_of_a_users_optimizer_follows_a_change_of_the_mask(coordinates):
    class Own(FedAdam):
        def aggregate_train(self, server_round, replies):
            return super().aggregate_train(server_round, replies)

    first = AutoFlip(Own(fraction_evaluate=0.0), sparsity=0.5)
    start(first, LocalGrid(message_app(), NODES), rounds=1)
    other = Mask.from_bool(first.mask.layout, {name: ~keep for name, keep in first.mask.keep.items()})
    results = []
    for strategy in (FedAdam(fraction_evaluate=0.0), Own(fraction_evaluate=0.0)):
        wrapped = AutoFlip(strategy, mask=first.mask, mask_schedule={2: other}.get, coordinates=coordinates)
        results.append(start(wrapped, LocalGrid(message_app(), NODES), rounds=3))
    same_bytes(*(arrays_of(each.arrays) for each in results))


def test_a_message_without_one_model_is_refused():
    class Own(FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            return [Message(RecordDict({"config": config}), node, "train") for node in grid.get_node_ids()]

    with pytest.raises(ValueError, match="0 ArrayRecords in a message of the strategy, expected 1"):
        start(AutoFlip(Own(), sparsity=0.0), LocalGrid(message_app(), NODES))


def test_state_of_another_kind_is_left_to_a_strategy_of_the_users_own():
    class Own(FedAvg):
        m_t = np.ones(3)

        def aggregate_train(self, server_round, replies):
            return super().aggregate_train(server_round, replies)

    first = AutoFlip(FedAvg(fraction_evaluate=0.0), sparsity=0.5)
    start(first, LocalGrid(message_app(), NODES), rounds=1)
    other = Mask.from_bool(first.mask.layout, {name: ~keep for name, keep in first.mask.keep.items()})
    for coordinates in ("dense", "packed"):
        own = Own(fraction_evaluate=0.0)
        wrapped = AutoFlip(own, mask=first.mask, mask_schedule={2: other}.get, coordinates=coordinates)
        if coordinates == "dense":
            start(wrapped, LocalGrid(message_app(), NODES))
            assert own.m_t.tolist() == [1, 1, 1]
        else:
            with pytest.raises(TypeError, match="state of type ndarray cannot follow a change of the mask"):
                start(wrapped, LocalGrid(message_app(), NODES))


def test_a_strategy_of_flowers_old_api_is_refused_by_name():
    with pytest.raises(TypeError, match=r"strategies of flwr.serverapp.strategy, not flwr.*\.FedAvg"):
        AutoFlip(LegacyFedAvg())


# --- clients with other mods -----------------------------------------------------------------------------------------


def clipped(kind=FedAvg):
    return DifferentialPrivacyClientSideFixedClipping(kind(fraction_evaluate=0.0), 0.0, 0.05, NODES)


def adaptive():
    return DifferentialPrivacyClientSideAdaptiveClipping(
        FedAvg(fraction_evaluate=0.0), 0.0, NODES, initial_clipping_norm=0.05
    )


@pytest.mark.parametrize(
    ("strategy", "mod"), [(clipped, fixedclipping_mod), (adaptive, adaptiveclipping_mod)], ids=["fixed", "adaptive"]
)
def test_flowers_clipping_works_behind_ours_with_either_api(strategy, mod):
    floats = {name: array for name, array in model().items() if name in FLOATS}
    results = []
    for app in (message_app(mods=[autoflip_mod, mod]), numpy_app(mods=[autoflip_mod, mod], floats=True)):
        wrapped = AutoFlip(strategy(), sparsity=0.5, method=LossExploration.static(public=True))
        random.seed(7)
        results.append(wrapped.start(LocalGrid(app, NODES), record(floats), num_rounds=2))
        assert wrapped.ledger.failure_counts() == NO_FAILURES
    same_bytes(*(arrays_of(each.arrays) for each in results))
    first = wrapped.mask.apply(floats)
    moved = [results[0].arrays[name].numpy() - first[name] for name in floats]
    assert 0 < np.sqrt(sum(np.sum(np.square(move)) for move in moved)) <= 2 * 0.05 * 1.3


def test_noise_of_a_local_privacy_mod_enters_the_kept_coordinates_only():
    floats = {name: array for name, array in model().items() if name in FLOATS}
    strategy = AutoFlip(FedAvg(fraction_evaluate=0.0), sparsity=0.5)
    mod = LocalDpMod(clipping_norm=0.5, sensitivity=0.1, epsilon=10.0, delta=1e-5)
    grid = LocalGrid(message_app(mods=[autoflip_mod, mod]), NODES)
    result = arrays_of(strategy.start(grid, record(floats), num_rounds=2).arrays)
    assert strategy.ledger.failure_counts() == NO_FAILURES
    assert not any(result[name][~keep].any() for name, keep in strategy.mask.keep.items())
    assert all(result[name][keep].all() for name, keep in strategy.mask.keep.items())


@pytest.mark.parametrize("app", [message_app, lambda mods: numpy_app(mods=mods)], ids=["message", "numpy"])
@pytest.mark.parametrize("size", [message_size_mod, arrays_size_mod])
@pytest.mark.parametrize("place", [0, 1], ids=["in front: wire sizes", "behind: the client's sizes"])
def test_size_mods_work_in_either_place(app, size, place):
    mods = [autoflip_mod]
    mods.insert(place, size)
    strategy = AutoFlip(FedAvg(), sparsity=0.5)
    result = start(strategy, LocalGrid(app(mods=mods), NODES))
    assert strategy.ledger.failure_counts() == NO_FAILURES
    expected = start(AutoFlip(FedAvg(), sparsity=0.5), LocalGrid(message_app(), NODES))
    same_bytes(arrays_of(result.arrays), arrays_of(expected.arrays))


def test_mods_of_the_train_function_alone_stand_behind_ours():
    app = ClientApp(mods=[autoflip_mod])
    inner = message_app(mods=[])
    app.train(mods=[fixedclipping_mod])(lambda message, context: inner(message, context))
    app.evaluate()(lambda message, context: inner(message, context))
    private = DifferentialPrivacyClientSideFixedClipping(FedAvg(), 0.0, 0.5, NODES)
    strategy = AutoFlip(private, sparsity=0.5, method=LossExploration.static(public=True))
    result = start(strategy, LocalGrid(app, NODES), rounds=1)
    assert result.evaluate_metrics_clientapp[1]["loss"] == pytest.approx(0.5)


# --- clients in NumPy ------------------------------------------------------------------------------------------------


def test_apply_mask_zeroes_arrays_in_place_by_name():
    keep = {"w": np.array([[True, False], [False, True]])}
    mask = Mask.from_bool(Layout.of({"w": np.ones((2, 2)), "b": np.ones(2)}), keep)
    weight, bias = np.array([[1.0, 2.0], [3.0, 4.0]]), np.ones(2)
    apply_mask({"w": weight, "b": bias}, mask)
    assert weight.tolist() == [[1, 0], [0, 4]]
    assert bias.tolist() == [1, 1]
    apply_mask({"anything": weight}, None)
    with pytest.raises(ValueError, match=r"the server sent no 'v'; it sent \['w', 'b'\], 'w' fits"):
        apply_mask({"v": weight}, mask)
    with pytest.raises(ValueError, match=r"array 'w' has shape \(2,\), the mask \(2, 2\)"):
        apply_mask({"w": bias}, mask)


def test_apply_mask_by_the_context_trains_under_the_mask_and_lets_explorers_be():
    trained = []

    def look(message, context):
        arrays = {name: array + 1 for name, array in arrays_of(message.content["arrays"]).items()}
        apply_mask({"out.weight": arrays["out.weight"]}, context)
        trained.append(np.count_nonzero(arrays["out.weight"]))

    strategy = AutoFlip(FedAvg(fraction_evaluate=0.0), sparsity=0.5)
    start(strategy, LocalGrid(message_app(look), NODES), rounds=1)
    assert trained == [18] * NODES + [strategy.mask.kept_by_name["out.weight"]] * NODES


# --- the wrong order, in words ---------------------------------------------------------------------------------------

FIRST = r"autoflip_mod must be the first in ClientApp\(mods=\[\.\.\.\]\)"


@pytest.mark.parametrize(
    ("mod", "strategy"),
    [
        (fixedclipping_mod, clipped),
        (adaptiveclipping_mod, adaptive),
        (LocalDpMod(0.5, 0.1, 10.0, 1e-5), lambda: FedAvg(fraction_evaluate=0.0)),
    ],
    ids=["fixed", "adaptive", "local"],
)
def test_a_privacy_mod_in_front_of_ours_ends_the_exploration_with_the_right_order(mod, strategy):
    grid = LocalGrid(message_app(mods=[mod, autoflip_mod]), NODES)
    with pytest.raises(RuntimeError, match=FIRST):
        start(AutoFlip(strategy(), sparsity=0.5, method=LossExploration.static(public=True)), grid)


@pytest.mark.parametrize("mod", [fixedclipping_mod, LocalDpMod(0.5, 0.1, 10.0, 1e-5)], ids=["fixed", "local"])
def test_without_an_exploration_the_rounds_tell_the_right_order(mod):
    kind = clipped() if mod is fixedclipping_mod else FedAvg(fraction_evaluate=0.0)
    floats = record({name: array for name, array in model().items() if name in FLOATS})
    grid = LocalGrid(message_app(mods=[mod, autoflip_mod]), NODES)
    with pytest.raises(RuntimeError, match=FIRST):
        AutoFlip(kind, sparsity=0.0).start(grid, floats, num_rounds=1)


def test_a_client_without_our_mod_is_told_of_it():
    with pytest.raises(RuntimeError, match=FIRST):
        start(AutoFlip(FedAvg(), sparsity=0.5), LocalGrid(message_app(mods=[]), NODES))


def test_our_mod_twice_is_refused():
    with pytest.raises(RuntimeError, match=r"autoflip_mod: it is twice in ClientApp"):
        start(AutoFlip(FedAvg(), sparsity=0.5), LocalGrid(message_app(mods=[autoflip_mod, autoflip_mod]), NODES))


def test_a_client_that_fails_on_packed_arrays_is_told_of_the_missing_mod():
    def loading(message, context):
        message.content["arrays"]["hidden.weight"]

    with pytest.raises(RuntimeError, match=rf"without it: {FIRST}\); node 100 and 3 more: .*KeyError.*hidden.weight"):
        start(AutoFlip(FedAvg(), sparsity=0.5), LocalGrid(message_app(loading, mods=[]), NODES))


def test_a_mod_that_refuses_an_evaluation_does_not_hold_the_round_up(caplog):
    mods = [autoflip_mod, LocalDpMod(0.5, 0.1, 10.0, 1e-5)]
    floats = record({name: array for name, array in model().items() if name in FLOATS})
    strategy = AutoFlip(FedAvg(), sparsity=0.5)
    result = strategy.start(LocalGrid(message_app(mods=mods), NODES), floats, num_rounds=1, timeout=60)
    assert result.arrays
    assert strategy.ledger.failure_counts() == {"rejected": 0, "errors": NODES, "absent": 0}
    assert FIRST.replace("\\", "") not in caplog.text


def test_explorers_that_move_nothing_end_the_run():
    app = ClientApp(mods=[autoflip_mod])

    @app.train()
    def train(message, context):
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": message.content["arrays"], "metrics": metrics}), reply_to=message)

    with pytest.raises(RuntimeError, match="no explorer moved any prunable parameter"):
        start(AutoFlip(FedAvg(fraction_evaluate=0.0), sparsity=0.5), LocalGrid(app, NODES), rounds=1)


def test_a_mod_that_refuses_for_its_own_reasons_keeps_its_words():
    def refusing(message: Message, context, call_next):
        return fixedclipping_mod(message, context, call_next)  # no clipping norm: nobody sends one

    with pytest.raises(RuntimeError, match="requires the key 'clipping_norm' to be present"):
        start(AutoFlip(FedAvg(), sparsity=0.5), LocalGrid(message_app(mods=[autoflip_mod, refusing]), NODES))
