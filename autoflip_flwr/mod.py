"""The client side: a Flower mod that unpacks what arrives and packs what leaves."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from difflib import get_close_matches
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from numpy.typing import NDArray

from autoflip_flwr import legacy, maskrecord, wire
from autoflip_flwr.core.layout import Arrays, ArraySpec, Layout
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.feedback import pack_reply
from autoflip_flwr.values import KINDS

LAYOUT = "autoflip.layout"
"""Record of an explorer's state: the layout of the model that it was sent."""

PHASE_KEY, EPOCHS_KEY, PATIENCE_KEY = "autoflip-phase", "autoflip-epochs", "autoflip-patience"
WEIGHT_DECAY_KEY = "autoflip-weight-decay"
"""Keys that the config record of an exploration message holds on top of the wrapped strategy's own.

A client that reads them explores as the method asks: it trains for up to ``autoflip-epochs`` epochs and stops after
``autoflip-patience`` epochs without a better mean training loss, with the weight decay ``autoflip-weight-decay``, which
is 0: weight decay moves all clients' weights alike, where they agree on nothing. A client that ignores them trains as
usual.
"""

EXPLORED = "explored."
"""Records of ``context.state`` whose names begin so outlive the exploration; a client's others are as before it."""


def autoflip_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Flower client mod of AutoFLIP; the first (outermost) of the client's mods.

    The client's own code, and the mods behind this one, see exactly the records that they would see without AutoFLIP:
    full arrays under their names. What they return is packed before it leaves. It works in front of Message-API
    functions (``@app.train``) and of a ``client_fn`` with a ``NumPyClient`` alike, and lets the messages of other
    Message-API strategies pass, so that the same client serves a plain FedAvg too.

    The mask is kept in ``context.state``; a client that wants it during training calls :func:`current_mask`. A node
    that has lost it says so and is sent it again in the same round.

    Examples
    --------
    >>> from flwr.clientapp import ClientApp
    >>> app = ClientApp(mods=[autoflip_mod])
    """
    try:
        head = wire.read_header(message.content)
        if head is None:
            state, own = context.state.get(wire.HEADER), message.metadata.message_id
            if own and state is not None and state.get("message") == own:
                raise wire.WireError("it is twice in ClientApp(mods=[...]): once is enough, as the first")
            if state is not None:  # another strategy's message: no mask is in force, but the node still has it
                context.state[wire.HEADER] = ConfigRecord({**state, "phase": wire.HELLO})  # type: ignore[dict-item]
            plain = len(message.content.array_records) == 1
            return legacy.call(message, context, call_next) if plain else call_next(message, context)
        if head["phase"] == wire.HELLO:
            return _reply(message, context, head, RecordDict())
        mask = _mask_of_message(message, context, head)
        if mask is None:
            return _reply(message, context, head, RecordDict(), status=wire.MASK_MISSING)
        return _run(message, context, call_next, head, mask)
    except wire.WireError as error:
        return Message(Error(wire.MOD_REFUSED, f"autoflip_mod: {error}"), reply_to=message)


def current_mask(context: Context) -> Mask | None:
    """The mask in force for the message that is being handled, or ``None`` (exploration, or no AutoFLIP).

    A client trains under it by keeping the pruned weights at zero after every step: :func:`apply_mask` does so for
    NumPy arrays, :func:`autoflip_flwr.torch.masked_training` for a PyTorch model. ``mask.keep[name]`` is a boolean
    array in the shape of the weight of that name.
    """
    state = context.state.get(wire.HEADER)
    if state is None or wire.MASK not in context.state or state.get("phase") != wire.TRAIN:
        return None
    return maskrecord.decode_mask(context.state[wire.MASK])


def mask_and_layout(mask: Mask | Context | None) -> tuple[Mask | None, Layout | None]:
    """The mask in force, and the layout of the model that the server sent.

    While a client explores there is a layout without a mask: names can be checked before the exploration is spent.
    """
    if isinstance(mask, Context):
        context, mask = mask, current_mask(mask)
        phase = context.state.get(wire.HEADER, ConfigRecord()).get("phase")
        if phase == wire.EXPLORE and LAYOUT in context.state:
            return None, maskrecord.decode_layout(context.state.config_records[LAYOUT])
    return mask, None if mask is None else mask.layout


def sent_array(layout: Layout, name: str, shape: tuple[int, ...]) -> ArraySpec:
    """The array of this name and shape that the server sent.

    Raises
    ------
    ValueError
        If there is none. The text says what was sent, and which of it fits.
    """
    if name not in layout:
        sent = [spec.name for spec in layout.specs][:5]
        fits = get_close_matches(name, [spec.name for spec in layout.specs if spec.shape == shape], 1, cutoff=0)
        raise ValueError(f"the server sent no {name!r}; it sent {sent}" + "".join(f", {fit!r} fits" for fit in fits))
    if shape != layout[name].shape:
        raise ValueError(f"array {name!r} has shape {shape}, the mask {layout[name].shape}")
    return layout[name]


def apply_mask(arrays: Mapping[str, NDArray[np.generic]], mask: Mask | Context | None) -> None:
    """Set the pruned entries of NumPy arrays to zero, in place.

    A client calls it after each step of its training: ``apply_mask({"coef": model.coef_}, context)``. While it explores
    nothing is changed, and names and shapes are checked.

    Parameters
    ----------
    arrays : Mapping[str, ndarray]
        Some or all of the model's arrays, under the names that the server sent them by.
    mask : Mask | Context | None
        The mask, or the context of the Flower client: then it is :func:`current_mask` of it. ``None`` changes nothing.

    Raises
    ------
    ValueError
        If a name or shape is not that of an array that the server sent; then nothing is changed.
    """
    mask, layout = mask_and_layout(mask)
    if layout is None:
        return
    for name, array in arrays.items():
        sent_array(layout, name, array.shape)
    keep = {} if mask is None else mask.keep
    for name in arrays.keys() & keep.keys():
        arrays[name][~keep[name]] = 0


def _mask_of_message(message: Message, context: Context, head: ConfigRecord) -> Mask | None:
    """The mask under which the message is packed: its own, or the node's if that is the one meant."""
    record = message.content.get(wire.MASK)
    exploring = head["phase"] == wire.EXPLORE
    state = {"phase": wire.EXPLORE if exploring else wire.TRAIN, "message": message.metadata.message_id}
    context.state[wire.HEADER] = ConfigRecord({**context.state.get(wire.HEADER, {}), **state})  # type: ignore[dict-item]
    base = maskrecord.base_of(record)
    known = context.state.get(wire.MASK) if record is None or base else None
    mine = None if known is None else maskrecord.decode_mask(known)
    if record is None or (base and (mine is None or mine.digest != base)):
        return mine if mine is not None and mine.digest == head.get("digest") else None
    mask = maskrecord.decode_mask(record, mine, carried=wire.carried(message.content))
    if mask.digest != head.get("digest"):
        raise wire.WireError("the mask that came along is not the one that the message is packed with")
    if exploring:
        context.state[LAYOUT] = maskrecord.encode_layout(mask.layout)
    else:
        context.state[wire.MASK] = maskrecord.encode_mask(mask) if base else record
        context.state.pop(LAYOUT, None)
    return mask


def _run(message: Message, context: Context, call_next: ClientAppCallable, head: ConfigRecord, mask: Mask) -> Message:
    """Unpack, let the client's own code run, pack."""
    inner = RecordDict({k: v for k, v in message.content.items() if k not in (wire.HEADER, wire.MASK)})
    keys = list(inner.array_records)
    if len(keys) != 1:
        raise wire.WireError(f"{len(keys)} ArrayRecords in the message, expected 1")
    kind, wanted = (str(head.get(key, "float32")) for key in ("values", "reply"))
    if kind not in KINDS or wanted not in (("float32", wire.LOG8) if head["phase"] == wire.EXPLORE else KINDS):
        raise wire.WireError(f"values {kind!r}, reply {wanted!r}: not in phase {head['phase']!r}")
    start = {dtype: vector.whole() for dtype, vector in wire.vectors(mask, inner[keys[0]], kind).items()}
    given = mask.scatter(wire.split(mask, start))
    inner[keys[0]] = ArrayRecord(
        {name: wire.array([np.ascontiguousarray(array)], array.shape) for name, array in given.items()}
    )
    if head["phase"] != wire.EXPLORE:
        given = {}  # only moves need it: no second model in memory while the client trains
    message.content = inner
    with _state_set_aside(context) if head["phase"] == wire.EXPLORE else nullcontext():
        reply = legacy.call(message, context, call_next, str(head.get("weight-key", "num-examples")))
    if reply.has_error():  # some of Flower's mods answer the reply that they refuse, not the message
        return Message(reply.error, reply_to=message)
    content = RecordDict(dict(reply.content))
    if head["phase"] == wire.EVALUATE:
        return _reply(message, context, head, content, digest=mask.digest)
    key, arrays = _result(content, mask, exploring=head["phase"] == wire.EXPLORE)
    if head["phase"] == wire.EXPLORE:
        moves = {
            spec.name: np.subtract(arrays[spec.name], given[spec.name]) for spec in mask.layout.specs if spec.floating
        }
        values = (
            wire.pack_moves(mask, moves) if wanted == wire.LOG8 else wire.pack(mask, mask.gather({**arrays, **moves}))
        )
    else:
        values = pack_reply(context, mask, wanted, mask.gather(arrays), start)
    content[key] = values
    told = {"digest": mask.digest, "fingerprint": wire.fingerprint(values), **wire.kinds(values=wanted)}
    return _reply(message, context, head, content, **told)


@contextmanager
def _state_set_aside(context: Context) -> Iterator[None]:
    """Give ``context.state`` back as it was: round 1 does not begin with what a client kept of the full model."""

    def stays(key: str) -> bool:
        return key == wire.HEADER or key.startswith((f"{wire.HEADER}.", EXPLORED))

    before = {key: copy.deepcopy(record) for key, record in context.state.items() if not stays(key)}
    try:
        yield
    finally:
        for key in [key for key in context.state if not stays(key)]:
            del context.state[key]
        context.state.update(before)


def _result(content: RecordDict, mask: Mask, *, exploring: bool) -> tuple[str, Arrays]:
    """The full arrays that the client's own code returned, in the model's dtypes.

    An explorer's must be weights: integers in the place of floats are codes of something, and no weights.
    """
    records = content.array_records
    if len(records) != 1:
        raise wire.WireError(f"the client returned {len(records)} ArrayRecords, expected 1")
    key, record = next(iter(records.items()))
    arrays = {name: array.numpy() for name, array in record.items()}
    try:
        mask.layout.check(arrays)
    except ValueError as error:
        raise wire.WireError(f"what the client returned does not fit: {error}") from error
    for spec in mask.layout.specs if exploring else ():
        if spec.floating and arrays[spec.name].dtype.kind != "f":
            raise wire.WireError(
                f"array {spec.name!r} came back with dtype {arrays[spec.name].dtype}, expected {spec.dtype}: explorers "
                "return weights; if clients return codes that the strategy decodes, bring a mask (mask=)"
            )
    return key, {name: array.astype(mask.layout[name].dtype, copy=False) for name, array in arrays.items()}


def _reply(message: Message, context: Context, head: ConfigRecord, content: RecordDict, **extra: Any) -> Message:
    if head["phase"] == wire.HELLO:
        for name, key in (("partition", "partition-id"), ("num-partitions", "num-partitions")):
            value = context.node_config.get(key)
            if type(value) is int:
                extra[name] = value
    content[wire.HEADER] = wire.header(str(head["phase"]), int(head["round"]), **extra)  # type: ignore[arg-type]
    return Message(content, reply_to=message)
