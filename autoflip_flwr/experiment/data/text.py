"""Shakespeare: 80 characters of a speaker's text, and the next one. The vocabulary and the windows are LEAF's.

Source: S. Caldas et al., "LEAF: A Benchmark for Federated Settings", 2018, and its published code.
"""

from __future__ import annotations

import re
from functools import partial

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.experiment.data.dataset import Arrays, Data, Inputs, data_of
from autoflip_flwr.experiment.data.files import Found
from autoflip_flwr.experiment.data.reading import one_line, read_json
from autoflip_flwr.experiment.data.stored import stored
from autoflip_flwr.experiment.rules import ConfigError

LETTERS = "\n !\"&'(),-.0123456789:;>?ABCDEFGHIJKLMNOPQRSTUVWXYZ[]abcdefghijklmnopqrstuvwxyz}"
"""LEAF's vocabulary of 80 characters. Any other counts as a space (our reading)."""

WINDOW = 80
TRAINING_SHARE = 0.9
"""Share of a speaker's windows, in the order of the text, to train with. The last ones, but for those that overlap with
these, are the test set."""

LEAST_TEXT = 1000
"""Fewest characters of a speaker's text. Speakers with less are left out."""

_CODES = np.full(128, LETTERS.index(" "), np.uint8)
_CODES[[ord(letter) for letter in LETTERS]] = np.arange(len(LETTERS))


def encode(text: str) -> NDArray[np.uint8]:
    """Return the positions of a text's characters in `LETTERS`, uint8 (len(text),)."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    return _CODES[np.where(points < len(_CODES), points, ord(" "))]


def windows(text: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8], int, int]:
    """Cut a speaker's text into windows, as LEAF does.

    Line ends are spaces, and several spaces one.

    Returns
    -------
    tuple
        uint8 (n, 80), every 80 characters; uint8 (n,), the character after each; the number of windows to train with;
        the index of the first to test with.
    """
    codes = encode(re.sub("   *", " ", text.replace("\n", " ")))
    count = max(len(codes) - WINDOW, 0)
    every = np.zeros((0, WINDOW), np.uint8)
    if count:
        every = np.lib.stride_tricks.sliding_window_view(codes, WINDOW)[:count]
    train = int(TRAINING_SHARE * count)
    return every, codes[WINDOW:], train, min(train + WINDOW - 1, count)


def spoken(found: Found) -> Data:
    """Return Shakespeare from the text of each speaker: LEAF's `leaf_speakers.json`, or a file of plays."""
    (path,) = found.files
    arrays = stored("shakespeare", found.files, partial(_by_speaker, found))
    return text_data(arrays, f"{path}: ")


def text_data(arrays: Arrays, where: str) -> Data:
    """Return windows of text as a data set; `where` + name names an array in an error."""
    return data_of("shakespeare", arrays, Inputs("text", (WINDOW,)), len(LETTERS), where)


def _by_speaker(found: Found) -> Arrays:
    (path,) = found.files
    texts = _plays(found) if found.form == "plays" else _speakers(found)
    pieces: dict[str, list[NDArray[np.uint8]]] = {f"{name}_{part}": [] for part in ("train", "test") for name in "xy"}
    owners: list[NDArray[np.int64]] = []
    for text in texts.values():
        if len(text) < LEAST_TEXT:
            continue
        x, y, train, test = windows(text)
        if train:
            for part, rows in (("train", slice(train)), ("test", slice(test, None))):
                pieces[f"x_{part}"].append(x[rows])
                pieces[f"y_{part}"].append(y[rows])
            owners.append(np.full(train, len(owners)))
    if not owners:
        raise ConfigError(f"{path}: expected speakers with {LEAST_TEXT} or more characters, found none")
    return {"owner_train": np.concatenate(owners)} | {name: np.concatenate(each) for name, each in pieces.items()}


def _speakers(found: Found) -> dict[str, str]:
    (path,) = found.files
    content = read_json(path)
    if not isinstance(content, dict) or not all(
        isinstance(each, dict) and isinstance(each.get("text"), str) for each in content.values()
    ):
        raise ConfigError(f'{path}: expected a json object, speaker -> {{"play": ..., "text": ...}}')
    return {speaker: each["text"] for speaker, each in content.items()}


def _plays(found: Found) -> dict[str, str]:
    """Join the speeches of each speaker. Blank lines separate speeches, which begin with a line `Name:`."""
    (path,) = found.files
    try:
        text = path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected plain text: {one_line(error)}") from error
    speeches: dict[str, list[str]] = {}
    for speech in re.split(r"\n\s*\n", text):
        name, colon, words = speech.strip().partition(":\n")
        if colon and "\n" not in name:
            speeches.setdefault(name, []).append(words)
    return {name: "\n".join(each) for name, each in speeches.items()}
