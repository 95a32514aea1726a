"""The clients: a NumPyClient, as Flower had it before the Message API."""

from flwr.app import Context
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp

from digits_numpyclient.task import Net, get_weights, load_partition, set_weights, train


class FlowerClient(NumPyClient):
    def __init__(self, context: Context):
        self.net = Net()
        self.context = context
        self.loader = load_partition(context.node_config["partition-id"], context.node_config["num-partitions"])

    def fit(self, parameters, config):
        set_weights(self.net, parameters)
        train(self.net, self.loader, self.context.run_config["local-epochs"], config["lr"])
        return get_weights(self.net), len(self.loader.dataset), {}


def client_fn(context: Context):
    return FlowerClient(context).to_client()


app = ClientApp(client_fn=client_fn)
