"""Helpers for PyTorch clients."""

from autoflip_flwr.torch.masking import apply_mask, masked_training

__all__ = ["apply_mask", "masked_training"]
