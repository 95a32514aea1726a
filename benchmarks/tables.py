"""Markdown tables, printed a row at a time while a benchmark works."""

from __future__ import annotations

from collections.abc import Iterable


def head(titles: Iterable[str]) -> None:
    """Print the titles of the columns."""
    titles = list(titles)
    row(titles)
    print(f"|{'---|' * len(titles)}", flush=True)


def row(cells: Iterable[object]) -> None:
    """Print a row."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)
