"""Make the tables of docs/study.md: a suite's rows, with a column for each data set."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import mode
from typing import Any

from autoflip_flwr.experiment.report.rows import told as told_setting
from benchmarks.results_file import read_suite
from benchmarks.results_rows import Row, rows_of, told

_BLOCK = re.compile(r"(<!-- suite: ([\w.-]+) -->\n).*?(<!-- end of suite -->)", re.DOTALL)
_OF_DATA = ("dataset", "model", "num-server-rounds")


def study_with(text: str, rows: Sequence[Row]) -> str:
    """Return the text of docs/study.md with the table of each ``<!-- suite: NAME -->`` made anew.

    ``rows`` are all that there are: a suite's rows are compared with the FedAvg of any suite.

    Raises ``ValueError`` if there is no block, or a suite has no summary.
    """
    if not _BLOCK.search(text):
        raise ValueError("docs/study.md: must have blocks <!-- suite: NAME -->, each with <!-- end of suite -->")
    return _BLOCK.sub(lambda found: f"{found[1]}{table(found[2], rows)}\n{found[3]}", text)


def table(suite: str, rows: Sequence[Row]) -> str:
    """Return the table of one suite as Markdown, best first: by the mean distance to the best row of each data set.

    A cell has the accuracy in percent with its standard error, and the share of FedAvg's bytes.
    """
    own = rows_of(read_suite(suite))
    facts = told([*own, *rows])[: len(own)]
    columns = list(dict.fromkeys(_data_of(row) for row in own))
    usual = _usual(own)
    names = [_name(row, usual) for row in own]
    best: dict[tuple[Any, ...], float] = {}
    for row, fact in zip(own, facts, strict=True):
        best[_data_of(row)] = max(fact["accuracy_mean"], best.get(_data_of(row), 0.0))
    cells: dict[str, dict[tuple[Any, ...], str]] = {}
    behind: dict[str, list[float]] = {}
    for row, name, fact in zip(own, names, facts, strict=True):
        cells.setdefault(name, {})[_data_of(row)] = _cell(fact)
        behind.setdefault(name, []).append(best[_data_of(row)] - fact["accuracy_mean"])
    order = sorted(cells, key=lambda name: sum(behind[name]) / len(behind[name]))
    lines = [
        f"| | {' | '.join(f'{data}, {model}' for data, model, _ in columns)} |",
        f"|---|{'---|' * len(columns)}",
        *(f"| {name} | {' | '.join(cells[name].get(column, '') for column in columns)} |" for name in order),
    ]
    seeds = sorted({len(row.results) for row in own})
    commits = sorted({f"{str(each.commit)[:7]}{'*' if each.changed else ''}" for row in own for each in row.results})
    note = f"{' or '.join(map(str, seeds))} seed{'s' * (seeds != [1])}; `{own[0].results[0].command}` at "
    else_ = ", ".join(told_setting(key, value) for key, value in usual.items())
    told_usual = f". Where no other value is named: {else_}" if else_ else ""
    return "\n".join([*lines, "", f"<sub>{note}{', '.join(commits)}{told_usual}</sub>"])


def _data_of(row: Row) -> tuple[Any, ...]:
    return tuple(row.settings[key] for key in _OF_DATA)


def _usual(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the settings in which rows of the same data differ, each with the value that most rows have."""
    found: dict[str, Any] = {}
    for data in dict.fromkeys(map(_data_of, rows)):
        alike = [row.settings for row in rows if _data_of(row) == data]
        for key in dict.fromkeys(key for each in alike for key in each if key not in (*_OF_DATA, "method")):
            if len({repr(each[key]) for each in alike if key in each}) > 1:
                found[key] = mode(row.settings[key] for row in rows if key in row.settings)
    return found


def _name(row: Row, usual: Mapping[str, Any]) -> str:
    """Name a row by its method, and what is not usual."""
    parts = [told_setting(key, row.settings[key]) for key in usual if row.settings.get(key, usual[key]) != usual[key]]
    return ", ".join([str(row.settings["method"]), *parts])


def _cell(fact: Mapping[str, Any]) -> str:
    error, share = fact["accuracy_se"], fact["share_of_fedavg_mb"]
    told_error = "" if error is None else f" ± {100 * error:.1f}"
    told_share = "" if share is None else f" ({100 * share:.0f} %)"
    return f"{100 * fact['accuracy_mean']:.1f}{told_error}{told_share}"
