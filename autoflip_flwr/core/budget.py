"""Budgets: how many entries of which arrays are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

from autoflip_flwr.core.choices import SCOPES
from autoflip_flwr.core.layout import ArraySpec, Layout
from autoflip_flwr.core.mask import Mask


class Budget(dict[tuple[str, ...], int]):
    """Number of entries to keep in each group of arrays; the keys are the names of the arrays in a group.

    The entries of a group are ranked together. Each prunable array belongs to exactly one group.

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

        Arrays whose density would exceed 1 stay dense, and ``eps`` is computed for the others. The total is exact:
        entries left over after rounding down go to the arrays with the largest remainders. No array gets fewer entries
        than its floor.
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
        """Keep as many entries of each array as a given mask keeps (FLASH: the exploration sets the densities)."""
        return cls({(name,): kept for name, kept in mask.kept_by_name.items()})

    @classmethod
    def between(cls, layout: Layout, target: Mapping[str, int], sparsity: float) -> Budget:
        """Keep so many of each array that all are equally far on their way from dense to the target's counts."""
        total = layout.prunable_size - pruned_count(sparsity, layout.prunable_size)
        last = sum(target[spec.name] for spec in layout.prunable)
        left = Fraction(total - last, max(layout.prunable_size - last, 1))
        wanted = {s.name: target[s.name] + left * (s.size - target[s.name]) for s in layout.prunable}
        return cls({(name,): kept for name, kept in _rounded(layout, wanted, total).items()})


BUDGETS = dict(zip(SCOPES, (Budget.whole, Budget.by_layer, Budget.erk), strict=True))
"""Budgets that need only a sparsity, by scope."""


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
    """Return the minimum number of entries that each prunable array keeps, by name.

    It is one per unit for the output layers that are not guessed, and one for every other array.
    """
    units = {name: layout[name].shape[axis] for name, axis in layout.output.items() if name not in layout.guesses}
    return {spec.name: units.get(spec.name, 1) for spec in layout.prunable}


def _dims(spec: ArraySpec) -> int:
    return sum(spec.shape) or 1


def _rounded(layout: Layout, wanted: Mapping[str, Fraction], total: int) -> dict[str, int]:
    """Round the wanted numbers so that they add up to ``total``, each between its array's floor and size."""
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
            break  # the floors do not fit into the budget: `select` raises the error
        kept[largest] -= 1
        missing += 1
    return kept
