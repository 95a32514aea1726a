"""Report statistics per parameter that the server requests in addition to the client's result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, RecordDict
from numpy.typing import NDArray

from autoflip_flwr.client.context import sent_array, subspace_and_layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.request import Request
from autoflip_flwr.wire.keys import ASK, HEADER, STATISTICS
from autoflip_flwr.wire.records import WireError
from autoflip_flwr.wire.request import ask_entry, pack_statistics, read_ask, to_report

_REPORTED = f"{HEADER}.reported."


def current_request(context: Context) -> tuple[Request, ...]:
    """Return the statistics that the server requests with the current message.

    A client reports each with :func:`report` if it can. Otherwise it trains as usual. If the server needs statistics
    for the first mask, it uses those of the other clients.
    """
    return to_report(read_ask(context.state.get(HEADER, ConfigRecord())))


def report(context: Context, name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Report a statistic; one that the server did not request is ignored.

    Parameters
    ----------
    context : Context
        Context of the Flower client.
    name : str
        Name of the statistic, one of those in :func:`current_request`.
    arrays : Mapping[str, ndarray]
        A full floating array for each prunable array that the server sent, under its name. Entries that were not
        requested are not sent; their values do not matter.

    Raises
    ------
    ValueError
        If an array is missing, or a name or shape is not that of an array that the server sent.
    """
    if name not in {each.name for each in current_request(context)}:
        return
    _, layout = subspace_and_layout(context)
    if layout is None:
        return
    for key, array in arrays.items():
        sent_array(layout, key, array.shape)
    if missing := [key for key in layout.prunable_names if key not in arrays]:
        raise ValueError(f"statistic {name!r} lacks {', '.join(missing[:5])}: report all arrays that are pruned")
    context.state[_REPORTED + name] = ArrayRecord(
        {key: Array(np.asarray(arrays[key], np.float32)) for key in layout.prunable_names}
    )


def note_asked(context: Context, asked: tuple[Request, ...]) -> None:
    """Note the requests of this message, and delete earlier reports."""
    for key in [key for key in context.state if key.startswith(_REPORTED)]:
        del context.state[key]
    state = {key: value for key, value in context.state.get(HEADER, ConfigRecord()).items() if key != ASK}
    state |= ask_entry(asked)
    context.state[HEADER] = ConfigRecord(state)  # type: ignore[arg-type]


def add_reported(context: Context, mask: Mask, content: RecordDict, *, required: bool) -> None:
    """Add what the client's own code has reported to its reply.

    Raises
    ------
    WireError
        If a value is not finite or too large, or (``required``) a statistic is missing.
    """
    asked = current_request(context)
    found = {each.name: context.state.pop(_REPORTED + each.name, None) for each in asked}
    missing = [name for name, record in found.items() if record is None]
    if missing and required:
        raise WireError(
            f"the client reported no {', '.join(missing)}: its code must look at current_request(context) and call "
            "report(context, name, arrays)"
        )
    if asked and not missing:
        arrays = {name: {key: a.numpy() for key, a in record.items()} for name, record in found.items()}  # type: ignore[union-attr]
        content[STATISTICS] = pack_statistics(mask, asked, arrays)
