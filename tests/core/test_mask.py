import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
from apps import same_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from autoflip_flwr.core.layout import Layout
from autoflip_flwr.core.mask import Mask

DTYPES = ("float16", "float32", "float64", "int64", "bool")
SHAPES = ((), (0,), (1,), (5,), (2, 3), (3, 0), (2, 1, 3), (2, 2, 2, 2))
Arrays = dict[str, np.ndarray]

LAYOUT = Layout.of({"w": np.zeros((2, 2), np.float32), "b": np.zeros(2, np.float32), "v": np.zeros((1, 7), np.float64)})
MASK = Mask.from_bool(
    LAYOUT, {"w": np.array([[True, False], [False, True]]), "v": np.array([[1, 0, 1, 1, 0, 0, 1]], bool)}
)
MODEL = {
    "w": np.array([[1, 2], [3, 4]], np.float32),
    "b": np.array([5, 6], np.float32),
    "v": np.array([[7, 8, 9, 10, 11, 12, 13]], np.float64),
}


@dataclass
class Case:
    mask: Mask
    keep: Arrays
    model: Arrays
    other: Arrays


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows = draw(
        st.lists(st.tuples(st.sampled_from(SHAPES), st.sampled_from(DTYPES), st.booleans(), st.booleans()), max_size=6)
    )
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    density = draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
    model, other, pruned = {}, {}, {}
    for i, (shape, dtype, prunable, fortran) in enumerate(rows):
        values = np.asarray(rng.normal(size=shape) * 100).astype(dtype)
        model[f"a{i}"] = np.array(values, order="F" if fortran else "C")
        other[f"a{i}"] = np.asarray(rng.normal(size=shape)).astype(dtype)
        pruned[f"a{i}"] = prunable
    layout = Layout.of(model, prunable=lambda name, _: pruned[name])
    keep = {spec.name: np.asarray(rng.random(spec.shape) < density) for spec in layout.prunable}
    return Case(Mask.from_bool(layout, keep), keep, model, other)


def merged(case: Case, base: Arrays) -> Arrays:
    return {
        name: np.where(case.keep[name], array, base[name]) if name in case.keep else array
        for name, array in case.model.items()
    }


any_case = given(case=cases())
quick = settings(deadline=None, max_examples=60)


def test_gather_takes_the_kept_entries_in_order_and_other_arrays_whole():
    packed = MASK.gather(dict(reversed(MODEL.items())))
    same_bytes(packed, {"w": np.array([1, 4], np.float32), "b": MODEL["b"], "v": np.array([7, 9, 10, 13], np.float64)})


def test_scatter_puts_them_back_and_zero_elsewhere():
    full = MASK.scatter(MASK.gather(MODEL))
    same_bytes(
        full,
        {
            "w": np.array([[1, 0], [0, 4]], np.float32),
            "b": MODEL["b"],
            "v": np.array([[7, 0, 9, 10, 0, 0, 13]], np.float64),
        },
    )


def test_scatter_into_a_shadow_leaves_the_pruned_entries_as_they_were():
    shadow = {name: np.full_like(array, -1) for name, array in MODEL.items()}
    full = MASK.scatter(MASK.gather(MODEL), into=shadow)
    assert full["w"].tolist() == [[1, -1], [-1, 4]]
    assert full["b"].tolist() == [5, 6]
    assert full["v"].tolist() == [[7, -1, 9, 10, -1, -1, 13]]
    assert all((array == -1).all() for array in shadow.values())


def test_scatter_into_a_shadow_in_fortran_order():
    shadow = {name: np.asfortranarray(np.full_like(array, -1)) for name, array in MODEL.items()}
    assert MASK.scatter(MASK.gather(MODEL), into=shadow)["w"].tolist() == [[1, -1], [-1, 4]]


@quick
@any_case
def test_any_model_survives_gather_and_scatter_up_to_its_pruned_entries(case: Case):
    zeros = {name: np.zeros_like(array) for name, array in case.model.items()}
    packed = case.mask.gather(case.model)
    same_bytes(case.mask.scatter(packed), merged(case, zeros))
    same_bytes(case.mask.apply(case.model), merged(case, zeros))
    same_bytes(case.mask.scatter(packed, into=case.other), merged(case, case.other))


@quick
@any_case
def test_any_packed_model_survives_scatter_and_gather(case: Case):
    packed = case.mask.gather(case.model)
    assert all(packed[name].shape == case.mask.packed_shape(name) for name in case.model)
    assert all(packed[name].dtype == array.dtype for name, array in case.model.items())
    same_bytes(case.mask.gather(case.mask.scatter(packed)), packed)
    same_bytes(case.mask.gather(case.mask.scatter(packed, into=case.other)), packed)


@quick
@any_case
def test_apply_is_idempotent_and_leaves_its_argument_alone(case: Case):
    before = {name: array.copy() for name, array in case.model.items()}
    once = case.mask.apply(case.model)
    same_bytes(case.mask.apply(once), once)
    same_bytes(case.model, before)
    assert not any(np.shares_memory(once[name], case.model[name]) for name in case.keep)


@quick
@any_case
def test_bits_keep_indices_and_counts_say_the_same(case: Case):
    mask = case.mask
    again = Mask(mask.layout, mask.bits)
    same_bytes(again.keep, case.keep)
    assert Mask.from_bool(mask.layout, again.keep).bits == mask.bits
    for name, keep in case.keep.items():
        assert mask.indices[name].tolist() == [i for i, kept in enumerate(keep.ravel()) if kept]
        assert mask.kept_by_name[name] == keep.sum()
    assert mask.kept == sum(int(keep.sum()) for keep in case.keep.values())
    assert mask.is_full == all(keep.all() for keep in case.keep.values())


@quick
@any_case
def test_a_full_mask_changes_nothing(case: Case):
    mask = Mask.full(case.mask.layout)
    assert (mask.is_full, mask.density, mask.density_all) == (True, 1.0, 1.0)
    same_bytes(mask.apply(case.model), case.model)


def test_pruned_infinities_become_zero_and_kept_ones_stay():
    model = {"w": np.array([[np.inf, np.nan], [np.inf, -np.inf]], np.float32), "b": MODEL["b"], "v": MODEL["v"]}
    np.testing.assert_array_equal(MASK.apply(model)["w"], [[np.inf, 0], [0, -np.inf]])


def test_the_dtype_is_that_of_the_values_not_of_the_layout_or_the_shadow():
    packed = {name: array.astype(np.float16) for name, array in MASK.gather(MODEL).items()}
    assert {array.dtype.name for array in MASK.scatter(packed, into=MODEL).values()} == {"float16"}


def test_the_bits_come_most_significant_first_across_arrays():
    # w: 1 0 0 1, v: 1 0 1 1 | 0 0 1 and five unused bits
    assert MASK.bits == bytes([0b1001_1011, 0b0010_0000])


def test_density_counts_prunable_entries_and_density_all_counts_everything():
    assert (MASK.kept, MASK.kept_by_name) == (6, {"w": 2, "v": 4})
    assert MASK.density == 6 / 11
    assert MASK.density_all == pytest.approx(8 / 13)


@pytest.mark.parametrize("arrays", [{}, {"b": np.zeros(3)}, {"e": np.zeros((0, 2))}], ids=["none", "bias", "empty"])
def test_a_model_without_prunable_arrays_has_the_full_mask_of_no_bits(arrays: Arrays):
    layout = Layout.of(arrays)
    assert Mask.from_bool(layout, {}) == Mask.full(layout) == Mask(layout, b"")
    assert (Mask.full(layout).density, Mask.full(layout).density_all, Mask.full(layout).keep) == (1.0, 1.0, {})
    same_bytes(Mask.full(layout).apply(arrays), arrays)


def test_the_digest_does_not_change_from_release_to_release():
    assert MASK.digest == "a38d604f3ab81596f4c9e5057231a80686a6b4f8f72f5b3b44b3da54fb2c4468"


def test_the_digest_does_not_depend_on_version_or_output():
    without = Mask(dataclasses.replace(LAYOUT, output=None), MASK.bits, 7)
    assert (without.digest, without.version) == (MASK.digest, 7)


@pytest.mark.parametrize("change", ["name", "shape", "dtype", "prunable", "order", "bits"])
def test_the_digest_depends_on(change: str):
    w, b, v = LAYOUT.specs
    layout = {
        "name": Layout((dataclasses.replace(w, name="x"), b, v)),
        "shape": Layout((dataclasses.replace(w, shape=(4, 1)), b, v)),
        "dtype": Layout((dataclasses.replace(w, dtype="float16"), b, v)),
        "prunable": Layout((w, dataclasses.replace(b, prunable=True), v)),
        "order": Layout((v, b, w)),
        "bits": LAYOUT,
    }[change]
    bits = bytes([0, 0]) if change == "bits" else MASK.bits
    assert Mask(layout, bits).digest != MASK.digest


def test_keep_cannot_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        MASK.keep["w"][0, 0] = False


@pytest.mark.parametrize(
    ("bits", "message"),
    [(b"", "0 mask bytes for 11"), (b"\0", "1 mask bytes"), (b"\0\0\0", "3 mask bytes"), (b"\0\x01", "unused bits")],
)
def test_bits_of_the_wrong_length_or_beyond_the_end_are_refused(bits: bytes, message: str):
    with pytest.raises(ValueError, match=message):
        Mask(LAYOUT, bits)


@pytest.mark.parametrize("keep", [{"w": np.ones((2, 2), bool)}, {"w": np.ones(4, bool), "v": np.ones((1, 7), bool)}])
def test_from_bool_names_the_array_that_is_missing_or_misshapen(keep: Arrays):
    with pytest.raises(ValueError, match=r"mask of '[wv]'"):
        Mask.from_bool(LAYOUT, keep)


@pytest.mark.parametrize(
    "change",
    [{"w": np.zeros((4, 1))}, {"b": np.zeros(3)}, {"extra": np.zeros(1)}],
    ids=lambda change: next(iter(change)),
)
def test_gather_and_apply_refuse_other_names_or_shapes(change: Arrays):
    for pack in (MASK.gather, MASK.apply):
        with pytest.raises(ValueError, match=next(iter(change))):
            pack({**MODEL, **change})
    with pytest.raises(ValueError, match="missing"):
        MASK.gather({"w": MODEL["w"]})


@pytest.mark.parametrize(
    "change",
    [{"w": np.zeros(3)}, {"w": np.zeros((2, 1))}, {"b": np.zeros((1, 2))}, {"extra": np.zeros(1)}],
    ids=["longer", "2-D", "never pruned", "unexpected"],
)
def test_scatter_refuses_other_names_or_shapes(change: Arrays):
    with pytest.raises(ValueError, match=next(iter(change))):
        MASK.scatter({**MASK.gather(MODEL), **change})


def test_scatter_refuses_a_packed_model_that_lacks_an_array():
    with pytest.raises(ValueError, match="'b'"):
        MASK.scatter({name: array for name, array in MASK.gather(MODEL).items() if name != "b"})


def test_scatter_refuses_a_shadow_of_another_shape():
    with pytest.raises(ValueError, match="'w'"):
        MASK.scatter(MASK.gather(MODEL), into={**MODEL, "w": np.zeros((3, 3), np.float32)})
