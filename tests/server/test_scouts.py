"""Training that starts from the explorers' average starts from sound numbers."""

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from sklearn.datasets import load_digits
from torch import nn

from autoflip_flwr import AutoFlip
from autoflip_flwr.core.methods import LossExploration
from autoflip_flwr.testing import LocalGrid
from autoflip_flwr.torch import autoflip_mod, masked_training

NODES = 4


class Net(nn.Module):
    """Digits behind batch normalisation; some pixels are 0 everywhere, and their variance falls to 0."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.hidden, self.out = nn.BatchNorm1d(64), nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.hidden(self.norm(x))))


def app_of(seed: int) -> ClientApp:
    pixels, labels = load_digits(return_X_y=True)
    rows = np.array_split(np.random.default_rng(seed).permutation(len(labels)), NODES)
    app = ClientApp(mods=[autoflip_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model = Net()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        mine = rows[int(context.node_config["partition-id"])]
        x, y = torch.tensor(pixels[mine] / 16, dtype=torch.float32), torch.tensor(labels[mine])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with masked_training(model, context):
            for batch in torch.arange(len(mine)).repeat(8).split(32):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
        arrays = ArrayRecord(model.state_dict())
        return Message(RecordDict({"arrays": arrays, "m": MetricRecord({"num-examples": len(mine)})}), reply_to=message)

    return app


@pytest.mark.parametrize("seed", range(5))
def test_no_running_variance_is_negative_and_outputs_are_finite(seed: int):
    torch.manual_seed(seed)
    starts: list[dict[str, torch.Tensor]] = []

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        if server_round == 0:
            starts.append(arrays.to_torch_state_dict())
        return MetricRecord({})

    strategy = AutoFlip(
        FedAvg(fraction_evaluate=0.0), sparsity=0.5, seed=seed, method=LossExploration.static(initial="explorers")
    )
    record = ArrayRecord(Net().state_dict())
    strategy.start(LocalGrid(app_of(seed), NODES), record, num_rounds=1, evaluate_fn=evaluate)
    variance = starts[0]["norm.running_var"]
    assert (variance >= 0).all()
    assert variance.min() < 1e-3
    model = Net()
    model.load_state_dict(starts[0])
    assert torch.isfinite(model.eval()(torch.rand(50, 64))).all()
