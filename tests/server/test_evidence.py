"""What explorers' moves tell of the clients: nothing moved, updates, codes, weight decay."""

import logging
from collections.abc import Callable

import numpy as np
import pytest
from apps import explored
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from autoflip_flwr import AutoFlip, Exploration, Layout, autoflip_mod
from autoflip_flwr.core.choices import SCOPES
from autoflip_flwr.core.evidence import Updates, decayed, shortest
from autoflip_flwr.core.methods import LossExploration
from autoflip_flwr.replies import check
from autoflip_flwr.server.settings import Values
from autoflip_flwr.storage.checkpoint import Checkpoints
from autoflip_flwr.testing import LocalGrid
from autoflip_flwr.wire.messages import unpack_deltas
from autoflip_flwr.wire.records import to_arrays

Arrays = dict[str, np.ndarray]
Train = Callable[[Arrays, int], Arrays]
DRAW = np.random.default_rng(0)


def app_of(train: Train) -> ClientApp:
    app = ClientApp(mods=[autoflip_mod])

    @app.train()
    def step(message: Message, context: Context) -> Message:
        arrays = to_arrays(message.content["arrays"])
        new = train(arrays, int(context.node_config["partition-id"]))
        record = ArrayRecord({name: Array(array) for name, array in new.items()})
        return Message(RecordDict({"arrays": record, "m": MetricRecord({"num-examples": 1})}), reply_to=message)

    return app


def run(train: Train, start: Arrays, nodes: int = 3, **options: object) -> AutoFlip:
    strategy = AutoFlip(
        FedAvg(fraction_evaluate=0.0), **{"sparsity": 0.5, "method": LossExploration.static(), **options}
    )
    record = ArrayRecord({name: Array(array) for name, array in start.items()})
    strategy.start(LocalGrid(app_of(train), nodes), record, num_rounds=1)
    return strategy


def moving(*names: str) -> Train:
    """Clients that move some of the arrays, each entry by another number."""

    def train(arrays: Arrays, part: int) -> Arrays:
        steps = {name: (1 + np.arange(array.size).reshape(array.shape)) / 100 for name, array in arrays.items()}
        return {n: a + np.float32(part + 1) * steps[n].astype(np.float32) * (n in names) for n, a in arrays.items()}

    return train


# What nobody moved


def ones(*names: str, shape: tuple[int, ...] = (4, 4)) -> Arrays:
    return {name: np.ones(shape, np.float32) for name in names}


@pytest.mark.parametrize("scope", SCOPES)
def test_what_nobody_moved_is_kept_whole_and_does_not_count(scope: str):
    start = ones("backbone.0", "backbone.1", "head")
    strategy = run(moving("head"), start, method=LossExploration.static(scope=scope))
    assert strategy.mask.kept_by_name == {"backbone.0": 16, "backbone.1": 16, "head": 8}


def test_a_switch_prunes_it_first():
    strategy = run(
        moving("head"), ones("backbone.0", "head"), output=None, method=LossExploration.static(prune_unmoved=True)
    )
    assert strategy.mask.kept_by_name == {"backbone.0": 1, "head": 15}


def test_an_exploration_that_is_used_again_gives_the_same_mask():
    start = ones("backbone.0", "head")
    first = run(moving("head"), start)
    assert run(moving(), start, exploration=first.exploration).mask == first.mask


def test_all_names_are_logged_once(caplog):
    names = [f"l{i}" for i in range(9)]
    strategy = run(moving("l8"), ones(*names, shape=(2, 2)))
    (told,) = [record.message for record in caplog.records if "frozen" in record.message]
    assert told.startswith(f"no explorer moved {', '.join(names[:8])}: what is frozen")
    assert strategy.mask.kept_by_name == {**dict.fromkeys(names[:8], 4), "l8": 2}


def test_a_pattern_is_logged_where_one_covers_just_these_names(caplog):
    run(moving("head"), ones("backbone.0", "backbone.1", "head"))
    assert "no explorer moved backbone.*: what is frozen" in caplog.text


@pytest.mark.parametrize(
    ("names", "others", "told"),
    [
        (["a.0", "a.1"], ["b"], ["a.*"]),
        (["a.x.w", "a.y.w"], ["a.w"], ["a.*.w"]),
        (["enc1.w", "enc2.w"], ["enc1.b", "dec.w"], ["enc*.w"]),
        (["x.pos", "y.pos"], ["x.w"], ["*.pos"]),
        (["p/a", "p/b"], ["q/a"], ["p/*"]),
        (["one", "two"], ["three"], ["one", "two"]),
        (["one"], ["two"], ["one"]),
        (["l[0].a", "l[0].b"], ["l0.a"], ["l[0].a", "l[0].b"]),
        (["a", "b"], [], ["a", "b"]),
    ],
)
def test_a_pattern_matches_just_the_names(names: list[str], others: list[str], told: list[str]):
    assert shortest(names, [*names, *others]) == told


def test_if_nobody_moved_anything_the_run_ends():
    start = ones("a", "b")
    with pytest.raises(RuntimeError, match="no explorer moved any prunable parameter"):
        run(moving(), start)
    still = explored(Layout.of(start), [(1, {name: 0 * array for name, array in start.items()})])
    with pytest.raises(RuntimeError, match="no explorer moved any prunable parameter"):
        run(moving("a"), start, exploration=still)


def test_what_the_floors_of_the_moved_arrays_forbid_keeps_the_exploration():
    start = {"backbone": np.ones((9, 9), np.float32), "head": np.ones((4, 2), np.float32)}
    with pytest.raises(ValueError, match=r"must stay.*prune_unmoved=True"):
        run(moving("head"), start, sparsity=0.7)


# Updates, and codes of something

W0 = DRAW.standard_normal((64, 32)).astype(np.float32)


def ten_rows(arrays: Arrays, part: int) -> Arrays:
    new = arrays["w"].copy()
    new[:10] += np.float32(0.3) * (3 - new[:10])
    return {"w": new}


def test_clients_that_return_updates_are_told_so_before_round_1():
    kept = run(ten_rows, {"w": W0}, sparsity=0.7, output=None).mask.keep["w"]
    assert kept[:10].sum() > 300
    updates: list[int] = []

    def update(arrays: Arrays, part: int) -> Arrays:
        updates.append(part)
        return {"w": ten_rows(arrays, part)["w"] - arrays["w"]}

    with pytest.raises(RuntimeError, match=r"3 of 3 explorers returned looks like updates \(new - old\), not weights"):
        run(update, {"w": W0}, sparsity=0.7, output=None)
    assert len(updates) == 3


@pytest.mark.parametrize("values", ["log8", "float32"])
@pytest.mark.parametrize("liars", [1, 2])
def test_one_that_returns_updates_ends_no_run_and_one_that_does_not_hides_none(liars: int, values: str):
    def train(arrays: Arrays, part: int) -> Arrays:
        new = ten_rows(arrays, part)["w"]
        return {"w": new - arrays["w"] if part < liars else new}

    if liars == 1:
        assert run(train, {"w": W0}, values=Values(deltas=values)).exploration.explorers == 3
    else:
        with pytest.raises(RuntimeError, match="2 of 3 explorers returned looks like updates"):
            run(train, {"w": W0}, values=Values(deltas=values))


def seen(start: np.ndarray, *returned: np.ndarray) -> Updates:
    found = Updates(Layout.of({"w": start}), {"w": start})
    for each in returned:
        found.add({"w": each - start})
    return found


def test_weights_that_have_only_shrunk_are_no_updates():
    for share in (0.5, 0.1, 0.01):
        assert not seen(W0, np.float32(share) * W0).check()


def test_longer_ones_are_only_warned_of():
    other = DRAW.standard_normal(W0.shape).astype(np.float32)
    with pytest.raises(RuntimeError, match="1 of 1"):
        seen(W0, 0.6 * other).check()
    assert "looks like updates" in seen(W0, 1.5 * other).check()
    assert not seen(W0, 2.5 * other, W0 + other).check()


def test_moves_from_zero_say_nothing():
    assert not seen(np.zeros((4, 4), np.float32), np.ones((4, 4), np.float32)).check()
    found = Updates(Layout.of({"zero": 0 * W0, "w": W0}), {"zero": 0 * W0, "w": W0})
    found.add({"zero": 100 * W0, "w": -W0})
    with pytest.raises(RuntimeError):
        found.check()


def test_real_trainings_of_50_epochs_stay_far_from_updates():
    """An MLP on digits, Adam, plain gradients in NumPy: cosine and length as the threshold sees them."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    pixels, wanted = pixels[:300] / 16, np.eye(10)[labels[:300]]
    draw = np.random.default_rng(1)
    start = {"a": draw.uniform(-1, 1, (64, 64)) / 8, "b": draw.uniform(-1, 1, (10, 64)) / 8}
    weights = {name: array.copy() for name, array in start.items()}
    means = {name: [0 * array, 0 * array] for name, array in start.items()}
    step = 0
    for _ in range(50):
        for rows in np.split(draw.permutation(300), 10):
            step += 1
            hidden = np.maximum(pixels[rows] @ weights["a"].T, 0)
            logits = hidden @ weights["b"].T
            odds = np.exp(logits - logits.max(axis=1, keepdims=True))
            slope = (odds / odds.sum(axis=1, keepdims=True) - wanted[rows]) / len(rows)
            gradients = {"b": slope.T @ hidden, "a": ((slope @ weights["b"]) * (hidden > 0)).T @ pixels[rows]}
            for name, gradient in gradients.items():
                first, second = means[name]
                first += 0.1 * (gradient - first)
                second += 0.001 * (gradient**2 - second)
                weights[name] -= 0.003 * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    assert (np.argmax(np.maximum(pixels @ weights["a"].T, 0) @ weights["b"].T, axis=1) == labels[:300]).mean() > 0.99
    found = Updates(Layout.of(start), start)
    found.add({name: weights[name] - start[name] for name in start})
    assert not found.check()
    (product,), (length,) = (
        [sum((x[n] * y[n]).sum() for n in start) / sum((start[n] ** 2).sum() for n in start)]
        for x, y in ((weights, start), (weights, weights))
    )
    assert product / np.sqrt(length) > 0.4


@pytest.mark.parametrize("dtype", ["int8", "uint8", "bool"])
def test_codes_in_the_place_of_weights_are_refused_with_name_and_dtypes(dtype: str):
    with pytest.raises(RuntimeError, match=f"'w' came back with dtype {dtype}, expected float32: explorers return"):
        run(lambda arrays, part: {"w": np.ones((64, 32), dtype)}, {"w": W0})


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_weights_of_another_precision_are_taken(dtype: str):
    assert run(lambda arrays, part: {"w": ten_rows(arrays, part)["w"].astype(dtype)}, {"w": W0}).mask.kept == 1024


# Weight decay


def found_of(moves: np.ndarray, start: np.ndarray) -> tuple[Layout, Arrays, Exploration]:
    layout = Layout.of({"w": start})
    return layout, {"w": start}, explored(layout, [(1, {"w": moves})])


def test_a_move_that_is_a_constant_share_of_w0_is_weight_decay():
    assert decayed(*found_of(-0.01 * W0, W0)) == ["w"]
    noise = 0.01 * DRAW.standard_normal(W0.shape).astype(np.float32)
    assert decayed(*found_of(-0.01 * W0 + 0.05 * noise, W0)) == ["w"]
    assert decayed(*found_of(-0.01 * W0 + 0.2 * noise, W0)) == []


@pytest.mark.parametrize("start", [0 * W0, 0 * W0 + 1, W0[:2, :4]], ids=["zeros", "one value", "few"])
def test_arrays_that_say_nothing_are_no_weight_decay(start: np.ndarray):
    assert decayed(*found_of(-0.01 * start, start)) == []


def test_weight_decay_is_named_in_one_warning_and_explorers_are_told_to_do_without(caplog):
    def train(arrays: Arrays, part: int) -> Arrays:
        return {**moving("v")(arrays, part), "w": arrays["w"] * np.float32(0.9)}

    with caplog.at_level(logging.WARNING):
        strategy = run(train, {"w": W0, "v": W0[:4]}, output=None)
    told = [record.message for record in caplog.records if "constant share" in record.message]
    assert len(told) == 1
    assert told[0].startswith("the explorers moved w by a constant share of the initial values, as weight decay alone")
    assert strategy.mask.kept == 1024 + 64


# What is held


def test_an_exploration_holds_two_float32_for_each_parameter():
    layout = Layout.of({"w": np.zeros((100, 30), np.float32), "half": np.zeros((10, 4), np.float16)})
    moves = {spec.name: DRAW.standard_normal(spec.shape) for spec in layout.specs}
    found = explored(layout, [(1, moves), (2, moves)])
    held = [array for sums in (found.deviation, found.signed_mean, found.normalised) for array in sums.values()]
    assert sum(array.nbytes for array in held) == 2 * 4 * layout.size
    one = explored(layout, [(1, moves)], per_client=True)
    assert sum(array.nbytes for array in one.normalised.values()) == 4 * layout.size


@pytest.mark.parametrize("size", [1e36, 3e-38, 1e-20, 1e-42])
def test_squares_beyond_float32_keep_their_ranks(size: float):
    layout = Layout.of({"w": np.zeros((2, 3), np.float32)})
    moves = (np.array([[1, 2, 3], [4, 5, 6]]) * size).astype(np.float32)
    found = explored(layout, [(1, {"w": moves})])
    assert found.deviation["w"].dtype == np.float64
    np.testing.assert_allclose(found.deviation["w"], moves.astype(float) ** 2, rtol=1e-12)
    assert np.isfinite(found.signed_mean["w"]).all()


def test_the_moves_of_a_float64_model_stay_in_float64():
    layout = Layout.of({"w": np.zeros((2, 2))})
    found = explored(layout, [(1, {"w": np.full((2, 2), 1e90)})])
    assert {array.dtype.name for array in (found.deviation["w"], found.signed_mean["w"])} == {"float64"}


def test_per_client_normalisation_needs_an_exploration_that_was_made_with_it():
    start = ones("a", "b")
    first = run(moving("a", "b"), start)
    with pytest.raises(ValueError, match="normalisation = 'per-client': the exploration was made without it"):
        run(
            moving("a", "b"),
            start,
            exploration=first.exploration,
            method=LossExploration.static(normalisation="per-client"),
        )
    own = run(moving("a", "b"), start, method=LossExploration.static(normalisation="per-client"))
    again = run(moving(), start, exploration=own.exploration, method=LossExploration.static(normalisation="per-client"))
    assert again.mask == own.mask


def test_each_answer_is_decoded_once_to_be_judged_and_once_to_be_averaged(tmp_path, monkeypatch):
    decoded: list[object] = []
    unpack = unpack_deltas
    monkeypatch.setattr(check, "unpack_deltas", lambda mask, record: decoded.append(record) or unpack(mask, record))
    run(moving("a", "b"), ones("a", "b"), nodes=3, checkpoints=Checkpoints(tmp_path))
    assert len(decoded) == 2 * 3
