"""The settings of the shipped app: the one place that defines their meanings, defaults and allowed values.

`autoflip settings` prints them. docs/settings.md and `[tool.flwr.app.config]` in pyproject.toml must agree with them.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from autoflip_flwr.core import choices
from autoflip_flwr.core.explorers import asked_among
from autoflip_flwr.experiment import rules
from autoflip_flwr.experiment.rules import Rule, Value

Needs = tuple[str, tuple[Value, ...]]
"""Another setting, and its values with which a setting has an effect."""


def _setting(section: str, default: Value, rule: Rule, meaning: str, *, only_with: tuple[Needs, ...] = ()) -> Any:
    """Return a field of `Config`. It has an effect only if one of `only_with` is given, or if that is empty."""
    about = {"section": section, "rule": rule, "meaning": meaning, "only_with": only_with}
    return field(default=default, metadata=about)


_of_run = partial(_setting, "The run")
_of_data = partial(_setting, "Data and nodes")
_of_clients = partial(_setting, "Model and training")
_of_pruning_clients = partial(_setting, "Model and training", only_with=(("method", choices.PRUNING),))
_of_rounds = partial(_setting, "Rounds")
_of_pruning = partial(_setting, "Pruning", only_with=(("method", choices.PRUNING),))
_of_ranking = partial(_setting, "Pruning", only_with=(("method", choices.RANKED),))
_of_change = partial(
    _setting, "Pruning", only_with=(("method", choices.EXCHANGING), ("schedule", choices.EXCHANGING_SCHEDULES))
)
_of_regrowth = partial(
    _setting, "Pruning", only_with=(("method", choices.EXCHANGING), ("schedule", choices.REGROWING_SCHEDULES))
)
_of_end = partial(_setting, "Pruning", only_with=(("method", choices.FADING), ("schedule", choices.ENDING_SCHEDULES)))
_of_explorers = partial(_setting, "Pruning", only_with=(("method", choices.ASKING),))
_of_batches = partial(_setting, "Pruning", only_with=(("method", choices.AT_ONCE),))
_of_round_0 = partial(_setting, "Pruning", only_with=(("method", ("prunefl", *choices.ASKING)),))
_of_training_explorers = partial(_setting, "Pruning", only_with=(("method", choices.EXPLORING),))
_of_scores = partial(_setting, "Pruning", only_with=(("method", ("autoflip", "sequential-leak")),))
_of_exploration = partial(_setting, "Pruning", only_with=(("method", ("autoflip",)),))
_of_schedule = partial(_setting, "Pruning", only_with=(("method", ("autoflip",)),))
_of_fall = partial(_setting, "Pruning", only_with=(("method", ("gradual",)), ("schedule", choices.FALLING)))
_of_values = partial(_setting, "Values")
_of_safety = partial(_setting, "Replies and checkpoints", only_with=(("method", choices.WRAPPED),))


@dataclass(frozen=True)
class Settings:
    """The fields of :class:`~autoflip_flwr.experiment.config.Config`, which checks them."""

    name: str = _of_run("", rules.NAME, "Name of the run's folder. Empty: <method>-<dataset>")
    method: str = _of_run(
        "autoflip", rules.one_of(choices.METHODS), "Informed pruning, a dense baseline, or a rival (docs/methods.md)"
    )
    seed: int = _of_run(1, rules.SEED, "Of everything random")
    output_dir: str = _of_run("runs", rules.FOLDER_NAME, "Where the run's own folder is made")

    trackers: str = _of_run(
        "", rules.TRACKERS, "Also write the run for TensorBoard, Weights & Biases or MLflow, into the run's folder"
    )

    dataset: str = _of_data("digits", rules.DATASET, "The data set; own is the data of data-dir")
    data_dir: str = _of_data(
        "", rules.TEXT, "Existing folder that holds it. Empty: $AUTOFLIP_DATA, else torchvision downloads it"
    )
    max_examples_per_class: int = _of_data(
        0, rules.NOT_BELOW_ZERO, "Most training examples of a class, drawn by the seed, for quick runs. 0: all"
    )
    max_examples_per_node: int = _of_data(
        0, rules.NOT_BELOW_ZERO, "Most training examples of a node, drawn by the seed, for quick runs. 0: all"
    )
    input_size: int = _of_data(0, rules.NOT_BELOW_ZERO, "Height and width to which images are cropped. 0: as they are")
    augment: str = _of_data(
        "none", rules.one_of(choices.AUGMENTS), "Random changes of images in training; evaluation takes their middle"
    )
    split: str = _of_data(
        "dirichlet",
        rules.one_of(choices.SPLITS),
        "Among the nodes: evenly, by label skew, few classes for each node, shards of sorted labels, unequal amounts, "
        "or one writer, speaker or person for each node",
    )
    alpha: float = _of_data(
        0.3,
        rules.POSITIVE,
        "Of the Dirichlet split: the smaller, the more skewed",
        only_with=(("split", ("dirichlet",)),),
    )
    classes_per_client: int = _of_data(
        2, rules.COUNT, "Of the pathological split", only_with=(("split", ("pathological",)),)
    )
    shards_per_node: int = _of_data(2, rules.COUNT, "Of the shards split", only_with=(("split", ("shards",)),))
    size_spread: float = _of_data(
        1.0,
        rules.NOT_NEGATIVE,
        "Of the quantity split: standard deviation of the logarithm of the nodes' sizes",
        only_with=(("split", ("quantity",)),),
    )
    min_examples: int = _of_data(
        0,
        rules.NOT_BELOW_ZERO,
        "Fewest examples of a node; owners with fewer take no part. 0: what a small batch needs, or 1",
        only_with=(("split", ("dirichlet", "quantity", "natural")),),
    )
    nodes: int = _of_data(0, rules.NOT_BELOW_ZERO, "SuperNodes to wait for. 0: as many as connect, at least 2")
    node_timeout: float = _of_data(
        60.0, rules.POSITIVE, "Seconds without a new node after which a run no longer waits for more"
    )

    model: str = _of_clients("cnn", rules.MODEL, "The model")
    optimizer: str = _of_clients("adam", rules.one_of(choices.OPTIMIZERS), "Of the clients")
    lr: float = _of_clients(0.003, rules.POSITIVE, "Learning rate of the clients")
    lr_decay: float = _of_clients(1.0, rules.UP_TO_ONE, "The learning rate is multiplied by it after every round")
    momentum: float = _of_clients(0.0, rules.BELOW_ONE, "Of sgd", only_with=(("optimizer", ("sgd",)),))
    weight_decay: float = _of_clients(0.0, rules.NOT_NEGATIVE, "Of the clients' optimiser")
    batch_size: int = _of_clients(16, rules.COUNT, "Examples a step")
    local_epochs: int = _of_clients(3, rules.COUNT, "Epochs that a client trains in a round")
    clip_norm: float = _of_clients(
        0.0,
        rules.NOT_NEGATIVE,
        "Longer gradients of a step are scaled to this length, over kept parameters. 0: none",
    )
    lr_power: float = _of_pruning_clients(
        0.25,
        rules.UNIT,
        "The learning rate is divided by the density to this power, while what is pruned is zero. Explorers' is not",
    )
    proximal_mu: float = _of_clients(
        0.0,
        rules.NOT_NEGATIVE,
        "FedProx's mu: how strongly training is drawn to the model of the round. 0: not at all. Explorers are not",
    )
    precision: str = _of_clients(
        "float32",
        rules.one_of(choices.PRECISIONS),
        "In which clients compute; parameters stay float32. bfloat16 is fast only where the hardware has it",
    )
    device: str = _of_clients(
        "auto", rules.one_of(choices.DEVICES), "Where clients train. auto: the best that there is"
    )

    num_server_rounds: int = _of_rounds(20, rules.COUNT, "Rounds after the exploration")
    fraction_train: float = _of_rounds(1.0, rules.UP_TO_ONE, "Share of the nodes that train in a round")
    fraction_evaluate: float = _of_rounds(
        0.0, rules.UNIT, "Share of the nodes that evaluate in a round; the server evaluates centrally in any case"
    )
    evaluate_every: int = _of_rounds(
        0,
        rules.NOT_BELOW_ZERO,
        "The server evaluates the model every so many rounds, and after the last. 0: as often as costs less than a "
        "tenth of the training",
    )
    test_examples: int = _of_rounds(
        0, rules.NOT_BELOW_ZERO, "Test examples of these evaluations, the same ones in every run. 0: all"
    )
    round_timeout: float = _of_rounds(
        600.0, rules.POSITIVE, "Seconds after which a round goes on without the missing replies"
    )
    server_momentum: float = _of_rounds(0.0, rules.BELOW_ONE, "Above 0 the server runs FedAvgM")
    server_learning_rate: float = _of_rounds(1.0, rules.POSITIVE, "Of FedAvgM, which the server runs where it is not 1")

    sparsity: float = _of_pruning(0.7, rules.BELOW_ONE, "Share of the prunable parameters to prune")
    scope: str = _of_ranking(
        "global",
        rules.one_of(choices.SCOPES),
        "Scores are ranked over the whole model, or per layer: of equal density, or by ERK",
    )
    normalisation: str = _of_scores(
        "none", rules.one_of(choices.NORMALISATIONS), "Of the scores before they are ranked"
    )
    gamma: float = _of_scores(
        1.0, rules.NOT_NEGATIVE, "Power of the client agreement in the score; 0 leaves agreement out"
    )
    prune_biases: bool = _of_pruning(False, rules.FLAG, "Whether biases are prunable, too")
    initial: str = _of_exploration(
        "",
        rules.one_of(("", *choices.INITIALS)),
        "Round 1 starts from the initial weights, or the explorers' average. Empty: explorers, or scratch with outside "
        "= initial",
    )
    outside: str = _of_pruning(
        "zero",
        rules.one_of(choices.OUTSIDE),
        "What stands outside the mask: zero, or the values with which training began, for fine-tuning",
    )
    rank_by: str = _of_exploration(
        "",
        rules.one_of(("", *choices.RANKS)),
        "What ranks entries for the first mask: the explorers' deltas, the magnitude of their average, or chance, with "
        "as many entries of each layer as their deltas say. Empty: magnitude, or deviation with outside = initial",
    )
    schedule: str = _of_schedule(
        "",
        rules.one_of(("", *choices.SCHEDULES)),
        "How the mask changes during training (docs/methods.md#schedules). Empty: gradual, or static with outside = "
        "initial",
    )
    initial_density: float = _of_fall(
        0.0, rules.UNIT, "Density of round 1, not below the target's. 0: 0.8, or 1 with method = gradual"
    )
    fall: float = _of_fall(0.6, rules.UP_TO_ONE, "Share of the rounds within which the density falls to the target")
    fall_every: int = _of_fall(1, rules.COUNT, "Rounds between two steps of the density")
    fall_power: float = _of_fall(3.0, rules.POWER, "Exponent of the fall: the higher, the more is pruned early")
    auto_sparsity: bool = _of_fall(
        False, rules.FLAG, "Find the sparsity while the density falls (docs/guide.md#choosing-a-sparsity)"
    )
    drop_by: str = _of_fall("magnitude", rules.one_of(choices.DROPS), "By what entries are dropped")
    drop_scope: str = _of_fall(
        "global",
        rules.one_of(choices.FALL_SCOPES),
        "Among which entries they are dropped: as scope, or by the densities per layer that the exploration finds",
    )
    adjust_every: int = _of_change(
        0,
        rules.NOT_BELOW_ZERO,
        "Rounds between two exchanges of entries. 0: as the method's authors, 10, 15 or 50; 5 by agreement, 1 by "
        "participants",
    )
    adjust_share: float = _of_regrowth(
        0.0,
        rules.BELOW_ONE,
        "Share of the kept entries that may be exchanged. 0: as the method's authors, 0.3, or 0.01 for feddst",
    )
    adjust_after: float = _setting(
        "Pruning",
        0.0,
        rules.BELOW_ONE,
        "Share of the rounds before which nothing is exchanged",
        only_with=(("schedule", choices.REGROWING_SCHEDULES),),
    )
    adjust_until: float = _of_end(
        0.0,
        rules.UNIT,
        "Share of the rounds after which nothing is exchanged. 0: as the method's authors, 0.6, or 0.5 for feddst",
    )
    explorers: float = _of_explorers(
        0.0,
        rules.UNIT,
        "Share of the nodes that explore. 0: a quarter of them, but at least 5, with method = autoflip and a mask that "
        "changes; else all",
    )
    exploration_batches: int = _of_batches(1, rules.COUNT, "Batches in which they explore")
    exploration_epochs: int = _of_training_explorers(1, rules.COUNT, "Most epochs that an explorer trains")
    exploration_patience: int = _of_training_explorers(
        2, rules.COUNT, "Epochs without a better loss after which an explorer stops"
    )
    exploration_timeout: float = _of_round_0(
        0.0, rules.NOT_NEGATIVE, "Seconds for each batch of explorers. 0: as round-timeout"
    )
    exploration_weighting: str = _of_batches(
        "uniform", rules.one_of(choices.WEIGHTINGS), "Explorers count alike, or by their number of examples"
    )
    exploration_values: str = _of_round_0(
        "log8", rules.one_of(choices.DELTAS), "How explorers' deltas travel: a byte a parameter or less, or as they are"
    )
    min_explorers: int = _of_explorers(
        2, rules.COUNT, "Fewest explorers whose results make a mask; not more than nodes, where that is set"
    )
    exploration: str = _of_exploration(
        "", rules.TEXT, "Existing file with the exploration of an earlier run, to be used instead of exploring"
    )

    values: str = _of_values("float32", rules.CODING, "How values travel in the rounds")
    values_up: str = _of_values("", rules.OWN_CODING, "The same for replies alone. Empty: as values")
    values_down: str = _of_values("", rules.OWN_CODING, "The same for messages to the nodes alone. Empty: as values")

    min_replies: int = _of_safety(1, rules.COUNT, "A round in which fewer replies count leaves the model as it was")
    norm_factor: float = _of_safety(
        1000.0,
        rules.ABOVE_ONE,
        "A reply is rejected whose update is so many times longer than other replies and its work explain; from the "
        "default on only if earlier rounds do not explain it either, and it is longer than the model",
    )
    max_examples: float = _of_safety(1e9, rules.POSITIVE, "A reply that says it has more examples is rejected")
    checkpoints: int = _of_safety(
        2, rules.NOT_BELOW_ZERO, "Rounds whose whole state is kept in the run's folder. 0: none"
    )
    resume: str = _of_safety(
        "",
        rules.TEXT,
        "Existing folder of an interrupted run's record: go on after its last finished round. All else must be as it "
        "was, but for num-server-rounds, which may grow, and what changes no result",
    )

    @property
    def chosen(self) -> dict[str, Value]:
        """The settings of `autoflip` whose defaults depend on others, as they are in force."""
        tuning = self.outside == "initial"  # nothing is sparse then, and no client has the explorers' average
        schedule = self.schedule or ("static" if tuning else "gradual")
        return {
            "rank_by": self.rank_by or ("deviation" if tuning else "magnitude"),
            "schedule": schedule,
            "explorers": self.explorers or (0.0 if self.method == "autoflip" and schedule != "static" else 1.0),
            "initial": self.initial or ("scratch" if tuning else "explorers"),
            "initial_density": self.initial_density or (1.0 if self.method == "gradual" else 0.8),
        }

    @property
    def asked(self) -> int:
        """How many of `nodes` explore."""
        return asked_among(self.nodes, float(self.chosen["explorers"]) or None, self.min_explorers)

    @property
    def schedules(self) -> list[str]:
        """The parts of the schedule in force; of other methods than `autoflip`, the method's name."""
        return str(self.chosen["schedule"]).split("+") if self.method == "autoflip" else [self.method]

    @property
    def falls(self) -> bool:
        """Whether the density falls while the run trains."""
        return "gradual" in self.schedules

    @property
    def wrapped(self) -> bool:
        """Whether the run takes place in `Pruned`; else it is Flower's own strategy."""
        coded = {self.values_up or self.values, self.values_down or self.values} != {"float32"}
        return self.method in choices.WRAPPED or coded
