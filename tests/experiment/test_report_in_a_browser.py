"""The pages of real runs in a real browser: no error, no request, nothing too wide, tables that sort and filter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser
from flwr.clientapp import ClientApp
from suites import entry, write_suite

from autoflip_flwr import autoflip_mod
from autoflip_flwr.experiment import client, server
from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.report import report
from autoflip_flwr.testing import LocalGrid

pytestmark = pytest.mark.runs

RUNS = (
    {"method": "fedavg", "sparsity": 0.0, "seed": 1},
    {"method": "autoflip", "sparsity": 0.9, "seed": 1},
    {"method": "autoflip", "sparsity": 0.9, "seed": 2},
)
FEW = {"dataset": "digits", "nodes": 3, "num-server-rounds": 2, "local-epochs": 1, "exploration-epochs": 1}
PAGES = ("run", "suite", "comparison")
WIDTHS = (1280, 390)
SCHEMES = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 26)"}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The reports of a run, of a suite of three runs, of which another failed, and of a comparison of two."""
    folder = tmp_path_factory.mktemp("reports") / "suite"
    entries, runs = [], []
    for varies in RUNS:
        settings = {**FEW, **varies, "output-dir": str(folder)}
        app = ClientApp(client_fn=client.client_fn, mods=[autoflip_mod])
        path = server.run(LocalGrid(app, 3, settings), Config.from_run_config(settings))
        (path / "holdings.json").write_text(
            json.dumps({"classes": [str(digit) for digit in range(10)], "counts": [list(range(10))] * 3})
        )
        entries.append(entry(path, varies))
        runs.append(path)
    entries.append(entry(folder / "bad", {**RUNS[1], "seed": 3}, state="failed", reason="no explorer answered"))
    write_suite(folder, entries)
    return {
        "run": report.write(runs[1]),
        "suite": report.write_suite(folder),
        "comparison": report.compare(runs[:2], folder.parent / "comparison"),
    }


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def test_the_browser_tells_of_errors_and_requests(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text('<script>console.error("one"); missing();</script><img src="http://127.0.0.1:9/a.png">')
    browser.open(page, 390, "light")
    for word in ('"one"', "missing is not defined", "Failed to load resource"):
        assert any(word in complaint for complaint in browser.complaints), word
    assert "http://127.0.0.1:9/a.png" in browser.requests


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_opens_from_disk_and_fits(
    name: str, width: int, scheme: str, pages: dict[str, Path], browser: Browser
) -> None:
    browser.open(pages[name], width, scheme)
    assert browser.ask("document.querySelectorAll('details').forEach(each => each.open = true)") is None
    assert browser.ask("document.scrollingElement.scrollWidth") <= width
    assert browser.ask("document.documentElement.clientWidth") == width
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == SCHEMES[scheme]
    assert browser.ask("document.querySelectorAll('figure svg').length") >= 4
    assert browser.ask("[...document.images].every(each => each.complete && each.naturalWidth > 0)")
    assert browser.complaints == []
    assert [url for url in browser.requests if not url.startswith("data:")] == [pages[name].resolve().as_uri()]


def first_cells(browser: Browser) -> list[str]:
    """The first cells of the rows of the first table to filter that can be seen."""
    rows = "[...document.querySelector('table.filtered').tBodies[0].rows]"
    return browser.ask(f"{rows}.filter(row => row.offsetParent).map(row => row.cells[0].textContent.trim())")


def test_a_table_sorts_and_filters(pages: dict[str, Path], browser: Browser) -> None:
    dense, sparse = "fedavg", "autoflip, density 10%"
    browser.open(pages["suite"], 1280, "light")
    assert first_cells(browser) == [dense, sparse]
    head = "[...document.querySelectorAll('table.filtered th button')].find(each => each.textContent === 'MB')"
    browser.ask(f"{head}.click()")
    assert first_cells(browser) == [sparse, dense]
    browser.ask(f"{head}.click()")
    assert first_cells(browser) == [dense, sparse]
    assert browser.ask(f"{head}.parentElement.getAttribute('aria-sort')") == "descending"

    curves = "[...document.querySelectorAll('.plots svg .run-0')].filter(each => each.getClientRects().length).length"
    drawn = browser.ask(curves)
    assert drawn >= 4
    browser.ask(
        "((input) => { input.value = 'AutoFLIP 10%'; input.dispatchEvent(new Event('input')); })"
        "(document.querySelector('.filter input'))"
    )
    assert first_cells(browser) == [sparse]
    assert browser.ask("document.querySelector('.filter span').textContent") == "1 of 2"
    assert browser.ask(curves) == 0
    browser.ask("document.querySelector('.legend [data-run=\"0\"]').click()")
    assert browser.ask(curves) == drawn
    assert browser.complaints == []


def test_a_rows_name_leads_to_its_settings(pages: dict[str, Path], browser: Browser) -> None:
    browser.open(pages["suite"], 390, "light")
    browser.ask("document.querySelector('table.filtered a').click()")
    open_ = "[...document.querySelectorAll('details[open] > summary')].map(each => each.textContent)"
    assert browser.ask(open_) == ["Each row: settings, commit and command", "fedavg"]


def test_text_can_be_copied(pages: dict[str, Path], browser: Browser) -> None:
    browser.open(pages["suite"], 1280, "dark")
    assert browser.ask("document.querySelectorAll('button.copy').length") >= 5
    browser.ask("document.querySelectorAll('details').forEach(each => each.open = true)")
    browser.ask("document.querySelector('button.copy').click()")
    assert "autoflip run" in browser.ask("getSelection().toString()")


def test_the_page_is_whole_without_its_script(pages: dict[str, Path], browser: Browser, tmp_path: Path) -> None:
    text = pages["suite"].read_text()
    bare = tmp_path / "report.html"
    bare.write_text(text[: text.index("<script>")] + text[text.index("</script>") :])
    browser.open(bare, 390, "light")
    assert browser.ask("document.querySelectorAll('button, input').length") == 0
    assert first_cells(browser) == ["fedavg", "autoflip, density 10%"]
