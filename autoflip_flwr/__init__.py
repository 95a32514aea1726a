"""AutoFLIP for Flower: informed federated pruning, values-only messages both ways."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autoflip_flwr.client.context import apply_mask, current_mask, current_subspace
    from autoflip_flwr.client.mod import autoflip_mod, autoflip_mod_with
    from autoflip_flwr.core.layout import Layout
    from autoflip_flwr.core.mask import Mask
    from autoflip_flwr.core.statistics import Exploration
    from autoflip_flwr.core.subspace import Subspace
    from autoflip_flwr.costs.ledger import Ledger
    from autoflip_flwr.server.strategy import AutoFlip
else:  # when asked for: a client starts for every message and needs none of the server's, the command needs no Flower
    _MODULES = {
        "AutoFlip": "server.strategy",
        "Exploration": "core.statistics",
        "Layout": "core.layout",
        "Ledger": "costs.ledger",
        "Mask": "core.mask",
        "Subspace": "core.subspace",
        "apply_mask": "client.context",
        "autoflip_mod": "client.mod",
        "autoflip_mod_with": "client.mod",
        "current_mask": "client.context",
        "current_subspace": "client.context",
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
    "Exploration",
    "Layout",
    "Ledger",
    "Mask",
    "Subspace",
    "apply_mask",
    "autoflip_mod",
    "autoflip_mod_with",
    "current_mask",
    "current_subspace",
]
