"""Compute the weighted mean of replies at memory bandwidth, bit-identical to Flower's FedAvg."""

from __future__ import annotations

import os
from collections.abc import Sequence
from threading import Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.wire.values import CHUNK, Vector

_WORTH_THREADS = 2**20


def weighted_mean(vectors: Sequence[Vector], weights: Sequence[float]) -> NDArray[Any]:
    """Return ``sum_k (w_k / sum(w)) * v_k``, in the order of the replies and in the values' dtype, as FedAvg does.

    The vectors are read chunk by chunk, so that a chunk's sum stays in the cache while every reply is added to it.
    Nothing is copied: only the result takes memory. Each entry goes through the same multiplications and additions as
    in FedAvg, whatever the number of threads.

    Parameters
    ----------
    vectors : Sequence[Vector]
        The replies, at least one; all of one dtype and size.
    weights : Sequence[float]
        Their weights, > 0.

    Returns
    -------
    ndarray
        1-D, of the vectors' dtype.
    """
    total = sum(weights)
    factors = [weight / total for weight in weights]
    size = vectors[0].size
    result = np.empty(size, vectors[0].dtype)

    def work(begin: int, end: int) -> None:
        count = -(-(end - begin) // CHUNK)
        chunk = -(-(end - begin) // max(count, 1))
        product = np.empty(chunk, result.dtype)
        weighted = list(zip(vectors[1:], factors[1:], strict=True))
        for start in range(begin, end, max(chunk, 1)):
            stop = min(start + chunk, end)
            partial, term = result[start:stop], product[: stop - start]
            np.multiply(vectors[0].read(start, stop), factors[0], partial)
            for vector, factor in weighted:
                np.multiply(vector.read(start, stop), factor, term)
                np.add(partial, term, partial)

    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if threads == 1 or size < _WORTH_THREADS:
        work(0, size)
        return result
    share = -(-size // threads)
    failed: list[BaseException] = []

    def aside(begin: int) -> None:
        try:
            work(begin, min(begin + share, size))
        except BaseException as error:  # an error in a thread would be lost with it
            failed.append(error)

    others = [Thread(target=aside, args=(begin,)) for begin in range(share, size, share)]
    for other in others:
        other.start()
    work(0, share)  # this thread takes the first share
    for other in others:
        other.join()
    if failed:
        raise failed[0]
    return result
