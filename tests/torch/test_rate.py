"""The learning rate follows the density: from the server's setting to the optimizer's step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from autoflip_flwr import Magnitude, Pruned, autoflip_mod, current_rate
from autoflip_flwr.testing import LocalGrid
from autoflip_flwr.torch import masked_training

W0 = {"w": np.arange(1.0, 9.0, dtype=np.float32).reshape(2, 4)}


class Failing(torch.optim.SGD):
    """An optimizer whose first step fails."""

    failed = False

    def step(self, closure=None):
        if not self.failed:
            self.failed = True
            raise RuntimeError("no step")
        return super().step(closure)


def run(sparsity: float, kind: type[torch.optim.Optimizer] = torch.optim.SGD, **options) -> tuple[np.ndarray, set]:
    """Let one client make one step of 0.1 against a gradient of 1; return the model, and what the client has seen."""
    app, seen = ClientApp(mods=[autoflip_mod]), set()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model = torch.nn.ParameterDict({"w": torch.from_numpy(message.content["arrays"]["w"].numpy().copy())})
        optimizer = kind([{"params": list(model.values()), "lr": 0.1}])
        masked_training(model, context)
        model["w"].sum().backward()
        try:
            optimizer.step()
        except RuntimeError:
            optimizer.step()
        seen.add((current_rate(context), optimizer.param_groups[0]["lr"]))
        content = {
            "arrays": ArrayRecord({"w": model["w"].detach()}),
            "metrics": MetricRecord({"num-examples": 1}),
        }
        return Message(RecordDict(content), reply_to=message)

    # the mask keeps the two largest of eight; a unit of the output layer may lose all
    strategy = Pruned(FedAvg(fraction_evaluate=0.0), sparsity, method=Magnitude(), output=None, seed=1, **options)
    record = ArrayRecord({"w": torch.from_numpy(W0["w"])})
    result = strategy.start(LocalGrid(app, 2), record, num_rounds=1)
    return result.arrays["w"].numpy(), seen


@pytest.mark.parametrize("kind", [torch.optim.SGD, Failing])
def test_a_step_is_as_much_longer_as_the_density_says(kind: type[torch.optim.Optimizer]):
    found, seen = run(0.75, kind, lr_power=0.5)
    assert seen == {(2.0, 0.1)}  # 0.25 ** -0.5; the optimizer's own rate is as it was
    assert found[1, 2:] == pytest.approx(W0["w"][1, 2:] - 0.2)
    assert not found[0].any()


def test_the_power_is_a_quarter_unless_it_is_set():
    ((rate, _),) = run(0.75)[1]
    assert rate == pytest.approx(2**0.5)  # 0.25 ** -0.25


def test_nothing_changes_without_a_power_or_without_pruned_entries():
    assert run(0.75, lr_power=0.0)[1] == {(1.0, 0.1)}
    assert run(0.75, outside="initial")[1] == {(1.0, 0.1)}
    dense, seen = run(0.0, lr_power=1.0)
    assert seen == {(1.0, 0.1)}
    assert dense == pytest.approx(W0["w"] - 0.1)


@pytest.mark.parametrize(
    ("power", "kind"), [(-0.1, ValueError), (1.5, ValueError), ("a", TypeError), (True, TypeError)]
)
def test_a_power_out_of_range_is_refused(power: object, kind: type[Exception]):
    with pytest.raises(kind, match=r"lr_power = .*must be a number"):
        Pruned(method=Magnitude(), lr_power=power)
