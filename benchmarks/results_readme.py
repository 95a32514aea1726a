"""Show a selection of the results in README.md, as a table and a picture."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from autoflip_flwr.experiment.report.figures import Series, draw, in_file
from autoflip_flwr.experiment.report.points import AXES
from autoflip_flwr.experiment.report.tables import number
from benchmarks.results_rows import Row, told

BEGIN, END = "<!-- made by: python -m benchmarks.results --readme -->", "<!-- end of what is made -->"


@dataclass(frozen=True)
class Shown:
    """What is shown under a title: the rows that have these values, of the row's fields or of its settings."""

    title: str
    where: Mapping[str, Any]

    def fits(self, row: Row) -> bool:
        """Return whether a row is meant."""
        found = {**row.settings, **row.fields}
        return all(found.get(key) == value for key, value in self.where.items())


SUITE = "headline"
"""The suite whose results are shown."""

DATA = (
    Shown("HAR, a phone a node", {"data": "har", "model": "har-cnn", "split": "natural", "rounds": 60, "lr": 0.002}),
    Shown(
        "MNIST, two classes a node",
        {"data": "mnist", "model": "twocnn", "split": "pathological", "rounds": 60, "lr": 0.001},
    ),
    Shown("CIFAR-10, Dirichlet 0.3", {"data": "cifar10", "model": "twocnn", "alpha": 0.3, "rounds": 60, "lr": 0.001}),
    Shown("Shakespeare, a speaker a node", {"data": "shakespeare", "model": "lstm-128", "rounds": 60, "lr": 0.01}),
)
"""The data sets, from top to bottom."""

_RATE = {"values": "float32", "lr-power": 0.25}
_STATIC = {"method": "autoflip", "schedule": "static", "rank-by": "deviation", **_RATE}
_GRADUAL = {"method": "autoflip", "schedule": "gradual", "explorers": 0.25, "initial-density": 0.8, **_RATE}
METHODS = (
    Shown("FedAvg", {"method": "fedavg", "values": "float32"}),
    Shown("AutoFLIP", {**_GRADUAL, "density": 0.1}),
    Shown("AutoFLIP", {**_GRADUAL, "density": 0.05}),
    Shown("AutoFLIP, static", {**_STATIC, "density": 0.1}),
    Shown("Gradual magnitude pruning", {"method": "gradual", "density": 0.1, "initial-density": 1.0, **_RATE}),
    Shown("SSFL", {"method": "ssfl", "density": 0.1, **_RATE}),
)
"""The methods, of each data set where they are there."""


@dataclass(frozen=True)
class Line:
    """A row that is shown, the titles of its data and method, and the place of its method among all."""

    data: str
    method: str
    place: int
    row: Row

    @property
    def density(self) -> str:
        """The density that was asked for."""
        return f"{self.row.fields['density']:g}"


def selected(rows: Sequence[Row]) -> list[Line]:
    """Return the rows that README.md shows, in its order: of data sets on which AutoFLIP has run.

    Raises ``ValueError`` if several rows fit one line, or none any.
    """
    found = []
    for data in DATA:
        if not any(data.fits(row) and row.fields["method"] == "autoflip" for row in rows):
            continue  # nothing to compare yet
        for place, method in enumerate(METHODS):
            fit = [row for row in rows if data.fits(row) and method.fits(row)]
            if len(fit) > 1:
                differ = {key for each in told(fit) for key in each["settings"]}
                raise ValueError(
                    f"{len(fit)} rows are '{method.title}' on '{data.title}': say in benchmarks/results_readme.py "
                    f"which is meant, by {' or '.join(sorted(differ))}"
                )
            found += [Line(data.title, method.title, place, row) for row in fit]
    if not found:
        raise ValueError("no result fits what benchmarks/results_readme.py shows")
    return found


def readme_with(text: str, rows: Sequence[Row]) -> str:
    """Return the text of README.md with its block made anew. Raises ``ValueError`` if it has no block."""
    around = re.fullmatch(f"(.*\n{BEGIN}\n).*(\n{END}\n.*)", text, re.DOTALL)
    if not around:
        raise ValueError(f"README.md: must have the lines {BEGIN} and {END}, and what is made between them")
    return f"{around[1]}\n{block(rows)}\n{around[2]}"


def block(rows: Sequence[Row]) -> str:
    """Return the table and what it was made of, as Markdown."""
    lines, facts = selected(rows), told(rows)
    text = [
        "| data | method | density | test accuracy, % | MB sent in all | of FedAvg's MB |",
        "|---|---|---|---|---|---|",
    ]
    before = ""
    for line in lines:
        fact = facts[rows.index(line.row)]
        share, error = fact["share_of_fedavg_mb"], fact["accuracy_se"]
        largest = max(each.row.megabytes for each in lines if each.data == line.data)
        cells = (
            line.data if line.data != before else "",
            line.method,
            line.density,
            f"{100 * fact['accuracy_mean']:.1f}" + (f" ± {100 * error:.1f}" if error is not None else ""),
            number(fact["mb"], largest),
            "" if share is None else f"{100 * share:.1f} %",
        )
        text.append(f"| {' | '.join(cells)} |")
        before = line.data
    return "\n".join([*text, "", *_note(lines)])


def picture(rows: Sequence[Row]) -> bytes:
    """Return a PNG of the accuracy by traffic of the rows that README.md shows, with a panel for each data set."""
    lines = selected(rows)
    titles = list(dict.fromkeys(line.data for line in lines))
    with in_file():
        figure = Figure(figsize=(3.4 * len(titles) + 0.4, 4.2), layout="constrained")
        panels = figure.subplots(1, len(titles), squeeze=False)[0]
        labels: dict[str, Any] = {}
        for axes, title in zip(panels, titles, strict=True):
            series = [
                Series(line.place, f"{line.method}, density {line.density}", line.row.curve)
                for line in lines
                if line.data == title
            ]
            draw(axes, series, AXES[1])
            axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
            axes.set_xlim(0.9 * min(one.curve[0][0].megabytes for one in series))
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            labels |= {str(curve.get_label()): curve for curve in axes.lines}
        panels[0].set_ylabel("Test accuracy (%)")
        figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=3, frameon=False)
        file = BytesIO()
        figure.savefig(file, format="png", dpi=150, facecolor="white")
    return file.getvalue()


def _note(lines: Sequence[Line]) -> list[str]:
    results = [result for line in lines for result in line.row.results]
    seeds, rounds = _range(len(line.row.results) for line in lines), _range(line.row.fields["rounds"] for line in lines)
    commits = {f"{str(each.commit)[:7]}{' with changes' if each.changed else ''}" for each in results}
    commands = {f"`{each.command}`" for each in results}
    note = (
        f"<sub>¹ Mean over {seeds} seed{'s' * (seeds != '1')} and its standard error, of the mean of the last five "
        f"evaluated rounds of {rounds}. MB are 10^6 bytes, up and down, exploration and masks included. The picture's "
        f"scale of MB is logarithmic. Made by {', '.join(sorted(commands))} at {', '.join(sorted(commits))}, and kept "
        "in [`results/`][results]. `python -m benchmarks.results` shows all that is there, and `--readme` makes this "
        "table and the picture. [Benchmarks][benchmarks] has more.</sub>"
    )
    whole = re.sub("`[^`]*`", lambda code: code[0].replace(" ", "\0"), note)  # a command stays on one line
    return [
        line.replace("\0", " ") for line in textwrap.wrap(whole, 120, break_long_words=False, break_on_hyphens=False)
    ]


def _range(values: Iterable[int]) -> str:
    found = sorted({*values})
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"
