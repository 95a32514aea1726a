"""Find settings that have no effect because of other settings."""

from collections.abc import Collection
from dataclasses import fields

from autoflip_flwr.experiment.config import Config, key_of
from autoflip_flwr.experiment.declared import Needs
from autoflip_flwr.experiment.rules import shown

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


def without_effect(config: Config) -> list[str]:
    """Return the kebab-case keys of all settings that have no effect."""
    return [key_of(each) for each in fields(Config) if not config.applies(each)]
