"""The clients."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from digits_pytorch import task

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    model, loader, _ = load(message, context)
    loss = task.train(model, loader, context.run_config["local-epochs"], message.content["config"]["lr"])
    metrics = MetricRecord({"train-loss": loss, "num-examples": len(loader.dataset)})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    model, _, loader = load(message, context)
    metrics = MetricRecord({"accuracy": task.test(model, loader), "num-examples": len(loader.dataset)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def load(message: Message, context: Context):
    model = task.Net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    return model, *task.load_partition(context.node_config["partition-id"], context.node_config["num-partitions"])
