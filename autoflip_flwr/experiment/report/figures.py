"""Draw curves of accuracy: as SVG inside a page, which follows its light or dark theme, and as files for a paper."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from html import escape
from io import BytesIO
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from autoflip_flwr.experiment.report.points import AXES, Axis, Point
from autoflip_flwr.experiment.report.rows import Section

FORMATS = ("svg", "pdf", "png")
"""Formats of figure files, which their endings choose."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b07800", "#3a9fd8", "#444444", "#999999")
"""Colours of the runs in a light page and in files: Okabe and Ito's, which colour-blind readers can tell apart, with a
darker yellow. Pages name them ``--run-0`` and so on."""

DARK = ("#4aa8e8", "#ff8b45", "#2cc598", "#e8a0cb", "#f0c244", "#8fd3ff", "#dddddd", "#999999")
"""The same in a dark page."""

# With seven markers and eight colours, 56 runs look different. The shapes are drawn in a square of 10 by 10.
_MARKERS = {
    "o": "M5 2a3 3 0 1 1 0 6a3 3 0 1 1 0-6z",
    "s": "M2.2 2.2h5.6v5.6h-5.6z",
    "^": "M5 1.5 8.5 8h-7z",
    "D": "M5 1 9 5 5 9 1 5z",
    "v": "M5 8.5 1.5 2h7z",
    "P": "M3.8 1.5h2.4v2.3h2.3v2.4H6.2v2.3H3.8V6.2H1.5V3.8h2.3z",
    "X": "M3.2 1.5 5 3.3 6.8 1.5 8.5 3.2 6.7 5 8.5 6.8 6.8 8.5 5 6.7 3.2 8.5 1.5 6.8 3.3 5 1.5 3.2z",
}
_MARKS = 8  # markers on a curve, so that a long one is still a line
_INK, _GRID = "#333333", "#e4e4e4"
# Colours that are drawn in a page's SVG, only to be replaced by the page's own.
_SLOT_INK, _SLOT_GRID = "#fe00f0", "#fe00f1"
_SIZE = (4.5, 3.0)  # inches; narrow, so that its text is readable on a telephone
_PAGE_STYLE = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": _SLOT_INK,
    "axes.labelcolor": _SLOT_INK,
    "axes.edgecolor": _SLOT_INK,
    "xtick.color": _SLOT_INK,
    "ytick.color": _SLOT_INK,
    "grid.color": _SLOT_GRID,
}
_FILE_STYLE = {"svg.fonttype": "none", "pdf.fonttype": 42, "font.size": 10, "grid.color": _GRID}


class Series(NamedTuple):
    """A curve: mean points with the standard deviation of their accuracy, and the number of its colour and marker."""

    number: int
    label: str
    curve: Sequence[tuple[Point, float]]


def series_of(section: Section) -> list[Series]:
    """Return the curves of a section's rows."""
    return [Series(row.number, row.label, row.curve) for row in section.rows if row.curve]


def plots(series: Sequence[Series], target: float | None, name: str) -> list[tuple[str, str]]:
    """Draw the accuracy by round, traffic, computation and time.

    Returns (title, SVG) pairs for a page; axes along which nothing is known are omitted. ``name`` must be the figure's
    own in the page. A curve's parts have the class ``run-<number>``.
    """
    found = []
    for axis in AXES:
        if not any(getattr(point, axis.field) for one in series for point, _ in one.curve):
            continue
        title = f"Test accuracy (%) by {axis.word}"
        with on_page(f"{name} {axis.field}"):
            figure = Figure(figsize=_SIZE)
            axes = figure.add_axes((0.085, 0.155, 0.895, 0.81))
            draw(axes, series, axis, target, [f"#fe01{one.number % len(COLOURS):02x}" for one in series], _SLOT_INK)
            found.append((title, for_page(figure, title)))
    return found


def save(sections: Sequence[Section], kind: str) -> bytes:
    """Return a figure file of the sections, each with its accuracy by traffic and by round, and a legend.

    ``kind`` is one of ``FORMATS``.
    """
    drawn = [section for section in sections if series_of(section)]
    with in_file():
        figure = Figure(figsize=(10, 4.8 * len(drawn)), layout="constrained")
        parts = figure.subfigures(len(drawn), 1, squeeze=False)[:, 0]
        for part, section in zip(parts, drawn, strict=True):
            series = series_of(section)
            part.suptitle(section.title, x=0.01, ha="left", fontweight="bold", parse_math=False)
            for axes, axis in zip(part.subplots(1, 2, sharey=True), (AXES[1], AXES[0]), strict=True):
                draw(axes, series, axis, section.target)
                axes.set_ylabel("Test accuracy (%)" if axis is AXES[1] else "")
            handles = [line for line in axes.lines if not line.get_label().startswith("_")]
            # a label is not a formula, even with dollar signs
            legend = part.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
            for text in legend.get_texts():
                text.set_parse_math(False)
        file = BytesIO()
        unstamped = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}[kind]
        figure.savefig(file, format=kind, dpi=150, metadata=unstamped, facecolor="white")
    return file.getvalue()


def swatch(number: int) -> str:
    """Return a curve's colour and marker as a small SVG for a legend in a page."""
    shape = list(_MARKERS.values())[number % len(_MARKERS)]
    return (
        f'<svg class="swatch" viewBox="-6 0 22 10" aria-hidden="true" style="color:var(--run-{number % len(COLOURS)})">'
        f'<path d="M-6 5H16" stroke="currentColor" stroke-width="1.6"/><path d="{shape}" fill="currentColor"/></svg>'
    )


def on_page(name: str) -> AbstractContextManager[None]:
    """Return a context in which figures for a page are drawn. ``name`` must be the figure's own in the page."""
    return _style({**_PAGE_STYLE, "svg.hashsalt": name})


def in_file() -> AbstractContextManager[None]:
    """Return a context in which figures of files are drawn."""
    return _style({**_FILE_STYLE, "svg.hashsalt": "file"})


def for_page(figure: Figure, title: str) -> str:
    """Return a figure as SVG to stand in a page: its colours are the page's, and it has no ids but of its own."""
    file = BytesIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="(run-\d+)[^"]*"', r'<g class="\1"', text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r" font-family: [^;]*;", "", text)  # the page's own
    text = re.sub(r"#fe01(\w\w)", lambda found: f"var(--run-{int(found[1], 16)})", text)
    text = text.replace(_SLOT_INK, "currentColor").replace(_SLOT_GRID, "var(--grid)")
    head = rf'<svg viewBox="\1" role="img" aria-label="{escape(title)}">'
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', head, text)
    return re.sub(r"\s*\n\s*", "\n", text)


def _style(values: Any) -> AbstractContextManager[None]:
    return mpl.rc_context(values)


def draw(
    axes: Axes,
    series: Sequence[Series],
    axis: Axis,
    target: float | None = None,
    colours: Sequence[str] | None = None,
    ink: str = _INK,
) -> None:
    """Draw curves of accuracy along an axis, with a line at the target. ``colours`` has one for each curve."""
    colours = colours or [COLOURS[one.number % len(COLOURS)] for one in series]
    for one, colour in zip(series, colours, strict=True):
        x = [getattr(point, axis.field) for point, _ in one.curve]
        y = [100 * point.accuracy for point, _ in one.curve]
        around = [100 * deviation for _, deviation in one.curve]
        if any(around):
            low, high = ([v + sign * d for v, d in zip(y, around, strict=True)] for sign in (-1, 1))
            band = axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            band.set_gid(f"run-{one.number} band")
        (line,) = axes.plot(
            x,
            y,
            label=one.label,
            color=colour,
            marker=list(_MARKERS)[one.number % len(_MARKERS)],
            markersize=4.5,
            markevery=max(1, -(-len(x) // _MARKS)),
            linewidth=1.6,
        )
        line.set_gid(f"run-{one.number} line")
    if target is not None:
        dashed, label = (0, (4, 3)), f"target {100 * target:.1f} %"
        axes.axhline(100 * target, color=ink, linewidth=1, linestyle=dashed, zorder=1, label=label)
    axes.set_xlabel(axis.title)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=axis.field == "round", steps=[1, 2, 2.5, 5, 10]))
    axes.grid(linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
