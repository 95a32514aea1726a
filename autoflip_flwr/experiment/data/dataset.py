"""A data set: arrays of raw examples, and how they become what models take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.experiment.rules import ConfigError

Arrays = Mapping[str, NDArray[Any]]


class Inputs(NamedTuple):
    """How raw examples become what a model takes.

    Attributes
    ----------
    kind : str
        `image`: uint8 (N, H, W, C) becomes float32 (n, C, h, w) in units of `std`. `signal`: float (N, C, ...)
        becomes float32 of the same shape in units of `std`. `text`: integers (N, T) become int64 (n, T).
    shape : tuple of int
        Shape of one example as the model takes it. Images larger than (C, h, w) are cropped.
    mean, std : tuple of float
        One for each of the C channels, for images of pixels scaled to [0, 1]. Empty: values stay as they are.
    augment : str
        How images are augmented in training.
    """

    kind: str
    shape: tuple[int, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    augment: str = "none"


@dataclass(frozen=True, eq=False)
class Data:
    """One data set, read-only and shared by everything in the process.

    `x_train`, `x_test`: raw inputs (N, ...), memory-mapped where they come from files.
    `y_train`, `y_test`: int64 (N,), in [0, classes). A node's own data may have no test examples.
    `owners`: int64 (N,), 0 to owners - 1, the natural client of each training example; None if not known.
    """

    name: str
    x_train: NDArray[Any]
    y_train: NDArray[np.int64]
    x_test: NDArray[Any]
    y_test: NDArray[np.int64]
    classes: int
    inputs: Inputs
    owners: NDArray[np.int64] | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example as models take it."""
        return self.inputs.shape


def data_of(
    name: str,
    arrays: Arrays,
    inputs: Inputs,
    classes: int,
    where: str,
    suffix: str = "",
) -> Data:
    """Check labels and owners, and return the data set.

    Parameters
    ----------
    name : str
        Of the data set.
    arrays : Mapping
        `x_train`, `y_train`, `x_test`, `y_test`, and `owner_train` where it is known. The inputs are checked already.
    inputs : Inputs
        What the inputs are.
    classes : int
        How many there are.
    where, suffix : str
        `where` + name + `suffix` names an array in an error.

    Raises
    ------
    ConfigError
        If labels or owners do not fit.
    """
    labels: dict[str, NDArray[np.int64]] = {}
    for part in ("train", "test"):
        x, y, found = arrays[f"x_{part}"], arrays[f"y_{part}"], f"{where}y_{part}{suffix}"
        if y.dtype.kind not in "iu" or y.shape != (len(x),):
            raise ConfigError(f"{found}: expected integers ({len(x)},), one per example, found {y.dtype} {y.shape}")
        if len(y) and (y.min() < 0 or y.max() >= classes):
            raise ConfigError(f"{found}: expected labels 0 to {classes - 1}, found {y.min()} to {y.max()}")
        labels[part] = np.array(y, np.int64)
    owners = arrays.get("owner_train")
    if owners is not None:
        if owners.dtype.kind not in "iuU" or owners.shape != labels["train"].shape:
            raise ConfigError(
                f"{where}owner_train{suffix}: expected integers or strings ({len(labels['train'])},), the client of "
                f"each training example, found {owners.dtype} {owners.shape}"
            )
        owners = np.unique(owners, return_inverse=True)[1].astype(np.int64)
    for array in (arrays["x_train"], arrays["x_test"], labels["train"], labels["test"], owners):
        if array is not None:
            array.flags.writeable = False
    return Data(name, arrays["x_train"], labels["train"], arrays["x_test"], labels["test"], classes, inputs, owners)
