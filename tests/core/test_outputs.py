"""Which arrays are weights, which of those are outputs, and what the outputs keep."""

import numpy as np
import pytest
from apps import choose

from autoflip_flwr.core.budget import Budget
from autoflip_flwr.core.choices import SCOPES
from autoflip_flwr.core.layout import Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.selection import protected_outputs
from autoflip_flwr.wire.mask_record import decode_mask, encode_mask

Shapes = dict[str, tuple[int, ...]]


def layout_of(shapes: Shapes, **options: object) -> Layout:
    return Layout.of({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, **options)


# Weights


@pytest.mark.parametrize(
    "shapes",
    [
        {"norm.weight": (4, 5, 5), "norm.bias": (4, 5, 5)},
        {"1.weight": (4, 5, 5), "1.bias": (4, 5, 5)},
        {"weight": (4, 5), "bias": (4, 5)},
        {"affine/gamma": (4, 5), "affine/beta": (4, 5)},
        {"LayerNorm_0/scale": (3, 4), "LayerNorm_0/bias": (3, 4)},
        {"block.layer_scale": (96, 1, 1)},
        {"input_layernorm.weight": (2, 8)},
        {"bn2.weight": (2, 8)},
        {"ln_f.weight": (2, 8)},
        {"dense/bias": (2, 8)},
        {"experts.up_proj_bias": (4, 16)},
        {"attn.relative_position_bias_table": (169, 3)},
        {"intercept_": (1, 10)},
        {"intercepts_1": (1, 10)},
        {"linear/b": (1, 4)},
        {"conv.weight_g": (4, 1, 1, 1)},
        {"parametrizations.weight.original0": (4, 1)},
    ],
    ids=str,
)
def test_one_value_a_unit_is_no_weight_however_many_dimensions_it_has(shapes: Shapes):
    beside = {"linear/w": (3, 4), "conv.weight_v": (4, 3, 3, 3), "parametrizations.weight.original1": (4, 3)}
    assert layout_of({**beside, **shapes}).prunable_names == list(beside)


@pytest.mark.parametrize(
    "shapes",
    [
        {"weight": (1, 64), "bias": (1,)},
        {"fc.weight": (64, 1), "fc.bias": (64,)},
        {"dw.weight": (8, 1, 3, 3), "dw.bias": (8,)},
        {"lstm.weight_ih_l0": (8, 2), "lstm.weight_hh_l0": (8, 2), "lstm.bias_ih_l0": (8,)},
        {"attn.in_proj_weight": (12, 4), "attn.in_proj_bias": (12,)},
        {"coef": (1, 64), "intercept": (1,)},
        {"a": (4, 4), "b": (4, 4)},
        {"w": (3, 3), "b": (3, 3)},
        {"norm_proj.weight": (4, 4)},
        {"kiln.weight": (3, 3)},
        {"relative_attention_bias.weight": (32, 8)},
        {"lora_A.weight": (4, 8), "lora_B.weight": (8, 4)},
    ],
    ids=str,
)
def test_genuine_weights_are_weights(shapes: Shapes):
    assert layout_of(shapes).prunable_names == [name for name, shape in shapes.items() if len(shape) > 1]


def test_what_the_user_names_is_pruned_whatever_it_is():
    shapes = {"norm.weight": (4, 5), "norm.bias": (4, 5), "fc.weight": (2, 20)}
    assert layout_of(shapes, prunable="norm.*").prunable_names == ["norm.weight", "norm.bias"]
    assert layout_of(shapes, prunable=lambda name, shape: len(shape) > 1).prunable_names == list(shapes)


def test_the_biases_switch_takes_a_weights_biases_of_any_dimensions_and_never_a_normalisations():
    shapes = {"up.weight": (4, 8, 3), "up.bias": (4, 8), "norm.weight": (4, 8), "norm.bias": (4, 8)}
    assert layout_of(shapes, biases=True).prunable_names == ["up.weight", "up.bias"]


# Outputs

CNN: Shapes = {"conv1.weight": (8, 3, 3, 3), "conv2.weight": (16, 8, 3, 3), "fc.weight": (32, 16 * 4)}


@pytest.mark.parametrize(
    ("shapes", "outputs"),
    [
        ({**CNN, "out.weight": (10, 32)}, {"out.weight": 0}),
        ({"head": (3, 4), "body": (4, 5)}, {"body": 0, "head": 0}),
        ({"out.weight": (10, 32), **CNN}, {"fc.weight": 0, "out.weight": 0}),
        ({"a.weight": (10, 32), **CNN}, {"fc.weight": 0, "a.weight": 0}),
        ({"a.weight": (6, 32), "b.weight": (3, 32), **CNN}, {"fc.weight": 0, "a.weight": 0, "b.weight": 0}),
        ({**CNN, "a.weight": (1, 32), "b.weight": (4, 32)}, {"b.weight": 0, "a.weight": 0}),
        ({**CNN, "heads.0.weight": (9, 32), "heads.1.weight": (8, 32)}, {"heads.1.weight": 0, "heads.0.weight": 0}),
        ({"head.0.weight": (6, 4), "head.2.weight": (3, 6), "body": (4, 9)}, {"body": 0, "head.2.weight": 0}),
        ({"d/kernel": (64, 32), "e/kernel": (32, 10)}, {"e/kernel": 1}),
        ({"c/kernel": (3, 3, 1, 8), "d/kernel": (72, 6), "v/kernel": (72, 5)}, {"v/kernel": 1, "d/kernel": 1}),
        ({"emb.weight": (50, 8), "lstm.weight_ih_l0": (32, 8), "lstm.weight_hh_l0": (32, 8), "fc": (50, 8)}, {"fc": 0}),
        ({"wte.weight": (50, 8), "h.0.attn.in_proj_weight": (24, 8), "lm_head.weight": (50, 8)}, {"lm_head.weight": 0}),
        ({"l.0.output.dense.weight": (8, 8), "l.1.output.dense.weight": (8, 8), "c": (2, 8)}, {"c": 0}),
        ({"pw.weight": (16, 8, 1, 1), "dw.weight": (16, 1, 3, 3), "fc.weight": (5, 16)}, {"fc.weight": 0}),
        ({"fc.weight": (128, 10), "conv.weight": (16, 8, 3, 3), "last.weight": (3, 16, 3, 3)}, {"last.weight": 0}),
        ({"token_embedding.weight": (50, 8)}, {"token_embedding.weight": 0}),
    ],
    ids=str,
)
def test_auto_takes_every_array_that_can_be_an_output(shapes: Shapes, outputs: dict[str, int]):
    assert layout_of(shapes).output == outputs
    assert list(layout_of(shapes).output) == list(outputs)


def test_a_layer_that_feeds_what_is_excluded_is_no_output():
    shapes = {**CNN, "a.weight": (32, 32), "out.weight": (10, 32)}
    assert layout_of(shapes, exclude="conv2.weight").output == {"out.weight": 0}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    ("shapes", "heads"),
    [
        ({"head": (10, 32), "body.0": (64, 50), "body.1": (32, 64)}, ["head"]),
        ({"body.0": (64, 50), "body.1": (32, 64), "one": (10, 32), "two": (7, 32)}, ["one", "two"]),
        ({"d_0/kernel": (50, 64), "v/kernel": (64, 5), "p/kernel": (64, 9)}, ["v/kernel", "p/kernel"]),
    ],
    ids=["head first", "two heads", "inputs first"],
)
def test_no_head_loses_a_unit_at_90_percent(shapes: Shapes, heads: list[str], scope: str):
    layout = layout_of(shapes)
    scores = {name: np.random.default_rng(1).random(shape) for name, shape in shapes.items()}
    for name in heads:
        scores[name] /= 1e6  # they would go first
    mask = choose(layout, scores, 0.9, scope)
    if scope == "global":
        assert mask.kept == layout.prunable_size - layout.prunable_size * 9 // 10
    for name in heads:
        assert mask.keep[name].any(axis=0 if "kernel" in name else 1).all()


@pytest.mark.parametrize(
    ("output", "found"),
    [
        ("two.weight", {"two.weight": 0}),
        (["one.weight", "two.weight"], {"one.weight": 0, "two.weight": 0}),
        ("*o*.weight", {"one.weight": 0, "two.weight": 0}),
        ({"two.weight": 1}, {"two.weight": 1}),
        ({"*.weight": -1}, {"one.weight": 1, "two.weight": 1}),
        ({"one.weight": -2, "d/kernel": -1}, {"one.weight": 0, "d/kernel": 1}),
        ("d/kernel", {"d/kernel": 1}),
        ([], {}),
        (None, {}),
    ],
    ids=str,
)
def test_outputs_are_names_patterns_and_axes(output: object, found: dict[str, int]):
    layout = layout_of(
        {"one.weight": (3, 4), "one.bias": (3,), "two.weight": (5, 4), "d/kernel": (4, 6)}, output=output
    )
    assert layout.output == found
    assert layout.guesses == ()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("head", "output = 'head': must be one of the prunable arrays"),
        (["w", "haed.*"], r"output = 'haed\.\*': must be one of"),
        ("b", "output = 'b'"),
        ({"w": 2}, "'w' has 2 axes"),
        ({"w": -3}, "'w' has 2 axes"),
        ({"w": "last"}, "'w' has 2 axes"),
        ({"x": 0}, "output = 'x'"),
    ],
)
def test_an_output_that_is_not_there_is_refused_by_name(output: object, message: str):
    with pytest.raises(ValueError, match=message):
        layout_of({"w": (2, 3), "b": (2,)}, output=output)


def test_each_unit_along_a_named_axis_keeps_its_best_entry_and_of_equals_the_last():
    layout = layout_of({"w": (2, 3)}, output={"w": -1})
    keep = choose(layout, {"w": np.array([[5.0, 1, 2], [4, 1, 3]])}, 0.5).keep["w"]
    assert keep.astype(int).tolist() == [[1, 0, 0], [0, 1, 1]]


def test_a_guess_gives_way_where_a_sparsity_cannot_be_had_with_it():
    shapes = {"first": (5, 2), "second": (4, 2), "body": (2, 6)}
    layout = layout_of(shapes)
    assert list(layout.output) == ["body", "first", "second"]
    scores = {name: np.zeros(shape) for name, shape in shapes.items()}
    for sparsity, protected in ((0.5, 3), (0.65, 3), (0.67, 2), (0.8, 1), (0.84, 1)):
        # of 30 entries 15, 11, 10, 6, 5 stay; the floors of body, first and second take 2, 5 and 4, or 1 each
        assert len(protected_outputs(layout, Budget.whole(layout, sparsity))) == protected, sparsity
        assert choose(layout, scores, sparsity).kept == 30 - int(round(sparsity * 100) * 30 // 100)
    assert protected_outputs(layout, Budget.by_layer(layout, 0.5)) == layout.output
    assert protected_outputs(layout, Budget.by_layer(layout, 0.6)) == {"body": 0, "second": 0}
    with pytest.raises(ValueError, match="must stay"):
        choose(layout, scores, 0.9)
    named = layout_of(shapes, output=list(shapes))
    with pytest.raises(ValueError, match="must stay"):
        choose(named, scores, 0.8)


def test_neither_the_digest_nor_the_record_of_a_mask_depend_on_the_outputs():
    shapes = {"one": (3, 4), "two": (5, 4)}
    keep = {name: np.ones(shape, bool) for name, shape in shapes.items()}
    masks = [Mask.from_bool(layout_of(shapes, output=output), keep) for output in (None, "auto", {"one": 1})]
    assert len({mask.digest for mask in masks}) == 1
    assert all(dict(encode_mask(mask)) == dict(encode_mask(masks[0])) for mask in masks)
    assert decode_mask(encode_mask(masks[2])).layout.output == {}
