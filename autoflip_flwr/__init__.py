"""AutoFLIP for Flower: informed federated pruning, values-only messages both ways."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autoflip_flwr.client.context import apply_mask, current_mask, current_rate, current_subspace
    from autoflip_flwr.client.mod import autoflip_mod, autoflip_mod_with
    from autoflip_flwr.client.report import current_request, report
    from autoflip_flwr.core.budget import Budget
    from autoflip_flwr.core.layout import Layout
    from autoflip_flwr.core.mask import Mask
    from autoflip_flwr.core.method import Method
    from autoflip_flwr.core.methods import LossExploration, Magnitude, Random, Snip
    from autoflip_flwr.core.request import Request
    from autoflip_flwr.core.selection import select
    from autoflip_flwr.core.statistics import Exploration
    from autoflip_flwr.core.subspace import Subspace
    from autoflip_flwr.costs.ledger import Ledger
    from autoflip_flwr.replies.quarantine import ReplyRules
    from autoflip_flwr.server.following import follow
    from autoflip_flwr.server.settings import Nodes, Values
    from autoflip_flwr.server.strategy import AutoFlip, Pruned
    from autoflip_flwr.storage.checkpoint import Checkpoints
    from autoflip_flwr.trackers.hook import Hook, Round
    from autoflip_flwr.trackers.mlflow import MLflow
    from autoflip_flwr.trackers.tensorboard import TensorBoard
    from autoflip_flwr.trackers.wandb import WandB
else:  # when asked for: a client starts for every message and needs none of the server's, the command needs no Flower
    _MODULES = {
        "AutoFlip": "server.strategy",
        "Budget": "core.budget",
        "Checkpoints": "storage.checkpoint",
        "Exploration": "core.statistics",
        "Hook": "trackers.hook",
        "Layout": "core.layout",
        "Ledger": "costs.ledger",
        "LossExploration": "core.methods",
        "MLflow": "trackers.mlflow",
        "Magnitude": "core.methods",
        "Mask": "core.mask",
        "Method": "core.method",
        "Nodes": "server.settings",
        "Pruned": "server.strategy",
        "Random": "core.methods",
        "ReplyRules": "replies.quarantine",
        "Request": "core.request",
        "Round": "trackers.hook",
        "Snip": "core.methods",
        "Subspace": "core.subspace",
        "TensorBoard": "trackers.tensorboard",
        "Values": "server.settings",
        "WandB": "trackers.wandb",
        "apply_mask": "client.context",
        "autoflip_mod": "client.mod",
        "autoflip_mod_with": "client.mod",
        "current_mask": "client.context",
        "current_rate": "client.context",
        "current_subspace": "client.context",
        "follow": "server.following",
        "current_request": "client.report",
        "report": "client.report",
        "select": "core.selection",
    }

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *_MODULES})


__all__ = [
    "AutoFlip",
    "Budget",
    "Checkpoints",
    "Exploration",
    "Hook",
    "Layout",
    "Ledger",
    "LossExploration",
    "MLflow",
    "Magnitude",
    "Mask",
    "Method",
    "Nodes",
    "Pruned",
    "Random",
    "ReplyRules",
    "Request",
    "Round",
    "Snip",
    "Subspace",
    "TensorBoard",
    "Values",
    "WandB",
    "apply_mask",
    "autoflip_mod",
    "autoflip_mod_with",
    "current_mask",
    "current_rate",
    "current_request",
    "current_subspace",
    "follow",
    "report",
    "select",
]
