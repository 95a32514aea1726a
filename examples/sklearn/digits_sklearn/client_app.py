"""The clients."""

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from digits_sklearn.task import CLASSES, get_arrays, load_partition, make_model, set_arrays

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    model = make_model(message.content["config"]["lr"])
    set_arrays(model, message.content["arrays"])
    pixels, labels = load_partition(context.node_config["partition-id"], context.node_config["num-partitions"])
    for _ in range(context.run_config["local-epochs"]):
        model.partial_fit(pixels, labels, classes=CLASSES)
    metrics = MetricRecord({"train-accuracy": model.score(pixels, labels), "num-examples": len(labels)})
    return Message(RecordDict({"arrays": get_arrays(model), "metrics": metrics}), reply_to=message)
