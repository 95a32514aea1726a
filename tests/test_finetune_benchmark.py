"""The benchmark of fine-tuning on a tiny model: what its rows hold, and that an interrupted one goes on."""

import json

import pytest
import torch
from torch import nn

from benchmarks import finetune
from benchmarks.finetune_runs import Runs, Way
from benchmarks.finetune_tasks import RAISE, Task

ROW = {"accuracy": 60.0, "mb": 8.0, "head_mb": 1.0, "exploration_mb": 2.0}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(12, 40), nn.Linear(40, 10)

    def features(self, inputs):
        return self.body(inputs).relu()

    def forward(self, inputs):
        return self.head(self.features(inputs))


def net_of(seed):
    torch.manual_seed(seed)
    return Net()


def adapted(net, rank):
    net.body.weight.requires_grad_(False)
    return net


@pytest.fixture(scope="module")
def runs():
    torch.manual_seed(0)
    labels = torch.arange(400) % 10
    inputs = torch.randn(10, 12)[labels] + 0.3 * torch.randn(400, 12)
    examples = inputs[:300], labels[:300]
    rates = {"head": 0.01, "dense": 0.01, "masked": 0.01, "adapters": 0.01}
    return Runs(Task(net_of, Net.features, "head", examples, (inputs[300:], labels[300:]), rates, adapted), 2, seed=1)


@pytest.mark.slow
def test_a_row_charges_head_exploration_and_rounds(runs):
    full, head, kept = (runs.row(way) for way in (Way(), Way("head"), Way(density=0.1)))
    assert (full["kept"], full["size"], full["never_pruned"]) == (880, 930, 50)
    assert (kept["kept"], kept["never_pruned"]) == (48, 450)  # the head is never pruned
    assert (full["exploration_mb"], head["head_mb"], head["size"]) == (0, 0, 410)
    assert kept["exploration_mb"] > 0
    assert full["head_mb"] == kept["head_mb"] > 0
    assert full["accuracy"] > 80


@pytest.mark.slow
def test_ways_with_the_same_explorers_share_one_exploration(runs):
    one, zero, few, none = (
        runs.row(Way(density=0.2, **other))
        for other in ({"gamma": 0.0}, {"outside": "zero"}, {"explorers": 0.3}, {"explorers": 0.0})
    )
    assert one["exploration_mb"] == zero["exploration_mb"] > few["exploration_mb"] > none["exploration_mb"] == 0
    assert one["kept"] == none["kept"] == 96
    assert runs.row(Way(density=0.2, gamma=0.0)) == one


def test_masks_are_chosen_once_and_training_begins_at_the_pretrained_values():
    method = Way(density=0.1, explorers=0.3, gamma=0.0).method
    assert (method.schedule, method.initial, method.explorers, method.gamma) == ((), "scratch", 0.3, 0.0)


@pytest.mark.slow
def test_adapters_travel_alone(runs):
    row = runs.row(Way("adapters", rank=1))
    assert (row["size"], row["exploration_mb"]) == (930 - 480, 0)


@pytest.mark.slow
def test_a_row_that_is_there_is_not_made_again(runs, tmp_path):
    output = tmp_path / "new" / "rows.json"
    found = finetune.kept(output, {"tiny": [300, 100, 2]})
    finetune.measure(runs, {"head only": Way("head")}, found, "tiny/1", output)
    again = finetune.kept(output, {"tiny": [300, 100, 2]})
    assert again == found == json.loads(output.read_text())
    finetune.measure(None, {"head only": Way("head")}, again, "tiny/1", output)
    with pytest.raises(SystemExit, match=r"tiny was made with sizes \[300, 100, 2\]"):
        finetune.kept(output, {"tiny": [300, 100, 3]})


def test_the_table_has_means_over_seeds_and_shares_of_full_fine_tuning(capsys):
    rows = {
        "text/1/full fine-tuning": {**ROW, "mb": 40.0},
        "text/2/full fine-tuning": {**ROW, "mb": 40.0},
        "text/1/0.02": ROW,
        "text/2/0.02": {**ROW, "accuracy": 63.0},
        "mnist/1/0.02": ROW,
    }
    full, row = finetune.summarise(rows, "text")
    assert (full["share"], full["sd"]) == (100.0, 0.0)
    assert row == {
        "task": "text",
        "way": "0.02",
        "seeds": 2,
        "accuracy": 61.5,
        "sd": 2.12,
        "mb": 8.0,
        "share": 20.0,
        "exploration_mb": 2.0,
    }
    assert [each["share"] for each in finetune.summarise(rows, "mnist")] == [None]
    finetune.show([row])
    assert "| 0.02 | 61.5 ± 2.12 | 8.0 | 20.0 | 2.0 |" in capsys.readouterr().out


def test_a_message_is_found_with_its_exception():
    source = """
    raise ValueError("expected a value of at least 1")
    raise TypeError(
        f"{name} must be a module or a string, "
        "not a number"
    )
    raise RuntimeError("too short") from error
    raise KeyError(name)
    """
    assert RAISE.findall(source) == [
        ("ValueError", "expected a value of at least 1"),
        ("TypeError", "{name} must be a module or a string, "),
    ]
