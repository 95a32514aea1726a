"""Crop, flip and colour images, in batches, on the device where they are."""

from __future__ import annotations

import torch
from torch.nn import functional

PADDING = 4
"""Black pixels around images that are cropped to their own size, as is usual for CIFAR."""

JITTER = 0.5
"""Brightness and contrast are multiplied by random factors within 1 - JITTER and 1 + JITTER (our reading)."""


def centred(raw: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return the middle (n, h, w, C) of images (n, H, W, C)."""
    height, width = raw.shape[1:3]
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return raw[:, top : top + size[0], left : left + size[1]]


def augmented(raw: torch.Tensor, size: tuple[int, int], how: str, generator: torch.Generator) -> torch.Tensor:
    """Augment each image on its own.

    Parameters
    ----------
    raw : Tensor
        uint8 (n, H, W, C).
    size : tuple of int
        (h, w) of the result, at most (H, W).
    how : str
        `flip` (left to right, one in two), `crop` (at a random place; images that keep their size are padded first),
        `crop-flip`, or `crop-flip-jitter` (with random brightness and contrast). Without `crop` the middle is taken.
    generator : Generator
        On the CPU, so that every device gets the same numbers. Five for each image, whatever `how`.

    Returns
    -------
    Tensor
        (n, h, w, C), uint8, or with `jitter` float32 within 0 and 255.
    """
    draws = torch.rand(len(raw), 5, generator=generator).to(raw.device)
    if "crop" in how:
        if tuple(raw.shape[1:3]) == size:
            raw = functional.pad(raw, (0, 0, PADDING, PADDING, PADDING, PADDING))
        top, left = (
            (draws[:, axis] * (room + 1)).long().clamp_(max=room)
            for axis, room in enumerate((raw.shape[1] - size[0], raw.shape[2] - size[1]))
        )
    else:
        raw = centred(raw, size)
        top = left = torch.zeros(len(raw), dtype=torch.int64, device=raw.device)
    rows = top[:, None] + torch.arange(size[0], device=raw.device)
    columns = left[:, None] + torch.arange(size[1], device=raw.device)
    if "flip" in how:
        columns = torch.where(draws[:, 2:3] < 0.5, columns.flip(1), columns)
    images = torch.arange(len(raw), device=raw.device)
    raw = raw[images[:, None, None], rows[:, :, None], columns[:, None, :]]
    return _jittered(raw, draws[:, 3:]) if "jitter" in how else raw


def _jittered(raw: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    brightness, contrast = (1 - JITTER + 2 * JITTER * draws)[:, :, None, None, None].unbind(1)
    pixels = (raw * brightness).clamp_(0, 255)
    grey = pixels.mean((1, 2, 3), keepdim=True)
    return (grey + (pixels - grey) * contrast).clamp_(0, 255)
