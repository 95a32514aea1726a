"""Find the weights of a model from array names and shapes.

A weight connects units, so it has two or more dimensions. Some other arrays have as many dimensions: biases, and the
scale and shift of normalisation layers. They hold one value per unit (or per image position), and are recognised by

- the last part of their name: it contains the word ``bias``, ``beta``, ``gamma``, ``scale`` or ``intercept`` (but not
  ``weight`` or ``kernel``), or it is ``b`` and the layer has a larger ``w``, ``weight`` or ``kernel``;
- the name of their layer: its last word ends in ``norm``, or is ``bn``, ``gn`` or ``ln``;
- a ``weight`` and a ``bias`` of the same shape in one layer, as in ``LayerNorm([C, H, W])``;
- the magnitudes of weight normalisation: ``weight_g`` with ``weight_v``, ``original0`` with ``original1``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

Shapes = Mapping[str, tuple[int, ...]]

_PER_UNIT = {"bias", "biases", "beta", "gamma", "scale", "scales", "layerscale"}
_WEIGHT = {"w", "weight", "weights", "kernel"}
_NORMS = {"bn", "gn", "ln"}
_MAGNITUDES = {"weight_g": "weight_v", "original0": "original1"}


def prefix(name: str) -> str:
    """Return the name of the layer that an array belongs to; "" if it has none."""
    return name.replace("/", ".").rpartition(".")[0]


def leaf(name: str) -> str:
    """Return the last part of an array's name, in lower case."""
    return name.replace("/", ".").rpartition(".")[2].lower()


def words(part: str) -> list[str]:
    """Return the words of one part of a name, in lower case: ``attn_LayerNorm_0`` -> ``attn``, ``layernorm``."""
    return [word for word in re.split(r"[^a-z]+", part.lower()) if word]


def weights_of(shapes: Shapes) -> set[str]:
    """Return the names of the arrays that are weights (see the module)."""
    return {name for layer in _layers(shapes) for name in layer if _is_weight(name, layer)}


def biases_of(shapes: Shapes) -> set[str]:
    """Return the names of the arrays that are named as biases and have a weight in their layer."""
    return {
        name
        for layer in _layers(shapes)
        if any(_is_weight(name, layer) for name in layer)
        for name in layer
        if "bias" in leaf(name) and shapes[name] and not _is_weight(name, layer)
    }


def _layers(shapes: Shapes) -> list[dict[str, tuple[int, ...]]]:
    """Return the shapes of each layer's arrays, by name."""
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        layers.setdefault(prefix(name), {})[name] = shape
    return list(layers.values())


def _is_weight(name: str, layer: Shapes) -> bool:
    shape, own = layer[name], leaf(name)
    if len(shape) < 2 or _is_normalisation(prefix(name)):
        return False
    parts = words(own)
    if not _WEIGHT & set(parts) and (_PER_UNIT & set(parts) or any(part.startswith("intercept") for part in parts)):
        return False
    if own not in ("b", "weight", *_MAGNITUDES):
        return True
    beside = {leaf(other): layer[other] for other in layer if other != name}
    if own == "b" and any(math.prod(beside[other]) > math.prod(shape) for other in _WEIGHT & beside.keys()):
        return False
    if own == "weight" and beside.get("bias") == shape:
        return False
    return not (own in _MAGNITUDES and _MAGNITUDES[own] in beside and sum(size > 1 for size in shape) <= 1)


def _is_normalisation(layer: str) -> bool:
    parts = [word for word in words(leaf(layer)) if len(word) > 1]
    return bool(parts) and (parts[-1] in _NORMS or parts[-1].endswith("norm"))
