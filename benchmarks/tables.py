"""Print markdown tables row by row while a benchmark runs."""

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
