import dataclasses

import numpy as np
import pytest

from autoflip_flwr.core.layout import Layout
from autoflip_flwr.core.method import Method, check_method, check_requests
from autoflip_flwr.core.methods import LossExploration, Magnitude, Random, Snip
from autoflip_flwr.core.request import Request
from autoflip_flwr.core.schedules import Gradual
from autoflip_flwr.core.statistics import Accumulator, Exploration, Statistics, named, statistics_of

W0 = {"a": np.array([[1.0, -5.0], [2.0, 0.5]], np.float32), "b": np.array([[-3.0, 4.0, 0.1]], np.float32)}
LAYOUT = Layout.of(W0, output=None)


def kept(mask) -> dict[str, list[int]]:
    return {name: index.tolist() for name, index in mask.indices.items()}


# --- rivals, by hand ------------------------------------------------------------------------------------------------


def test_magnitude_keeps_the_largest():
    assert kept(Magnitude().first(0.5, LAYOUT, W0, None)) == {"a": [1, 2], "b": [0, 1]}
    assert kept(Magnitude(scope="layer").first(0.5, LAYOUT, W0, None)) == {"a": [1, 2], "b": [0, 1]}
    # sums of dims 4 and 4 of 4 and 3 entries: of 4 that stay each gets 2
    assert kept(Magnitude(scope="erk").first(0.5, LAYOUT, W0, None)) == {"a": [1, 2], "b": [0, 1]}


def test_chance_is_that_of_its_seed():
    one, again, other = (Random(seed=seed).first(0.5, LAYOUT, W0, None) for seed in (1, 1, 2))
    assert one.digest == again.digest != other.digest
    assert one.kept == other.kept == 4


def test_snip_keeps_what_the_losses_depend_on():
    assert Snip().request(0) == (Request("saliency", "all", "log8"),)
    assert Snip().request(1) == ()
    found = Accumulator(LAYOUT)
    for scale in (1.0, 3.0):
        found.add(1.0, {"saliency": {"a": scale * np.array([[4.0, 1], [0, 2]]), "b": scale * np.array([[3.0, 0, 5]])}})
    seen = found.result()
    assert seen.mean["saliency"]["a"].tolist() == [[8, 2], [0, 4]]
    assert kept(Snip().first(0.5, LAYOUT, W0, seen)) == {"a": [0, 3], "b": [0, 2]}


def test_snip_says_so_if_nothing_depends_on_anything():
    seen = Statistics({"saliency": {name: 0 * array for name, array in W0.items()}}, {}, 2)
    with pytest.raises(RuntimeError, match="saliency of zero everywhere"):
        Snip().inspect(LAYOUT, W0, seen)


def test_methods_are_values():
    assert LossExploration(epochs=2) == LossExploration(epochs=2) != LossExploration(epochs=3)
    assert repr(LossExploration(epochs=2, scope="layer")) == "LossExploration(scope='layer', epochs=2)"
    assert repr(Random()) == "Random()"
    with pytest.raises(dataclasses.FrozenInstanceError):
        LossExploration().epochs = 3  # type: ignore[misc]


def test_autoflip_is_dynamic_unless_it_is_the_papers():
    method, static = LossExploration(), LossExploration.static()
    assert (method.schedule, method.rank_by, method.initial) == (Gradual(initial_density=0.8), "magnitude", "explorers")
    assert (static.schedule, static.rank_by, static.initial) == ((), "deviation", "scratch")
    assert (method.epochs, static.epochs) == (1, 1)
    assert repr(static) == "LossExploration(schedule=(), explorers=1.0, rank_by='deviation', initial='scratch')"
    assert LossExploration.static(initial="explorers", epochs=5) == dataclasses.replace(
        static, initial="explorers", epochs=5
    )


def test_what_decides_the_deltas_is_told_from_what_is_made_of_them():
    method = LossExploration.static()
    for same in ({"gamma": 0.5}, {"scope": "layer"}, {"initial": "explorers"}, {"timeout": 3.0}, {"public": True}):
        assert dataclasses.replace(method, **same).exploring() == method.exploring()
    for other in ({"epochs": 2}, {"explorers": 0.5}, {"weighting": "examples"}, {"normalisation": "per-client"}):
        assert dataclasses.replace(method, **other).exploring() != method.exploring()


# --- statistics -----------------------------------------------------------------------------------------------------


def test_statistics_are_averaged_each_over_the_clients_that_report_it():
    found = Accumulator(LAYOUT, squares=["gradient"])
    found.add(1.0, {"gradient": {"a": np.full((2, 2), 2.0)}, "other": {"b": np.full((1, 3), 1.0)}})
    found.add(3.0, {"gradient": {"a": np.full((2, 2), -2.0)}})
    seen = found.result()
    assert seen.mean["gradient"]["a"].tolist() == [[-1, -1], [-1, -1]]
    assert seen.mean_square["gradient"]["a"].tolist() == [[4, 4], [4, 4]]
    assert seen.mean["other"]["b"].tolist() == [[1, 1, 1]]
    assert (seen.clients, list(seen.mean_square)) == (2, ["gradient"])


def test_an_exploration_is_statistics_under_other_names():
    found = Accumulator(LAYOUT, squares=["delta"])
    found.add(1.0, {"delta": W0})
    seen = found.result()
    exploration = named(seen)
    assert isinstance(exploration, Exploration)
    assert statistics_of(exploration) == seen
    others = Statistics({"saliency": {}}, {}, 1)
    assert named(others) is others is statistics_of(others)
    assert statistics_of(None) is None


# --- what a method may say ------------------------------------------------------------------------------------------


class Own(Method):
    def __init__(self, *asked: object, **fields: object) -> None:
        self.asked = asked
        vars(self).update(fields)

    def request(self, round_: int):
        return self.asked


@pytest.mark.parametrize(
    ("method", "kind", "text"),
    [
        (Own("gradient"), TypeError, r"Own.request\(0\) = \('gradient',\): must be a tuple of Request"),
        (Own(Request("Gradient!")), ValueError, "the name 'Gradient!' must be of lower-case letters"),
        (Own(Request("gradient", over="most")), ValueError, "over must be one of kept, pruned, all"),
        (Own(Request("gradient", code="int8")), ValueError, "code of log8, float32"),
        (Own(Request("gradient"), Request("gradient", "all")), ValueError, "the names of its requests must differ"),
        (Own(Request("delta", "kept")), ValueError, "deltas are there of all entries in round 0"),
        (Own(explorers=0), ValueError, r"Own: explorers = 0: must be a share in \(0, 1\]"),
        (Own(min_explorers=1.5), TypeError, "Own: min_explorers = 1.5: must be a whole number"),
        (Own(batches=0), ValueError, "Own: batches = 0: must be at least 1"),
        (Own(weighting="age"), ValueError, "Own: weighting = 'age': must be one of uniform, examples"),
        (Own(timeout="long"), TypeError, "Own: timeout = 'long': must be a number of seconds"),
    ],
)
def test_what_a_method_says_is_checked(method: Method, kind: type[Exception], text: str):
    with pytest.raises(kind, match=text):
        check_method(method)


def test_deltas_of_later_rounds_are_those_of_kept_entries():
    assert check_requests(Own(Request("delta", "kept")), 3) == (Request("delta"),)
    with pytest.raises(ValueError, match="of kept ones in the others"):
        check_requests(Own(Request("delta", "all")), 3)


def test_a_method_without_a_mask_says_what_is_missing():
    with pytest.raises(NotImplementedError, match=r"Own has no method first\(sparsity, layout, initial, seen\)"):
        Own().first(0.5, LAYOUT, W0, None)
