"""The settings of the shipped app: what each means, its default and what is allowed.

`[tool.flwr.app.config]` in pyproject.toml lists the same settings with the same defaults. Flower itself checks neither
types nor ranges, so both the command line and the server app pass their values through `Config`.
"""

import difflib
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

Value = bool | int | float | str
"""What a Flower run config can hold."""

PATHS = ("data-dir", "output-dir", "exploration", "resume")
"""The settings that are paths."""

DATASETS = ("digits", "mnist", "fashion_mnist", "cifar10")
_DATA_FILES = (
    "x_train.npy, y_train.npy, x_test.npy, y_test.npy (also in a folder named as the data set) or torchvision's own "
    "files (MNIST/raw, FashionMNIST/raw, cifar-10-batches-py)"
)
VALUES = ("float32", "bfloat16", "float16", "int8")
MODELS = ("cnn", "twocnn", "resnet18", "resnet18-gn")


class ConfigError(ValueError):
    """A setting that the user has to change; the message is one line fit to be shown."""


@dataclass(frozen=True)
class _Rule:
    kind: type[Value]
    allowed: str
    accepts: Callable[[Any], bool] = lambda _: True


def _choice(*choices: str) -> _Rule:
    return _Rule(str, f"one of {', '.join(choices)}", choices.__contains__)


_TEXT = _Rule(str, "a string")
_FLAG = _Rule(bool, "true or false")
_COUNT = _Rule(int, "an integer >= 1", lambda v: v >= 1)
_NOT_BELOW_ZERO = _Rule(int, "an integer >= 0", lambda v: v >= 0)
_POSITIVE = _Rule(float, "a number > 0", lambda v: v > 0)
_NOT_NEGATIVE = _Rule(float, "a number >= 0", lambda v: v >= 0)
_BELOW_ONE = _Rule(float, "a number in [0, 1)", lambda v: 0 <= v < 1)
_ABOVE_ONE = _Rule(float, "a number > 1", lambda v: v > 1)
_UP_TO_ONE = _Rule(float, "a number in (0, 1]", lambda v: 0 < v <= 1)
_UNIT = _Rule(float, "a number in [0, 1]", lambda v: 0 <= v <= 1)
_SEED = _Rule(int, "an integer in [0, 4294967295]", lambda v: 0 <= v < 2**32)
_CLASSES = _Rule(int, "an integer in [1, 10]", lambda v: 1 <= v <= 10)
_NAME = _Rule(
    str,
    "at most 64 letters, digits, '.', '_' or '-'",
    lambda v: re.fullmatch(r"[A-Za-z0-9._-]{0,64}", v) is not None,
)
_WAY = _Rule(str, f"empty or one of {', '.join(VALUES)}", ("", *VALUES).__contains__)
_FOLDER_NAME = _Rule(str, "the path of a folder", lambda v: v != "")


def _setting(default: Value, rule: _Rule) -> Any:
    return field(default=default, metadata={"rule": rule})


@dataclass(frozen=True)
class Config:
    """All settings of one run. A value out of range raises `ConfigError`.

    In TOML and on the command line the names are in kebab case: `batch-size` for `batch_size`. Numbers are finite; an
    integer is accepted where a number is asked for and becomes a float.

    Parameters
    ----------
    name : str ("")
        Name of the run, at most 64 letters, digits, '.', '_' or '-'. Empty: `<method>-<dataset>`.
    method : str ("autoflip")
        autoflip (informed pruning) or fedavg (dense baseline).
    seed : int (1)
        Of everything random, in [0, 2**32).
    output_dir : str ("runs")
        Folder in which the run's own folder is made.
    dataset : str ("digits")
        digits, mnist, fashion_mnist or cifar10.
    data_dir : str ("")
        Existing folder that holds the data set. Empty: see `resolved_data_dir`.
    split : str ("dirichlet")
        How the data are divided among the nodes: iid, dirichlet (label skew) or pathological (few classes a node).
    alpha : float (0.3)
        Concentration of the Dirichlet split, > 0; the smaller, the more skewed.
    classes_per_client : int (2)
        Of the pathological split, in [1, 10].
    nodes : int (0)
        SuperNodes to wait for: 0 (as many as connect, at least 2) or more.
    node_timeout : float (60.0)
        Seconds without a new node after which a run no longer waits for more, > 0.
    model : str ("cnn")
        cnn, twocnn, resnet18 or resnet18-gn.
    optimizer : str ("adam")
        Of the clients: adam or sgd.
    lr : float (0.003)
        Learning rate of the clients, > 0.
    lr_decay : float (1.0)
        In (0, 1]; `lr` is multiplied by it after every round.
    momentum : float (0.0)
        Of sgd, in [0, 1).
    weight_decay : float (0.0)
        Of the clients' optimiser, >= 0.
    batch_size : int (16)
        Examples a step, >= 1.
    local_epochs : int (3)
        Epochs a client trains in a round, >= 1.
    device : str ("auto")
        auto, cpu, cuda or mps.
    num_server_rounds : int (20)
        Rounds after the exploration, >= 1.
    fraction_train : float (1.0)
        Share of the nodes that train in a round, in (0, 1].
    fraction_evaluate : float (0.0)
        Share of the nodes that evaluate in a round, in [0, 1]; the server evaluates centrally in any case.
    round_timeout : float (600.0)
        Seconds after which a round goes on without the missing replies, > 0.
    server_momentum : float (0.0)
        In [0, 1); above 0 the server runs FedAvgM.
    server_learning_rate : float (1.0)
        Of FedAvgM, > 0.
    sparsity : float (0.7)
        Share of the prunable parameters to prune, in [0, 1).
    scope : str ("global")
        Scores are ranked over the whole model (global) or within each layer (layer).
    normalisation : str ("none")
        Of the scores before they are ranked: none, layer or per-client.
    gamma : float (1.0)
        Power of the client agreement in the score, >= 0; 0 ignores agreement.
    prune_biases : bool (False)
        Whether biases are prunable, too.
    initial : str ("scratch")
        Weights of round 1: the initial ones (scratch) or the explorers' average (scouts).
    outside : str ("zero")
        What stands outside the mask: zero, or the values with which training began (initial).
    explorers : float (1.0)
        Share of the nodes that explore, in (0, 1].
    exploration_rounds : int (1)
        Batches in which they explore, >= 1.
    exploration_epochs : int (5)
        Most epochs an explorer trains, >= 1.
    exploration_patience : int (2)
        Epochs without a better loss after which an explorer stops, >= 1.
    exploration_timeout : float (0.0)
        Seconds for each batch of explorers, >= 0. 0: as `round_timeout`.
    exploration_weighting : str ("uniform")
        Weights of the explorers: uniform or examples.
    exploration_values : str ("log8")
        How explorers' moves travel: log8 (a byte a parameter or less) or float32.
    min_explorers : int (2)
        Fewest explorers whose results make a mask, >= 1 and not more than `nodes`.
    values : str ("float32")
        How values travel in the rounds: float32, bfloat16, float16 or int8.
    values_up : str ("")
        The same for replies alone. Empty: as `values`.
    values_down : str ("")
        The same for messages to the nodes alone. Empty: as `values`.
    exploration : str ("")
        Existing file with the exploration of an earlier run, to be used instead of exploring.

    min_replies : int (1)
        A round in which fewer replies count keeps the model (method autoflip), >= 1.
    norm_factor : float (1000.0)
        A reply is left out whose update is so many times longer than other replies and its work explain (method
        autoflip), > 1; from the default on only if earlier rounds do not explain it, and it is longer than the model.
    max_examples : float (1e9)
        A reply that says it has more examples is left out (method autoflip), > 0.
    checkpoints : int (2)
        Rounds whose whole state is kept in the run's folder (method autoflip), >= 0; 0 keeps none.
    resume : str ("")
        Existing folder of an interrupted run's record: go on after its last finished round. All else must be as it
        was, but for `num_server_rounds`, which may grow, and what changes no result.
    """

    name: str = _setting("", _NAME)
    method: str = _setting("autoflip", _choice("autoflip", "fedavg"))
    seed: int = _setting(1, _SEED)
    output_dir: str = _setting("runs", _FOLDER_NAME)

    dataset: str = _setting("digits", _choice(*DATASETS))
    data_dir: str = _setting("", _TEXT)
    split: str = _setting("dirichlet", _choice("iid", "dirichlet", "pathological"))
    alpha: float = _setting(0.3, _POSITIVE)
    classes_per_client: int = _setting(2, _CLASSES)
    nodes: int = _setting(0, _NOT_BELOW_ZERO)
    node_timeout: float = _setting(60.0, _POSITIVE)

    model: str = _setting("cnn", _choice(*MODELS))
    optimizer: str = _setting("adam", _choice("adam", "sgd"))
    lr: float = _setting(0.003, _POSITIVE)
    lr_decay: float = _setting(1.0, _UP_TO_ONE)
    momentum: float = _setting(0.0, _BELOW_ONE)
    weight_decay: float = _setting(0.0, _NOT_NEGATIVE)
    batch_size: int = _setting(16, _COUNT)
    local_epochs: int = _setting(3, _COUNT)
    device: str = _setting("auto", _choice("auto", "cpu", "cuda", "mps"))

    num_server_rounds: int = _setting(20, _COUNT)
    fraction_train: float = _setting(1.0, _UP_TO_ONE)
    fraction_evaluate: float = _setting(0.0, _UNIT)
    round_timeout: float = _setting(600.0, _POSITIVE)
    server_momentum: float = _setting(0.0, _BELOW_ONE)
    server_learning_rate: float = _setting(1.0, _POSITIVE)

    sparsity: float = _setting(0.7, _BELOW_ONE)
    scope: str = _setting("global", _choice("global", "layer"))
    normalisation: str = _setting("none", _choice("none", "layer", "per-client"))
    gamma: float = _setting(1.0, _NOT_NEGATIVE)
    prune_biases: bool = _setting(False, _FLAG)
    initial: str = _setting("scratch", _choice("scratch", "scouts"))
    outside: str = _setting("zero", _choice("zero", "initial"))
    explorers: float = _setting(1.0, _UP_TO_ONE)
    exploration_rounds: int = _setting(1, _COUNT)
    exploration_epochs: int = _setting(5, _COUNT)
    exploration_patience: int = _setting(2, _COUNT)
    exploration_timeout: float = _setting(0.0, _NOT_NEGATIVE)
    exploration_weighting: str = _setting("uniform", _choice("uniform", "examples"))
    exploration_values: str = _setting("log8", _choice("log8", "float32"))
    min_explorers: int = _setting(2, _COUNT)
    values: str = _setting("float32", _choice(*VALUES))
    values_up: str = _setting("", _WAY)
    values_down: str = _setting("", _WAY)
    exploration: str = _setting("", _TEXT)

    min_replies: int = _setting(1, _COUNT)
    norm_factor: float = _setting(1000.0, _ABOVE_ONE)
    max_examples: float = _setting(1e9, _POSITIVE)
    checkpoints: int = _setting(2, _NOT_BELOW_ZERO)
    resume: str = _setting("", _TEXT)

    def __post_init__(self) -> None:
        for each in fields(self):
            rule: _Rule = each.metadata["rule"]
            value = getattr(self, each.name)
            if rule.kind is float and type(value) is int:
                # An integer beyond the range of a float is as unusable as infinity.
                value = float(value) if abs(value) < 2**1023 else math.inf
                object.__setattr__(self, each.name, value)
            wrong = type(value) is not rule.kind or (isinstance(value, float) and not math.isfinite(value))
            if wrong or not rule.accepts(value):
                raise ConfigError(f"{_key(each)} = {shown(value)}: must be {rule.allowed}")
        for key, value in self.as_dict().items():
            if key in PATHS and any(ord(character) < 32 for character in str(value)):
                raise ConfigError(
                    f"{key} = {shown(value)}: holds a control character. In double quotes a backslash begins an "
                    "escape: write a Windows path with forward slashes, or in single quotes"
                )
        if self.method == "autoflip" and 0 < self.nodes < self.min_explorers:
            raise ConfigError(
                f"min-explorers = {self.min_explorers}: must not be more than nodes = {self.nodes}; "
                f"for a mask of {self.nodes} node{'s' * (self.nodes > 1)}, min-explorers={self.nodes}"
            )
        if self.resume and (self.method != "autoflip" or not self.checkpoints):
            raise ConfigError(f"resume = {shown(self.resume)}: needs method = 'autoflip' and checkpoints > 0")

    @classmethod
    def from_run_config(cls, values: Mapping[str, Value], *, check_paths: bool = True) -> "Config":
        """Read a Flower run config.

        Parameters
        ----------
        values : Mapping[str, bool | int | float | str]
            Settings by their kebab-case keys; a missing one takes its default.
        check_paths : bool (True)
            Whether `data-dir`, `exploration` and `resume` must exist. A client on another machine than the server
            passes False.

        Raises
        ------
        ConfigError
            For an unknown key, a wrong type, a value out of range or a path that does not exist.
        """
        names = {_key(each): each.name for each in fields(cls)}
        for key, value in values.items():
            if key not in names:
                close = difflib.get_close_matches(key, names, n=1)
                hint = f"did you mean {close[0]}?" if close else f"the settings are {', '.join(names)}"
                raise ConfigError(f"{key} = {shown(value)}: no such setting; {hint}")
        config = cls(**{names[key]: value for key, value in values.items()})  # type: ignore[arg-type]
        if check_paths:
            if config.data_dir and not Path(config.data_dir).is_dir():
                raise ConfigError(f"data-dir = {shown(config.data_dir)}: must be an existing folder with {_DATA_FILES}")
            if config.exploration and not Path(config.exploration).is_file():
                raise ConfigError(f"exploration = {shown(config.exploration)}: must be an existing file")
            if config.resume and not (Path(config.resume) / "config.json").is_file():
                raise ConfigError(f"resume = {shown(config.resume)}: must be the folder of an earlier run's record")
        return config

    def as_dict(self) -> dict[str, Value]:
        """All settings by their kebab-case keys, in the order of their declaration."""
        return {_key(each): getattr(self, each.name) for each in fields(self)}

    def of_start(self) -> dict[str, Value]:
        """Those that decide the initial model."""
        return {"model": self.model, "dataset": self.dataset, "seed": self.seed}

    def decisive(self) -> dict[str, Value]:
        """Those that decide what a run computes, and hence what must not change when it goes on."""
        return {key: value for key, value in self.as_dict().items() if key not in _FREE}

    @property
    def resolved_data_dir(self) -> str:
        """Folder of the data set: `data_dir`, else $AUTOFLIP_DATA, else "" (download)."""
        return self.data_dir or os.environ.get("AUTOFLIP_DATA", "")


_FREE = (
    "name",
    "output-dir",
    "data-dir",
    "nodes",
    "node-timeout",
    "round-timeout",
    "exploration-timeout",
    "num-server-rounds",
    "checkpoints",
    "resume",
)


def shown(value: object) -> str:
    """A value as messages show it: as in TOML, save that strings are in single quotes."""
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _key(setting: "Field[Any]") -> str:
    return setting.name.replace("_", "-")
