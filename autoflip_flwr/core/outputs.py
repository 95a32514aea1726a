"""Which weights can be a model's outputs, and which of them feed which, as far as names, shapes and order tell.

A weight has its units on axis 0 and its inputs on axis 1, as in PyTorch. A Keras or Flax ``kernel`` has its units on
the last axis and its inputs on the one before. An output is

- the last weight of the model;
- a weight that is named so (``head``, ``classifier``, ``logits``, ``fc_out``, ...), before any number in its name;
- a weight whose units no other weight takes as its inputs.

No outputs, unless last, are embeddings, and what a recurrent or an attention layer multiplies its inputs by. Nor are
those that another weight of the same head takes its inputs from.
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
"""A convolution of no more inputs is taken for the model's first."""


def unit_axis(name: str, shape: tuple[int, ...]) -> int:
    """The axis along which a weight's units lie."""
    return len(shape) - 1 if leaf(name) == "kernel" else 0


def input_axis(name: str, shape: tuple[int, ...]) -> int:
    """The axis along which a weight's inputs lie."""
    return len(shape) - 2 if leaf(name) == "kernel" else 1


def takes(name: str, other: str, shapes: Shapes) -> bool:
    """Whether a weight's inputs can be another weight's units, by their numbers.

    A convolution's channels may be flattened before a linear layer, and the other way round; those of a grouped
    convolution, with as many outputs as inputs, are divided among its groups.
    """
    shape, before = shapes[name], shapes[other]
    inputs, units = shape[input_axis(name, shape)], before[unit_axis(other, before)]
    if len(shape) > 2 and len(before) > 2:
        grouped = units == shape[unit_axis(name, shape)] and inputs > 0 and units % inputs == 0
        return inputs == units or (grouped and units > 1)
    if len(shape) > 2:  # a linear layer whose units are made an image of
        return units > inputs > _IMAGE_CHANNELS and units % inputs == 0
    if len(before) > 2:
        return inputs % units == 0
    return inputs == units


def outputs_of(shapes: Shapes, candidates: Sequence[str], weights: Collection[str]) -> dict[str, int]:
    """The weights that can be outputs.

    Parameters
    ----------
    shapes : Mapping[str, tuple[int, ...]]
        The shapes of all these arrays.
    candidates : Sequence[str]
        Names of the arrays to choose from, of two or more dimensions, in the model's order.
    weights : Collection[str]
        Names of all weights.

    Returns
    -------
    dict[str, int]
        Name -> the axis of its units; the last candidate comes first, the others follow in the model's order.
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
    """The part of a name, up to and with the word that calls it an output; "" if none does."""
    parts = name.lower().replace("/", ".").split(".")
    for number, part in enumerate(parts):
        if part.isdigit():
            return ""
        if _HEAD.fullmatch(part):
            return ".".join(parts[: number + 1])
    return ""


def _takers(candidates: Sequence[str], weights: Collection[str], shapes: Shapes) -> dict[str, list[str]]:
    """The other weights that can take each one's units as their inputs; one unit alone tells nothing."""
    found: dict[str, list[str]] = {}
    known: dict[tuple[object, ...], list[str]] = {}  # models repeat their shapes
    for name in candidates:
        shape = shapes[name]
        key = (shape, unit_axis(name, shape))
        if key not in known:
            single = shape[unit_axis(name, shape)] == 1
            known[key] = [] if single else [other for other in weights if takes(other, name, shapes)]
        found[name] = [other for other in known[key] if other != name]
    return found
