"""Tabulate rows: the numbers of a section, and the same as Markdown, LaTeX and CSV for a paper."""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Callable, Sequence
from io import StringIO
from typing import Any, NamedTuple

from autoflip_flwr.experiment.record.suites import Entry
from autoflip_flwr.experiment.report.points import AXES, final_accuracy, points, reached, spread
from autoflip_flwr.experiment.report.rows import Row, Section


class Cell(NamedTuple):
    """A cell as text, its value to sort by and for CSV, and the standard deviation if it has one."""

    text: str
    value: float | str | None
    spread: float | None = None


class Column(NamedTuple):
    """A column of a table: its title, its name in CSV, its cells from top to bottom, and a title above some columns."""

    title: str
    key: str
    cells: list[Cell]
    group: str = ""

    @property
    def whole_title(self) -> str:
        """The title together with that of its group."""
        return f"{self.title} {self.group}".strip()

    @property
    def numeric(self) -> bool:
        """Whether its values are numbers."""
        return not any(isinstance(cell.value, str) for cell in self.cells)


def columns(section: Section) -> list[Column]:
    """Return the columns of a section's table, without those that are empty."""
    rows = section.rows
    found = [Column("Run", "run", [Cell(row.label, row.label) for row in rows])]
    if any(len(row.entries) > 1 for row in rows):
        found.append(Column("Seeds", "seeds", [Cell(str(len(row.entries)), len(row.entries)) for row in rows]))
    found += [
        Column("Accuracy (%)", "accuracy_percent", [_accuracy(row) for row in rows]),
        _means("Density (%)", "density_percent", rows, lambda told: _scaled(told.get("density"), 100)),
        _means("MB", "megabytes", rows, lambda told: _scaled((told.get("bytes") or {}).get("total"), 1e-6)),
        _means("Saved (%)", "saved_percent", rows, _saved),
        _means("GFLOP", "gigaflops", rows, lambda told: _scaled(told.get("flops_total"), 1e-9)),
        _means("Seconds", "seconds", rows, lambda told: told.get("seconds_total")),
    ]
    if section.target is not None:
        for axis, title in zip(AXES, ("Rounds", "MB", "GFLOP", "Seconds"), strict=True):
            cells, group = _to_target(rows, section.target, axis.field), f"to {100 * section.target:.1f} %"
            found.append(Column(title, f"{axis.field}_to_target", cells, group))
    incidents = [sum(len(entry.run.incidents) for entry in row.entries) for row in rows]
    found.append(Column("Incidents", "incidents", [Cell(str(number), number) for number in incidents]))
    return [column for column in found if any(cell.value is not None for cell in column.cells)]


def markdown(sections: Sequence[Section], note: str) -> str:
    """Return the tables as Markdown, one per section."""
    parts = [f"<!-- {note.replace('--', '- -')} -->"]
    for section in sections:
        table = columns(section)
        lines = [_line(column.whole_title for column in table), _line("---:" if c.numeric else "---" for c in table)]
        lines += [_line(cell.text for cell in cells) for cells in zip(*(c.cells for c in table), strict=True)]
        parts.append("\n".join([f"### {section.title}\n", *lines]))
    return "\n\n".join(parts) + "\n"


def latex(sections: Sequence[Section], note: str) -> str:
    """Return the tables as LaTeX, one ``tabular`` per section, for the package booktabs."""
    parts = ["\n".join(f"% {line}" for line in [*note.splitlines(), r"needs \usepackage{booktabs}"])]
    for section in sections:
        table = columns(section)
        rows = [_tex_line(cell.text for cell in cells) for cells in zip(*(c.cells for c in table), strict=True)]
        parts.append(
            "\n".join(
                [
                    f"% {section.title}",
                    f"\\begin{{tabular}}{{{''.join('r' if column.numeric else 'l' for column in table)}}}",
                    "\\toprule",
                    _tex_line(column.whole_title for column in table),
                    "\\midrule",
                    *rows,
                    "\\bottomrule",
                    "\\end{tabular}",
                ]
            )
        )
    return "\n\n".join(parts) + "\n"


def csv_of_rows(sections: Sequence[Section]) -> str:
    """Return the tables as one CSV, with unrounded numbers; ``_sd`` is the standard deviation over the seeds."""
    lines: list[dict[str, Any]] = []
    for section in sections:
        table = columns(section)
        for number, row in enumerate(section.rows):
            line: dict[str, Any] = {key: section.settings.get(key) for key in ("dataset", "split", "model")}
            line |= {"run": row.label, **row.varies, "target_percent": _scaled(section.target, 100)}
            for column in table[1:]:
                cell = column.cells[number]
                line[column.key] = cell.value
                if column.key == "accuracy_percent":
                    line["accuracy_percent_sd"] = cell.spread
            lines.append(line)
    return _csv(lines)


def csv_of_runs(entries: Sequence[Entry]) -> str:
    """Return every run as a line of CSV: state, accuracy, costs, commit, command and all settings."""
    lines = []
    for entry in entries:
        found, about, accuracy = entry.run.summary, entry.run.about, final_accuracy(points(entry.run))
        lines.append(
            {
                "name": entry.name,
                "state": entry.state,
                "reason": entry.reason,
                "accuracy": accuracy,
                "density": found.get("density"),
                "bytes": (found.get("bytes") or {}).get("total"),
                "flops": found.get("flops_total"),
                "run_seconds": found.get("seconds_total"),
                "incidents": len(entry.run.incidents),
                "commit": about.get("commit"),
                "changed_since_commit": about.get("dirty"),
                "command": entry.command,
                **{f"setting {key}": value for key, value in entry.settings.items()},
            }
        )
    return _csv(lines)


def number(value: float | None, largest: float) -> str:
    """Return a number with as many digits as suit the largest of its column."""
    if value is None:
        return "-"
    return f"{value:,.{0 if largest >= 1000 else 1 if largest >= 100 else 2 if largest >= 0.1 else 4}f}"


def _accuracy(row: Row) -> Cell:
    values = [100 * value for value in row.accuracies]
    if not values:
        return Cell("-", None)
    mean, deviation = statistics.fmean(values), spread(values)
    return Cell(f"{mean:.2f}" if deviation is None else f"{mean:.2f} ± {deviation:.2f}", mean, deviation)


def _means(title: str, key: str, rows: Sequence[Row], value: Callable[[Any], float | None]) -> Column:
    """Return the means over the runs of what ``value`` finds in each summary."""
    means: list[float | None] = []
    for row in rows:
        known = [found for entry in row.entries if (found := value(entry.run.summary)) is not None]
        means.append(statistics.fmean(known) if known else None)
    largest = max((abs(mean) for mean in means if mean is not None), default=0.0)
    return Column(title, key, [Cell(number(mean, largest), mean) for mean in means])


def _to_target(rows: Sequence[Row], target: float, field: str) -> list[Cell]:
    """Return the mean cost over the runs that reach the target, and how many of them do if not all."""
    found = [[getattr(at, field) for run in row.evaluated if (at := reached(run, target))] for row in rows]
    largest = max((value for values in found for value in values), default=0.0)
    cells = []
    for row, values in zip(rows, found, strict=True):
        mean = statistics.fmean(values) if values else None
        whole = mean is not None and field == "round" and mean.is_integer()
        shown = f"{mean:.0f}" if whole else number(mean, largest)
        missing, some = "-", ""
        if field == "round":  # once for all columns of the target
            missing = "not reached"
            some = f" ({len(values)} of {len(row.entries)})" * (len(values) < len(row.entries))
        cells.append(Cell(missing if mean is None else shown + some, mean))
    return cells


def _saved(found: Any) -> float | None:
    dense, sent = found.get("dense_bytes"), (found.get("bytes") or {}).get("total")
    return None if not dense or sent is None else 100 * (1 - sent / dense) + 0.0


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _line(cells: Any) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _tex_line(cells: Any) -> str:
    return " & ".join(map(_tex, cells)) + r" \\"


def _tex(text: str) -> str:
    text = re.sub(r"[\\{}$&#%_^~]", lambda found: _TEX[found[0]], text)
    return text.replace(" ± ", r" $\pm$ ")


_TEX = {**{mark: f"\\{mark}" for mark in "{}$&#%_"}, "\\": r"\textbackslash{}", "^": r"\^{}", "~": r"\~{}"}


def _csv(lines: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for line in lines for name in line))
    file = StringIO()
    writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()
