"""Settings that do nothing beside others, which a user who has typed them should know."""

from collections.abc import Collection

from autoflip_flwr.experiment.config import METHODS, Config, Value, shown

_PRUNING = tuple(method for method in METHODS if method != "fedavg")
_OF_PRUNING = (
    "sparsity",
    "scope",
    "prune-biases",
    "values",
    "values-up",
    "values-down",
    "min-replies",
    "norm-factor",
    "max-examples",
    "checkpoints",
)
_OF_ASKING = (
    "explorers",
    "exploration-batches",
    "exploration-weighting",
    "exploration-values",
    "exploration-timeout",
    "min-explorers",
)
_OF_AUTOFLIP = ("normalisation", "gamma", "initial", "exploration-epochs", "exploration-patience", "exploration")
_ONLY_WITH: tuple[tuple[str, tuple[Value, ...], tuple[str, ...]], ...] = (
    ("method", _PRUNING, _OF_PRUNING),
    ("method", ("autoflip", "snip"), _OF_ASKING),
    ("method", ("autoflip",), _OF_AUTOFLIP),
    ("split", ("dirichlet",), ("alpha",)),
    ("split", ("pathological",), ("classes-per-client",)),
    ("optimizer", ("sgd",), ("momentum",)),
)
"""Settings that do nothing unless another one has a certain value."""


def idle(config: Config, given: Collection[str]) -> list[str]:
    """Name those of the ``given`` settings (kebab-case keys) that do nothing: a line for each reason."""
    settings, lines = config.as_dict(), []
    for key, values, names in _ONLY_WITH:
        without = [name for name in names if name in given]
        if without and settings[key] not in values:
            verb = "does" if len(without) == 1 else "do"
            now, needed = shown(settings[key]), " or ".join(map(shown, values))
            lines.append(f"{', '.join(without)} {verb} nothing with {key} = {now}, only with {needed}")
    return lines
