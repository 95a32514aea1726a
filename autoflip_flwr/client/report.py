"""What the server asks of a client beside its result: statistics of single parameters."""

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
from autoflip_flwr.wire.request import pack_statistics, read_ask, to_report

_REPORTED = f"{HEADER}.reported."


def current_request(context: Context) -> tuple[Request, ...]:
    """Return the statistics that the server asks for with the message that is being handled.

    A client that can reports each with :func:`report`. A client that does not trains as usual; where the server needs
    its answer for the first mask, it goes on with the others'.
    """
    return to_report(read_ask(context.state.get(HEADER, ConfigRecord())))


def report(context: Context, name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Report a statistic; what the server does not ask for is dropped.

    Parameters
    ----------
    context : Context
        Of the Flower client.
    name : str
        Of the statistic: one of :func:`current_request`'s.
    arrays : Mapping[str, ndarray]
        A full floating array for each prunable array that the server sent, under its name. Entries that are not asked
        for are not sent, whatever they are.

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
    """Note what is asked with this message; what was reported before it is forgotten."""
    for key in [key for key in context.state if key.startswith(_REPORTED)]:
        del context.state[key]
    state = {key: value for key, value in context.state.get(HEADER, ConfigRecord()).items() if key != ASK}
    if asked:
        state[ASK] = [" ".join(each) for each in asked]
    context.state[HEADER] = ConfigRecord(state)  # type: ignore[arg-type]


def add_reported(context: Context, mask: Mask, content: RecordDict, *, required: bool) -> None:
    """Put what the client's own code has reported into its reply.

    Raises
    ------
    WireError
        If a value is not finite, or (``required``) a statistic is missing.
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
