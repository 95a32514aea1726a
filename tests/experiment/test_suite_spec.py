"""Suites: which runs a file describes, and what is said of a malformed one."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.rules import ConfigError
from autoflip_flwr.experiment.suite.plan import exploration_key, key_of_run, plan
from autoflip_flwr.experiment.suite.spec import Suite, read_suite

SMALL = """\
name: small
defaults:
  nodes: 4
  num-server-rounds: 2
data:
  - {dataset: digits, split: [iid, dirichlet]}
methods:
  - method: fedavg
  - {method: [autoflip, random], density: [0.3, 0.1]}
seeds: [1, 2]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "suite.yaml"
    path.write_text(text)
    return path


def suite(folder: Path, text: str) -> Suite:
    return read_suite(written(folder, text))


def test_every_combination_is_a_run_and_seeds_come_one_after_another(tmp_path):
    found = suite(tmp_path, SMALL)
    assert (found.name, len(found.runs)) == ("small", 2 * (1 + 2 * 2) * 2)
    assert [run.seed for run in found.runs] == [1] * 10 + [2] * 10
    kinds = [(run.split, run.method, run.sparsity) for run in found.runs[:10]]
    methods = [("fedavg", 0.7), ("autoflip", 0.7), ("autoflip", 0.9), ("random", 0.7), ("random", 0.9)]
    assert sorted(kinds) == sorted((split, *method) for split in ("iid", "dirichlet") for method in methods)
    assert {run.nodes for run in found.runs} == {4}
    assert {run.num_server_rounds for run in found.runs} == {2}


def test_what_has_no_effect_makes_no_other_run(tmp_path):
    text = SMALL.replace("  - method: fedavg\n", "  - {method: fedavg, density: [0.3, 0.1], gamma: [0, 1]}\n")
    assert len(suite(tmp_path, text).runs) > 20
    planned = plan(suite(tmp_path, text).runs)
    assert len(planned) == 20
    assert len({each.key for each in planned}) == 20


def test_a_run_is_known_by_what_decides_it():
    plain = Config()
    assert key_of_run(Config(output_dir="elsewhere", checkpoints=5, name="x")) == key_of_run(plain)
    assert key_of_run(Config(momentum=0.5)) == key_of_run(plain)  # of sgd alone
    others = [Config(momentum=0.5, optimizer="sgd"), Config(seed=2), Config(nodes=3), Config(num_server_rounds=3)]
    assert len({key_of_run(each) for each in (plain, *others)}) == 5


def test_runs_share_an_exploration_where_nothing_changes_it():
    plain = exploration_key(Config())
    assert exploration_key(Config(sparsity=0.9, num_server_rounds=3, values_up="int8", initial="explorers")) == plain
    for other in (Config(seed=2), Config(exploration_epochs=2), Config(values_down="int8"), Config(lr=0.1)):
        assert exploration_key(other) not in ("", plain)
    for alone in (Config(method="random"), Config(method="fedavg"), Config(outside="initial"), Config(sparsity=0.0)):
        assert exploration_key(alone) == ""
    assert exploration_key(Config(schedule="gradual", rank_by="deviation", lr_power=0.0)) == plain
    everybody = exploration_key(Config(explorers=1.0))
    assert exploration_key(Config(schedule="static")) == everybody != plain  # by default, who explores follows
    for schedule in ("participants", "gradual+participants"):  # a shared exploration holds averages alone
        assert exploration_key(Config(schedule=schedule)) == ""


def test_names_folders_and_commands_tell_runs_apart(tmp_path):
    planned = plan(suite(tmp_path, SMALL).runs)
    names = [each.name for each in planned]
    assert "dirichlet autoflip density=0.1 seed=2" in names
    assert "iid fedavg seed=1" in names
    assert len(set(names)) == len({each.folder for each in planned}) == 20
    (plain, other) = plan([Config(), Config(lr=0.1, dataset="mnist")])
    assert (plain.command, other.command) == ("autoflip run", "autoflip run -c 'dataset=\"mnist\" lr=0.1'")


def test_overrides_leave_out_and_the_command_line(tmp_path):
    text = SMALL + (
        "overrides:\n"
        "  - when: {method: autoflip, density: 0.1}\n"
        "    set: {lr: 1e-2}\n"
        "leave-out:\n"
        "  - {method: random, split: iid}\n"
    )
    runs = suite(tmp_path, text).runs
    assert len(runs) == 16
    assert {(run.method, run.sparsity) for run in runs if run.lr == 0.01} == {("autoflip", 0.9)}
    fewer = read_suite(tmp_path / "suite.yaml", {"seed": 7, "lr": 0.5})
    assert {(run.seed, run.lr) for run in fewer.runs} == {(7, 0.5)}
    assert len(plan(fewer.runs)) == 8


def test_a_recipe_lies_below_the_defaults(tmp_path):
    (tmp_path / "base.toml").write_text('lr = 0.5\nbatch-size = 7\nmodel = "cnn"\n')
    (run,) = suite(
        tmp_path, "recipe: base.toml\ndefaults: {lr: 0.25}\ndata: [{dataset: digits}]\nmethods: [{method: fedavg}]\n"
    ).runs
    assert (run.lr, run.batch_size) == (0.25, 7)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "suite.yaml: empty"),
        ("data: [\n", "suite.yaml, line 2: not YAML"),
        ("- 1\n", "line 1: must be settings, one 'key: value' per line, not a list"),
        (SMALL + "sedes: [1]\n", "line 11: sedes: no such key; a suite has name"),
        ("data: [{dataset: digits}]\n", "line 1: methods: is missing"),
        (
            SMALL.replace("nodes: 4", "nodez: 4"),
            "line 3: defaults.nodez: nodez = 4: no such setting; did you mean nodes?",
        ),
        (SMALL.replace("nodes: 4", "lr: fast"), "line 3: defaults.lr: lr = 'fast': must be a number > 0"),
        (
            SMALL.replace("[0.3, 0.1]", "[0.3, 1.1]"),
            "line 9: methods.density: density = 1.1: must be",
        ),
        (
            SMALL.replace("density: [0.3, 0.1]", "density: 0.3, sparsity: 0.7"),
            "line 9: methods.sparsity: give density or",
        ),
        (SMALL.replace("nodes: 4", "output-dir: x"), "line 3: defaults.output-dir: the suite itself sets it"),
        (
            SMALL.replace("  nodes: 4", "  nodes: 4\n  nodes: 5"),
            "line 4: defaults: nodes is there twice, first in",
        ),
        (SMALL.replace("nodes: 4", "nodes: 1"), "line 3: min-explorers = 2: must not be more than nodes = 1"),
        (SMALL.replace("nodes: 4", "nodes:"), "line 3: defaults.nodes: a value is missing"),
        (SMALL.replace("nodes: 4", "nodes: {a: 1}"), "line 3: defaults.nodes: must be a value, or a list of values"),
        (SMALL.replace("seeds: [1, 2]", "seeds: [1, x]"), "line 10: seeds: seed = 'x': must be an integer"),
        (SMALL.replace("small", "a/b"), "line 1: name: must be 1 to 64 letters"),
        (SMALL + "target-accuracy: 90\n", "line 11: target-accuracy: must be a number in (0, 1)"),
        (SMALL + "recipe: no.toml\n", "no.toml: no such file"),
        (SMALL + "overrides: [{when: {method: fedavg}}]\n", "line 11: overrides: must have the keys when and set"),
        (SMALL + "leave-out: [{dataset: digits}]\n", "leave-out: leaves no run"),
        ("a: &x 1\nb: *x\n", "line 1: b: an alias (*) is not allowed"),
        ("a: !!python/object:os.system x\n", "cannot be read"),
        ("a: 2026-01-01\n", "line 1: a: '2026-01-01' is read as the date"),
        ("a: .inf\n", "line 1: a: must be a finite number"),
        ("? [1]\n: 2\n", "line 1: a key must be a word"),
        ("a: " + "[" * 20 + "]" * 20 + "\n", "nested more than 10 deep"),
    ],
)
def test_a_malformed_suite_names_line_and_key(tmp_path, text, told):
    with pytest.raises(ConfigError) as error:
        suite(tmp_path, text)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.yaml: No such file"):
        read_suite(tmp_path / "nothing.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a text file"):
        read_suite(tmp_path / "bytes.yaml")
