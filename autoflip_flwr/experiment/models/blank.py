"""Blank examples, to try a model with."""

from __future__ import annotations

import torch


def blank(count: int, input_shape: tuple[int, ...], kind: str, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return `count` examples of zeros: (count, *input_shape), int64 for `kind` = `text` and else float32."""
    return torch.zeros(count, *input_shape, dtype=torch.int64 if kind == "text" else torch.float32, device=device)
