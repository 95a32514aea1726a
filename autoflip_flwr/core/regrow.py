"""Choose the next mask from the one in force: exact counts of entries that are dropped, grown or kept.

Each rule ranks entries in tiers: every entry of a higher tier is kept before any of a lower one. Floors (one entry per
array, one per unit of the output layers) hold in all of them (:func:`~autoflip_flwr.core.selection.select`).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.core.budget import Budget, pruned_count
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.selection import select
from autoflip_flwr.core.statistics import Floats

Scores = Mapping[str, Floats]
Model = Mapping[str, NDArray[np.generic]]
Bools = NDArray[np.bool_]


def shrink(mask: Mask, score: Scores, budget: Mapping[tuple[str, ...], int]) -> Mask:
    """Drop the entries with the lowest scores until the budget is met; what is pruned stays pruned.

    Where a group of the budget keeps fewer entries already, the others keep more: the total is that of the budget.
    """
    kept = {group: sum(mask.kept_by_name[name] for name in group) for group in budget}
    own = {group: min(count, kept[group]) for group, count in budget.items()}
    missing = min(sum(budget.values()), mask.kept) - sum(own.values())
    for group in own:
        more = min(missing, kept[group] - own[group])
        own[group] += more
        missing -= more
    return select(mask.layout, score, own, out={name: ~keep for name, keep in mask.keep.items()})


def drop_and_grow(mask: Mask, model: Model, growth: Scores, share: float) -> Mask:
    """Exchange a share of each array's kept entries: drop the smallest weights, grow where ``growth`` is largest.

    This is RigL (Evci et al. 2020) as in FedTiny: of ``n`` kept entries, ``floor(share n)`` are dropped, and as many of
    those that were pruned are grown. Only entries with a growth other than 0 are grown: where there are too few, fewer
    are dropped. The number of kept entries of each array stays the same.

    Parameters
    ----------
    mask : Mask
        The mask in force.
    model : Mapping[str, ndarray]
        The model's prunable arrays.
    growth : Mapping[str, ndarray]
        For each prunable entry, the statistic whose magnitude decides which pruned entries are grown.
    share : float
        Share of the kept entries, in [0, 1).
    """
    score = {}
    for name, keep in mask.keep.items():
        weight, wanted = _size(model[name]), np.where(keep, 0.0, _size(growth[name]))
        count = min(pruned_count(share, mask.kept_by_name[name]), int(np.count_nonzero(wanted)))
        stays, grows = keep & ~_lowest(weight, keep, count), _highest(wanted, count)
        score[name] = _tiers((stays, weight), (grows, wanted), (keep, weight))
    return select(mask.layout, score, Budget.explored(mask))


def reconfigure(mask: Mask, model: Model, importance: Scores, share: float) -> Mask:
    """Reconsider the smallest weights of each array: they, and what is pruned, compete by their importance.

    This is PruneFL's step (Jiang et al. 2022) at a fixed number of kept entries: of an array's ``n`` kept entries, all
    but the ``floor(share n)`` smallest stay. The rest of the budget goes to the highest importance in the whole model.
    """
    score = {}
    top = max((float(_size(values).max(initial=0)) for values in importance.values()), default=0.0) or 1.0
    for name, keep in mask.keep.items():
        weight = _size(model[name])
        stays = keep & ~_lowest(weight, keep, pruned_count(share, mask.kept_by_name[name]))
        score[name] = np.where(stays, 2 + _unit(weight), _size(importance[name]) / top)
    return select(mask.layout, score, {tuple(mask.layout.prunable_names): mask.kept})


def vote(mask: Mask, model: Model, dropped: Scores, grown: Scores) -> Mask:
    """Keep what the clients' own masks say, then the largest weights: FedDST (Bibikar et al. 2022).

    Parameters
    ----------
    mask : Mask
        The mask in force.
    model : Mapping[str, ndarray]
        The model's prunable arrays, averaged over the clients.
    dropped, grown : Mapping[str, ndarray]
        Share of the clients that have dropped a kept entry, and that have grown a pruned one, in [0, 1].

    Returns
    -------
    Mask
        As many entries of each array as before: those with the largest weights among the kept ones that not all clients
        have dropped; then those that most clients have grown, whose weights are still 0.
    """
    score = {}
    for name, keep in mask.keep.items():
        weight, votes = _size(model[name]), _size(grown[name])
        stays = keep & (_size(dropped[name]) < 1)
        score[name] = _tiers((stays, weight), (~keep & (votes > 0), votes), (keep, weight))
    return select(mask.layout, score, Budget.explored(mask))


def _tiers(*ranked: tuple[Bools, Floats]) -> Floats:
    """Return scores: entries of an earlier pair are above all of later ones, and ordered by its values (>= 0)."""
    found = np.zeros(ranked[0][0].shape)
    for tier, (members, values) in enumerate(reversed(ranked), 1):
        found[members] = 2 * tier + _unit(values)[members]
    return found


def _unit(values: Floats) -> Floats:
    """Scale values >= 0 to [0, 1]."""
    top = float(values.max(initial=0))
    return values / top if top > 0 else values


def _size(values: NDArray[np.generic]) -> NDArray[np.float64]:
    return np.abs(np.asarray(values, np.float64))


def _lowest(values: Floats, among: Bools, count: int) -> Bools:
    """Return flags of the ``count`` smallest values among some entries; of equal ones, the earlier are taken."""
    return _first(np.where(among, values, np.inf), count)


def _highest(values: Floats, count: int) -> Bools:
    """Return flags of the ``count`` largest values; of equal ones, the earlier are taken."""
    return _first(-values, count)


def _first(values: Floats, count: int) -> Bools:
    flat = values.reshape(-1)
    chosen = np.zeros(flat.size, bool)
    if count:
        cut = np.partition(flat, count - 1)[count - 1]
        chosen = flat < cut
        chosen[np.flatnonzero(flat == cut)[: count - int(np.count_nonzero(chosen))]] = True
    return chosen.reshape(values.shape)
