"""The `autoflip` command: run an experiment on this machine or on a SuperLink, report on finished ones."""

import argparse
import importlib.util
import json
import re
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from autoflip_flwr.experiment.config import Config, ConfigError, Value, shown
from autoflip_flwr.experiment.remote import run_app_on
from autoflip_flwr.experiment.superlink import Resources, run_app

APP_NAME = "autoflip-flwr"
DEFAULT_NODES = 10
PATH_SETTINGS = ("data-dir", "output-dir", "exploration", "resume")

# What `flwr run -c` takes for a pair; it passes over everything else in silence, which we do not.
_PAIR = re.compile(r"(\S+?)=('[^']*'|\"[^\"]*\"|\S+)")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"autoflip: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (default: those of the process).

    Returns
    -------
    int
        0 on success, 1 where the run failed, 2 where the command or a setting is wrong (nothing was started then),
        130 after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    try:
        code: int = options.command(options)
    except ConfigError as error:
        print(f"autoflip: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("autoflip: interrupted", file=sys.stderr)
        return 130
    return code


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file; raises `ConfigError` naming it where it is missing or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from None


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Value]:
    """Settings of a TOML table by dotted keys, as Flower names those of nested tables.

    Raises `ConfigError` for a list or a date, which Flower does not take.
    """
    flat: dict[str, Value] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, Value):
            flat[prefix + key] = value
        else:
            raise ConfigError(f"{prefix}{key} = {shown(value)}: must be a boolean, a number or a string")
    return flat


def parse_pairs(text: str) -> dict[str, Value]:
    """Read `key=value` pairs as `flwr run -c` does: TOML values, strings quoted, pairs separated by spaces.

    Raises `ConfigError` for anything else.
    """
    rest = _PAIR.sub(" ", text).split()
    if rest:
        raise ConfigError(f"-c {text!r}: {rest[0]!r} is not a key=value pair (no spaces around '=')")
    settings: dict[str, Value] = {}
    for key, value in _PAIR.findall(text):
        try:
            settings |= flatten(tomllib.loads(f"{key} = {value}"))
        except tomllib.TOMLDecodeError:
            raise ConfigError(f'{key}={value}: not a TOML value (a string needs quotes: {key}="...")') from None
    return settings


def to_toml(settings: Mapping[str, Value]) -> str:
    """The settings as a TOML document."""
    return "".join(f"{key} = {_literal(value)}\n" for key, value in settings.items())


def _literal(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def _run(options: argparse.Namespace) -> int:
    app: Path = options.app.expanduser().resolve()
    if not (app / "pyproject.toml").is_file():
        raise ConfigError(f"{options.app}: no Flower app there (no pyproject.toml)")
    project = read_toml(app / "pyproject.toml")
    settings: dict[str, Value] = {}
    if options.config:
        settings |= flatten(read_toml(options.config))
    for text in options.run_config:
        settings |= parse_pairs(text)
    own = project.get("project", {}).get("name") == APP_NAME
    reason = (_run_there if options.superlink else _run_here)(
        options, app, settings, _defaults(project) if own else None
    )
    if reason:
        print(f"autoflip: the run failed: {reason}", file=sys.stderr)
    return 1 if reason else 0


def _run_here(
    options: argparse.Namespace, app: Path, settings: dict[str, Value], defaults: Mapping[str, Value] | None
) -> str:
    """Run in simulation. `defaults` are those of the shipped app; None for any other, whose settings pass unchecked."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(f"a simulation needs Ray: pip install '{APP_NAME}[app]'")
    nodes = options.nodes or DEFAULT_NODES
    if defaults is not None:
        nodes, settings = _checked(settings, defaults, options.nodes)
    resources = Resources(nodes, options.cpus or 1, options.gpus or 0.0)
    return run_app(app, to_toml(settings), resources, options.keep_logs)


def _run_there(
    options: argparse.Namespace, app: Path, settings: dict[str, Value], defaults: Mapping[str, Value] | None
) -> str:
    """Run on a SuperLink; paths among the settings are of the server app's machine."""
    if options.cpus is not None or options.gpus is not None or options.keep_logs:
        raise ConfigError("--cpus, --gpus and --keep-logs are of the simulation: not with --superlink")
    if defaults is not None:
        if options.nodes is not None:
            settings["nodes"] = options.nodes
        Config.from_run_config({**defaults, **settings}, check_paths=False)
    elif options.nodes is not None:
        raise ConfigError(f"--nodes with --superlink is a setting of {APP_NAME}, which this app is not")
    return run_app_on(options.superlink, app, to_toml(settings))


def _checked(
    settings: Mapping[str, Value], defaults: Mapping[str, Value], nodes: int | None
) -> tuple[int, dict[str, Value]]:
    """The number of nodes and the settings to pass on, all of them valid and their paths absolute."""
    passed = dict(settings)
    if nodes is not None:
        passed["nodes"] = nodes
    # The server app runs elsewhere than here: what is relative is so to the folder of whoever typed it.
    for key in PATH_SETTINGS:
        value = passed.get(key, defaults.get(key, ""))
        if isinstance(value, str) and value:
            passed[key] = str(Path(value).expanduser().absolute())
    wanted = Config.from_run_config({**defaults, **passed}).nodes or DEFAULT_NODES
    passed["nodes"] = wanted
    Config.from_run_config({**defaults, **passed})
    return wanted, passed


def _defaults(project: Mapping[str, Any]) -> dict[str, Value]:
    return flatten(project.get("tool", {}).get("flwr", {}).get("app", {}).get("config", {}))


def _report(options: argparse.Namespace) -> int:
    for run in options.runs:
        if not run.is_dir():
            raise ConfigError(f"{run}: no such folder")
    try:
        from autoflip_flwr.experiment import report
    except ImportError as error:
        raise ConfigError(f"a report needs {error.name}: pip install '{APP_NAME}[app]'") from None
    try:
        for run in options.runs:
            print(report.write(run))
        if options.compare:
            report.compare(options.runs, options.compare)
            print(options.compare)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="autoflip", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="{run,report}")

    run = commands.add_parser("run", help="run a Flower app, in simulation or on a SuperLink, and wait for it")
    run.set_defaults(command=_run)
    run.add_argument("app", nargs="?", type=Path, default=Path(), help="folder of the app (default: this one)")
    run.add_argument("--config", type=Path, metavar="FILE", help="TOML file of settings")
    run.add_argument(
        "-c",
        dest="run_config",
        action="append",
        default=[],
        metavar="PAIRS",
        help="settings, e.g. 'lr=0.1 model=\"cnn\"'",
    )
    run.add_argument(
        "--superlink",
        metavar="NAME",
        help="run on this SuperLink, by its name in Flower's config.toml (default: simulate on this machine)",
    )
    run.add_argument(
        "--nodes",
        type=_number(int, 1),
        help=f"SuperNodes (default: as set, else {DEFAULT_NODES}); on a SuperLink: those to wait for",
    )
    run.add_argument("--cpus", type=_number(int, 1), help="CPUs per client (default: 1)")
    run.add_argument("--gpus", type=_number(float, 0), help="GPUs per client, e.g. 0.25 (default: 0)")
    run.add_argument("--keep-logs", action="store_true", help="keep the SuperLink's log and say where")

    report = commands.add_parser("report", help="make the report of finished runs")
    report.set_defaults(command=_report)
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    report.add_argument("--compare", type=Path, metavar="OUT.png", help="also draw the runs in one figure")
    return parser


def _number(kind: type[int] | type[float], least: int) -> Callable[[str], int | float]:
    noun = "an integer" if kind is int else "a number"

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = -1
        if not least <= value < 2**31:
            raise argparse.ArgumentTypeError(f"must be {noun} >= {least}, not {text!r}")
        return value

    return parse


if __name__ == "__main__":
    sys.exit(main())
