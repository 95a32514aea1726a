"""The layout of a model: its arrays in order, and which of them may be pruned entry by entry."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[np.generic]]
Rule = str | Sequence[str] | Callable[[str, tuple[int, ...]], bool]
"""Chooses arrays: shell-style patterns of names (``"encoder.*.weight"``), or a function of name and shape."""

AUTO = "auto"


@dataclass(frozen=True)
class ArraySpec:
    """One array of a model: its name, shape, NumPy dtype name and whether single entries of it may be pruned."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    prunable: bool

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def floating(self) -> bool:
        """Whether it holds floating-point numbers (only those are averaged and pruned)."""
        return np.dtype(self.dtype).kind == "f"


@dataclass(frozen=True)
class Layout:
    """The arrays of a model, in the model's order.

    Parameters
    ----------
    specs : tuple[ArraySpec, ...]
        The arrays.
    output : str | None
        Name of the output layer's weight. Each of its units (entries of axis 0) keeps at least one incoming weight.
        ``None``: no such floor.
    """

    specs: tuple[ArraySpec, ...]
    output: str | None = None

    def __post_init__(self) -> None:
        names = [spec.name for spec in self.specs]
        if len(set(names)) != len(names):
            raise ValueError("array names must differ")
        if self.output is not None and (
            self.output not in names or not self[self.output].prunable or not self[self.output].shape
        ):
            raise ValueError(f"output = {self.output!r}: must be one of the prunable arrays {self.prunable_names}")

    @classmethod
    def of(
        cls,
        arrays: Mapping[str, NDArray[np.generic]],
        *,
        prunable: Rule | None = None,
        exclude: Rule | None = None,
        biases: bool = False,
        output: str | None = AUTO,
    ) -> Layout:
        """Describe a model given by its arrays.

        Parameters
        ----------
        arrays : Mapping[str, ndarray]
            Name -> array, in the model's order.
        prunable : str | Sequence[str] | Callable[[str, tuple[int, ...]], bool] | None
            Which floating arrays are pruned entry by entry: patterns of names, or a function of name and shape.
            Default: those with two or more dimensions, and biases if ``biases``.
        exclude : the same, or None
            Which of them are not.
        biases : bool
            Prune 1-D arrays named ``*bias*`` that stand beside an array of the same prefix with two or more dimensions
            (the authors' code does; normalisation layers are never meant).
        output : str | None
            The output layer's weight; ``"auto"`` is the last prunable array with two or more dimensions.

        Raises
        ------
        ValueError
            If an array is neither a number nor a bool, a pattern matches no array, or ``output`` names no prunable one.
        """
        names = list(arrays)
        chosen = None if prunable is None else _predicate(prunable, "prunable", names)
        spared = None if exclude is None else _predicate(exclude, "exclude", names)
        specs = []
        for name, array in arrays.items():
            if array.dtype.kind not in "fiub":
                raise ValueError(
                    f"array {name!r} has dtype {array.dtype}: only float, integer and bool arrays can travel"
                )
            shape = tuple(array.shape)
            pruned = chosen(name, shape) if chosen else _default_prunable(name, shape, arrays, biases)
            pruned = pruned and array.dtype.kind == "f" and array.size > 0 and not (spared and spared(name, shape))
            specs.append(ArraySpec(name, shape, array.dtype.name, bool(pruned)))
        if output == AUTO:
            weights = [spec.name for spec in specs if spec.prunable and len(spec.shape) >= 2]
            output = weights[-1] if weights else None
        return cls(tuple(specs), output)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> ArraySpec:
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, ArraySpec]:
        return {spec.name: spec for spec in self.specs}

    @cached_property
    def prunable(self) -> tuple[ArraySpec, ...]:
        """The prunable arrays, in order."""
        return tuple(spec for spec in self.specs if spec.prunable)

    @cached_property
    def by_dtype(self) -> dict[str, list[ArraySpec]]:
        """The arrays of each dtype in the order of its flat vector on the wire: those that are pruned first."""
        specs: dict[str, list[ArraySpec]] = {}
        for spec in sorted(self.specs, key=lambda spec: not spec.prunable):
            specs.setdefault(spec.dtype, []).append(spec)
        return specs

    @property
    def prunable_names(self) -> list[str]:
        """Names of the prunable arrays, in order."""
        return [spec.name for spec in self.prunable]

    @cached_property
    def prunable_size(self) -> int:
        """Number of prunable entries, the ``n`` that the sparsity refers to."""
        return sum(spec.size for spec in self.prunable)

    @cached_property
    def size(self) -> int:
        """Number of entries of all arrays."""
        return sum(spec.size for spec in self.specs)

    def cast(self, arrays: Mapping[str, NDArray[np.generic]]) -> Arrays:
        """Floating arrays in the model's dtypes, where they are the model's; others as they are."""
        return {
            name: array.astype(self[name].dtype, copy=False)
            if name in self and self[name].floating and array.dtype.kind == "f"
            else np.asarray(array)
            for name, array in arrays.items()
        }

    def is_finite(self, arrays: Mapping[str, NDArray[np.generic]]) -> bool:
        """Whether the floating arrays hold neither NaN nor infinity in the model's dtypes."""
        with np.errstate(over="ignore"):
            cast = self.cast(arrays).values()
        return all(bool(np.isfinite(array).all()) for array in cast if array.dtype.kind == "f")

    def check(self, arrays: Mapping[str, NDArray[np.generic]]) -> None:
        """Raise ``ValueError``, naming the array, unless ``arrays`` have these names and shapes, and real numbers."""
        missing = [spec.name for spec in self.specs if spec.name not in arrays]
        extra = [name for name in arrays if name not in self]
        if missing or extra:
            raise ValueError(f"the model's arrays do not match: missing {missing[:5]}, unexpected {extra[:5]}")
        for spec in self.specs:
            if tuple(arrays[spec.name].shape) != spec.shape:
                raise ValueError(
                    f"array {spec.name!r} has shape {tuple(arrays[spec.name].shape)}, expected {spec.shape}"
                )
            if arrays[spec.name].dtype.kind not in "fiub":
                raise ValueError(f"array {spec.name!r} has dtype {arrays[spec.name].dtype}, expected {spec.dtype}")


def _predicate(rule: Rule, parameter: str, names: Sequence[str]) -> Callable[[str, tuple[int, ...]], bool]:
    if callable(rule):
        return rule
    patterns = [rule] if isinstance(rule, str) else list(rule)
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            raise ValueError(f"{parameter}: {pattern!r} matches none of the model's arrays {names[:10]}")
    return lambda name, _: any(_matches(name, pattern) for pattern in patterns)


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)  # a name may hold what is special in a pattern


def _default_prunable(
    name: str, shape: tuple[int, ...], arrays: Mapping[str, NDArray[np.generic]], biases: bool
) -> bool:
    if len(shape) >= 2:
        return True
    if not biases or len(shape) != 1 or "bias" not in _leaf(name).lower():
        return False
    return any(other.ndim >= 2 and _prefix(key) == _prefix(name) for key, other in arrays.items())


def _prefix(name: str) -> str:
    return name.replace("/", ".").rpartition(".")[0]


def _leaf(name: str) -> str:
    return name.replace("/", ".").rpartition(".")[2]
