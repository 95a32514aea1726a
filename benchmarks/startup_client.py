"""The client's process of `benchmarks.startup`: it does what `flwr-clientapp` does, but without the network.

    python -m benchmarks.startup_client MESSAGE MODEL dense|masked BEGAN

It prints seconds as JSON: since BEGAN (the `time.monotonic()` at which the process was started), since the message
was there, and of CPU time.
"""

from __future__ import annotations

import importlib
import json
import pickle
import sys
import time
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

MODELS = ("cnn", "resnet18")


def client_app(model: str, masked: bool) -> ClientApp:
    """Return an `@app.train` client in PyTorch: one step of SGD on synthetic images. It imports what a client would."""
    if masked:
        from autoflip_flwr.torch import autoflip_mod, masked_training
    import torch

    app = ClientApp(mods=[autoflip_mod] if masked else [])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        net = network(model)
        net.load_state_dict(message.content["arrays"].to_torch_state_dict())  # type: ignore[union-attr]
        if masked:
            masked_training(net, context)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        torch.manual_seed(0)
        images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
        loss = torch.nn.functional.cross_entropy(net(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        metrics = MetricRecord({"train-loss": loss.item(), "num-examples": 8})
        return Message(RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=message)

    return app


def network(model: str):  # type: ignore[no-untyped-def]  # torch is not loaded yet
    """Return the model by its name."""
    if model == "resnet18":
        from torchvision.models import resnet18

        return resnet18(num_classes=10)
    from torch import nn

    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 6 * 6, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def save(path: Path, message: Message, context: Context) -> None:
    """Save a message and its node's context as they reach the process."""
    from flwr.common.serde import context_to_proto
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

    objects = {object_id: part.deflate() for object_id, part in get_all_nested_objects(message).items()}
    path.write_bytes(pickle.dumps((message.object_id, objects, context_to_proto(context).SerializeToString())))


def handle(path: Path, model: str, masked: bool, began: float) -> dict[str, float]:
    """Serve one message."""
    importlib.import_module("flwr.supernode.cli.flwr_clientapp")  # loads what the real process loads before its message
    from flwr.common.serde import context_from_proto, context_to_proto
    from flwr.proto.message_pb2 import Context as ContextProto
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 100, 1
    message_id, objects, proto = pickle.loads(path.read_bytes())
    arrived = time.monotonic()
    context = context_from_proto(ContextProto.FromString(proto))
    message = inflate_object_from_contents(message_id, objects)
    assert isinstance(message, Message)
    message.metadata.__dict__["_message_id"] = message_id
    app = client_app(model, masked)
    loaded = time.monotonic()
    reply = app(message, context)
    if reply.has_error():
        raise RuntimeError(str(reply.error))
    reply.metadata.__dict__["_message_id"] = reply.object_id
    size = sum(len(part.deflate()) for part in get_all_nested_objects(reply).values())
    context_to_proto(context).SerializeToString()
    replied = time.monotonic()
    return {
        "start": replied - began,
        "message": replied - arrived,
        "handle": replied - loaded,
        "cpu": time.process_time(),
        "bytes": size,
    }


if __name__ == "__main__":
    print(json.dumps(handle(Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "masked", float(sys.argv[4]))))
