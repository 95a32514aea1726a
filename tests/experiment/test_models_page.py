"""docs/models.md: its table is what the code has, and its example works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from autoflip_flwr.core.choices import MODEL_INPUTS
from autoflip_flwr.experiment.models.build import _MAKERS, build
from autoflip_flwr.experiment.models.flops import flops_per_example

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text("utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\| `.*", PAGE, re.MULTILINE)]
MODELS = {row[0].strip("`"): row[1:6] for row in ROWS if len(row) == 7}


def test_every_model_is_in_the_table_with_what_it_takes() -> None:
    words = {("image",): "images", ("signal",): "signals", ("text",): "text"}
    assert {name: row[0] for name, row in MODELS.items()} == {
        name: words.get(kinds, "all") for name, kinds in MODEL_INPUTS.items()
    }


@pytest.mark.runs
@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_flops_are_those_of_the_table(name: str) -> None:
    _, shape, classes, parameters, mflop = MODELS[name]
    input_shape = tuple(map(int, shape.split(" x ")))
    with torch.device("meta"):
        model = _MAKERS[name](input_shape, int(classes))
    assert f"{sum(p.numel() for p in model.parameters()):,}" == parameters
    assert f"{flops_per_example(model, input_shape) / 1e6:,.1f}" == mflop


def test_the_example_of_an_own_model_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"For example, `my_models\.py`:\n\n```python\n(.*?)```", PAGE, re.DOTALL)
    assert code
    (tmp_path / "my_models.py").write_text(code[1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert build("my_models:wide", (1, 8, 8), 10, 0)[1].in_features == 64
