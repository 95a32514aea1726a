"""Settings that do nothing beside others, which a user who has typed them should know."""

from collections.abc import Collection

from autoflip_flwr.experiment.config import Config, Value, shown

_OF_AUTOFLIP = (
    "sparsity",
    "scope",
    "normalisation",
    "gamma",
    "prune-biases",
    "initial",
    "outside",
    "explorers",
    "exploration-rounds",
    "exploration-epochs",
    "exploration-patience",
    "exploration-weighting",
    "exploration-values",
    "exploration-timeout",
    "min-explorers",
    "values",
    "values-up",
    "values-down",
    "exploration",
    "min-replies",
    "norm-factor",
    "max-examples",
    "checkpoints",
)
_ONLY_WITH: tuple[tuple[str, Value, tuple[str, ...]], ...] = (
    ("method", "autoflip", _OF_AUTOFLIP),
    ("split", "dirichlet", ("alpha",)),
    ("split", "pathological", ("classes-per-client",)),
    ("optimizer", "sgd", ("momentum",)),
)
"""Settings that do nothing unless another one has a certain value."""


def idle(config: Config, given: Collection[str]) -> list[str]:
    """Name those of the ``given`` settings (kebab-case keys) that do nothing: a line for each reason."""
    settings, lines = config.as_dict(), []
    for key, value, names in _ONLY_WITH:
        without = [name for name in names if name in given]
        if without and settings[key] != value:
            verb = "does" if len(without) == 1 else "do"
            now, needed = shown(settings[key]), shown(value)
            lines.append(f"{', '.join(without)} {verb} nothing with {key} = {now}, only with {needed}")
    return lines
