"""Whether a mask cuts a network in two, as far as its arrays' names, shapes and order tell."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.core.layout import Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.outputs import input_axis, takes, unit_axis
from autoflip_flwr.core.weights import leaf, weights_of

Bools = NDArray[np.bool_]

_FEW = 8
"""An output unit of so many inputs that keeps one of them has lost its layer."""


def problems(mask: Mask) -> list[str]:
    """What is wrong with a mask, in words; nothing for one that leaves paths from the inputs to the outputs.

    Two kinds are told: arrays of which no more is left than the floors keep (an entry, or one for each output unit),
    unless they are so small that it could not be more; and places where all units that still hear of the inputs are
    ignored by the weights that follow. A residual connection may lead around such a place.

    Parameters
    ----------
    mask : Mask
        Its layout tells the output layers, where it is the server's.
    """
    found = []
    if bare := _bare(mask):
        found.append(f"nothing but {'their' if len(bare) > 1 else 'its'} floor is left of {', '.join(bare)}")
    if cuts := _cuts(mask):
        found.append(f"no path leads on {'; nor '.join(cuts)}")
    return found


def _bare(mask: Mask) -> list[str]:
    """Arrays of which no more is left than a floor, with how many entries that is."""
    bare = []
    pruned = [spec for spec in mask.layout.prunable if mask.kept_by_name[spec.name] < spec.size]
    density = sum(mask.kept_by_name[spec.name] for spec in pruned) / max(sum(spec.size for spec in pruned), 1)
    for spec in pruned:
        kept, axis = mask.kept_by_name[spec.name], mask.layout.output.get(spec.name)
        floor = 1 if axis is None else spec.shape[axis]
        more = density * spec.size >= floor + 1 or (axis is not None and spec.size >= _FEW * floor)
        if kept <= floor and more:
            bare.append(f"{spec.name} ({kept} of {spec.size} entries)")
    return bare


def _cuts(mask: Mask) -> list[str]:
    """Where no kept weight takes up a unit that still hears of the inputs."""
    layout = mask.layout
    connecting = weights_of({spec.name: spec.shape for spec in layout.specs})
    weights = [
        spec.name
        for spec in layout.specs
        if spec.floating and spec.size and len(spec.shape) > 1 and (spec.prunable or spec.name in connecting)
    ]
    feeds = _feeds(weights, layout)
    sources: dict[str, list[str]] = {name: [] for name in weights}
    for name, follower in feeds.items():
        sources[follower].append(name)
    alive: dict[str, Bools] = {}
    cuts = []
    for name in _in_order(weights, feeds, sources):
        alive[name] = _units(name, _inputs(name, sources[name], alive, layout), mask)
        if not alive[name].any():
            cuts.append(f"from {' or '.join(sources[name]) or 'the inputs'} to {name}")
            alive[name][:] = True  # so that what follows is judged by itself
    return cuts


def _feeds(weights: list[str], layout: Layout) -> dict[str, str]:
    """Weight -> the one that takes its units: the next that can, else the first before it that nobody feeds."""
    shapes = {name: layout[name].shape for name in weights}
    feeds: dict[str, str] = {}
    for number, name in enumerate(weights):
        follower = next((other for other in weights[number + 1 :] if takes(other, name, shapes)), None)
        if follower is not None:
            feeds[name] = follower
    fed = set(feeds.values())
    for number, name in enumerate(weights):  # a head may be defined before its body
        if name not in feeds:
            earlier = (other for other in weights[:number] if other not in fed and takes(other, name, shapes))
            first = next(earlier, None)
            if first is not None and not _reaches(first, name, feeds):
                feeds[name] = first
                fed.add(first)
    return feeds


def _reaches(start: str, end: str, feeds: dict[str, str]) -> bool:
    while start in feeds and start != end:
        start = feeds[start]
    return start == end


def _in_order(weights: list[str], feeds: dict[str, str], sources: dict[str, list[str]]) -> list[str]:
    """The weights, each after all that feed it."""
    waiting = {name: len(before) for name, before in sources.items()}
    ready = [name for name in weights if not waiting[name]]
    for name in ready:
        if (follower := feeds.get(name)) is not None:
            waiting[follower] -= 1
            if not waiting[follower]:
                ready.append(follower)
    return ready


def _inputs(name: str, sources: list[str], alive: dict[str, Bools], layout: Layout) -> Bools:
    """Which inputs of a weight hear of the model's inputs: all, where nothing is known to feed it."""
    shape = layout[name].shape
    count = shape[input_axis(name, shape)]
    inputs = np.full(count, not sources)
    for source in sources:
        units: Any = alive[source]
        if count < units.size:  # a grouped convolution, or an image that is made of units
            units = np.any(units.reshape(-1, count), axis=0) if units.size % count == 0 else np.ones(count, bool)
        elif leaf(name) == "kernel":  # flattened with the channels last
            units = np.tile(units, count // units.size)
        else:
            units = np.repeat(units, count // units.size)
        inputs |= units
    return inputs


def _units(name: str, inputs: Bools, mask: Mask) -> Bools:
    """Which units of a weight keep an entry from one of these inputs."""
    shape = mask.layout[name].shape
    units = shape[unit_axis(name, shape)]
    if name not in mask.keep:
        return np.full(units, bool(inputs.any()))
    keep: NDArray[Any] = np.moveaxis(mask.keep[name], (unit_axis(name, shape), input_axis(name, shape)), (0, 1))
    heard = keep.reshape(units, inputs.size, -1)[:, inputs]
    return np.asarray(heard.reshape(units, -1).any(axis=1))
