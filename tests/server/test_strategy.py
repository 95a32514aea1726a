"""AutoFlip and autoflip_mod together, over an in-process grid with Flower's real serialisation."""

from __future__ import annotations

import random

import numpy as np
import pytest
from apps import NO_FAILURES, arrays_of, explored, message_app, model, numpy_app, record, same_bytes
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp.mod import fixedclipping_mod
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
)

from autoflip_flwr import AutoFlip, Layout, Mask, autoflip_mod
from autoflip_flwr.core.choices import PACKINGS
from autoflip_flwr.core.methods import LossExploration
from autoflip_flwr.server.grid import OrderedGrid
from autoflip_flwr.server.settings import Values
from autoflip_flwr.testing import LocalGrid
from autoflip_flwr.wire.keys import (
    EPOCHS_KEY,
    EXPLORE,
    HEADER,
    MASK_RECORD,
    PATIENCE_KEY,
    PHASE_KEY,
    TRAIN,
    WEIGHT_DECAY_KEY,
)

NODES = 4


def start(strategy, grid, rounds=3, **options):
    random.seed(7)
    return strategy.start(grid, record(model()), num_rounds=rounds, **options)


def inner(kind=FedAvg, **options):
    return kind(fraction_evaluate=0.0, **options)


# --- parity ----------------------------------------------------------------------------------------------------------

STRATEGIES = {
    "FedAvg": lambda: inner(),
    "FedAvg, half of the nodes": lambda: inner(fraction_train=0.5),
    "FedAvgM": lambda: inner(FedAvgM, server_momentum=0.9, server_learning_rate=0.1),
    "FedAdam": lambda: inner(FedAdam),
    "FedMedian": lambda: inner(FedMedian),
}


@pytest.mark.parametrize("coordinates", PACKINGS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_with_nothing_pruned_the_result_is_the_wrapped_strategys_bit_for_bit(name, coordinates):
    floats = {key: array for key, array in model().items() if array.dtype.kind == "f"}
    alone = LocalGrid(message_app(), NODES)
    random.seed(7)
    expected = STRATEGIES[name]().start(alone, record(floats), num_rounds=3)
    random.seed(7)
    wrapped = AutoFlip(STRATEGIES[name](), sparsity=0.0, coordinates=coordinates)
    result = wrapped.start(LocalGrid(message_app(), NODES), record(floats), num_rounds=3)
    same_bytes(arrays_of(expected.arrays), arrays_of(result.arrays))
    assert expected.train_metrics_clientapp == result.train_metrics_clientapp


def test_the_order_in_which_replies_arrive_changes_nothing():
    expected = start(AutoFlip(inner(), sparsity=0.5), LocalGrid(message_app(), NODES))
    mixed = LocalGrid(message_app(), NODES, arrange=lambda replies: replies[::-1])
    same_bytes(arrays_of(expected.arrays), arrays_of(start(AutoFlip(inner(), sparsity=0.5), mixed).arrays))


def test_packed_and_dense_coordinates_agree():
    results = [
        start(AutoFlip(inner(FedAdam), sparsity=0.5, coordinates=c), LocalGrid(message_app(), NODES)) for c in PACKINGS
    ]
    same_bytes(arrays_of(results[0].arrays), arrays_of(results[1].arrays))


def test_a_numpy_client_gives_what_the_message_api_gives():
    made: list[int] = []
    expected = start(AutoFlip(inner(), sparsity=0.5), LocalGrid(message_app(), NODES))
    result = start(AutoFlip(inner(), sparsity=0.5), LocalGrid(numpy_app(made), NODES))
    same_bytes(arrays_of(expected.arrays), arrays_of(result.arrays))
    assert len(made) == NODES * (1 + 3 + 1)  # one message of exploration, three rounds, and one to find the API out


def test_a_numpy_client_behind_the_mod_serves_plain_fedavg():
    expected = start(inner(), LocalGrid(message_app(mods=[]), NODES))
    result = start(inner(), LocalGrid(numpy_app(), NODES))
    same_bytes(arrays_of(expected.arrays), arrays_of(result.arrays))


def test_seed_makes_sampling_the_same_on_shuffled_nodes_and_with_fedavg_alone():
    sampled = []
    for strategy in (AutoFlip(inner(fraction_train=0.5), sparsity=0.5, seed=3), inner(fraction_train=0.5)):
        grid = LocalGrid(message_app(), 8)
        grid.contexts = dict(sorted(grid.contexts.items(), key=lambda item: -item[0]))
        ordered = OrderedGrid(grid, seed=3)
        ordered.roll_call(minimum=8)
        strategy.start(ordered, record(model()), num_rounds=4)
        rounds = [m for m in grid.sent if "config" in m.content and "server-round" in m.content["config"]]
        sampled.append([m.metadata.dst_node_id for m in rounds if PHASE_KEY not in m.content["config"]])
    assert sampled[0] == sampled[1]
    assert len(set(map(tuple, np.reshape(sampled[0], (4, 4))))) > 1


def test_one_seed_gives_the_same_bytes():
    runs = [start(AutoFlip(inner(), sparsity=0.5, seed=1), LocalGrid(message_app(), NODES)) for _ in range(2)]
    same_bytes(arrays_of(runs[0].arrays), arrays_of(runs[1].arrays))


# --- what travels ----------------------------------------------------------------------------------------------------


def test_the_mask_is_respected_and_exact():
    strategy = AutoFlip(inner(), sparsity=0.5)
    result = arrays_of(start(strategy, LocalGrid(message_app(), NODES)).arrays)
    keep = strategy.mask.keep
    assert strategy.mask.kept == 33  # of 48 + 18
    assert all(not result[name][~keep[name]].any() and result[name][keep[name]].all() for name in keep)
    assert result["steps"].dtype == np.int64
    assert result["steps"] == 3 * NODES  # of the reply with the most examples, each round


def test_client_code_sees_what_it_would_see_without_autoflip():
    seen: dict[str, list[RecordDict]] = {"train": [], "evaluate": []}

    def look(message, context):
        seen[message.metadata.message_type].append(message.content)

    start(AutoFlip(FedProx(proximal_mu=0.25), sparsity=0.5), LocalGrid(message_app(look), NODES), rounds=1)
    exploration, training = seen["train"][0], seen["train"][-1]
    for content in (exploration, training, seen["evaluate"][0]):
        assert list(content) == ["arrays", "config"]
        same = {name: (array.shape, array.dtype) for name, array in arrays_of(content["arrays"]).items()}
        assert same == {name: (array.shape, array.dtype) for name, array in model().items()}
    assert dict(training["config"]) == {"server-round": 1, "proximal-mu": 0.25}
    assert dict(exploration["config"]) == {
        "server-round": 0,
        "proximal-mu": 0.25,
        PHASE_KEY: "explore",
        EPOCHS_KEY: 1,
        PATIENCE_KEY: 2,
        WEIGHT_DECAY_KEY: 0.0,
    }
    same_bytes(arrays_of(exploration["arrays"]), model())


def test_after_the_mask_nothing_dense_travels_and_the_mask_travels_once():
    grid = LocalGrid(message_app(), NODES)
    strategy = AutoFlip(inner(), sparsity=0.5, method=LossExploration.static())
    start(strategy, grid)
    rounds = [m for m in grid.sent if m.content[HEADER]["phase"] == TRAIN]
    assert len(rounds) == 3 * NODES
    assert [MASK_RECORD in m.content for m in rounds] == [True] * NODES + [False] * 2 * NODES
    for message in rounds:
        assert {k: a.shape for k, a in message.content["arrays"].items()} == {"float32": (33 + 6,), "int64": (1,)}


def test_a_node_that_lost_its_state_gets_the_mask_in_the_same_round():
    expected = start(AutoFlip(inner(), sparsity=0.5), LocalGrid(message_app(), NODES))
    grid = LocalGrid(message_app(), NODES, forget=lambda node, count: node in (101, 103) and count == 3)
    strategy = AutoFlip(inner(), sparsity=0.5)
    result = start(strategy, grid)
    same_bytes(arrays_of(expected.arrays), arrays_of(result.arrays))
    assert strategy.ledger.failure_counts() == NO_FAILURES


def test_other_mods_work_behind_ours():
    dp = DifferentialPrivacyClientSideFixedClipping(inner(), 0.0, clipping_norm=0.5, num_sampled_clients=NODES)
    strategy = AutoFlip(dp, sparsity=0.5, method=LossExploration.static(public=True))
    result = start(strategy, LocalGrid(message_app(mods=[autoflip_mod, fixedclipping_mod]), NODES))
    assert strategy.ledger.failure_counts()["errors"] == 0
    assert np.count_nonzero(result.arrays["hidden.weight"].numpy()) == strategy.mask.kept_by_name["hidden.weight"]


# --- replies that must not count -------------------------------------------------------------------------------------


def _break(kind, reply):
    if reply.metadata.src_node_id != 102 or reply.content[HEADER]["phase"] != TRAIN:
        return reply
    content = RecordDict(dict(reply.content))
    flat = arrays_of(content["arrays"])
    if kind == "nan":
        flat["float32"][3] = np.nan
    elif kind == "too short":
        flat["float32"] = flat["float32"][:-1]
    elif kind == "too long":
        flat["float32"] = np.append(flat["float32"], np.float32(0))
    elif kind == "a dtype is missing":
        del flat["int64"]
    elif kind == "another dtype":
        flat["float32"] = flat["float32"].astype(np.float64)
    content["arrays"] = record(flat)
    if kind == "no arrays":
        del content["arrays"]
    elif kind == "no header":
        del content[HEADER]
    elif kind == "no weight":
        content["metrics"] = MetricRecord({"train-loss": 1.0})
    elif kind == "weight 0":
        content["metrics"] = MetricRecord({"num-examples": 0, "train-loss": 1.0})
    elif kind == "infinite weight":
        content["metrics"] = MetricRecord({"num-examples": float("inf"), "train-loss": 1.0})
    elif kind == "another record":
        content["more"] = MetricRecord({"num-examples": 24, "loss": 1.0})
    elif kind == "stale":
        content[HEADER]["round"] = 0
    elif kind == "another mask":
        content[HEADER]["digest"] = "0" * 64
    reply.content = content
    return reply


KINDS = [
    "nan",
    "too short",
    "too long",
    "a dtype is missing",
    "another dtype",
    "no arrays",
    "no header",
    "no weight",
    "weight 0",
    "infinite weight",
    "another record",
    "stale",
    "another mask",
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_reply_is_left_out_and_named(kind, caplog):
    strategy = AutoFlip(inner(), sparsity=0.5)
    result = start(strategy, LocalGrid(message_app(), NODES, tamper=lambda reply: _break(kind, reply)))

    def gone(reply):
        counts = reply.metadata.src_node_id != 102 or reply.content[HEADER]["phase"] != TRAIN
        return reply if counts else Message(_error(), reply_to=_asked(reply))

    expected = start(AutoFlip(inner(), sparsity=0.5), LocalGrid(message_app(), NODES, tamper=gone))
    same_bytes(arrays_of(expected.arrays), arrays_of(result.arrays))
    assert strategy.ledger.failure_counts() == {"rejected": 3, "errors": 0, "absent": 0}
    assert "rejected the reply of node 102" in caplog.text


def _error():
    from flwr.app import Error

    return Error(2, "gone")


def _asked(reply):
    asked = Message(RecordDict(), reply.metadata.src_node_id, reply.metadata.message_type)
    asked.metadata.__dict__["_message_id"] = reply.metadata.reply_to_message_id
    return asked


def test_a_model_that_does_not_fit_is_refused_by_the_client_in_words():
    def wrong(message, context):
        message.content["arrays"] = record({"hidden.weight": np.zeros((6, 8), np.float32)})

    strategy = AutoFlip(inner(), sparsity=0.0)
    with pytest.raises(RuntimeError, match=r"round 1: no reply of 4 nodes counts: .* does not fit: .* missing"):
        start(strategy, LocalGrid(message_app(wrong), NODES), rounds=1)
    assert strategy.ledger.failure_counts()["errors"] == NODES


# --- exploration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("values", "tolerance"), [("float32", 2.0**-23), ("log8", 0.05)])
def test_exploration_is_all_from_w0_and_the_mask_follows_from_it(values: str, tolerance: float):
    strategy = AutoFlip(inner(), sparsity=0.5, method=LossExploration.static(), values=Values(deltas=values))
    start(strategy, LocalGrid(message_app(), NODES), rounds=1)
    start_ = model()
    moves = []
    for part in range(NODES):
        draw = np.random.default_rng([1, 1, part])
        delta = {}
        for name, array in start_.items():
            if array.dtype.kind == "f":
                delta[name] = (array * 0.9 + 0.1 * draw.normal(size=array.shape)).astype(np.float32) - array
        moves.append(delta)
    mean = np.mean([m["hidden.weight"].astype(np.float64) for m in moves], axis=0)
    size = np.mean([np.abs(m["hidden.weight"]) for m in moves], axis=0)
    assert (np.abs(strategy.exploration.signed_mean["hidden.weight"] - mean) <= tolerance * size).all()
    mean_moves = (strategy.exploration.signed_mean[n].ravel().astype(float) for n in strategy.mask.keep)
    lowest = np.argsort(np.concatenate([moves**2 for moves in mean_moves]))
    pruned = np.flatnonzero(~np.concatenate([keep.ravel() for keep in strategy.mask.keep.values()]))
    assert set(pruned) == set(lowest[:33])


def test_exploration_in_batches_finds_the_same():
    masks = []
    for rounds in (1, 3):
        strategy = AutoFlip(inner(), sparsity=0.5, method=LossExploration.static(batches=rounds))
        start(strategy, LocalGrid(message_app(), NODES), rounds=1)
        masks.append(strategy.mask.digest)
    assert masks[0] == masks[1]


def test_exploration_goes_on_without_explorers_that_fail_but_not_below_the_minimum():
    def failing(message, context):
        if PHASE_KEY in message.content["config"] and context.node_id != 100:
            raise RuntimeError("no battery")

    strategy = AutoFlip(inner(), sparsity=0.5, method=LossExploration.static(min_explorers=1))
    start(strategy, LocalGrid(message_app(failing), NODES), rounds=1)
    assert strategy.exploration.explorers == 1
    with pytest.raises(RuntimeError, match=r"1 of 4 explorers answered, but min_explorers = 2; .*no battery"):
        start(AutoFlip(inner(), sparsity=0.5), LocalGrid(message_app(failing), NODES))


def test_the_exploration_does_not_disturb_the_sampling_of_the_wrapped_strategy():
    state = []
    for sparsity in (0.0, 0.5):
        grid = LocalGrid(message_app(), 6)
        start(AutoFlip(inner(fraction_train=0.5), sparsity=sparsity), grid)
        rounds = [m.metadata.dst_node_id for m in grid.sent if m.content[HEADER]["phase"] == TRAIN]
        state.append(rounds)
    assert state[0] == state[1]


def test_a_share_of_the_nodes_explores():
    grid = LocalGrid(message_app(), 10)
    start(AutoFlip(inner(), sparsity=0.5, seed=5, method=LossExploration.static(explorers=0.3)), grid, rounds=1)
    assert sum(m.content[HEADER]["phase"] == EXPLORE for m in grid.sent) == 3


def test_scouts_start_from_the_explorers_average():
    seen = {}
    strategy = AutoFlip(inner(), sparsity=0.5, method=LossExploration.static(initial="explorers"))
    start(
        strategy, LocalGrid(message_app(), NODES), rounds=1, evaluate_fn=lambda r, a: seen.setdefault(r, arrays_of(a))
    )
    moved = model()["hidden.weight"].astype(np.float64) + strategy.exploration.signed_mean["hidden.weight"]
    expected = np.where(strategy.mask.keep["hidden.weight"], moved.astype(np.float32), 0)
    np.testing.assert_array_equal(seen[0]["hidden.weight"], expected)


# --- masks that change -----------------------------------------------------------------------------------------------


def _masks():
    layout = Layout.of(model())
    keep = {spec.name: np.arange(spec.size).reshape(spec.shape) % 2 == 0 for spec in layout.prunable}
    return Mask.from_bool(layout, keep), Mask.from_bool(layout, {name: ~value for name, value in keep.items()})


@pytest.mark.parametrize("coordinates", PACKINGS)
@pytest.mark.parametrize("kind", [FedAvg, FedAvgM, FedAdam])
def test_a_scheduled_mask_takes_effect_and_what_grows_resumes_from_its_last_value(kind, coordinates):
    even, odd = _masks()
    seen = {}
    options = {"server_momentum": 0.9} if kind is FedAvgM else {}
    strategy = AutoFlip(
        inner(kind, **options),
        mask=even,
        mask_schedule={2: odd, 3: even}.get,
        coordinates=coordinates,
    )
    sent = {}

    def look(message, context):
        sent.setdefault(message.content["config"]["server-round"], arrays_of(message.content["arrays"]))

    grid = LocalGrid(message_app(look), NODES)
    start(strategy, grid, evaluate_fn=lambda r, a: seen.setdefault(r, arrays_of(a)))
    for round_, mask in ((0, even), (1, even), (2, odd), (3, even)):
        for name, keep in mask.keep.items():
            assert not seen[round_][name][~keep].any()
            assert seen[round_][name][keep].any()
    start_ = model()
    for name in even.keep:
        resumed = odd.keep[name]
        np.testing.assert_array_equal(sent[2][name][resumed], start_[name][resumed])  # never trained: W0
        back = even.keep[name]
        np.testing.assert_array_equal(sent[3][name][back], seen[1][name][back].astype(np.float32))
    assert strategy.mask.version == 2


# --- what the user did wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sparsity": 1.0}, r"sparsity = 1.0: must be a number in \[0, 1\)"),
        ({"coordinates": "flat"}, "coordinates = 'flat': must be one of auto, packed, dense"),
        ({"strategy": AutoFlip()}, r"must be outermost, and once: AutoFlip\(DP\(strategy\)\)"),
    ],
)
def test_bad_parameters_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        AutoFlip(**options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"gamma": -1}, "gamma = -1: must be a number >= 0"),
        ({"scope": "row"}, "scope = 'row': must be one of global, layer, erk"),
        ({"initial": "best"}, "initial = 'best': must be one of scratch, explorers"),
        ({"explorers": 0}, r"explorers = 0: must be a share in \(0, 1\]"),
        ({"batches": 0}, "batches = 0: must be at least 1"),
        ({"timeout": -1.0}, "timeout = -1.0: must be a number of seconds > 0"),
        ({"weighting": "best"}, "weighting = 'best': must be one of uniform, examples"),
    ],
)
def test_bad_parameters_of_the_method_are_named(options, text):
    with pytest.raises(ValueError, match=f"LossExploration: {text}"):
        LossExploration.static(**options)


def test_autoflip_inside_another_wrapper_names_the_right_nesting():
    wrong = DifferentialPrivacyClientSideFixedClipping(AutoFlip(inner()), 0.0, 1.0, NODES)
    with pytest.raises(RuntimeError, match=r"AutoFlip must be the outermost strategy, AutoFlip\(DP\(strategy\)\)"):
        start(wrong, LocalGrid(message_app(), NODES))


def test_what_cannot_be_pruned_is_refused_before_any_client_works():
    grid = LocalGrid(message_app(), NODES)
    with pytest.raises(ValueError, match="must stay"):
        start(AutoFlip(inner(), sparsity=0.99), grid)
    with pytest.raises(ValueError, match="no array of the model is prunable"):
        AutoFlip(inner()).start(grid, record({"w": np.zeros(4, np.float32)}))
    assert grid.sent == []


def test_a_mask_or_exploration_of_another_model_is_refused_before_any_client_works():
    other = Layout.of({"hidden.weight": np.zeros((2, 2), np.float32), "out.weight": np.zeros((2, 2), np.float32)})
    found = explored(other, [(1.0, {spec.name: np.ones((2, 2)) for spec in other.specs})])
    grid = LocalGrid(message_app(), NODES)
    with pytest.raises(ValueError, match="mask: its arrays are not those of the initial model"):
        start(AutoFlip(inner(), mask=Mask.full(other)), grid)
    with pytest.raises(ValueError, match="exploration: its arrays are not the prunable arrays of the initial model"):
        start(AutoFlip(inner(), exploration=found), grid)
    assert grid.sent == []


def test_auto_coordinates_give_full_arrays_to_a_strategy_of_the_users_own():
    seen = []

    class Saving(FedAvg):
        def aggregate_train(self, server_round, replies):
            arrays, metrics = super().aggregate_train(server_round, replies)
            seen.append({name: array.shape for name, array in arrays.items()})
            return arrays, metrics

    start(AutoFlip(Saving(fraction_evaluate=0.0), sparsity=0.5), LocalGrid(message_app(), NODES), rounds=1)
    assert seen == [{"hidden.weight": (6, 8), "hidden.bias": (6,), "steps": (), "out.weight": (3, 6)}]


def test_renamed_record_keys_keep_their_meaning():
    def rename(message, context, call_next):
        content = message.content
        message.content = RecordDict({"arrays": content["model"], "config": content["settings"]})
        reply = call_next(message, context)
        metrics = dict(reply.content["metrics"])
        metrics["n"] = metrics.pop("num-examples")
        reply.content = RecordDict({"model": reply.content["arrays"], "scores": MetricRecord(metrics)})
        return reply

    strategy = inner(arrayrecord_key="model", configrecord_key="settings", weighted_by_key="n")
    result = start(AutoFlip(strategy, sparsity=0.5), LocalGrid(message_app(mods=[autoflip_mod, rename]), NODES))
    expected = start(AutoFlip(inner(), sparsity=0.5), LocalGrid(message_app(), NODES))
    same_bytes(arrays_of(expected.arrays), arrays_of(result.arrays))


def test_result_holds_plain_flower_records():
    result = start(AutoFlip(FedAvg(), sparsity=0.5), LocalGrid(message_app(), NODES))
    assert isinstance(result.arrays, ArrayRecord)
    assert result.train_metrics_clientapp[3] == {"train-loss": pytest.approx(1.0)}
    assert result.evaluate_metrics_clientapp[3] == {"loss": pytest.approx(0.5)}
