"""Examples as clients train on them: raw arrays that a process holds once, made into batches for a model."""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from autoflip_flwr.experiment.augment import augmented, centred
from autoflip_flwr.experiment.data.dataset import Data, Inputs


class Shared:
    """Raw arrays that every node of a process shares. They are copied to an accelerator once, when first asked for.

    Parameters
    ----------
    x : ndarray
        (N, ...), the raw inputs; memory-mapped files are read where and when a batch needs them.
    y : ndarray
        int64 (N,), the labels.
    """

    def __init__(self, x: NDArray[Any], y: NDArray[np.int64]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the arrays are read-only, and stay unchanged
            here = torch.from_numpy(x), torch.from_numpy(y)
        self._on = {torch.device("cpu"): here}

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and labels on `device`."""
        if device not in self._on:
            x, y = self._on[torch.device("cpu")]
            self._on[device] = x.to(device), y.to(device)
        return self._on[device]


class Examples:
    """One node's examples, or the test set: rows of shared arrays.

    Parameters
    ----------
    shared : Shared
        The arrays.
    inputs : Inputs
        How they become what a model takes.
    rows : ndarray | None
        int64 (n,), which examples of `shared` these are, in their order; `None` for all.
    device : torch.device
        Where batches are made.
    """

    def __init__(
        self,
        shared: Shared,
        inputs: Inputs,
        rows: NDArray[np.int64] | None = None,
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> None:
        self.inputs, self.device, self._shared, self._own = inputs, device, shared, rows
        self._x, labels = shared.on(device)
        self._rows = None if rows is None else torch.from_numpy(rows).to(device)
        self.labels = labels if self._rows is None else labels[self._rows]
        """int64 (n,), on `device`."""
        channels = (-1, *(1 for _ in inputs.shape[1:]))
        # tensors, since an accelerator divides by a number inexactly
        self._white = torch.tensor([255.0], device=device)
        self._mean = torch.tensor(inputs.mean, dtype=torch.float32, device=device).reshape(channels)
        self._std = torch.tensor(inputs.std, dtype=torch.float32, device=device).reshape(channels)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(
        self, rows: torch.Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs for a model, and their labels.

        Parameters
        ----------
        rows : Tensor
            int64 (n,), positions in [0, len(self)).
        generator : torch.Generator | None
            On the CPU. Images are augmented, with random numbers from it, only where it is given.

        Returns
        -------
        tuple of Tensor
            float32 (n, *inputs.shape), or int64 for text, contiguous; and int64 (n,). Both on `device`.
        """
        rows = rows.to(self.device)
        raw = self._x.index_select(0, rows if self._rows is None else self._rows[rows])
        return self._prepared(raw, generator), self.labels[rows]

    def to(self, device: torch.device) -> Examples:
        """Return the same examples on another device."""
        return self if device == self.device else Examples(self._shared, self.inputs, self._own, device)

    def _prepared(self, raw: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        kind, shape, augment = self.inputs.kind, self.inputs.shape, self.inputs.augment
        if kind == "text":
            return raw.long()
        if kind == "image":
            size = (shape[1], shape[2])
            if augment != "none" and generator is not None:
                raw = augmented(raw, size, augment, generator)
            elif tuple(raw.shape[1:3]) != size:
                raw = centred(raw, size)
            pixels = raw.permute(0, 3, 1, 2)
            x = pixels.to(torch.float32, memory_format=torch.contiguous_format, copy=True).div_(self._white)
        else:
            x = raw.float()  # a copy already, since it was selected
        return x.sub_(self._mean).div_(self._std) if self.inputs.mean else x


def examples_to_train(data: Data, rows: NDArray[np.int64] | None = None) -> Examples:
    """Return training examples: those at `rows`, int64 (n,), or all. The arrays are shared by all that ask."""
    return Examples(_shared(data, True), data.inputs, rows)


def examples_to_test(data: Data, rows: NDArray[np.int64] | None = None) -> Examples:
    """Return test examples: those at `rows`, int64 (n,), or all."""
    return Examples(_shared(data, False), data.inputs, rows)


@lru_cache(maxsize=8)
def _shared(data: Data, training: bool) -> Shared:
    return Shared(data.x_train, data.y_train) if training else Shared(data.x_test, data.y_test)
