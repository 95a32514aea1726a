"""The start of a run: whom the exploration waits for, how long, and what a node that does not answer costs."""

from __future__ import annotations

import time

import pytest
from apps import NO_FAILURES, message_app, model, record
from flwr.app import Context, RecordDict
from flwr.serverapp.strategy import FedAvg, Strategy

from autoflip_flwr import AutoFlip
from autoflip_flwr.core.methods import LossExploration
from autoflip_flwr.server import roll_call
from autoflip_flwr.server.settings import Nodes
from autoflip_flwr.testing import LocalGrid

SOON = 20  # seconds: far below a round's time limit, on a busy machine too


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    for name, seconds in {"SETTLE": 0.2, "ANSWERS": 0.2, "EVERY": 0.1}.items():
        monkeypatch.setattr(roll_call, name, seconds)


class Booting(LocalGrid):
    """Its nodes connect one after another, ``gap`` seconds apart, the first two at once.

    ``told`` is what they say of their number (``None``: nothing); ``silent`` answer no message of the kinds in ``to``.
    """

    def __init__(self, app, num_nodes, gap=0.05, told="all", silent=(), to=("hello", "explore", "train")):
        super().__init__(app, num_nodes)
        self.began, self.gap, self.silent, self.to = 0.0, gap, silent, to
        for node, context in self.contexts.items():
            config = dict(context.node_config)
            config.pop("num-partitions")
            if told is not None:
                config["num-partitions"] = num_nodes if told == "all" else told
            self.contexts[node] = Context(1, node, config, RecordDict(), {})

    def get_node_ids(self):
        self.began = self.began or time.monotonic()
        shown = 2 + int((time.monotonic() - self.began) / self.gap) if self.gap else None
        return super().get_node_ids()[:shown]

    def pull_messages(self, message_ids):
        replies = super().pull_messages(message_ids)
        return [reply for reply in replies if not (reply.metadata.src_node_id in self.silent and self._asked(reply))]

    def _asked(self, reply):
        return reply.has_content() and reply.content["autoflip"]["phase"] in self.to


def started(grid, rounds=1, timeout=60.0, strategy=None, **settings):
    strategy = AutoFlip(strategy or FedAvg(fraction_evaluate=0.0), **settings)
    strategy.start(grid, record(model()), num_rounds=rounds, timeout=timeout)
    return strategy


def test_five_lines_wait_for_as_many_nodes_as_the_nodes_say(caplog):
    strategy = started(Booting(message_app(), 5))
    assert strategy.exploration.explorers == 5
    assert "waiting for nodes: 2 of 5 connected" in caplog.messages
    assert strategy.ledger.messages["other"] == strategy.ledger.replies["other"] == 5


def test_where_no_node_knows_how_many_there_are_it_waits_until_no_new_one_comes(caplog):
    assert started(Booting(message_app(), 5, told=None)).exploration.explorers == 5
    assert "waiting for nodes: 2 connected; none says yet how many there are" in caplog.messages


def test_the_users_number_goes_before_the_nodes():
    assert started(Booting(message_app(), 5, told=2), nodes=5).exploration.explorers == 5
    assert started(Booting(message_app(), 5, gap=0.25, told=None), nodes=4).exploration.explorers == 4


def test_fewer_than_the_wrapped_strategy_needs_are_waited_for_beyond_the_nodes_own_number():
    inner = FedAvg(fraction_evaluate=0.0, min_available_nodes=4)
    assert started(Booting(message_app(), 5, told=2), strategy=inner).exploration.explorers >= 4


def test_explorers_that_must_be_there_are_waited_for_where_no_node_knows_how_many_there_are():
    assert (
        started(
            Booting(message_app(), 4, gap=0.25, told=None), method=LossExploration.static(min_explorers=4)
        ).exploration.explorers
        == 4
    )


def test_a_number_of_partitions_that_is_wrong_holds_the_start_for_the_node_timeout_alone(caplog):
    began = time.monotonic()
    strategy = started(Booting(message_app(), 3, gap=0, told=7), nodes=Nodes(timeout=0.3))
    assert strategy.exploration.explorers == 3
    assert 0.3 < time.monotonic() - began < SOON
    assert "3 of 7 nodes have connected: no new one for 0.3 s, going on" in caplog.messages


def test_nodes_that_boot_slowly_are_waited_for_as_long_as_new_ones_come():
    assert started(Booting(message_app(), 5, gap=0.2), nodes=Nodes(timeout=0.4)).exploration.explorers == 5


def test_fewer_nodes_than_are_needed_are_waited_for_as_long_as_a_round_and_then_told():
    inner = FedAvg(fraction_evaluate=0.0, min_available_nodes=3)
    words = r"2 nodes have connected within 0.4 s, but 3 are needed: start more nodes, or lower min_available_nodes"
    with pytest.raises(RuntimeError, match=words):
        started(Booting(message_app(), 2, told=5, gap=0), strategy=inner, timeout=0.4, nodes=Nodes(timeout=0.1))


def test_one_node_that_knows_of_no_other_is_told_at_once_what_to_do():
    inner = FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
    with pytest.raises(RuntimeError, match=r"only 1 nodes are connected: .*\(min_explorers=1\)"):
        started(LocalGrid(message_app(), 1), strategy=inner)


def test_a_mute_node_holds_the_start_for_seconds_is_named_and_does_not_explore(caplog):
    grid, began = Booting(message_app(), 4, gap=0, silent={102}, to=("hello", "explore")), time.monotonic()
    strategy = started(grid)
    assert time.monotonic() - began < SOON
    assert strategy.exploration.explorers == 3
    assert "nodes [102] are connected, but have not answered: going on without waiting for them" in caplog.messages
    assert "waiting for answers: 3 of 4 nodes have answered" in caplog.messages
    assert strategy.ledger.failure_counts() == NO_FAILURES


def test_a_mute_node_explores_where_too_few_others_would():
    grid = Booting(message_app(), 3, gap=0, silent={102}, to=("hello",))
    assert started(grid, method=LossExploration.static(min_explorers=3)).exploration.explorers == 3


def test_nodes_that_are_all_slow_to_start_are_given_more_time():
    class Slow(Booting):
        def pull_messages(self, message_ids):
            return super().pull_messages(message_ids) if time.monotonic() - self.began > 0.3 else []

    grid = Slow(message_app(), 3, gap=0)
    strategy = started(grid)
    assert strategy.exploration.explorers == 3
    assert strategy.ledger.partitions == {100: 0, 101: 1, 102: 2}


def test_an_exploration_has_a_time_limit_of_its_own():
    grid, began = Booting(message_app(), 4, gap=0, silent={102}, to=("explore",)), time.monotonic()
    strategy = started(grid, method=LossExploration.static(timeout=0.3))
    assert time.monotonic() - began < SOON
    assert strategy.exploration.explorers == 3
    assert strategy.ledger.failure_counts() == {"rejected": 0, "errors": 0, "absent": 1}
    ttl = {message.content["autoflip"]["phase"]: message.metadata.ttl for message in grid.sent}
    assert (ttl["explore"], ttl["train"]) == (0.3, 60)


def test_nodes_that_are_there_and_answer_cost_one_small_message_each():
    grid = LocalGrid(message_app(), 3)
    strategy = started(grid)
    assert [message.content["autoflip"]["phase"] for message in grid.sent].count("hello") == 3
    assert strategy.ledger.bytes_by_phase()["other"] < 3 * 2000


def test_nodes_without_the_mod_are_told_at_once(monkeypatch):
    monkeypatch.setattr(roll_call, "SETTLE", 60.0)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="autoflip_mod must be the first"):
        started(LocalGrid(message_app(mods=[]), 2))
    assert time.monotonic() - began < SOON


class Left(LocalGrid):
    """Its nodes in ``gone`` are refused by the SuperLink, though it lists them, from the phase ``since`` on."""

    gone, since = (101,), "hello"

    def push_messages(self, messages):
        self.began = getattr(self, "began", False) or messages[0].content["autoflip"]["phase"] == self.since
        gone = self.gone if self.began else ()
        ids = iter(super().push_messages([each for each in messages if each.metadata.dst_node_id not in gone]))
        return ["" if each.metadata.dst_node_id in gone else next(ids) for each in messages]


REFUSED = "the SuperLink refused the message: the node has left"


@pytest.mark.parametrize(("since", "explorers", "rounds"), [("hello", 2, [0, 1, 2]), ("train", 3, [1, 2])])
def test_a_node_that_has_left_holds_no_part_of_a_run(since, explorers, rounds):
    grid, began = Left(message_app(), 3), time.monotonic()
    grid.since = since
    strategy = started(grid, rounds=2, timeout=3600)
    assert time.monotonic() - began < SOON
    assert strategy.exploration.explorers == explorers
    assert [(each["round"], each["reason"]) for each in strategy.ledger.incidents] == [(r, REFUSED) for r in rounds]
    assert strategy.ledger.replies["train"] == strategy.ledger.messages["train"] == 4


@pytest.mark.parametrize("since", ["hello", "train"])
def test_where_all_have_left_the_run_ends_at_once_and_says_so(since):
    grid, began = Left(message_app(), 3), time.monotonic()
    grid.gone, grid.since = (100, 101, 102), since
    with pytest.raises(RuntimeError, match=f"; {REFUSED}$" if since == "hello" else f"counts: {REFUSED}$"):
        started(grid, timeout=3600)
    assert time.monotonic() - began < SOON


# --- the end that should_stop makes ----------------------------------------------------------------------------------


def stopped(grid, stop, strategy=None, rounds=5):
    strategy = AutoFlip(strategy or FedAvg(fraction_evaluate=0.5), mask=None, sparsity=0.5)
    return strategy.start(grid, record(model()), num_rounds=rounds, should_stop=stop), strategy


def test_should_stop_ends_a_run_and_sees_its_rounds(flower_1_43):
    seen = []

    def stop(round_, result):
        seen.append((round_, sorted(result.train_metrics_clientapp), sorted(result.evaluate_metrics_clientapp)))
        assert result.arrays["out.weight"].numpy().shape == (3, 6)
        return round_ == 3

    result, strategy = stopped(LocalGrid(message_app(), 3), stop)
    assert seen == [(1, [1], [1]), (2, [1, 2], [1, 2]), (3, [1, 2, 3], [1, 2, 3])]
    assert strategy.ledger.replies["train"] == 9
    assert sorted(result.train_metrics_clientapp) == [1, 2, 3]


def test_a_start_of_its_own_gets_should_stop_if_it_takes_it(flower_1_43):
    class Own(FedAvg):
        def start(self, grid, initial_arrays, num_rounds=3, should_stop=None):
            self.told = should_stop
            return super().start(grid, initial_arrays, num_rounds, should_stop=should_stop)

    class Without(FedAvg):
        def start(self, grid, initial_arrays, num_rounds=3):
            return super().start(grid, initial_arrays, num_rounds)

    def stop(round_, result):
        return round_ == 2

    result, strategy = stopped(LocalGrid(message_app(), 3), stop, Own(fraction_evaluate=0.0))
    assert strategy.strategy.told is stop
    assert sorted(result.train_metrics_clientapp) == [1, 2]
    grid = LocalGrid(message_app(), 3)
    with pytest.raises(TypeError, match=r"Without\.start takes no should_stop, which AutoFlip\.start was given$"):
        stopped(grid, stop, Without())
    stopped(grid, None, Without(fraction_evaluate=0.0), rounds=1)


def test_a_flower_that_cannot_stop_early_is_named_before_any_client_works(monkeypatch):
    def start(self, grid, initial_arrays, num_rounds=3, timeout=3600, train_config=None, evaluate_config=None,
              evaluate_fn=None):  # fmt: skip
        raise AssertionError

    grid = LocalGrid(message_app(), 3)
    with pytest.raises(TypeError, match=r"should_stop = 3: must be a function of the round and the result, or None"):
        stopped(grid, 3)
    monkeypatch.setattr(Strategy, "start", start)
    with pytest.raises(TypeError, match=r"takes no should_stop, .*: it needs Flower 1\.43 or later, and this is 1\."):
        stopped(grid, lambda round_, result: True)
    assert grid.sent == []


@pytest.mark.parametrize("settings", [{"sparsity": 0}, {"mask": "ready"}, {"exploration": "ready"}])
def test_without_an_exploration_nobody_is_asked(settings):
    first = started(LocalGrid(message_app(), 2))
    ready = {name: getattr(first, name) if value == "ready" else value for name, value in settings.items()}
    grid = LocalGrid(message_app(), 2)
    started(grid, **ready)
    assert {message.content["autoflip"]["phase"] for message in grid.sent} == {"train"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"expected": 0}, "nodes: expected = 0: must be at least 1"),
        ({"timeout": 0.0}, "nodes: timeout = 0.0: must be a number of seconds > 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Nodes(**settings)


def test_a_number_of_nodes_is_checked_too():
    with pytest.raises(ValueError, match="nodes: expected = 0: must be at least 1"):
        AutoFlip(nodes=0)
