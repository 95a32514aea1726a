"""Read YAML, and keep the line of every key and value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from autoflip_flwr.experiment.rules import ConfigError

MAX_BYTES = 2**20
MAX_DEPTH = 10


@dataclass(frozen=True)
class Marked:
    """A value of a YAML file with its line, counted from 1.

    ``value`` is a bool, int, float, str or None, a list of ``Marked``, or a dict of ``Marked`` by text keys. ``key`` is
    the key that it stands under, with those around it (``defaults.lr``).
    """

    value: Any
    line: int
    key: str
    path: Path

    def wrong(self, words: str) -> NoReturn:
        """Raise a ``ConfigError`` that names file, line and key."""
        raise ConfigError(f"{self.path}, line {self.line}: {f'{self.key}: ' if self.key else ''}{words}")

    def mapping(self) -> dict[str, Marked]:
        """Return the value, which must be a mapping; an empty one may be left out."""
        if self.value is None:
            return {}
        if not isinstance(self.value, dict):
            self.wrong(f"must be settings, one 'key: value' per line, not {_kind(self.value)}")
        return self.value

    def entries(self) -> list[Marked]:
        """Return the value as a list; anything else is a list of one."""
        return self.value if isinstance(self.value, list) else [] if self.value is None else [self]


def read(path: Path) -> Marked:
    """Read a YAML file. Only plain values are read: no tags, no aliases, no duplicate keys.

    Raises
    ------
    ConfigError
        If the file cannot be read or is no such YAML; with the line.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_BYTES:,} bytes, so hardly a suite")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file in UTF-8") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not YAML: {' '.join(filter(None, (error.problem, error.context)))}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if node is None:
        raise ConfigError(f"{path}: empty")
    return _marked(node, "", path, 0, set())


def _marked(node: yaml.Node, key: str, path: Path, depth: int, seen: set[int]) -> Marked:
    at = Marked(None, node.start_mark.line + 1, key, path)
    if id(node) in seen:
        at.wrong("an alias (*) is not allowed: write the values again")
    if depth > MAX_DEPTH:
        at.wrong(f"nested more than {MAX_DEPTH} deep")
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        return Marked(_mapping(node, at, depth, seen), at.line, key, path)
    if isinstance(node, yaml.SequenceNode):
        return Marked([_marked(each, key, path, depth + 1, seen) for each in node.value], at.line, key, path)
    try:
        value = yaml.SafeLoader("").construct_object(node)
    except (yaml.YAMLError, ValueError) as error:
        at.wrong(f"{node.value!r} cannot be read: {' '.join(str(error).split())}")
    if value is not None and not isinstance(value, bool | int | float | str):
        at.wrong(f"{node.value!r} is read as {_kind(value)}: put it in quotes")
    if isinstance(value, float) and not math.isfinite(value):
        at.wrong("must be a finite number")
    return Marked(value, at.line, key, path)


def _mapping(node: yaml.MappingNode, at: Marked, depth: int, seen: set[int]) -> dict[str, Marked]:
    found: dict[str, Marked] = {}
    for name, value in node.value:
        under = Marked(None, name.start_mark.line + 1, at.key, at.path)
        if not isinstance(name, yaml.ScalarNode):
            under.wrong("a key must be a word")
        if name.value in found:
            under.wrong(f"{name.value} is there twice, first in line {found[name.value].line}")
        inner = f"{at.key}.{name.value}" if at.key else name.value
        found[name.value] = _marked(value, inner, at.path, depth + 1, seen)
    return found


def _kind(value: object) -> str:
    if isinstance(value, list):
        return "a list"
    return "a mapping" if isinstance(value, dict) else f"the {type(value).__name__} {value!r}"
