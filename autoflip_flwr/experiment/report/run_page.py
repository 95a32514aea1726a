"""Write the report of a run as one page: curves, what a target costs, bytes, layers, mask, nodes, and how to repeat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from autoflip_flwr.experiment.evaluation import LAST
from autoflip_flwr.experiment.record.runs import Run
from autoflip_flwr.experiment.record.summary import BYTE_TITLES, summary_rows
from autoflip_flwr.experiment.report import html
from autoflip_flwr.experiment.report.command import repeating
from autoflip_flwr.experiment.report.pictures import holdings, layers_of, sent_by_node
from autoflip_flwr.experiment.report.points import Point, final_accuracy, points, reached

_SHARES = (0.5, 0.8, 0.9, 0.95, 0.99)  # of a run's best accuracy, whose costs are shown


def render(run: Run, plots: Sequence[tuple[str, str]], target: float | None) -> str:
    """Return the page of a run; ``plots`` are (title, SVG) pairs.

    ``target`` is an accuracy in (0, 1] whose cost is shown beside those of shares of the run's best.

    Raises ``ValueError`` if a file of the mask or of the holdings cannot be read.
    """
    evaluated = points(run)
    parts = [
        _note(run),
        html.tiles(_tiles(run, evaluated)),
        html.figures(plots) or "<p>No round has been evaluated yet.</p>",
        _costs(evaluated, target),
        html.facts("Summary", summary_rows(run.summary)),
        _bytes(run),
        _layers(run),
        _nodes(run),
        html.incidents(run.incidents),
        _command(run),
        html.folded("All settings", html.facts("", html.flat(run.settings))),
        html.folded("Origin: versions, machine, times", html.facts("", html.flat(_origin(run.about)))),
    ]
    return html.document(run.name, "\n".join(filter(None, parts)))


def _note(run: Run) -> str:
    if run.complete:
        return ""
    text = "it was interrupted, or still goes on."
    if run.failure:
        text = f"<strong>{escape(run.failure)}</strong>"
    return f'<p class="note">This run is not complete: {text}</p>'


def _tiles(run: Run, evaluated: Sequence[Point]) -> list[tuple[str, str]]:
    accuracy, found = final_accuracy(evaluated), run.summary
    sent, dense = (found.get("bytes") or {}).get("total"), found.get("dense_bytes")
    tiles = []
    if accuracy is not None:
        last = min(LAST, sum(point.round > 0 for point in evaluated))
        tiles.append((f"accuracy, mean of the last {last} evaluated rounds", f"{accuracy:.2%}"))
    if found.get("density") is not None:
        tiles.append(("density of the prunable layers", f"{found['density']:.2%}"))
    if sent is not None:
        tiles.append(("sent, both ways", f"{sent / 1e6:,.2f} MB"))
    if dense and sent is not None and found.get("method") != "fedavg":
        tiles.append(("of what dense FedAvg sends", f"{sent / dense:.1%}"))
    return tiles


def _costs(evaluated: Sequence[Point], target: float | None) -> str:
    best = max((point.accuracy for point in evaluated), default=0.0)
    targets = [(f"{share:.0%} of the best", share * best) for share in _SHARES]
    if target is not None:
        targets.append(("as set", target))
    rows = []
    for told, accuracy in sorted(targets, key=lambda each: each[1]):
        at = reached(evaluated, accuracy)
        costs = ("not reached", "", "", "")
        if at is not None:
            costs = (f"{at.round}", f"{at.megabytes:,.3f}", f"{at.gigaflops:,.2f}", f"{at.seconds:,.1f}")
        rows.append([f"{accuracy:.2%} ({told})", *costs])
    if not evaluated:
        return ""
    heads = ["Accuracy", "Round", "MB", "GFLOP", "Seconds"]
    text = "<p>What was spent up to the first evaluation that is at least so accurate.</p>"
    return f"<h2>Cost of an accuracy</h2>\n{text}\n{html.grid(heads, rows, numeric=range(1, 5))}"


def _bytes(run: Run) -> str:
    sent: Mapping[str, int] = run.summary.get("bytes") or {}
    if not sent.get("total"):
        return ""
    sizes = [(title, sent[phase]) for phase, title in BYTE_TITLES.items() if sent.get(phase)]
    sizes.append(("All messages", sent["total"]))
    if run.summary.get("dense_bytes"):
        sizes.append(("Dense FedAvg", run.summary["dense_bytes"]))
    most = max(size for _, size in sizes)
    rows = [(title, size / most, f"{size / 1e6:,.3f}") for title, size in sizes]
    by_node = sent_by_node(run, "bytes-by-node")
    text = f"<h2>Bytes</h2>\n{html.bars(rows, ('Messages', 'MB'))}"
    return text + (f"\n<h3>Bytes by node</h3>\n<figure>{by_node}</figure>" if by_node else "")


def _layers(run: Run) -> str:
    layers: Mapping[str, Mapping[str, int]] = run.summary.get("density_by_layer") or {}
    rows = []
    for name, layer in layers.items():
        share = layer["kept"] / max(layer["size"], 1)
        rows.append((name, share, f"{share:.1%} of {layer['size']:,}"))
    pictures = html.masks(layers_of(run.path / "mask.safetensors"))
    if not rows and not pictures:
        return ""
    told = (
        "<h3>The mask</h3>\n<p>A row is an output of the layer, a column one of its other entries. The stronger the "
        "colour, the more is kept. Where a layer is larger than its picture, a cell shows the share that is kept.</p>\n"
    )
    return f"<h2>Density by layer</h2>\n{html.bars(rows, ('Layer', 'Kept'))}\n" + (told + pictures) * bool(pictures)


def _nodes(run: Run) -> str:
    picture = holdings(run.path / "holdings.json", "holdings")
    return f"<h2>Who holds what</h2>\n<figure>{picture}</figure>" if picture else ""


def _command(run: Run) -> str:
    if not run.settings:
        return ""
    return f"<h2>Repeat it</h2>\n{html.commit(run.about)}\n{html.code(repeating(run.settings))}"


def _origin(about: Mapping[str, Any]) -> dict[str, Any]:
    origin = _without_settings(about)
    for number, each in enumerate(about.get("resumed", []), 1):
        origin[f"resumed.{number}"] = _without_settings(each)
    return origin


def _without_settings(about: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in about.items() if key not in ("config", "resumed")}
