"""Judge each reply on its own, before any of it is aggregated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord
from numpy.typing import NDArray

from autoflip_flwr.core.choices import LOG8
from autoflip_flwr.core.layout import Arrays
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.request import DELTA, Request
from autoflip_flwr.costs.reason import last_words
from autoflip_flwr.wire.keys import EXPLORE, HEADER, MOD_REFUSED, NOTHING, STATISTICS, TRAIN
from autoflip_flwr.wire.messages import arrays_of, kept_and_size, read_header, read_vectors, unpack_deltas
from autoflip_flwr.wire.records import WireError, fingerprint
from autoflip_flwr.wire.request import to_report, unpack_statistics
from autoflip_flwr.wire.values import Vector

MAX_DELTA = 1e100
"""Largest delta of an explorer. Beyond it training has diverged, and squares might overflow."""

MAX_WEIGHT = 1e100
"""Largest weight that is accepted. No honest weight is larger, and sums of larger ones might overflow."""

MAX_NEEDED = 1e30
"""Largest value of a needed metric. Strategies take powers of them, which might overflow."""

MOD_FIRST = "autoflip_mod must be the first in ClientApp(mods=[...])"


@dataclass(frozen=True)
class Judged:
    """A reply that may be counted.

    Parameters
    ----------
    key : str
        Name of its ArrayRecord.
    vectors : dict[str, Vector]
        Its flat vectors by dtype; all values are finite.
    weight : float
        Its weight in the average, finite and > 0.
    norm : float
        L2 norm of its update.
    kept_norm : float
        The same over the kept prunable values only, or over all values if the model has nothing prunable.
    """

    key: str
    vectors: dict[str, Vector]
    weight: float
    norm: float
    kept_norm: float


def judge_update(
    reply: Message,
    *,
    mask: Mask,
    round_: int,
    weight_key: str,
    sent: Mapping[str, NDArray[Any]],
    kind: str = "float32",
    base: Mapping[str, NDArray[Any]] | None = None,
    max_weight: float = math.inf,
    needed: Mapping[str, float] | None = None,
) -> Judged:
    """Check a train reply against the request.

    Parameters
    ----------
    reply : Message
        A reply without an error.
    mask : Mask
        The mask under which its values must be packed.
    round_ : int
        Round of the message that it answers.
    weight_key : str
        Metric that holds the reply's weight (its number of examples); "" if there is none.
    sent : Mapping[str, ndarray]
        The flat vectors of the floating dtypes that the node was sent. Its update is the difference from them.
    kind : str
        How its values must be quantised.
    base : Mapping[str, ndarray] | None
        Flat vectors that its values are added to.
    max_weight : float
        The largest weight that is accepted.
    needed : Mapping[str, float] | None
        Metrics that the strategy needs from each reply, with the smallest allowed value of each.

    Raises
    ------
    WireError
        If the reply must be rejected, with the reason: missing or extra records or keys, a wrong dtype, length,
        mask, phase or round, a value that is not finite, a weight that is not positive or too large, a needed metric
        that is not a number in its range, an update whose norm overflows.
    """
    key, record, weight = _judge_record(reply, mask, TRAIN, round_, weight_key, kind, max_weight)
    _judge_needed(reply, needed or {})
    vectors = read_vectors(mask, record, kind, base)
    ends = {dtype: compared_values(mask, dtype) for dtype in sent}
    kept_norm = math.hypot(*(vectors[dtype].distance(values, 0, ends[dtype]) for dtype, values in sent.items()))
    norm = math.hypot(kept_norm, *(vectors[dtype].distance(values, ends[dtype]) for dtype, values in sent.items()))
    if not math.isfinite(norm):  # a value is not finite, or its square is not
        _finite(mask, vectors)
        raise WireError("the norm of its update overflows")
    return Judged(key, vectors, weight, norm, kept_norm)


def compared_values(mask: Mask, dtype: str) -> int:
    """Return how many leading values of a flat vector enter the compared norms.

    These are the kept prunable values, or all values if the model has nothing prunable. Running statistics are not
    compared, since they do not follow the gradients.
    """
    kept, size = kept_and_size(mask, mask.layout.by_dtype[dtype])
    return kept if mask.layout.prunable_size else size


def judge_answer(
    reply: Message,
    *,
    mask: Mask,
    weight_key: str,
    requests: tuple[Request, ...],
    kind: str,
    max_weight: float = math.inf,
) -> tuple[float, ArrayRecord]:
    """Check a reply of round 0. Return its weight, and its content as one record for :func:`read_answer`.

    Parameters
    ----------
    requests : tuple[Request, ...]
        The requested statistics.
    kind : str
        How its deltas must be quantised; ``"none"`` if it must have none.

    Raises
    ------
    WireError
        As :func:`judge_update` does.
    """
    found: dict[str, Array] = {}
    if kind == NOTHING:
        judge_header(reply, mask=mask, phase=EXPLORE, round_=0)
        weight = _judge_weight(reply, weight_key, max_weight)
    else:
        _, record, weight = _judge_record(reply, mask, EXPLORE, 0, weight_key, kind, max_weight)
        found |= record
    if to_report(requests):
        statistics = reply.content.get(STATISTICS)
        unpack_statistics(mask, requests, statistics)
        found |= {f"{STATISTICS}.{name}": array for name, array in cast(ArrayRecord, statistics).items()}
    return weight, ArrayRecord(found)


def read_answer(record: ArrayRecord, *, mask: Mask, requests: tuple[Request, ...], kind: str) -> dict[str, Arrays]:
    """Return the statistics of an answer, name -> full arrays by name. Raise errors as :func:`judge_update` does."""
    prefix = f"{STATISTICS}."
    own = ArrayRecord({key: array for key, array in record.items() if not key.startswith(prefix)})
    found = {} if kind == NOTHING else {DELTA: read_deltas(own, mask=mask, kind=kind)}
    if to_report(requests):
        reported = {key[len(prefix) :]: array for key, array in record.items() if key.startswith(prefix)}
        found |= unpack_statistics(mask, requests, ArrayRecord(reported))
    return found


def read_deltas(record: ArrayRecord, *, mask: Mask, kind: str) -> Arrays:
    """Return an explorer's delta of each floating array, from its reply. Raise errors as :func:`judge_update` does."""
    if kind == LOG8:
        deltas = unpack_deltas(mask, record)
    else:
        deltas = mask.scatter(arrays_of(mask, _finite(mask, read_vectors(mask, record, kind))))
    for name, values in deltas.items():
        if values.dtype == np.float64 and (np.abs(values) > MAX_DELTA).any():
            raise WireError(f"array {name!r} has moved by more than {MAX_DELTA:g}")
    return deltas


def _judge_record(
    reply: Message, mask: Mask, phase: str, round_: int, weight_key: str, kind: str, max_weight: float
) -> tuple[str, ArrayRecord, float]:
    """Return key, ArrayRecord and weight of a reply that matches the request and is unchanged since it was packed."""
    judge_header(reply, mask=mask, phase=phase, round_=round_)
    arrays = [(key, record) for key, record in reply.content.array_records.items() if key != STATISTICS]
    if len(arrays) != 1:
        raise WireError(f"{len(arrays)} ArrayRecords, expected 1")
    weight = _judge_weight(reply, weight_key, max_weight)
    head = reply.content[HEADER]
    if head.get("values", "float32") != kind:
        raise WireError(f"its values are quantised as {head.get('values', 'float32')!r}, expected {kind!r}")
    if head.get("fingerprint") != fingerprint(arrays[0][1]):
        raise WireError(f"its values were changed after autoflip_mod had packed them: {MOD_FIRST}")
    return *arrays[0], weight


def _judge_weight(reply: Message, weight_key: str, max_weight: float) -> float:
    weight = judge_weight(reply, weight_key)
    if weight_key and weight > max_weight:
        raise WireError(f"metric {weight_key!r} is {weight:g}, expected at most {max_weight:g}")
    return weight


def _finite(mask: Mask, vectors: dict[str, Vector]) -> dict[str, Vector]:
    if all(vector.is_finite() for vector in vectors.values()):
        return vectors
    arrays = arrays_of(mask, vectors)
    first = next(name for name, values in arrays.items() if not np.isfinite(values).all())
    raise WireError(f"array {first!r} holds NaN or infinity")


def judge_header(reply: Message, *, mask: Mask, phase: str, round_: int) -> None:
    """Check that a reply answers this message under this mask. Raise ``WireError`` otherwise."""
    head = read_header(reply.content)
    if head is None:
        raise WireError(f"the reply has no AutoFLIP header: {MOD_FIRST}")
    for key, expected in (("phase", phase), ("round", round_), ("digest", mask.digest)):
        if head.get(key) != expected:
            raise WireError(f"{key} {head.get(key)!r}, expected {expected!r}")


def explain_error(error: Error) -> str:
    """Explain an error reply. If another mod failed on AutoFLIP's records, say that autoflip_mod must come first."""
    reason = last_words((error.reason or f"error {error.code}")[-30_000:])[:2000]
    met_ours = error.code == MOD_REFUSED and "exactly one ConfigRecord, but found" in reason
    return f"{reason.rstrip('.')}: {MOD_FIRST}" if met_ours else reason


def _judge_needed(reply: Message, needed: Mapping[str, float]) -> None:
    for name, least in needed.items():
        found = [record[name] for record in reply.content.metric_records.values() if name in record]
        if not found or isinstance(found[0], list) or not least <= found[0] <= MAX_NEEDED:
            told = repr(found[0]) if found else "missing"
            raise WireError(
                f"metric {name!r} is {told}; the strategy needs a number in [{least:g}, {MAX_NEEDED:g}] of each client"
            )


def judge_weight(reply: Message, weight_key: str, *, or_none: bool = False) -> float:
    """Check a reply's one MetricRecord and return its weight. Raise ``WireError`` if it is invalid.

    Without a weight key, metrics are not checked and each reply weighs 1. ``or_none`` accepts a weight of 0. The other
    metrics are the user's: no reply is rejected for them.
    """
    if not weight_key:
        return 1.0
    records = [record for record in reply.content.values() if isinstance(record, MetricRecord)]
    if len(records) != 1:
        raise WireError(f"{len(records)} MetricRecords, expected 1")
    weight = records[0].get(weight_key)
    if or_none and weight == 0:
        return 0.0
    if isinstance(weight, list) or weight is None or not 0 < weight <= MAX_WEIGHT:
        raise WireError(f"metric {weight_key!r} is {weight!r}, expected a number in (0, {MAX_WEIGHT:g}]")
    return float(weight)
