"""Settings of the app for a benchmark: defaults, the static mask's, a recipe, the benchmark's own, then the user's."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.rules import Value
from autoflip_flwr.experiment.toml import flatten, parse_pairs, read_toml

ROOT = Path(__file__).parents[1]

STATIC: Mapping[str, Value] = {
    "schedule": "static",
    "rank-by": "deviation",
    "initial": "scratch",
    "lr-power": 0.0,
    "exploration-epochs": 5,
}
"""The settings of what these benchmarks measure: the paper's method, with one mask by five epochs of exploration."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a benchmark of any recipe, over several seeds."""
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--nodes", type=int, default=10)
    parser.add_argument("--config", type=Path, help="recipe of the app (TOML)")
    add_pairs(parser)


def add_pairs(parser: argparse.ArgumentParser) -> None:
    """Add the argument for single settings."""
    parser.add_argument("-c", dest="pairs", default="", help="settings of the app, as for `autoflip run`")


def settings_of(recipe: Path | None, pairs: str, own: Mapping[str, Value] | None = None) -> dict[str, Value]:
    """Return all settings; ``own`` are the benchmark's, ``pairs`` those of the command line."""
    return {
        **Config().as_dict(),
        **STATIC,
        **(flatten(read_toml(recipe)) if recipe else {}),
        **(own or {}),
        **parse_pairs(pairs),
    }
