"""Which arrays of a model are weights, as far as their names and shapes tell.

A weight connects units, so it has two or more dimensions. Some arrays with as many connect nothing: biases, and what a
normalisation scales and shifts by. They are one value for each unit (or for each place of an image), and are known by

- their own last name: a part of it is ``bias``, ``beta``, ``gamma``, ``scale`` or ``intercept`` (and none ``weight`` or
  ``kernel``), or it is ``b`` beside a larger ``w``, ``weight`` or ``kernel``;
- their layer's name, whose last word ends in ``norm`` or is ``bn``, ``gn`` or ``ln``;
- a partner of the same layer and shape: ``weight`` beside ``bias``, as ``LayerNorm([C, H, W])`` has them;
- weight normalisation's magnitudes: ``weight_g`` beside ``weight_v``, ``original0`` beside ``original1``.
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
    """The name of the layer that an array belongs to; "" if it has none."""
    return name.replace("/", ".").rpartition(".")[0]


def leaf(name: str) -> str:
    """The last part of an array's name, in lower case."""
    return name.replace("/", ".").rpartition(".")[2].lower()


def words(part: str) -> list[str]:
    """The words of one part of a name, in lower case: ``attn_LayerNorm_0`` -> ``attn``, ``layernorm``."""
    return [word for word in re.split(r"[^a-z]+", part.lower()) if word]


def weights_of(shapes: Shapes) -> set[str]:
    """Names of the arrays that are weights (see the module)."""
    return {name for layer in _layers(shapes) for name in layer if _is_weight(name, layer)}


def biases_of(shapes: Shapes) -> set[str]:
    """Names of the arrays that are named as biases and stand beside a weight of their layer."""
    return {
        name
        for layer in _layers(shapes)
        if any(_is_weight(name, layer) for name in layer)
        for name in layer
        if "bias" in leaf(name) and shapes[name] and not _is_weight(name, layer)
    }


def _layers(shapes: Shapes) -> list[dict[str, tuple[int, ...]]]:
    """The shapes of each layer's arrays."""
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
