"""Mean and standard deviation of training data, the same on every machine."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.experiment.rules import ConfigError


def pixel_statistics(x: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean and standard deviation of each channel of uint8 (N, H, W, C), scaled to [0, 1].

    They are exact before they are rounded to six digits, so they are the same on every machine.
    """
    levels = np.arange(256, dtype=object)  # Python's integers, which do not overflow
    means, deviations = [], []
    for channel in range(x.shape[3]):
        counts = np.zeros(256, np.int64)
        for start in range(0, len(x), 1000):
            counts += np.bincount(x[start : start + 1000, ..., channel].ravel(), minlength=256)
        number, total, squares = int(counts.sum()), int(counts @ levels), int(counts @ levels**2)
        means.append(total / number / 255)
        deviations.append(math.sqrt(number * squares - total**2) / number / 255)
    return _rounded(means), _positive(_rounded(deviations))


def channel_statistics(x: NDArray[np.floating[Any]], found: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean and standard deviation of each channel of (N, C, ...), rounded to six digits.

    `found` names the array in the `ConfigError` that a value which is not finite raises.
    """
    flat = x.reshape(len(x), x.shape[1], -1)
    size = flat.shape[0] * flat.shape[2]
    mean = sum(_chunk_sums(flat, 0.0)) / size
    if not np.isfinite(mean).all():
        raise ConfigError(f"{found}: expected finite numbers, found NaN, infinity or sums beyond the range of floats")
    variance = sum(_chunk_sums(flat, mean)) / size
    return _rounded(mean), _positive(_rounded(np.sqrt(variance)))


def _chunk_sums(flat: NDArray[Any], mean: Any) -> Any:
    for start in range(0, len(flat), 1000):
        chunk = flat[start : start + 1000].astype(np.float64)
        if isinstance(mean, float):
            yield chunk.sum((0, 2))
        else:
            yield ((chunk - mean[:, None]) ** 2).sum((0, 2))


def _rounded(values: Any) -> NDArray[np.float64]:
    return np.array([float(f"{float(value):.6g}") for value in values])


def _positive(deviations: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the deviations, with 1 for a channel that is constant."""
    return np.where(deviations > 0, deviations, 1.0)
