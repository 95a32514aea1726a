"""Build parts of a page: tables, bars, figures, foldable parts, and the page around them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any
from urllib.parse import quote

from autoflip_flwr.experiment.report.assets import SCRIPT, STYLE
from autoflip_flwr.experiment.report.figures import Series, swatch
from autoflip_flwr.experiment.report.pictures import Layer
from autoflip_flwr.experiment.report.tables import Column

_INCIDENTS = {"round": "Round", "phase": "Phase", "node": "Node", "kind": "What", "reason": "Reason"}
_MOST_INCIDENTS = 200
_LAYER_WIDTH = 224  # pixels, about, of a layer's picture


def document(title: str, body: str) -> str:
    """Return a whole page."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{body}
<script>{SCRIPT}</script>
</body>
</html>
"""


def facts(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """Return a heading and a table of names and values; "" without rows."""
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value or '-')}</td></tr>\n" for name, value in rows)
    heading = f"<h2>{escape(title)}</h2>\n" if title else ""
    return f'{heading}<table class="facts">\n{cells}</table>' if rows else ""


def grid(
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numeric: Iterable[int] = (),
    kind: str = "",
    example: str = "",
) -> str:
    """Return a table that scrolls by itself. Cells are HTML; ``numeric`` columns are aligned right.

    ``kind`` are classes of the table: ``sortable``, ``filtered`` (then with an ``example`` of a filter).
    """
    right = set(numeric)
    marks = [' class="n"' if column in right else ' class="first"' * (not column) for column in range(len(heads))]
    head = "".join(f'<th scope="col"{mark}>{escape(name)}</th>' for mark, name in zip(marks, heads, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{mark}>{cell}</td>" for mark, cell in zip(marks, row, strict=True)) + "</tr>\n"
        for row in rows
    )
    return _table(head, body, kind, example)


def numbers(columns: Sequence[Column], runs: Sequence[int], links: Sequence[str], example: str) -> str:
    """Return a section's table to sort and filter; ``runs`` are the rows' numbers, ``links`` lead from their names."""
    head = "".join(
        f'<th scope="col" class="{"n" if column.numeric else "first"}">{escape(column.title)}</th>'
        for column in columns
    )
    groups = [(group, len(list(its))) for group, its in groupby(columns, key=lambda column: column.group)]
    if len(groups) > 1:
        above = "".join(
            f'<th colspan="{size}" class="{"group" if group else "none"}">{escape(group)}</th>'
            for group, size in groups
        )
        head = f"{above}</tr>\n<tr>{head}"
    body = ""
    for row, run in enumerate(runs):
        cells = ""
        for column in columns:
            cell = column.cells[row]
            value = "" if cell.value is None else escape(str(cell.value))
            text = escape(cell.text)
            if column is columns[0]:
                text = f'{swatch(run)} <a href="#{links[row]}">{text}</a>'
            cells += f'<td class="{"n" if column.numeric else "first"}" data-value="{value}">{text}</td>'
        body += f'<tr data-run="{run}">{cells}</tr>\n'
    return _table(head, body, "sortable filtered", example)


def bars(rows: Sequence[tuple[str, float, str]], heads: tuple[str, str]) -> str:
    """Return a table of names, bars (of a length in [0, 1]) and values."""
    cells = (
        [escape(name), f'<div class="bar"><i style="width:{100 * length:.2f}%"></i></div>', escape(value)]
        for name, length, value in rows
    )
    return grid([heads[0], "", heads[1]], cells, numeric=[2]) if rows else ""


def figures(plots: Sequence[tuple[str, str]]) -> str:
    """Return figures (title, SVG) beside or below each other."""
    shown = "".join(f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>\n" for title, svg in plots)
    return f'<div class="plots">\n{shown}</div>' if plots else ""


def legend(series: Sequence[Series]) -> str:
    """Return the legend of a section's figures."""
    items = "".join(
        f'<li><span data-run="{one.number}">{swatch(one.number)}{escape(one.label)}</span></li>\n' for one in series
    )
    return f'<ul class="legend">\n{items}</ul>'


def masks(layers: Sequence[Layer]) -> str:
    """Return the pictures of a mask's layers."""
    shown = ""
    for layer in layers:
        scale = max(1, min(16, _LAYER_WIDTH // layer.columns))
        shape = " x ".join(map(str, layer.shape)) or "1"
        told = f"{escape(layer.name)}, {shape}, {100 * layer.kept:.1f} % kept"
        shown += (
            f'<figure><img alt="mask of {escape(layer.name)}" src="{layer.image}" width="{layer.columns * scale}" '
            f'style="aspect-ratio:{layer.columns}/{layer.rows};height:auto">'
            f"<figcaption>{told}</figcaption></figure>\n"
        )
    return f'<div class="masks">\n{shown}</div>' if layers else ""


def incidents(found: Sequence[Mapping[str, Any]], *, run: bool = False) -> str:
    """Return a table of incidents, or "" if there are none. With ``run`` each names its run."""
    if not found:
        return ""
    titles = {"run": "Run", **_INCIDENTS} if run else _INCIDENTS
    rows = ([escape(_or_dash(one.get(key))) for key in titles] for one in found[:_MOST_INCIDENTS])
    more = len(found) - _MOST_INCIDENTS
    rest = f"<p>{more:,} more are in incidents.json.</p>" if more > 0 else ""
    return f"<h2>Incidents</h2>\n{grid(list(titles.values()), rows)}\n{rest}"


def folded(title: str, body: str, *, anchor: str = "") -> str:
    """Return a part that opens when its title is clicked, or when a link leads to ``anchor`` in it."""
    mark = f'<div id="{anchor}"></div>' if anchor else ""
    return f"<details><summary>{escape(title)}</summary>\n{mark}{body}\n</details>" if body else ""


def code(text: str, *, wrap: bool = True) -> str:
    """Return text to copy."""
    return f'<pre class="copied{" wrap" * wrap}">{escape(text)}</pre>'


def commit(about: Mapping[str, Any]) -> str:
    """Return a line with the commit of the code, and whether it had been changed."""
    if not about.get("commit"):
        digest = str(about.get("source") or "")[:12]
        return f"<p>The commit is not known{f'; digest of the source {escape(digest)}' if digest else ''}.</p>"
    changed = ", with changes that are not committed" if about.get("dirty") else ""
    return f"<p>Commit <code>{escape(str(about['commit']))}</code>{changed}.</p>"


def link(target: str, text: str) -> str:
    """Return a link to a file, by its path from the page's folder."""
    return f'<a href="{quote(target)}">{escape(text)}</a>'


def tiles(values: Sequence[tuple[str, str]]) -> str:
    """Return a few values, large, each with what it is."""
    return (
        '<div class="tiles">'
        + "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in values)
        + "</div>"
        if values
        else ""
    )


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested values as (dotted key, text) pairs."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)))
    return rows


def _table(head: str, body: str, kind: str, example: str) -> str:
    told = f' data-example="{escape(example)}"' if example else ""
    classes = f' class="{kind}"' if kind else ""
    return (
        f'<div class="scroll" tabindex="0"><table{classes}{told}>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody>\n</table></div>"
    )


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)
