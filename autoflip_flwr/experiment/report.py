"""The report of a run: plots, and one self-contained HTML page, made from what ``record`` wrote.

A run that is still going on, or was interrupted, is reported as far as it got. MB are 10^6 bytes.
"""

from __future__ import annotations

import argparse
import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from autoflip_flwr.experiment.record import PHASES, summary_rows
from autoflip_flwr.files import write_atomic

# The Okabe-Ito colours, which stay apart for colour-blind readers, one a kind of message.
_KINDS = {"exploration": "#e69f00", "mask": "#009e73", "train": "#0072b2", "evaluate": "#cc79a7", "other": "#777777"}
_RUNS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#222222", "#999999")
_ROUND, _SENT = "Round", "Sent so far, both ways (MB)"
_INK, _PALE = "#333333", "#e4e4e4"

_CSS = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #e4e4e4; }
th { font-weight: 500; color: #555; width: 40%; } td { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
img { max-width: 100%; height: auto; margin: 1rem 0; }
.note { background: #fff4d6; padding: .5rem .8rem; border-radius: .3rem; }
"""


@dataclass(frozen=True)
class Run:
    """What the folder of a run says: its config, its metrics so far, and its summary."""

    path: Path
    about: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    complete: bool

    @classmethod
    def read(cls, run_dir: Path) -> Run:
        """Read the folder of a run; files that are not there yet count as empty.

        The summary of a run without ``summary.json`` is put together from its last line of metrics.

        Raises ``NotADirectoryError`` if ``run_dir`` is no folder.
        """
        if not run_dir.is_dir():
            raise NotADirectoryError(f"not the folder of a run: {run_dir}")
        about, summary = _read_json(run_dir / "config.json"), _read_json(run_dir / "summary.json")
        metrics: list[dict[str, Any]] = []
        with suppress(FileNotFoundError):
            for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
                # The last line of a run that was killed may be torn.
                with suppress(json.JSONDecodeError):
                    metrics.append(json.loads(line))
        return cls(run_dir, about, metrics, summary or _summary_so_far(about, metrics), bool(summary))

    @property
    def name(self) -> str:
        """The name the run was given, or else that of its folder."""
        return str(self.about.get("name") or self.path.resolve().name)

    @property
    def label(self) -> str:
        """What the run is called beside others: its method and density."""
        method, density = self.summary.get("method") or self.name, self.summary.get("density")
        return str(method) if density is None else f"{method}, density {100 * density:.3g}%"

    def by_round(self) -> tuple[list[int], list[float]]:
        """The rounds of training that were evaluated, and the accuracy after each in %; round 0 is the start."""
        points = {
            line["round"]: 100 * line["accuracy"]
            for line in self.metrics
            if line["accuracy"] is not None and (line["phase"] == "train" or line["round"] == 0)
        }
        return list(points), list(points.values())

    def by_megabytes(self) -> tuple[list[float], list[float]]:
        """The MB sent so far at each evaluation, all messages both ways, and the accuracy there in %."""
        evaluated = [line for line in self.metrics if line["accuracy"] is not None]
        return [line["bytes"]["total"] / 1e6 for line in evaluated], [100 * line["accuracy"] for line in evaluated]


def write(run_dir: Path) -> Path:
    """Write the plots and ``report.html`` into the folder of a run, and return the path of the latter.

    A plot that there is no data for is left out.

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
    write_atomic(path, _page(run, pictures).encode())
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report of every run named, and with ``--compare`` a picture of them side by side."""
    parser = argparse.ArgumentParser(prog="python -m autoflip_flwr.experiment.report", description=main.__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a run")
    parser.add_argument("--compare", type=Path, metavar="OUT.png", help="also draw the runs side by side")
    options = parser.parse_args(arguments)
    try:
        for run_dir in options.runs:
            print(write(run_dir))
        if options.compare is not None:
            compare(options.runs, options.compare)
            print(options.compare)
    except NotADirectoryError as error:
        parser.error(str(error))
    return 0


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
        for phase, title in PHASES.items()
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
    # A name of a layer is no formula, whatever dollar signs it has.
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


def _page(run: Run, pictures: Mapping[str, bytes]) -> str:
    about = {key: value for key, value in run.about.items() if key != "config"}
    note = "" if run.complete else '<p class="note">This run is not complete: it was interrupted or still goes on.</p>'
    images = "".join(
        f'<img alt="{name.replace("_", " ")}" src="data:image/png;base64,{b64encode(picture).decode()}">\n'
        for name, picture in pictures.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(run.name)}</title>
<style>{_CSS}</style>
</head>
<body>
<h1>{escape(run.name)}</h1>
{note}
{_section("Summary", summary_rows(run.summary))}
{images or "<p>No round has been evaluated yet.</p>"}
{_section("Settings", _flat(run.about.get("config") or {}))}
{_section("Origin", _flat(about))}
</body>
</html>
"""


def _section(title: str, rows: Sequence[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>\n" for name, value in rows)
    return f"<h2>{escape(title)}</h2>\n<table>\n{cells}</table>" if rows else ""


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)))
    return rows


def _summary_so_far(about: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    config, last = about.get("config") or {}, metrics[-1] if metrics else {}
    accuracies = [line["accuracy"] for line in metrics if line["accuracy"] is not None]
    flops = last.get("flops") or {}
    return {
        **{key: config.get(key) for key in ("method", "dataset", "model")},
        "rounds": max((line["round"] for line in metrics if line["phase"] == "train"), default=0),
        "final_accuracy": accuracies[-1] if accuracies else None,
        "best_accuracy": max(accuracies, default=None),
        **{key: last.get(key) for key in ("density", "bytes", "failures")},
        "flops": flops,
        "flops_total": sum(flops.values()) if flops else None,
        "seconds_total": last.get("seconds"),
    }


def _read_json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return value


if __name__ == "__main__":
    raise SystemExit(main())
