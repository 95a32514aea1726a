"""Read a suite: which runs a YAML file describes.

A suite has these keys, all but ``data`` and ``methods`` optional:

- ``name``: of its folder; default: that of the file.
- ``recipe``: a TOML file of settings, by its path from the suite's file, below ``defaults``.
- ``defaults``: settings of every run.
- ``data``, ``methods``: lists of settings. Each entry of one is combined with each of the other.
- ``seeds``: a list.
- ``overrides``: a list of ``when`` (settings that a run must have, with a value or a list of values) and ``set``.
- ``leave-out``: a list of such ``when``; runs that have these settings are not made.
- ``target-accuracy``: accuracy in (0, 1) to which the report counts bytes, FLOPs and rounds.

A list of values makes a run for each of them. ``density`` may be given for ``sparsity``. Later settings win over
earlier ones: the app's defaults, ``recipe``, ``defaults``, ``data``, ``methods``, ``seeds``, ``overrides``, the
command line.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from autoflip_flwr.experiment.config import DEFAULT_NODES, Config, setting
from autoflip_flwr.experiment.rules import ConfigError, Rule, Value, allowed, shown
from autoflip_flwr.experiment.suite.marked import Marked, read
from autoflip_flwr.experiment.toml import flatten, read_toml

_KEYS = ("name", "recipe", "defaults", "data", "methods", "seeds", "overrides", "leave-out", "target-accuracy")
_OURS = ("name", "output-dir", "resume", "exploration")
"""Settings that the suite itself gives its runs."""

DENSITY = "density"
MAX_RUNS = 10_000

Axes = dict[str, list[Marked]]
"""Settings by key, each with one or more values."""


@dataclass(frozen=True)
class Suite:
    """A suite as its file describes it: the settings of its runs, in order, without those that occur twice."""

    name: str
    path: Path
    text: str
    runs: tuple[Config, ...]
    target_accuracy: float | None = None


@dataclass(frozen=True)
class _Override:
    when: Axes
    set: dict[str, Marked] = field(default_factory=dict)

    def fits(self, chosen: Mapping[str, Marked]) -> bool:
        """Return whether a run has these settings; one that is not chosen has its default."""
        return all(_value_of(chosen, key) in [each.value for each in values] for key, values in self.when.items())


def read_suite(path: Path, given: Mapping[str, Value] | None = None) -> Suite:
    """Read a suite from a YAML file; ``given`` are settings from the command line, which win over all others.

    Raises
    ------
    ConfigError
        If it is malformed. The message names file, line and key.
    """
    top = read(path)
    parts = top.mapping()
    for key, value in parts.items():
        if key not in _KEYS:
            value.wrong(f"no such key; a suite has {', '.join(_KEYS)}")
    recipe = _recipe(parts["recipe"]) if "recipe" in parts else {}
    defaults = _axes(parts["defaults"]) if "defaults" in parts else {}
    overrides = [_override(each) for each in parts["overrides"].entries()] if "overrides" in parts else []
    left_out = [_Override(_when(each)) for each in parts["leave-out"].entries()] if "leave-out" in parts else []
    for key in ("data", "methods"):
        if key not in parts or not parts[key].entries():
            top.wrong(f"{key}: is missing; give a list with at least one entry")
    entries = [[_axes(each) for each in parts[key].entries()] for key in ("data", "methods")]
    seeds: list[Axes] = [{"seed": _values(parts["seeds"], "seed")}] if "seeds" in parts else [{}]
    runs: dict[Config, None] = {}
    # seeds outermost, so that all methods can be compared early
    for seed in _chosen(seeds[0]):
        for data, method in itertools.product(*entries):
            block = {**recipe, **defaults, **data, **method}
            for chosen in _chosen(block):
                both = {**chosen, **seed}
                if not any(each.fits(both) for each in left_out):
                    runs[_config(both, overrides, given or {}, top)] = None
                if len(runs) > MAX_RUNS:
                    top.wrong(f"more than {MAX_RUNS:,} runs")
    if not runs:
        parts["leave-out"].wrong("leaves no run")
    return Suite(_name(parts, path), path, path.read_text("utf-8"), tuple(runs), _target(parts.get("target-accuracy")))


def _config(
    chosen: Mapping[str, Marked], overrides: list[_Override], given: Mapping[str, Value], top: Marked
) -> Config:
    settled = dict(chosen)
    for each in overrides:
        if each.fits(settled):
            settled |= each.set
    values = {key: each.value for key, each in settled.items()} | dict(given)
    values["nodes"] = values.get("nodes") or DEFAULT_NODES
    try:
        return Config.from_run_config(values)
    except ConfigError as error:
        named = re.findall(r"([a-z-]+) = ", str(error))
        at = next((settled[key] for key in named if key in settled), top)
        raise ConfigError(f"{at.path}, line {at.line}: {error}") from None


def _axes(entry: Marked) -> Axes:
    found: Axes = {}
    for key, value in entry.mapping().items():
        name = "sparsity" if key == DENSITY else key
        if name in found:
            value.wrong("give density or sparsity, not both")
        found[name] = _values(value, key)
    return found


def _values(marked: Marked, key: str) -> list[Marked]:
    """Return the checked values of a setting: one, or a list of them."""
    entries = marked.entries()
    if not entries:
        marked.wrong("a value is missing")
    return [_one(each, key) for each in entries]


def _one(marked: Marked, key: str) -> Marked:
    if key in _OURS:
        marked.wrong("the suite itself sets it")
    if isinstance(marked.value, list | dict) or marked.value is None:
        marked.wrong("must be a value, or a list of values")
    try:
        if key == DENSITY:
            return _sparsity(marked)
        rule: Rule = setting(key, marked.value).metadata["rule"]
        return replace(marked, value=allowed(key, rule, _number(rule, marked.value)))
    except ConfigError as error:
        raise ConfigError(f"{marked.path}, line {marked.line}: {marked.key}: {error}") from None


def _sparsity(marked: Marked) -> Marked:
    density = _number(setting("sparsity").metadata["rule"], marked.value)
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        marked.wrong(f"density = {shown(marked.value)}: must be a number in (0, 1]")
    return replace(marked, value=round(1 - float(density), 12))


def _number(rule: Rule, value: Any) -> Any:
    """Read ``1e-3`` as a number, as everyone but YAML 1.1 does."""
    if rule.kind is float and isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    return value


def _chosen(axes: Axes) -> Iterator[dict[str, Marked]]:
    """Yield each combination of the values."""
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def _value_of(chosen: Mapping[str, Marked], key: str) -> object:
    return chosen[key].value if key in chosen else setting(key).default


def _when(entry: Marked) -> Axes:
    found = _axes(entry)
    if not found:
        entry.wrong("names no settings")
    return found


def _override(entry: Marked) -> _Override:
    parts = entry.mapping()
    if set(parts) != {"when", "set"}:
        entry.wrong("must have the keys when and set")
    values = _axes(parts["set"])
    for key, each in values.items():
        if len(each) > 1:
            each[1].wrong(f"{key} must have one value here")
    return _Override(_when(parts["when"]), {key: each[0] for key, each in values.items()})


def _recipe(marked: Marked) -> Axes:
    if not isinstance(marked.value, str):
        marked.wrong("must be the path of a TOML file")
    path = marked.path.parent / marked.value
    if not path.is_file():
        marked.wrong(f"{path}: no such file")
    settings = flatten(read_toml(path))
    return {
        key: [_one(Marked(value, marked.line, f"recipe {path.name}: {key}", marked.path), key)]
        for key, value in settings.items()
    }


def _name(parts: Mapping[str, Marked], path: Path) -> str:
    if "name" not in parts:
        return re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-.") or "suite"
    name = parts["name"].value
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name) or not name.strip("."):
        parts["name"].wrong("must be 1 to 64 letters, digits, '.', '_' or '-'")
    return name


def _target(marked: Marked | None) -> float | None:
    if marked is None:
        return None
    if isinstance(marked.value, bool) or not isinstance(marked.value, int | float) or not 0 < marked.value < 1:
        marked.wrong("must be a number in (0, 1), such as 0.9")
    return float(marked.value)
