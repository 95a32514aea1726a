"""Fixtures shared by the tests: where the real data lie, and a cache folder of the session's own."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the tests are many small steps: threads only wait for each other

_BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With two workers, a module's tests share one, and what starts other processes goes one after another."""
    for item in items:
        alone = item.get_closest_marker("runs") or item.get_closest_marker("slow")
        item.add_marker(pytest.mark.xdist_group("runs" if alone else item.path.name))


@pytest.fixture(scope="session")
def data_dir() -> str:
    """Folder of the real data sets: $AUTOFLIP_DATA, else ../shared/data beside the repository."""
    folder = Path(os.environ.get("AUTOFLIP_DATA") or _BESIDE)
    if not folder.is_dir():
        pytest.fail(f"no data sets in {folder}: set AUTOFLIP_DATA to the folder with MNIST/raw and cifar10", False)
    return str(folder)


@pytest.fixture(scope="module", autouse=True)
def _little_to_collect() -> None:
    """Set aside what is there: Flower collects garbage for each array that it converts, and would go through it all."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOFLIP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
