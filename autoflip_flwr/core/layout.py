"""Layout of a model: its arrays in order, and which of them may be pruned entry by entry."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.core.outputs import outputs_of, unit_axis
from autoflip_flwr.core.weights import biases_of, weights_of

Arrays = dict[str, NDArray[np.generic]]
Rule = str | Sequence[str] | Callable[[str, tuple[int, ...]], bool]
"""Choice of arrays: shell-style patterns of names (``"encoder.*.weight"``), or a function of name and shape."""

Output = str | Sequence[str] | Mapping[str, int]
"""Output layers: names or patterns of their weights, or a mapping of these to the axis of their units."""

AUTO = "auto"


def split(flat: NDArray[Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, NDArray[Any]]:
    """Split a flat vector into arrays of these shapes, in their order; they are views."""
    arrays, start = {}, 0
    for name, shape in shapes.items():
        stop = start + math.prod(shape)
        arrays[name] = flat[start:stop].reshape(shape)
        start = stop
    return arrays


@dataclass(frozen=True)
class ArraySpec:
    """One array of a model: its name, shape, NumPy dtype name and whether its entries may be pruned."""

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
        """Whether the array holds floating-point numbers (only those are averaged and pruned)."""
        return np.dtype(self.dtype).kind == "f"


@dataclass(frozen=True)
class Layout:
    """The arrays of a model, in the model's order.

    Parameters
    ----------
    specs : tuple[ArraySpec, ...]
        The arrays.
    output : dict[str, int]
        Name of each output layer's weight -> the axis of its units. Each unit keeps at least one incoming weight.
        ``None`` is replaced by an empty dict: no such floor.
    guesses : tuple[str, ...]
        Names in ``output`` that are guesses. They lose their floor where it would make the sparsity impossible.
    """

    specs: tuple[ArraySpec, ...]
    output: Mapping[str, int] = field(default_factory=dict, hash=False)
    guesses: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.output is None:
            object.__setattr__(self, "output", {})
        names = [spec.name for spec in self.specs]
        if len(set(names)) != len(names):
            raise ValueError("array names must differ")
        for name, axis in self.output.items():
            if name not in self or not self[name].prunable or not 0 <= axis < len(self[name].shape):
                raise ValueError(
                    f"output = {{{name!r}: {axis}}}: must be one of the prunable arrays {self.prunable_names}, an axis"
                )

    @classmethod
    def of(
        cls,
        arrays: Mapping[str, NDArray[np.generic]],
        *,
        prunable: Rule | None = None,
        exclude: Rule | None = None,
        biases: bool = False,
        output: Output | None = AUTO,
    ) -> Layout:
        """Make the layout of a model from its arrays.

        Parameters
        ----------
        arrays : Mapping[str, ndarray]
            Name -> array, in the model's order.
        prunable : str | Sequence[str] | Callable[[str, tuple[int, ...]], bool] | None
            Floating arrays that are pruned entry by entry: patterns of names, or a function of name and shape.
            Default: weights (:mod:`autoflip_flwr.core.weights`), and biases if ``biases``.
        exclude : the same, or None
            Exceptions from ``prunable``.
        biases : bool
            Whether to prune arrays named ``*bias*`` that belong to the same layer as a weight (as the authors' code
            does). Biases of normalisation layers are never pruned by this setting.
        output : str | Sequence[str] | Mapping[str, int] | None
            Weights of the output layers: names or patterns, or a mapping of these to the axis of their units. Negative
            axes count from the end (default: 0; the last axis of a ``kernel``). ``"auto"``: the weights that can be
            outputs (:mod:`autoflip_flwr.core.outputs`), the last prunable weight first. ``None``: none.

        Raises
        ------
        ValueError
            If an array holds neither numbers nor bools, a pattern matches no array, ``output`` names no prunable array,
            or an axis is out of range.
        """
        names = list(arrays)
        chosen = None if prunable is None else _predicate(prunable, "prunable", names)
        spared = None if exclude is None else _predicate(exclude, "exclude", names)
        shapes = {name: tuple(array.shape) for name, array in arrays.items()}
        weights = weights_of(shapes)
        default = weights | (biases_of(shapes) if biases else set())
        specs = []
        for name, array in arrays.items():
            if array.dtype.kind not in "fiub":
                raise ValueError(
                    f"array {name!r} has dtype {array.dtype}: only float, integer and bool arrays can travel"
                )
            shape = shapes[name]
            pruned = chosen(name, shape) if chosen else name in default
            pruned = pruned and array.dtype.kind == "f" and array.size > 0 and not (spared and spared(name, shape))
            specs.append(ArraySpec(name, shape, array.dtype.name, bool(pruned)))
        if output == AUTO:
            guess = outputs_of(shapes, [spec.name for spec in specs if spec.prunable and len(spec.shape) >= 2], weights)
            return cls(tuple(specs), guess, tuple(guess)[1:])
        return cls(tuple(specs), {} if output is None else _outputs(output, specs))

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
        """Arrays of each dtype, in the order of that dtype's flat vector on the wire: prunable arrays first."""
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
        """Number of prunable entries; the sparsity is a share of it."""
        return sum(spec.size for spec in self.prunable)

    @cached_property
    def size(self) -> int:
        """Number of entries of all arrays."""
        return sum(spec.size for spec in self.specs)

    def cast(self, arrays: Mapping[str, NDArray[np.generic]]) -> Arrays:
        """Return arrays with the model's floating arrays cast to the model's dtypes; others are unchanged."""
        return {
            name: array.astype(self[name].dtype, copy=False)
            if name in self and self[name].floating and array.dtype.kind == "f"
            else np.asarray(array)
            for name, array in arrays.items()
        }

    def is_finite(self, arrays: Mapping[str, NDArray[np.generic]]) -> bool:
        """Return whether the floating arrays hold neither NaN nor infinity after a cast to the model's dtypes."""
        with np.errstate(over="ignore"):
            cast = self.cast(arrays).values()
        return all(bool(np.isfinite(array).all()) for array in cast if array.dtype.kind == "f")

    def check(self, arrays: Mapping[str, NDArray[np.generic]]) -> None:
        """Raise ``ValueError``, naming the array, unless ``arrays`` have the layout's names and shapes, and numbers."""
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
    return name == pattern or fnmatchcase(name, pattern)  # a name may contain special characters of patterns


def _outputs(output: Output, specs: Sequence[ArraySpec]) -> dict[str, int]:
    """Map each array that the user's names and patterns match to the axis of its units."""
    wanted = output if isinstance(output, Mapping) else dict.fromkeys([output] if isinstance(output, str) else output)
    found: dict[str, int] = {}
    for pattern, axis in wanted.items():
        meant = [spec for spec in specs if spec.prunable and spec.shape and _matches(spec.name, pattern)]
        if not meant:
            names = [spec.name for spec in specs if spec.prunable]
            raise ValueError(f"output = {pattern!r}: must be one of the prunable arrays {names}, or a pattern of some")
        for spec in meant:
            where = unit_axis(spec.name, spec.shape) if axis is None else axis
            if type(where) is not int or not -len(spec.shape) <= where < len(spec.shape):
                raise ValueError(f"output = {{{pattern!r}: {where!r}}}: {spec.name!r} has {len(spec.shape)} axes")
            found[spec.name] = where % len(spec.shape)
    return found
