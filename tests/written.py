"""Read back what the trackers have written."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PATIENCE = 20  # seconds

Values = dict[int, dict[str, float]]
"""Values by name, by round."""


def of_tensorboard(folder: Path) -> tuple[Values, dict[str, str]]:
    """The scalars, and the texts by their names."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    rounds: Values = {}
    for name in found.Tags()["scalars"]:
        for event in found.Scalars(name):
            assert name not in rounds.setdefault(event.step, {}), f"{name} of round {event.step} is there twice"
            rounds[event.step][name] = event.value
    texts = {name: found.Tensors(name)[-1].tensor_proto.string_val[0].decode() for name in found.Tags()["tensors"]}
    return rounds, texts


def of_mlflow(uri: str, experiment: str = "autoflip") -> list[tuple[Any, Values]]:
    """Each run, the oldest first, with its metrics."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    found = []
    for run in reversed(runs):
        rounds: Values = {}
        for name in run.data.metrics:
            for metric in client.get_metric_history(run.info.run_id, name):
                assert name not in rounds.setdefault(metric.step, {}), f"{name} of round {metric.step} is there twice"
                rounds[metric.step][name] = metric.value
        found.append((run, rounds))
    return found


def of_wandb(folder: Path) -> tuple[Values, dict[str, Any], dict[str, Any], Any]:
    """The history, the config, the summary and the run of the one offline run in a folder.

    W&B's own process may close the file a moment after the run has finished: its record of the exit is waited for.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + PATIENCE
    while True:
        records = [Record.FromString(each) for each in _records(path.read_bytes())]
        if (records and records[-1].WhichOneof("record_type") == "exit") or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    rounds: Values = {}
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    run = None
    for record in records:
        kind = record.WhichOneof("record_type")
        if kind == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            step = items.pop("_step", record.history.step.num)
            rounds.setdefault(step, {}).update({k: v for k, v in items.items() if not k.startswith("_")})
        elif kind == "run":
            run = record.run
            config |= {item.key: json.loads(item.value_json) for item in run.config.update}
        elif kind == "summary":
            summary |= {
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.summary.update
            }
    return rounds, config, summary, run


def _records(data: bytes) -> Iterator[bytes]:
    """The records of a W&B transaction log, in LevelDB's format: blocks of 32 KiB after a header of 7 bytes."""
    assert data[:4] in (b"", b":W&B")
    at, parts = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if at > len(data):  # not all of it is there yet
            return
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""
