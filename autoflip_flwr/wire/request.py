"""Statistics that the server requests from clients: the header entry, and the record of the reply.

The header's ``ask`` is a list of texts ``"<name> <over> <code>"``, or ``"<name> <over> <code> <top>"`` if only the top
entries are requested. The reply's record ``autoflip.statistics`` has one array per statistic, under its name. It holds
the requested entries of each prunable array, arrays in the layout's order and entries in C order. With ``log8`` they
are quantised like deltas, with ``float32`` unquantised. Top entries come with their places
(:mod:`autoflip_flwr.wire.top_entries`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord
from numpy.typing import NDArray

from autoflip_flwr.core.choices import CODES, LOG8, OVER, PLACES
from autoflip_flwr.core.layout import Arrays, ArraySpec, split
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.request import DECIMALS, DELTA, Request
from autoflip_flwr.wire.deltas import LARGEST, decode_deltas, encode_deltas
from autoflip_flwr.wire.keys import ASK
from autoflip_flwr.wire.records import WireError, make_array, view_of
from autoflip_flwr.wire.top_entries import decode_top, encode_top

MAX_REQUESTS = 16
MAX_NAME = 64

_ASKED = re.compile(
    rf"([^ ]{{1,{MAX_NAME}}}) ({'|'.join(OVER)}) ({'|'.join(CODES)})(?: (0\.\d{{1,{DECIMALS}}}))?", re.ASCII
)


def text_of(request: Request) -> str:
    """Return a request as the header has it."""
    top = [] if request.top == 1 else [f"{request.top:.{DECIMALS}f}".rstrip("0")]
    return " ".join([request.name, request.over, request.code, *top])


def ask_entry(requests: Iterable[Request]) -> dict[str, list[str]]:
    """Return the header entry that lists the requested statistics; empty if there are none."""
    asked = [text_of(each) for each in requests]
    return {ASK: asked} if asked else {}


def read_ask(head: Mapping[str, Any] | ConfigRecord) -> tuple[Request, ...]:
    """Return the requests of a header.

    Raises
    ------
    WireError
        If the entry does not follow the format.
    """
    asked = head.get(ASK, [])
    if not isinstance(asked, list) or len(asked) > MAX_REQUESTS or not all(isinstance(text, str) for text in asked):
        raise WireError(f"{ASK} must be a list of at most {MAX_REQUESTS} texts")
    found = [request for request in map(_read, asked) if request is not None]
    if len(found) < len(asked) or len({each.name for each in found}) < len(found):
        raise WireError(
            f"{ASK} {asked!r}: must be texts of a name, one of {', '.join(OVER)}, one of {', '.join(CODES)}, and "
            f"perhaps a share below 1 of at most {DECIMALS} decimals (always with {PLACES})"
        )
    return tuple(found)


def _read(text: object) -> Request | None:
    """Return the request of a text; ``None`` if it does not follow the format."""
    found = _ASKED.fullmatch(str(text))
    if found is None:
        return None
    name, over, code, top = found.groups()
    request = Request(name, over, code, 1.0 if top is None else float(top))
    return request if request.top > 0 and (request.top < 1 or code != PLACES) else None


def to_report(requests: Iterable[Request]) -> tuple[Request, ...]:
    """Return the requests that a client must report; deltas are already in its result."""
    return tuple(each for each in requests if each.name != DELTA)


def pack_statistics(
    mask: Mask, requests: Iterable[Request], found: Mapping[str, Mapping[str, NDArray[Any]]]
) -> ArrayRecord:
    """Pack what a client reports.

    Parameters
    ----------
    mask : Mask
        The current mask; before training, one that keeps everything.
    requests : Iterable[Request]
        The requested statistics.
    found : Mapping[str, Mapping[str, ndarray]]
        Name of a statistic -> a full array per prunable array, by name.

    Raises
    ------
    WireError
        If a requested value is not finite, or too large.
    """
    record = {}
    for each in to_report(requests):
        specs = _specs(mask, each.over)
        values = {spec.name: _entries(mask, each.over, spec.name, found[each.name][spec.name]) for spec in specs}
        try:
            if each.top < 1:
                record[each.name] = make_array([encode_top(specs, values, _counts(mask, each, specs), each.code)])
            elif each.code == LOG8:
                record[each.name] = make_array([encode_deltas(specs, values)])
            else:
                record[each.name] = make_array([_whole(values)])
        except ValueError as error:
            raise WireError(f"statistic {each.name!r}: {error}") from error
    return ArrayRecord(record)


def unpack_statistics(mask: Mask, requests: Iterable[Request], record: object) -> dict[str, Arrays]:
    """Return statistics as full float32 arrays; entries that were not requested are 0.

    Raises
    ------
    WireError
        If the record does not hold exactly what was requested, a length does not fit the mask, or a value is not
        finite.
    """
    asked = to_report(requests)
    if not isinstance(record, ArrayRecord) or set(record) != {each.name for each in asked}:
        raise WireError(f"the statistics must be an ArrayRecord of {', '.join(each.name for each in asked)}")
    found: dict[str, Arrays] = {}
    for each in asked:
        specs = _specs(mask, each.over)
        if each.code == LOG8 or each.top < 1:
            data = bytes(view_of(record[each.name], "uint8").data)
            try:
                if each.top < 1:
                    values = decode_top(specs, _counts(mask, each, specs), each.code, data)
                else:
                    values = decode_deltas(specs, data)
            except ValueError as error:
                raise WireError(f"statistic {each.name!r}: {error}") from error
        else:
            values = _split(specs, view_of(record[each.name], "float32", sum(spec.size for spec in specs)), each.name)
        found[each.name] = {
            spec.name: _full(mask, each.over, spec, values.get(spec.name)) for spec in mask.layout.prunable
        }
    return found


def _specs(mask: Mask, over: str) -> list[ArraySpec]:
    """Describe the requested entries of each array as a 1-D array; arrays without any are omitted."""
    counts = {
        spec.name: {
            "all": spec.size,
            "kept": mask.kept_by_name[spec.name],
            "pruned": spec.size - mask.kept_by_name[spec.name],
        }[over]
        for spec in mask.layout.prunable
    }
    return [ArraySpec(name, (count,), "float32", True) for name, count in counts.items() if count]


def _counts(mask: Mask, request: Request, specs: list[ArraySpec]) -> dict[str, int]:
    """Return the number of entries of each array that are sent."""
    return {spec.name: request.number(mask.kept_by_name[spec.name], spec.size) for spec in specs}


def _entries(mask: Mask, over: str, name: str, array: NDArray[Any]) -> NDArray[np.float32]:
    flat = np.asarray(array, np.float32).reshape(-1)
    if over == "all":
        return flat
    keep = mask.keep[name].reshape(-1)
    return flat[mask.indices[name]] if over == "kept" else flat[~keep]


def _full(mask: Mask, over: str, spec: ArraySpec, values: NDArray[Any] | None) -> NDArray[np.float32]:
    if over == "all" and values is not None:
        return values.reshape(spec.shape)
    full = np.zeros(spec.size, np.float32)
    if values is not None:
        keep = mask.keep[spec.name].reshape(-1)
        full[keep if over == "kept" else ~keep] = values
    return full.reshape(spec.shape)


def _whole(values: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    whole = np.concatenate([*values.values(), np.empty(0, np.float32)])
    if not (np.abs(whole) <= LARGEST).all():
        raise ValueError(f"it holds NaN, infinity or more than {LARGEST:g}")
    return whole


def _split(specs: list[ArraySpec], whole: NDArray[Any], name: str) -> Arrays:
    if not (np.abs(whole) <= LARGEST).all():
        raise WireError(f"statistic {name!r} holds NaN, infinity or more than {LARGEST:g}")
    return split(whole, {spec.name: spec.shape for spec in specs})
