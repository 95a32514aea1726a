"""Judging replies: each alone, before anything of it is aggregated."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from flwr.app import ArrayRecord, Error, Message, MetricRecord

from autoflip_flwr import wire
from autoflip_flwr.layout import Arrays
from autoflip_flwr.mask import Mask

FIRST = "autoflip_mod must be the first in ClientApp(mods=[...])"


@dataclass(frozen=True)
class Judged:
    """A reply that may be counted.

    Parameters
    ----------
    key : str
        Name of its ArrayRecord.
    packed : dict[str, ndarray]
        Its packed arrays (read-only views).
    weight : float
        Its weight in the average, finite and > 0.
    """

    key: str
    packed: Arrays
    weight: float


def judge(reply: Message, *, mask: Mask, phase: str, round_: int, weight_key: str) -> Judged:
    """Check a reply that carries arrays against what was asked for.

    Parameters
    ----------
    reply : Message
        A reply without an error.
    mask : Mask
        The mask under which its values must be packed.
    phase, round_ : str, int
        What the message that it answers asked for.
    weight_key : str
        Metric that holds the reply's weight (its number of examples); "" where there is none.

    Raises
    ------
    WireError
        With the reason, if the reply must be left out: missing or extra records or keys, another dtype or length,
        another mask, phase or round, a value or metric that is not finite, a weight that is not positive.
    """
    judge_header(reply, mask=mask, phase=phase, round_=round_)
    arrays = [(key, record) for key, record in reply.content.items() if isinstance(record, ArrayRecord)]
    if len(arrays) != 1:
        raise wire.WireError(f"{len(arrays)} ArrayRecords, expected 1")
    weight = judge_metrics(reply, weight_key)
    packed = wire.unpack(mask, arrays[0][1])
    for name, values in packed.items():
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise wire.WireError(f"array {name!r} holds NaN or infinity")
    if reply.content[wire.HEADER].get("fingerprint") != wire.fingerprint(arrays[0][1]):
        raise wire.WireError(f"its values were changed after autoflip_mod had packed them: {FIRST}")
    return Judged(arrays[0][0], packed, weight)


def judge_header(reply: Message, *, mask: Mask, phase: str, round_: int) -> None:
    """Check that a reply answers this message under this mask; raises as :func:`judge` does."""
    head = wire.read_header(reply.content)
    if head is None:
        raise wire.WireError(f"the reply has no AutoFLIP header: {FIRST}")
    for key, expected in (("phase", phase), ("round", round_), ("digest", mask.digest)):
        if head.get(key) != expected:
            raise wire.WireError(f"{key} {head.get(key)!r}, expected {expected!r}")


def explain(error: Error) -> str:
    """The reason of an error reply; where a mod of Flower's has met our records, that it stands in the wrong place."""
    reason = (error.reason or f"error {error.code}").strip()
    met_ours = error.code == wire.MOD_REFUSED and "exactly one ConfigRecord, but found" in reason
    return f"{reason.rstrip('.')}: {FIRST}" if met_ours else reason


def judge_metrics(reply: Message, weight_key: str) -> float:
    """Check a reply's one MetricRecord and return its weight; raises as :func:`judge` does.

    Where there is no weight key, metrics need only be finite, and each reply weighs 1.
    """
    records = [record for record in reply.content.values() if isinstance(record, MetricRecord)]
    if weight_key and len(records) != 1:
        raise wire.WireError(f"{len(records)} MetricRecords, expected 1")
    for key, value in (item for record in records for item in record.items()):
        if not all(math.isfinite(number) for number in (value if isinstance(value, list) else [value])):
            raise wire.WireError(f"metric {key!r} is not finite")
    if not weight_key:
        return 1.0
    weight = records[0].get(weight_key)
    if isinstance(weight, list) or weight is None or weight <= 0:
        raise wire.WireError(f"metric {weight_key!r} is {weight!r}, expected a number > 0")
    return float(weight)
