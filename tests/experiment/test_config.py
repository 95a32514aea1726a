"""Settings: types, ranges, messages, and agreement with pyproject.toml."""

import re
import subprocess
import sys
import tomllib
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from autoflip_flwr.core.choices import DATASETS, METHODS, MODEL_INPUTS, MODELS
from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.data.files import KNOWN
from autoflip_flwr.experiment.rules import ConfigError, Value
from autoflip_flwr.experiment.toml import literal
from autoflip_flwr.launch.cli import main
from autoflip_flwr.launch.settings import sections

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
_DATASETS = f"one of {', '.join(DATASETS)}, or module:callable"


TRACKERS = "must be empty, or one or more of tensorboard, wandb, mlflow, with commas in between"


def test_pyproject_lists_the_settings_as_the_code_declares_them() -> None:
    """In the code's sections, and with the choices of each where there are some."""
    block = PYPROJECT.read_text().split("[tool.flwr.app.config]\n")[1].split("\n\n[tool.ruff]")[0]
    lines: list[list[tuple[str, str]]] = []
    for section in block.split("\n\n"):
        pairs = [re.fullmatch(r"(\S+) = (?:\"\S*\"|\S+)(?: +# (.*))?", line) for line in section.splitlines()]
        lines.append([(found[1], found[2] or "") for found in pairs if found])
        assert all(pairs), section
    declared = [
        [(each.key, " | ".join(choice or '""' for choice in each.rule.choices)) for each in its]
        for _, its in sections()
    ]
    assert lines == declared


def test_the_page_of_settings_is_what_its_first_line_makes(capsys: pytest.CaptureFixture[str]) -> None:
    page = (PYPROJECT.parent / "docs" / "settings.md").read_text("utf-8")
    command = re.match(r"<!-- Made by: autoflip (.*) > docs/settings\.md -->", page)
    assert command
    assert main(command[1].split()) == 0
    assert capsys.readouterr().out == page


def test_the_table_of_settings_has_each_with_its_default_and_is_narrow(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    told = [line.split()[:2] for line in lines if re.match(r"  \S", line)]
    assert told == [[key, literal(value)] for key, value in Config().as_dict().items()]


def test_every_image_set_is_known_by_its_files() -> None:
    assert (*KNOWN, "shakespeare", "har", "own") == DATASETS


@pytest.mark.parametrize("dataset", ["my_data:load", "my.data:small"])
def test_a_data_set_of_ones_own_is_a_callable(dataset: str) -> None:
    assert Config.from_run_config({"dataset": dataset}).dataset == dataset
    with pytest.raises(ConfigError, match=r"^dataset = 'my data:load': must be one of digits, .*, own, or module:call"):
        Config.from_run_config({"dataset": "my data:load"})


def test_defaults_are_those_of_pyproject() -> None:
    shipped = tomllib.loads(PYPROJECT.read_text())["tool"]["flwr"]["app"]["config"]
    assert Config().as_dict() == shipped
    assert [type(value) for value in Config().as_dict().values()] == [type(value) for value in shipped.values()]
    assert list(Config().as_dict()) == list(shipped)
    assert Config.from_run_config(shipped) == Config.from_run_config({}) == Config()


def test_values_reach_their_fields() -> None:
    config = Config.from_run_config({"batch-size": 8, "prune-biases": True, "lr": 1, "dataset": "mnist"})
    assert (config.batch_size, config.prune_biases, config.lr, config.dataset) == (8, True, 1.0, "mnist")
    assert type(config.lr) is float
    assert Config.from_run_config(config.as_dict()) == config


def test_trackers_are_separated_by_commas() -> None:
    assert Config().tracker_names == ()
    assert Config(trackers="wandb").tracker_names == ("wandb",)
    assert Config(trackers="mlflow, tensorboard").tracker_names == ("mlflow", "tensorboard")
    assert "trackers" not in Config().decisive()


def test_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Config().lr = 0.1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sparsity", 1.2, "sparsity = 1.2: must be a number in [0, 1)"),
        ("sparsity", 1, "sparsity = 1.0: must be a number in [0, 1)"),
        ("sparsity", "0.7", "sparsity = '0.7': must be a number in [0, 1)"),
        ("sparsity", True, "sparsity = true: must be a number in [0, 1)"),
        ("sparsity", float("nan"), "sparsity = nan: must be a number in [0, 1)"),
        ("dataset", "foo", f"dataset = 'foo': must be {_DATASETS}"),
        ("dataset", 3, f"dataset = 3: must be {_DATASETS}"),
        ("method", "AutoFLIP", f"method = 'AutoFLIP': must be one of {', '.join(METHODS)}"),
        ("split", "", "split = '': must be one of iid, dirichlet, pathological, shards, quantity, natural"),
        ("model", "vgg", f"model = 'vgg': must be one of {', '.join(MODELS)}, or your own as module:callable"),
        ("model", "a.b:c.d", f"model = 'a.b:c.d': must be one of {', '.join(MODELS)}, or your own as module:callable"),
        (
            "model",
            "lstm",
            "model = 'lstm': takes text (length,), not the images (C, H, W) of dataset = 'digits'; models that do: "
            + ", ".join(name for name in MODELS if "image" in MODEL_INPUTS[name]),
        ),
        ("optimizer", "adamw", "optimizer = 'adamw': must be one of adam, sgd"),
        ("device", "gpu", "device = 'gpu': must be one of auto, cpu, cuda, mps"),
        ("scope", "x", "scope = 'x': must be one of global, layer, erk"),
        ("normalisation", "x", "normalisation = 'x': must be one of none, layer, per-client"),
        ("initial", "x", "initial = 'x': must be empty or one of scratch, explorers"),
        ("exploration-weighting", "x", "exploration-weighting = 'x': must be one of uniform, examples"),
        ("prune-biases", 1, "prune-biases = 1: must be true or false"),
        ("prune-biases", "false", "prune-biases = 'false': must be true or false"),
        ("alpha", 0.0, "alpha = 0.0: must be a number > 0"),
        ("alpha", float("inf"), "alpha = inf: must be a number > 0"),
        ("alpha", 10**400, "alpha = inf: must be a number > 0"),
        ("lr", -1, "lr = -1.0: must be a number > 0"),
        ("lr-decay", 1.5, "lr-decay = 1.5: must be a number in (0, 1]"),
        ("momentum", 1.0, "momentum = 1.0: must be a number in [0, 1)"),
        ("weight-decay", -0.1, "weight-decay = -0.1: must be a number >= 0"),
        ("gamma", -1.0, "gamma = -1.0: must be a number >= 0"),
        ("batch-size", 0, "batch-size = 0: must be an integer >= 1"),
        ("batch-size", 2.0, "batch-size = 2.0: must be an integer >= 1"),
        ("local-epochs", True, "local-epochs = true: must be an integer >= 1"),
        ("num-server-rounds", 0, "num-server-rounds = 0: must be an integer >= 1"),
        ("exploration-batches", 0, "exploration-batches = 0: must be an integer >= 1"),
        ("exploration-epochs", 0, "exploration-epochs = 0: must be an integer >= 1"),
        ("exploration-patience", 0, "exploration-patience = 0: must be an integer >= 1"),
        ("min-explorers", 0, "min-explorers = 0: must be an integer >= 1"),
        ("fraction-train", 0.0, "fraction-train = 0.0: must be a number in (0, 1]"),
        ("fraction-evaluate", 1.1, "fraction-evaluate = 1.1: must be a number in [0, 1]"),
        ("explorers", 1.5, "explorers = 1.5: must be a number in [0, 1]"),
        ("server-momentum", 1.0, "server-momentum = 1.0: must be a number in [0, 1)"),
        ("server-learning-rate", 0.0, "server-learning-rate = 0.0: must be a number > 0"),
        ("node-timeout", 0.0, "node-timeout = 0.0: must be a number > 0"),
        ("round-timeout", -1.0, "round-timeout = -1.0: must be a number > 0"),
        ("classes-per-client", 0, "classes-per-client = 0: must be an integer >= 1"),
        ("seed", -1, "seed = -1: must be an integer in [0, 4294967295]"),
        ("nodes", -2, "nodes = -2: must be an integer >= 0"),
        ("name", "a/b", "name = 'a/b': must be at most 64 letters, digits, '.', '_' or '-'"),
        ("name", "a\n", "name = 'a\\n': must be at most 64 letters, digits, '.', '_' or '-'"),
        ("output-dir", "", "output-dir = '': must be the path of a folder"),
        ("trackers", "comet", f"trackers = 'comet': {TRACKERS}"),
        ("trackers", "wandb,", f"trackers = 'wandb,': {TRACKERS}"),
        ("trackers", "wandb, wandb", f"trackers = 'wandb, wandb': {TRACKERS}"),
        ("data-dir", 3, "data-dir = 3: must be a string"),
        (
            "data-dir",
            "/no/such",
            "data-dir = '/no/such': must be an existing folder; docs/data.md says with which files",
        ),
        ("exploration", "/no/such", "exploration = '/no/such': must be an existing file"),
        ("sparsty", 0.5, "sparsty = 0.5: no such setting; did you mean sparsity?"),
    ],
)
def test_refusals(key: str, value: Value, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_run_config({key: value})
    assert str(caught.value) == message


def test_an_unknown_key_like_no_other_lists_the_settings() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^zzz = true: no such setting; the settings are name, method, .*, checkpoints, resume$",
    ):
        Config.from_run_config({"zzz": True})


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("sparsity", [0, 0.0, 0.999]),
        ("fraction-train", [1, 0.01]),
        ("fraction-evaluate", [0, 1]),
        ("nodes", [0, 2, 1000]),
        ("seed", [0, 2**32 - 1]),
        ("gamma", [0, 2.5]),
        ("classes-per-client", [1, 100]),
        ("name", ["", "run-1_a.b"]),
    ],
)
def test_ends_of_the_ranges_are_accepted(key: str, values: list[Value]) -> None:
    for value in values:
        assert Config.from_run_config({key: value}).as_dict()[key] == value


def test_more_explorers_than_nodes_are_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^min-explorers = 5: must not be more than nodes = 4; for a mask of 4 nodes, min-explorers=4$",
    ):
        Config.from_run_config({"min-explorers": 5, "nodes": 4})
    assert Config.from_run_config({"min-explorers": 5}).min_explorers == 5


def test_paths(tmp_path: Path) -> None:
    file = tmp_path / "exploration.npz"
    file.touch()
    config = Config.from_run_config({"data-dir": str(tmp_path), "exploration": str(file)})
    assert (config.data_dir, config.exploration) == (str(tmp_path), str(file))
    with pytest.raises(ConfigError, match="must be an existing folder"):
        Config.from_run_config({"data-dir": str(file)})
    with pytest.raises(ConfigError, match="must be an existing file"):
        Config.from_run_config({"exploration": str(tmp_path)})
    assert Config.from_run_config({"exploration": "/elsewhere"}, check_paths=False).exploration == "/elsewhere"


def test_resolved_data_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AUTOFLIP_DATA", raising=False)
    assert Config().resolved_data_dir == ""
    monkeypatch.setenv("AUTOFLIP_DATA", "/data")
    assert Config().resolved_data_dir == "/data"
    assert Config(data_dir="/mine").resolved_data_dir == "/mine"


def test_starts_without_torch() -> None:
    code = (
        "import sys, autoflip_flwr.experiment.config, autoflip_flwr.launch.cli; "
        "sys.exit(bool({'torch', 'ray', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=PYPROJECT.parent, check=False).returncode == 0


@pytest.mark.parametrize("recipe", sorted((PYPROJECT.parent / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_are_valid(recipe: Path) -> None:
    config = Config.from_run_config(tomllib.loads(recipe.read_text()))
    assert config.dataset in recipe.stem


def test_the_main_jobs_recipe_is_the_default() -> None:
    values = tomllib.loads((PYPROJECT.parent / "configs" / "digits.toml").read_text())
    assert values.pop("nodes") == 10  # of the command, since the app takes as many as connect
    assert Config.from_run_config(values) == Config()
