"""The documentation says what the code does: defaults, names, links, and Python that can be parsed."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import autoflip_flwr
import autoflip_flwr.torch
from autoflip_flwr import AutoFlip

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "docs" / "reference.md"
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def section(text: str, heading: str) -> str:
    """The text below a heading of the second level, up to the next one."""
    return re.split(r"^## ", text.split(f"\n## {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    """The cells of the first table of a text, without its heading."""
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def python_blocks() -> list[pytest.param]:
    found = [(page.name, *block) for page in PAGES for block in FENCE.findall(page.read_text("utf-8"))]
    return [pytest.param(code, id=f"{name}-{n}") for n, (name, kind, code) in enumerate(found) if kind == "python"]


def test_the_table_of_autoflip_has_every_parameter_with_its_default():
    parameters = list(inspect.signature(AutoFlip.__init__).parameters.values())[1:]
    table = [(row[0], row[2]) for row in rows(section(REFERENCE.read_text("utf-8"), "AutoFlip"))]
    assert table == [(f"`{parameter.name}`", f"`{parameter.default!r}`") for parameter in parameters]


@pytest.mark.parametrize("name", sorted({*autoflip_flwr.__all__, *autoflip_flwr.torch.__all__}))
def test_every_public_name_has_a_heading(name):
    headings = re.findall(r"^##+ (.*)$", REFERENCE.read_text("utf-8"), re.MULTILINE)
    assert any(name in heading.split() for heading in headings)


@each_page
def test_links_lead_to_files_and_headings_that_are_there(page):
    for link in LINK.findall(FENCE.sub("", page.read_text("utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text("utf-8")), link


@pytest.mark.parametrize("code", python_blocks())
def test_python_blocks_can_be_parsed(code):
    compile(code, "<docs>", "exec")


def test_contributors_find_every_module_of_the_library():
    text = section((ROOT / "CONTRIBUTING.md").read_text("utf-8"), "Where things are")
    modules = {path.name for path in (ROOT / "autoflip_flwr").glob("*.py")} - {"__init__.py"}
    assert modules <= set(re.findall(r"`(\w+\.py)`", text))
