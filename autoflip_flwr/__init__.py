"""AutoFLIP for Flower: informed federated pruning, values-only messages both ways."""

from autoflip_flwr.guidance import Exploration
from autoflip_flwr.layout import Layout
from autoflip_flwr.ledger import Ledger
from autoflip_flwr.mask import Mask
from autoflip_flwr.mod import apply_mask, autoflip_mod, current_mask
from autoflip_flwr.strategy import AutoFlip

__all__ = ["AutoFlip", "Exploration", "Layout", "Ledger", "Mask", "apply_mask", "autoflip_mod", "current_mask"]
