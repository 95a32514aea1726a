import numpy as np
import pytest

from autoflip_flwr.layout import Layout


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
    assert layout.output == "fc.weight"


def test_the_output_may_be_named_or_left_out():
    assert Layout.of(zeros(**NETWORK), output="conv.weight").output == "conv.weight"
    assert Layout.of(zeros(**NETWORK), output=None).output is None


def test_a_model_without_prunable_weights_has_no_output():
    layout = Layout.of(zeros(a=(3,), b=()))
    assert (layout.output, layout.prunable, layout.prunable_size, layout.size) == (None, (), 0, 4)


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
