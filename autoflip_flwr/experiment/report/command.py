"""Write the command that repeats a run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from autoflip_flwr.experiment.config import Config

_OF_PLACE = ("name", "output-dir", "resume")
"""Settings that say where a run's record is, which its repetition has elsewhere."""


def repeating(settings: Mapping[str, Any]) -> str:
    """Return ``autoflip run`` with the settings that differ from the app's defaults."""
    defaults = Config().as_dict()
    pairs = [
        f"{key}={_literal(value)}"
        for key, value in settings.items()
        if key not in _OF_PLACE and value is not None and (key not in defaults or defaults[key] != value)
    ]
    return shlex.join(["autoflip", "run", *(["-c", " ".join(pairs)] if pairs else [])])


def _literal(value: Any) -> str:
    # JSON's strings and booleans are TOML's as well
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
