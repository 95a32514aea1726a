"""Write the tables of parameters in reference.md from the docstrings: each parameter is described once, in the code.

python docs/make_reference.py
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from pathlib import Path

from autoflip_flwr.core.schedule import default_of

PAGE = Path(__file__).with_name("reference.md")
BLOCK = re.compile(r"(<!-- parameters of ([\w.]+), made by docs/make_reference.py -->\n).*?(<!-- end -->)", re.DOTALL)
ROLE = re.compile(r":\w+:`(?:([^`<]+) <[^`>]+>|~?([^`]+))`")


def filled(page: str) -> str:
    """The page with each of its tables made anew."""
    return BLOCK.sub(lambda found: f"{found[1]}{table(found[2])}{found[3]}", page)


def table(name: str) -> str:
    """The parameters of a class: name, type, default, meaning."""
    module, _, attribute = name.rpartition(".")
    thing = getattr(importlib.import_module(module), attribute)
    described = parameters(thing)
    made = (
        {field.name: default_of(field) for field in dataclasses.fields(thing)}
        if dataclasses.is_dataclass(thing)
        else {}
    )
    lines = ["| parameter | type | default | meaning |", "|---|---|---|---|"]
    for each in inspect.signature(thing).parameters.values():
        kind, meaning = described[each.name]
        default = "" if each.default is each.empty else f"`{made.get(each.name, each.default)!r}`"
        lines.append(f"| `{each.name}` | {kind} | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def parameters(thing: type) -> dict[str, tuple[str, str]]:
    """Type and meaning of each parameter, as the docstrings of a class and of those that it extends tell."""
    found: dict[str, tuple[str, str]] = {}
    for title in ("Attributes", "Parameters"):  # the latter are what it is given
        for kind in reversed(thing.__mro__):
            text = inspect.cleandoc(kind.__doc__ or "")
            section = re.search(rf"^{title}\n-+\n(.*?)(?=^\w[^\n]*\n-+\n|\Z)", text, re.DOTALL | re.MULTILINE)
            for names, told, meaning in re.findall(
                r"^(\S[^\n:]*) : ([^\n]+)\n((?:    [^\n]*\n?|\n)+)",
                (section[1] if section else "") + "\n",
                re.MULTILINE,
            ):
                shown = re.sub(r" \(default: .*\)$", "", told)
                for each in names.split(", "):
                    found[each] = cell(shown), cell(" ".join(meaning.split()))
    return found


def cell(text: str) -> str:
    """Text of a docstring as Markdown, in a cell."""
    text = ROLE.sub(lambda role: f"`{role[1] or role[2].rpartition('.')[2]}`", text)
    return re.sub(r"`*``([^`]+)``", r"`\1`", text).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text("utf-8")), "utf-8")
