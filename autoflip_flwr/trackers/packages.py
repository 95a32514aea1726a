"""Say which package a tracker lacks. Nothing is imported here, so that the command can ask before a run."""

from __future__ import annotations

import importlib.util


def lacks(package: str) -> str:
    """Return, in words, that a tracker's package is not installed, and what to install; "" if it is.

    The extra of each has the name of the package that is imported.
    """
    found = importlib.util.find_spec(package)
    if found is not None and found.origin is not None:  # a folder of this name, as W&B writes one, is no package
        return ""
    return f"the package {package} is not installed: pip install 'autoflip-flwr[{package}]'"


def require(package: str) -> None:
    """Raise ``ModuleNotFoundError``, in one line that says what to install, if a tracker's package is missing."""
    if words := lacks(package):
        raise ModuleNotFoundError(words, name=package)
