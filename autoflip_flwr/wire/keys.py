"""Names that client and server share: records, phases, config keys, metrics."""

from __future__ import annotations

FORMAT = 4
"""Version of the wire format; both sides must use the same."""

HEADER = "autoflip"
"""Name of the header record of a message or reply, and of the record of notes in a node's state."""

MASK_RECORD = "autoflip.mask"
"""Name of the record of the mask, in a message or in a node's state."""

BASE_RECORD = "autoflip.base"
"""Name of the record of the base (the values of pruned entries), in a message or in a node's state."""

HELLO, EXPLORE, TRAIN, EVALUATE = "hello", "explore", "train", "evaluate"
PHASES = (HELLO, EXPLORE, TRAIN, EVALUATE)
"""Phases of messages."""

STATISTICS = "autoflip.statistics"
"""Name of the record of a reply that holds the requested statistics."""

ASK = "ask"
"""Header entry that lists the requested statistics."""

NOTHING = "none"
"""Encoding named in the header if a reply to ``explore`` contains no deltas."""

MASK_MISSING, BASE_MISSING, BOTH_MISSING = "mask-missing", "base-missing", "mask-and-base-missing"
MISSING = {
    MASK_MISSING: (MASK_RECORD,),
    BASE_MISSING: (BASE_RECORD,),
    BOTH_MISSING: (MASK_RECORD, BASE_RECORD),
}
"""Status of a reply -> names of the records that the node lacks."""

GIVEN = "given"
"""Placeholder for a base's digest in a reply to hello: the user gave the node a model, which is not compared yet."""

MOD_REFUSED = 6
"""Flower's error code for a message that a mod rejects."""

PHASE_KEY, EPOCHS_KEY, PATIENCE_KEY = "autoflip-phase", "autoflip-epochs", "autoflip-patience"
WEIGHT_DECAY_KEY = "autoflip-weight-decay"
"""Keys that AutoFLIP adds to the config record of an exploration message.

A client that reads them explores as the method requires. It trains for at most ``autoflip-epochs`` epochs, and stops
after ``autoflip-patience`` epochs without a better mean training loss. Its weight decay is ``autoflip-weight-decay``,
which is 0: weight decay would change all clients' weights in the same way, and look like agreement. A client that
ignores the keys trains as usual.
"""

EXTRUSION_KEY, EXTRUDE_BELOW_KEY = "autoflip-extrusion", "autoflip-extrude-below"
"""Keys that AutoFLIP adds to the config record of a round before a drop, if its schedule extrudes.

A client that reads them adds the gradient of ``autoflip-extrusion`` times ``||w||^2`` over the kept entries that are
smaller than ``autoflip-extrude-below``.
"""

WARMUP_KEY = "autoflip-warmup"
"""Key that AutoFLIP adds to the config record of a round with a new mask, if clients should warm up.

A client that reads it raises its learning rate linearly, from zero, over this share of its steps.
"""

ROUND_KEY = "server-round"
"""Key of the round number in the config records of Flower's strategies; 0 in the exploration."""

EXAMPLES_PROCESSED = "examples-processed"
"""Metric for the number of examples that a client ran forward and backward; each epoch counts. Optional."""
