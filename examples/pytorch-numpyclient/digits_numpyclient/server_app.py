"""The server: FedAvg of the Message API, which names its records as a NumPyClient app expects them."""

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from digits_numpyclient.task import SEED, Net, get_weights, load_test, set_weights, test

app = ServerApp()
RECORDS = {
    "arrayrecord_key": "fitins.parameters",
    "configrecord_key": "fitins.config",
    "weighted_by_key": "num_examples",
}


@app.main()
def main(grid: Grid, context: Context) -> None:
    torch.manual_seed(SEED)
    rounds = context.run_config["num-server-rounds"]
    strategy = FedAvg(fraction_evaluate=0.0, **RECORDS)
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(get_weights(Net())),
        train_config=ConfigRecord({"lr": context.run_config["lr"]}),
        num_rounds=rounds,
        evaluate_fn=evaluate,
    )
    print(f"final accuracy: {result.evaluate_metrics_serverapp[rounds]['accuracy']:.4f}", flush=True)
    if context.run_config["model-path"]:
        net = Net()
        set_weights(net, result.arrays.to_numpy_ndarrays())
        torch.save(net.state_dict(), context.run_config["model-path"])


def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    net = Net()
    set_weights(net, arrays.to_numpy_ndarrays())
    accuracy = test(net, load_test())
    print(f"round {server_round}: accuracy {accuracy:.4f}", flush=True)
    return MetricRecord({"accuracy": accuracy})
