"""All settings of a run, checked.

Flower itself checks neither types nor ranges, so both the command line and the server app pass their values through
`Config`.
"""

import difflib
import os
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from autoflip_flwr.core import choices
from autoflip_flwr.experiment.declared import Settings
from autoflip_flwr.experiment.rules import ConfigError, Value, allowed, parts_of, shown
from autoflip_flwr.experiment.together import check_together


@dataclass(frozen=True)
class Config(Settings):
    """All settings of one run. A value out of range raises `ConfigError`.

    In TOML and on the command line the names are in kebab case: `batch-size` for `batch_size`. Numbers are finite. An
    integer is accepted for a float and converted. `autoflip settings` prints the description of each field.
    """

    def __post_init__(self) -> None:
        for each in fields(self):
            object.__setattr__(self, each.name, allowed(key_of(each), each.metadata["rule"], getattr(self, each.name)))
        check_together(self)

    def applies(self, setting: "Field[Any]") -> bool:
        """Return whether a setting has an effect, given the others."""
        needed = setting.metadata["only_with"]
        given = [name for name, values in needed if getattr(self, name) in values]
        if not needed or any(self.applies(_by_key()[key]) for key in given):
            return True
        return needed == (("method", choices.WRAPPED),) and self.wrapped

    def in_effect(self, name: str) -> Any:
        """Return a setting by its field's name, or its default where it has no effect."""
        each = type(self).__dataclass_fields__[name]
        return getattr(self, name) if self.applies(each) else each.default

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
        return {key: self.as_dict()[key] for key in ("model", "dataset", "input-size", "seed")}

    def decisive(self) -> dict[str, Value]:
        """Return the settings that decide what a run computes, and so must not change when it is resumed."""
        return {key: value for key, value in self.as_dict().items() if key not in _FREE}

    @property
    def tracker_names(self) -> tuple[str, ...]:
        """The names in `trackers`."""
        return tuple(parts_of(self.trackers)) if self.trackers else ()

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


DEFAULT_NODES = 10
"""SuperNodes of a run on one machine whose settings name no number."""

RESULTLESS = (
    "name",
    "output-dir",
    "data-dir",
    "node-timeout",
    "round-timeout",
    "exploration-timeout",
    "exploration",
    "checkpoints",
    "resume",
    "trackers",
)
"""Settings that do not change what a run computes."""


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


def key_of(setting: "Field[Any]") -> str:
    """Return the name of a field of `Config` in TOML and on the command line."""
    return setting.name.replace("_", "-")
