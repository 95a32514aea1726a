"""Group runs: a section per data set, split and model, and in it a row per setting, over the seeds or not."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from autoflip_flwr.experiment.config import RESULTLESS, Config, key_of
from autoflip_flwr.experiment.record.suites import Entry
from autoflip_flwr.experiment.report.points import Point, final_accuracy, mean_curve, points

TARGET_SHARE = 0.95
"""Without a target of the user's, it is this share of FedAvg's accuracy."""

_FIRST = ("name", "method", "sparsity", "seed")
"""Settings that a row is always named by, where they differ."""
_DEFAULTS = Config().as_dict()
_ONLY_WITH: Mapping[str, Any] = {key_of(each): each.metadata["only_with"] for each in fields(Config)}
_OF_DATA = {key_of(each) for each in fields(Config) if each.metadata["section"] == "Data and nodes"}
_OF_SECTION = [key for key in _ONLY_WITH if key == "model" or key in _OF_DATA - {*RESULTLESS, "nodes"}]
"""Settings that decide the section: accuracies of different ones are not comparable."""


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seed alone, or a single run. ``number`` decides the colour and marker."""

    number: int
    label: str
    varies: Mapping[str, Any]
    entries: tuple[Entry, ...]

    @cached_property
    def evaluated(self) -> list[tuple[Point, ...]]:
        """The evaluations of each run."""
        return [points(entry.run) for entry in self.entries]

    @cached_property
    def curve(self) -> list[tuple[Point, float]]:
        """The mean over the runs, with the standard deviation of the accuracy."""
        return mean_curve(self.evaluated)

    @property
    def accuracies(self) -> list[float]:
        """The accuracy of each run: the mean of its last five evaluated rounds."""
        return [value for value in map(final_accuracy, self.evaluated) if value is not None]


@dataclass(frozen=True)
class Section:
    """The rows of one data set, split and model; ``target`` is an accuracy, and ``target_told`` says where from."""

    title: str
    settings: Mapping[str, Any]
    rows: tuple[Row, ...]
    target: float | None
    target_told: str

    @property
    def anchor(self) -> str:
        """The title as an identifier for links and files."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


def with_differences(entries: Sequence[Entry]) -> list[Entry]:
    """Set each run's ``varies`` to the settings in which the runs differ."""
    keys = {key for entry in entries for key in entry.settings} - {*RESULTLESS}
    differing = {key for key in keys if len({repr(entry.settings.get(key)) for entry in entries}) > 1}
    if len({entry.settings.get("name") or "" for entry in entries}) > 1:
        differing.add("name")
    return [
        replace(entry, varies={key: value for key, value in entry.settings.items() if key in differing})
        for entry in entries
    ]


def sections(entries: Iterable[Entry], target: float | None, *, over_seeds: bool) -> list[Section]:
    """Group runs into sections and rows, in the order in which they come.

    With ``over_seeds`` the runs that differ in their seed alone are one row. ``target`` is an accuracy in (0, 1];
    without it each section takes 95 % of its FedAvg's accuracy, or of its best row's.
    """
    by_section: dict[str, list[Entry]] = {}
    for entry in entries:
        by_section.setdefault(repr(_of_section(entry.settings)), []).append(entry)
    shared = [_of_section(group[0].settings) for group in by_section.values()]
    titles = _told_apart([_title(each, shared) for each in shared], [str(n) for n in range(1, len(shared) + 1)])
    numbers: dict[str, int] = {}
    return [
        _section(title, settings, _rows(group, numbers, over_seeds=over_seeds), target)
        for title, settings, group in zip(titles, shared, by_section.values(), strict=True)
    ]


def density_of(sparsity: float) -> str:
    """Return the density of a sparsity, as in ``10%``."""
    return f"{100 * (1 - sparsity):.4g}%"


def told(key: str, value: object) -> str:
    """Return a setting's value as words: ``density 10%``, ``values int8``, ``prune-biases``."""
    if key in ("name", "method"):
        return str(value)
    if key == "sparsity" and isinstance(value, int | float):
        return f"density {density_of(value)}"
    if isinstance(value, bool):
        return key if value else f"no {key}"
    return f"{key} {'-' if value in ('', None) else value}"


def _section(title: str, settings: Mapping[str, Any], rows: list[Row], target: float | None) -> Section:
    if target is not None:
        return Section(title, settings, tuple(rows), target, "as set")
    reference = [row for row in rows if row.entries[0].settings.get("method") == "fedavg"]
    name = "FedAvg's accuracy" if reference else "the best row's accuracy"
    means = [statistics.fmean(row.accuracies) for row in reference or rows if row.accuracies]
    if not means:
        return Section(title, settings, tuple(rows), None, "")
    best = max(means)
    return Section(
        title, settings, tuple(rows), TARGET_SHARE * best, f"{TARGET_SHARE:.0%} of {name}, {100 * best:.2f} %"
    )


def _rows(entries: Sequence[Entry], numbers: dict[str, int], *, over_seeds: bool) -> list[Row]:
    grouped: dict[str, tuple[dict[str, Any], list[Entry]]] = {}
    for entry in entries:
        varies = _of_row(entry, over_seeds=over_seeds)
        key = repr(sorted(varies.items())) if over_seeds else str(entry.run.path)
        _, group = grouped.setdefault(key, (varies, []))
        if entry.seed not in [other.seed for other in group]:  # a setting without effect makes no further seed
            group.append(entry)
    labels = _labels(list(grouped.values()))
    labels = _told_apart(labels, [group[0].run.path.resolve().name for _, group in grouped.values()])
    return [
        Row(numbers.setdefault(label, len(numbers)), label, varies, tuple(group))
        for label, (varies, group) in zip(labels, grouped.values(), strict=True)
    ]


def _of_row(entry: Entry, *, over_seeds: bool) -> dict[str, Any]:
    hidden = {*_OF_SECTION, *(("seed", "name") if over_seeds else ())}
    return {
        key: value
        for key, value in entry.varies.items()
        if key not in hidden and _has_effect(key, entry.settings) and (key != "name" or value)
    }


def _labels(rows: Sequence[tuple[Mapping[str, Any], Sequence[Entry]]]) -> list[str]:
    """Name rows by what differs; the app's defaults are left out where the names differ without them."""
    brief = [_label({k: v for k, v in varies.items() if k in _FIRST or _DEFAULTS.get(k) != v}) for varies, _ in rows]
    if all(brief) and len(set(brief)) == len(brief):
        return brief
    return [_label(varies) or str(group[0].settings.get("method") or group[0].name) for varies, group in rows]


def _label(varies: Mapping[str, Any]) -> str:
    first = [key for key in _FIRST if key in varies and key != "seed"]
    others = [key for key in varies if key not in _FIRST]
    last = [key for key in ("seed",) if key in varies]
    return ", ".join(told(key, varies[key]) for key in (*first, *others, *last))


def _told_apart(labels: Sequence[str], others: Sequence[str]) -> list[str]:
    count = Counter(labels)
    return [f"{label}, {other}" if count[label] > 1 else label for label, other in zip(labels, others, strict=True)]


def _of_section(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: settings[key] for key in _OF_SECTION if key in settings and _has_effect(key, settings)}


def _title(settings: Mapping[str, Any], sections: Sequence[Mapping[str, Any]]) -> str:
    named = ("dataset", "split", "model")
    parts = [str(settings.get("dataset", "unknown data"))]
    if "split" in settings:
        of_split = {key: value for key, value in settings.items() if _of_split(key)}
        own = [told(key, value) for key, value in of_split.items() if value]  # 0 leaves it to the app
        parts.append(" ".join([str(settings["split"]), *(f"({each})" for each in own)]))
    if "model" in settings:
        parts.append(str(settings["model"]))
    for key, value in settings.items():
        rest = key not in named and not _of_split(key)
        if rest and len({repr(other.get(key)) for other in sections}) > 1:
            parts.append(told(key, value))
    return ", ".join(parts)


def _of_split(key: str) -> bool:
    return any(name == "split" for name, _ in _ONLY_WITH[key])


def _has_effect(key: str, settings: Mapping[str, Any]) -> bool:
    needed = _ONLY_WITH.get(key)
    return not needed or any(name not in settings or settings[name] in values for name, values in needed)
