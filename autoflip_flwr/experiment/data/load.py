"""Load a data set as the settings say, and do beforehand what a machine does once."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.data.dataset import Data
from autoflip_flwr.experiment.data.files import Found, check_name, find, store_of
from autoflip_flwr.experiment.data.partition import partition_by
from autoflip_flwr.experiment.imported import check_module
from autoflip_flwr.experiment.rules import ConfigError


def load(dataset: str, data_dir: str = "") -> Data:
    """Load a data set, once per process.

    Parameters
    ----------
    dataset : str
        A name from `DATASETS`, or `module:callable`.
    data_dir : str ("")
        Folder to search, never written to; see `docs/data.md` for the files. Empty: torchvision's sets are downloaded,
        once. `digits` needs none.

    Returns
    -------
    Data
        What has to be unpacked, downloaded or converted comes from the cache folder, memory-mapped.

    Raises
    ------
    ConfigError
        For an unknown data set, files missing, damaged or of another shape, or no network for a download.
    """
    return _load(dataset, "" if dataset == "digits" or not data_dir else str(Path(data_dir).expanduser().absolute()))


def load_for(config: Config, data_dir: str | None = None) -> Data:
    """Load the data set of a run: with inputs of its `input-size`, and augmented in training as it says.

    Parameters
    ----------
    config : Config
        The settings.
    data_dir : str | None
        A node's own folder; `None` for that of the settings.
    """
    where = config.resolved_data_dir if data_dir is None else data_dir
    data = load(config.dataset, where)
    return _adapted(data, config.input_size, config.augment) if config.input_size or config.augment != "none" else data


def prepare(config: Config) -> None:
    """Do what is done once per machine (download, unpack, convert), and check the data and their split.

    Call it before workers start, which then only map files.

    Raises
    ------
    ConfigError
        If the data set cannot be loaded, has no test examples, or cannot be split between `nodes` nodes.
    """
    data = load_for(config)
    if not len(data.y_test):
        raise ConfigError(f"dataset = {config.dataset!r}: the server's data have no test examples: add x_test, y_test")
    if config.nodes:
        partition_by(config, data, config.nodes)


def check_data(config: Config) -> Found | None:
    """Find the data set; read it where that takes a moment and no PyTorch. Return where it was found.

    Raises
    ------
    ConfigError
        If it is not there, or is malformed.
    """
    check_name(config.dataset)
    if ":" in config.dataset:
        check_module("dataset", config.dataset)
    if config.dataset == "digits" or ":" in config.dataset:
        return None
    found = find(config.dataset, config.resolved_data_dir)
    ready = found.form in ("download", "originals") and store_of(config.dataset).is_dir()
    if ready or found.form in ("npy", "arrays"):
        load_for(config)
    return found


@lru_cache(maxsize=4)
def _load(dataset: str, data_dir: str) -> Data:
    # Here, not above, so that a process loads only the reader that it needs.
    from autoflip_flwr.experiment.data import har, images, leaf, own, text

    check_name(dataset)
    if dataset == "digits":
        return images.digits()
    if ":" in dataset:
        return own.called(dataset, data_dir)
    found = find(dataset, data_dir)
    if dataset == "har":
        return har.har(found)
    if dataset == "own":
        return own.own(found)
    if dataset == "femnist":
        return leaf.femnist(found)
    if dataset == "shakespeare":
        return leaf.leaf_shakespeare(found) if found.form == "leaf" else text.spoken(found)
    return images.known_images(dataset, found)


@lru_cache(maxsize=8)
def _adapted(data: Data, input_size: int, augment: str) -> Data:
    inputs = data.inputs
    if inputs.kind != "image":
        raise ConfigError(f"dataset = {data.name!r}: holds no images, so input-size must be 0 and augment 'none'")
    channels, height, width = inputs.shape
    if input_size > min(height, width):
        raise ConfigError(f"input-size = {input_size}: must be at most {min(height, width)}, as in {data.name}")
    shape = (channels, input_size, input_size) if input_size else inputs.shape
    return replace(data, inputs=inputs._replace(shape=shape, augment=augment))
