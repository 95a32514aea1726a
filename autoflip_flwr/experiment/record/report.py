"""Report a run: make plots, and one self-contained HTML page, from its record.

A run that still goes on, or was interrupted, is reported as far as it got. MB are 10^6 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from autoflip_flwr.experiment.record.page import render
from autoflip_flwr.experiment.record.runs import Run
from autoflip_flwr.experiment.record.summary import BYTE_TITLES
from autoflip_flwr.storage.files import write_atomic

# The Okabe-Ito colours, which colour-blind readers can tell apart: one per kind of message.
_KINDS = {
    "exploration": "#e69f00",
    "mask": "#009e73",
    "base": "#56b4e9",
    "train": "#0072b2",
    "evaluate": "#cc79a7",
    "other": "#777777",
}
_RUNS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#222222", "#999999")
_ROUND, _SENT = "Round", "Sent so far, both ways (MB)"
_INK, _PALE = "#333333", "#e4e4e4"


def write(run_dir: Path) -> Path:
    """Write the plots and ``report.html`` into the folder of a run. Return the path of ``report.html``.

    Plots without data are omitted.

    Raises ``NotADirectoryError`` if ``run_dir`` is no folder.
    """
    run = Run.read(run_dir)
    figures = {
        "accuracy_by_round": _accuracy("Test accuracy by round", _ROUND, *run.by_round()),
        "accuracy_by_mb": _accuracy("Test accuracy by traffic", _SENT, *run.by_megabytes()),
        "density_by_layer": _density_by_layer(run),
        "bytes_by_phase": _bytes_by_phase(run),
    }
    pictures = {name: _png(figure) for name, figure in figures.items() if figure is not None}
    for name, picture in pictures.items():
        write_atomic(run_dir / f"{name}.png", picture)
    path = run_dir / "report.html"
    write_atomic(path, render(run, pictures).encode())
    return path


def compare(run_dirs: Sequence[Path], out: Path) -> None:
    """Draw the accuracy of several runs, by MB and by round side by side, into the PNG file ``out``.

    Raises ``ValueError`` if there is no run to draw and ``NotADirectoryError`` if one of them is no folder.
    """
    if not run_dirs:
        raise ValueError("no runs to compare")
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for number, run in enumerate(map(Run.read, run_dirs)):
        style = {"color": _RUNS[number % len(_RUNS)], "marker": "o", "markersize": 3, "linewidth": 1.6}
        left.plot(*run.by_megabytes(), label=run.label, **style)
        right.plot(*run.by_round(), **style)
    _dress(left, "Test accuracy by traffic", _SENT, "Test accuracy (%)")
    _dress(right, "Test accuracy by round", _ROUND, "")
    figure.legend(loc="outside lower center", ncols=min(len(run_dirs), 4), frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, _png(figure))


def _accuracy(title: str, x_title: str, x: Sequence[float], accuracy: Sequence[float]) -> Figure | None:
    if not x:
        return None
    figure, axes = _axes(title, x_title, "Test accuracy (%)")
    best = max(range(len(x)), key=accuracy.__getitem__)
    axes.plot(x, accuracy, color=_RUNS[0], marker="o", markersize=3.5, linewidth=1.6)
    axes.plot(x[best], accuracy[best], "o", color=_RUNS[1], markersize=7, label=f"best, {accuracy[best]:.2f}%")
    axes.legend(loc="best", frameon=False)
    return figure


def _density_by_layer(run: Run) -> Figure | None:
    layers: Mapping[str, Mapping[str, int]] = run.summary.get("density_by_layer") or {}
    if not layers:
        return None
    figure, axes = _bars("Density by layer", "Parameters kept (%)", list(layers))
    for row, layer in enumerate(layers.values()):
        percent = 100 * layer["kept"] / max(layer["size"], 1)
        axes.barh(row, 100, color=_PALE, height=0.7)
        axes.barh(row, percent, color=_RUNS[0], height=0.7)
        axes.text(101.5, row, f"{percent:.1f}% of {layer['size']:,}", va="center", fontsize=9, color=_INK)
    axes.set_xlim(0, 130)
    axes.set_xticks(range(0, 101, 20))
    axes.spines["bottom"].set_bounds(0, 100)
    return figure


def _bytes_by_phase(run: Run) -> Figure | None:
    sent: Mapping[str, int] = run.summary.get("bytes") or {}
    if not sent.get("total"):
        return None
    bars = [
        (title, sent[phase], _KINDS[phase.split("_")[0]], 0.55 if phase.endswith("_down") else 1.0)
        for phase, title in BYTE_TITLES.items()
        if sent.get(phase)
    ]
    bars.append(("All messages", sent["total"], _INK, 1.0))
    if run.summary.get("dense_bytes"):
        bars.append(("Dense FedAvg", run.summary["dense_bytes"], "#bbbbbb", 1.0))
    figure, axes = _bars("Traffic by phase", "Sent (MB)", [title for title, *_ in bars])
    for row, (_, size, colour, alpha) in enumerate(bars):
        bar = axes.barh(row, size / 1e6, color=colour, alpha=alpha, height=0.7)
        axes.bar_label(bar, fmt="{:,.3f}", padding=4, fontsize=9, color=_INK)
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    return figure


def _axes(title: str, x: str, y: str, height: float = 4.2) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, height), layout="constrained")
    axes = figure.subplots()
    _dress(axes, title, x, y)
    return figure, axes


def _bars(title: str, x: str, names: Sequence[str]) -> tuple[Figure, Axes]:
    figure, axes = _axes(title, x, "", height=1.2 + 0.32 * len(names))
    # A layer's name is not a formula, even with dollar signs.
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    return figure, axes


def _dress(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=_INK)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=x == _ROUND, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(color=_PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _png(figure: Figure) -> bytes:
    file = BytesIO()
    figure.savefig(file, format="png", dpi=150, bbox_inches="tight", pad_inches=0.12)
    return file.getvalue()
