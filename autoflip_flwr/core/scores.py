"""Importance scores of parameters, computed from statistics.

Sources: the AutoFLIP paper (arXiv 2405.10271) and the code its authors published, FedLEx (arXiv 2506.18640). What
neither settles is marked "our reading".
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.core.choices import NORMALISATIONS
from autoflip_flwr.core.layout import Layout
from autoflip_flwr.core.statistics import Exploration, Floats, minmax


def agreement(deviation: Floats, signed_mean: Floats) -> Floats:
    """Return the client agreement ``a = A ** 2 / D`` in [0, 1], float64 (our reading).

    It is 1 where all explorers have the same delta, and 0 where their deltas cancel or are all 0.
    """
    square = np.asarray(signed_mean, np.float64) ** 2
    share = np.divide(square, deviation, out=np.zeros_like(square), where=deviation > 0)
    return np.minimum(share, 1.0)


def scores(exploration: Exploration, normalisation: str = "none", gamma: float = 1.0) -> dict[str, Floats]:
    """Return the score of each prunable parameter: guidance times agreement to the power gamma.

    Parameters
    ----------
    exploration : Exploration
        Statistics of the explorers.
    normalisation : str
        How the guidance G is computed. ``"none"``: G = D. ``"layer"``: D min-max normalised per array (the authors'
        code). ``"per-client"``: each explorer's deviation is normalised, then averaged (FedLEx).
    gamma : float
        Exponent of the agreement, ``>= 0``; 0 ignores it. ``"none"`` with 1 ranks by the squared signed mean.

    Returns
    -------
    dict[str, ndarray]
        float64 arrays in the shapes of the prunable arrays; low = unimportant.
    """
    if normalisation not in NORMALISATIONS:
        raise ValueError(f"normalisation = {normalisation!r}: must be one of {', '.join(NORMALISATIONS)}")
    if not 0 <= gamma < np.inf:
        raise ValueError(f"gamma = {gamma}: must be a number >= 0")
    if normalisation == "per-client" and exploration.normalised.keys() != exploration.deviation.keys():
        raise ValueError(
            "normalisation = 'per-client': the exploration was made without it and no longer tells the explorers "
            "apart; explore again with this setting"
        )
    result = {}
    for name, held in exploration.deviation.items():
        deviation = np.asarray(held, np.float64)
        if normalisation == "per-client":
            guidance: Floats = np.asarray(exploration.normalised[name], np.float64)
        else:
            guidance = minmax(deviation) if normalisation == "layer" else deviation
        result[name] = guidance * agreement(deviation, exploration.signed_mean[name]) ** gamma if gamma else guidance
    return result


def magnitude(layout: Layout, model: Mapping[str, NDArray[np.generic]]) -> dict[str, Floats]:
    """Score each prunable parameter by its magnitude (float64)."""
    return {spec.name: np.abs(np.asarray(model[spec.name], np.float64)) for spec in layout.prunable}


def random_scores(layout: Layout, seed: int) -> dict[str, Floats]:
    """Score each prunable parameter at random, in [0, 1)."""
    rng = np.random.default_rng(seed)
    return {spec.name: rng.random(spec.shape) for spec in layout.prunable}
