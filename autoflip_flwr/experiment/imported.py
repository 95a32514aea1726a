"""Find what a user names as `module:callable`, in the environment or in the current folder."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

from autoflip_flwr.experiment.rules import ConfigError, shown


def check_module(setting: str, name: str) -> None:
    """Check that the module of `name` is there, without loading it.

    Parameters
    ----------
    setting : str
        Key of the setting, for the error.
    name : str
        `module:callable`.

    Raises
    ------
    ConfigError
        If the module's outermost package is neither in the environment nor in the current folder.
    """
    package = name.partition(":")[0].partition(".")[0]
    _see_the_current_folder()
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{setting} = {shown(name)}: {_missing(package)}")


def find(setting: str, name: str) -> Callable[..., Any]:
    """Import the callable that `name` says. The parameters are those of :func:`check_module`.

    Raises
    ------
    ConfigError
        If there is no such module or name, if the module cannot be imported, or if what it has is not callable.
    """
    module, _, attribute = name.partition(":")
    _see_the_current_folder()
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            raise ConfigError(f"{setting} = {shown(name)}: {_missing(error.name)}") from error
        raise ConfigError(f"{setting} = {shown(name)}: {module} needs {error.name}, which is not installed") from error
    except Exception as error:  # whatever the user's module raises
        raise ConfigError(f"{setting} = {shown(name)}: importing {module} failed: {in_words(error)}") from error
    if not hasattr(loaded, attribute):
        raise ConfigError(f"{setting} = {shown(name)}: the module {module} has no {attribute}")
    found = getattr(loaded, attribute)
    if not callable(found):
        raise ConfigError(f"{setting} = {shown(name)}: {attribute} is a {type(found).__name__}, and not callable")
    return found  # type: ignore[no-any-return]


def in_words(error: Exception) -> str:
    """Return an error of a user's own code as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")


def _missing(module: str) -> str:
    return f"no module {module} here: neither in the environment nor in the folder {os.getcwd()}"


def _see_the_current_folder() -> None:
    # at the end, so that a file there hides no installed package
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
