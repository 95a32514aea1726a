"""Your own data: a folder of `.npy` arrays, of one `.npz` for each client, or a function that returns arrays."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.experiment.data.dataset import Arrays, Data, Inputs, data_of
from autoflip_flwr.experiment.data.files import ABOUT, TEST_FILE, Found
from autoflip_flwr.experiment.data.reading import plain_array, plain_arrays, read_json
from autoflip_flwr.experiment.data.statistics import channel_statistics, pixel_statistics
from autoflip_flwr.experiment.data.stored import stored
from autoflip_flwr.experiment.imported import find, in_words
from autoflip_flwr.experiment.rules import ConfigError

_ARRAYS = ("x_train", "y_train", "x_test", "y_test", "owner_train")
_FACTS = ("classes", "mean", "std")


def own(found: Found) -> Data:
    """Read a folder of arrays, or of one `.npz` for each client."""
    facts = _about(found.folder / ABOUT) if found.files[-1].name == ABOUT else {}
    if found.form == "arrays":
        mapped = {path.stem: plain_array(path) for path in found.files if path.suffix == ".npy"}
        where, suffix = f"{found.folder}{os.sep}", ".npy"
        if "x_test" in mapped and "y_test" not in mapped:
            raise ConfigError(f"{where}y_test.npy: missing, and x_test.npy is there")
        arrays = _whole(mapped)
        inputs = _kind(arrays, where, suffix)
        statistics = stored("own", found.files, partial(_statistics, arrays, inputs, where, suffix))
    else:
        where, suffix = f"{found.folder}: ", ""
        arrays = stored("own", found.files, partial(_with_statistics, found))
        statistics, inputs = arrays, _kind(arrays, where, suffix)
    return _data("own", arrays, inputs, statistics, facts, where, suffix)


def called(dataset: str, data_dir: str) -> Data:
    """Call `module:callable` with the keyword `data_dir`. It returns the arrays by name, and facts as in `about.json`.

    The arrays may be memory-mapped. They are checked, but not stored.
    """
    where = f"dataset = {dataset!r}: "
    function = find("dataset", dataset)
    try:
        # by keyword, which functions that were not written for this refuse
        result = function(data_dir=data_dir)
    except Exception as error:  # whatever the user's function raises
        raise ConfigError(f"{where}called with data_dir={data_dir!r}, it failed: {in_words(error)}") from error
    if not isinstance(result, Mapping) or not {"x_train", "y_train"} <= result.keys() <= {*_ARRAYS, *_FACTS}:
        raise ConfigError(f"{where}expected a dict with x_train, y_train and some of {', '.join(_ARRAYS[2:] + _FACTS)}")
    mapped = {each: np.asarray(result[each]) for each in _ARRAYS if each in result}
    if ("x_test" in mapped) != ("y_test" in mapped):
        raise ConfigError(f"{where}expected both of x_test and y_test, or none")
    arrays = _whole(mapped)
    inputs = _kind(arrays, where, "")
    facts = _checked({each: result[each] for each in _FACTS if each in result}, where)
    statistics = _statistics(arrays, inputs, where, "")
    return _data(dataset, arrays, inputs, statistics, facts, where, "")


def _data(
    name: str, arrays: Arrays, inputs: Inputs, statistics: Arrays, facts: Mapping[str, Any], where: str, suffix: str
) -> Data:
    labels = [y for y in (arrays["y_train"], arrays["y_test"]) if y.size and y.dtype.kind in "iu"]
    least, most = statistics["range"].tolist() if inputs.kind == "text" else (0, 0)
    classes = facts.get("classes") or max(most + 1, *(int(y.max()) + 1 for y in labels), 1)
    if least < 0 or most >= classes:
        raise ConfigError(
            f"{where}x_train{suffix}: expected integers within 0 and {classes - 1}, since the classes are the "
            f"vocabulary too, found {least} to {most}"
        )
    if inputs.kind != "text":
        channels = inputs.shape[0]
        mean, std = (tuple(facts.get(each) or statistics[each].tolist()) for each in ("mean", "std"))
        if not len(mean) == len(std) == channels:
            raise ConfigError(f"{where}mean and std: expected {channels} numbers each, one for each channel")
        inputs = inputs._replace(mean=mean, std=std)
    shaped = dict(arrays)
    if inputs.kind == "image":
        shaped |= {each: arrays[each].reshape(*arrays[each].shape[:3], -1) for each in ("x_train", "x_test")}
    return data_of(name, shaped, inputs, classes, where, suffix)


def _whole(arrays: Arrays) -> Arrays:
    """Return the arrays with empty ones for a test set that is not there."""
    empty = {"x_test": arrays["x_train"][:0], "y_test": arrays["y_train"][:0]}
    return empty | dict(arrays)


def _kind(arrays: Arrays, where: str, suffix: str) -> Inputs:
    """Return what the inputs are, by their dtype and shape."""
    x, x_test = arrays["x_train"], arrays["x_test"]
    if x.dtype == np.uint8 and (x.ndim == 3 or (x.ndim == 4 and x.shape[3] <= 4)):
        inputs = Inputs("image", (x.shape[3] if x.ndim == 4 else 1, *x.shape[1:3]))
    elif x.dtype in (np.float16, np.float32, np.float64) and x.ndim >= 2:
        inputs = Inputs("signal", x.shape[1:])
    elif x.dtype in (np.int16, np.int32, np.int64) and x.ndim == 2:
        inputs = Inputs("text", x.shape[1:])
    else:
        inputs = Inputs("", ())
    if not inputs.kind or not len(x) or 0 in inputs.shape:
        raise ConfigError(
            f"{where}x_train{suffix}: expected images, uint8 (N, H, W) or (N, H, W, C) with C up to 4; signals or "
            f"features, float (N, C, ...); or text, int16 to int64 (N, T); found {x.dtype} {x.shape}"
        )
    if (x_test.dtype, x_test.shape[1:]) != (x.dtype, x.shape[1:]):
        raise ConfigError(
            f"{where}x_test{suffix}: expected {x.dtype} (N, {', '.join(map(str, x.shape[1:]))}), as in training, found "
            f"{x_test.dtype} {x_test.shape}"
        )
    return inputs


def _statistics(arrays: Arrays, inputs: Inputs, where: str, suffix: str) -> Arrays:
    """Return mean and std of the training data, or the range of all text."""
    x = arrays["x_train"]
    if inputs.kind == "text":
        texts = [each for each in (x, arrays["x_test"]) if each.size]
        return {"range": np.array([min(each.min() for each in texts), max(each.max() for each in texts)], np.int64)}
    if inputs.kind == "image":
        mean, std = pixel_statistics(x.reshape(*x.shape[:3], -1))
    else:
        mean, std = channel_statistics(x, f"{where}x_train{suffix}")
    return {"mean": mean, "std": std}


def _with_statistics(found: Found) -> Arrays:
    arrays = _clients(found)
    where = f"{found.folder}: "
    return {**arrays, **_statistics(arrays, _kind(arrays, where, ""), where, "")}


def _clients(found: Found) -> Arrays:
    """Join the clients' files, in the order of their names; each is an owner. `test.npz` holds test examples alone."""
    pieces: dict[str, list[NDArray[Any]]] = {name: [] for name in _ARRAYS}
    first: Path | None = None
    for path in found.files:
        if path.name == ABOUT:
            continue
        mine = plain_arrays(path)
        names = {"x": "x_test", "y": "y_test"} if path.name == TEST_FILE else {"x": "x_train", "y": "y_train"}
        names |= {"x_test": "x_test", "y_test": "y_test"}
        if not {"x", "y"} <= mine.keys() <= names.keys() or ("x_test" in mine) != ("y_test" in mine):
            raise ConfigError(f"{path}: expected arrays x, y and both or none of x_test, y_test; found {sorted(mine)}")
        for name, array in mine.items():
            like = pieces[names[name]][0] if pieces[names[name]] else array
            if (array.dtype, array.shape[1:]) != (like.dtype, like.shape[1:]) or not array.ndim:
                raise ConfigError(
                    f"{path}: expected {like.dtype} (N, ...) of the shape {like.shape[1:]} in {name}, as in {first}, "
                    f"found {array.dtype} {array.shape}"
                )
            pieces[names[name]].append(array)
        for x, y in (("x", "y"), ("x_test", "y_test")):
            if x in mine and len(mine[x]) != len(mine[y]):
                raise ConfigError(f"{path}: expected as many in {y} as in {x}, found {len(mine[y])} and {len(mine[x])}")
        if path.name != TEST_FILE:
            pieces["owner_train"].append(np.full(len(mine["x"]), len(pieces["owner_train"])))
        first = first or path
    return _whole({name: np.concatenate(each) for name, each in pieces.items() if each})


def _about(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict) or not content.keys() <= {*_FACTS}:
        raise ConfigError(f"{path}: expected a json object with some of {', '.join(_FACTS)}")
    return _checked(content, f"{path}: ")


def _checked(facts: Mapping[str, Any], where: str) -> dict[str, Any]:
    classes = facts.get("classes", 1)
    if type(classes) is not int or classes < 1:
        raise ConfigError(f"{where}classes: expected an integer >= 1, found {classes!r}")
    if ("mean" in facts) != ("std" in facts):
        raise ConfigError(f"{where}expected both of mean and std, or none")
    for name in {"mean", "std"} & facts.keys():
        numbers = facts[name] if isinstance(facts[name], list | tuple) else [None]
        if not all(isinstance(each, int | float) and math.isfinite(each) for each in numbers):
            raise ConfigError(f"{where}{name}: expected a list of finite numbers")
        if name == "std" and min(numbers, default=1) <= 0:
            raise ConfigError(f"{where}std: expected numbers above 0")
    return dict(facts)
