"""Every aggregation strategy of Flower under AutoFlip, on a small problem that is really learnt."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

import numpy as np
import pytest
from apps import NO_FAILURES, choose, same_bytes
from flwr.serverapp.strategy import (
    Bulyan,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    Krum,
    MultiKrum,
    Result,
)
from flwr.serverapp.strategy.multikrum import select_multikrum
from matrices import EVERY_STRATEGY

from autoflip_flwr import AutoFlip, Layout, Mask, autoflip_mod
from autoflip_flwr.core.choices import PACKINGS
from autoflip_flwr.core.layout import Arrays
from autoflip_flwr.core.methods import LossExploration
from autoflip_flwr.testing import LocalGrid
from autoflip_flwr.wire.records import to_arrays, to_record
from benchmarks import digits

NODES, ROUNDS, SPARSITY = 7, 7, 0.5
STRATEGIES = list(digits.STRATEGIES)
PRIVATE = [name for name in STRATEGIES if name.startswith("DifferentialPrivacy")]
CLIPPED = [name for name in STRATEGIES if digits.mods_for(name)]
"""Flower's clipping mods count an integer counter's growth in the norm: all else would shrink to nearly nothing."""

ACROSS_PACKINGS = [
    "QFedAvg",
    "Krum",
    "MultiKrum",
    "Bulyan",
    "DifferentialPrivacyServerSideFixedClipping",
    "DifferentialPrivacyServerSideAdaptiveClipping",
]
"""Strategies that take norms or distances: zeros in between change the order of summation, and so the last bits."""


@dataclass(frozen=True)
class Run:
    strategy: AutoFlip
    result: Result
    seen: dict[int, Arrays]

    @property
    def arrays(self) -> Arrays:
        return to_arrays(self.result.arrays)


def start(strategy, mods, rounds, *, counter=True, grid=None):
    """The run's result, and the global model before and after each round."""
    random.seed(7)
    np.random.seed(7)  # differential privacy draws its noise from it
    seen = {}
    result = strategy.start(
        LocalGrid(digits.client_app(mods), NODES) if grid is None else grid,
        to_record(digits.model(counter=counter)),
        num_rounds=rounds,
        evaluate_fn=lambda round_, arrays: seen.setdefault(round_, to_arrays(arrays)) and None,
    )
    return result, seen


@functools.cache
def scheduled(counter) -> tuple[Mask, Mask]:
    """Two masks of the same density that share about half of what they keep."""
    layout = Layout.of(digits.model(counter=counter))
    draws = [np.random.default_rng(seed) for seed in (1, 2)]
    return tuple(
        choose(layout, {spec.name: draw.random(spec.shape) for spec in layout.prunable}, SPARSITY, "global")
        for draw in draws
    )


@functools.cache
def pruned(name, coordinates, changing, noise, outside="zero") -> Run:
    counter = name not in CLIPPED
    inner = digits.STRATEGIES[name](NODES)
    if not noise:
        inner.noise_multiplier = inner.clipped_count_stddev = 0.0
    options = {"sparsity": SPARSITY, "method": LossExploration.static(public=True), "outside": outside}
    if changing:
        first, other = scheduled(counter)
        options = {"outside": outside, "mask": first, "mask_schedule": {3: other, 5: first}.get}
    strategy = AutoFlip(inner, coordinates=coordinates, **options)
    return Run(strategy, *start(strategy, [autoflip_mod, *digits.mods_for(name)], ROUNDS, counter=counter))


def respects(arrays, mask):
    return all(not arrays[name][~keep].any() and arrays[name][keep].any() for name, keep in mask.keep.items())


def stands_at(arrays, mask, base):
    """Whether what a mask prunes is the base's, bit for bit, and something else has moved."""
    return all(np.array_equal(arrays[name][~keep], base[name][~keep]) for name, keep in mask.keep.items()) and any(
        not np.array_equal(arrays[name], base[name]) for name in mask.keep
    )


def counted(rounds):
    """What the counter of the node with the most examples has reached."""
    return rounds * -(-max(map(len, digits.partitions(NODES))) // digits.BATCH)


def check_end(run, least_accuracy, least_of_selections):
    assert run.strategy.ledger.failure_counts() == NO_FAILURES
    assert list(run.arrays) == list(run.seen[0])
    if "steps" in run.seen[0]:
        assert run.arrays["steps"].dtype == np.int64
        assert run.arrays["steps"] == counted(ROUNDS)
    slow = type(run.strategy.strategy) in (Krum, MultiKrum, Bulyan)  # they drop nodes, of label-skewed data
    assert digits.accuracy(run.arrays) > (least_of_selections if slow else least_accuracy)  # chance is 0.1


@functools.cache
def alone(name):
    return start(digits.STRATEGIES[name](NODES), digits.mods_for(name), 3, counter=False)[0]


@pytest.mark.parametrize(("coordinates", "outside"), [("packed", "zero"), ("dense", "zero"), ("packed", "initial")])
@pytest.mark.parametrize("name", EVERY_STRATEGY)
def test_with_nothing_pruned_the_result_is_the_wrapped_strategys_bit_for_bit(name, coordinates, outside):
    wrapped = AutoFlip(digits.STRATEGIES[name](NODES), sparsity=0.0, coordinates=coordinates, outside=outside)
    result, _ = start(wrapped, [autoflip_mod, *digits.mods_for(name)], 3, counter=False)
    same_bytes(to_arrays(alone(name).arrays), to_arrays(result.arrays))
    assert alone(name).train_metrics_clientapp == result.train_metrics_clientapp
    assert list(result.train_metrics_clientapp) == [1, 2, 3]


@pytest.mark.parametrize("coordinates", PACKINGS)
@pytest.mark.parametrize("name", EVERY_STRATEGY)
def test_a_static_mask_is_exact_and_respected_and_the_model_learns(name, coordinates):
    run = pruned(name, coordinates, False, True)
    mask = run.strategy.mask
    assert mask.kept == mask.layout.prunable_size - int(SPARSITY * mask.layout.prunable_size)
    assert all(respects(arrays, mask) for arrays in run.seen.values())
    same_bytes(run.arrays, run.seen[ROUNDS])
    check_end(run, 0.85, 0.6)


@pytest.mark.parametrize("coordinates", PACKINGS)
@pytest.mark.parametrize("name", EVERY_STRATEGY)
def test_masks_that_change_are_respected_in_their_rounds_and_the_model_learns(name, coordinates):
    run = pruned(name, coordinates, True, True)
    first, other = scheduled(name not in CLIPPED)
    for round_, arrays in run.seen.items():
        assert respects(arrays, other if round_ in (3, 4) else first), round_
    assert run.strategy.mask.kept == other.kept == first.layout.prunable_size // 2
    check_end(run, 0.65, 0.35)


@pytest.mark.parametrize("coordinates", PACKINGS)
@pytest.mark.parametrize("name", EVERY_STRATEGY)
def test_outside_the_mask_the_start_stands_bit_for_bit_and_the_model_learns(name, coordinates):
    run = pruned(name, coordinates, True, True, "initial")
    counter = name not in CLIPPED
    first, other = scheduled(counter)
    base = digits.model(counter=counter)
    same_bytes(run.seen[0], base)
    for round_, arrays in run.seen.items():
        assert round_ == 0 or stands_at(arrays, other if round_ in (3, 4) else first, base), round_
    same_bytes(run.arrays, run.seen[ROUNDS])
    check_end(run, 0.6, 0.35)


@pytest.mark.runs
@pytest.mark.parametrize("outside", ["zero", "initial"])
@pytest.mark.parametrize("changing", [False, True], ids=["static", "changing"])
@pytest.mark.parametrize("name", EVERY_STRATEGY)
def test_packed_and_dense_coordinates_agree(name, changing, outside):
    # without noise: in full arrays it is drawn for the pruned entries too, so the draws differ by construction
    packed, dense = (pruned(name, each, changing, name not in PRIVATE, outside) for each in PACKINGS)
    assert packed.strategy.mask.digest == dense.strategy.mask.digest
    if name not in ACROSS_PACKINGS:
        same_bytes(packed.arrays, dense.arrays)
    for key, array in packed.arrays.items():
        np.testing.assert_allclose(array, dense.arrays[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CLIPPED)
def test_an_integer_counter_passes_flowers_clipping_mods_unharmed(name):
    strategy = AutoFlip(digits.STRATEGIES[name](NODES), sparsity=SPARSITY, method=LossExploration.static(public=True))
    result, _ = start(strategy, [autoflip_mod, *digits.mods_for(name)], 3)
    arrays = to_arrays(result.arrays)
    assert arrays["steps"].dtype == np.int64
    assert arrays["steps"] == counted(3)
    assert respects(arrays, strategy.mask)


@pytest.mark.parametrize("name", PRIVATE)
def test_privacy_around_autoflip_names_the_right_nesting_before_any_client_works(name):
    wrong = digits.STRATEGIES[name](NODES)
    wrong.strategy = AutoFlip(wrong.strategy)
    grid = LocalGrid(digits.client_app([autoflip_mod, *digits.mods_for(name)]), NODES)
    with pytest.raises(RuntimeError, match=r"AutoFlip\(DP\(strategy\)\)"):
        start(wrong, [], 1, grid=grid)
    assert grid.sent == []


SHAPES = {name: array.shape for name, array in digits.model(counter=False).items()}


def shapes(record):
    return {name: array.shape for name, array in record.items() if name in SHAPES}


def looking(kind, seen, **options):
    """A user's subclass that looks at the arrays of the replies and at what it makes of them."""

    class Looking(kind):
        def aggregate_train(self, server_round, replies):
            batch = list(replies)
            seen.extend(shapes(reply.content["arrays"]) for reply in batch)
            arrays, metrics = super().aggregate_train(server_round, batch)
            seen.append(shapes(arrays))
            return arrays, metrics

    return Looking(fraction_evaluate=0.0, **options)


def choosing(seen):
    """Bulyan with a user's own selection rule."""

    def rule(contents, malicious, count):
        seen.extend(shapes(content["arrays"]) for content in contents)
        return select_multikrum(contents, malicious, count)

    return Bulyan(fraction_evaluate=0.0, num_malicious_nodes=1, selection_rule=rule)


OWN = {
    "a subclass of FedAdam": lambda seen: looking(FedAdam, seen, eta=0.05),
    "a subclass of Krum": lambda seen: looking(Krum, seen, num_malicious_nodes=1),
    "privacy around a subclass of FedAvg": lambda seen: DifferentialPrivacyServerSideFixedClipping(
        looking(FedAvg, seen), noise_multiplier=0.05, clipping_norm=1.5, num_sampled_clients=NODES
    ),
    "Bulyan with a selection rule": choosing,
}


@pytest.mark.parametrize("kind", OWN)
def test_code_of_the_users_own_sees_full_arrays_by_name(kind):
    seen = []
    strategy = AutoFlip(OWN[kind](seen), sparsity=SPARSITY, method=LossExploration.static(public=True))
    result, models = start(strategy, [autoflip_mod], 2)
    assert len(seen) >= 2 * NODES
    assert all(found == SHAPES for found in seen), seen
    assert respects(to_arrays(result.arrays), strategy.mask)
    assert digits.accuracy(models[2]) > digits.accuracy(models[0])
