"""Masks that follow from the one before: which entries go and come, on a few weights, and counts in any case."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from autoflip_flwr.core.budget import Budget
from autoflip_flwr.core.layout import Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.regrow import drop_and_grow, reconfigure, shrink, vote

MODEL = {"a": np.array([[1.0, -5.0, 2.0, 0.5]]), "b": np.array([[-3.0, 4.0, 0.1, 0.2]])}
LAYOUT = Layout.of(MODEL, output=None)


def mask(a: str, b: str) -> Mask:
    return Mask.from_bool(LAYOUT, {n: np.array([[c == "1" for c in bits]]) for n, bits in (("a", a), ("b", b))})


def bits(found: Mask) -> tuple[str, ...]:
    return tuple("".join("01"[int(flag)] for flag in found.keep[name].ravel()) for name in MODEL)


def scores(a: list[float], b: list[float]) -> dict[str, np.ndarray]:
    return {"a": np.array([a]), "b": np.array([b])}


def test_shrinking_drops_the_smallest_and_brings_nothing_back():
    before = mask("1011", "0111")
    size = {name: np.abs(values) for name, values in MODEL.items()}
    assert bits(shrink(before, size, {("a", "b"): 3})) == ("1010", "0100")
    assert bits(shrink(before, size, {("a",): 1, ("b",): 2})) == ("0010", "0101")


def test_groups_that_are_below_their_budget_leave_it_to_the_others():
    before = mask("1000", "1111")
    assert bits(shrink(before, scores([1, 1, 1, 1], [4, 3, 2, 1]), {("a",): 2, ("b",): 2})) == ("1000", "1110")


def test_drop_and_grow_exchanges_the_smallest_for_the_largest_gradients():
    before = mask("1101", "1011")
    gradient = scores([9, 9, 0.1, 9], [0, -0.2, 0, 0])
    # of 3 kept entries, 34 % is 1: a drops 0.5 for its only pruned one, b drops 0.1
    assert bits(drop_and_grow(before, MODEL, gradient, 0.34)) == ("1110", "1101")
    assert bits(drop_and_grow(before, MODEL, gradient, 0.33)) == bits(before)  # floor(0.99) is 0


def test_nothing_is_dropped_where_nothing_can_grow():
    before = mask("1101", "1011")
    assert bits(drop_and_grow(before, MODEL, scores([9, 9, 0, 9], [0, 0.1, 0, 0]), 0.67)) == ("1101", "1101")


def test_of_equal_gradients_the_earlier_grow_and_of_equal_weights_the_earlier_are_dropped():
    before = Mask.from_bool(LAYOUT, {"a": np.array([[True, True, False, False]]), "b": np.ones((1, 4), bool)})
    model = {"a": np.ones((1, 4)), "b": MODEL["b"]}
    assert bits(drop_and_grow(before, model, scores([0, 0, 7, 7], [0] * 4), 0.5)) == ("0110", "1111")


def test_an_output_unit_keeps_a_weight_and_the_count_stays():
    layout = Layout.of({"w": np.zeros((2, 3))}, output={"w": 0})
    before = Mask.from_bool(layout, {"w": np.array([[True, False, False], [True, True, False]])})
    weight = {"w": np.array([[0.1, 0, 0], [2.0, 3.0, 0]])}
    found = drop_and_grow(before, weight, {"w": np.array([[0, 0, 0], [0, 0, 5.0]])}, 0.34)
    assert found.digest == before.digest  # the first unit's only weight stays


def test_reconfigure_lets_the_smallest_compete_over_the_whole_model():
    before = mask("1101", "1010")
    # a third of a's 3 and half of b's 2 reconsider: 0.5 of a, 0.1 of b
    importance = scores([0, 0, 3, 2], [0, 9, 1, 0])
    assert bits(reconfigure(before, MODEL, importance, 0.5)) == ("1110", "1100")
    assert bits(reconfigure(before, MODEL, importance, 0.1)) == bits(before)  # nobody reconsiders


def test_votes_keep_what_one_client_keeps_and_fill_up_by_votes():
    before = mask("1101", "1010")
    dropped = scores([0, 0.5, 0, 1.0], [1.0, 0, 1.0, 0])
    grown = scores([0, 0, 0.5, 0], [0, 0.25, 0, 0.75])
    # a: all drop the last one, its place goes to the third; b: all drop both, two have votes
    assert bits(vote(before, MODEL, dropped, grown)) == ("1110", "0101")
    none = scores([0] * 4, [0] * 4)
    assert bits(vote(before, MODEL, none, grown)) == bits(before)
    # nobody grows: what all drop stays, since the count does
    assert bits(vote(before, MODEL, dropped, none)) == bits(before)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.floats(0, 0.99), st.sampled_from(["global", "layer"]))
def test_counts_are_exact_whatever_the_values(seed: int, share: float, scope: str):
    draw = np.random.default_rng(seed)
    layout = Layout.of({"a": np.zeros((4, 6)), "b": np.zeros((3, 5)), "c": np.zeros((2, 4))})
    found = {name: draw.integers(-2, 3, array) / 2 for name, array in (("a", (4, 6)), ("b", (3, 5)), ("c", (2, 4)))}
    keep = {name: draw.random(array.shape) < 0.6 for name, array in found.items()}
    for flags in keep.values():
        flags[:, 0] = True
    before = Mask.from_bool(layout, keep)
    model = {name: np.where(keep[name], draw.normal(size=array.shape), 0) for name, array in found.items()}
    for after in (
        drop_and_grow(before, model, found, round(share, 6)),
        vote(before, model, {n: (a > 0) * 1.0 for n, a in found.items()}, {n: np.abs(a) for n, a in found.items()}),
    ):
        assert after.kept_by_name == before.kept_by_name
    assert reconfigure(before, model, found, round(share, 6)).kept == before.kept
    budget = {"global": Budget.whole, "layer": Budget.by_layer}[scope](layout, 0.7)
    after = shrink(before, {n: np.abs(a) for n, a in model.items()}, budget)
    assert after.kept == min(sum(budget.values()), before.kept)
    assert not any((after.keep[name] & ~keep[name]).any() for name in keep)
