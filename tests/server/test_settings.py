"""Settings of AutoFlip are read, set and refused under their own names; so is what its start is given."""

from __future__ import annotations

import copy
import inspect
import pickle

import numpy as np
import pytest
from apps import arrays_of, message_app, model, record
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    Result,
    Strategy,
)

from autoflip_flwr import AutoFlip, Layout, Ledger, Mask
from autoflip_flwr.core.choices import PACKINGS
from autoflip_flwr.core.methods import LossExploration, Snip
from autoflip_flwr.replies.quarantine import ReplyRules
from autoflip_flwr.server.schedule import arguments_of
from autoflip_flwr.server.settings import Nodes, Values
from autoflip_flwr.testing import LocalGrid

NODES = 2
LAYOUT = Layout.of(model())


def half(of: int) -> Mask:
    return Mask.from_bool(
        LAYOUT, {spec.name: np.arange(spec.size).reshape(spec.shape) % 2 == of for spec in LAYOUT.prunable}
    )


def fedavg(kind=FedAvg, **options):
    return kind(fraction_evaluate=0.0, **options)


def start(strategy, rounds=1, grid=None, arrays=None, **options) -> Result:
    grid = LocalGrid(message_app(), NODES) if grid is None else grid
    return strategy.start(grid, record(model()) if arrays is None else arrays, num_rounds=rounds, **options)


# --- reading and setting ---------------------------------------------------------------------------------------------

GIVEN = {
    "strategy": fedavg(FedAdam),
    "sparsity": 0.25,
    "biases": True,
    "mask": half(0),
    "mask_schedule": {}.get,
    "seed": 4,
    "ledger": Ledger(),
    "rules": ReplyRules(strikes=2),
    "method": LossExploration.static(scope="layer", explorers=0.5, epochs=7),
    "values": Values(up="float16", down="int8"),
}


def test_every_argument_reads_back_under_its_name():
    parameters = list(inspect.signature(AutoFlip).parameters.values())
    plain, given = AutoFlip(), AutoFlip(**GIVEN)
    made = {"strategy": FedAvg, "method": LossExploration, "ledger": Ledger, "rules": ReplyRules}
    for parameter in parameters:
        name, value = parameter.name, getattr(plain, parameter.name)
        assert isinstance(value, made[name]) if name in made else value == parameter.default, name
        assert name not in GIVEN or getattr(given, name) is GIVEN[name], name


def test_the_tree_of_settings_is_shown_as_it_is_written():
    strategy = AutoFlip(
        DifferentialPrivacyServerSideFixedClipping(fedavg(), 1.0, 1.0, 2),
        sparsity=0.25,
        exclude="x",
        method=LossExploration(scope="layer", explorers=0.5),
        values=Values(deltas="float32"),
        rules=ReplyRules(strikes=2),
    )
    assert repr(strategy) == (
        "AutoFlip(DifferentialPrivacyServerSideFixedClipping(FedAvg()), sparsity=0.25, "
        "method=LossExploration(scope='layer', explorers=0.5), exclude='x', values=Values(deltas='float32'), "
        "rules=ReplyRules(strikes=2))"
    )


def test_copies_have_settings_of_their_own():
    strategy = AutoFlip(fedavg(), sparsity=0.5, mask=half(0))
    for other in (copy.copy(strategy), copy.deepcopy(strategy), pickle.loads(pickle.dumps(strategy))):
        other.sparsity, other.mask = 0.75, None
        assert (other.sparsity, other.mask) == (0.75, None)
        assert other.fraction_evaluate == 0.0  # the wrapped strategy's
    assert (strategy.sparsity, strategy.mask, strategy._brought["mask"]) == (0.5, half(0), half(0))
    assert repr(strategy) == "AutoFlip(FedAvg(), sparsity=0.5, mask=Mask(...))"


def test_the_method_is_dynamic_where_nothing_else_says_what_the_mask_is():
    assert AutoFlip().method == LossExploration()
    for own in ({"mask": half(0)}, {"mask_schedule": {}.get}):
        strategy = AutoFlip(**own)
        assert strategy.method == LossExploration(schedule=())
        assert "method" not in repr(strategy)
    assert AutoFlip(outside="initial").method == LossExploration.static()
    assert repr(AutoFlip(outside="initial")) == "AutoFlip(FedAvg(), outside='initial')"


WRONG = [
    ("sparsity", 1.0, ValueError, r"sparsity = 1.0: must be a number in \[0, 1\)"),
    ("sparsity", "0.5", TypeError, "sparsity = '0.5': must be a number"),
    ("method", "snip", TypeError, r"method = 'snip': must be a Method, such as LossExploration\(...\)"),
    ("method", Snip(), TypeError, r"AutoFlip\(method=\): must be a LossExploration; .*Pruned\(strategy, method=Snip"),
    ("nodes", "all", TypeError, "nodes = 'all': must be a whole number"),
    ("coordinates", "flat", ValueError, "coordinates = 'flat': must be one of auto, packed, dense"),
    ("values", "int4", ValueError, "values = 'int4': must be one of float32"),
    ("values", None, ValueError, "values = None: must be one of float32"),
    ("mask", {"w": np.ones(2, bool)}, TypeError, r"mask = .*: must be a Mask, as Mask.from_bool\(layout, keep\)"),
    ("exploration", 3, TypeError, "exploration = 3: must be an Exploration"),
    ("rules", {"strikes": 2}, TypeError, r"rules = \{'strikes': 2\}: must be a ReplyRules"),
    ("ledger", [], TypeError, r"ledger = \[\]: must be a Ledger"),
    (
        "checkpoints",
        "folder",
        TypeError,
        r"checkpoints = .folder.: must be Checkpoints\(folder\), or None",
    ),
    ("strategy", "FedAvg", TypeError, "AutoFlip wraps a strategy, not .FedAvg."),
    ("strategy", AutoFlip(), ValueError, "it must be outermost"),
    ("mask_schedule", {2: half(0)}, TypeError, "mask_schedule is of type dict: must be a function"),
    ("mask_schedule", lambda: None, TypeError, "it must take one, two or three of the round"),
    ("mask_schedule", lambda a, b, c, d: None, TypeError, r"mask_schedule takes \(a, b, c, d\)"),
    ("mask_schedule", lambda round_, *, mask: None, TypeError, r"mask_schedule takes \(round_, mask\)"),
]


@pytest.mark.parametrize(
    ("name", "value", "kind", "text"), WRONG, ids=[f"{each[0]}-{i}" for i, each in enumerate(WRONG)]
)
def test_what_is_wrong_is_refused_in_the_constructor_and_when_it_is_set(name, value, kind, text):
    with pytest.raises(kind, match=text):
        AutoFlip(**{name: value})
    strategy = AutoFlip(fedavg())
    before = getattr(strategy, name)
    with pytest.raises(kind, match=text):
        setattr(strategy, name, value)
    assert getattr(strategy, name) is before


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (
            lambda: LossExploration.static(epochs=2.5),
            TypeError,
            "LossExploration: epochs = 2.5: must be a whole number",
        ),
        (
            lambda: LossExploration.static(explorers="all"),
            TypeError,
            "LossExploration: explorers = 'all': must be a number",
        ),
        (lambda: Values(up="int4"), ValueError, "values: up = 'int4': must be one of float32"),
        (lambda: Values(deltas="int8"), ValueError, "values: deltas = 'int8': must be one of log8, float32"),
        (lambda: Nodes("all"), TypeError, "nodes: expected = 'all': must be a whole number"),
    ],
)
def test_what_is_wrong_in_an_object_is_refused_where_it_is_made(make, kind, text):
    with pytest.raises(kind, match=text):
        make()


def test_a_setting_that_is_misspelt_is_not_set_in_silence():
    strategy = AutoFlip(fedavg())
    with pytest.raises(AttributeError, match="AutoFlip has no setting 'sparsty': did you mean 'sparsity'"):
        strategy.sparsty = 0.9
    strategy.best_accuracy = 0.5  # a project's own
    assert strategy.best_accuracy == 0.5


def test_what_is_set_before_a_start_holds_for_it():
    strategy = AutoFlip(fedavg(), sparsity=0.5)
    strategy.sparsity, strategy.method, strategy.ledger = 0.25, LossExploration.static(scope="layer"), None
    start(strategy)
    assert strategy.mask.kept_by_name == {"hidden.weight": 36, "out.weight": 14}  # 48 - 12, 18 - 4
    explored = strategy.exploration
    start(strategy)  # nobody explores, and the mask stays
    strategy.sparsity = 0.5
    mask = strategy.mask
    grid = LocalGrid(message_app(), NODES)
    start(strategy, grid=grid)  # a new mask, of the same exploration
    assert strategy.mask.kept == 33
    assert mask.kept == 50
    assert strategy.exploration is explored
    assert len(grid.sent) == NODES
    strategy.method = LossExploration.static(scope="layer", epochs=2)
    start(strategy)
    assert strategy.exploration is not explored
    strategy.mask = half(1)
    strategy.sparsity = 0.1
    start(strategy)
    assert strategy.mask.digest == half(1).digest  # of the user's own


def test_another_strategy_may_be_wrapped_before_a_start():
    strategy = AutoFlip(fedavg(FedAdam), sparsity=0.0)
    assert strategy.privacy is None
    strategy.strategy = DifferentialPrivacyServerSideFixedClipping(fedavg(), 0.5, 1.0, NODES)
    start(strategy)
    assert strategy.privacy.releases == 1
    strategy.strategy = None
    assert type(strategy.strategy) is FedAvg


class Named(FedAvg):
    """Has attributes that AutoFlip has as well."""

    def __init__(self):
        super().__init__(fraction_evaluate=0.0)
        self.mask, self.seed, self.note, self._running = "theirs", 5, "", "theirs"

    def aggregate_train(self, server_round, replies):
        assert (self.mask, self.seed, self._running) == ("theirs", 5, "theirs")
        return super().aggregate_train(server_round, replies)


def test_a_wrapped_strategy_keeps_attributes_of_the_same_name():
    inner = Named()
    strategy = AutoFlip(inner, sparsity=0.5)
    strategy.seed, strategy.note = 1, "reaches it"
    start(strategy)
    assert (strategy.seed, strategy.note, inner.seed, inner.note) == (1, "reaches it", 5, "reaches it")


# --- while rounds run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coordinates", PACKINGS)
def test_a_mask_that_is_set_is_in_force_from_the_next_round_on(coordinates):
    strategy = AutoFlip(fedavg(FedAvgM, server_momentum=0.9), mask=half(0), coordinates=coordinates)
    seen = {}

    def evaluate(round_, arrays):
        seen[round_] = arrays_of(arrays)
        if round_ == 1:
            strategy.mask = half(1)
            assert strategy.mask.digest == half(1).digest

    start(strategy, 3, evaluate_fn=evaluate)
    for round_, mask in ((0, half(0)), (1, half(0)), (2, half(1)), (3, half(1))):
        for name, keep in mask.keep.items():
            assert not seen[round_][name][~keep].any()
            assert seen[round_][name][keep].all()
    scheduled = AutoFlip(
        fedavg(FedAvgM, server_momentum=0.9), mask=half(0), mask_schedule={2: half(1)}.get, coordinates=coordinates
    )
    assert start(scheduled, 3).arrays["out.weight"].numpy().tobytes() == seen[3]["out.weight"].tobytes()


def test_other_settings_raise_while_rounds_run():
    strategy = AutoFlip(fedavg(), mask=half(0))
    other = Mask.full(Layout.of({"w": np.zeros((2, 2), np.float32)}))
    tried = []

    def evaluate(round_, arrays):
        for name in inspect.signature(AutoFlip).parameters:
            if name != "mask":
                with pytest.raises(
                    RuntimeError, match=f"{name} was set while AutoFlip runs, where it would do nothing"
                ):
                    setattr(strategy, name, getattr(strategy, name))
                tried.append(name)
        with pytest.raises(TypeError, match=r"strategy.mask = ...: must be a Mask, not dict: .*Mask.from_bool"):
            strategy.mask = {"out.weight": np.ones((3, 6), bool)}
        with pytest.raises(TypeError, match=r"strategy.mask = ...: must be a Mask, not NoneType"):
            strategy.mask = None
        with pytest.raises(ValueError, match="the mask's arrays are not those of the model"):
            strategy.mask = other
        strategy.fraction_train = 1.0  # of the wrapped strategy

    start(strategy, 1, evaluate_fn=evaluate)
    assert len(tried) == 2 * (len(inspect.signature(AutoFlip).parameters) - 1)
    strategy.sparsity = 0.25  # it is over
    with pytest.raises(ZeroDivisionError):
        start(strategy, evaluate_fn=lambda r, a: 1 / 0)
    strategy.sparsity = 0.5  # so is one that failed


# --- schedules -------------------------------------------------------------------------------------------------------

BOUND = half(0)


@pytest.mark.parametrize(
    ("schedule", "count"),
    [
        (lambda round_: None, 1),
        (lambda round_, mask: None, 2),
        (lambda round_, mask, model: None, 3),
        (lambda round_, mask=None, model=None: None, 3),
        (lambda round_, bound=BOUND: None, 1),
        (lambda round_, mask, model, more=1: None, 3),
        (lambda *given: None, 3),
        (lambda round_, *, option=1: None, 1),
        ({2: BOUND}.get, 2),
    ],
)
def test_a_schedule_is_given_what_it_takes(schedule, count):
    assert arguments_of(schedule) == count
    start(AutoFlip(fedavg(), mask=half(0), mask_schedule=schedule))


def test_a_schedule_sees_the_mask_in_force_and_the_model():
    seen, evaluated = {}, {}

    def schedule(round_, mask, model):
        seen[round_] = mask, dict(model)
        with pytest.raises(ValueError, match="read-only"):
            model["out.weight"][0, 0] = 1
        return half(round_ % 2)

    start(
        AutoFlip(fedavg(), mask=half(0), mask_schedule=schedule),
        3,
        evaluate_fn=lambda round_, arrays: evaluated.setdefault(round_, arrays_of(arrays)),
    )
    assert [seen[round_][0].digest for round_ in (1, 2, 3)] == [half(of).digest for of in (0, 1, 0)]
    for round_ in (1, 2, 3):
        assert list(seen[round_][1]) == list(model())
        for name, array in evaluated[round_ - 1].items():
            assert seen[round_][1][name].tobytes() == array.tobytes()


@pytest.mark.parametrize("answer", [{"out.weight": np.ones((3, 6), bool)}, half(0).keep, True, half(0).bits])
def test_a_schedule_that_returns_no_mask_is_told_how_to_make_one(answer):
    with pytest.raises(TypeError, match=r"mask_schedule in round 1: must be a Mask, not .*Mask.from_bool"):
        start(AutoFlip(fedavg(), mask=half(0), mask_schedule=lambda round_: answer))


def test_what_grows_in_a_round_that_fails_keeps_its_last_value():
    def fails(message, context):
        if message.content["config"]["server-round"] == 2:
            raise RuntimeError("no battery")

    seen, sent = {}, {}
    grid = LocalGrid(message_app(lambda message, _: fails(message, _) or sent.update(last=message)), NODES)
    strategy = AutoFlip(fedavg(), mask=half(0), mask_schedule={2: half(1)}.get)
    start(strategy, 3, grid=grid, evaluate_fn=lambda round_, arrays: seen.setdefault(round_, arrays_of(arrays)))
    got = arrays_of(sent["last"].content["arrays"])
    for name, keep in half(1).keep.items():
        np.testing.assert_array_equal(seen[2][name], np.where(keep, model()[name], 0))  # never trained: W0
        np.testing.assert_array_equal(got[name], seen[2][name])


# --- a second start --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FedAvg, FedAvgM, FedAdam])
def test_a_second_start_lets_coordinates_grow_from_their_last_value(kind):
    options = {"server_momentum": 0.9} if kind is FedAvgM else {}
    once = AutoFlip(fedavg(kind, **options), mask=half(0), mask_schedule={2: half(1), 3: half(0)}.get)
    first = {}
    start(once, 1, evaluate_fn=lambda round_, arrays: first.setdefault(round_, arrays_of(arrays)))
    strategy = AutoFlip(fedavg(kind, **options), mask=half(0))
    result = start(strategy, 1)
    sent = []
    app = message_app(lambda message, _: sent.append(arrays_of(message.content["arrays"])))
    strategy.mask = half(1)
    result = start(strategy, 1, LocalGrid(app, NODES), result.arrays)
    for name, keep in half(1).keep.items():
        np.testing.assert_array_equal(sent[-1][name][keep], model()[name][keep])  # never trained: W0
    strategy.mask_schedule = {1: half(0)}.get
    start(strategy, 1, LocalGrid(app, NODES), result.arrays)
    for name, keep in half(0).keep.items():
        np.testing.assert_array_equal(sent[-1][name][keep], first[1][name][keep].astype(np.float32))


@pytest.mark.parametrize("ways", [("packed", "dense"), ("dense", "packed")])
@pytest.mark.parametrize("kind", [FedAvgM, FedAdam])
def test_a_second_start_may_be_in_other_coordinates(kind, ways):
    options = {"server_momentum": 0.9} if kind is FedAvgM else {}
    results = []
    for first, second in (("packed", "packed"), ways):
        strategy = AutoFlip(fedavg(kind, **options), mask=half(0), coordinates=first)
        result = start(strategy, 2)
        strategy.coordinates, strategy.mask = second, half(1)
        results.append(arrays_of(start(strategy, 2, arrays=result.arrays).arrays))
    for name, array in results[0].items():
        np.testing.assert_array_equal(array, results[1][name])


def test_the_normalisation_can_change_between_two_starts():
    strategy, alone = (
        AutoFlip(fedavg(), sparsity=0.5),
        AutoFlip(fedavg(), sparsity=0.5, method=LossExploration.static(normalisation="per-client")),
    )
    start(strategy)
    strategy.method = LossExploration.static(normalisation="per-client")
    start(strategy)
    start(alone)
    assert strategy.mask.bits == alone.mask.bits


def test_what_may_be_pruned_can_change_between_two_starts():
    strategy = AutoFlip(fedavg(FedAvgM, server_momentum=0.9), sparsity=0.5)
    result = start(strategy)
    strategy.biases = True
    grid = LocalGrid(message_app(), NODES)
    start(strategy, 1, grid, result.arrays)
    assert strategy.mask.kept == 36  # of 48 + 6 + 18: the first exploration does not know of the biases
    assert sum(message.metadata.group_id == "exploration" for message in grid.sent) == NODES


def test_another_model_brings_its_own_last_values():
    strategy = AutoFlip(fedavg(), mask=half(0))
    start(strategy)
    sent = []
    app = message_app(lambda message, _: sent.append(arrays_of(message.content["arrays"])))
    strategy.mask = half(1)
    start(strategy, 1, LocalGrid(app, NODES), record(model(seed=1)))
    for name, keep in half(1).keep.items():
        np.testing.assert_array_equal(sent[-1][name][keep], model(seed=1)[name][keep])


# --- the first round -------------------------------------------------------------------------------------------------


def failing(rounds=(1,), reason="no battery"):
    def fail(message, context):
        if message.content["config"].get("server-round") in rounds:
            raise RuntimeError(reason)

    return message_app(fail)


class Own(FedAvg):
    def start(self, *, grid, initial_arrays, num_rounds=3, **more):
        return super().start(grid, initial_arrays, num_rounds, **more)


@pytest.mark.parametrize("inner", [FedAvg, FedAdam, Own], ids=lambda kind: kind.__name__)
def test_a_run_of_which_nothing_counts_in_the_first_round_ends_with_the_reason(inner):
    strategy = AutoFlip(fedavg(inner), mask=half(0))
    with pytest.raises(RuntimeError, match=r"round 1: no reply of 2 nodes counts: .*no battery.* \(2 times\)"):
        start(strategy, 2, LocalGrid(failing(), NODES))
    result = start(AutoFlip(fedavg(inner), mask=half(0)), 2, LocalGrid(failing(rounds=(2,)), NODES))
    assert result.arrays  # later rounds go on as ever


def test_replies_that_are_left_out_or_do_not_come_are_reasons_too():
    def zero(reply: Message) -> Message:
        for metrics in reply.content.metric_records.values():
            metrics["num-examples"] = 0
        return reply

    class Mute(LocalGrid):
        def pull_messages(self, message_ids):
            return []

    with pytest.raises(RuntimeError, match=r"metric 'num-examples' is 0, expected a number .* \(2 times\)"):
        start(AutoFlip(fedavg(), mask=half(0)), 1, LocalGrid(message_app(), NODES, tamper=zero))
    with pytest.raises(RuntimeError, match="no reply of 2 nodes counts: no reply in time"):
        start(AutoFlip(fedavg(), mask=half(0)), 1, Mute(message_app(), NODES), timeout=0.1)


def test_a_round_without_messages_is_not_yet_the_first():
    class Late(FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            return [] if server_round == 1 else super().configure_train(server_round, arrays, config, grid)

    result = start(AutoFlip(fedavg(Late), mask=half(0)), 2)
    assert result.arrays
    with pytest.raises(RuntimeError, match="round 2: no reply of 2 nodes counts"):
        start(AutoFlip(fedavg(Late), mask=half(0)), 2, LocalGrid(failing(rounds=(2,)), NODES))


# --- what start is given ---------------------------------------------------------------------------------------------

MISGIVEN = [
    ({"num_round": 5}, TypeError, "AutoFlip.start has no parameter 'num_round': did you mean 'num_rounds'?"),
    ({"evaluation_fn": print}, TypeError, "no parameter 'evaluation_fn': did you mean 'evaluate_fn'?"),
    ({"save_path": "x"}, TypeError, "no parameter 'save_path', and neither has Strategy.start"),
    ({"num_rounds": -1}, ValueError, "num_rounds = -1: must be at least 0"),
    ({"num_rounds": 2.0}, TypeError, "num_rounds = 2.0: must be a whole number"),
    ({"num_rounds": "2"}, TypeError, "num_rounds = '2': must be a whole number"),
    ({"timeout": 0}, ValueError, "timeout = 0: must be a number of seconds > 0"),
    ({"timeout": float("nan")}, ValueError, "timeout = nan"),
    ({"timeout": "60"}, TypeError, "timeout = '60': must be a number of seconds"),
    ({"initial_arrays": model()}, TypeError, "initial_arrays is of type dict: must be an ArrayRecord"),
    ({"grid": object()}, TypeError, "grid = <object object .*>: must be a Grid of flwr.serverapp"),
    ({"grid": LocalGrid}, TypeError, "must be a Grid of flwr.serverapp"),
    ({"train_config": {"lr": 0.1}}, TypeError, "train_config is of type dict: must be a ConfigRecord"),
    ({"evaluate_fn": 3}, TypeError, "evaluate_fn = 3: must be a function"),
]


@pytest.mark.parametrize(("wrong", "kind", "text"), MISGIVEN, ids=[next(iter(each[0])) for each in MISGIVEN])
def test_what_start_is_given_is_checked_before_anyone_works(wrong, kind, text):
    grid = LocalGrid(message_app(), NODES)
    given = {"grid": grid, "initial_arrays": record(model()), "num_rounds": 1, **wrong}
    with pytest.raises(kind, match=text.replace("?", r"\?")):
        AutoFlip(fedavg(), sparsity=0.5).start(**given)
    assert grid.sent == []


def test_a_facade_is_a_grid_and_none_is_no_time_limit():
    class Facade:
        def __init__(self, grid):
            self.grid = grid

        def __getattr__(self, name):
            return getattr(self.grid, name)

    result = start(AutoFlip(fedavg(), sparsity=0.5), np.int64(1), Facade(LocalGrid(message_app(), NODES)), timeout=None)
    assert result.arrays


class Base(FedAvg):
    def run(self, grid, arrays, rounds=1, **more):
        self.told = more
        return FedAvg.start(self, grid, arrays, rounds)


class Reordered(Base):
    def start(self, initial_arrays, num_rounds, grid):
        return self.run(grid, initial_arrays, num_rounds)


class Keywords(Base):
    def start(self, *, initial_arrays, grid, num_rounds=3, save_path):
        return self.run(grid, initial_arrays, num_rounds, save_path=save_path)


class Renamed(Base):
    def start(self, server, model, num_rounds=3, save_path=""):
        return self.run(server, model, num_rounds, save_path=save_path)


class OneRenamed(Base):
    def start(self, model, grid):
        return self.run(grid, model)


class Positional(Base):
    def start(self, server, model, /, num_rounds=3):
        return self.run(server, model, num_rounds)


class Anything(Base):
    def start(self, *args, **kwargs):
        return self.run(*args, kwargs.pop("num_rounds"), **kwargs)


class ByName(Base):
    def start(self, **kwargs):
        return self.run(kwargs.pop("grid"), kwargs.pop("initial_arrays"), kwargs.pop("num_rounds"), **kwargs)


class InOrder(Base):
    def start(self, *args):
        return self.run(*args[:3])


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        (Reordered, {}),
        (Keywords, {"save_path": "here"}),
        (Renamed, {"save_path": "here"}),
        (Positional, {}),
        (Anything, {"save_path": "here"}),
        (ByName, {"save_path": "here"}),
        (InOrder, {}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_start_of_the_strategys_own_is_called_as_its_parameters_are_named(kind, own):
    strategy = AutoFlip(fedavg(kind), mask=half(0))
    grid = LocalGrid(message_app(), NODES)
    result = start(strategy, 2, grid, **own)
    assert not result.arrays["out.weight"].numpy()[~half(0).keep["out.weight"]].any()
    assert len(grid.sent) == 2 * NODES
    assert strategy.told.get("save_path") == own.get("save_path")


def test_a_grid_or_a_model_of_another_name_is_found():
    result = AutoFlip(fedavg(OneRenamed), mask=half(0)).start(LocalGrid(message_app(), NODES), record(model()))
    assert result.arrays


class NoModel(Base):
    def start(self, grid, *, num_rounds=3):
        raise AssertionError


class Needs(Base):
    def start(self, grid, initial_arrays, stop_at):
        raise AssertionError


@pytest.mark.parametrize(
    ("kind", "own", "text"),
    [
        (NoModel, {}, "NoModel.start takes no initial_arrays"),
        (Needs, {}, r"Needs.start\(grid, initial_arrays, stop_at\) cannot be called .* 'stop_at'"),
        (Anything, {"num_round": 2}, "no parameter 'num_round': did you mean 'num_rounds'"),
        (Keywords, {"save_paht": "x"}, "no parameter 'save_paht': did you mean 'save_path'"),
        (Reordered, {"evaluate_fn": print}, "Reordered.start takes no evaluate_fn, which AutoFlip.start was given"),
        (Reordered, {"train_config": ConfigRecord({"lr": 0.1})}, "Reordered.start takes no train_config"),
    ],
)
def test_a_start_that_cannot_be_served_is_refused_before_anyone_works(kind, own, text):
    grid = LocalGrid(message_app(), NODES)
    with pytest.raises(TypeError, match=text):
        AutoFlip(fedavg(kind), sparsity=0.5).start(grid, record(model()), **own)
    assert grid.sent == []


def test_what_flowers_own_start_takes_passes(monkeypatch):
    """As Flower 1.43 does: ``should_stop``."""
    plain, asked = Strategy.start, []

    def start_(self, grid, initial_arrays, num_rounds=3, *args, should_stop=None, **kwargs) -> Result:
        asked.append(should_stop)
        return plain(self, grid, initial_arrays, num_rounds, *args, **kwargs)

    monkeypatch.setattr(Strategy, "start", start_)
    assert isinstance(start(AutoFlip(fedavg(), mask=half(0)), should_stop=print).arrays, ArrayRecord)
    assert asked == [print]
