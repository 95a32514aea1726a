"""Format a run's summary as readable rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from io import StringIO
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

BYTE_TITLES: Mapping[str, str] = {
    "exploration_up": "Exploration, up",
    "exploration_down": "Exploration, down",
    "mask_down": "Mask, down",
    "base_down": "Outside the mask, down",
    "train_up": "Training, up",
    "train_down": "Training, down",
    "evaluate_up": "Evaluation, up",
    "evaluate_down": "Evaluation, down",
    "other": "Other",
}
"""The phases in which bytes are counted, in the order shown, with their titles."""


def summary_rows(summary: Mapping[str, object]) -> list[tuple[str, str]]:
    """Return the (title, value) pairs that show a summary. Values that are missing, null or NaN are omitted."""
    known = {key: value for key, value in jsonable(summary).items() if value is not None}
    sent: Mapping[str, int] = known.get("bytes", {})
    total, dense = sent.get("total"), known.get("dense_bytes")
    seconds, exchanges = (_by_part(known.get(key, {}), "{:,.1f} s") for key in ("seconds", "exchange_seconds"))
    flops = _by_part({phase: value / 1e9 for phase, value in known.get("flops", {}).items()}, "{:,.1f}")
    rows = [
        ("Method", _shown(known.get("method"), "{}")),
        ("Data set", _shown(known.get("dataset"), "{}")),
        ("Model", _shown(known.get("model"), "{}")),
        ("Rounds", _shown(known.get("rounds"), "{:,}")),
        ("Final accuracy", _shown(known.get("final_accuracy"), "{:.2%}")),
        ("Best accuracy", _shown(known.get("best_accuracy"), "{:.2%}")),
        ("Density, prunable", _shown(known.get("density"), "{:.2%}")),
        ("Density, all", _shown(known.get("density_all"), "{:.2%}")),
        ("Problems of the mask", "; ".join(known.get("mask_problems", []))),
        ("Parameters", _shown(known.get("parameters"), "{:,}")),
        *((title, _megabytes(sent[phase])) for phase, title in BYTE_TITLES.items() if sent.get(phase)),
        ("Total sent", _megabytes(total)),
        ("Saving", _saving(total, dense) if known.get("method") != "fedavg" else ""),
        ("Upload per client and round", _megabytes(known.get("train_up_per_client_round"))),
        (
            "Computation",
            _shown(_scaled(known.get("flops_total"), 1e9), "{:,.1f} GFLOP") + (f" ({flops})" if flops else ""),
        ),
        ("Time", _shown(known.get("seconds_total"), "{:,.1f} s") + (f" ({seconds})" if seconds else "")),
        ("Time in exchanges", exchanges),
        ("Failures", _failures(known["failures"]) if "failures" in known else ""),
    ]
    return [(title, value) for title, value in rows if value]


def summary_table(summary: Mapping[str, object]) -> str:
    """Return a summary as a plain text table, at most 80 columns wide, without colour codes."""
    table = Table("Run", "", box=box.SIMPLE_HEAD, show_edge=False)
    for row in summary_rows(summary):
        table.add_row(*row)
    text = StringIO()
    Console(file=text, width=80, color_system=None, markup=False, emoji=False, force_jupyter=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def jsonable(value: object) -> Any:
    """Convert ``value`` to JSON types: NaN and infinities to null, NumPy values to Python's, unknown types to text."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return jsonable(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _shown(value: object, form: str) -> str:
    return "" if value is None else form.format(value)


def _saving(total: float | None, dense: float | None) -> str:
    if not dense or total is None:
        return ""
    share = f"{1 - total / dense:z.1%}"
    if share.startswith("-"):
        return f"none: dense FedAvg would be {_megabytes(dense)}"
    return f"{share} against {_megabytes(dense)} of dense FedAvg"


def _failures(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number:,} {kind}" for kind, number in counts.items() if number) or "none"


def _by_part(values: Mapping[str, float], form: str) -> str:
    return ", ".join(f"{part} {form.format(value)}" for part, value in values.items() if value)


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def _megabytes(size: float | None) -> str:
    return _shown(_scaled(size, 1e6), "{:,.3f} MB")
