"""A throw-away Flower project, for tests that run one with Flower's own tools."""

from __future__ import annotations

from pathlib import Path

PROJECT = """\
[project]
name = "{name}"
version = "1.0.0"
description = "Of a test"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "test"
[tool.flwr.app.components]
serverapp = "own_server:app"
clientapp = "own_client:app"
[tool.flwr.app.config]
{config}
"""


def write_project(folder: Path, *, server: str, client: str, config: str) -> Path:
    """A project named as its new folder, of the text of a server and a client app and of its settings (TOML)."""
    folder.mkdir()
    (folder / "pyproject.toml").write_text(PROJECT.format(name=folder.name, config=config))
    (folder / "own_server.py").write_text(server)
    (folder / "own_client.py").write_text(client)
    return folder
