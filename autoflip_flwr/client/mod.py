"""The client side: a Flower mod that unpacks what arrives and packs what leaves."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable, Mod

from autoflip_flwr.client import held, numpy_client
from autoflip_flwr.client.context import LAYOUT
from autoflip_flwr.client.error_feedback import pack_reply
from autoflip_flwr.client.report import add_reported, note_asked
from autoflip_flwr.core.choices import DELTAS, LOG8, VALUES
from autoflip_flwr.core.layout import Arrays
from autoflip_flwr.core.mask import Mask
from autoflip_flwr.core.subspace import Subspace
from autoflip_flwr.wire import mask_record
from autoflip_flwr.wire.base_record import base_entry
from autoflip_flwr.wire.keys import (
    BASE_MISSING,
    BASE_RECORD,
    BOTH_MISSING,
    EVALUATE,
    EXPLORE,
    HEADER,
    HELLO,
    MASK_MISSING,
    MASK_RECORD,
    MOD_REFUSED,
    NOTHING,
    TRAIN,
)
from autoflip_flwr.wire.messages import (
    make_header,
    pack_deltas,
    pack_values,
    read_header,
    read_vectors,
    split_vectors,
    value_entries,
)
from autoflip_flwr.wire.records import WireError, array_bytes, fingerprint, make_array
from autoflip_flwr.wire.request import read_ask

EXPLORED = "explored."
"""Records of ``context.state`` whose names begin so outlive the exploration; a client's others are as before it."""


def autoflip_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Flower client mod of AutoFLIP; the first (outermost) of the client's mods.

    The client's own code, and the mods behind this one, see exactly the records that they would see without AutoFLIP:
    full arrays under their names. What they return is packed before it leaves. It works in front of Message-API
    functions (``@app.train``) and of a ``client_fn`` with a ``NumPyClient`` alike, and lets the messages of other
    Message-API strategies pass, so that the same client serves a plain FedAvg too.

    The mask is kept in ``context.state``; a client that wants it during training calls :func:`current_mask`. A node
    that has lost it says so and is sent it again in the same round. So is what stands outside the mask, where the
    server keeps it (``outside="initial"``) and :func:`autoflip_mod_with` has not been given it.

    Examples
    --------
    >>> from flwr.clientapp import ClientApp
    >>> app = ClientApp(mods=[autoflip_mod])
    """
    return _handle(message, context, call_next, _NOTHING)


def autoflip_mod_with(*, base: held.Source) -> Mod:
    """Make an :func:`autoflip_mod` that has the pretrained model already, so that the server need not send it.

    With ``AutoFlip(outside="initial")`` a client needs the values with which training began: where it has not explored
    from them, it is sent them once, as many bytes as the prunable arrays take. One that reads the same file itself is
    not: the mod compares digests, and what does not match is sent after all.

    Parameters
    ----------
    base : Mapping[str, array] | Callable[[], Mapping[str, array] | None]
        The model's arrays by the names that the server sends them by, of NumPy or tensors of PyTorch
        (``model.state_dict()``); or a function that returns them, called at most once in a process, and only where a
        message names a base. None, and a file that is not there, leave the client to be sent the base.

    Raises
    ------
    TypeError
        If ``base`` is anything else; of what a function returns, when it is called.

    Examples
    --------
    >>> from flwr.clientapp import ClientApp
    >>> app = ClientApp(mods=[autoflip_mod_with(base=lambda: dict(np.load("pretrained.npz")))])
    """
    given = held.Given(base)

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        return _handle(message, context, call_next, given)

    return mod


_NOTHING = held.Given(None)


def _handle(message: Message, context: Context, call_next: ClientAppCallable, given: held.Given) -> Message:
    try:
        head = read_header(message.content)
        if head is None:
            state, own = context.state.get(HEADER), message.metadata.message_id
            if own and state is not None and state.get("message") == own:
                raise WireError("it is twice in ClientApp(mods=[...]): once is enough, as the first")
            if state is not None:  # another strategy's message: no mask is in force, but the node still has it
                context.state[HEADER] = ConfigRecord({**state, "phase": HELLO})  # type: ignore[dict-item]
            plain = len(message.content.array_records) == 1
            return numpy_client.call(message, context, call_next) if plain else call_next(message, context)
        if head["phase"] == HELLO:
            return _reply(message, context, head, RecordDict(), **held.told(context, given))
        mask = _mask_of_message(message, context, head)
        base = "" if head["phase"] == EXPLORE else str(head.get("base", ""))
        has = held.holds_base(message, context, base, None if mask is None else mask.layout, given)
        if mask is None or not has:
            lacks = BASE_MISSING if mask is not None else MASK_MISSING if has else BOTH_MISSING
            return _reply(message, context, head, RecordDict(), status=lacks)
        note_asked(context, read_ask(head))
        return _run(message, context, call_next, head, mask, given)
    except WireError as error:
        return Message(Error(MOD_REFUSED, f"autoflip_mod: {error}"), reply_to=message)


def _mask_of_message(message: Message, context: Context, head: ConfigRecord) -> Mask | None:
    """The mask under which the message is packed: its own, or the node's if that is the one meant."""
    record = message.content.get(MASK_RECORD)
    exploring = head["phase"] == EXPLORE
    state = {"phase": EXPLORE if exploring else TRAIN, "message": message.metadata.message_id}
    notes = held.no_base(context.state.config_records.get(HEADER, {}))
    context.state[HEADER] = ConfigRecord({**notes, **state})
    base = mask_record.base_of(record)
    known = context.state.get(MASK_RECORD) if record is None or base else None
    mine = None if known is None else mask_record.decode_mask(known)
    if record is None or (base and (mine is None or mine.digest != base)):
        return mine if mine is not None and mine.digest == head.get("digest") else None
    mask = mask_record.decode_mask(record, mine, carried=array_bytes(message.content))
    if mask.digest != head.get("digest"):
        raise WireError("the mask that came along is not the one that the message is packed with")
    if exploring:
        context.state[LAYOUT] = mask_record.encode_layout(mask.layout)
    else:
        context.state[MASK_RECORD] = mask_record.encode_mask(mask) if base else record
        context.state.pop(LAYOUT, None)
    return mask


def _run(
    message: Message,
    context: Context,
    call_next: ClientAppCallable,
    head: ConfigRecord,
    mask: Mask,
    given: held.Given,
) -> Message:
    """Unpack, let the client's own code run, pack."""
    inner = RecordDict({k: v for k, v in message.content.items() if k not in (HEADER, MASK_RECORD, BASE_RECORD)})
    keys = list(inner.array_records)
    if len(keys) != 1:
        raise WireError(f"{len(keys)} ArrayRecords in the message, expected 1")
    kind, wanted = (str(head.get(key, "float32")) for key in ("values", "reply"))
    if kind not in VALUES or wanted not in ((*DELTAS, NOTHING) if head["phase"] == EXPLORE else VALUES):
        raise WireError(f"values {kind!r}, reply {wanted!r}: not in phase {head['phase']!r}")
    start = {dtype: vector.whole() for dtype, vector in read_vectors(mask, inner[keys[0]], kind).items()}
    full = Subspace(mask, held.base_in_force(context, mask.layout)).unpack(split_vectors(mask, start))
    inner[keys[0]] = ArrayRecord(
        {name: make_array([np.ascontiguousarray(array)], array.shape) for name, array in full.items()}
    )
    base, own = str(head.get("base", "")), dict[str, str]()
    if head["phase"] != EXPLORE:
        full = {}  # only deltas need it: no second model in memory while the client trains
    elif base and held.keep_explored(context, base, mask.layout, full, given):
        own = base_entry(base)
    message.content = inner
    with _state_set_aside(context) if head["phase"] == EXPLORE else nullcontext():
        reply = numpy_client.call(message, context, call_next, str(head.get("weight-key", "num-examples")))
    if reply.has_error():  # some of Flower's mods answer the reply that they refuse, not the message
        return Message(reply.error, reply_to=message)
    content = RecordDict(dict(reply.content))
    if head["phase"] == EVALUATE:
        return _reply(message, context, head, content, digest=mask.digest)
    if wanted == NOTHING:
        content = RecordDict({k: record for k, record in content.items() if not isinstance(record, ArrayRecord)})
        add_reported(context, mask, content, required=True)
        return _reply(message, context, head, content, digest=mask.digest, **value_entries(values=wanted), **own)
    key, arrays = _result(content, mask, exploring=head["phase"] == EXPLORE)
    if head["phase"] == EXPLORE:
        moves = {
            spec.name: np.subtract(arrays[spec.name], full[spec.name]) for spec in mask.layout.specs if spec.floating
        }
        values = pack_deltas(mask, moves) if wanted == LOG8 else pack_values(mask, mask.gather({**arrays, **moves}))
    else:
        values = pack_reply(context, mask, wanted, mask.gather(arrays), start)
    content[key] = values
    add_reported(context, mask, content, required=head["phase"] == EXPLORE)
    told = {"digest": mask.digest, "fingerprint": fingerprint(values), **value_entries(values=wanted), **own}
    return _reply(message, context, head, content, **told)


@contextmanager
def _state_set_aside(context: Context) -> Iterator[None]:
    """Give ``context.state`` back as it was: round 1 does not begin with what a client kept of the full model."""

    def stays(key: str) -> bool:
        return key == HEADER or key.startswith((f"{HEADER}.", EXPLORED))

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
        raise WireError(f"the client returned {len(records)} ArrayRecords, expected 1")
    key, record = next(iter(records.items()))
    arrays = {name: array.numpy() for name, array in record.items()}
    try:
        mask.layout.check(arrays)
    except ValueError as error:
        raise WireError(f"what the client returned does not fit: {error}") from error
    for spec in mask.layout.specs if exploring else ():
        if spec.floating and arrays[spec.name].dtype.kind != "f":
            raise WireError(
                f"array {spec.name!r} came back with dtype {arrays[spec.name].dtype}, expected {spec.dtype}: explorers "
                "return weights; if clients return codes that the strategy decodes, bring a mask (mask=)"
            )
    return key, {name: array.astype(mask.layout[name].dtype, copy=False) for name, array in arrays.items()}


def _reply(message: Message, context: Context, head: ConfigRecord, content: RecordDict, **extra: Any) -> Message:
    if head["phase"] == HELLO:
        for name, key in (("partition", "partition-id"), ("num-partitions", "num-partitions")):
            value = context.node_config.get(key)
            if type(value) is int:
                extra[name] = value
    content[HEADER] = make_header(str(head["phase"]), int(head["round"]), **extra)  # type: ignore[arg-type]
    return Message(content, reply_to=message)
