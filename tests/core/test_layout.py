import numpy as np
import pytest

from autoflip_flwr.core.layout import Layout


def zeros(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def chosen(shapes: dict[str, tuple[int, ...]], **options: object) -> list[str]:
    return Layout.of(zeros(**shapes), **options).prunable_names


NETWORK = {
    "embed.weight": (9, 2),
    "conv.weight": (4, 3, 2, 2),
    "conv.bias": (4,),
    "bn.weight": (4,),
    "bn.bias": (4,),
    "bn.running_mean": (4,),
    "bn.num_batches_tracked": (),
    "lstm.weight_ih_l0": (8, 2),
    "lstm.bias_ih_l0": (8,),
    "lstm.bias_hh_l0": (8,),
    "norm.weight": (4,),
    "fc.weight": (2, 4),
    "fc.bias": (2,),
}
WEIGHTS = ["embed.weight", "conv.weight", "lstm.weight_ih_l0", "fc.weight"]


def test_weights_with_two_or_more_dimensions_are_pruned_by_default_and_nothing_else():
    assert chosen(NETWORK) == WEIGHTS


def test_the_biases_switch_adds_biases_beside_a_weight_but_none_of_a_normalisation_layer():
    assert sorted(chosen(NETWORK, biases=True)) == sorted(
        [*WEIGHTS, "conv.bias", "lstm.bias_ih_l0", "lstm.bias_hh_l0", "fc.bias"]
    )


@pytest.mark.parametrize(
    ("shapes", "biases"),
    [
        ({"weight": (2, 3), "bias": (2,)}, ["bias"]),
        ({"weight": (3,), "bias": (3,)}, []),
        ({"params/Dense_0/kernel": (3, 2), "params/Dense_0/Bias": (2,)}, ["params/Dense_0/Bias"]),
        ({"bias.weight": (2, 2), "bias.scale": (2,)}, []),
        ({"0.weight": (2, 2), "1.weight": (2,), "1.bias": (2,)}, []),
        ({"fc.weight": (2, 2), "fc.bias": ()}, []),
    ],
    ids=["no prefix", "norm, no prefix", "slashes and capitals", "bias in the prefix", "sequential norm", "0-d"],
)
def test_a_bias_is_known_by_its_last_name_and_its_layer(shapes: dict[str, tuple[int, ...]], biases: list[str]):
    weights = [name for name, shape in shapes.items() if len(shape) >= 2]
    assert chosen(shapes, biases=True) == [name for name in shapes if name in weights + biases]


def test_prunable_overrides_the_rule_and_is_given_name_and_shape():
    seen = {}

    def rule(name: str, shape: tuple[int, ...]) -> bool:
        seen[name] = shape
        return name.startswith("bn.")

    assert chosen(NETWORK, prunable=rule, biases=True) == [name for name in NETWORK if name.startswith("bn.")]
    assert seen == NETWORK


@pytest.mark.parametrize("dtype", ["int8", "int64", "uint8", "bool"])
def test_integer_and_bool_arrays_are_described_but_never_pruned(dtype: str):
    layout = Layout.of({"w": np.zeros((2, 2), dtype)}, prunable=lambda *_: True)
    assert (layout["w"].dtype, layout["w"].floating, layout["w"].prunable, layout.size) == (dtype, False, False, 4)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_every_float_dtype_is_prunable_and_keeps_its_name(dtype: str):
    layout = Layout.of({"w": np.zeros((2, 2), dtype)})
    assert (layout["w"].dtype, layout["w"].floating, layout["w"].prunable) == (dtype, True, True)


def test_an_empty_array_is_never_pruned():
    assert chosen({"a": (0, 3), "b": (2, 3)}, prunable=lambda *_: True) == ["b"]


def test_the_output_is_the_last_prunable_weight_even_where_a_bias_comes_after_it():
    layout = Layout.of(zeros(**NETWORK), biases=True)
    assert layout.prunable_names[-1] == "fc.bias"
    assert layout.output == {"fc.weight": 0}


def test_the_output_may_be_named_or_left_out():
    assert Layout.of(zeros(**NETWORK), output="conv.weight").output == {"conv.weight": 0}
    assert Layout.of(zeros(**NETWORK), output=None).output == {}


def test_a_model_without_prunable_weights_has_no_output():
    layout = Layout.of(zeros(a=(3,), b=()))
    assert (layout.output, layout.prunable, layout.prunable_size, layout.size) == ({}, (), 0, 4)


@pytest.mark.parametrize("output", ["nothing", "fc.bias", "bn.weight"])
def test_an_output_that_is_not_prunable_is_refused_by_name(output: str):
    with pytest.raises(ValueError, match=f"output = '{output}'"):
        Layout.of(zeros(**NETWORK), output=output)


def test_an_output_without_dimensions_has_no_units_and_is_refused():
    with pytest.raises(ValueError, match="output = 's'"):
        Layout.of({"s": np.zeros((), np.float32)}, prunable=lambda *_: True, output="s")


def test_sizes_count_entries_in_the_order_of_the_model():
    layout = Layout.of(zeros(a=(2, 3), b=(5,), c=(), d=(4, 1)))
    assert [spec.name for spec in layout.specs] == ["a", "b", "c", "d"]
    assert [spec.size for spec in layout.specs] == [6, 5, 1, 4]
    assert (layout.size, layout.prunable_size) == (16, 10)


@pytest.mark.parametrize("array", [np.array(["x"]), np.array([None]), np.zeros((2, 2), complex)], ids=str)
def test_what_is_neither_number_nor_bool_is_refused_by_name(array: np.ndarray):
    with pytest.raises(ValueError, match=r"'head\.x' has dtype"):
        Layout.of({"w": np.zeros((2, 2)), "head.x": array})


def test_two_arrays_of_one_name_are_refused():
    spec = Layout.of(zeros(a=(2, 2))).specs[0]
    with pytest.raises(ValueError, match="names must differ"):
        Layout((spec, spec))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"a": (2, 3)}, r"missing \['b'\]"),
        ({"a": (2, 3), "b": (4,), "c": ()}, r"unexpected \['c'\]"),
        ({"a": (3, 2), "b": (4,)}, r"'a' has shape \(3, 2\), expected \(2, 3\)"),
        ({"a": (2, 3), "b": (4, 1)}, r"'b' has shape \(4, 1\), expected \(4,\)"),
    ],
)
def test_check_names_the_array_that_does_not_fit(shapes: dict[str, tuple[int, ...]], message: str):
    with pytest.raises(ValueError, match=message):
        Layout.of(zeros(a=(2, 3), b=(4,))).check(zeros(**shapes))


def test_check_looks_at_names_and_shapes_alone():
    Layout.of(zeros(a=(2, 3), b=(4,))).check({"b": np.zeros(4, int), "a": np.ones((2, 3))})


# What the user chooses

RULES = {
    "a pattern": "lstm.weight_*",
    "a list of patterns": ["lstm.weight_ih_l0", "*.weight_hh*"],
    "a tuple of patterns": ("lstm.weight_??_l0",),
    "a function": lambda name, shape: "weight_" in name and len(shape) == 2,
}
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
RECURRENT = {**NETWORK, "lstm.weight_hh_l0": (8, 4)}
CHOSEN = ["lstm.weight_ih_l0", "lstm.weight_hh_l0"]


@each_rule
def test_prunable_is_a_pattern_some_patterns_or_a_function(rule: object):
    assert chosen(RECURRENT, prunable=rule) == CHOSEN


@each_rule
def test_exclude_is_a_pattern_some_patterns_or_a_function(rule: object):
    assert chosen(RECURRENT, exclude=rule) == [name for name in WEIGHTS if name not in CHOSEN]


def test_exclude_is_given_name_and_shape():
    assert chosen(NETWORK, exclude=lambda name, shape: shape[0] == 8) == ["embed.weight", "conv.weight", "fc.weight"]


def test_a_pattern_may_choose_what_has_one_dimension():
    assert chosen(NETWORK, prunable=["bn.weight", "fc.*"]) == ["bn.weight", "fc.weight", "fc.bias"]
    assert chosen({"w": (9,)}, prunable="*") == ["w"]


def test_exclude_wins_over_prunable_and_over_the_biases_switch():
    assert chosen(NETWORK, prunable="fc.*", exclude="*.bias") == ["fc.weight"]
    assert chosen(NETWORK, biases=True, exclude="*bias*") == WEIGHTS
    assert chosen(NETWORK, prunable="*", exclude=lambda *_: True) == []


def test_an_empty_list_chooses_and_excludes_nothing():
    assert chosen(NETWORK, prunable=[]) == []
    assert chosen(NETWORK, exclude=[]) == WEIGHTS


def test_capitals_count_in_a_pattern():
    with pytest.raises(ValueError, match=r"prunable: 'FC\.\*' matches none"):
        chosen(NETWORK, prunable="FC.*")


@pytest.mark.parametrize("parameter", ["prunable", "exclude"])
@pytest.mark.parametrize("rule", ["head.*", ["fc.*", "head.*"], ("head.*", "fc.*")], ids=str)
def test_a_pattern_that_matches_nothing_is_refused_by_parameter_and_pattern(parameter: str, rule: object):
    with pytest.raises(ValueError, match=rf"^{parameter}: 'head\.\*' matches none of the model's arrays \['embed\.wei"):
        chosen(NETWORK, **{parameter: rule})


def test_a_pattern_may_match_what_is_not_pruned_anyway():
    assert chosen(NETWORK, exclude=["bn.*", "*.bias"]) == WEIGHTS


def test_the_output_is_the_last_of_those_that_are_left():
    assert Layout.of(zeros(**NETWORK), exclude="fc.weight").output == {"lstm.weight_ih_l0": 0}
    assert Layout.of(zeros(**NETWORK), exclude=["fc.*", "lstm.*"], biases=True).output == {"conv.weight": 0}
    assert Layout.of(zeros(**NETWORK), prunable=["embed.*", "fc.bias"]).output == {"embed.weight": 0}
    assert Layout.of(zeros(**NETWORK), prunable="fc.bias").output == {}


def test_an_excluded_output_is_refused_by_name():
    with pytest.raises(ValueError, match=r"output = 'fc\.weight': must be one of the prunable arrays"):
        Layout.of(zeros(**NETWORK), exclude="fc.*", output="fc.weight")


@pytest.mark.parametrize("rule", ["*", ["table", "w"], lambda *_: True], ids=["pattern", "patterns", "function"])
def test_integers_and_bools_are_not_pruned_even_where_the_user_chooses_them(rule: object):
    arrays = {"w": np.zeros((2, 2)), "table": np.zeros((3, 3), np.int64), "used": np.zeros((2, 2), bool)}
    layout = Layout.of(arrays, prunable=rule)
    assert (layout.prunable_names, layout.output) == (["w"], {"w": 0})


def test_a_name_that_holds_what_is_special_in_a_pattern_means_itself():
    arrays = {name: np.ones((2, 2), np.float32) for name in ("layer[0]", "layer0")}
    assert Layout.of(arrays, exclude="layer[0]").prunable_names == []
    assert Layout.of({"layer[0]": arrays["layer[0]"], "b": np.ones((2, 2))}, exclude="layer[0]").prunable_names == ["b"]
