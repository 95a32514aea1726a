from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoflip_flwr.core.budget import BUDGETS, Budget
from autoflip_flwr.core.choices import SCOPES
from autoflip_flwr.core.layout import Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.selection import select


def layout_of(output: str | None = None, **shapes: tuple[int, ...]) -> Layout:
    return Layout.of(
        {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, prunable=lambda *_: True, output=output
    )


AB = layout_of(a=(4, 5), b=(2, 5))


def test_each_scope_has_its_budget():
    assert tuple(BUDGETS) == SCOPES
    assert Budget.whole(AB, 0.7) == {("a", "b"): 9}
    assert Budget.by_layer(AB, 0.7) == {("a",): 6, ("b",): 3}


def test_erk_by_hand():
    # sums of dims 9 and 7 of 20 and 10 entries; 12 stay: eps = 12 / 16
    assert Budget.erk(AB, 0.6) == {("a",): 7, ("b",): 5}
    # 24 stay: eps = 1.5 would keep 13.5 and 10.5 of 10, so b is dense, and a gets the other 14
    assert Budget.erk(AB, 0.2) == {("a",): 14, ("b",): 10}
    kernel = layout_of(conv=(8, 4, 3, 3), out=(10, 8))
    # of 368 entries 37 stay; sums 18 and 18
    assert Budget.erk(kernel, 0.9) == {("conv",): 19, ("out",): 18}


def test_erk_leaves_an_output_its_units_and_each_array_an_entry():
    assert Budget.erk(layout_of("out", body=(30, 30), out=(20, 2)), 0.97)[("out",)] == 20
    assert Budget.erk(layout_of(a=(1000,), b=(1, 1)), 0.99) == {("a",): 10, ("b",): 1}


@settings(deadline=None, max_examples=80)
@given(st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=4), min_size=1, max_size=5), st.integers(0, 95))
def test_erk_keeps_exactly_what_the_sparsity_says(shapes: list[list[int]], percent: int):
    layout = layout_of(**{f"w{i}": tuple(shape) for i, shape in enumerate(shapes)})
    size, sparsity = layout.prunable_size, percent / 100
    budget = Budget.erk(layout, sparsity)
    kept = size - int(Fraction(str(sparsity)) * size)
    assert sum(budget.values()) == max(kept, len(shapes))
    assert all(1 <= each <= layout[name].size for (name,), each in budget.items())


def test_what_an_exploration_finds_may_be_the_densities_alone():
    found = select(AB, {"a": np.ones((4, 5)), "b": np.zeros((2, 5))}, Budget.whole(AB, 0.5))
    budget = Budget.explored(found)
    assert budget == {("a",): 14, ("b",): 1}
    rng = np.random.default_rng(1)
    chance = select(AB, {"a": rng.random((4, 5)), "b": rng.random((2, 5))}, budget)
    assert chance.kept_by_name == found.kept_by_name
    assert chance.keep["a"].tolist() != found.keep["a"].tolist()


@pytest.mark.parametrize("sparsity", [1.0, -0.1, float("nan")])
@pytest.mark.parametrize("scope", SCOPES)
def test_a_sparsity_out_of_range_is_refused(scope: str, sparsity: float):
    with pytest.raises(ValueError, match=r"sparsity = .*must be a number in"):
        BUDGETS[scope](AB, sparsity)


ONES = {"a": np.ones((4, 5)), "b": np.ones((2, 5))}


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        ({("a",): 3}, "each prunable array belongs to one group, and b does not"),
        ({("a", "b"): 3, ("b",): 1}, "each prunable array belongs to one group, and b does not"),
        ({("a", "b", "c"): 3}, "each prunable array belongs to one group, and c does not"),
        ({("a", "b"): 31}, "31 of the 30 entries of a, b cannot be kept"),
        ({("a",): 3, ("b",): -1}, "-1 of the 10 entries of b cannot be kept"),
        ({("a",): 0, ("b",): 5}, "20 of the 20 entries of 'a' would be pruned, but 1 must stay"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused(budget: dict[tuple[str, ...], int], text: str):
    with pytest.raises(ValueError, match=text):
        select(AB, ONES, budget)


def test_groups_are_ranked_by_themselves():
    score = {"a": np.arange(20.0).reshape(4, 5), "b": np.arange(100.0, 110).reshape(2, 5)}
    mask = select(AB, score, {("a",): 2, ("b",): 3}, version=4)
    assert [mask.indices["a"].tolist(), mask.indices["b"].tolist(), mask.version] == [[18, 19], [7, 8, 9], 4]


# --- entries that whole units have taken ----------------------------------------------------------------------------


def test_what_units_have_taken_is_pruned_and_counts():
    score = {"a": np.arange(20.0).reshape(4, 5), "b": np.ones((2, 5))}
    out = {"a": np.zeros((4, 5), bool)}
    out["a"][3] = True  # the best of them
    mask = select(AB, score, {("a",): 4, ("b",): 10}, out=out)
    assert mask.indices["a"].tolist() == [11, 12, 13, 14]


def test_a_unit_that_is_out_has_no_floor_and_the_others_keep_theirs():
    layout = layout_of("w", w=(3, 4))
    out = {"w": np.zeros((3, 4), bool)}
    out["w"][0] = True
    mask = select(layout, {"w": np.zeros((3, 4))}, {("w",): 2}, out=out)
    assert mask.keep["w"].sum(axis=1).tolist() == [0, 1, 1]


def test_units_may_take_no_more_than_is_pruned():
    layout = layout_of(w=(3, 4))
    with pytest.raises(ValueError, match="9 of the entries of the model are to be kept, but whole units leave 8"):
        select(
            layout, {"w": np.zeros((3, 4))}, {("w",): 9}, out={"w": np.repeat([[True], [False], [False]], 4, axis=1)}
        )


def test_nothing_out_is_the_same_as_no_out():
    rng = np.random.default_rng(2)
    score = {"a": rng.random((4, 5)), "b": rng.random((2, 5))}
    none = {"a": np.zeros((4, 5), bool), "b": np.zeros((2, 5), bool)}
    budget = Budget.whole(AB, 0.5)
    masks: list[Mask] = [
        select(AB, score, budget),
        select(AB, score, budget, out=none),
        select(AB, score, budget, out={}),
    ]
    assert len({mask.digest for mask in masks}) == 1
