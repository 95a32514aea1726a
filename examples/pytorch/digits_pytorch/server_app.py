"""The server."""

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from digits_pytorch.task import SEED, Net, load_test, test

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    torch.manual_seed(SEED)
    rounds = context.run_config["num-server-rounds"]
    strategy = FedAvg(fraction_evaluate=0.5)
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(Net().state_dict()),
        train_config=ConfigRecord({"lr": context.run_config["lr"]}),
        num_rounds=rounds,
        evaluate_fn=evaluate,
    )
    print(f"final accuracy: {result.evaluate_metrics_serverapp[rounds]['accuracy']:.4f}", flush=True)
    if context.run_config["model-path"]:
        torch.save(result.arrays.to_torch_state_dict(), context.run_config["model-path"])


def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    model = Net()
    model.load_state_dict(arrays.to_torch_state_dict())
    accuracy = test(model, load_test())
    print(f"round {server_round}: accuracy {accuracy:.4f}", flush=True)
    return MetricRecord({"accuracy": accuracy})
