"""Subspace in which the rounds train: a mask, and the values of the pruned entries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.core.layout import Arrays
from autoflip_flwr.core.mask import Mask


@dataclass(frozen=True, eq=False)
class Subspace:
    """Set of models whose pruned entries have fixed values.

    Parameters
    ----------
    mask : Mask
        The kept entries.
    base : dict[str, ndarray] | None
        Values of the pruned entries: full arrays by name, of which only the pruned entries of prunable arrays are used.
        ``None``: zero.

    Examples
    --------
    >>> from autoflip_flwr.core.layout import Layout
    >>> base = {"w": np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)}
    >>> mask = Mask.from_bool(Layout.of(base), {"w": np.array([[True, False], [False, True]])})
    >>> Subspace(mask, base).unpack({"w": np.array([8.0, 9.0], np.float32)})["w"].tolist()
    [[8.0, 2.0], [3.0, 9.0]]
    """

    mask: Mask
    base: Arrays | None = None

    def pack(self, full: Mapping[str, NDArray[np.generic]]) -> Arrays:
        """Return the kept values of full arrays (:meth:`Mask.gather`)."""
        return self.mask.gather(full)

    def unpack(self, packed: Mapping[str, NDArray[np.generic]]) -> Arrays:
        """Return full arrays in the dtypes of ``packed``, with the base's values at pruned entries."""
        if self.base is None:
            return self.mask.scatter(packed)
        # arrays that are never pruned are taken from `packed`
        return self.mask.scatter(packed, into={**packed, **{name: self.base[name] for name in self.mask.keep}})

    def project(self, full: Mapping[str, NDArray[np.generic]]) -> Arrays:
        """Return copies of full arrays with the base's values at pruned entries; never-pruned arrays are not copied."""
        return self.unpack(self.pack(full))
