"""The server."""

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from digits_sklearn.task import get_arrays, load_test, make_model, set_arrays

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    rounds = context.run_config["num-server-rounds"]
    strategy = FedAvg(fraction_evaluate=0.0)
    result = strategy.start(
        grid=grid,
        initial_arrays=get_arrays(make_model()),
        train_config=ConfigRecord({"lr": context.run_config["lr"]}),
        num_rounds=rounds,
        evaluate_fn=evaluate,
    )
    print(f"final accuracy: {result.evaluate_metrics_serverapp[rounds]['accuracy']:.4f}", flush=True)
    if context.run_config["model-path"]:
        np.savez(context.run_config["model-path"], **{name: a.numpy() for name, a in result.arrays.items()})


def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    model = make_model()
    set_arrays(model, arrays)
    accuracy = model.score(*load_test())
    print(f"round {server_round}: accuracy {accuracy:.4f}", flush=True)
    return MetricRecord({"accuracy": accuracy})
