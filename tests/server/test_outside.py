"""``outside="initial"``: what the mask prunes keeps the value with which training began; who is sent it, and when."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from apps import arrays_of, message_app, model, numpy_app, record
from flwr.app import Message, MetricRecord
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM

from autoflip_flwr import (
    AutoFlip,
    Layout,
    Mask,
    apply_mask,
    autoflip_mod,
    autoflip_mod_with,
    current_mask,
    current_subspace,
)
from autoflip_flwr.core.methods import LossExploration
from autoflip_flwr.costs.message_size import record_bytes
from autoflip_flwr.server.settings import Values
from autoflip_flwr.testing import LocalGrid
from autoflip_flwr.wire.base_record import base_digest
from autoflip_flwr.wire.keys import BASE_RECORD, EXPLORE, HEADER, HELLO, MASK_RECORD

NODES = 3
LAYOUT = Layout.of(model())


def half(seed=0) -> Mask:
    draw = np.random.default_rng(seed)
    return Mask.from_bool(LAYOUT, {spec.name: draw.random(spec.shape) < 0.5 for spec in LAYOUT.prunable})


def run(app=None, inner=FedAvg, *, rounds=3, grid=None, arrays=None, **options):
    """The strategy, the model before and after each round, and the grid."""
    options = {"sparsity": 0.5, "method": LossExploration.static(epochs=1), "outside": "initial", "seed": 1, **options}
    strategy = AutoFlip(inner(), **options)
    grid = LocalGrid(message_app() if app is None else app, NODES) if grid is None else grid
    seen = {}

    def evaluate(round_, arrays):
        seen[round_] = arrays_of(arrays)
        return MetricRecord({"sum": float(sum(np.abs(array).sum() for array in seen[round_].values()))})

    result = strategy.start(
        grid, record(model() if arrays is None else arrays), num_rounds=rounds, evaluate_fn=evaluate
    )
    np.testing.assert_equal(arrays_of(result.arrays), seen[rounds])
    return strategy, seen, grid


def same(left, right):
    assert list(left) == list(right)
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert left[name].tobytes() == right[name].tobytes(), name


def stands_at(arrays, mask, base):
    for name, keep in mask.keep.items():
        np.testing.assert_array_equal(arrays[name][~keep], base[name][~keep])
        assert (arrays[name][keep] != base[name][keep]).any()


def bases_sent(grid):
    """Node and round of each message that a base has come with; in each round by node."""
    found = [message for message in grid.sent if BASE_RECORD in message.content]
    return sorted(
        ((message.metadata.dst_node_id, message.content[HEADER]["round"]) for message in found),
        key=lambda each: each[::-1],
    )


# --- the server ------------------------------------------------------------------------------------------------------


def test_what_is_allowed_is_told():
    with pytest.raises(ValueError, match="outside = 'mean': must be one of zero, initial"):
        AutoFlip(outside="mean")
    assert "outside='initial'" in repr(AutoFlip(outside="initial"))


def test_the_rounds_start_from_the_model_as_it_was_given():
    strategy, seen, _ = run()
    same(seen[0], model())
    for round_ in (1, 2, 3):
        stands_at(seen[round_], strategy.mask, model())


def test_or_from_the_explorers_average_which_then_stands_outside():
    strategy, seen, grid = run(method=LossExploration.static(initial="explorers"))
    assert any((seen[0][name] != model()[name]).any() for name in strategy.mask.keep)
    for round_ in (1, 2, 3):
        stands_at(seen[round_], strategy.mask, seen[0])
    assert bases_sent(grid) == [(100, 1), (101, 1), (102, 1)]


@pytest.mark.parametrize("values", ["bfloat16", "float16", "int8"])
@pytest.mark.parametrize("ways", [("up", "down"), ("up",), ("down",)])
@pytest.mark.parametrize("coordinates", ["packed", "dense"])
def test_coded_values_leave_it_exact(values, ways, coordinates):
    strategy, seen, _ = run(values=Values(**dict.fromkeys(ways, values)), coordinates=coordinates)
    for round_ in (1, 2, 3):
        stands_at(seen[round_], strategy.mask, model())


@pytest.mark.parametrize("values", ["float32", "int8"])
@pytest.mark.parametrize("inner", [FedAvg, FedAvgM, FedAdam])
def test_packed_and_dense_coordinates_agree_also_where_masks_change(inner, values):
    schedule = {2: half(1), 4: half(2), 5: half(1)}.get
    options = {"inner": inner, "rounds": 6, "mask": half(), "mask_schedule": schedule, "values": values}
    packed, dense = (run(coordinates=each, **options)[1] for each in ("packed", "dense"))
    for round_, arrays in packed.items():
        same(arrays, dense[round_])


def test_what_grows_resumes_from_its_last_value_and_what_is_pruned_goes_back_to_the_first():
    first, other = half(1), half(2)
    given = {}

    def look(message: Message, context) -> None:
        given.setdefault(
            (message.content["config"]["server-round"], context.node_id), arrays_of(message.content["arrays"])
        )

    _, seen, _ = run(message_app(look), rounds=5, mask=first, mask_schedule={3: other, 5: first}.get)
    for name, keep in first.keep.items():
        came, went, both = ~keep & other.keep[name], keep & ~other.keep[name], keep & other.keep[name]
        started = given[3, 100][name]  # what clients train from, under the other mask
        np.testing.assert_array_equal(started[came | went], model()[name][came | went])
        np.testing.assert_array_equal(started[both], seen[2][name][both])
        again = given[5, 100][name]
        np.testing.assert_array_equal(again[went], seen[2][name][went])
        np.testing.assert_array_equal(again[came], model()[name][came])
        assert (seen[2][name][went] != model()[name][went]).any()


def test_nothing_is_said_of_a_network_that_cannot_learn(caplog):
    keep = {spec.name: np.zeros(spec.shape, bool) for spec in LAYOUT.prunable}
    keep["hidden.weight"][0], keep["out.weight"][:, 1] = True, True
    mask = Mask.from_bool(LAYOUT, keep)
    with caplog.at_level(logging.WARNING):
        run(mask=mask)
    assert "cannot learn" not in caplog.text
    with caplog.at_level(logging.WARNING):
        run(mask=mask, outside="zero")
    assert "cannot learn" in caplog.text


def test_a_second_start_goes_on_from_where_the_first_ended():
    first, other = half(1), half(2)
    grid = LocalGrid(message_app(), NODES)
    strategy = AutoFlip(FedAvg(), outside="initial", mask=first)
    result = strategy.start(grid, record(model()), num_rounds=2)
    before = arrays_of(result.arrays)
    strategy.mask = other
    again = {}
    strategy.start(
        grid, result.arrays, num_rounds=1, evaluate_fn=lambda n, arrays: again.setdefault(n, arrays_of(arrays)) and None
    )
    for name, keep in other.keep.items():  # at the model with which the first start began
        np.testing.assert_array_equal(again[0][name][~keep], model()[name][~keep])
        grown = keep & ~first.keep[name]
        np.testing.assert_array_equal(again[0][name][grown], model()[name][grown])
        np.testing.assert_array_equal(again[0][name][keep & ~grown], before[name][keep & ~grown])
    assert len(bases_sent(grid)) == NODES  # nobody is sent it twice


def test_another_model_brings_its_own():
    strategy, *_ = run(mask=half())
    other = model(seed=5)
    seen = {}
    strategy.start(
        LocalGrid(message_app(), NODES),
        record(other),
        num_rounds=1,
        evaluate_fn=lambda n, arrays: seen.setdefault(n, arrays_of(arrays)) and None,
    )
    same(seen[0], other)
    stands_at(seen[1], strategy.mask, other)


def test_the_same_model_begins_anew():
    strategy, seen, _ = run(mask=half(), mask_schedule={2: half(1)}.get)
    again = {}
    strategy.start(
        LocalGrid(message_app(), NODES),
        record(model()),
        num_rounds=3,
        evaluate_fn=lambda n, arrays: again.setdefault(n, arrays_of(arrays)) and None,
    )
    same(again[0], seen[0])
    for name, keep in half(1).keep.items():
        np.testing.assert_array_equal(again[3][name][~keep], model()[name][~keep])


# --- the clients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("app", [message_app, numpy_app])
def test_a_clients_code_sees_full_arrays_and_its_context_the_base(app):
    seen = []

    def look(message, context):
        assert list(message.content.array_records) == ["arrays"]
        subspace = current_subspace(context)
        assert (subspace is None) == (current_mask(context) is None)
        if subspace is not None:
            arrays = arrays_of(message.content["arrays"])
            stands = {name: array[~subspace.mask.keep[name]] for name, array in arrays.items() if name in subspace.base}
            for name, pruned in stands.items():
                np.testing.assert_array_equal(pruned, model()[name][~subspace.mask.keep[name]])
                np.testing.assert_array_equal(subspace.base[name], model()[name])
            free = {name: np.full(array.shape, 7.0, array.dtype) for name, array in arrays.items()}
            apply_mask(free, context)
            for name, keep in subspace.mask.keep.items():
                np.testing.assert_array_equal(free[name][~keep], model()[name][~keep])
                assert (free[name][keep] == 7).all()
            seen.append(message.content["config"]["server-round"])

    strategy, *_ = run(message_app(look) if app is message_app else numpy_app())
    assert not strategy.ledger.incidents
    assert app is numpy_app or sorted({*seen}) == [1, 2, 3]


def test_zero_has_no_base():
    seen = []
    run(message_app(lambda message, context: seen.append(current_subspace(context))), outside="zero")
    assert any(each is not None for each in seen)
    assert all(each is None or each.base is None for each in seen)


def test_a_mask_without_a_context_is_zero_outside_and_a_subspace_has_its_own():
    arrays, mask = model(), half()
    apply_mask(arrays, mask)
    assert not any(arrays[name][~keep].any() for name, keep in mask.keep.items())
    strategy, *_ = run(mask=half())
    apply_mask(arrays, strategy._translator.subspace)
    for name, keep in mask.keep.items():
        np.testing.assert_array_equal(arrays[name][~keep], model()[name][~keep])


# --- who holds it ----------------------------------------------------------------------------------------------------


def test_explorers_hold_what_they_were_sent():
    strategy, _, grid = run()
    assert bases_sent(grid) == []
    assert strategy.ledger.base_down == 0
    explored = [message for message in grid.sent if message.content[HEADER]["phase"] == EXPLORE]
    assert {message.content[HEADER]["base"] for message in explored} == {base_digest(LAYOUT, model())}
    for context in grid.contexts.values():
        assert set(context.state) == {HEADER, MASK_RECORD, BASE_RECORD}


def test_explorers_that_were_sent_rounded_values_are_sent_it_with_their_first_message():
    strategy, _, grid = run(values=Values(down="bfloat16"))
    assert bases_sent(grid) == [(100, 1), (101, 1), (102, 1)]
    assert strategy.ledger.messages["train"] == 3 * NODES  # no message is sent twice
    sizes = [record_bytes(message.content, BASE_RECORD) for message in grid.sent if BASE_RECORD in message.content]
    assert strategy.ledger.base_down == strategy.ledger.bytes_by_phase()["base_down"] == sum(sizes)
    assert all(own["base_down"] == sizes[0] for own in strategy.ledger.bytes_by_node().values())


def test_so_are_nodes_that_have_not_explored_and_those_that_come_later_once():
    strategy, _, grid = run(method=LossExploration.static(explorers=0.3, min_explorers=1))
    assert bases_sent(grid) == [(node, 1) for node in grid.contexts if node not in explorers(grid)]
    assert strategy.ledger.messages["train"] == 3 * NODES


def explorers(grid):
    return {m.metadata.dst_node_id for m in grid.sent if m.content[HEADER]["phase"] == EXPLORE}


def test_a_node_of_which_nothing_is_known_says_what_it_lacks_and_is_sent_it_in_the_same_round():
    strategy, _, grid = run(mask=half(), seed=None)  # nobody explores, and there is no roll call
    assert bases_sent(grid) == [(100, 1), (101, 1), (102, 1)]
    assert strategy.ledger.messages["train"] == 4 * NODES
    assert strategy.ledger.replies["train"] == 4 * NODES
    assert not strategy.ledger.incidents


@pytest.mark.parametrize("known", [True, False], ids=["explored", "was-sent"])
def test_a_node_that_has_lost_all_is_healed_in_the_same_round(known):
    options = {} if known else {"mask": half()}
    whole, expected, _ = run(**options)
    lost = 4 if known else 3  # its messages: hello, the exploration, then two a round
    grid = LocalGrid(message_app(), NODES, forget=lambda node, count: node == 101 and count == lost)
    strategy, seen, _ = run(grid=grid, **options)
    same(seen[3], expected[3])
    assert not strategy.ledger.incidents
    assert [node for node, round_ in bases_sent(grid) if round_ > 1] == [101]
    (again,) = [m for m in grid.sent if m.content[HEADER]["round"] > 1 and BASE_RECORD in m.content]
    assert MASK_RECORD in again.content  # both at once
    assert strategy.ledger.messages.total() == whole.ledger.messages.total() + 1
    size = record_bytes(again.content, BASE_RECORD)
    assert strategy.ledger.base_down == whole.ledger.base_down + size


def given_app(base):
    return message_app(mods=[autoflip_mod_with(base=base)])


class Mixed(LocalGrid):
    """Nodes with apps of their own."""

    def __init__(self, *apps, **options):
        super().__init__(apps[0], len(apps), **options)
        self._apps = dict(zip(self.contexts, apps, strict=True))

    def _handle(self, message):
        self._app = self._apps[message.metadata.dst_node_id]
        return super()._handle(message)


def test_a_node_that_has_the_same_file_is_not_sent_it_and_one_with_another_is():
    loads = []

    def load(arrays):
        def read():
            loads.append(arrays)
            return arrays

        return read

    right, wrong = load(model()), load(model(seed=9))
    grid = Mixed(given_app(right), given_app(wrong), message_app())
    strategy, seen, _ = run(grid=grid, mask=half())
    assert bases_sent(grid) == [(101, 1), (102, 1)]  # the first says so when it has compared
    assert len(loads) == 2
    assert BASE_RECORD not in grid.contexts[100].state
    assert strategy.ledger.messages["train"] == 3 * NODES + 1
    assert not strategy.ledger.incidents
    same(seen[3], run(mask=half())[1][3])


def test_a_node_with_the_file_that_has_lost_its_state_is_sent_the_mask_alone():
    apps = [given_app(model()) for _ in range(NODES)]
    grid = Mixed(*apps, forget=lambda node, count: node == 101 and count == 4)
    strategy, seen, _ = run(grid=grid, mask=half())
    assert bases_sent(grid) == []
    assert not strategy.ledger.incidents
    same(seen[3], run(mask=half())[1][3])


def test_one_with_another_file_that_has_lost_its_state_is_sent_the_mask_and_then_the_base():
    grid = Mixed(
        *[given_app(model(seed=9)) for _ in range(NODES)], forget=lambda node, count: node == 101 and count == 4
    )
    strategy, seen, _ = run(grid=grid, mask=half())
    assert [node for node, _ in bases_sent(grid)] == [100, 101, 102, 101]
    assert not strategy.ledger.incidents
    same(seen[3], run(mask=half())[1][3])


@pytest.mark.parametrize(
    ("base", "told"),
    [
        (lambda: (_ for _ in ()).throw(FileNotFoundError("pretrained.npz")), "it cannot be read (pretrained.npz)"),
        (lambda: None, None),
        ({}, "it has no 'hidden.weight'"),
        ({**model(), "out.weight": np.zeros((3, 7), np.float32)}, "its 'out.weight' is float32 of shape (3, 7)"),
        ({**model(), "out.weight": np.zeros((3, 6), int)}, "its 'out.weight' is int64 of shape (3, 6), not float32"),
        ({**model(), "out.weight": -model()["out.weight"]}, "its values are others"),
    ],
)
def test_what_does_not_fit_is_told_and_the_base_is_sent(base, told, caplog):
    grid = LocalGrid(given_app(base), NODES)
    strategy, *_ = run(grid=grid, mask=half())
    assert [node for node, _ in bases_sent(grid)] == [100, 101, 102]
    assert not strategy.ledger.incidents
    assert told is None or told in caplog.text


def test_what_fits_may_have_more_arrays_in_another_order_and_another_float():
    more = {"head": np.zeros(3), **{name: array.astype(np.float64) for name, array in reversed(model().items())}}
    grid = LocalGrid(given_app(more), NODES)
    run(grid=grid, mask=half())
    assert bases_sent(grid) == []


def test_tensors_of_pytorch_fit_too():
    torch = pytest.importorskip("torch")
    tensors = {name: torch.nn.Parameter(torch.tensor(array)) for name, array in model().items() if array.ndim == 2}
    grid = LocalGrid(given_app(lambda: tensors), NODES)
    run(grid=grid, mask=half())
    assert bases_sent(grid) == []
    rounded = {name: array.astype(np.float16).astype(np.float32) * 0 + 0.5 for name, array in model().items()}
    half_precision = {name: torch.tensor(array, dtype=torch.bfloat16) for name, array in rounded.items()}
    arrays = {**rounded, "steps": np.array(0)}
    grid = LocalGrid(given_app(half_precision), NODES)
    run(grid=grid, mask=half(), arrays=arrays)
    assert bases_sent(grid) == []


@pytest.mark.parametrize(("base", "told"), [(3, "base is of type int"), ([1], "base is of type list")])
def test_what_is_no_model_is_refused_at_once(base, told):
    with pytest.raises(TypeError, match=told):
        autoflip_mod_with(base=base)


def test_a_function_that_returns_no_model_is_an_error_of_its_client():
    grid = Mixed(message_app(), given_app(lambda: 3), message_app())
    strategy, *_ = run(grid=grid, mask=half())
    assert {each["reason"] for each in strategy.ledger.incidents} == {
        "TypeError: base= returned int: must be arrays by name, as a state_dict holds them, or a function that returns "
        "such"
    }


def test_a_function_is_not_called_where_zero_stands_outside():
    run(given_app(lambda: pytest.fail("called")), outside="zero")


def test_an_explorer_with_the_file_keeps_no_copy():
    grid = LocalGrid(given_app(model()), NODES)
    run(grid=grid)
    assert bases_sent(grid) == []
    assert not any(BASE_RECORD in context.state for context in grid.contexts.values())


def test_a_resumed_server_learns_from_hello_who_holds_it():
    grid = LocalGrid(message_app(), NODES)
    run(grid=grid)
    hello = [m for m in grid.sent if m.content[HEADER]["phase"] == HELLO]
    assert len(hello) == NODES
    _, _, _ = run(grid=grid, mask=half())
    assert bases_sent(grid) == []


def test_with_a_full_mask_nothing_is_named_or_sent():
    _, _, grid = run(sparsity=0.0)
    assert not any("base" in message.content[HEADER] for message in grid.sent)
    _, seen, grid = run(mask=Mask.full(LAYOUT), mask_schedule={3: half()}.get)
    assert bases_sent(grid) == [(100, 3), (101, 3), (102, 3)]
    for name, keep in half().keep.items():
        np.testing.assert_array_equal(seen[3][name][~keep], model()[name][~keep])


def test_a_node_that_always_lacks_something_costs_its_replies_and_ends():
    def lose(message, context, call_next):
        reply = autoflip_mod(message, context, call_next)
        for key in (MASK_RECORD, BASE_RECORD):
            context.state.pop(key, None)
        return reply

    grid = Mixed(message_app(), message_app(mods=[lose]), message_app())
    strategy, *_ = run(grid=grid, mask=half())
    assert strategy.ledger.failures["rejected"] == 0  # it is sent all in every round
    assert [node for node, _ in bases_sent(grid)].count(101) >= 3
