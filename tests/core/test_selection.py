from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from apps import choose, explored
from hypothesis import given, settings
from hypothesis import strategies as st

from autoflip_flwr.core.budget import pruned_count
from autoflip_flwr.core.choices import NORMALISATIONS
from autoflip_flwr.core.layout import Layout
from autoflip_flwr.core.scores import agreement, scores
from autoflip_flwr.core.selection import tied_weights
from autoflip_flwr.core.statistics import Exploration, minmax, start_arrays

Arrays = dict[str, np.ndarray]

quick = settings(deadline=None, max_examples=80)


def layout_of(output: str | None = None, **shapes: tuple[int, ...]) -> Layout:
    return Layout.of(
        {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, prunable=lambda *_: True, output=output
    )


PAIR = Layout.of({"w": np.zeros((1, 2), np.float32), "b": np.zeros(1, np.float32), "n": np.zeros(1, np.int64)})
ONE = {"w": np.array([[1.0, -2.0]]), "b": np.array([4.0])}
TWO = {"w": np.array([[3.0, 2.0]]), "b": np.array([0.0])}


def explore(*deltas: list[float]) -> Exploration:
    rows = [{"w": np.array([delta], float)} for delta in deltas]
    return explored(layout_of(w=(1, len(deltas[0]))), [(1, row) for row in rows], per_client=True)


# Exploration


def test_deviation_and_signed_mean_of_two_explorers_by_hand():
    found = explored(PAIR, [(1, ONE), (1, TWO)], per_client=True)
    assert found.explorers == 2
    assert found.deviation["w"].tolist() == [[5, 4]]
    assert found.signed_mean["w"].tolist() == [[2, 0]]
    assert found.normalised["w"].tolist() == [[0.5, 0.5]]


def test_every_floating_array_has_a_signed_mean_and_only_prunable_ones_a_deviation():
    found = explored(PAIR, [(1, ONE), (1, TWO)], per_client=True)
    assert found.signed_mean["b"].tolist() == [2]
    assert (set(found.deviation), set(found.normalised), set(found.signed_mean)) == ({"w"}, {"w"}, {"w", "b"})
    assert explored(PAIR, [(1, ONE), (1, TWO)]).normalised == {}


def test_explorers_may_be_weighted():
    found = explored(PAIR, [(3, ONE), (1, TWO)], per_client=True)
    assert found.deviation["w"].tolist() == [[3, 4]]
    assert found.signed_mean["w"].tolist() == [[1.5, -1]]
    assert found.normalised["w"].tolist() == [[0.25, 0.75]]


def test_answers_are_read_once_and_left_as_they_are():
    before = {name: values.copy() for name, values in ONE.items()}
    again = explored(PAIR, iter([(3, ONE), (1, TWO)]))
    assert again.deviation["w"].tolist() == [[3, 4]]
    assert all((values == before[name]).all() for name, values in ONE.items())


def test_float16_answers_are_squared_and_summed_in_float64_and_held_in_float32():
    found = explored(PAIR, [(1, {name: np.full(PAIR[name].shape, 400, np.float16) for name in ("w", "b")})] * 2)
    assert found.deviation["w"].tolist() == [[160000, 160000]]
    assert {values.dtype.name for values in (*found.deviation.values(), *found.signed_mean.values())} == {"float32"}


@pytest.mark.parametrize("weight", [0, -1, np.nan, np.inf])
def test_a_weight_that_is_not_positive_and_finite_is_refused(weight: float):
    with pytest.raises(ValueError, match="weight of a client"):
        explored(PAIR, [(1, ONE), (weight, TWO)])


def test_no_answer_is_an_error():
    with pytest.raises(ValueError, match="no client has reported"):
        explored(PAIR, [])


# Scores


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [2.5, 2.5, 2.5], [1e-310, 1e-310], [1e300, 1e300]])
def test_minmax_of_a_constant_is_zero_and_not_nan(values: list[float]):
    assert minmax(np.array(values)).tolist() == [0.0] * len(values)


def test_minmax_by_hand():
    assert minmax(np.array([4.0, 2.0, 3.0])).tolist() == [1, 0, 0.5]


@pytest.mark.parametrize(
    ("deltas", "expected"),
    [
        ([[1], [1]], 1),
        ([[1], [-1]], 0),
        ([[2], [0]], 0.5),
        ([[1], [3]], 0.8),
        ([[0], [0]], 0),
        ([[-3], [-3]], 1),
        ([[1], [1], [-1]], 1 / 9),
    ],
)
def test_agreement_by_hand(deltas: list[list[float]], expected: float):
    found = explore(*deltas)
    assert agreement(found.deviation["w"], found.signed_mean["w"])[0, 0] == pytest.approx(expected, rel=2.0**-22)


@pytest.mark.parametrize(
    ("normalisation", "gamma", "expected"),
    [
        ("none", 0, [5, 4, 9]),
        ("none", 1, [4, 0, 9]),
        ("none", 2, [3.2, 0, 9]),
        ("none", 0.5, [5 * 0.8**0.5, 0, 9]),
        ("layer", 0, [0.2, 0, 1]),
        ("layer", 1, [0.16, 0, 1]),
        ("per-client", 0, [0.5, 3 / 16, 1]),
        ("per-client", 1, [0.4, 0, 1]),
    ],
)
def test_scores_by_hand(normalisation: str, gamma: float, expected: list[float]):
    # squares 1 4 9 -> 0 3/8 1 and 9 4 9 -> 1 0 1; D = 5 4 9, A = 2 0 3, a = 4/5 0 1
    score = scores(explore([1, -2, 3], [3, 2, 3]), normalisation, gamma)
    assert score["w"][0].tolist() == pytest.approx(expected)


def test_each_array_is_normalised_by_itself():
    answer = {"a": np.array([[1.0, 2.0]]), "b": np.array([[10.0, 20.0]])}
    found = explored(layout_of(a=(1, 2), b=(1, 2)), [(1, answer)], per_client=True)
    for normalisation in ("layer", "per-client"):
        score = scores(found, normalisation, 0)
        assert (score["a"].tolist(), score["b"].tolist()) == ([[0, 1]], [[0, 1]])


def test_explorers_that_do_not_move_score_zero_in_every_normalisation():
    for normalisation in NORMALISATIONS:
        for gamma in (0, 0.5, 1, 3):
            assert scores(explore([0, 0], [0, 0]), normalisation, gamma)["w"].tolist() == [[0, 0]]


@pytest.mark.parametrize("gamma", [-1, np.nan, np.inf])
def test_gamma_must_be_a_number_not_below_zero(gamma: float):
    with pytest.raises(ValueError, match="gamma"):
        scores(explore([1, 2]), "none", gamma)


def test_an_unknown_normalisation_is_refused():
    with pytest.raises(ValueError, match="normalisation = 'global'"):
        scores(explore([1, 2]), "global")


deltas = st.lists(
    st.lists(
        st.one_of(st.integers(-3, 3).map(float), st.floats(-(2.0**100), 2.0**100, width=32)), min_size=6, max_size=6
    ),
    min_size=1,
    max_size=5,
)


@quick
@given(rows=deltas, normalisation=st.sampled_from(NORMALISATIONS), gamma=st.sampled_from([0, 0.5, 1, 2.0, 7]))
def test_scores_are_finite_and_not_negative_and_agreement_only_lowers_them(
    rows: list[list[float]], normalisation: str, gamma: float
):
    found = explore(*rows)
    share = agreement(found.deviation["w"], found.signed_mean["w"])
    assert ((share >= 0) & (share <= 1)).all()
    score, without = scores(found, normalisation, gamma)["w"], scores(found, normalisation, 0)["w"]
    assert np.isfinite(score).all()
    assert ((score >= 0) & (score <= without)).all()
    if normalisation != "none":
        assert (without <= 1).all()


@quick
@given(rows=deltas, seed=st.integers(0, 99))
def test_the_order_of_the_explorers_and_the_scale_of_their_weights_do_not_matter(rows: list[list[float]], seed: int):
    layout = layout_of(w=(1, 6))
    weights = np.random.default_rng(seed).integers(1, 9, len(rows))
    answers = [(float(weight), {"w": np.array([row])}) for weight, row in zip(weights, rows, strict=True)]
    others = [(4 * weight, delta) for weight, delta in reversed(answers)]
    one, two = (explored(layout, each, per_client=True) for each in (answers, others))
    size, place = np.abs(rows).max() + 1e-30, 2.0**-23  # what is held has a float32's digits
    np.testing.assert_allclose(one.deviation["w"], two.deviation["w"], rtol=place, atol=0)
    np.testing.assert_allclose(one.signed_mean["w"], two.signed_mean["w"], rtol=0, atol=place * size)
    np.testing.assert_allclose(one.normalised["w"], two.normalised["w"], rtol=place, atol=0)


@quick
@given(rows=st.lists(st.lists(st.integers(-9, 9), min_size=8, max_size=8), min_size=1, max_size=4))
def test_none_with_gamma_one_is_the_squared_signed_mean(rows: list[list[int]]):
    found = explore(*rows)
    np.testing.assert_allclose(scores(found)["w"], found.signed_mean["w"].astype(float) ** 2, rtol=1e-13, atol=0)


def test_one_explorer_agrees_with_itself_and_ranks_by_its_square_alone():
    found = explore([0.1, -0.7, 0.3])
    np.testing.assert_allclose(scores(found, "none", 1)["w"], found.deviation["w"], rtol=2.0**-22)


# How many


def test_the_count_is_exact_in_decimals():
    for percent in range(100):
        for size in (1, 2, 3, 7, 10, 33, 100, 150, 1000, 1_663_370):
            assert pruned_count(percent / 100, size) == percent * size // 100


@pytest.mark.parametrize(
    ("sparsity", "size", "count"),
    [(0.29, 100, 29), (0.57, 100, 57), (0.07, 100, 7), (0.001, 1000, 1), (1e-7, 10**7, 1), (0.1, 9, 0), (0.9, 1, 0)],
)
def test_counts_where_binary_floats_fall_short(sparsity: float, size: int, count: int):
    assert pruned_count(sparsity, size) == count


@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.1, 0.29, 0.3, 0.5, 0.57, 0.58, 0.7, 0.9, 0.95])
def test_exactly_so_many_entries_are_pruned_globally_and_of_each_layer(sparsity: float):
    layout = layout_of(a=(7, 10), b=(3, 11), c=(100,))
    score = {spec.name: np.random.default_rng(3).random(spec.shape) for spec in layout.specs}
    assert choose(layout, score, sparsity).kept == 203 - int(Fraction(str(sparsity)) * 203)
    by_name = choose(layout, score, sparsity, "layer").kept_by_name
    assert by_name == {spec.name: spec.size - int(Fraction(str(sparsity)) * spec.size) for spec in layout.specs}


# Which


def kept(layout: Layout, score: dict[str, list[float]], sparsity: float, scope: str = "global") -> dict[str, list[int]]:
    arrays = {name: np.array(values, float).reshape(layout[name].shape) for name, values in score.items()}
    keep = choose(layout, arrays, sparsity, scope).keep
    return {name: values.ravel().astype(int).tolist() for name, values in keep.items()}


AB = layout_of(a=(1, 4), b=(1, 4))


def test_the_lowest_scores_go_wherever_they_are_in_global_scope():
    assert kept(AB, {"a": [1, 9, 2, 3], "b": [8, 4, 7, 6]}, 0.5) == {"a": [0, 1, 0, 0], "b": [1, 0, 1, 1]}


def test_each_array_loses_its_own_lowest_in_layer_scope():
    assert kept(AB, {"a": [1, 9, 2, 3], "b": [8, 4, 7, 6]}, 0.5, "layer") == {"a": [0, 1, 0, 1], "b": [1, 0, 1, 0]}


def test_of_equal_scores_the_earlier_entry_goes_first_across_arrays_too():
    assert kept(AB, {"a": [2, 2, 1, 2], "b": [2, 2, 2, 2]}, 0.5) == {"a": [0, 0, 0, 1], "b": [0, 1, 1, 1]}
    assert kept(AB, {"a": [0, 0, 0, 0], "b": [0, -0.0, 0, 0]}, 0.5, "layer") == {"a": [0, 0, 1, 1], "b": [0, 0, 1, 1]}


def test_no_array_is_pruned_whole_and_the_next_lowest_make_up_the_count():
    assert kept(AB, {"a": [0, 0, 3, 0], "b": [5, 6, 7, 8]}, 0.5) == {"a": [0, 0, 1, 0], "b": [0, 1, 1, 1]}


def test_an_array_that_ties_with_itself_keeps_its_last_entry():
    assert kept(AB, {"a": [0, 0, 0, 0], "b": [5, 6, 7, 8]}, 0.75) == {"a": [0, 0, 0, 1], "b": [0, 0, 0, 1]}


OUT = layout_of("out", a=(2, 2), out=(2, 3))


def test_each_output_unit_keeps_one_weight_and_the_next_lowest_make_up_the_count():
    score = {"a": [7, 8, 9, 9], "out": [1, 2, 1, 4, 5, 6]}
    assert kept(OUT, score, 0.3) == {"a": [1, 1, 1, 1], "out": [0, 1, 0, 0, 1, 1]}
    assert kept(OUT, score, 0.7) == {"a": [0, 0, 0, 1], "out": [0, 1, 0, 0, 0, 1]}


def test_each_output_unit_keeps_one_weight_in_layer_scope_too():
    assert kept(OUT, {"a": [7, 8, 9, 9], "out": [1, 2, 1, 4, 5, 6]}, 0.5, "layer")["out"] == [0, 1, 0, 0, 1, 1]


def test_without_an_output_layer_its_rows_are_not_spared():
    layout = layout_of(None, a=(2, 2), out=(2, 3))
    assert kept(layout, {"a": [7, 8, 9, 9], "out": [1, 2, 1, 4, 5, 6]}, 0.3)["out"] == [0, 0, 0, 1, 1, 1]


def test_a_bias_named_as_the_output_keeps_every_unit():
    assert kept(layout_of("b", w=(2, 4), b=(2,)), {"w": [9] * 8, "b": [0, 0]}, 0.5)["b"] == [1, 1]


@pytest.mark.parametrize(("layout", "sparsity"), [(AB, 0.9), (OUT, 0.8), (layout_of("w", w=(5, 1)), 0.2)])
def test_what_the_floors_make_impossible_is_an_error(layout: Layout, sparsity: float):
    with pytest.raises(ValueError, match="must stay"):
        choose(layout, {spec.name: np.zeros(spec.shape) for spec in layout.specs}, sparsity)


def test_an_impossible_layer_is_named_in_layer_scope():
    layout = layout_of("w", a=(2, 8), w=(5, 1))
    score = {spec.name: np.zeros(spec.shape) for spec in layout.specs}
    assert choose(layout, score, 0.5).kept == 11
    with pytest.raises(ValueError, match="entries of 'w' would be pruned"):
        choose(layout, score, 0.5, "layer")


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_sparsity_zero_keeps_everything(scope: str):
    assert choose(AB, {"a": np.zeros((1, 4)), "b": np.zeros((1, 4))}, 0, scope).is_full


def test_the_mask_carries_its_version():
    assert choose(AB, {"a": np.zeros((1, 4)), "b": np.zeros((1, 4))}, 0.5, version=3).version == 3


ZERO = {"a": np.zeros((1, 4)), "b": np.zeros((1, 4))}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: choose(AB, ZERO, 1.0), r"sparsity = 1\.0"),
        (lambda: choose(AB, ZERO, -0.1), r"sparsity = -0\.1"),
        (lambda: choose(AB, ZERO, float("nan")), "sparsity = nan"),
        (lambda: choose(AB, {**ZERO, "b": np.array([[0, 0, np.nan, 0]])}, 0.5), "scores of 'b' are not finite"),
        (lambda: choose(AB, {**ZERO, "a": np.array([[0, 0, np.inf, 0]])}, 0.5), "scores of 'a' are not finite"),
        (lambda: choose(Layout.of({"b": np.zeros(3)}), {}, 0.5), "no array of the model is prunable"),
    ],
)
def test_wrong_arguments_are_refused_by_name(call: Callable[[], object], message: str):
    with pytest.raises(ValueError, match=message):
        call()


def oracle(layout: Layout, score: Arrays, sparsity: float, names: list[str]) -> set[tuple[str, int]] | None:
    """The pruned entries of the arrays ``names``, taken one after another; None if the floors forbid the count."""
    entries = [(name, i) for name in names for i in range(layout[name].size)]
    order = np.argsort(np.concatenate([score[name].ravel() for name in names]), kind="stable")
    count = int(Fraction(str(sparsity)) * len(entries))

    def groups(name: str, index: int) -> list[tuple[str, int]]:
        row = index // (layout[name].size // layout[name].shape[0])
        return [(name, -1), (name, row)] if name in layout.output else [(name, -1)]

    left: dict[tuple[str, int], int] = {}
    for entry in entries:
        for group in groups(*entry):
            left[group] = left.get(group, 0) + 1
    pruned = set()
    for position in order:
        entry = entries[position]
        if len(pruned) < count and all(left[group] > 1 for group in groups(*entry)):
            pruned.add(entry)
            for group in groups(*entry):
                left[group] -= 1
    return pruned if len(pruned) == count else None


@settings(deadline=None, max_examples=250)
@given(
    shapes=st.lists(st.sampled_from([(1,), (4,), (1, 3), (3, 1), (2, 3), (4, 2), (2, 1, 2)]), min_size=1, max_size=4),
    levels=st.integers(1, 12),
    seed=st.integers(0, 10**6),
    percent=st.integers(0, 99),
    scope=st.sampled_from(["global", "layer"]),
    data=st.data(),
)
def test_the_mask_is_that_of_a_slow_oracle(
    shapes: list[tuple[int, ...]], levels: int, seed: int, percent: int, scope: str, data: st.DataObject
):
    names = [f"a{i}" for i in range(len(shapes))]
    output = data.draw(st.sampled_from([None, *names]))
    layout = layout_of(output, **dict(zip(names, shapes, strict=True)))
    rng = np.random.default_rng(seed)
    score = {spec.name: rng.integers(-levels, levels, spec.shape) / 7 for spec in layout.specs}
    sparsity = percent / 100
    parts = [oracle(layout, score, sparsity, part) for part in ([names] if scope == "global" else [[n] for n in names])]
    if None in parts:
        with pytest.raises(ValueError, match="must stay"):
            choose(layout, score, sparsity, scope)
        return
    keep = choose(layout, score, sparsity, scope).keep
    pruned = {(name, int(i)) for name in names for i in np.flatnonzero(~keep[name].ravel())}
    assert pruned == set().union(*parts)


# Where training starts


def test_scouts_start_from_the_explorers_average_in_the_dtypes_of_the_model():
    found = explored(PAIR, [(1, ONE), (1, TWO)])
    initial = {"w": np.array([[1, 1]], np.float32), "b": np.array([0.5], np.float16), "n": np.array([9])}
    start = start_arrays(initial, found.signed_mean)
    assert {name: values.tolist() for name, values in start.items()} == {"w": [[3, 1]], "b": [2.5], "n": [9]}
    assert {name: values.dtype for name, values in start.items()} == {n: values.dtype for n, values in initial.items()}
    assert initial["w"].tolist() == [[1, 1]]


def test_scouts_start_keeps_an_array_without_dimensions_an_array():
    layout = Layout.of({"scale": np.array(1, np.float32)})
    start = start_arrays(
        {"scale": np.array(1, np.float32)}, explored(layout, [(1, {"scale": np.array(2.0)})]).signed_mean
    )
    np.testing.assert_array_equal(start["scale"], np.array(3, np.float32), strict=True)
    assert isinstance(start["scale"], np.ndarray)


# Weights of two names

E = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
MOVES = np.array([[1.0, 5.0], [2.0, 6.0]])


def found_of(layout: Layout, *answers: dict[str, np.ndarray]) -> Exploration:
    return explored(layout, [(1, answer) for answer in answers])


def twins(output: str | None = None, **more: tuple[int, ...]) -> Layout:
    return layout_of(output, e=(2, 2), d=(2, 2), **more)


def test_arrays_that_start_alike_and_move_alike_are_one_weight_known_by_its_first_name():
    layout = twins(f=(2, 2), o=(2, 2))
    initial = {"e": E, "d": E.copy(), "f": E.copy(), "o": E + 1}
    one, two = dict.fromkeys("edfo", MOVES), dict.fromkeys("edfo", -2 * MOVES)
    assert tied_weights(layout, initial, found_of(layout, one, two).statistics) == {"d": "e", "f": "e"}


def test_two_pairs_are_told_apart():
    layout = twins(f=(2, 2), o=(2, 2))
    initial = {"e": E, "d": E + 1, "f": E, "o": E + 1}
    assert tied_weights(layout, initial, found_of(layout, dict.fromkeys("edfo", MOVES)).statistics) == {
        "f": "e",
        "o": "d",
    }


def test_a_third_array_that_only_starts_alike_does_not_hide_a_pair():
    layout = twins(f=(2, 2))
    initial = dict.fromkeys("edf", E)  # a frozen or a target copy of a model whose own weights are tied
    assert tied_weights(layout, initial, found_of(layout, {"e": 0 * MOVES, "d": MOVES, "f": MOVES}).statistics) == {
        "f": "d"
    }


@pytest.mark.parametrize(
    "other",
    [
        [{"d": MOVES + 1}, {"d": MOVES}],
        [{"d": -MOVES}, {"d": MOVES}],
        [{"d": np.where(MOVES == 6, 6.5, MOVES)}, {"d": MOVES}],
    ],
    ids=["elsewhere", "backwards: the same squares", "in one entry"],
)
def test_arrays_that_start_alike_and_move_apart_are_not_tied(other: list[dict[str, np.ndarray]]):
    layout = twins()
    found = found_of(layout, *({"e": MOVES, **answer} for answer in other))
    assert tied_weights(layout, {"e": E, "d": E.copy()}, found.statistics) == {}


@pytest.mark.parametrize(
    "second",
    [E + 1, E.astype(np.float64), E.reshape(1, 4), E.T],
    ids=["other values", "another dtype", "another shape", "transposed"],
)
def test_arrays_that_start_apart_are_not_tied(second: np.ndarray):
    initial = {"e": E, "d": second}
    layout = Layout.of(initial)
    moves = {name: np.ones(array.shape) for name, array in initial.items()}
    assert tied_weights(layout, initial, found_of(layout, moves).statistics) == {}


@pytest.mark.parametrize("value", [0, 1, -0.5])
def test_arrays_of_one_value_are_never_tied(value: float):
    layout = twins()
    initial = {name: np.full((2, 2), value, np.float32) for name in "ed"}
    assert tied_weights(layout, initial, found_of(layout, {"e": MOVES, "d": MOVES}).statistics) == {}


def test_arrays_that_are_not_prunable_are_never_tied():
    layout = Layout.of({"e": E, "d": E}, exclude="d")
    assert tied_weights(layout, {"e": E, "d": E}, found_of(layout, {"e": MOVES, "d": MOVES}).statistics) == {}


def pair(output: str | None, sparsity: float, scope: str = "global") -> dict[str, list[int]]:
    """The mask of e, d (tied to e) and a third array w."""
    layout = layout_of(output, e=(2, 2), d=(2, 2), w=(1, 6))
    score = {"e": np.array([[1.0, 2.0], [7.0, 8.0]]), "w": np.array([[3.0, 4, 5, 6, 9, 10]])}
    mask = choose(layout, {**score, "d": score["e"]}, sparsity, scope, version=2, tied={"d": "e"})
    assert (mask.layout, mask.version) == (layout, 2)
    np.testing.assert_array_equal(mask.keep["e"], mask.keep["d"])
    return {name: keep.ravel().astype(int).tolist() for name, keep in mask.keep.items() if name != "d"}


def test_tied_weights_count_once_and_have_one_mask():
    assert pair(None, 0.5) == {"e": [0, 0, 1, 1], "w": [0, 0, 0, 1, 1, 1]}  # 5 of 4 + 6, not 7 of 14
    assert pair(None, 0.29) == {"e": [0, 0, 1, 1], "w": [1, 1, 1, 1, 1, 1]}
    assert pair(None, 0.5, "layer") == {"e": [0, 0, 1, 1], "w": [0, 0, 0, 1, 1, 1]}


@pytest.mark.parametrize("output", ["e", "d"])
def test_an_output_layer_that_is_tied_keeps_a_weight_of_each_unit_whichever_its_name(output: str):
    assert pair(output, 0.5) == {"e": [0, 1, 1, 1], "w": [0, 0, 0, 0, 1, 1]}
    assert pair(output, 0.7) == {"e": [0, 1, 0, 1], "w": [0, 0, 0, 0, 0, 1]}
    assert pair(output, 0.5, "layer") == {"e": [0, 1, 0, 1], "w": [0, 0, 0, 1, 1, 1]}


def test_what_the_floors_forbid_of_tied_weights_counted_once_is_an_error():
    with pytest.raises(ValueError, match="8 of the 10 entries of the model would be pruned, but 3 must stay"):
        pair("d", 0.8)


@pytest.mark.parametrize("ties", [None, {}], ids=str)
def test_without_ties_arrays_of_equal_scores_are_pruned_one_after_the_other(ties: dict[str, str] | None):
    layout = twins()
    keep = choose(layout, {"e": MOVES, "d": MOVES}, 0.125, tied=ties).keep
    assert (keep["e"].sum(), keep["d"].sum()) == (3, 4)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_mask_of_tied_weights_is_that_of_the_model_without_the_second_name(scope: str):
    random = np.random.default_rng(5)
    shapes = {"e": (6, 3), "w": (4, 3), "d": (6, 3), "o": (2, 4)}
    score = {name: random.random(shape) for name, shape in shapes.items()}
    score["d"] = score["e"]
    for percent in range(0, 80, 7):
        both = choose(layout_of("o", **shapes), score, percent / 100, scope, tied={"d": "e"}).keep
        alone = {name: shape for name, shape in shapes.items() if name != "d"}
        once = choose(layout_of("o", **alone), score, percent / 100, scope).keep
        for name, keep in both.items():
            np.testing.assert_array_equal(keep, once["e" if name == "d" else name])
