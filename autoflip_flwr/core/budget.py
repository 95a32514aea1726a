"""Budgets: how many entries are kept, among which arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

from autoflip_flwr.core.choices import SCOPES
from autoflip_flwr.core.layout import ArraySpec, Layout
from autoflip_flwr.core.mask import Mask


class Budget(dict[tuple[str, ...], int]):
    """Names of arrays that are ranked together -> how many of their entries are kept.

    Each prunable array belongs to one group. The four usual ones:

    >>> import numpy as np
    >>> layout = Layout.of({"a": np.zeros((4, 5)), "b": np.zeros((2, 5))})
    >>> Budget.whole(layout, 0.7), Budget.by_layer(layout, 0.7)
    ({('a', 'b'): 9}, {('a',): 6, ('b',): 3})
    """

    @classmethod
    def whole(cls, layout: Layout, sparsity: float) -> Budget:
        """Rank all prunable entries together (the authors' code: one quantile over the model)."""
        kept = layout.prunable_size - pruned_count(sparsity, layout.prunable_size)
        return cls({tuple(layout.prunable_names): kept})

    @classmethod
    def by_layer(cls, layout: Layout, sparsity: float) -> Budget:
        """Prune the same share of each array."""
        return cls({(spec.name,): spec.size - pruned_count(sparsity, spec.size) for spec in layout.prunable})

    @classmethod
    def erk(cls, layout: Layout, sparsity: float) -> Budget:
        """Give each array the density ``eps * sum(dims) / prod(dims)`` (Erdos-Renyi kernel; Evci et al. 2020, RigL).

        Arrays that would get more than 1 are dense, and leave the sum. The total is exact: what is left after rounding
        down goes to the largest remainders. No array gets fewer entries than its floor.
        """
        total = layout.prunable_size - pruned_count(sparsity, layout.prunable_size)
        dense: set[str] = set()
        while True:
            thin = [spec for spec in layout.prunable if spec.name not in dense]
            left = total - sum(layout[name].size for name in dense)
            eps = Fraction(left, max(sum(_dims(spec) for spec in thin), 1))
            over = {spec.name for spec in thin if eps * _dims(spec) > spec.size}
            if not over:
                break
            dense |= over
        wanted = {s.name: Fraction(s.size) if s.name in dense else eps * _dims(s) for s in layout.prunable}
        return cls({(name,): kept for name, kept in _rounded(layout, wanted, total).items()})

    @classmethod
    def explored(cls, mask: Mask) -> Budget:
        """Keep of each array as many entries as a mask does (FLASH: what an exploration finds is the densities)."""
        return cls({(name,): kept for name, kept in mask.kept_by_name.items()})


BUDGETS = dict(zip(SCOPES, (Budget.whole, Budget.by_layer, Budget.erk), strict=True))
"""The budgets that are made of a sparsity alone, by scope."""


def pruned_count(sparsity: float, size: int) -> int:
    """Return ``floor(sparsity * size)`` in exact decimals: ``pruned_count(0.29, 100)`` is 29.

    Raises
    ------
    ValueError
        If the sparsity is not in [0, 1).
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity = {sparsity}: must be a number in [0, 1)")
    return int(Fraction(repr(float(sparsity))) * size)


def floors_of(layout: Layout) -> dict[str, int]:
    """Return how many entries each prunable array keeps at least, by name: one, or one per certain output unit."""
    units = {name: layout[name].shape[axis] for name, axis in layout.output.items() if name not in layout.guesses}
    return {spec.name: units.get(spec.name, 1) for spec in layout.prunable}


def _dims(spec: ArraySpec) -> int:
    return sum(spec.shape) or 1


def _rounded(layout: Layout, wanted: Mapping[str, Fraction], total: int) -> dict[str, int]:
    """Whole numbers with this total, near to what is wanted, between each array's floor and its size."""
    floors = floors_of(layout)
    kept = {name: max(math.floor(share), floors[name]) for name, share in wanted.items()}
    by_remainder = sorted(wanted, key=lambda name: math.floor(wanted[name]) - wanted[name])
    missing = total - sum(kept.values())
    while missing > 0:
        room = [name for name in by_remainder if kept[name] < layout[name].size]
        for name in room[:missing]:
            kept[name] += 1
        missing -= min(len(room), missing)
    while missing < 0:
        largest = max(kept, key=lambda name: kept[name] - floors[name])
        if kept[largest] == floors[largest]:
            break  # the floors cannot be kept: choosing the mask says so
        kept[largest] -= 1
        missing += 1
    return kept
