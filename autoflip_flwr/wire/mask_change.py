"""Encode a mask by what has changed since another one that the reader has (NumPy and zlib only).

The encodings of a change, before zlib:

- ``dropped-gaps``: the mask keeps nothing that the other one prunes. One flag per kept entry of the other mask tells
  whether the entry is dropped. The flags travel as gaps, as :mod:`~autoflip_flwr.wire.mask_bits` has them.
- ``dropped-bitmap``: the same flags as bits, most significant bit of a byte first; 1 = dropped.
- ``difference``: the entries in which the masks differ, as gaps over all prunable entries. It fits any two masks.

The decoder accepts untrusted bytes. It trusts only the other mask, allocates few bytes per prunable entry, and raises
only ``ValueError``.
"""

from __future__ import annotations

import numpy as np

from autoflip_flwr.core.mask import Mask, check_unused, unpack_bits
from autoflip_flwr.wire.mask_bits import GAPS_AT_MOST, Flags, compress, decode_flags, encode_flags, inflate

CHANGES = ("difference", "dropped-gaps", "dropped-bitmap")


def encode_change(mask: Mask, base: Mask) -> tuple[str, bytes]:
    """Encode a mask by its change from ``base``: by what is dropped if nothing is added, else by their difference.

    If random entries are dropped, from 1 % to 95 % of those that ``base`` keeps, the size is within 6 % of the entropy
    of the choice (within 3 % up to 90 %).

    Returns
    -------
    tuple[str, bytes]
        One of ``CHANGES``, and the data.

    Raises
    ------
    ValueError
        If the masks have different layouts.

    Examples
    --------
    >>> from autoflip_flwr.core.layout import Layout
    >>> base = Mask(Layout.of({"w": np.zeros((1, 8), np.float32)}, output=None), bytes([0b10111011]))
    >>> encode_change(Mask(base.layout, bytes([0b10101011])), base)[0]
    'dropped-bitmap'
    """
    if mask.layout.specs != base.layout.specs:
        raise ValueError("the change from one mask to another takes two masks of the same layout")
    keep, before = (unpack_bits(each.bits, each.layout.prunable_size) for each in (mask, base))
    if (keep & ~before).any():
        return "difference", encode_flags(keep ^ before)
    dropped = ~keep[before]
    if np.count_nonzero(dropped) <= GAPS_AT_MOST * dropped.size:
        return "dropped-gaps", encode_flags(dropped)
    return "dropped-bitmap", compress(np.packbits(dropped).tobytes())


def decode_change(base: Mask, encoding: str, data: bytes) -> bytes:
    """Return the bits of the mask that ``encode_change`` encoded against ``base``.

    Raises
    ------
    ValueError
        If the encoding is unknown, or the data does not hold a change from ``base``.
    """
    keep: Flags = unpack_bits(base.bits, base.layout.prunable_size)
    if encoding == "difference":
        return np.packbits(keep ^ decode_flags(data, keep.size)).tobytes()
    if encoding not in CHANGES:
        raise ValueError(f"mask encoding {encoding[:20]!r}: must be one of {', '.join(CHANGES)}")
    count = int(np.count_nonzero(keep))
    if encoding == "dropped-gaps":
        dropped = decode_flags(data, count)
    else:
        bits = inflate(data, (count + 7) // 8, "the mask's dropped entries", exact=True)
        check_unused(bits, count)
        dropped = unpack_bits(bits, count)
    keep[keep] = ~dropped
    return np.packbits(keep).tobytes()
