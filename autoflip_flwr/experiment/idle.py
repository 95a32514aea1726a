"""Find settings that have no effect because of other settings."""

from collections.abc import Collection
from dataclasses import fields

from autoflip_flwr.experiment.config import Config, Value, key_of, shown


def idle(config: Config, given: Collection[str]) -> list[str]:
    """Name the ``given`` settings (kebab-case keys) that have no effect: one line per reason."""
    settings = config.as_dict()
    reasons: dict[tuple[str, tuple[Value, ...]], list[str]] = {}
    for each in fields(Config):
        needed = each.metadata["only_with"]
        if needed and key_of(each) in given and settings[needed[0]] not in needed[1]:
            reasons.setdefault(needed, []).append(key_of(each))
    return [
        f"{', '.join(names)} {'does' if len(names) == 1 else 'do'} nothing with {key} = {shown(settings[key])}, only "
        f"with {' or '.join(map(shown, values))}"
        for (key, values), names in reasons.items()
    ]


def without_effect(config: Config) -> list[str]:
    """Return the kebab-case keys of all settings that have no effect."""
    settings = config.as_dict()
    needs = {key_of(each): each.metadata["only_with"] for each in fields(Config)}
    return [key for key, needed in needs.items() if needed and settings[needed[0]] not in needed[1]]


def effective(config: Config) -> dict[str, Value]:
    """Return all settings by their kebab-case keys; those that have no effect have their defaults."""
    defaults: dict[str, Value] = {key_of(each): each.default for each in fields(Config)}  # type: ignore[misc]
    return config.as_dict() | {key: defaults[key] for key in without_effect(config)}
