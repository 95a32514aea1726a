"""Make the trackers that the app's settings name. They write into the run's record, if nothing else is set."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from autoflip_flwr.experiment.config import Config
from autoflip_flwr.trackers.hook import Hook
from autoflip_flwr.trackers.mlflow import MLflow
from autoflip_flwr.trackers.tensorboard import TensorBoard
from autoflip_flwr.trackers.wandb import WandB

_MAKE: Mapping[str, Callable[[Path], Hook]] = {
    "tensorboard": lambda record: TensorBoard(record / "tensorboard"),
    "wandb": lambda record: WandB(folder=record, name=record.name, id=record.name),
    "mlflow": lambda record: MLflow(
        os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{record / 'mlruns' / 'mlflow.db'}", name=record.name
    ),
}


def trackers_of(config: Config, record: Path) -> list[Hook]:
    """Return the trackers of a run, whose record is in this folder (an absolute path)."""
    return [_MAKE[name](record) for name in config.tracker_names]
