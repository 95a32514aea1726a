"""UCI HAR: windows of 128 samples of 9 motion signals, 6 activities, 30 people.

Source: D. Anguita et al., "A Public Domain Dataset for Human Activity Recognition Using Smartphones", ESANN 2013.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.experiment.data.dataset import Arrays, Data, Inputs, data_of
from autoflip_flwr.experiment.data.files import HAR_ARRAYS, UCI_SIGNALS, Found
from autoflip_flwr.experiment.data.reading import one_line, plain_array
from autoflip_flwr.experiment.data.statistics import channel_statistics
from autoflip_flwr.experiment.data.stored import stored
from autoflip_flwr.experiment.rules import ConfigError

CLASSES = 6
SHAPE = (len(UCI_SIGNALS), 128)


def har(found: Found) -> Data:
    """Read HAR from `x`, `y`, `subject` and `test` as `.npy`, or from UCI's own text files.

    Of the arrays, `test` says which examples are for testing. UCI's files have their own split: 21 people train, and 9
    others test.
    """
    make = _from_arrays if found.form == "windows" else _from_text
    arrays = stored("har", found.files, partial(make, found))
    inputs = Inputs("signal", SHAPE, tuple(arrays["mean"].tolist()), tuple(arrays["std"].tolist()))
    return data_of("har", arrays, inputs, CLASSES, f"{found.folder}: ")


def _from_arrays(found: Found) -> Arrays:
    x, y, subject, test = (plain_array(path) for path in found.files)
    paths = dict(zip(HAR_ARRAYS, found.files, strict=True))
    if x.dtype.kind != "f" or x.shape[1:] != SHAPE or not len(x):
        raise ConfigError(f"{paths['x']}: expected float32 (N, 9, 128), found {x.dtype} {x.shape}")
    for name, array, kinds, wanted in (
        ("y", y, "iu", "integers"),
        ("subject", subject, "iu", "integers"),
        ("test", test, "b", "bool"),
    ):
        if array.dtype.kind not in kinds or array.shape != (len(x),):
            raise ConfigError(f"{paths[name]}: expected {wanted} ({len(x)},), found {array.dtype} {array.shape}")
    if test.all() or not test.any():
        raise ConfigError(f"{paths['test']}: expected true for some examples, those to test with, and false for others")
    x = np.asarray(x, np.float32)
    return _arrays(x[~test], y[~test], subject[~test], x[test], y[test], str(paths["x"]))


def _from_text(found: Found) -> Arrays:
    parts = {part: _part(found.folder / part, part) for part in ("train", "test")}
    (x, y, subject), (x_test, y_test, _) = parts["train"], parts["test"]
    return _arrays(x, y, subject, x_test, y_test, f"{found.folder / 'train' / 'Inertial Signals'}{os.sep}*.txt")


def _arrays(
    x: NDArray[Any], y: NDArray[Any], subject: NDArray[Any], x_test: NDArray[Any], y_test: NDArray[Any], found: str
) -> Arrays:
    mean, std = channel_statistics(x, found)
    arrays = {"x_train": x, "y_train": y, "owner_train": subject, "x_test": x_test, "y_test": y_test}
    return arrays | {"mean": mean, "std": std}


def _part(folder: Path, part: str) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    y, subject = (_table(folder / f"{name}_{part}.txt", 1)[:, 0] for name in ("y", "subject"))
    signals = []
    for name in UCI_SIGNALS:
        path = folder / "Inertial Signals" / f"{name}_{part}.txt"
        signals.append(_table(path, SHAPE[1]).astype(np.float32))
        if len(signals[-1]) != len(y):
            raise ConfigError(f"{path}: expected {len(y)} lines, as y_{part}.txt has, found {len(signals[-1])}")
    for name, column in (("y", y), ("subject", subject)):
        if len(column) != len(y) or (column != np.rint(column)).any() or (column < 1).any():
            raise ConfigError(f"{folder / f'{name}_{part}.txt'}: expected {len(y)} integers from 1 on")
    return np.stack(signals, 1), y.astype(np.int64) - 1, subject.astype(np.int64) - 1


def _table(path: Path, columns: int) -> NDArray[np.float64]:
    try:
        table = np.loadtxt(path, np.float64, ndmin=2)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected lines of {columns} numbers: {one_line(error)}") from error
    if table.shape[1] != columns or not len(table):
        raise ConfigError(f"{path}: expected lines of {columns} numbers, found {table.shape}")
    return table
