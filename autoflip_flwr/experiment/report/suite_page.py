"""Write the report of a suite or a comparison as one page: a section per data set, and every run."""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from autoflip_flwr.experiment.evaluation import LAST
from autoflip_flwr.experiment.record.suites import Entry, Suite
from autoflip_flwr.experiment.report import html, tables
from autoflip_flwr.experiment.report.figures import plots, series_of
from autoflip_flwr.experiment.report.pictures import holdings
from autoflip_flwr.experiment.report.points import final_accuracy, points
from autoflip_flwr.experiment.report.rows import Row, Section

_STATES = ("done", "running", "waiting", "unfinished", "failed")
_FILES = (("table.md", "Markdown"), ("table.tex", "LaTeX"), ("table.csv", "CSV"))


def render(
    title: str,
    folder: Path,
    entries: Sequence[Entry],
    sections: Sequence[Section],
    texts: Mapping[str, str],
    files: Sequence[str],
    suite: Suite | None,
) -> str:
    """Return the page of a suite, or without one of a comparison.

    ``folder`` is where the page will be. ``texts`` are the tables by the names of their files, which lie beside it;
    ``files`` are the paths of further files from ``folder``.
    """
    over_seeds = any(len(row.entries) > 1 for section in sections for row in section.rows)
    failed = [entry for entry in entries if entry.state == "failed"]
    found = [{**one, "run": entry.name} for entry in entries for one in entry.run.incidents]
    parts = [
        _states(entries),
        html.commit(suite.about) if suite else "",
        _versions(entries),
        _contents(sections),
        _reading(over_seeds=over_seeds),
        *(_section(section, number, folder) for number, section in enumerate(sections)),
        "" if sections else "<p>No run has been evaluated yet.</p>",
        _exports(texts, files) if sections else "",
        _failed(failed),
        _runs(entries, folder),
        html.incidents(found, run=True),
        _origin(suite) if suite else "",
    ]
    return html.document(title, "\n".join(filter(None, parts)))


def _states(entries: Sequence[Entry]) -> str:
    count = Counter(entry.state for entry in entries)
    others = [f"{count[state]} {state}" for state in _STATES[1:] if count[state]]
    text = f"{count['done']} of {len(entries)} runs done" + "".join(f", {each}" for each in others) + "."
    return f'<p class="note">{text}</p>' if others else f"<p>{text}</p>"


def _versions(entries: Sequence[Entry]) -> str:
    """Warn if the runs were not all made by the same code."""
    sources = {entry.run.about.get("source") for entry in entries if entry.run.metrics}
    if len(sources) < 2:
        return ""
    text = f"These runs were made by {len(sources)} different versions of the code. The commits are told with each row."
    return f'<p class="note">{text}</p>'


def _contents(sections: Sequence[Section]) -> str:
    links = [f'<a href="#{section.anchor}">{escape(section.title)}</a>' for section in sections]
    return f"<nav>{' '.join([*links, '<a href=#exports>Tables to copy</a>', '<a href=#runs>All runs</a>'])}</nav>"


def _reading(*, over_seeds: bool) -> str:
    seeds = " A row is the mean over its seeds; ± and the bands are the sample standard deviation." * over_seeds
    those = ", a mean over the seeds that do" * over_seeds
    return (
        f'<p class="soft">A run\'s accuracy is the mean of its last {LAST} evaluated rounds, of the global model on '
        f"the test set.{seeds} MB are 10<sup>6</sup> bytes of all messages, both ways; “saved” is against dense "
        "FedAvg. GFLOP are those of a dense model. “To” a target is what was spent up to the first evaluation that "
        f"reaches it{those}.</p>"
    )


def _section(section: Section, number: int, folder: Path) -> str:
    series = series_of(section)
    links = [f"row-{number}-{row}" for row in range(len(section.rows))]
    target = ""
    if section.target is not None:
        target = f"<p>Target, the dashed line: {100 * section.target:.2f} % ({escape(section.target_told)}).</p>"
    table = html.numbers(
        tables.columns(section), [row.number for row in section.rows], links, section.rows[0].label.split(",")[0]
    )
    rows = "\n".join(_row(row, anchor, folder) for row, anchor in zip(section.rows, links, strict=True))
    first = section.rows[0].entries[0]
    picture = holdings(first.run.path / "holdings.json", f"holdings-{number}")
    parts = [
        f'<section id="{section.anchor}">\n<h2>{escape(section.title)}</h2>\n{target}',
        html.legend(series) + html.figures(plots(series, section.target, section.anchor)) if series else "",
        table,
        f'<div class="rows">{html.folded("Each row: settings, commit and command", rows)}</div>',
        html.folded("Density by layer", _density(section.rows)),
        html.folded("Bytes by node", _bytes(section.rows)),
        html.folded(f"Who holds what ({first.name})", f"<figure>{picture}</figure>" if picture else ""),
        "</section>",
    ]
    return "\n".join(filter(None, parts))


def _row(row: Row, anchor: str, folder: Path) -> str:
    parts = []
    for entry in row.entries:
        told = [entry.name, _percent(final_accuracy(points(entry.run)))]
        parts.append(f"<h3>{', '.join(map(escape, filter(None, told)))}</h3>\n{_report_of(entry, folder)}")
        parts.append(html.commit(entry.run.about) + html.code(entry.command))
    settings = "\n".join(f"{key} = {value}" for key, value in html.flat(row.entries[0].settings) if key != "seed")
    parts.append(f"<h3>Settings</h3><pre>{escape(settings)}</pre>")
    return html.folded(row.label, "\n".join(parts), anchor=anchor)


def _report_of(entry: Entry, folder: Path) -> str:
    page = entry.run.path / "report.html"
    return f"<p>{html.link(_relative(page, folder), 'Report of this run')}: its mask and its nodes.</p>" * page.exists()


def _density(rows: Sequence[Row]) -> str:
    """Return the mean density of each layer, for each row that prunes."""
    found = {row.label: _mean_densities(row) for row in rows}
    found = {label: layers for label, layers in found.items() if layers}
    names = list(dict.fromkeys(name for layers in found.values() for name in layers))
    cells = (
        [escape(name), *(f"{layers[name]:.1%}" if name in layers else "-" for layers in found.values())]
        for name in names
    )
    return html.grid(["Layer", *found], cells, numeric=range(1, len(found) + 1)) if found else ""


def _mean_densities(row: Row) -> dict[str, float]:
    shares: dict[str, list[float]] = {}
    for entry in row.entries:
        for name, layer in (entry.run.summary.get("density_by_layer") or {}).items():
            shares.setdefault(name, []).append(layer["kept"] / max(layer["size"], 1))
    return {name: statistics.fmean(values) for name, values in shares.items()}


def _bytes(rows: Sequence[Row]) -> str:
    """Return the least, median and most MB that a node has sent and received, for each row."""
    found = {}
    for row in rows:
        nodes = [own["total"] / 1e6 for e in row.entries for own in (e.run.summary.get("bytes_by_node") or {}).values()]
        if nodes:
            found[row.label] = (min(nodes), statistics.median(nodes), max(nodes))
    largest = max((most for _, _, most in found.values()), default=0.0)
    cells = [[escape(label), *(tables.number(value, largest) for value in values)] for label, values in found.items()]
    heads = ["Run", "Least MB of a node", "Median", "Most"]
    return html.grid(heads, cells, numeric=(1, 2, 3)) if cells else ""


def _exports(texts: Mapping[str, str], files: Sequence[str]) -> str:
    parts = [html.folded(f"{told} ({name})", html.code(texts[name], wrap=False)) for name, told in _FILES]
    beside = ", ".join(html.link(name, name) for name in (*texts, *files))
    return f'<h2 id="exports">Tables to copy</h2>\n<p>Files beside this page: {beside}.</p>\n' + "\n".join(parts)


def _failed(entries: Sequence[Entry]) -> str:
    rows = [[escape(entry.name), f'<span class="bad">{escape(entry.reason)}</span>'] for entry in entries]
    return f"<h2>Failed runs</h2>\n{html.grid(['Run', 'Reason'], rows)}" if rows else ""


def _runs(entries: Sequence[Entry], folder: Path) -> str:
    rows = []
    for entry in entries:
        found, page = entry.run.summary, entry.run.path / "report.html"
        sent, flops = (found.get("bytes") or {}).get("total"), found.get("flops_total")
        state = escape(entry.state)
        rows.append(
            [
                html.link(_relative(page, folder), entry.name) if page.exists() else escape(entry.name),
                f'<span class="bad">{state}</span>' if entry.state == "failed" else state,
                _percent(final_accuracy(points(entry.run)), ""),
                "" if sent is None else f"{sent / 1e6:.3f}",
                "" if flops is None else f"{flops / 1e9:.2f}",
                "" if found.get("seconds_total") is None else f"{found['seconds_total']:.1f}",
                str(len(entry.run.incidents)),
            ]
        )
    heads = ["Run", "State", "Accuracy (%)", "MB", "GFLOP", "Seconds", "Incidents"]
    kind = "sortable filtered"
    table = html.grid(heads, rows, numeric=range(2, 7), kind=kind, example=f"{entries[0].state} {entries[0].seed}")
    return f'<section id="runs">\n<h2>All runs</h2>\n{table}\n</section>'


def _origin(suite: Suite) -> str:
    return (
        f"<h2>Repeat it</h2>\n{html.code(suite.command)}\n<p>The suite's file:</p>\n{html.code(suite.file)}\n"
        + html.folded("Origin: versions, machine, times", html.facts("", html.flat(suite.about)))
    )


def _percent(accuracy: float | None, unit: str = " %") -> str:
    return "" if accuracy is None else f"{100 * accuracy:.2f}{unit}"


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


def note(title: str, about: Mapping[str, Any]) -> str:
    """Return what the files of tables say of themselves."""
    commit = f", commit {about['commit']}{' with changes' if about.get('dirty') else ''}" if about.get("commit") else ""
    return (
        f"{title}{commit}. Accuracy: mean of the last {LAST} evaluated rounds; over seeds, mean and sample standard "
        "deviation. MB: 10^6 bytes of all messages, both ways."
    )
