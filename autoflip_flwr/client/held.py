"""The base (the values of pruned entries) at a client: where the node gets it from, and how client code reads it.

A node has the base that a message names in one of two ways. Either it explored from it or was sent it; then
``context.state`` holds the base. Or its user gave the mod the same model; then ``context.state`` holds its digest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from logging import WARNING
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message
from flwr.common.logger import log
from numpy.typing import NDArray

from autoflip_flwr.core.layout import Arrays, Layout
from autoflip_flwr.wire.base_record import base_digest, check_base, decode_base, encode_base
from autoflip_flwr.wire.keys import BASE_RECORD, GIVEN, HEADER
from autoflip_flwr.wire.records import WireError

Source = Mapping[str, Any] | Callable[[], Mapping[str, Any] | None]
"""Arrays by the server's names, or a function that returns them, or returns None if this client has none."""

_BASE, _HELD, _GIVEN = "base", "held", "given"
"""Notes of the node's state: digests of the current base, of the base in the state, of the user's model."""

_matching: dict[str, Arrays] = {}
"""User's models by digest, once a message has named them. A node's state has no copy of them."""


class Given:
    """The model that the user gave to the mod; it is read when a message first names a base.

    Parameters
    ----------
    source : Mapping[str, Any] | Callable[[], Mapping[str, Any] | None] | None
        NumPy arrays, PyTorch tensors or anything that ``numpy.asarray`` takes, by the server's names. Arrays that the
        server does not send are ignored. Or a function that returns them, which is called at most once. If it returns
        None or raises OSError (the file is missing), the server sends the base. ``None``: nothing was given.

    Raises
    ------
    TypeError
        If ``source`` is anything else.
    """

    def __init__(self, source: Source | None) -> None:
        if not callable(source):
            _check_type(source, "base is of type")
        self._source = source
        self._compared: tuple[Layout, str, Arrays] | None = None

    def __bool__(self) -> bool:
        return self._source is not None

    def fits(self, layout: Layout, digest: str) -> bool:
        """Return whether the model is the base of this digest; :func:`base_in_force` then finds it in this process."""
        model = self._read()
        if model is None:
            return False
        if self._compared is None or self._compared[0].prunable != layout.prunable:
            try:
                arrays = {spec.name: _array(model, spec.name, spec.shape, spec.dtype) for spec in layout.prunable}
            except ValueError as error:
                self._warn(str(error))
                return False
            self._compared = layout, base_digest(layout, arrays), arrays
        _, found, arrays = self._compared
        if found != digest:
            self._warn("its values are others")
            return False
        _matching[digest] = arrays
        return True

    def _read(self) -> Mapping[str, Any] | None:
        if callable(self._source):
            load, self._source = self._source, None  # only once, whatever the result
            try:
                found = load()
            except OSError as error:
                log(WARNING, "base=: it cannot be read (%s): this client is sent the base instead", error)
                return None
            _check_type(found, "base= returned")
            self._source = found
        return self._source

    def _warn(self, why: str) -> None:
        log(WARNING, "base=: not the model that the server began with (%s): this client is sent the base instead", why)


def _check_type(source: object, told: str) -> None:
    if not (source is None or isinstance(source, Mapping)):
        raise TypeError(
            f"{told} {type(source).__name__}: must be arrays by name, as a state_dict holds them, or a function that "
            "returns such"
        )


def _array(model: Mapping[str, Any], name: str, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """Return one array of the user's model in the server's dtype; a view if possible."""
    if name not in model:
        raise ValueError(f"it has no {name!r}")
    found = model[name]
    if hasattr(found, "detach"):  # a tensor of PyTorch, which is not imported here
        found = found.detach().cpu()
        found = (found.float() if str(found.dtype) == "torch.bfloat16" else found).numpy()
    array = np.asarray(found)
    if array.shape != shape or array.dtype.kind != "f":
        raise ValueError(f"its {name!r} is {array.dtype} of shape {array.shape}, not {dtype} of shape {shape}")
    return array.astype(dtype, copy=False)


def told(context: Context, given: Given) -> dict[str, str]:
    """Return the header entry of a reply to hello that names the node's base; empty if it has none."""
    notes = context.state.get(HEADER, ConfigRecord())
    known = notes.get(_HELD) or notes.get(_GIVEN) or (GIVEN if given else "")
    return {"base": str(known)} if known else {}


def holds_base(message: Message, context: Context, digest: str, layout: Layout | None, given: Given) -> bool:
    """Return whether the node has the base that a message names, or gets it with the message; it becomes current.

    Without a ``layout``, which comes with the mask, nothing can be compared or become current. The node then counts as
    having the base if the message contains one, if it is known from before, or if the user's model may match.

    Raises
    ------
    WireError
        If the message contains a base that does not follow the format, or is not the one that the header names.
    """
    record = message.content.get(BASE_RECORD)
    if not digest:
        if record is not None:
            raise WireError("a base came along that the message's header does not name")
        return True
    notes = context.state[HEADER]
    if layout is None:
        return record is not None or notes.get(_HELD) == digest or (bool(given) and notes.get(_GIVEN, digest) == digest)
    if record is not None:
        check_base(layout, record, digest)
        _keep(context, digest, record)
    elif notes.get(_HELD) == digest and BASE_RECORD in context.state:
        pass
    elif given.fits(layout, digest):
        _note(context, {_GIVEN: digest})
    else:
        return False
    _note(context, {_BASE: digest})
    return True


def keep_explored(context: Context, digest: str, layout: Layout, full: Arrays, given: Given) -> bool:
    """Keep the model that an explorer was sent if it is the base of this digest; return whether the node has it."""
    if given and given.fits(layout, digest):
        _note(context, {_GIVEN: digest})
        return True
    if context.state[HEADER].get(_HELD) != digest:
        if base_digest(layout, full) != digest:
            return False
        _keep(context, digest, encode_base(layout, full))
    return True


def base_in_force(context: Context, layout: Layout) -> Arrays | None:
    """Return the base for the current message: the prunable arrays; ``None`` if pruned entries are zero.

    Raises
    ------
    RuntimeError
        If the mod has handled the message in another process.
    """
    notes = context.state[HEADER]
    digest = str(notes.get(_BASE, ""))
    if not digest:
        return None
    if notes.get(_HELD) == digest:
        return decode_base(layout, context.state.get(BASE_RECORD))
    if digest not in _matching:
        raise RuntimeError(
            "what stands outside the mask is not in this process: ask for it (current_subspace, masked_training) in "
            "the process in which the client's function is called"
        )
    return _matching[digest]


def no_base(notes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the notes of a node's state without the current base."""
    return {key: value for key, value in notes.items() if key != _BASE}


def _keep(context: Context, digest: str, record: Any) -> None:
    context.state[BASE_RECORD] = record
    _note(context, {_HELD: digest})


def _note(context: Context, notes: Mapping[str, str]) -> None:
    context.state[HEADER] = ConfigRecord({**context.state[HEADER], **notes})  # type: ignore[dict-item]
