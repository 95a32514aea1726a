"""The schedule by participants: when it asks, and the masks that it makes, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from autoflip_flwr.core.layout import Arrays, Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.methods import LossExploration
from autoflip_flwr.core.participants import Participants
from autoflip_flwr.core.schedules import Gradual
from autoflip_flwr.core.scored import Scored
from autoflip_flwr.core.statistics import Accumulator, Statistics

W0 = {"a": np.array([[1.0, -5.0], [2.0, 0.5]], np.float32), "b": np.array([[-3.0, 4.0, 0.1]], np.float32)}
LAYOUT = Layout.of(W0, output=None)
ONE = {"a": np.array([[4.0, 1.0], [2.0, 3.0]]), "b": np.array([[6.0, 5.0, 7.0]])}
TWO = {"a": np.array([[-4.0, 1.0], [-2.0, 5.0]]), "b": np.array([[1.0, 1.0, 1.0]])}


def explored(method: Scored, *deltas: Arrays) -> Statistics:
    found = Accumulator(LAYOUT, method.squares)
    for each in deltas:
        found.add(1.0, method.look(LAYOUT, {"delta": each}))
    return found.result()


def planned(method: Scored, sparsity: float = 0.5, rounds: int = 10) -> Scored:
    method.plan(sparsity, rounds)
    return method


def kept(mask: Mask | None) -> dict[str, list[int]] | None:
    return None if mask is None else {name: index.tolist() for name, index in mask.indices.items()}


def next_mask(method: Scored, round_: int, mask: Mask, *deltas: Arrays) -> Mask | None:
    method.sampled(LAYOUT, W0, explored(method, *deltas))
    return method.refine(round_, mask, W0, None)


def test_each_round_is_ranked_by_its_own_explorers():
    method = planned(LossExploration.static(schedule=Participants()))
    mask = method.first(0.5, LAYOUT, W0, explored(method, ONE, TWO))
    # the means are 0, 1, 0, 4 and 3.5, 3, 4: 4 of 7 are kept
    assert kept(mask) == {"a": [3], "b": [0, 1, 2]}
    mask = next_mask(method, 1, mask, ONE)
    assert kept(mask) == {"a": [0], "b": [0, 1, 2]}
    mask = next_mask(method, 2, mask, TWO)
    assert kept(mask) == {"a": [0, 2, 3], "b": [2]}  # of equal ones the last
    assert kept(next_mask(method, 3, mask, ONE, TWO)) == {"a": [3], "b": [0, 1, 2]}
    assert method.refine(4, mask, W0, None) is None  # nobody was told


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"gamma": 0.0}, {"a": [0, 3], "b": [0, 2]}),  # 16, 1, 4, 17 and 18.5, 13, 25
        ({"gamma": 0.0, "normalisation": "layer"}, {"a": [0, 3], "b": [0, 2]}),  # 15/16, 0, 3/16, 1; 11/24, 0, 1
        ({"scope": "layer"}, {"a": [1, 3], "b": [0, 2]}),  # 2 of 4 and 2 of 3
        ({"rank_by": "magnitude"}, {"a": [1, 3], "b": [1, 2]}),  # |W0 + mean| = 1, 4, 2, 4.5 and 0.5, 7, 4.1
    ],
)
def test_scores_are_the_methods_own(settings, expected):
    method = planned(LossExploration.static(schedule=Participants(), **settings))
    mask = Mask.from_bool(LAYOUT, {"a": np.array([[True, True], [False, False]]), "b": np.array([[True, True, False]])})
    assert kept(next_mask(method, 5, mask, ONE, TWO)) == expected


def test_per_client_normalisation_is_that_of_the_chosen_explorers():
    method = planned(LossExploration.static(schedule=Participants(), normalisation="per-client", gamma=0.0))
    mask = Mask.from_bool(LAYOUT, {"a": np.array([[True, True], [False, False]]), "b": np.array([[True, True, False]])})
    # 1, 0, 3/15, 8/15 and 11/24, 0, 1
    assert kept(next_mask(method, 2, mask, ONE)) == {"a": [0, 3], "b": [0, 2]}
    # 15/24, 0, 3/24, 1 and 0, 0, 0: of the equal ones the last, and that array keeps it
    assert kept(next_mask(method, 3, mask, TWO)) == {"a": [0, 2, 3], "b": [2]}


def test_it_asks_in_the_rounds_of_a_change_and_takes_its_turn_after_the_fall():
    method = planned(LossExploration.static(schedule=(Gradual(fall=0.3), Participants(every=2))))
    assert method.grow_from == "last"
    assert [round_ for round_ in range(1, 11) if method.asks_who(round_)] == [1, 3, 5, 7, 9]
    assert [method.request(round_) for round_ in range(1, 11)] == [()] * 10
    mask = method.first(0.5, LAYOUT, W0, explored(method, ONE, TWO))
    assert mask.is_full
    mask = next_mask(method, 1, mask, TWO)
    assert mask.is_full
    fallen = method.refine(2, mask, W0, None)
    # the smallest |w| are dropped first: 0.1 and 0.5
    assert kept(fallen) == {"a": [0, 1, 2], "b": [0, 1]}
    ranked = next_mask(method, 3, fallen, TWO)
    alone = Gradual(fall=0.3)
    alone.plan(0.5, 10)
    assert ranked.kept == alone.refine(3, fallen, W0, None).kept == 4
    assert kept(ranked) == {"a": [0, 2, 3], "b": [2]}
    with_none = planned(LossExploration.static(schedule=Participants()), sparsity=0.0)
    assert not any(with_none.asks_who(round_) for round_ in range(1, 11))


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="Participants: every = 0: must be at least 1"):
        Participants(every=0)
    with pytest.raises(ValueError, match=r"rank_by = 'random': Participants\(\) ranks by scores from round 1 on"):
        LossExploration.static(rank_by="random", schedule=(Gradual(), Participants()))
