"""Fixtures shared by the tests: where the real data lie, and a cache folder of the session's own."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the tests are many small steps: threads only wait for each other

_BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_finish() -> None:
    """Set aside what is loaded: Flower collects garbage for every array that it converts, and would go through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def data_dir() -> str:
    """Folder of the real data sets: $AUTOFLIP_DATA, else ../shared/data beside the repository."""
    folder = Path(os.environ.get("AUTOFLIP_DATA") or _BESIDE)
    if not folder.is_dir():
        pytest.fail(f"no data sets in {folder}: set AUTOFLIP_DATA to the folder with MNIST/raw and cifar10", False)
    return str(folder)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOFLIP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
