"""Write the report of a run as one self-contained HTML page."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from autoflip_flwr.experiment.record.runs import Run
from autoflip_flwr.experiment.record.summary import summary_rows

_CSS = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #e4e4e4; }
th { font-weight: 500; color: #555; width: 40%; } td { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
img { max-width: 100%; height: auto; margin: 1rem 0; }
.note { background: #fff4d6; padding: .5rem .8rem; border-radius: .3rem; overflow-wrap: anywhere; }
.incidents th, .incidents td { width: auto; }
"""
_INCIDENTS = {"round": "Round", "phase": "Phase", "node": "Node", "kind": "What", "reason": "Reason"}
_MOST_INCIDENTS = 200


def render(run: Run, pictures: Mapping[str, bytes]) -> str:
    """Return the page of a run, with its pictures (PNG, by name) embedded."""
    origin = _without_settings(run.about)
    for number, each in enumerate(run.about.get("resumed", []), 1):
        origin[f"resumed.{number}"] = _without_settings(each)
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
{_note(run)}
{_section("Summary", summary_rows(run.summary))}
{images or "<p>No round has been evaluated yet.</p>"}
{_table_of_incidents(run.incidents)}
{_section("Settings", _flat(run.settings))}
{_section("Origin", _flat(origin))}
</body>
</html>
"""


def _without_settings(about: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in about.items() if key not in ("config", "resumed")}


def _note(run: Run) -> str:
    if run.complete:
        return ""
    text = "it was interrupted, or still goes on."
    if run.failure:
        text = f"<strong>{escape(run.failure)}</strong>"
    return f'<p class="note">This run is not complete: {text}</p>'


def _table_of_incidents(incidents: Sequence[Mapping[str, Any]]) -> str:
    if not incidents:
        return ""
    head = "".join(f"<th>{title}</th>" for title in _INCIDENTS.values())
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(str(_or_dash(one.get(key))))}</td>" for key in _INCIDENTS) + "</tr>\n"
        for one in incidents[:_MOST_INCIDENTS]
    )
    more = len(incidents) - _MOST_INCIDENTS
    rest = f"<p>{more:,} more are in incidents.json.</p>" if more > 0 else ""
    return f'<h2>Incidents</h2>\n<table class="incidents">\n<tr>{head}</tr>\n{rows}</table>\n{rest}'


def _or_dash(value: object) -> object:
    return "-" if value is None else value


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
