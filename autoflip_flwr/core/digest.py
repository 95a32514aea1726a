"""Digest of a model, to check whether two models are equal bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def digest_of(arrays: Mapping[str, NDArray[Any]], text: str = "") -> str:
    """Return the SHA-256 (hex) of a text and of the arrays' names, dtypes, shapes and values, in the given order."""
    digest = hashlib.sha256(text.encode())
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
