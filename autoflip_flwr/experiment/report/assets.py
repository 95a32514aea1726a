"""Hold the style and the script of the pages; both stand in each page, so that it opens from disk alone.

They are text in a Python module because Flower ships an app's Python files only.
"""

from __future__ import annotations

from autoflip_flwr.experiment.report.figures import COLOURS, DARK


def _runs(colours: tuple[str, ...]) -> str:
    return " ".join(f"--run-{number}: {colour};" for number, colour in enumerate(colours))


STYLE = f"""
:root {{
  color-scheme: light dark;
  --page: #ffffff; --ink: #1f2328; --soft: #59636e; --line: #d9dee3; --grid: #e4e7ea; --shade: #f4f6f8;
  --link: #0a5fb0; --bar: #0072b2; --note: #fff4d6; --bad: #b3261e; {_runs(COLOURS)}
}}
@media (prefers-color-scheme: dark) {{
  :root {{
    --page: #14171a; --ink: #e6e9ec; --soft: #9aa4ae; --line: #343b42; --grid: #2b3137; --shade: #1d2226;
    --link: #79b8ff; --bar: #4aa8e8; --note: #3a3115; --bad: #ff8a80; {_runs(DARK)}
  }}
}}
"""

STYLE += """
* { box-sizing: border-box; }
body {
  font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 76rem; margin: 0 auto; padding: 1rem 1rem 4rem; overflow-wrap: break-word;
}
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: .6rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p { margin: .4rem 0; max-width: 48rem; }
a { color: var(--link); }
.soft { color: var(--soft); font-size: .9rem; }
.note { background: var(--note); padding: .5rem .8rem; border-radius: .3rem; max-width: none; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .8rem 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.tiles div { background: var(--shade); border-radius: .4rem; padding: .5rem .8rem; }
.tiles b { display: block; font-size: 1.25rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--soft); font-size: .85rem; }
.scroll { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: separate; border-spacing: 0; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem .4rem; border-bottom: 1px solid var(--line); }
thead th { vertical-align: bottom; border-bottom: 2px solid var(--line); font-weight: 600; }
thead th.group { text-align: center; } thead th.none { border-bottom: none; }
tbody tr:hover { background: var(--shade); }
td.n, th.n { text-align: right; white-space: nowrap; }
thead th.n { white-space: normal; }
th.first, td.first { position: sticky; left: 0; background: var(--page); }
.filtered .first { min-width: min(13rem, 36vw); }
th button {
  all: unset; cursor: pointer; font-weight: 600; display: inline-block; border-radius: .2rem; overflow-wrap: normal;
}
th button::after { content: "\\2195"; color: var(--soft); padding-left: .2em; font-weight: 400; }
th[aria-sort=ascending] button::after { content: "\\2191"; color: inherit; }
th[aria-sort=descending] button::after { content: "\\2193"; color: inherit; }
button:focus-visible, summary:focus-visible, a:focus-visible, .scroll:focus-visible {
  outline: 2px solid var(--link); outline-offset: 2px;
}
table.facts { width: 100%; table-layout: fixed; }
table.facts th { width: 38%; font-weight: 500; color: var(--soft); padding-left: 0; }
table.facts td { overflow-wrap: anywhere; }
.bar { width: clamp(4rem, 22vw, 18rem); height: 1.1em; margin-top: .2em; background: var(--shade); }
.bar i { display: block; height: 100%; min-width: 1px; background: var(--bar); }
.bad { color: var(--bad); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem 2rem; }
figure { margin: .5rem 0; max-width: 33rem; min-width: 0; }
figcaption { font-weight: 600; font-size: .95rem; margin-bottom: .2rem; }
figure svg { display: block; width: 100%; height: auto; }
svg image { image-rendering: pixelated; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; margin: .6rem 0; padding: 0; list-style: none; }
.legend button, .legend span { all: unset; display: inline-flex; align-items: center; gap: .4rem; font-size: .9rem; }
.legend button { cursor: pointer; padding: .15rem 0; }
.legend button[aria-pressed=false] { opacity: .4; text-decoration: line-through; }
.swatch { width: 2.2em; height: 1em; flex: none; vertical-align: -.15em; }
.off { display: none; }
.filter { display: flex; flex-wrap: wrap; gap: .2rem .8rem; align-items: center; margin: .6rem 0; }
.filter input {
  font: inherit; font-size: .9rem; color: inherit; background: var(--page); border: 1px solid var(--soft);
  border-radius: .3rem; padding: .25rem .5rem; width: 18rem; max-width: 100%;
}
.masks { display: flex; flex-wrap: wrap; gap: 1rem 1.5rem; align-items: flex-end; }
.masks figure { max-width: 100%; margin: 0; }
.masks img { display: block; max-width: 100%; image-rendering: pixelated; border: 1px solid var(--line); }
.masks figcaption { font-weight: 400; font-size: .85rem; overflow-wrap: anywhere; }
details { margin: .5rem 0; }
summary { cursor: pointer; padding: .2rem 0; }
details > :not(summary) { margin-left: .2rem; }
pre {
  background: var(--shade); padding: .6rem .8rem; border-radius: .3rem; overflow-x: auto; font-size: .82rem;
  line-height: 1.4; margin: .3rem 0; max-height: 26rem;
}
pre.wrap { white-space: pre-wrap; overflow-wrap: anywhere; }
.copy {
  font: inherit; font-size: .85rem; color: inherit; background: var(--page); border: 1px solid var(--soft);
  border-radius: .3rem; padding: .1rem .6rem; cursor: pointer;
}
.rows details details { margin-left: 1rem; }
@media print { .filter, .copy { display: none; } .scroll { overflow: visible; } }
"""

SCRIPT = """
"use strict";
(() => {
  const make = (tag, properties) => Object.assign(document.createElement(tag), properties);
  const show = (section, run, on) =>
    section.querySelectorAll("svg .run-" + run).forEach(part => part.classList.toggle("off", !on));

  const value = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
  const byValue = (one, other) => {
    if (one === "" || other === "") return 0;
    const difference = Number(one) - Number(other);
    return Number.isNaN(difference) ? one.localeCompare(other, undefined, {numeric: true}) : difference;
  };
  const sort = (table, column, sign) => {
    const rows = [...table.tBodies[0].rows];
    const known = row => value(row, column) !== "";
    rows.sort((a, b) => known(b) - known(a) || sign * byValue(value(a, column), value(b, column)));
    table.tBodies[0].append(...rows);
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
    heads.forEach((head, column) => {
      const button = make("button", {type: "button", title: "sort"});
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        heads.forEach(each => each.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        sort(table, column, up ? 1 : -1);
      });
    });
  }

  for (const table of document.querySelectorAll("table.filtered")) {
    const section = table.closest("section") ?? document;
    const rows = [...table.tBodies[0].rows];
    const count = make("span", {className: "soft"});
    const input = make("input", {type: "search", placeholder: "Filter rows, e.g. " + table.dataset.example});
    input.setAttribute("aria-label", "Filter rows");
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(/\\s+/).filter(Boolean);
      let left = 0;
      for (const row of rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every(word => text.includes(word));
        left += !row.hidden;
        if (row.dataset.run) show(section, row.dataset.run, !row.hidden);
      }
      count.textContent = words.length ? left + " of " + rows.length : "";
      section.querySelectorAll(".legend button").forEach(button => {
        const row = rows.find(each => each.dataset.run === button.dataset.run);
        button.setAttribute("aria-pressed", String(!row?.hidden));
      });
    });
    const box = make("div", {className: "filter"});
    box.append(input, count);
    table.parentElement.before(box);
  }

  for (const entry of document.querySelectorAll(".legend [data-run]")) {
    const button = make("button", {type: "button", title: "show or hide"});
    button.dataset.run = entry.dataset.run;
    button.setAttribute("aria-pressed", "true");
    button.append(...entry.childNodes);
    entry.replaceWith(button);
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") === "false";
      button.setAttribute("aria-pressed", String(on));
      show(button.closest("section"), button.dataset.run, on);
    });
  }

  for (const text of document.querySelectorAll("pre.copied")) {
    const button = make("button", {type: "button", className: "copy", textContent: "Copy"});
    button.addEventListener("click", () => {
      const range = document.createRange();
      range.selectNodeContents(text);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      button.textContent = document.execCommand("copy") ? "Copied" : "Press Ctrl-C";
    });
    text.before(button);
  }
})();
"""
"""Sorts and filters tables, hides curves and copies text. Without it the page shows all the same."""
