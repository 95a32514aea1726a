"""Methods that change the mask during training: what they ask when, and the masks that they make, by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from autoflip_flwr.core.ballots import Ballots, votes_of
from autoflip_flwr.core.layout import Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.method import Method, check_method, check_requests
from autoflip_flwr.core.methods import Magnitude, Random
from autoflip_flwr.core.prunefl import PruneFl
from autoflip_flwr.core.request import Request
from autoflip_flwr.core.schedule import Schedule
from autoflip_flwr.core.schedules import Agreement, Gradual, Reconfigure, Regrow, Votes
from autoflip_flwr.core.statistics import Accumulator, Statistics
from autoflip_flwr.core.warmup import Warmup

W0 = {"a": np.array([[1.0, -5.0], [2.0, 0.5]], np.float32), "b": np.array([[-3.0, 4.0, 0.1]], np.float32)}
LAYOUT = Layout.of(W0, output=None)


def rigl(**settings) -> Random:
    return Random(scope="erk", schedule=Regrow(**settings))


def feddst(**settings) -> Random:
    return Random(scope="erk", schedule=Votes(**settings))


def planned(method: Method, sparsity: float = 0.5, rounds: int = 20) -> Method:
    method.plan(sparsity, rounds)
    return method


def kept(mask: Mask) -> dict[str, list[int]]:
    return {name: index.tolist() for name, index in mask.indices.items()}


def seen(**statistics: dict[str, np.ndarray]) -> Statistics:
    return Statistics({name.replace("_", "-"): arrays for name, arrays in statistics.items()}, {}, 3)


def test_gradual_begins_dense_and_drops_the_smallest_step_by_step():
    method = planned(Magnitude(schedule=Gradual(every=2, fall=0.5)), 0.5, 10)
    mask = method.first(0.5, LAYOUT, W0, None)
    assert mask.is_full
    counts = []
    for round_ in range(2, 11):
        new = method.refine(round_, mask, W0, None)
        mask = mask if new is None else new
        counts.append(mask.kept)
    # steps before rounds 3 and 5; density 0.5 + 0.5 / 8 is 3.06 of 7 to go: floor(0.4375 * 7) = 3 are pruned
    assert counts == [7, 4, 4, 4, 4, 4, 4, 4, 4]
    assert kept(mask) == {"a": [1, 2], "b": [0, 1]}
    assert all(method.request(round_) == () for round_ in range(11))


def test_gradual_may_begin_with_the_largest_weights():
    method = planned(Magnitude(schedule=Gradual(initial_density=0.6)))
    assert kept(method.first(0.5, LAYOUT, W0, None)) == {"a": [0, 1, 2], "b": [0, 1]}


def test_gradual_says_before_the_run_what_cannot_work():
    with pytest.raises(ValueError, match="10 rounds with a step every 10"):
        Gradual(every=10).plan(0.5, 10)
    Gradual(every=10).plan(0.0, 10)  # nothing is pruned
    few = Layout.of({"w": np.ones((5, 2))}, output={"w": 0})
    with pytest.raises(ValueError, match="would be pruned, but 5 must stay"):
        planned(Magnitude(schedule=Gradual()), 0.9).first(0.9, few, {"w": np.ones((5, 2))}, None)


def test_rigl_asks_for_the_top_gradients_of_pruned_entries_while_it_exchanges():
    method = planned(rigl(share=0.4, every=2, until=0.5), rounds=16)
    asked = {round_: method.request(round_) for round_ in range(17)}
    assert {round_: request for round_, request in asked.items() if request} == {
        2: (Request("gradient", "pruned", "log8", 0.341421),),
        4: (Request("gradient", "pruned", "log8", 0.2),),
        6: (Request("gradient", "pruned", "log8", 0.058579),),
    }
    for round_ in asked:
        check_requests(method, round_)


def test_rigl_begins_at_random_and_exchanges_after_the_round_that_asked():
    method = planned(Random(scope="erk", seed=3, schedule=Regrow(share=0.6, every=2, until=1.0)), rounds=20)
    assert method.first(0.5, LAYOUT, W0, None).kept == 4
    assert kept(method.first(0.5, LAYOUT, W0, None)) == kept(Random(scope="erk", seed=3).first(0.5, LAYOUT, W0, None))
    mask = Mask.from_bool(LAYOUT, {"a": np.array([[True, True], [False, False]]), "b": np.ones((1, 3), bool)})
    found = seen(gradient={"a": np.array([[0.0, 0], [0.5, -2]]), "b": np.zeros((1, 3))})
    assert method.refine(2, mask, W0, found) is None  # round 1 asked nothing
    assert method.refine(3, mask, W0, None) is None  # nobody reported
    # cosine: 0.585 of 2 is 1
    assert kept(method.refine(3, mask, W0, found)) == {"a": [1, 3], "b": [0, 1, 2]}


def test_feddst_asks_for_votes_and_counts_them():
    method = planned(feddst(share=0.6, every=2, until=1.0), rounds=20)
    share = method.schedules[0].exchanged(2)
    assert method.request(2) == (
        Request("smallness", "kept", "places", share),
        Request("gradient", "pruned", "places", share),
    )
    assert method.request(3) == ()
    mask = Mask.from_bool(LAYOUT, {"a": np.array([[True, True], [False, False]]), "b": np.ones((1, 3), bool)})
    found = seen(
        smallness={"a": np.array([[1.0, 0], [0, 0]]), "b": np.zeros((1, 3))},
        gradient={"a": np.array([[0, 0], [0.3, 0.7]]), "b": np.zeros((1, 3))},
    )
    assert kept(method.refine(3, mask, W0, found)) == {"a": [1, 3], "b": [0, 1, 2]}
    assert method.refine(3, mask, W0, seen(gradient=found.mean["gradient"])) is None


def test_prunefl_asks_one_client_first_and_begins_with_its_model():
    method = planned(PruneFl(schedule=Reconfigure(every=5, share=0.5)), rounds=20)
    assert method.request(0) == (Request("delta", "all"), Request("gradient-square", "all"))
    assert (method.min_explorers, round(method.explorers * 1000)) == (1, 0)
    assert method.config() == {"epochs": 5, "patience": 2}
    assert [round_ for round_ in range(1, 21) if method.request(round_)] == [5, 10, 15, 20]
    squares = {"a": np.array([[1.0, 9.0], [8.0, 0.0]]), "b": np.array([[0.0, 7.0, 6.0]])}
    found = seen(delta={name: array + 1 for name, array in W0.items()}, gradient_square=squares)
    mask = method.first(0.5, LAYOUT, W0, found)
    assert kept(mask) == {"a": [1, 2], "b": [1, 2]}
    began = method.begin(W0, found)
    assert {name: array.tolist() for name, array in began.items()} == {
        name: (2 * array + 1).tolist() for name, array in W0.items()
    }
    assert method.refine(5, mask, W0, found) is None
    # 2 of a and 0.1 of b reconsider; the largest squares are theirs and b's first
    later = seen(gradient_square={"a": np.array([[1.0, 0], [2, 0]]), "b": np.array([[9.0, 0, 3.0]])})
    assert kept(method.refine(6, mask, W0, later)) == {"a": [1], "b": [0, 1, 2]}
    with pytest.raises(RuntimeError, match="gradients of zero everywhere"):
        method.inspect(LAYOUT, W0, seen(gradient_square={name: 0 * array for name, array in W0.items()}))


@pytest.mark.parametrize("schedule", [Gradual(), Regrow(), Votes(), Reconfigure(), Agreement()])
def test_a_plan_is_kept_with_the_state_and_is_no_setting(schedule: Schedule):
    method = Magnitude(schedule=schedule)
    check_method(method)
    other = copy.deepcopy(method)
    method.plan(0.9, 50)
    assert method == other
    assert method.exploring() == other.exploring()
    assert repr(method) == f"Magnitude(schedule={type(schedule).__name__}())"
    other.load(method.state())
    assert (other.schedule.sparsity, other.schedule.rounds) == (0.9, 50)


@pytest.mark.parametrize(
    "schedule", [Regrow(every=1), Votes(every=1), Reconfigure(every=1), Gradual(drop_by="movement"), Agreement()]
)
def test_with_nothing_to_prune_nothing_is_asked_or_changed(schedule: Schedule):
    method = Magnitude(schedule=schedule)
    method.plan(0.0, 20)
    assert not any(method.request(round_) for round_ in range(1, 21))
    assert all(method.refine(round_, Mask.full(LAYOUT), W0, None) is None for round_ in range(2, 21))


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: Gradual(fall=0), ValueError, r"Gradual: fall = 0: must be a share in \(0, 1\]"),
        (lambda: Gradual(initial_density=1.5), ValueError, "Gradual: initial_density = 1.5"),
        (lambda: Gradual(every=0), ValueError, "Gradual: every = 0: must be at least 1"),
        (lambda: Gradual(scope="x"), ValueError, "Gradual: scope = 'x'"),
        (lambda: Gradual(drop_by="x"), ValueError, "Gradual: drop_by = 'x'"),
        (lambda: Gradual(power=0.5), ValueError, "Gradual: power = 0.5: must be a number >= 1"),
        (lambda: Regrow(after=0.6), ValueError, "Regrow: after = 0.6: must be below until = 0.6"),
        (lambda: Agreement(decay=1.0), ValueError, r"Agreement: decay = 1.0: must be a share in \[0, 1\)"),
        (lambda: Magnitude(schedule=[Gradual()]), TypeError, "Magnitude: schedule = .* must be a Schedule"),
        (lambda: Regrow(share=1), ValueError, r"Regrow: share = 1: must be a share in \(0, 1\)"),
        (lambda: Regrow(until="all"), TypeError, "Regrow: until = 'all': must be a number"),
        (lambda: Votes(every=1.5), TypeError, "Votes: every = 1.5: must be a whole number"),
        (lambda: PruneFl(epochs=0), ValueError, "PruneFl: epochs = 0: must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(make, kind, text):
    with pytest.raises(kind, match=text):
        make()


def moved(mean: float, square: float) -> Statistics:
    """Statistics in which each entry of ``a`` and ``b`` has moved alike."""
    whole = [{name: np.full(array.shape, value) for name, array in W0.items()} for value in (mean, square)]
    return Statistics({"delta": whole[0]}, {"delta": whole[1]}, 3)


def test_a_fall_may_begin_below_one_and_take_another_power():
    method = planned(Magnitude(schedule=Gradual(initial_density=0.8, fall=1.0, every=1, power=1.0)), 0.5, 4)
    mask = method.first(0.5, LAYOUT, W0, None)
    counts = [mask.kept]
    for round_ in (2, 3, 4):
        mask = method.refine(round_, mask, W0, None)
        counts.append(mask.kept)
    assert counts == [6, 5, 5, 4]  # densities 0.8, 0.7, 0.6, 0.5 of 7 entries


def test_where_the_target_is_denser_nothing_falls():
    method = planned(Magnitude(schedule=Gradual(initial_density=0.4, drop_by="movement")), 0.5)
    mask = method.first(0.5, LAYOUT, W0, None)
    assert mask.kept == 4
    assert not any(method.request(round_) or method.refine(round_, mask, W0, None) for round_ in range(1, 21))


def test_a_run_of_one_round_has_the_target_at_once():
    method = planned(Magnitude(schedule=Gradual()), 0.5, 1)
    assert method.first(0.5, LAYOUT, W0, None).kept == 4
    assert method.request(1) == ()


def test_layers_may_fall_to_the_densities_of_the_first_scores():
    method = planned(Magnitude(schedule=Gradual(fall=1.0, scope="explored")), 0.5, 3)
    mask = method.first(0.5, LAYOUT, W0, None)
    assert mask.is_full
    other = {"a": np.ones((2, 2), np.float32), "b": np.array([[9.0, 8.0, 7.0]], np.float32)}
    assert method.refine(2, mask, other, None).kept_by_name == {"a": 2, "b": 2}  # to 4.4 of 7; by magnitude b would win
    assert method.refine(3, mask, other, None).kept_by_name == {"a": 2, "b": 2}


@pytest.mark.parametrize(
    ("drop_by", "dropped"),
    [
        ("magnitude", {"a": [3], "b": [2]}),  # 0.5 and 0.1 are the smallest
        ("layer-magnitude", {"a": [3], "b": [2]}),
        ("magnitude-agreement", {"a": [1], "b": [1]}),  # the largest of each, but clients disagree
        ("movement", {"a": [3], "b": [1]}),  # 4 x 0 and 0.5 x 1 move least
        ("deviation", {"a": [0], "b": [1]}),
    ],
)
def test_entries_are_dropped_by(drop_by: str, dropped: dict[str, list[int]]):
    mean = {"a": np.array([[1.0, 0.1], [1.0, 1.0]]), "b": np.array([[1.0, 0.0, 9.0]])}
    square = {"a": np.array([[1.0, 9.0], [9.0, 9.0]]), "b": np.array([[9.0, 0.5, 81.0]])}
    method = planned(Magnitude(schedule=Gradual(fall=1.0, every=2, drop_by=drop_by, scope="global")), 2 / 7 + 1e-6, 3)
    assert [len(method.request(round_)) for round_ in range(4)] == [
        0,
        *[1 * (drop_by not in ("magnitude", "layer-magnitude"))] * 2,
        0,
    ]
    seen_ = Statistics({"delta": mean}, {"delta": square}, 2)
    assert method.refine(2, Mask.full(LAYOUT), W0, seen_) is None
    mask = method.refine(3, Mask.full(LAYOUT), W0, seen_)
    assert {name: np.flatnonzero(~keep.reshape(-1)).tolist() for name, keep in mask.keep.items()} == dropped


def test_agreement_brings_entries_back_whose_exploration_says_more_than_training():
    score = {"a": np.array([[8.0, 8.0], [4.0, 1.0]]), "b": np.array([[8.0, 8.0, 8.0]])}
    schedule = Agreement(every=2, until=1.0, decay=0.5)
    schedule.plan(0.5, 10)
    first = Mask.from_bool(LAYOUT, {"a": np.array([[True, True], [False, False]]), "b": np.ones((1, 3), bool)})
    schedule.begin(LAYOUT, score, first)
    assert schedule.request(3) == (Request("delta", "kept"),)
    mean = {"a": np.array([[0.1, 1.0], [0, 0]]), "b": np.array([[1.0, 1.0, 1.0]])}
    found = Statistics({"delta": mean}, {"delta": {name: values**2 for name, values in mean.items()}}, 2)
    assert schedule.refine(2, first, W0, found) is None
    new = schedule.refine(3, first, W0, found)
    # the kept entries' scores sum to 4.01 x 1.5 where the exploration's sum to 40: 4 becomes 0.6, above 0.015
    assert kept(new) == {"a": [1, 2], "b": [0, 1, 2]}
    other = Agreement(every=2, until=1.0, decay=0.5)
    other.load(schedule.state())
    later = Statistics(
        {"delta": {n: v + 1 for n, v in mean.items()}}, {"delta": {n: v + 1 for n, v in mean.items()}}, 2
    )
    for round_ in (4, 5):
        one, two = (each.refine(round_, new, W0, later) for each in (schedule, other))
    assert kept(one) == kept(two)


def test_schedules_take_their_turns():
    method = planned(Magnitude(schedule=(Gradual(fall=0.2, every=1), Regrow(share=0.9, every=1, until=1.0))), 0.5, 10)
    assert method.grow_from == "outside"
    assert method.weighting == "examples"
    mask = method.first(0.5, LAYOUT, W0, None)
    found = seen(gradient={name: np.ones(array.shape) for name, array in W0.items()})
    counts = []
    for round_ in range(2, 6):
        new = method.refine(round_, mask, W0, found)
        counts.append((new.kept, int(np.count_nonzero(~mask.keep["a"] & new.keep["a"]))))
        mask = new
    assert counts == [(4, 0), (4, 1), (4, 1), (4, 1)]


def test_a_fall_that_seeks_its_end_stops_when_the_clients_lose_as_much_as_they_win():
    size = Layout.of({"w": np.zeros((10, 20))}, output=None)
    model = {"w": np.arange(200.0).reshape(10, 20)}
    method = planned(Magnitude(schedule=Gradual(fall=1.0)), 0.98, 20)
    method.seek()
    mask, kept_ = Mask.full(size), []
    for round_ in range(1, 21):
        if round_ > 1:
            mask = method.refine(round_, mask, model, None) or mask
            kept_.append(mask.kept)
        worth = 2.0 ** (-round_ if round_ < 10 else round_ - 20)  # it falls, then rises
        method.watch(round_, {client: worth * (1 + client) for client in range(10)})
        if round_ == 12:
            state = method.state()
            method.plan(0.98, 20)
            method.seek()
            method.load(state)
    # two rounds are looked at, from the one in which the loss rises first
    assert len(set(kept_[:9])) == 9
    assert set(kept_[10:]) == {kept_[10]}
    assert kept_[10] > 20
    with pytest.raises(ValueError, match="Magnitude has no schedule in which the density falls"):
        Magnitude().seek()


class Telling(Schedule):
    """Tells clients the round and the number of kept entries."""

    prepares = True

    def prepare(self, round_, mask, model):
        return {"kept": mask.kept, "round": round_, "largest": float(model["a"].max())}


def test_schedules_prepare_rounds_together():
    method = Magnitude(schedule=(Gradual(), Telling()))
    assert method.prepares
    assert method.prepare(3, Mask.full(LAYOUT), W0) == {"kept": 7, "round": 3, "largest": 2.0}
    assert not Magnitude(schedule=Gradual()).prepares


def test_clients_are_told_what_the_next_step_drops():
    method = planned(Magnitude(schedule=Gradual(every=2, fall=0.5, extrusion=0.1)), 0.5, 10)
    assert method.prepares
    told = [method.prepare(round_, Mask.full(LAYOUT), W0) for round_ in range(1, 7)]
    # steps before rounds 3 and 5 keep 4 of 7 entries: 0.1, 0.5 and 1 go, 2 is the smallest that stays
    assert told == [{}, {"extrusion": 0.1, "extrude-below": 2.0}, {}, {"extrusion": 0.1, "extrude-below": 2.0}, {}, {}]
    mask = Mask.from_bool(LAYOUT, {"a": np.array([[True, True], [True, False]]), "b": np.ones((1, 3), bool)})
    assert method.prepare(2, mask, W0)["extrude-below"] == 2.0  # two of the six kept ones go
    assert method.prepare(4, method.refine(3, Mask.full(LAYOUT), W0, None), W0) == {}  # nothing goes in the next step
    assert planned(method, 0.0).prepare(2, mask, W0) == {}
    assert not Gradual().prepares
    with pytest.raises(ValueError, match=r"Gradual: extrusion = 0.1: needs drop_by='magnitude' and scope='global'"):
        Gradual(extrusion=0.1, scope="erk")


def test_a_client_votes_for_its_largest_weights_after_training():
    mask = Mask.from_bool(LAYOUT, {"a": np.array([[True, True], [True, False]]), "b": np.ones((1, 3), bool)})
    deltas = {"a": np.array([[4.5, 2.5], [-2.0, 0.0]]), "b": np.array([[0.0, 0.0, 5.0]])}
    # the kept weights become 5.5, -2.5 and 0; -3, 4 and 5.1
    votes = votes_of(mask, W0, deltas, 3)
    assert {name: values.tolist() for name, values in votes.items()} == {"a": [[1, 0], [0, 0]], "b": [[0, 1, 1]]}
    assert sum(int(values.sum()) for values in votes_of(mask, W0, deltas, 6).values()) == 6


def test_votes_decay_and_are_drawn_alike_after_a_resume():
    whole, ballots = Mask.full(LAYOUT), Ballots()
    by_size = ballots.ranked(whole, W0, (1, 2))
    assert {name: rank.tolist() for name, rank in by_size.items()} == {"a": [[3, 7], [4, 2]], "b": [[5, 6, 1]]}
    shares = {"a": np.array([[1.0, 0.0], [0.5, 0.5]]), "b": np.zeros((1, 3))}
    found = Statistics({"votes": shares}, {}, 4)
    for _ in range(2):
        ballots.add(whole, found)
    for_, against = ballots.state()
    assert for_["a"].ravel().tolist() == pytest.approx([7.6, 0, 3.8, 3.8])  # 4 x 0.9 + 4
    assert against["a"].ravel().tolist() == pytest.approx([0, 7.6, 3.8, 3.8])
    again = Ballots()
    again.load(ballots.state())
    one, two = (each.ranked(whole, W0, (1, 5)) for each in (ballots, again))
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert sorted(np.concatenate([rank.ravel() for rank in one.values()])) == [1, 2, 3, 4, 5, 6, 7]
    drawn = [ballots.ranked(whole, W0, (1, round_)) for round_ in range(200)]
    kept_ = np.mean([[rank["a"][0, 0] > 5, rank["a"][0, 1] > 5] for rank in drawn], axis=0)
    assert kept_[0] > 0.9 > 0.1 > kept_[1]


def test_votes_decide_what_is_dropped():
    method = planned(Magnitude(schedule=Gradual(fall=1.0, every=2, drop_by="votes")), 2 / 7 + 1e-6, 3)
    assert [len(method.request(round_)) for round_ in range(4)] == [0, 1, 1, 0]
    whole = Mask.full(LAYOUT)
    deltas = {"a": np.array([[0, 5.0], [0, 0]]), "b": np.array([[0, -4.0, 3.0]])}  # the two largest become nothing
    assert method.look(LAYOUT, {"delta": deltas}) == {"delta": deltas}  # no round was prepared
    for round_ in (2, 3):
        assert method.prepare(round_ - 1, whole, W0) == {}
        found = Accumulator(LAYOUT)
        for _ in range(50):
            found.add(1.0, method.look(LAYOUT, {"delta": deltas}))
        mask = method.refine(round_, whole, W0, found.result())
        assert (mask is None) == (round_ == 2)
    assert kept(mask) == {"a": [0, 2, 3], "b": [0, 2]}
    assert method.prepare(3, mask, W0) == {}
    assert method.look(LAYOUT, {"delta": deltas}) == {"delta": deltas}  # no step follows


def test_clients_warm_up_when_the_mask_is_new_also_after_a_resume():
    method = planned(Magnitude(schedule=(Gradual(fall=0.4), Warmup(share=0.3))), 0.5, 10)
    mask, told = method.first(0.5, LAYOUT, W0, None), []
    for round_ in range(1, 6):
        mask = (method.refine(round_, mask, W0, None) or mask) if round_ > 1 else mask
        told.append(bool(method.prepare(round_, mask, W0)))
        resumed = Magnitude(schedule=(Gradual(fall=0.4), Warmup(share=0.3)))
        resumed.load(method.state())
        method = resumed
    assert told == [True, True, True, False, False]  # 7, 5, 4, 4 and 4 entries
    assert planned(method).prepare(1, mask, W0) == {"warmup": 0.3}
    with pytest.raises(ValueError, match=r"Warmup: share = 0: must be a share in \(0, 1\]"):
        Warmup(share=0)
