"""Picture a run's mask, how many examples of each class the nodes hold, and what each node sent."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file

from autoflip_flwr.experiment.record.runs import Run
from autoflip_flwr.experiment.report.figures import for_page, on_page

CELLS = 64
"""Most rows and columns of a layer's picture; a larger layer shows the share that is kept in each cell."""

_HUE = (46, 140, 214)  # readable on white and on black
_MOST_NODES = 100  # bars of a figure of nodes; of more, neighbours share one


class Layer(NamedTuple):
    """A layer's picture: its shape, the share that is kept, and an image of ``rows`` by ``columns`` as a data URI."""

    name: str
    shape: tuple[int, ...]
    kept: float
    rows: int
    columns: int
    image: str


def layers_of(path: Path) -> list[Layer]:
    """Picture every layer of a file ``mask.safetensors``; no file gives no picture.

    A layer is shown as a matrix of outputs by all else. The stronger the colour, the more is kept.

    Raises ``ValueError`` if the file cannot be read.
    """
    if not path.is_file():
        return []
    try:
        return [_layer(name, keep) for name, keep in load_file(path).items()]
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from None


def kept_shares(keep: npt.NDArray[Any], most: int = CELLS) -> npt.NDArray[np.float64]:
    """Return the share of kept entries in each cell of a matrix of at most ``most`` by ``most`` cells."""
    matrix = np.asarray(keep, np.float64).reshape(keep.shape[0] if keep.ndim > 1 else 1, -1)
    for axis in (0, 1):
        size = matrix.shape[axis]
        if size > most:
            starts = np.arange(most) * size // most
            counts = np.diff(starts, append=size)
            shape = (-1, 1) if axis == 0 else (1, -1)
            matrix = np.add.reduceat(matrix, starts, axis=axis) / counts.reshape(shape)
    return matrix


def holdings(path: Path, name: str) -> str:
    """Picture a file ``holdings.json`` as SVG for a page: examples by node and class. No file gives "".

    Raises ``ValueError`` if the file is not as expected.
    """
    if not path.is_file():
        return ""
    try:
        found = json.loads(path.read_text("utf-8"))
        classes, counts = [str(each) for each in found["classes"]], np.array(found["counts"], np.float64)
        if counts.shape != (len(counts), len(classes)):
            raise ValueError(f"counts has the shape {counts.shape}, for {len(classes)} classes")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not examples by node and class ({error})") from None
    if not counts.size:
        return ""
    nodes = len(counts)
    with on_page(name):
        figure = Figure(figsize=(4.6, min(1.3 + 0.2 * nodes, 5.5)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
        norm = PowerNorm(0.5, vmin=0, vmax=max(counts.max(), 1))
        picture = left.imshow(counts, _strength(), norm=norm, aspect="auto", interpolation="none")
        left.set_xlabel("Class")
        left.set_ylabel("Node")
        left.yaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
        step = -(-len(classes) // 12)
        tilt = 90 if max(map(len, classes)) > 2 else 0
        left.set_xticks(range(0, len(classes), step), classes[::step], rotation=tilt, parse_math=False)
        right.barh(range(nodes), counts.sum(1), color="#2e8cd6", height=0.8)
        right.set_xlabel("Examples")
        right.xaxis.set_major_locator(MaxNLocator(nbins=2, integer=True))
        right.spines[["top", "right"]].set_visible(False)
        bar = figure.colorbar(picture, ax=left, location="top", shrink=0.8, aspect=30)
        bar.set_label("Examples of the class")
        bar.locator = MaxNLocator(nbins=5, integer=True)
        bar.update_ticks()
        return for_page(figure, "Examples by node and class")


def sent_by_node(run: Run, name: str) -> str:
    """Picture what each node has sent and received as SVG for a page; "" if it is not known."""
    by_node: Mapping[str, Mapping[str, int]] = run.summary.get("bytes_by_node") or {}
    if not by_node:
        return ""
    up, down = (
        np.array([sum(size for phase, size in own.items() if phase.endswith(way)) for own in by_node.values()]) / 1e6
        for way in ("_up", "_down")
    )
    order = np.argsort(-(up + down), kind="stable")
    edges = np.linspace(0, len(order), min(len(order), _MOST_NODES) + 1).round().astype(int)
    up, down = (np.add.reduceat(each[order], edges[:-1]) / np.diff(edges) for each in (up, down))
    with on_page(name):
        figure = Figure(figsize=(4.6, 2.8), layout="constrained")
        axes = figure.subplots()
        middle, width = (edges[1:] + edges[:-1]) / 2, 0.85 * np.diff(edges)
        axes.bar(middle, down, width, color="#fe0100", label="to the node")
        axes.bar(middle, up, width, bottom=down, color="#fe0105", label="from the node")
        axes.set_xlim(0, len(order))
        axes.set_ylim(0, 1.25 * float((up + down).max()) or 1.0)
        axes.set_xlabel(f"{len(order):,} nodes, by what they sent and received")
        axes.set_ylabel("MB")
        axes.set_xticks([])
        axes.legend(loc="upper right", ncols=2, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        return for_page(figure, "Bytes by node")


def _layer(name: str, keep: npt.NDArray[Any]) -> Layer:
    shares = kept_shares(keep) if keep.size else np.zeros((1, 1))
    image = Image.fromarray(np.round(255 * shares).astype(np.uint8), "P")
    image.putpalette(bytes(value for alpha in range(256) for value in (*_HUE, alpha)), "RGBA")
    file = BytesIO()
    image.save(file, "PNG", optimize=True)
    uri = f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"
    kept = float(np.count_nonzero(keep)) / max(prod(keep.shape), 1)
    return Layer(name, keep.shape, kept, shares.shape[0], shares.shape[1], uri)


def _strength() -> ListedColormap:
    return ListedColormap([(*(value / 255 for value in _HUE), alpha / 255) for alpha in range(256)])
