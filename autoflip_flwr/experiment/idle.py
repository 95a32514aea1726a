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


def effective(config: Config) -> dict[str, Value]:
    """Return all settings by their kebab-case keys; those that have no effect have their defaults."""
    settings = config.as_dict()
    for each in fields(Config):
        needed = each.metadata["only_with"]
        if needed and settings[needed[0]] not in needed[1]:
            default: Value = each.default  # type: ignore[assignment]  # every setting has one
            settings[key_of(each)] = default
    return settings
