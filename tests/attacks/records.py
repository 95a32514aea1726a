"""Records of a message as JSON and back: bytes as ``base64:...``, numbers that JSON lacks as ``float:nan``."""

from __future__ import annotations

from base64 import b64decode, b64encode
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict


def to_json(content: RecordDict) -> dict[str, Any]:
    described: dict[str, Any] = {}
    for key, record in content.items():
        if isinstance(record, ArrayRecord):
            arrays = {
                name: {"dtype": a.dtype, "shape": list(a.shape), "stype": a.stype, "data": _write(a.data)}
                for name, a in record.items()
            }
            described[key] = {"arrays": arrays}
        else:
            kind = "config" if isinstance(record, ConfigRecord) else "metrics"
            described[key] = {kind: {name: _write(value) for name, value in record.items()}}
    return described


def from_json(described: dict[str, Any]) -> RecordDict:
    content = RecordDict()
    for key, record in described.items():
        ((kind, values),) = record.items()
        if kind == "arrays":
            content[key] = ArrayRecord(
                {name: Array(a["dtype"], tuple(a["shape"]), a["stype"], _read(a["data"])) for name, a in values.items()}
            )
        else:
            make = ConfigRecord if kind == "config" else MetricRecord
            content[key] = make({name: _read(value) for name, value in values.items()})
    return content


def _write(value: Any) -> Any:
    match value:
        case bytes():
            return f"base64:{b64encode(value).decode()}"
        case float() if value - value != 0:
            return f"float:{value}"
        case list():
            return [_write(item) for item in value]
    return value


def _read(value: Any) -> Any:
    match value:
        case str() if value.startswith("base64:"):
            return b64decode(value[7:])
        case str() if value.startswith("float:"):
            return float(value[6:])
        case list():
            return [_read(item) for item in value]
    return value
