"""Mask of a model: an immutable record of which entries are kept (NumPy only)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.core.layout import Arrays, Layout, split


def unpack_bits(bits: bytes, count: int) -> NDArray[np.bool_]:
    """Unpack bits to boolean flags of shape ``(count,)``, most significant bit of a byte first."""
    return np.unpackbits(np.frombuffer(bits, np.uint8), count=count).view(bool)


def check_unused(bits: bytes, count: int) -> None:
    """Raise ``ValueError`` unless the bits of the last byte beyond ``count`` are 0."""
    if count % 8 and bits[-1] & (0xFF >> count % 8):
        raise ValueError("unused bits of the mask's last byte are set")


@dataclass(frozen=True)
class Mask:
    """The kept entries of a model.

    Parameters
    ----------
    layout : Layout
        The model's arrays.
    bits : bytes
        One bit per prunable entry, in the layout's order, most significant bit first; 1 = kept. Unused bits of the last
        byte are 0.
    version : int
        Number of the mask within a run. It does not enter ``digest``.

    Raises
    ------
    ValueError
        If ``bits`` has the wrong length or sets unused bits.

    Examples
    --------
    >>> layout = Layout.of({"w": np.zeros((2, 2), np.float32), "b": np.zeros(2, np.float32)})
    >>> mask = Mask.from_bool(layout, {"w": np.array([[True, False], [False, True]])})
    >>> packed = mask.gather({"w": np.array([[1, 2], [3, 4]], np.float32), "b": np.ones(2, np.float32)})
    >>> packed["w"].tolist(), mask.scatter(packed)["w"].tolist(), mask.density
    ([1.0, 4.0], [[1.0, 0.0], [0.0, 4.0]], 0.5)
    """

    layout: Layout
    bits: bytes
    version: int = 0

    def __post_init__(self) -> None:
        count = self.layout.prunable_size
        if len(self.bits) != (count + 7) // 8:
            raise ValueError(f"{len(self.bits)} mask bytes for {count} prunable entries, expected {(count + 7) // 8}")
        check_unused(self.bits, count)

    @classmethod
    def from_bool(cls, layout: Layout, keep: Mapping[str, NDArray[np.bool_]], version: int = 0) -> Mask:
        """Make a mask from boolean arrays (``True`` = kept), one per prunable array, in its shape."""
        for spec in layout.prunable:
            if spec.name not in keep or keep[spec.name].shape != spec.shape:
                raise ValueError(f"the mask of {spec.name!r} must be there and have shape {spec.shape}")
        flat = [np.asarray(keep[spec.name], dtype=bool).reshape(-1) for spec in layout.prunable]
        return cls(layout, np.packbits(np.concatenate(flat)).tobytes() if flat else b"", version)

    @classmethod
    def full(cls, layout: Layout, version: int = 0) -> Mask:
        """Make a mask that keeps everything."""
        return cls(layout, np.packbits(np.ones(layout.prunable_size, dtype=bool)).tobytes(), version)

    @cached_property
    def keep(self) -> dict[str, NDArray[np.bool_]]:
        """Boolean arrays in the shapes of the prunable arrays; read-only."""
        flat = unpack_bits(self.bits, self.layout.prunable_size)
        flat.flags.writeable = False
        return split(flat, {spec.name: spec.shape for spec in self.layout.prunable})

    @cached_property
    def indices(self) -> dict[str, NDArray[np.intp]]:
        """Flat indices of the kept entries of each prunable array, ascending."""
        indices = {name: np.flatnonzero(keep) for name, keep in self.keep.items()}
        for index in indices.values():
            index.flags.writeable = False
        return indices

    @cached_property
    def kept(self) -> int:
        """Number of kept prunable entries."""
        return sum(self.kept_by_name.values())

    @cached_property
    def kept_by_name(self) -> dict[str, int]:
        """Number of kept entries of each prunable array."""
        return {name: int(np.count_nonzero(keep)) for name, keep in self.keep.items()}

    @property
    def is_full(self) -> bool:
        """Whether nothing is pruned."""
        return self.kept == self.layout.prunable_size

    @property
    def density(self) -> float:
        """Kept / prunable entries (1 where nothing is prunable)."""
        return self.kept / self.layout.prunable_size if self.layout.prunable_size else 1.0

    @property
    def density_all(self) -> float:
        """Share of all entries of the model that are kept; entries that are never pruned count as kept."""
        return 1.0 - (self.layout.prunable_size - self.kept) / self.layout.size if self.layout.size else 1.0

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the layout and the bits; identifies the mask on the wire."""
        specs = [[s.name, list(s.shape), s.dtype, s.prunable] for s in self.layout.specs]
        return hashlib.sha256(json.dumps(specs).encode() + b"\0" + self.bits).hexdigest()

    def packed_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of an array when packed: ``(kept,)`` if it is prunable, else its own shape."""
        spec = self.layout[name]
        return (self.kept_by_name[name],) if spec.prunable else spec.shape

    def gather(self, arrays: Mapping[str, NDArray[np.generic]]) -> Arrays:
        """Pack a model: prunable arrays become 1-D arrays of their kept values, others are unchanged.

        Dtypes are preserved. The result is in the layout's order, whatever the order of ``arrays``.

        Raises
        ------
        ValueError
            If names or shapes are not the layout's.
        """
        self.layout.check(arrays)
        return {
            spec.name: arrays[spec.name].reshape(-1)[self.indices[spec.name]] if spec.prunable else arrays[spec.name]
            for spec in self.layout.specs
        }

    def scatter(
        self, packed: Mapping[str, NDArray[np.generic]], into: Mapping[str, NDArray[np.generic]] | None = None
    ) -> Arrays:
        """Unpack to full arrays, in the dtypes of ``packed``; pruned entries are 0, or taken from ``into``.

        Raises
        ------
        ValueError
            If names or shapes are not those that ``gather`` returns.
        """
        if into is not None:
            self.layout.check(into)
        if extra := [name for name in packed if name not in self.layout]:
            raise ValueError(f"unexpected packed arrays {extra[:5]}")
        full: Arrays = {}
        for spec in self.layout.specs:
            if spec.name not in packed or packed[spec.name].shape != self.packed_shape(spec.name):
                raise ValueError(f"packed array {spec.name!r} must have shape {self.packed_shape(spec.name)}")
            values = packed[spec.name]
            if not spec.prunable:
                full[spec.name] = values
                continue
            base = (
                np.zeros(spec.shape, values.dtype)
                if into is None
                else np.array(into[spec.name], values.dtype, order="C")
            )
            base.reshape(-1)[self.indices[spec.name]] = values
            full[spec.name] = base
        return full

    def apply(self, arrays: Mapping[str, NDArray[np.generic]]) -> Arrays:
        """Return copies of full arrays with pruned entries set to 0; never-pruned arrays are not copied."""
        return self.scatter(self.gather(arrays))
