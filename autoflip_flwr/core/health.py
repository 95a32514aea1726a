"""Checks whether a mask disconnects a network, as far as array names, shapes and order show."""

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
"""Minimum number of inputs per output unit at which keeping only one input per unit is a problem."""


def problems(mask: Mask) -> list[str]:
    """Return descriptions of what is wrong with a mask; an empty list if inputs stay connected to outputs.

    There are two kinds of problems. First, arrays that keep no more than their floor (one entry, or one per output
    unit), unless they are so small that more cannot be expected. Second, weights that keep no entry from any unit that
    is still connected to the inputs. A residual connection may bypass such a weight.

    Parameters
    ----------
    mask : Mask
        The mask to check. Only the server's layout names the output layers.
    """
    found = []
    if bare := _bare(mask):
        found.append(f"nothing but {'their' if len(bare) > 1 else 'its'} floor is left of {', '.join(bare)}")
    if cuts := _cuts(mask):
        found.append(f"no path leads on {'; nor '.join(cuts)}")
    return found


def _bare(mask: Mask) -> list[str]:
    """Describe the arrays that keep no more than their floor, each with its number of kept entries."""
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
    """Describe the weights that keep no entry from a unit that is still connected to the inputs."""
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
            alive[name][:] = True  # so that later weights are checked on their own
    return cuts


def _feeds(weights: list[str], layout: Layout) -> dict[str, str]:
    """Map each weight to the one that takes its units as inputs.

    That is the next weight that can, else the first earlier one that no other weight feeds.
    """
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
    """Return the weights sorted so that each comes after all that feed it."""
    waiting = {name: len(before) for name, before in sources.items()}
    ready = [name for name in weights if not waiting[name]]
    for name in ready:
        if (follower := feeds.get(name)) is not None:
            waiting[follower] -= 1
            if not waiting[follower]:
                ready.append(follower)
    return ready


def _inputs(name: str, sources: list[str], alive: dict[str, Bools], layout: Layout) -> Bools:
    """Return which inputs of a weight are connected to the model's inputs: all, if no weight is known to feed it."""
    shape = layout[name].shape
    count = shape[input_axis(name, shape)]
    inputs = np.full(count, not sources)
    for source in sources:
        units: Any = alive[source]
        if count < units.size:  # a grouped convolution, or units reshaped to an image
            units = np.any(units.reshape(-1, count), axis=0) if units.size % count == 0 else np.ones(count, bool)
        elif leaf(name) == "kernel":  # flattened with the channels last
            units = np.tile(units, count // units.size)
        else:
            units = np.repeat(units, count // units.size)
        inputs |= units
    return inputs


def _units(name: str, inputs: Bools, mask: Mask) -> Bools:
    """Return which units of a weight keep an entry from at least one of these inputs."""
    shape = mask.layout[name].shape
    units = shape[unit_axis(name, shape)]
    if name not in mask.keep:
        return np.full(units, bool(inputs.any()))
    keep: NDArray[Any] = np.moveaxis(mask.keep[name], (unit_axis(name, shape), input_axis(name, shape)), (0, 1))
    heard = keep.reshape(units, inputs.size, -1)[:, inputs]
    return np.asarray(heard.reshape(units, -1).any(axis=1))
