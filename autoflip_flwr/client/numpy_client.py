"""Convert between records of the Message API and those of ``NumPyClient`` apps (``client_fn``)."""

from __future__ import annotations

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    ConfigRecordValues,
    Context,
    Error,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp.typing import ClientAppCallable

from autoflip_flwr.wire.keys import HEADER
from autoflip_flwr.wire.records import WireError

_CLIENT_APP_RAISED = 2
_OK = 0


def call(message: Message, context: Context, call_next: ClientAppCallable, weight_key: str = "num-examples") -> Message:
    """Call the client's own code with the records of the API that it is written for.

    A ``client_fn`` app is detected when it first reads the record ``fitins.parameters`` (or ``evaluateins...``). It is
    then called again with such records, and the node's state remembers it.

    Parameters
    ----------
    message : Message
        A message whose content holds one ArrayRecord (full arrays by name) and at most one ConfigRecord.
    weight_key : str
        Name of the metric that returns the number of examples.

    Returns
    -------
    Message
        A reply in the form of the Message API, whichever API the client is written for. Positional results get the
        names of the message's arrays.
    """
    kind = "fit" if message.metadata.message_type.partition(".")[0] == MessageType.TRAIN else "evaluate"
    content = message.content
    state = context.state.get(HEADER)
    if state is None or not state.get("client-fn"):
        try:
            return call_next(message, context)
        except KeyError as error:
            if error.args[:1] != (f"{kind}ins.parameters",):
                raise
        context.state[HEADER] = ConfigRecord({**(state or {}), "client-fn": True})  # type: ignore[dict-item]
    arrays_key, arrays = next(iter(content.array_records.items()))
    message.content = RecordDict(
        {
            # named by position, like the arrays that the client returns: Flower's clipping mods compare the names
            f"{kind}ins.parameters": ArrayRecord({str(i): array for i, array in enumerate(arrays.values())}),
            f"{kind}ins.config": ConfigRecord(
                _without_lists(next(iter(content.config_records.values()), ConfigRecord()))
            ),
        }
    )
    reply = call_next(message, context)
    message.content = content
    if reply.has_error():
        return reply
    status = reply.content.get(f"{kind}res.status", ConfigRecord())
    if status.get("code", _OK) != _OK:
        return Message(
            Error(_CLIENT_APP_RAISED, f"the client's {kind} failed: {status.get('message')!r}"), reply_to=message
        )
    return Message(_modern(reply.content, kind, arrays_key, list(arrays), weight_key), reply_to=message)


def _modern(result: RecordDict, kind: str, arrays_key: str, names: list[str], weight_key: str) -> RecordDict:
    metrics: dict[str, int | float] = {
        key: value
        for key, value in result.config_records.get(f"{kind}res.metrics", ConfigRecord()).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    content = RecordDict()
    if kind == "fit":
        values = list(result.array_records["fitres.parameters"].values())
        if len(values) != len(names):
            raise WireError(f"the client's fit returned {len(values)} arrays, expected {len(names)}")
        named = zip(names, values, strict=True)
        content[arrays_key] = ArrayRecord({name: Array(array.numpy()) for name, array in named})
    else:
        metrics["loss"] = float(result.metric_records["evaluateres.loss"]["loss"])  # type: ignore[arg-type]
    counts = dict(result.metric_records[f"{kind}res.num_examples"])  # a clipping mod adds its norm bit
    metrics |= {weight_key: counts.pop("num_examples"), **counts}  # type: ignore[dict-item]
    content["metrics"] = MetricRecord(metrics)  # type: ignore[arg-type]
    return content


def _without_lists(config: ConfigRecord) -> dict[str, ConfigRecordValues]:
    """Return a config without lists, which a ``NumPyClient``'s config cannot hold."""
    return {key: value for key, value in config.items() if not isinstance(value, list)}
