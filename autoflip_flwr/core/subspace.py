"""The subspace in which rounds run: the kept coordinates, and what stands at the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.core.layout import Arrays
from autoflip_flwr.core.mask import Mask


@dataclass(frozen=True, eq=False)
class Subspace:
    """The models that agree outside of a mask.

    Parameters
    ----------
    mask : Mask
        The kept coordinates.
    base : dict[str, ndarray] | None
        What stands outside the mask: full arrays by name, of which only the pruned entries of prunable arrays matter.
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
        """Return full arrays of kept values, in their dtypes, with the base outside the mask."""
        if self.base is None:
            return self.mask.scatter(packed)
        # what is never pruned comes with the kept values
        return self.mask.scatter(packed, into={**packed, **{name: self.base[name] for name in self.mask.keep}})

    def project(self, full: Mapping[str, NDArray[np.generic]]) -> Arrays:
        """Return full arrays with the base outside the mask (copies; never-pruned arrays are taken as they are)."""
        return self.unpack(self.pack(full))
