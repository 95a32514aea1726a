"""Find settings that have no effect because of other settings."""

from collections.abc import Collection
from dataclasses import fields

from autoflip_flwr.experiment.config import RESULTLESS, Config, key_of
from autoflip_flwr.experiment.declared import Needs
from autoflip_flwr.experiment.rules import Value, shown

FEW = 5
"""So many values are listed; more would hide what the warning is about."""


def idle(config: Config, given: Collection[str]) -> list[str]:
    """Name the ``given`` settings (kebab-case keys) that have no effect: one line per reason."""
    settings = config.as_dict()
    reasons: dict[tuple[Needs, ...], list[str]] = {}
    for each in fields(Config):
        if key_of(each) in given and not config.applies(each):
            reasons.setdefault(each.metadata["only_with"], []).append(key_of(each))
    return [
        f"{', '.join(names)} {'does' if len(names) == 1 else 'do'} nothing with "
        + " and ".join(
            f"{key} = {shown(settings[key])}"
            + (f", only with {' or '.join(map(shown, values))}" if len(values) <= FEW else "")
            for key, values in needed
        )
        for needed, names in reasons.items()
    ]


def with_effect(config: Config) -> dict[str, Value]:
    """Return the settings that decide what a run computes, by their kebab-case keys, in the order of declaration."""
    active = {key_of(each) for each in fields(Config) if config.applies(each)} - {*RESULTLESS}
    return {key: value for key, value in config.as_dict().items() if key in active}
