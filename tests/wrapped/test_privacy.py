"""Differential privacy under AutoFlip: what is refused, what is spent, where the noise goes, and what a node sends."""

from __future__ import annotations

import dataclasses
import json
import math
import random

import numpy as np
import pytest
from apps import NO_FAILURES, arrays_of, choose, examples, message_app, model, record
from flwr.app import Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedMedian,
    FedProx,
)
from flwr.supercore.privacy_accounting import NeighboringRelation, PrivacyConfig, PrivacySpent, SamplingMethod

from autoflip_flwr import AutoFlip, Layout, Mask, autoflip_mod
from autoflip_flwr.core.choices import PACKINGS, VALUES
from autoflip_flwr.core.methods import LossExploration
from autoflip_flwr.replies.quarantine import ReplyRules
from autoflip_flwr.server.settings import Values
from autoflip_flwr.testing import LocalGrid
from autoflip_flwr.wire.keys import EXPLORE, HEADER, MASK_RECORD
from autoflip_flwr.wire.messages import split_vectors, unpack_deltas
from autoflip_flwr.wrapped.privacy import RELATIONS, PrivacyBudget

NODES, NOISE, CLIP, COUNT_NOISE = 4, 0.5, 0.25, 2.0
SHORT = 0.2
"""Seconds after which replies that never come are given up."""

MODEL = {name: array for name, array in model().items() if array.dtype.kind == "f"}
LAYOUT = Layout.of(MODEL)
MASK = choose(LAYOUT, {s.name: np.random.default_rng(1).random(s.shape) for s in LAYOUT.prunable}, 0.5, "global")


def inner(kind=FedAvg, **options):
    return kind(fraction_evaluate=0.0, **options)


def fixed(kind):
    return lambda strategy=None, noise=NOISE, needed=NODES: kind(strategy or inner(), noise, CLIP, needed)


def adaptive(kind):
    return lambda strategy=None, noise=NOISE, needed=NODES: kind(
        strategy or inner(), noise, needed, initial_clipping_norm=CLIP, clipped_count_stddev=COUNT_NOISE
    )


WRAPPERS = {
    "server-side fixed": (fixed(DifferentialPrivacyServerSideFixedClipping), []),
    "client-side fixed": (fixed(DifferentialPrivacyClientSideFixedClipping), [fixedclipping_mod]),
    "server-side adaptive": (adaptive(DifferentialPrivacyServerSideAdaptiveClipping), []),
    "client-side adaptive": (adaptive(DifferentialPrivacyClientSideAdaptiveClipping), [adaptiveclipping_mod]),
}
FIXED = list(WRAPPERS)[:2]

each_wrapper = pytest.mark.parametrize("name", WRAPPERS)


def alike(message, context, call_next):
    """A mod after which each client says that it has as many examples as any other."""
    reply = call_next(message, context)
    reply.content["metrics"]["num-examples"] = 5
    return reply


def grid_of(name, *, nodes=NODES, weights=None, **options):
    mods = [autoflip_mod, *WRAPPERS[name][1], *([alike] if weights == "alike" else [])]
    return LocalGrid(message_app(mods=mods), nodes, **options)


def start(strategy, grid, rounds=1, arrays=MODEL, timeout=60.0):
    random.seed(7)
    np.random.seed(7)  # Flower draws its noise from it
    models = {}
    strategy.start(grid, record(arrays), rounds, timeout, evaluate_fn=lambda at, seen: models.update({at: seen}))
    return {round_: arrays_of(seen) for round_, seen in models.items()}


def same(left, right):
    return all(left[name].tobytes() == right[name].tobytes() for name in left)


# --- the exploration --------------------------------------------------------------------------------------------------


@each_wrapper
@pytest.mark.parametrize("options", [{}, {"method": LossExploration.static(initial="explorers")}, {"seed": 1}], ids=str)
def test_an_exploration_under_a_wrapper_is_refused_before_any_client_works(name, options):
    wrapper, _ = WRAPPERS[name]
    grid = grid_of(name)
    with pytest.raises(ValueError, match=rf"outside the noise .* {type(wrapper()).__name__}: .*public=True"):
        start(AutoFlip(wrapper(), sparsity=0.5, **options), grid)
    assert grid.sent == []


@each_wrapper
def test_a_declared_exploration_runs_and_is_no_release(name):
    strategy = AutoFlip(WRAPPERS[name][0](), sparsity=0.5, method=LossExploration.static(public=True))
    start(strategy, grid_of(name), rounds=2)
    assert strategy.exploration.explorers == NODES
    assert strategy.privacy.releases == 2


def test_what_does_not_explore_needs_no_declaration():
    wrapper, _ = WRAPPERS["server-side fixed"]
    first = AutoFlip(inner(), sparsity=0.5)
    start(first, grid_of("server-side fixed"))
    for ready in ({"mask": MASK}, {"exploration": first.exploration}, {"sparsity": 0.0}):
        strategy = AutoFlip(wrapper(), **ready)
        start(strategy, grid_of("server-side fixed"))
        assert strategy.privacy.releases == 1
    assert first.privacy is None


def test_a_second_start_with_the_mask_of_the_first_does_not_explore():
    strategy = AutoFlip(WRAPPERS["server-side fixed"][0](), sparsity=0.5, method=LossExploration.static(public=True))
    start(strategy, grid_of("server-side fixed"))
    strategy.exploration_public = False
    start(strategy, grid_of("server-side fixed"))
    assert strategy.privacy.releases == 2


# --- rounds that lack replies -----------------------------------------------------------------------------------------


def broken(reply):
    if reply.metadata.src_node_id == 101 and reply.has_content() and reply.content["autoflip"]["round"] == 2:
        reply.content["metrics"]["num-examples"] = -1
    return reply


def failing(reply):
    if reply.metadata.src_node_id == 101 and reply.content["autoflip"]["round"] == 2:
        error = Message(Error(2, "gone"), reply_to=reply)
        error.metadata.__dict__.update(_src_node_id=101, _reply_to_message_id=reply.metadata.reply_to_message_id)
        return error
    return reply


def absent(replies):
    late = [reply for reply in replies if reply.metadata.src_node_id == 101]
    return [reply for reply in replies if reply not in late or reply.content["autoflip"]["round"] != 2]


MISSING = {
    "rejected": {"tamper": broken},
    "errors": {"tamper": failing},
    "absent": {"arrange": absent},
}


@each_wrapper
@pytest.mark.parametrize("why", MISSING)
@pytest.mark.parametrize("coordinates", PACKINGS)
def test_a_round_that_lacks_a_reply_keeps_the_model_and_the_next_goes_on(name, why, coordinates, caplog):
    strategy = AutoFlip(WRAPPERS[name][0](), mask=MASK, coordinates=coordinates)
    models = start(strategy, grid_of(name, **MISSING[why]), rounds=3, timeout=SHORT)
    assert same(models[1], models[2])
    assert not same(models[0], models[1])
    assert not same(models[2], models[3])
    assert strategy.ledger.failure_counts()[why] == 1
    assert (strategy.privacy.releases, strategy.privacy.refused) == (2, 1)
    told = "round 2: the model stays as it was: 3 replies count, and the noise is scaled for 4"
    assert told in caplog.text


@each_wrapper
def test_a_round_without_any_reply_ends_nothing(name):
    def first(replies):
        return [reply for reply in replies if reply.content[HEADER]["round"] == 1]

    strategy = AutoFlip(WRAPPERS[name][0](), mask=MASK)
    models = start(strategy, grid_of(name, arrange=first), rounds=3, timeout=SHORT)
    assert same(models[1], models[3])
    assert (strategy.privacy.releases, strategy.privacy.refused) == (1, 2)


@each_wrapper
def test_without_any_reply_in_the_first_round_nothing_is_spent(name):
    strategy = AutoFlip(WRAPPERS[name][0](), mask=MASK)
    with pytest.raises(RuntimeError, match="round 1: no reply of 4 nodes counts: no reply in time"):
        start(strategy, grid_of(name, arrange=lambda replies: []), rounds=2, timeout=SHORT)
    assert strategy.privacy == PrivacyBudget()


@each_wrapper
def test_more_nodes_than_the_noise_is_scaled_for_may_be_late(name):
    strategy = AutoFlip(WRAPPERS[name][0](needed=NODES - 1), mask=MASK)
    models = start(strategy, grid_of(name, arrange=absent), rounds=2, timeout=SHORT)
    assert not same(models[1], models[2])
    assert strategy.privacy.releases == 2


def test_integers_of_a_round_that_is_not_aggregated_are_not_taken_either():
    with_counter = Layout.of(model())
    mask = Mask.from_bool(with_counter, MASK.keep)
    sent = []
    app = message_app(lambda message, context: sent.append(int(arrays_of(message.content["arrays"])["steps"])))
    strategy = AutoFlip(WRAPPERS["server-side fixed"][0](), mask=mask)
    start(strategy, LocalGrid(app, NODES, arrange=absent), rounds=3, arrays=model(), timeout=SHORT)
    assert sent == [0] * NODES + [4] * 2 * NODES


class Accountant:
    """As Flower's, which needs a package more; it notes what it is given."""

    config = PrivacyConfig(1e-5, NODES, NeighboringRelation.ADD_OR_REMOVE_ONE, SamplingMethod.NO_AMPLIFICATION)

    def __init__(self):
        self.events = []

    def compose(self, event, count=1):
        self.events.append(event)

    def get_privacy_spent(self, delta=None):
        return PrivacySpent(0.0, 1e-5, len(self.events), "none")


@pytest.mark.parametrize("name", FIXED)
def test_a_wrapper_with_an_accountant_counts_the_same_rounds_and_starts_again(name):
    accountant = Accountant()
    kind = type(WRAPPERS[name][0]())
    strategy = AutoFlip(kind(inner(), NOISE, CLIP, NODES, accountant=accountant), mask=MASK)
    for _ in range(2):  # a round that it has noted and never heard of again would end the second start
        start(strategy, grid_of(name, weights="alike", arrange=absent), rounds=2, timeout=SHORT)
    assert len(accountant.events) == strategy.privacy.releases == 2
    assert strategy.privacy.refused == 2


@pytest.mark.parametrize("name", FIXED)
def test_rounds_that_the_rules_refuse_leave_no_event_behind(name):
    accountant = Accountant()
    kind = type(WRAPPERS[name][0]())
    rules = ReplyRules(min_replies=NODES + 1)
    strategy = AutoFlip(kind(inner(), NOISE, CLIP, NODES, accountant=accountant), mask=MASK, rules=rules)
    for _ in range(2):
        start(strategy, grid_of(name, weights="alike"), rounds=2, timeout=SHORT)
    assert not accountant.events
    assert strategy.privacy.refused == 4


# --- what is spent ----------------------------------------------------------------------------------------------------


def test_epsilon_by_its_closed_form():
    budget = PrivacyBudget(releases=10, rho=10 / (2 * 2.0**2))  # ten rounds at a noise multiplier of 2
    assert budget.rho == 1.25
    assert budget.epsilon(1e-5, "add-or-remove-one") == 1.25 + 2 * math.sqrt(1.25 * math.log(1e5))
    assert budget.epsilon() == pytest.approx(5 + 2 * math.sqrt(5 * math.log(1e5)), rel=1e-15)
    assert budget.epsilon() == pytest.approx(20.174271293851465, rel=1e-12)
    assert PrivacyBudget().epsilon() == 0
    for delta in (0, 1, -1, math.nan):
        with pytest.raises(ValueError, match="delta = "):
            budget.epsilon(delta)
    with pytest.raises(ValueError, match=r"relation = 'zero': must be one of add-or-remove-one, replace-one"):
        budget.epsilon(relation="zero")


def test_the_budget_is_plain_state():
    strategy = AutoFlip(WRAPPERS["server-side fixed"][0](), mask=MASK)
    start(strategy, grid_of("server-side fixed"), rounds=2)
    saved = json.loads(json.dumps(dataclasses.asdict(strategy.privacy)))
    later = AutoFlip(WRAPPERS["server-side fixed"][0](), mask=MASK)
    later.privacy = PrivacyBudget(**saved)
    start(later, grid_of("server-side fixed"), rounds=1)
    assert later.privacy.releases == 3
    assert later.privacy.rho == pytest.approx(1.5 * strategy.privacy.rho)


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("coordinates", PACKINGS)
def test_with_equal_weights_a_round_costs_what_the_noise_multiplier_says(name, coordinates, caplog):
    strategy = AutoFlip(WRAPPERS[name][0](), mask=MASK, coordinates=coordinates)
    start(strategy, grid_of(name, weights="alike"), rounds=3)
    assert strategy.privacy.rho == pytest.approx(3 / (2 * NOISE**2), rel=1e-12)
    assert (
        "round 3: privacy spent at delta 1e-05: epsilon 57.25 (replace-one), 22.62 (add-or-remove-one), 3 releases"
        in caplog.text
    )


@pytest.mark.parametrize("name", FIXED)
def test_the_client_with_the_most_examples_has_the_largest_share_and_costs_more(name):
    counts = [10 + 7 * part for part in range(NODES)]
    share = max(counts) / sum(counts)
    strategy = AutoFlip(WRAPPERS[name][0](), mask=MASK)
    start(strategy, grid_of(name))
    assert strategy.privacy.rho == pytest.approx((NODES * share / NOISE) ** 2 / 2, rel=1e-12)


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("name", FIXED)
def test_one_client_can_change_the_average_by_just_what_the_budget_assumes(name, relation):
    def app(direction):
        """All clients walk far the same way, but for the one with the largest share."""
        found = ClientApp(mods=[autoflip_mod, *WRAPPERS[name][1]])

        @found.train()
        def train(message, context):
            last = context.node_config["partition-id"] == NODES - 1
            arrays = {
                key: array + np.float32(direction if last else 1) * MASK.keep.get(key, True)
                for key, array in arrays_of(message.content["arrays"]).items()
            }
            metrics = MetricRecord({"num-examples": examples(context)})
            return Message(RecordDict({"arrays": record(arrays), "metrics": metrics}), reply_to=message)

        return found

    other = {"replace-one": -1.0, "add-or-remove-one": 1e-9}[relation]
    ends = []
    for direction in (1.0, other):
        strategy = AutoFlip(WRAPPERS[name][0](noise=0.0), mask=MASK)
        ends.append(start(strategy, LocalGrid(app(direction), NODES))[1])
    change = math.sqrt(sum(np.sum(np.square(ends[0][key] - ends[1][key], dtype=np.float64)) for key in MODEL))
    share = (10 + 7 * (NODES - 1)) / sum(10 + 7 * part for part in range(NODES))
    assert change == pytest.approx(RELATIONS[relation] * CLIP * share, rel=1e-4)


@pytest.mark.parametrize("name", FIXED)
def test_more_replies_than_the_noise_is_scaled_for_cost_less(name):
    strategy = AutoFlip(WRAPPERS[name][0](needed=2), mask=MASK)
    start(strategy, grid_of(name, weights="alike"))
    assert strategy.privacy.rho == pytest.approx((2 / NODES / NOISE) ** 2 / 2, rel=1e-12)


@pytest.mark.parametrize("name", [name for name in WRAPPERS if name not in FIXED])
def test_an_adaptive_norm_costs_by_how_it_moved_between_clipping_and_noise(name):
    strategy = AutoFlip(WRAPPERS[name][0](), mask=MASK)
    wrapper, norms = strategy.strategy, [CLIP]
    rho = 0.0
    for rounds in range(1, 4):
        start(strategy, grid_of(name, weights="alike"))
        norms.append(wrapper.clipping_norm)
        assert norms[-1] != norms[-2]
        multiplier = wrapper.noise_multiplier * norms[-1] / norms[-2]
        rho += 1 / (2 * multiplier**2) + 1 / (2 * (2 * COUNT_NOISE) ** 2)
        assert strategy.privacy.rho == pytest.approx(rho, rel=1e-12), rounds
    # Andrew et al. split the multiplier that the user asks for between the mean and the count
    assert 1 / wrapper.noise_multiplier**2 + 1 / (2 * COUNT_NOISE) ** 2 == pytest.approx(1 / NOISE**2)


@pytest.mark.parametrize(
    ("strategy", "noise", "reason"),
    [
        (lambda: inner(FedMedian), NOISE, "not for FedMedian"),
        (lambda: inner(FedAdam), NOISE, "not for FedAdam"),
        (lambda: inner(), 0.0, "there is no noise"),
    ],
)
def test_a_release_without_a_bound_is_told(strategy, noise, reason, caplog):
    wrapped = AutoFlip(WRAPPERS["server-side fixed"][0](strategy(), noise), mask=MASK)
    start(wrapped, grid_of("server-side fixed"))
    assert wrapped.privacy == PrivacyBudget(releases=1, rho=math.inf)
    assert wrapped.privacy.epsilon() == math.inf
    assert "round 1: the privacy spent has no bound: " in caplog.text
    assert reason in caplog.text


def test_fedprox_averages_as_fedavg_does():
    strategy = AutoFlip(WRAPPERS["server-side fixed"][0](inner(FedProx, proximal_mu=0.1)), mask=MASK)
    start(strategy, grid_of("server-side fixed", weights="alike"))
    assert strategy.privacy.rho == pytest.approx(1 / (2 * NOISE**2))


# --- where the noise goes ---------------------------------------------------------------------------------------------

WIDE = {"w": np.random.default_rng(0).normal(size=(40, 100)).astype(np.float32), "b": np.ones(40, np.float32)}
WIDE_MASK = Mask.from_bool(Layout.of(WIDE), {"w": np.random.default_rng(2).random((40, 100)) < 0.4})


@each_wrapper
@pytest.mark.parametrize("coordinates", PACKINGS)
def test_the_servers_noise_enters_the_kept_coordinates_only_and_in_its_size(name, coordinates):
    found = {}
    for noise in (NOISE, 0.0):
        wrapper = WRAPPERS[name][0]()
        wrapper.noise_multiplier *= noise / NOISE
        found[noise] = start(AutoFlip(wrapper, mask=WIDE_MASK, coordinates=coordinates), grid_of(name), arrays=WIDE)[1]
        assert not found[noise]["w"][~WIDE_MASK.keep["w"]].any()
    noise = {key: found[NOISE][key].astype(np.float64) - found[0.0][key] for key in WIDE}
    assert noise["w"][WIDE_MASK.keep["w"]].all()
    assert noise["b"].all()
    every = np.concatenate([noise["w"][WIDE_MASK.keep["w"]], noise["b"]])
    multiplier = WRAPPERS[name][0]().noise_multiplier
    assert every.std() == pytest.approx(multiplier * wrapper.clipping_norm / NODES, rel=0.1)


LOCAL = LocalDpMod(clipping_norm=0.5, sensitivity=1.0, epsilon=1.0, delta=1e-5)
LOCAL_NOISE = math.sqrt(2 * math.log(1.25e5))


def local_app(place, returned):
    """A client with local privacy behind our mod, app-wide or on its train function, and very little to say."""
    app = ClientApp(mods=[autoflip_mod, LOCAL] if place == "app" else [autoflip_mod])

    def train(message, context):
        arrays = arrays_of(message.content["arrays"])
        arrays["w"] = arrays["w"] + np.float32(1e-3)
        returned.append(arrays)
        metrics = MetricRecord({"num-examples": examples(context)})
        return Message(RecordDict({"arrays": record(arrays), "metrics": metrics}), reply_to=message)

    app.train(mods=[LOCAL] if place == "function" else [])(train)
    return app


@pytest.mark.parametrize("place", ["app", "function"])
@pytest.mark.parametrize("coding", ["log8", "float32"])
def test_an_explorer_behind_local_privacy_sends_noised_moves_alone(place, coding):
    returned, replies = [], []
    grid = LocalGrid(local_app(place, returned), NODES, tamper=lambda reply: replies.append(reply.content) or reply)
    strategy = AutoFlip(inner(), sparsity=0.5, values=Values(deltas=coding))  # the server knows of no privacy
    start(strategy, grid, arrays=WIDE)
    assert strategy.privacy is None
    layout = Layout.of(WIDE)
    full = Mask.full(layout)
    explored = [content["arrays"] for content in replies if content["autoflip"]["phase"] == EXPLORE]
    assert len(explored) == NODES
    for packed in explored:
        moves = unpack_deltas(full, packed) if coding == "log8" else split_vectors(full, arrays_of(packed))
        # all that a client really did, 0.001, is lost in noise of 4.8
        assert moves["w"].std() == pytest.approx(LOCAL_NOISE, rel=0.1)
    assert returned[0]["w"].std() < 2


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("place", ["app", "function"])
def test_local_noise_enters_the_kept_coordinates_only_however_values_travel(place, kind):
    grid = LocalGrid(local_app(place, []), NODES)
    strategy = AutoFlip(inner(), mask=WIDE_MASK, values=kind)
    models = start(strategy, grid, arrays=WIDE)
    assert strategy.ledger.failure_counts() == NO_FAILURES
    noise = models[1]["w"] - models[0]["w"]
    assert not noise[~WIDE_MASK.keep["w"]].any()
    weights = np.array([10 + 7 * part for part in range(NODES)])
    expected = LOCAL_NOISE * np.sqrt(np.sum(np.square(weights / weights.sum())))
    assert noise[WIDE_MASK.keep["w"]].std() == pytest.approx(expected, rel=0.1)


# --- what secure aggregation would need -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("mask", [MASK, Mask.full(LAYOUT)], ids=["pruned", "full"])
def test_under_one_mask_the_packed_replies_of_all_nodes_and_rounds_have_one_length(kind, mask):
    with_counter = Mask.from_bool(Layout.of(model()), mask.keep)
    replies = []
    grid = LocalGrid(message_app(), NODES, tamper=lambda reply: replies.append(reply.content) or reply)
    strategy = AutoFlip(inner(), mask=with_counter, values=kind)
    start(strategy, grid, rounds=3, arrays=model())
    forms = {tuple((key, a.dtype, a.shape, len(a.data)) for key, a in content["arrays"].items()) for content in replies}
    assert len(replies) == 3 * NODES
    assert len(forms) == 1
    assert not any(MASK_RECORD in content for content in replies)
    # the mask is a record of its own, sent once a node: the packed values beside it are as long without it
    forms = {tuple((key, a.dtype, a.shape) for key, a in m.content["arrays"].items()) for m in grid.sent}
    assert [MASK_RECORD in message.content for message in grid.sent] == [True] * NODES + [False] * 2 * NODES
    assert len(forms) == 1


def test_explorers_log8_moves_have_no_fixed_length():
    replies = []
    grid = LocalGrid(message_app(), NODES, tamper=lambda reply: replies.append(reply.content) or reply)
    start(AutoFlip(inner(), sparsity=0.5), grid, arrays=WIDE)
    explored = [content["arrays"] for content in replies if content["autoflip"]["phase"] == EXPLORE]
    sizes = {array.shape for packed in explored for array in packed.values()}
    assert len(sizes) > 1
