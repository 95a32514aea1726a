import numpy as np
import pytest

from autoflip_flwr.core.digest import digest_of
from autoflip_flwr.core.layout import Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.subspace import Subspace

FULL = {"w": np.array([[1, 2], [3, 4]], np.float32), "n": np.array([5], np.float32), "i": np.array(6)}
BASE = {"w": np.array([[10, 20], [30, 40]], np.float32), "n": np.array([50], np.float32), "i": np.array(60)}
MASK = Mask.from_bool(Layout.of(FULL), {"w": np.array([[True, False], [False, True]])})


def lists(arrays: dict[str, np.ndarray]) -> dict[str, list]:
    return {name: array.tolist() for name, array in arrays.items()}


def test_zero_stands_outside_without_a_base():
    assert lists(Subspace(MASK).project(FULL)) == {"w": [[1, 0], [0, 4]], "n": [5], "i": 6}


def test_the_base_stands_outside_the_mask_and_nowhere_else():
    subspace = Subspace(MASK, BASE)
    assert lists(subspace.pack(FULL)) == {"w": [1, 4], "n": [5], "i": 6}
    assert lists(subspace.unpack(subspace.pack(FULL))) == {"w": [[1, 20], [30, 4]], "n": [5], "i": 6}
    assert lists(subspace.project(subspace.project(FULL))) == lists(subspace.project(FULL))
    assert lists(BASE)["w"] == [[10, 20], [30, 40]]


def test_values_keep_the_dtype_that_they_come_in():
    packed = {"w": np.array([1.5, 4.5]), "n": np.array([5.0]), "i": np.array(6)}
    assert {name: array.dtype.name for name, array in Subspace(MASK, BASE).unpack(packed).items()} == {
        "w": "float64",
        "n": "float64",
        "i": "int64",
    }


@pytest.mark.parametrize(
    "other",
    [
        {**FULL, "w": FULL["w"].T},
        {**FULL, "w": FULL["w"].astype(np.float64)},
        {**FULL, "w": FULL["w"].reshape(4)},
        {"v": FULL["w"], "n": FULL["n"], "i": FULL["i"]},
        dict(reversed(FULL.items())),
    ],
)
def test_a_digest_tells_models_apart(other: dict[str, np.ndarray]):
    assert digest_of(FULL) == digest_of({name: array.copy() for name, array in FULL.items()}) != digest_of(other)
    assert digest_of({"w": np.asfortranarray(FULL["w"])}) == digest_of({"w": FULL["w"]})
