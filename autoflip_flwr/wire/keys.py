"""The names that both sides share: records, phases, config keys, metrics."""

from __future__ import annotations

FORMAT = 3
"""Number of the wire format; both sides must speak the same."""

HEADER = "autoflip"
"""Record of a message or reply: what it is. Record of a node's state: what it knows of the run."""

MASK_RECORD = "autoflip.mask"
"""Record of a message, and of a node's state: the mask."""

BASE_RECORD = "autoflip.base"
"""Record of a message, and of a node's state: what stands outside the mask."""

HELLO, EXPLORE, TRAIN, EVALUATE = "hello", "explore", "train", "evaluate"
PHASES = (HELLO, EXPLORE, TRAIN, EVALUATE)
"""The phases of messages."""

STATISTICS = "autoflip.statistics"
"""Record of a reply: the statistics that the server has asked for."""

ASK = "ask"
"""Entry of a message's header: the statistics that are asked for."""

NOTHING = "none"
"""What the header calls the coding of a reply to ``explore`` that holds no deltas."""

MASK_MISSING, BASE_MISSING, BOTH_MISSING = "mask-missing", "base-missing", "mask-and-base-missing"
MISSING = {
    MASK_MISSING: (MASK_RECORD,),
    BASE_MISSING: (BASE_RECORD,),
    BOTH_MISSING: (MASK_RECORD, BASE_RECORD),
}
"""Status of a reply -> the records that the node lacks."""

GIVEN = "given"
"""In the place of a base's digest in a reply to hello: the node's user gave it a model, not compared so far."""

MOD_REFUSED = 6
"""Flower's error code of a mod that refuses a message."""

PHASE_KEY, EPOCHS_KEY, PATIENCE_KEY = "autoflip-phase", "autoflip-epochs", "autoflip-patience"
WEIGHT_DECAY_KEY = "autoflip-weight-decay"
"""Keys that the config record of an exploration message holds on top of the wrapped strategy's own.

A client that reads them explores as the method asks: it trains for up to ``autoflip-epochs`` epochs and stops after
``autoflip-patience`` epochs without a better mean training loss, with the weight decay ``autoflip-weight-decay``, which
is 0: weight decay moves all clients' weights alike, where they agree on nothing. A client that ignores them trains as
usual.
"""

ROUND_KEY = "server-round"
"""Key of the round in the config records of Flower's strategies; it is 0 in the exploration."""

EXAMPLES_PROCESSED = "examples-processed"
"""Metric in which a client may say how many examples it ran forward and backward (epochs count each time)."""
