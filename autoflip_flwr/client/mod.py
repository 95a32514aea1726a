"""Client side: a Flower mod that unpacks messages and packs replies."""

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
from autoflip_flwr.client.error_feedback import follow_mask, pack_reply
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
from autoflip_flwr.wire.records import WireError, array_bytes, fingerprint, to_record
from autoflip_flwr.wire.request import read_ask

EXPLORED = "explored."
"""Prefix of the records of ``context.state`` that survive the exploration; the client's other records are restored."""


def autoflip_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Unpack messages and pack replies: the Flower client mod of AutoFLIP, to be the client's first (outermost) mod.

    The client's own code, and the mods behind this one, see exactly the records that they would see without AutoFLIP:
    full arrays under their names. Their results are packed before they are sent. The mod works with Message-API
    functions (``@app.train``) and with a ``client_fn`` that makes a ``NumPyClient``. It passes on messages of other
    Message-API strategies, so that the same client also works with plain FedAvg.

    The mask is kept in ``context.state``; a client gets it during training with :func:`current_mask`. A node that has
    lost the mask reports it, and is sent it again in the same round. The same holds for the values of pruned entries,
    if the server keeps them (``outside="initial"``) and :func:`autoflip_mod_with` was not given them.

    Examples
    --------
    >>> from flwr.clientapp import ClientApp
    >>> app = ClientApp(mods=[autoflip_mod])
    """
    return _handle(message, context, call_next, _NOTHING)


def autoflip_mod_with(*, base: held.Source) -> Mod:
    """Make an :func:`autoflip_mod` that already has the pretrained model, so that the server need not send it.

    With ``AutoFlip(outside="initial")``, a client needs the initial values of the pruned entries. A client that has not
    explored from them is sent them once, which takes as many bytes as the prunable arrays. A client that reads the same
    model itself saves these bytes. The mod compares digests; if they differ, the server sends the values.

    Parameters
    ----------
    base : Mapping[str, array] | Callable[[], Mapping[str, array] | None]
        The model's arrays by the server's names: NumPy arrays or PyTorch tensors (``model.state_dict()``). Or a
        function that returns them, which is called at most once per process, and only if a message names a base. If it
        returns None or its file is missing, the server sends the base.

    Raises
    ------
    TypeError
        If ``base`` is anything else. If a function returns anything else, the error is raised when it is called.

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
            if state is not None:  # another strategy's message: no current mask, but the node keeps it
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
    """Return the mask under which the message is packed: its own, or the node's if the digests are equal."""
    record = message.content.get(MASK_RECORD)
    exploring = head["phase"] == EXPLORE
    state = {
        "phase": EXPLORE if exploring else TRAIN,
        "message": message.metadata.message_id,
        "rate": head.get("rate", 1.0),
    }
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
        follow_mask(context, mask)
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
    """Unpack the message, run the client's own code, and pack the reply."""
    inner = RecordDict({k: v for k, v in message.content.items() if k not in (HEADER, MASK_RECORD, BASE_RECORD)})
    keys = list(inner.array_records)
    if len(keys) != 1:
        raise WireError(f"{len(keys)} ArrayRecords in the message, expected 1")
    kind, wanted = (str(head.get(key, "float32")) for key in ("values", "reply"))
    if kind not in VALUES or wanted not in ((*DELTAS, NOTHING) if head["phase"] == EXPLORE else VALUES):
        raise WireError(f"values {kind!r}, reply {wanted!r}: not in phase {head['phase']!r}")
    start = {dtype: vector.whole() for dtype, vector in read_vectors(mask, inner[keys[0]], kind).items()}
    full = Subspace(mask, held.base_in_force(context, mask.layout)).unpack(split_vectors(mask, start))
    inner[keys[0]] = to_record(full)
    base, own = str(head.get("base", "")), dict[str, str]()
    if head["phase"] != EXPLORE:
        full = {}  # only deltas need it: no second model in memory while the client trains
    elif base and held.keep_explored(context, base, mask.layout, full, given):
        own = base_entry(base)
    message.content = inner
    with _state_set_aside(context) if head["phase"] == EXPLORE else nullcontext():
        reply = numpy_client.call(message, context, call_next, str(head.get("weight-key", "num-examples")))
    if reply.has_error():  # some of Flower's mods reply to the reply that they reject, not to the message
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
        deltas = {
            spec.name: np.subtract(arrays[spec.name], full[spec.name]) for spec in mask.layout.specs if spec.floating
        }
        values = pack_deltas(mask, deltas) if wanted == LOG8 else pack_values(mask, mask.gather({**arrays, **deltas}))
    else:
        values = pack_reply(context, mask, wanted, mask.gather(arrays), start)
    content[key] = values
    add_reported(context, mask, content, required=head["phase"] == EXPLORE)
    told = {"digest": mask.digest, "fingerprint": fingerprint(values), **value_entries(values=wanted), **own}
    return _reply(message, context, head, content, **told)


@contextmanager
def _state_set_aside(context: Context) -> Iterator[None]:
    """Restore ``context.state`` on exit, so that round 1 does not start with state from training the full model."""

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
    """Return the key and the full arrays that the client's own code returned, in the model's dtypes.

    An explorer must return weights. Integers in place of floats are quantised values, and are rejected.
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
