"""Masks that cut a network in two are seen, and healthy ones are not."""

import time

import numpy as np
import pytest
import torch
from apps import choose
from torch import nn

from autoflip_flwr.core.health import problems
from autoflip_flwr.core.layout import Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.subspace import Subspace
from autoflip_flwr.server.first_mask import warn_of_problems

Shapes = dict[str, tuple[int, ...]]


def mask_of(keep: dict[str, object], **options: object) -> Mask:
    arrays = {name: np.array(rows, bool) for name, rows in keep.items()}
    layout = Layout.of({name: np.zeros(array.shape, np.float32) for name, array in arrays.items()}, **options)
    return Mask.from_bool(layout, arrays)


def cuts(keep: dict[str, object]) -> list[str]:
    return [problem for problem in problems(mask_of(keep)) if "path" in problem]


def random_mask(model: nn.Module | Shapes, sparsity: float) -> Mask:
    shapes = model if isinstance(model, dict) else {name: tuple(v.shape) for name, v in model.state_dict().items()}
    layout = Layout.of({name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()})
    draw = np.random.default_rng(0)
    return choose(layout, {spec.name: draw.random(spec.shape) for spec in layout.prunable}, sparsity)


# Cuts


def test_units_that_hear_the_inputs_and_that_nobody_takes_up_leave_no_path():
    assert problems(mask_of({"a": [[1, 1], [0, 0]], "b": [[0, 1]]})) == ["no path leads on from a to b"]
    assert problems(mask_of({"a": [[1, 1], [0, 0]], "b": [[1, 0]]})) == []


def test_the_scores_that_were_reported_make_such_a_mask():
    layout = Layout.of({"a": np.zeros((2, 2)), "b": np.zeros((1, 2))})
    mask = choose(layout, {"a": np.array([[9.0, 8], [1, 2]]), "b": np.array([[0.0, 5]])}, 0.5)
    assert problems(mask) == ["no path leads on from a to b"]


def test_a_path_can_break_over_several_arrays():
    keep = {"a": [[1, 0], [0, 0], [0, 0]], "b": [[0, 1, 0], [1, 0, 0]], "c": [[1, 0]]}
    assert problems(mask_of(keep)) == ["no path leads on from b to c"]
    assert problems(mask_of({**keep, "c": [[0, 1]]})) == []


def test_a_head_that_is_defined_first_is_the_end_of_the_path():
    body = {"in": [[1, 1, 0], [0, 0, 0]]}
    assert problems(mask_of({"head": [[0, 1]], **body}, output=None)) == ["no path leads on from in to head"]
    assert problems(mask_of({"head": [[1, 0]], **body}, output=None)) == []


def test_channels_are_flattened_before_a_linear_layer():
    conv = np.zeros((2, 1, 3, 3), bool)
    conv[1, 0, 1, 1] = True
    linear = np.zeros((3, 8), bool)  # 2 channels of 2 x 2
    linear[:, 3] = True
    assert cuts({"conv": conv, "fc": linear}) == ["no path leads on from conv to fc"]
    linear[0, 4] = True
    assert not cuts({"conv": conv, "fc": linear})


def test_kernels_have_their_inputs_first_and_their_channels_last():
    conv = np.zeros((3, 3, 1, 2), bool)
    conv[1, 1, 0, 1] = True
    dense = np.zeros((8, 3), bool)
    dense[[0, 2, 4, 6]] = True
    assert cuts({"c/kernel": conv, "d/kernel": dense}) == ["no path leads on from c/kernel to d/kernel"]
    dense[3, 0] = True
    assert not cuts({"c/kernel": conv, "d/kernel": dense})


def test_depthwise_convolutions_hand_on_their_own_channels():
    wide, depth, last = np.ones((4, 3, 1, 1), bool), np.zeros((4, 1, 3, 3), bool), np.zeros((2, 4, 1, 1), bool)
    wide[0], depth[2], last[:, 2] = False, True, True
    assert problems(mask_of({"a": wide, "b": depth, "c": last})) == []


def test_a_weight_that_is_not_pruned_hands_on_what_it_hears():
    keep = {"a": [[1, 1], [0, 0]], "whole": [[1, 1], [1, 1]], "b": [[0, 1]]}
    layout = Layout.of({name: np.zeros(np.shape(rows)) for name, rows in keep.items()}, exclude="whole")
    mask = Mask.from_bool(layout, {name: np.array(keep[name], bool) for name in ("a", "b")})
    assert problems(mask) == []


# Floors


def test_an_array_of_which_a_floor_is_all_that_is_left_is_named():
    keep = {"a": np.zeros((4, 8), bool), "b": np.ones((2, 4), bool)}
    keep["a"][0, 0] = True
    found = problems(mask_of({**keep, "c": np.ones((9, 2), bool) & (np.arange(2) > 0)}))
    assert found == ["nothing but its floor is left of a (1 of 32 entries)"]


def test_output_units_of_one_weight_each_are_a_floor():
    keep = {"a": np.ones((8, 8), bool), "b": np.eye(4, 8, dtype=bool)}
    keep["a"][0, 0] = False
    assert problems(mask_of(keep)) == ["nothing but its floor is left of b (4 of 32 entries)"]
    keep["b"][0, 5] = True
    assert problems(mask_of(keep)) == []


def test_output_units_of_one_weight_each_are_a_floor_at_any_density():
    layout = Layout.of({"a": np.zeros((100, 100)), "b": np.zeros((4, 100))})
    keep = {"a": np.arange(10_000).reshape(100, 100) % 100 == 0, "b": np.arange(400).reshape(4, 100) % 100 == 0}
    assert problems(Mask.from_bool(layout, keep))[0] == "nothing but its floor is left of b (4 of 400 entries)"


def test_small_arrays_that_keep_their_share_are_no_problem():
    shapes = {"a": (10, 1), "b": (1, 10), "c": (2, 5)}
    layout = Layout.of({name: np.zeros(shape) for name, shape in shapes.items()}, output=None)
    scores = {name: np.ones(shape) for name, shape in shapes.items()}
    assert not any("floor" in each for each in problems(choose(layout, scores, 0.9, "layer")))


def test_arrays_that_are_kept_whole_do_not_make_others_look_bare():
    keep = {"backbone": np.ones((50, 50), bool), "a": np.eye(1, 10, dtype=bool), "b": np.eye(1, 10, dtype=bool)}
    assert not any("floor" in each for each in problems(mask_of(keep, output=None)))


def test_one_warning_names_the_arrays_and_says_what_to_do(caplog):
    warn_of_problems(Subspace(mask_of({"a": [[1, 1], [0, 0]], "b": [[0, 1]]})))
    (record,) = caplog.records
    assert "no path leads on from a to b" in record.message
    assert "scope='layer', a lower sparsity, or exclude=[...]" in record.message
    caplog.clear()
    warn_of_problems(Subspace(mask_of({"a": [[1, 1], [0, 0]], "b": [[1, 0]]})))
    assert not caplog.records


# Healthy networks


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm, self.fc = nn.Embedding(80, 8), nn.LSTM(8, 64, 2), nn.Linear(64, 80)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(100, 32), nn.Embedding(16, 32)
        self.h = nn.ModuleList(nn.TransformerEncoderLayer(32, 2, 64) for _ in range(2))
        self.lm_head = nn.Linear(32, 100)


@pytest.mark.parametrize(
    "model",
    [
        Recurrent(),
        Decoder(),
        nn.Transformer(32, 4, 2, 2, 64),
        nn.Sequential(nn.GRU(16, 32, num_layers=2, bidirectional=True), nn.Linear(64, 4)),
        nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)),
    ],
    ids=["lstm", "decoder", "transformer", "gru", "mlp"],
)
def test_recurrent_and_attention_networks_at_90_percent_are_healthy(model: nn.Module):
    assert problems(random_mask(model, 0.9)) == []


def test_a_resnet_of_11_million_parameters_is_healthy_and_quickly_looked_at():
    from torchvision.models import resnet18

    with torch.device("meta"):
        model = resnet18()
    mask = random_mask(model, 0.9)
    assert mask.kept_by_name  # what every run counts anyway
    took = []
    for _ in range(3):
        began = time.perf_counter()
        assert problems(mask) == []
        took.append(time.perf_counter() - began)
    assert min(took) < 0.5
