"""The `autoflip` command: run an experiment here or on a SuperLink, report on runs, compare and list them."""

import argparse
import importlib.util
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from autoflip_flwr.experiment import preflight
from autoflip_flwr.experiment.config import DEFAULT_NODES, Config
from autoflip_flwr.experiment.idle import idle
from autoflip_flwr.experiment.rules import ConfigError, Value
from autoflip_flwr.experiment.together import PATHS
from autoflip_flwr.experiment.toml import flatten, literal, parse_pairs, read_toml, to_toml
from autoflip_flwr.launch import reports
from autoflip_flwr.launch.remote import run_app_on
from autoflip_flwr.launch.screen import Screen
from autoflip_flwr.launch.settings import markdown, table
from autoflip_flwr.launch.superlink import TOOLS, Resources, run_app

APP_NAME = "autoflip-flwr"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"autoflip: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (default: those of the process).

    Returns
    -------
    int
        0 on success, 1 if the run failed, 2 if the command or a setting is wrong (then nothing was started), 130 after
        Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    options.arguments = arguments
    try:
        code: int = options.command(options)
    except ConfigError as error:
        print(f"autoflip: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("autoflip: interrupted", file=sys.stderr)
        return 130
    return code


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
    screen = Screen(sys.stdout, own=own, verbose=options.verbose)
    run = _run_there if options.superlink else _run_here
    try:
        reason = run(options, app, settings, _defaults(project) if own else None, screen)
    except (KeyboardInterrupt, SystemExit):
        if not options.superlink:  # on a SuperLink the run goes on
            _tell_of_record(screen, options, "interrupted")
        raise
    if not reason:
        return 0
    _tell_of_record(screen, options, reason)
    print(f"autoflip: the run failed: {reason}", file=sys.stderr)
    return 1


def _tell_of_record(screen: Screen, options: argparse.Namespace, reason: str) -> None:
    """Print where the record of an incomplete run is, and how to resume it.

    If its app could not note why the run ended, ``reason`` is noted there.
    """
    if not screen.record:
        return
    path = Path(screen.record)
    if options.superlink:
        screen.say(f"run record, where the server app ran: {path}")
        return
    screen.say(f"run record: {path}")
    with suppress(OSError, ImportError):  # the run's own error matters more
        if not (path / "failure.json").exists():
            from autoflip_flwr.experiment.record.folder import RunRecord
            from autoflip_flwr.experiment.report import report

            RunRecord(path).fail(reason)
            report.write(path)
        screen.say(f"report: {path / 'report.html'}")
    if any((path / "checkpoint").rglob("*.safetensors")):
        command = "autoflip" if shutil.which("autoflip") else f"{TOOLS}/autoflip"  # if the environment is not activated
        again = shlex.join([command, *options.arguments, "-c", f"resume={literal(str(path))}"])
        screen.say(f"to go on with it: {again}")


def _run_here(
    options: argparse.Namespace,
    app: Path,
    settings: dict[str, Value],
    defaults: Mapping[str, Value] | None,
    screen: Screen,
) -> str:
    """Run in simulation. `defaults` are the shipped app's; None for any other app, whose settings are not checked."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(f"a simulation needs Ray: pip install '{APP_NAME}[app]'")
    nodes, cpus, gpus = options.nodes or DEFAULT_NODES, options.cpus or 1, options.gpus or 0.0
    preflight.check_resources(cpus, gpus)
    if defaults is not None:
        nodes, settings = _checked(settings, defaults, options.nodes)
        config = Config.from_run_config({**defaults, **settings})
        preflight.check(config, gpus)
        _warn_of_idle(config, options)
    return run_app(app, to_toml(settings), Resources(nodes, cpus, gpus), screen, options.keep_logs)


def _run_there(
    options: argparse.Namespace,
    app: Path,
    settings: dict[str, Value],
    defaults: Mapping[str, Value] | None,
    screen: Screen,
) -> str:
    """Run on a SuperLink. Paths in the settings are paths on the server app's machine."""
    if options.cpus is not None or options.gpus is not None or options.keep_logs:
        raise ConfigError("--cpus, --gpus and --keep-logs are of the simulation: not with --superlink")
    preflight.check_superlink(options.superlink)
    if defaults is not None:
        if options.nodes is not None:
            settings["nodes"] = options.nodes
        _warn_of_idle(Config.from_run_config({**defaults, **settings}, check_paths=False), options)
    elif options.nodes is not None:
        raise ConfigError(f"--nodes with --superlink is a setting of {APP_NAME}, which this app is not")
    return run_app_on(options.superlink, app, to_toml(settings), screen)


def _warn_of_idle(config: Config, options: argparse.Namespace) -> None:
    """Warn of typed settings that have no effect. Recipes are not checked, since they may serve several methods."""
    typed = {key for text in options.run_config for key in parse_pairs(text)}
    for line in idle(config, typed):
        print(f"autoflip: warning: {line}", file=sys.stderr)


def _checked(
    settings: Mapping[str, Value], defaults: Mapping[str, Value], nodes: int | None
) -> tuple[int, dict[str, Value]]:
    """Return the number of nodes, and the settings to pass on: valid, and with absolute paths."""
    passed = dict(settings)
    if nodes is not None:
        passed["nodes"] = nodes
    # The server app runs in another folder: relative paths are relative to where the user typed them.
    for key in PATHS:
        value = passed.get(key, defaults.get(key, ""))
        if isinstance(value, str) and value:
            passed[key] = str(Path(value).expanduser().absolute())
    wanted = Config.from_run_config({**defaults, **passed}).nodes or DEFAULT_NODES
    passed["nodes"] = wanted
    return wanted, passed


def _defaults(project: Mapping[str, Any]) -> dict[str, Value]:
    return flatten(project.get("tool", {}).get("flwr", {}).get("app", {}).get("config", {}))


def _suite(options: argparse.Namespace) -> int:
    try:
        from autoflip_flwr.launch.suite import run_suite  # loads NumPy, PyTorch and more
    except ImportError as error:
        raise ConfigError(f"a suite needs {error.name}: pip install '{APP_NAME}[app]'") from None
    return run_suite(options)


def _settings(options: argparse.Namespace) -> int:
    print(markdown() if options.markdown else table())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="autoflip", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="{run,suite,report,compare,list,settings}")

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
    run.add_argument("--verbose", action="store_true", help="show Flower's own log instead of a line a round")
    run.add_argument("--keep-logs", action="store_true", help="keep the SuperLink's log and say where")

    suite = commands.add_parser("suite", help="make all runs that a YAML file describes, in this machine's processes")
    suite.set_defaults(command=_suite)
    suite.add_argument("file", type=Path, metavar="FILE", help="the suite, e.g. configs/small.yaml")
    suite.add_argument(
        "-c", dest="run_config", action="append", default=[], metavar="PAIRS", help="settings of all runs: 'lr=0.1'"
    )
    suite.add_argument("--output", type=Path, metavar="FOLDER", help="where the suite's folder is made (default: runs)")
    suite.add_argument(
        "--workers", type=_number(int, 1), default=0, help="runs at a time (default: one per GPU, else per CPU core)"
    )
    suite.add_argument("--dry-run", action="store_true", help="only list the runs, with their expected time")
    suite.add_argument("--again", action="store_true", help="make again what other code than this has made")

    reports.add_commands(commands)

    settings = commands.add_parser("settings", help="list the settings of the shipped app")
    settings.set_defaults(command=_settings)
    settings.add_argument("--markdown", action="store_true", help="as the page docs/settings.md")
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
