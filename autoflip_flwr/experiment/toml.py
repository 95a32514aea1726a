"""Read settings from TOML files and from Flower's `key=value` pairs, and write them as TOML."""

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoflip_flwr.experiment.rules import ConfigError, Value, shown

# What `flwr run -c` accepts as a pair. It silently ignores everything else; here that is an error.
_PAIR = re.compile(r"(\S+?)=('[^']*'|\"(?:[^\"\\]|\\.)*\"|\"[^\"]*\"|\S+)")


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file. Raise `ConfigError` with its name if it is missing or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from None


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Value]:
    """Return the settings of a TOML table by dotted keys, as Flower names those of nested tables.

    Raise `ConfigError` for a list or a date, which Flower does not accept.
    """
    flat: dict[str, Value] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, Value):
            flat[prefix + key] = value
        else:
            raise ConfigError(f"{prefix}{key} = {shown(value)}: must be a boolean, a number or a string")
    return flat


def parse_pairs(text: str) -> dict[str, Value]:
    """Read `key=value` pairs as `flwr run -c` does: TOML values, strings quoted, pairs separated by spaces.

    Raise `ConfigError` for anything else.
    """
    rest = _PAIR.sub(" ", text).split()
    if rest:
        raise ConfigError(f"-c {text!r}: {rest[0]!r} is not a key=value pair (no spaces around '=')")
    settings: dict[str, Value] = {}
    for key, value in _PAIR.findall(text):
        try:
            settings |= flatten(tomllib.loads(f"{key} = {value}"))
        except tomllib.TOMLDecodeError:
            hint = f'a string needs quotes: {key}="..."'
            if "\\" in value:
                path = value.strip("\"'").replace("\\", "/")
                hint = f'a path needs quotes, and no backslashes between double ones: {key}="{path}"'
            raise ConfigError(f"{key}={value}: not a TOML value ({hint})") from None
    return settings


def to_toml(settings: Mapping[str, Value]) -> str:
    """Return the settings as a TOML document."""
    return "".join(f"{key} = {literal(value)}\n" for key, value in settings.items())


def literal(value: Value) -> str:
    """Return the value as TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
