"""AutoFLIP for Flower: informed federated pruning, values-only messages both ways."""

import importlib
from typing import TYPE_CHECKING

from autoflip_flwr.layout import Layout
from autoflip_flwr.mask import Mask
from autoflip_flwr.mod import apply_mask, autoflip_mod, current_mask

if TYPE_CHECKING:
    from autoflip_flwr.guidance import Exploration
    from autoflip_flwr.ledger import Ledger
    from autoflip_flwr.strategy import AutoFlip
else:  # the server's: a client starts for every message, and does not load them
    _SERVER = {"AutoFlip": "strategy", "Exploration": "guidance", "Ledger": "ledger"}

    def __getattr__(name: str) -> object:
        if name not in _SERVER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value = getattr(importlib.import_module(f"{__name__}.{_SERVER[name]}"), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *_SERVER})


__all__ = ["AutoFlip", "Exploration", "Layout", "Ledger", "Mask", "apply_mask", "autoflip_mod", "current_mask"]
