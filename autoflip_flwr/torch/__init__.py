"""Helpers for PyTorch clients."""

from autoflip_flwr.client.mod import autoflip_mod, autoflip_mod_with
from autoflip_flwr.torch.gradients import gradients
from autoflip_flwr.torch.masking import MaskedTraining, apply_mask, masked_training

__all__ = ["MaskedTraining", "apply_mask", "autoflip_mod", "autoflip_mod_with", "gradients", "masked_training"]
