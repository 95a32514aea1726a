"""The documentation says what the code does: defaults, names, links, commands, and Python that can be parsed."""

from __future__ import annotations

import inspect
import re
import runpy
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from test_imports import MODULES, ROOMS

import autoflip_flwr
import autoflip_flwr.torch
from autoflip_flwr import AutoFlip

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
REFERENCE = ROOT / "docs" / "reference.md"
PAGES = [
    *(ROOT / name for name in ("README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md", "docker/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
]
URLS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["urls"]
REPOSITORY = URLS["Repository"]
BRANCH = "main"

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)|^\[[^]^][^]]*\]: (\S+)$", re.MULTILINE)
CODE = re.compile(r"`[^`\n]+`")
NAMED = re.compile(r"\[([^]^][^]]*)\](?:\[([^]]+)\]|(?![\[(:]))")
WIDEST = 100  # letters of a command in README.md

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


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


def links(page: Path) -> list[str]:
    return [one or other for one, other in LINK.findall(FENCE.sub("", page.read_text("utf-8")))]


def of_the_repository(link: str) -> str | None:
    """The path, with its anchor, that an absolute link has in the repository; None if it leads elsewhere."""
    found = re.fullmatch(rf"{re.escape(REPOSITORY)}/(?:blob|tree|raw)/{BRANCH}/(.*)", link)
    return found and found[1]


def must_lead_somewhere(link: str, target: Path) -> None:
    anchor = link.partition("#")[2]
    assert target.exists(), link
    assert not anchor or anchor in anchors(target.read_text("utf-8")), link


def bash_blocks(text: str) -> list[str]:
    return [block for kind, block in FENCE.findall(text) if kind == "bash"]


def python_blocks() -> list[pytest.param]:
    found = [
        (page.relative_to(ROOT).as_posix(), *block)
        for page in PAGES
        for block in FENCE.findall(page.read_text("utf-8"))
    ]
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
    for link in links(page):
        inside = of_the_repository(link)
        if inside is not None:
            must_lead_somewhere(link, ROOT / inside.partition("#")[0])
        elif not re.match(r"[a-z]+:", link):
            path = link.partition("#")[0]
            must_lead_somewhere(link, page.parent / path if path else page)


@pytest.mark.parametrize("code", python_blocks())
def test_python_blocks_can_be_parsed(code):
    compile(code, "<docs>", "exec")


# --- README.md, which PyPI shows as well -----------------------------------------------------------------------------


def test_the_readme_is_whole_on_pypi():
    assert links(README)
    assert [link for link in links(README) if not link.startswith("https://")] == []
    assert "<img" not in README.read_text("utf-8")


def test_each_name_of_a_link_in_the_readme_has_its_address():
    text = CODE.sub("code", FENCE.sub("", README.read_text("utf-8")))
    given = {name.lower() for name in re.findall(r"^\[([^]^][^]]*)\]: ", text, re.MULTILINE)}
    used = {(name or shown).lower() for shown, name in NAMED.findall(text)}
    assert used == given


def test_the_repository_has_one_address():
    assert all(url.startswith(REPOSITORY) for url in URLS.values())
    name = REPOSITORY.rpartition("/")[2]
    ours = [url for url in links(README) if name in url]
    assert len(ours) > 10
    for url in (URLS["Documentation"], URLS["Changelog"], *ours):
        assert of_the_repository(url), url
        must_lead_somewhere(url, ROOT / of_the_repository(url).partition("#")[0])


def test_commands_of_the_readme_fit_on_a_line():
    lines = [line for block in bash_blocks(README.read_text("utf-8")) for line in block.splitlines()]
    assert [line for line in lines if len(line) > WIDEST] == []


def test_two_blocks_set_the_project_up_and_continuous_integration_tests_as_the_second_says():
    run, test = bash_blocks(section(README.read_text("utf-8"), "Try it"))[:2]
    environment = "python3 -m venv .venv && . .venv/bin/activate"
    assert run.splitlines() == [environment, 'pip install -e ".[app]"', "autoflip run"]
    assert test.splitlines()[:2] == [environment, 'pip install -e ".[dev]"']
    (command,) = test.splitlines()[2:]
    checks = (ROOT / ".ci" / "run").read_text("utf-8").splitlines()
    assert [line for line in checks if "pytest" in line] == [command]
    assert command in (ROOT / "CONTRIBUTING.md").read_text("utf-8")


# --- what the pages tell of the tree ---------------------------------------------------------------------------------


def test_the_index_has_every_page_once():
    index = ROOT / "docs" / "README.md"
    listed = [link for link in links(index) if "/" not in link]
    assert sorted(listed) == sorted(page.name for page in index.parent.glob("*.md") if page != index)


def test_contributors_find_every_room_of_the_library_in_its_order():
    text = section((ROOT / "CONTRIBUTING.md").read_text("utf-8"), "Where things are")
    assert [row[0] for row in rows(text)] == [f"`{room}`" for room in ROOMS]


def test_the_picture_names_every_room_and_modules_that_are_there():
    text = [element for element in ElementTree.parse(ROOT / "docs" / "rooms.svg").iter() if element.text]
    shown = {element.text for element in text if element.get("class") == "room"}
    assert shown == ROOMS.keys()
    files = {name for element in text if element.get("class") == "file" for name in re.findall(r"\w+", element.text)}
    assert files <= {name.rpartition(".")[2] for name in MODULES}


def test_the_tables_of_parameters_are_made_of_the_docstrings():
    page = REFERENCE.read_text("utf-8")
    make = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))
    assert make["filled"](page) == page, "python docs/make_reference.py"
