"""Find output layers, and which weight can feed which, from array names, shapes and order.

A weight has its units on axis 0 and its inputs on axis 1, as in PyTorch. A Keras or Flax ``kernel`` has its units on
the last axis and its inputs on the one before. A weight can be an output if

- it is the last weight of the model;
- its name says so (``head``, ``classifier``, ``logits``, ``fc_out``, ...) before any number in the name;
- no other weight can take its units as inputs.

Unless they are last, embeddings and the input projections of recurrent or attention layers are no outputs. Neither are
weights that feed another weight of the same head.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from autoflip_flwr.core.weights import leaf, words

Shapes = Mapping[str, tuple[int, ...]]

_HEAD = re.compile(
    r"(.*_)?(head|heads|classifier|classifiers|output|outputs|out|logits?|prediction|predictions|predictor|pred)_?\d*"
)
_EMBEDDING = re.compile(r"emb.*|wte|wpe|tok|token|tokens|pos|position|positional|.*embed(ding|dings)?")
_INNER = re.compile(r"weight_[ih]h_l.*|recurrent_kernel|(in|[qkv]+)_?proj.*|.*qkv.*")

_IMAGE_CHANNELS = 4
"""Up to this many input channels, a convolution is taken for the first layer of the model."""


def unit_axis(name: str, shape: tuple[int, ...]) -> int:
    """Return the axis of a weight's units."""
    return len(shape) - 1 if leaf(name) == "kernel" else 0


def input_axis(name: str, shape: tuple[int, ...]) -> int:
    """Return the axis of a weight's inputs."""
    return len(shape) - 2 if leaf(name) == "kernel" else 1


def takes(name: str, other: str, shapes: Shapes) -> bool:
    """Return whether the inputs of weight ``name`` can be the units of weight ``other``, judged by their numbers.

    The channels of a convolution may be flattened before a linear layer, and the units of a linear layer may be
    reshaped to an image. A grouped convolution with as many outputs as inputs divides the inputs among its groups.
    """
    shape, before = shapes[name], shapes[other]
    inputs, units = shape[input_axis(name, shape)], before[unit_axis(other, before)]
    if len(shape) > 2 and len(before) > 2:
        grouped = units == shape[unit_axis(name, shape)] and inputs > 0 and units % inputs == 0
        return inputs == units or (grouped and units > 1)
    if len(shape) > 2:  # a linear layer whose units are reshaped to an image
        return units > inputs > _IMAGE_CHANNELS and units % inputs == 0
    if len(before) > 2:
        return inputs % units == 0
    return inputs == units


def outputs_of(shapes: Shapes, candidates: Sequence[str], weights: Collection[str]) -> dict[str, int]:
    """Find the weights that can be outputs.

    Parameters
    ----------
    shapes : Mapping[str, tuple[int, ...]]
        Shapes of all arrays, by name.
    candidates : Sequence[str]
        Names of the arrays to choose from, in the model's order; each has two or more dimensions.
    weights : Collection[str]
        Names of all weights.

    Returns
    -------
    dict[str, int]
        Name -> the axis of its units. The last candidate comes first, the others follow in the model's order.
    """
    if not candidates:
        return {}
    last = candidates[-1]
    takers = _takers(candidates, weights, shapes)
    found = [last, *(name for name in candidates[:-1] if _is_output(name, takers[name]))]
    return {name: unit_axis(name, shapes[name]) for name in found}


def _is_output(name: str, takers: Sequence[str]) -> bool:
    parts = name.lower().replace("/", ".").split(".")
    if any(_INNER.fullmatch(part) for part in parts[-2:]):
        return False
    if any(_EMBEDDING.fullmatch(word) for part in parts for word in words(part)):
        return False
    head = _head(name)
    if head:
        return not any(_head(other) == head for other in takers)
    return not takers


def _head(name: str) -> str:
    """Return the start of a name up to and including the part that marks an output; "" if there is none."""
    parts = name.lower().replace("/", ".").split(".")
    for number, part in enumerate(parts):
        if part.isdigit():
            return ""
        if _HEAD.fullmatch(part):
            return ".".join(parts[: number + 1])
    return ""


def _takers(candidates: Sequence[str], weights: Collection[str], shapes: Shapes) -> dict[str, list[str]]:
    """Map each candidate to the other weights that can take its units as inputs; none if it has only one unit."""
    found: dict[str, list[str]] = {}
    known: dict[tuple[object, ...], list[str]] = {}  # a cache, since models repeat their shapes
    for name in candidates:
        shape = shapes[name]
        key = (shape, unit_axis(name, shape))
        if key not in known:
            single = shape[unit_axis(name, shape)] == 1
            known[key] = [] if single else [other for other in weights if takes(other, name, shapes)]
        found[name] = [other for other in known[key] if other != name]
    return found
