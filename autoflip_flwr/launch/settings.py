"""Make the table of the app's settings, which `autoflip settings` prints, from what `Config` declares."""

import textwrap
from collections.abc import Iterator
from dataclasses import fields
from itertools import groupby
from typing import NamedTuple

from autoflip_flwr.core.choices import METHODS
from autoflip_flwr.experiment.config import Config, key_of
from autoflip_flwr.experiment.declared import Needs
from autoflip_flwr.experiment.rules import Rule, Value
from autoflip_flwr.experiment.toml import literal

WIDTH = 100
_NAMES, _DEFAULTS = 23, 14
"""Widths of the first two columns."""

_PAGE = """\
<!-- Made by: autoflip settings --markdown > docs/settings.md -->

# Settings of the app

All settings of the shipped app: in `[tool.flwr.app.config]` of `pyproject.toml`, in a file for `autoflip run --config`,
or after `-c`. Types are TOML's; an integer does where a number is asked for."""


class Setting(NamedTuple):
    """A declared setting. It has an effect only if one of `only_with` is given, or if that is empty."""

    key: str
    default: Value
    section: str
    rule: Rule
    meaning: str
    only_with: tuple[Needs, ...]

    @property
    def told(self) -> str:
        """Its meaning and the allowed values, in sentences."""
        allowed = self.rule.allowed
        return f"{self.meaning}. {allowed[0].upper()}{allowed[1:]}."


def settings() -> list[Setting]:
    """Return all settings, in the order of their declaration."""
    defaults = Config().as_dict()
    return [Setting(key_of(each), defaults[key_of(each)], **each.metadata) for each in fields(Config)]


def table() -> str:
    """Return the settings as plain text, section by section, at most `WIDTH` columns wide."""
    return "\n\n".join("\n".join([title, *_rows(its)]) for title, its in sections())


def markdown() -> str:
    """Return the settings as the page `docs/settings.md`."""
    parts = [_PAGE]
    for title, its in sections():
        rows = [f"| `{each.key}` | `{literal(each.default)}` | {_cell(each)} |" for each in its]
        parts.append("\n".join([f"## {title}\n", "| setting | default | meaning |", "|---|---|---|", *rows]))
    return "\n\n".join(parts)


def sections() -> Iterator[tuple[str, list[Setting]]]:
    """Yield the titles of the sections, each with its settings."""
    for name, group in groupby(settings(), key=lambda each: each.section):
        its = list(group)
        shared = {each.only_with for each in its}
        if len(shared) == 1:
            yield name + _only(its[0]), its
        else:
            yield name, [each._replace(meaning=each.meaning + _only(each)) for each in its]


def _only(setting: Setting) -> str:
    if not setting.only_with:
        return ""
    parts = []
    word = "only"
    for key, values in setting.only_with:
        others = [each for each in METHODS if each not in values] if key == "method" else []
        inverse = len(setting.only_with) == 1 and 0 < len(others) < len(values)
        word, told = ("not", others) if inverse else ("only", list(values))
        parts.append(f"{key} = {' or '.join(map(literal, told))}")
    return f" ({word} with {', or '.join(parts)})"


def _rows(its: list[Setting]) -> Iterator[str]:
    for each in its:
        first, *others = textwrap.wrap(each.told, WIDTH - _NAMES - _DEFAULTS - 2, break_on_hyphens=False)
        yield f"  {each.key:<{_NAMES}}{literal(each.default):<{_DEFAULTS}}{first}"
        yield from (" " * (2 + _NAMES + _DEFAULTS) + line for line in others)


def _cell(each: Setting) -> str:
    return each.told.replace("<", "&lt;").replace("|", "\\|")
