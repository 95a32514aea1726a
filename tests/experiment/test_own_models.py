"""Models of the user's own: found by name, called as they ask, and tried before any client works."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.models.build import build
from autoflip_flwr.experiment.models.flops import flops_per_example
from autoflip_flwr.experiment.preflight import check
from autoflip_flwr.experiment.rules import ConfigError

IMAGE = (1, 4, 4)
NETS = """
import torch
from torch import nn

class Flat(nn.Sequential):
    def __init__(self, input_shape, classes):
        super().__init__(nn.Flatten(), nn.Linear(torch.Size(input_shape).numel(), classes))

def for_three():
    return Flat((1, 4, 4), 3)

def any_keywords(**given):
    return Flat(given["input_shape"], given["classes"])

def by_keyword(*, width=2, classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(width), nn.Linear(width, classes))

class Looks(Flat):
    def forward(self, x):
        assert x.sum().item() == 0  # has no answer without storage
        return super().forward(x)

class Text(nn.Module):
    def __init__(self, input_shape, classes):
        super().__init__()
        self.each, self.out = nn.Embedding(classes, 2), nn.Linear(2, classes)
    def forward(self, x):
        return self.out(self.each(x).mean(1))

def needs_more(input_shape, depth):
    return None

def no_module(input_shape):
    return list(input_shape)

def empty():
    return nn.Identity()

def pair(input_shape, classes):
    class Pair(Flat):
        def forward(self, x):
            return super().forward(x), x
    return Pair(input_shape, classes)

three = 3
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "own_nets.py").write_text(NETS)
    (tmp_path / "own_broken.py").write_text("1 / 0\n")
    (tmp_path / "own_needy.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in ("own_nets", "own_broken", "own_needy"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["Flat", "for_three", "any_keywords", "by_keyword", "Looks"])
def test_it_is_made_from_the_seed_and_called_as_it_asks(name: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second = (build(f"own_nets:{name}", IMAGE, 3, 7).state_dict() for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = build(f"own_nets:{name}", IMAGE, 3, 8)
    assert other.training
    assert not all(torch.equal(first[key], value) for key, value in other.state_dict().items())


def test_its_flops_are_counted_on_the_cpu_where_it_cannot_run_without_storage() -> None:
    for name in ("Flat", "Looks"):
        assert flops_per_example(build(f"own_nets:{name}", IMAGE, 3, 0), IMAGE) == 2 * 2 * 16 * 3


def test_it_may_take_text() -> None:
    net = build("own_nets:Text", (9,), 5, 0)
    assert flops_per_example(net, (9,)) == 3 * 2 * 2 * 5


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("own_no:Net", "no module own_no here: neither in the environment nor in the folder /"),
        ("own_nets:Missing", "the module own_nets has no Missing"),
        ("own_nets:three", "three is a int, and not callable"),
        ("own_broken:Net", "importing own_broken failed: ZeroDivisionError: division by zero"),
        ("own_needy:Net", "own_needy needs no_such_package, which is not installed"),
        ("own_nets:needs_more", "calling it failed: TypeError: needs_more() missing 1 required positional argument"),
        ("own_nets:no_module", "must return an nn.Module, not a list"),
        ("own_nets:empty", "must return logits float32 (2, 4) for float32 (2, 1, 4, 4), not float32 (2, 1, 4, 4)"),
        ("own_nets:for_three", "must return logits float32 (2, 4) for float32 (2, 1, 4, 4), not float32 (2, 3)"),
        ("own_nets:pair", "must return logits float32 (2, 4) for float32 (2, 1, 4, 4), not tuple"),
        ("own_nets:Text", "a forward pass of float32 (2, 1, 4, 4) failed: RuntimeError: Expected tensor for argument"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(name: str, told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"model = '{name}': {told}")) as caught:
        build(name, IMAGE, 4, 0)
    assert "\n" not in str(caught.value)


def test_a_module_that_is_not_there_is_refused_before_a_run(tmp_path: Path) -> None:
    check(Config(model="own_nets:Flat", output_dir=str(tmp_path)), 0)
    with pytest.raises(ConfigError, match=r"model = 'own_no\.nets:Net': no module own_no here"):
        check(Config(model="own_no.nets:Net", output_dir=str(tmp_path)), 0)
