"""The settings of the shipped app: the one place that defines their meanings, defaults and allowed values.

`autoflip settings` prints them. docs/settings.md and `[tool.flwr.app.config]` in pyproject.toml must agree with them.
Flower itself checks neither types nor ranges, so both the command line and the server app pass their values through
`Config`.
"""

import difflib
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

from autoflip_flwr.core import choices
from autoflip_flwr.core.pace import Exchange
from autoflip_flwr.experiment.inputs import WORDS, misfit

Value = bool | int | float | str
"""What a Flower run config can hold."""

PATHS = ("data-dir", "output-dir", "exploration", "resume")
"""The settings that are paths."""


class ConfigError(ValueError):
    """A setting that the user has to change. The message is one line that can be shown."""


@dataclass(frozen=True)
class Rule:
    """What a setting allows: a type, a range in words and as a test, and the choices if there are any."""

    kind: type[Value]
    allowed: str
    accepts: Callable[[Any], bool] = lambda _: True
    choices: tuple[str, ...] = ()


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _choice(allowed: tuple[str, ...]) -> Rule:
    told = ", ".join(filter(None, allowed))
    return Rule(str, f"{'empty or ' * ('' in allowed)}one of {told}", allowed.__contains__, allowed)


_TEXT = Rule(str, "a string")
_FLAG = Rule(bool, "true or false")
_COUNT = Rule(int, "an integer >= 1", lambda v: v >= 1)
_NOT_BELOW_ZERO = Rule(int, "an integer >= 0", lambda v: v >= 0)
_POSITIVE = Rule(float, "a number > 0", lambda v: v > 0)
_NOT_NEGATIVE = Rule(float, "a number >= 0", lambda v: v >= 0)
_BELOW_ONE = Rule(float, "a number in [0, 1)", lambda v: 0 <= v < 1)
_ABOVE_ONE = Rule(float, "a number > 1", lambda v: v > 1)
_UP_TO_ONE = Rule(float, "a number in (0, 1]", lambda v: 0 < v <= 1)
_UNIT = Rule(float, "a number in [0, 1]", lambda v: 0 <= v <= 1)
_SEED = Rule(int, "an integer in [0, 4294967295]", lambda v: 0 <= v < 2**32)
_DATASET = Rule(
    str,
    f"one of {', '.join(choices.DATASETS)}, or module:callable",
    lambda v: v in choices.DATASETS or re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", v) is not None,
    choices.DATASETS,
)
_NAME = Rule(
    str,
    "at most 64 letters, digits, '.', '_' or '-'",
    lambda v: re.fullmatch(r"[A-Za-z0-9._-]{0,64}", v) is not None,
)
_FOLDER_NAME = Rule(str, "the path of a folder", lambda v: v != "")
_TRACKERS = Rule(
    str,
    f"empty, or one or more of {', '.join(choices.TRACKERS)}, with commas in between",
    lambda v: v == "" or (set(_parts(v)) <= set(choices.TRACKERS) and len(_parts(v)) == len(set(_parts(v)))),
)
_MODEL = Rule(
    str,
    f"one of {', '.join(choices.MODELS)}, or your own as module:callable",
    lambda v: v in choices.MODELS or re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", v) is not None,
    choices.MODELS,
)
_CODING, _OWN_CODING = _choice(choices.VALUES), _choice(("", *choices.VALUES))


def _setting(
    section: str, default: Value, rule: Rule, meaning: str, *, only_with: tuple[str, tuple[Value, ...]] | None = None
) -> Any:
    """Return a field of `Config`. `only_with` is another setting, and its values with which this one has an effect."""
    about = {"section": section, "rule": rule, "meaning": meaning, "only_with": only_with}
    return field(default=default, metadata=about)


_of_run = partial(_setting, "The run")
_of_data = partial(_setting, "Data and nodes")
_of_clients = partial(_setting, "Model and training")
_of_rounds = partial(_setting, "Rounds")
_of_pruning = partial(_setting, "Pruning", only_with=("method", choices.PRUNING))
_of_ranking = partial(_setting, "Pruning", only_with=("method", choices.RANKED))
_of_change = partial(_setting, "Pruning", only_with=("method", choices.CHANGING))
_of_explorers = partial(_setting, "Pruning", only_with=("method", choices.ASKING))
_of_batches = partial(_setting, "Pruning", only_with=("method", choices.AT_ONCE))
_of_round_0 = partial(_setting, "Pruning", only_with=("method", ("prunefl", *choices.ASKING)))
_of_training_explorers = partial(_setting, "Pruning", only_with=("method", choices.EXPLORING))
_of_scores = partial(_setting, "Pruning", only_with=("method", ("autoflip", "sequential-leak")))
_of_exploration = partial(_setting, "Pruning", only_with=("method", ("autoflip",)))
_of_values = partial(_setting, "Values")
_of_safety = partial(_setting, "Replies and checkpoints", only_with=("method", choices.WRAPPED))


@dataclass(frozen=True)
class Config:
    """All settings of one run. A value out of range raises `ConfigError`.

    In TOML and on the command line the names are in kebab case: `batch-size` for `batch_size`. Numbers are finite. An
    integer is accepted for a float and converted. `autoflip settings` prints the description of each field.
    """

    name: str = _of_run("", _NAME, "Name of the run's folder. Empty: <method>-<dataset>")
    method: str = _of_run(
        "autoflip", _choice(choices.METHODS), "Informed pruning, a dense baseline, or a rival (docs/methods.md)"
    )
    seed: int = _of_run(1, _SEED, "Of everything random")
    output_dir: str = _of_run("runs", _FOLDER_NAME, "Where the run's own folder is made")

    trackers: str = _of_run(
        "", _TRACKERS, "Also write the run for TensorBoard, Weights & Biases or MLflow, into the run's folder"
    )

    dataset: str = _of_data("digits", _DATASET, "The data set; own is the data of data-dir")
    data_dir: str = _of_data(
        "", _TEXT, "Existing folder that holds it. Empty: $AUTOFLIP_DATA, else torchvision downloads it"
    )
    max_examples_per_class: int = _of_data(
        0, _NOT_BELOW_ZERO, "Most training examples of a class, drawn by the seed, for quick runs. 0: all"
    )
    input_size: int = _of_data(0, _NOT_BELOW_ZERO, "Height and width to which images are cropped. 0: as they are")
    augment: str = _of_data(
        "none", _choice(choices.AUGMENTS), "Random changes of images in training; evaluation takes their middle"
    )
    split: str = _of_data(
        "dirichlet",
        _choice(choices.SPLITS),
        "Among the nodes: evenly, by label skew, few classes for each node, shards of sorted labels, unequal amounts, "
        "or one writer, speaker or person for each node",
    )
    alpha: float = _of_data(
        0.3, _POSITIVE, "Of the Dirichlet split: the smaller, the more skewed", only_with=("split", ("dirichlet",))
    )
    classes_per_client: int = _of_data(2, _COUNT, "Of the pathological split", only_with=("split", ("pathological",)))
    shards_per_node: int = _of_data(2, _COUNT, "Of the shards split", only_with=("split", ("shards",)))
    size_spread: float = _of_data(
        1.0,
        _NOT_NEGATIVE,
        "Of the quantity split: standard deviation of the logarithm of the nodes' sizes",
        only_with=("split", ("quantity",)),
    )
    min_examples: int = _of_data(
        0,
        _NOT_BELOW_ZERO,
        "Fewest examples of a node; owners with fewer take no part. 0: what a small batch needs, or 1",
        only_with=("split", ("dirichlet", "quantity", "natural")),
    )
    nodes: int = _of_data(0, _NOT_BELOW_ZERO, "SuperNodes to wait for. 0: as many as connect, at least 2")
    node_timeout: float = _of_data(
        60.0, _POSITIVE, "Seconds without a new node after which a run no longer waits for more"
    )

    model: str = _of_clients("cnn", _MODEL, "The model")
    optimizer: str = _of_clients("adam", _choice(choices.OPTIMIZERS), "Of the clients")
    lr: float = _of_clients(0.003, _POSITIVE, "Learning rate of the clients")
    lr_decay: float = _of_clients(1.0, _UP_TO_ONE, "The learning rate is multiplied by it after every round")
    momentum: float = _of_clients(0.0, _BELOW_ONE, "Of sgd", only_with=("optimizer", ("sgd",)))
    weight_decay: float = _of_clients(0.0, _NOT_NEGATIVE, "Of the clients' optimiser")
    batch_size: int = _of_clients(16, _COUNT, "Examples a step")
    local_epochs: int = _of_clients(3, _COUNT, "Epochs that a client trains in a round")
    clip_norm: float = _of_clients(
        0.0, _NOT_NEGATIVE, "Longer gradients of a step are scaled to this length, over kept parameters. 0: none are"
    )
    proximal_mu: float = _of_clients(
        0.0,
        _NOT_NEGATIVE,
        "FedProx's mu: how strongly training is drawn to the model of the round. 0: not at all. Explorers are not",
    )
    precision: str = _of_clients(
        "float32",
        _choice(choices.PRECISIONS),
        "In which clients compute; parameters stay float32. bfloat16 is fast only where the hardware has it",
    )
    device: str = _of_clients("auto", _choice(choices.DEVICES), "Where clients train. auto: the best that there is")

    num_server_rounds: int = _of_rounds(20, _COUNT, "Rounds after the exploration")
    fraction_train: float = _of_rounds(1.0, _UP_TO_ONE, "Share of the nodes that train in a round")
    fraction_evaluate: float = _of_rounds(
        0.0, _UNIT, "Share of the nodes that evaluate in a round; the server evaluates centrally in any case"
    )
    evaluate_every: int = _of_rounds(
        0,
        _NOT_BELOW_ZERO,
        "The server evaluates the model every so many rounds, and after the last. 0: as often as costs less than a "
        "tenth of the training",
    )
    test_examples: int = _of_rounds(
        0, _NOT_BELOW_ZERO, "Test examples of these evaluations, the same ones in every run. 0: all"
    )
    round_timeout: float = _of_rounds(
        600.0, _POSITIVE, "Seconds after which a round goes on without the missing replies"
    )
    server_momentum: float = _of_rounds(0.0, _BELOW_ONE, "Above 0 the server runs FedAvgM")
    server_learning_rate: float = _of_rounds(1.0, _POSITIVE, "Of FedAvgM, which the server runs where it is not 1")

    sparsity: float = _of_pruning(0.7, _BELOW_ONE, "Share of the prunable parameters to prune")
    scope: str = _of_ranking(
        "global",
        _choice(choices.SCOPES),
        "Scores are ranked over the whole model, or per layer: of equal density, or by ERK",
    )
    normalisation: str = _of_scores("none", _choice(choices.NORMALISATIONS), "Of the scores before they are ranked")
    gamma: float = _of_scores(1.0, _NOT_NEGATIVE, "Power of the client agreement in the score; 0 leaves agreement out")
    prune_biases: bool = _of_pruning(False, _FLAG, "Whether biases are prunable, too")
    initial: str = _of_exploration(
        "scratch", _choice(choices.INITIALS), "Round 1 starts from the initial weights, or the explorers' average"
    )
    outside: str = _of_pruning(
        "zero",
        _choice(choices.OUTSIDE),
        "What stands outside the mask: zero, or the values with which training began, for fine-tuning",
    )
    initial_density: float = _setting(
        "Pruning", 1.0, _UP_TO_ONE, "Density of round 1", only_with=("method", ("gradual",))
    )
    fall: float = _setting(
        "Pruning",
        0.6,
        _UP_TO_ONE,
        "Share of the rounds within which the density falls to the target",
        only_with=("method", ("gradual",)),
    )
    adjust_every: int = _of_change(
        0, _NOT_BELOW_ZERO, "Rounds between two changes of the mask. 0: as the method's authors, 1, 10, 15 or 50"
    )
    adjust_share: float = _setting(
        "Pruning",
        0.0,
        _BELOW_ONE,
        "Share of the kept entries that may be exchanged. 0: as the method's authors, 0.3, or 0.01 for feddst",
        only_with=("method", choices.EXCHANGING),
    )
    adjust_until: float = _setting(
        "Pruning",
        0.0,
        _UNIT,
        "Share of the rounds after which nothing is exchanged. 0: as the method's authors, 0.6, or 0.5 for feddst",
        only_with=("method", choices.FADING),
    )
    explorers: float = _of_explorers(1.0, _UP_TO_ONE, "Share of the nodes that explore")
    exploration_batches: int = _of_batches(1, _COUNT, "Batches in which they explore")
    exploration_epochs: int = _of_training_explorers(5, _COUNT, "Most epochs that an explorer trains")
    exploration_patience: int = _of_training_explorers(
        2, _COUNT, "Epochs without a better loss after which an explorer stops"
    )
    exploration_timeout: float = _of_round_0(
        0.0, _NOT_NEGATIVE, "Seconds for each batch of explorers. 0: as round-timeout"
    )
    exploration_weighting: str = _of_batches(
        "uniform", _choice(choices.WEIGHTINGS), "Explorers count alike, or by their number of examples"
    )
    exploration_values: str = _of_round_0(
        "log8", _choice(choices.DELTAS), "How explorers' deltas travel: a byte a parameter or less, or as they are"
    )
    min_explorers: int = _of_explorers(
        2, _COUNT, "Fewest explorers whose results make a mask; not more than nodes, where that is set"
    )
    exploration: str = _of_exploration(
        "", _TEXT, "Existing file with the exploration of an earlier run, to be used instead of exploring"
    )

    values: str = _of_values("float32", _CODING, "How values travel in the rounds")
    values_up: str = _of_values("", _OWN_CODING, "The same for replies alone. Empty: as values")
    values_down: str = _of_values("", _OWN_CODING, "The same for messages to the nodes alone. Empty: as values")

    min_replies: int = _of_safety(1, _COUNT, "A round in which fewer replies count leaves the model as it was")
    norm_factor: float = _of_safety(
        1000.0,
        _ABOVE_ONE,
        "A reply is rejected whose update is so many times longer than other replies and its work explain; from the "
        "default on only if earlier rounds do not explain it either, and it is longer than the model",
    )
    max_examples: float = _of_safety(1e9, _POSITIVE, "A reply that says it has more examples is rejected")
    checkpoints: int = _of_safety(2, _NOT_BELOW_ZERO, "Rounds whose whole state is kept in the run's folder. 0: none")
    resume: str = _of_safety(
        "",
        _TEXT,
        "Existing folder of an interrupted run's record: go on after its last finished round. All else must be as it "
        "was, but for num-server-rounds, which may grow, and what changes no result",
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            object.__setattr__(self, each.name, allowed(each, getattr(self, each.name)))
        for key, value in self.as_dict().items():
            if key in PATHS and any(ord(character) < 32 for character in str(value)):
                raise ConfigError(
                    f"{key} = {shown(value)}: holds a control character. In double quotes a backslash begins an "
                    "escape: write a Windows path with forward slashes, or in single quotes"
                )
        if self.model in choices.MODELS and (kind := choices.DATASET_INPUTS.get(self.dataset)):
            reason = misfit(self.model, kind, f"the {WORDS[kind]} of dataset = {shown(self.dataset)}")
            if reason:
                raise ConfigError(f"model = {shown(self.model)}: {reason}")
        if self.method in choices.ASKING and 0 < self.nodes < self.min_explorers:
            raise ConfigError(
                f"min-explorers = {self.min_explorers}: must not be more than nodes = {self.nodes}; "
                f"for a mask of {self.nodes} node{'s' * (self.nodes > 1)}, min-explorers={self.nodes}"
            )
        if self.resume and not (self.wrapped and self.checkpoints):
            raise ConfigError(
                f"resume = {shown(self.resume)}: needs checkpoints > 0, and a method that is not 'fedavg' or 'fedprox' "
                "(unless its values are quantised)"
            )
        if self.method == "fedprox" and (self.server_momentum or self.server_learning_rate != 1.0):
            raise ConfigError("method = 'fedprox': needs server-momentum = 0 and server-learning-rate = 1")
        if self.method == "fedprox" and not self.proximal_mu:
            raise ConfigError("proximal-mu = 0.0: with method = 'fedprox' it must be above 0, such as 0.01")
        if self.sparsity and self.method in choices.CHANGING:
            self._check_schedule()

    def _check_schedule(self) -> None:
        """Raise `ConfigError` if the mask would never change, or could not fall to the target."""
        rounds, every = self.num_server_rounds, self.adjust_every or choices.EVERY[self.method]
        if self.method == "gradual" and self.initial_density < 1 - self.sparsity:
            raise ConfigError(
                f"initial-density = {self.initial_density}: must not be below {1 - self.sparsity:g}, the density of "
                f"sparsity = {self.sparsity}"
            )
        if self.method not in choices.FADING:
            changes = rounds > every
        else:
            exchange = Exchange(self.adjust_share or 0.5, every, self.adjust_until or choices.UNTIL[self.method])
            changes = any(exchange.after(round_, rounds) for round_ in range(1, rounds))
        if not changes:
            raise ConfigError(
                f"adjust-every = {every}: with num-server-rounds = {rounds} the mask would never change; lower it, or "
                "run more rounds"
            )

    @property
    def wrapped(self) -> bool:
        """Whether the run takes place in `Pruned`; else it is Flower's own strategy."""
        coded = {self.values_up or self.values, self.values_down or self.values} != {"float32"}
        return self.method in choices.WRAPPED or coded

    def applies(self, setting: "Field[Any]") -> bool:
        """Return whether a setting has an effect, given the others."""
        needed = setting.metadata["only_with"]
        if needed is None or getattr(self, needed[0]) in needed[1]:
            return True
        return needed[1] == choices.WRAPPED and self.wrapped

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
        found = {setting(key, value).name: value for key, value in values.items()}
        config = cls(**found)  # type: ignore[arg-type]
        if check_paths:
            if config.data_dir and not Path(config.data_dir).is_dir():
                where = shown(config.data_dir)
                raise ConfigError(f"data-dir = {where}: must be an existing folder; docs/data.md says with which files")
            if config.exploration and not Path(config.exploration).is_file():
                raise ConfigError(f"exploration = {shown(config.exploration)}: must be an existing file")
            if config.resume and not (Path(config.resume) / "config.json").is_file():
                raise ConfigError(f"resume = {shown(config.resume)}: must be the folder of an earlier run's record")
        return config

    def as_dict(self) -> dict[str, Value]:
        """Return all settings by their kebab-case keys, in the order of their declaration."""
        return {key_of(each): getattr(self, each.name) for each in fields(self)}

    def as_fields(self) -> dict[str, Value]:
        """Return all settings by their field names."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def of_start(self) -> dict[str, Value]:
        """Return the settings that decide the initial model."""
        return {"model": self.model, "dataset": self.dataset, "seed": self.seed}

    def decisive(self) -> dict[str, Value]:
        """Return the settings that decide what a run computes, and so must not change when it is resumed."""
        return {key: value for key, value in self.as_dict().items() if key not in _FREE}

    @property
    def tracker_names(self) -> tuple[str, ...]:
        """The names in `trackers`."""
        return tuple(_parts(self.trackers)) if self.trackers else ()

    @property
    def resolved_data_dir(self) -> str:
        """Folder of the data set: `data_dir`, else $AUTOFLIP_DATA, else "" (download)."""
        return self.data_dir or os.environ.get("AUTOFLIP_DATA", "")


_FREE = (
    "name",
    "output-dir",
    "trackers",
    "data-dir",
    "nodes",
    "node-timeout",
    "round-timeout",
    "exploration-timeout",
    "evaluate-every",
    "num-server-rounds",
    "checkpoints",
    "resume",
)


@cache
def _by_key() -> "dict[str, Field[Any]]":
    return {key_of(each): each for each in fields(Config)}


def setting(key: str, value: object = ...) -> "Field[Any]":
    """Return the field of `Config` with this kebab-case key. ``value`` is only shown, in the error.

    Raises
    ------
    ConfigError
        If there is none.
    """
    known = _by_key()
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the settings are {', '.join(known)}"
        told = key if value is ... else f"{key} = {shown(value)}"
        raise ConfigError(f"{told}: no such setting; {hint}")
    return known[key]


def allowed(field_: "Field[Any]", value: Any) -> Value:
    """Return a value for a field of `Config`; an integer for a float is converted.

    Raises
    ------
    ConfigError
        If the field's rule does not allow it.
    """
    rule: Rule = field_.metadata["rule"]
    if rule.kind is float and type(value) is int:
        # An integer beyond the range of a float counts as infinity.
        value = float(value) if abs(value) < 2**1023 else math.inf
    wrong = type(value) is not rule.kind or (isinstance(value, float) and not math.isfinite(value))
    if wrong or not rule.accepts(value):
        raise ConfigError(f"{key_of(field_)} = {shown(value)}: must be {rule.allowed}")
    found: Value = value
    return found


def shown(value: object) -> str:
    """Return a value as messages show it: as in TOML, but with strings in single quotes."""
    return str(value).lower() if isinstance(value, bool) else repr(value)


def key_of(setting: "Field[Any]") -> str:
    """Return the name of a field of `Config` in TOML and on the command line."""
    return setting.name.replace("_", "-")
