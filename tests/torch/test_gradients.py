"""Gradients that the server asks for are read before the mask sets them to zero, and averaged over minibatches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

from autoflip_flwr import Magnitude, Method, Pruned, Request
from autoflip_flwr.testing import LocalGrid
from autoflip_flwr.torch import autoflip_mod, gradients, masked_training

X = torch.tensor([[1.0, 2.0, -1.0], [0.5, -1.0, 3.0], [2.0, 1.0, 1.0]])


class Net(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        if tied:
            self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.tanh(self.one(x))).pow(2).sum()


class Asks(Method):
    """Asks for three statistics of all entries in round 1."""

    def request(self, round_: int) -> tuple[Request, ...]:
        names = ("gradient", "gradient-square", "saliency")
        return tuple(Request(name, "all", "float32") for name in names) if round_ == 1 else ()

    def first(self, sparsity, layout, initial, seen):
        return Magnitude().first(sparsity, layout, initial, None)

    def refine(self, round_, mask, model, seen):
        self.seen, self.mask = seen, mask


def run(net: Net, *, masked_first: bool, calls: int = 3) -> tuple[Asks, dict[str, list[torch.Tensor]]]:
    app = ClientApp(mods=[autoflip_mod])
    expected: dict[str, list[torch.Tensor]] = {}

    @app.train()
    def train(message: Message, context: Context) -> Message:
        net.load_state_dict({name: torch.tensor(a.numpy()) for name, a in message.content["arrays"].items()})
        if message.content["config"]["server-round"] == 1:
            for x in X[:calls]:
                loss = net(x)
                for name, each in zip(
                    ("one.weight", "two.weight"),
                    torch.autograd.grad(loss, [net.one.weight, net.two.weight]),
                    strict=True,
                ):
                    expected.setdefault(name, []).append(each)
            if masked_first:
                masked_training(net, context)
            with gradients(net, context):
                if not masked_first:
                    masked_training(net, context)
                for x in X[:calls]:
                    net(x).backward()
        content = {"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord({"num-examples": 3})}
        return Message(RecordDict(content), reply_to=message)

    method = Asks()
    strategy = Pruned(FedAvg(fraction_evaluate=0.0), 0.5, method=method, nodes=2)
    strategy.start(LocalGrid(app, 2), ArrayRecord(net.state_dict()), num_rounds=2)
    assert strategy.ledger.failure_counts() == {"rejected": 0, "errors": 0, "absent": 0}
    return method, expected


@pytest.mark.parametrize("masked_first", [True, False])
def test_the_mean_over_minibatches_is_reported_pruned_entries_included(masked_first: bool):
    net = Net()
    method, expected = run(net, masked_first=masked_first)
    found = method.seen.mean
    for name, each in expected.items():
        each = [gradient.numpy() for gradient in each[:3]]
        np.testing.assert_allclose(found["gradient"][name], np.mean(each, axis=0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            found["gradient-square"][name], np.mean(np.square(each), axis=0), rtol=1e-5, atol=1e-6
        )
        assert found["gradient"][name][~method.mask.keep[name]].any()
        assert not found["saliency"][name][~method.mask.keep[name]].any()  # the weight there is zero


def test_a_weight_that_is_used_twice_has_one_gradient():
    method, _ = run(Net(tied=True), masked_first=True, calls=1)
    found = method.seen.mean["gradient"]
    assert found["one.weight"].tobytes() == found["two.weight"].tobytes()


def test_where_nothing_is_asked_nothing_is_done():
    from flwr.app import RecordDict as State

    net = Net()
    with gradients(net, Context(1, 1, {}, State(), {})):
        pass
    assert not net.one.weight._backward_hooks


def test_a_block_without_backward_is_an_error():
    app = ClientApp(mods=[autoflip_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        empty = gradients(Net(), context)
        with (
            pytest.raises(ValueError, match=r"no gradient came in the block of gradients\(...\): call backward"),
            empty,
        ):
            pass
        content = {"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 3})}
        return Message(RecordDict(content), reply_to=message)

    strategy = Pruned(FedAvg(fraction_evaluate=0.0), 0.5, method=Asks(), nodes=2)
    strategy.start(LocalGrid(app, 2), ArrayRecord(Net().state_dict()), num_rounds=1)
    assert strategy.ledger.failure_counts() == {"rejected": 0, "errors": 0, "absent": 0}
