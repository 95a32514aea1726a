"""Encode the bits of a mask for the wire (NumPy and zlib only).

The encodings of a mask, before zlib:

- ``full``: everything is kept. There is no data, and no zlib stream.
- ``bitmap``: the mask's bits unchanged.
- ``gaps``: one byte per kept entry, the number of pruned entries between it and the previous kept one. 255 stands for
  255 pruned entries that no kept entry follows directly. Pruned entries after the last kept one are omitted.
- ``units``: for each non-empty prunable array, one bit per index of axis 0, then one bit per index of axis 1 if that
  has more than one index. Both are most significant bit first, padded with 0 to whole bytes. An entry is kept if the
  bits of its two indices are 1. This fits a model whose units and channels are kept or pruned as a whole.

What has changed since another mask is encoded by :mod:`~autoflip_flwr.wire.mask_change`.

The data is one zlib stream, compressed in any way that the encoder chooses. The decoders accept untrusted bytes. They
trust only the layout's size (:mod:`~autoflip_flwr.wire.mask_record` bounds it by the size of the message), allocate few
bytes per prunable entry, and raise only ``ValueError``.
"""

from __future__ import annotations

import math
import zlib

import numpy as np
from numpy.typing import NDArray

from autoflip_flwr.core.layout import ArraySpec, Layout
from autoflip_flwr.core.mask import Mask, check_unused, unpack_bits

ENCODINGS = ("full", "bitmap", "gaps", "units")

GAPS_AT_MOST = 1 / 8
"""Share of True flags up to which gaps are smaller than a bitmap; zlib is too slow to try both."""

_SKIP = 255
_BATCH = 2**18

Flags = NDArray[np.bool_]


def encode(mask: Mask) -> tuple[str, bytes]:
    """Encode a mask as units if that is smaller, else as gaps or a bitmap, depending on its density.

    For random masks, the size is within 5 % of their entropy at densities from 0.02 to 0.9.

    Returns
    -------
    tuple[str, bytes]
        One of ``ENCODINGS``, and the data.

    Examples
    --------
    >>> layout = Layout.of({"w": np.zeros((800, 400), np.float32)})
    >>> rows = np.arange(800)[:, None] % 2 == 0
    >>> encoding, data = encode(Mask.from_bool(layout, {"w": np.broadcast_to(rows, (800, 400))}))
    >>> encoding, len(data) < 30
    ('units', True)
    """
    if mask.is_full:
        return "full", b""
    if mask.density <= GAPS_AT_MOST:
        found = {"gaps": compress(_to_gaps(unpack_bits(mask.bits, mask.layout.prunable_size)))}
    else:
        found = {"bitmap": compress(mask.bits)}
    if (units := _to_units(mask)) is not None:
        found["units"] = compress(units)
    encoding = min(found, key=lambda name: len(found[name]))
    return encoding, found[encoding]


def decode(layout: Layout, encoding: str, data: bytes) -> bytes:
    """Decode what ``encode`` returned to the bits of a mask of this layout, as :class:`Mask` takes them.

    Raises
    ------
    ValueError
        If the encoding is unknown, or the data does not hold such a mask.
    """
    count = layout.prunable_size
    match encoding:
        case "full":
            if data:
                raise ValueError(f"a full mask comes with {len(data)} bytes, expected none")
            return b"\xff" * (count // 8) + bytes([0xFF00 >> count % 8 & 0xFF] * (count % 8 > 0))
        case "bitmap":
            bits = inflate(data, (count + 7) // 8, "the mask's bits", exact=True)
            check_unused(bits, count)
            return bits
        case "gaps":
            return np.packbits(_from_gaps(data, count)).tobytes()
        case "units":
            return np.packbits(_from_units(data, layout)).tobytes()
    raise ValueError(f"mask encoding {encoding[:20]!r}: must be one of {', '.join(ENCODINGS)}")


def encode_flags(flags: Flags) -> bytes:
    """Encode flags ``(n,)`` by the places that are True; small if these are few."""
    return compress(_to_gaps(flags))


def decode_flags(data: bytes, count: int) -> Flags:
    """Return the flags ``(count,)`` that :func:`encode_flags` encoded.

    Raises
    ------
    ValueError
        If the data does not hold so many flags.
    """
    return _from_gaps(data, count)


def compress(data: bytes) -> bytes:
    """Compress with three zlib strategies, and return the smallest stream."""
    # In random bits, zlib's search for repeats finds short ones that cost more than they save; Huffman codes alone come
    # close to the entropy. Run lengths help if units are pruned, the search helps if the mask has another structure.
    streams = []
    for strategy in (zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE, zlib.Z_DEFAULT_STRATEGY):
        stream = zlib.compressobj(6, strategy=strategy)
        streams.append(stream.compress(data) + stream.flush())
    return min(streams, key=len)


def inflate(data: bytes, limit: int, what: str, *, exact: bool) -> bytes:
    """Decompress one zlib stream of at most ``limit`` bytes, or (``exact``) exactly ``limit`` bytes.

    Not more than ``limit + 1`` bytes are decompressed.

    Raises
    ------
    ValueError
        If the stream holds more bytes or, with ``exact``, fewer, is damaged, does not end where ``data`` ends, or needs
        a preset dictionary. The text begins with ``what``.
    """
    stream = zlib.decompressobj()
    try:
        result = stream.decompress(data, limit + 1)
    except zlib.error as error:
        raise ValueError(f"{what}: {error}") from error
    if not stream.eof or stream.unused_data or len(result) > limit or (exact and len(result) != limit):
        raise ValueError(f"{what}: {len(data)} compressed bytes do not hold what is expected")
    return result


def _to_gaps(keep: Flags) -> bytes:
    """Encode flags ``(n,)`` as gaps."""
    gaps = np.diff(np.flatnonzero(keep), prepend=-1) - 1
    skips = gaps // _SKIP
    stream = np.full(gaps.size + int(skips.sum()), _SKIP, np.uint8)
    stream[np.cumsum(skips + 1) - 1] = gaps % _SKIP
    return stream.tobytes()


def _from_gaps(data: bytes, count: int) -> Flags:
    """Decode compressed gaps to flags ``(count,)``."""
    # each byte stands for at least one entry, so there cannot be more bytes than entries
    stream = np.frombuffer(inflate(data, count, "the mask's gaps", exact=False), np.uint8)
    keep, start = np.zeros(count, dtype=bool), 0
    for first in range(0, stream.size, _BATCH):  # in batches, since positions take eight times the memory of the gaps
        gaps = stream[first : first + _BATCH]
        ends = start + np.cumsum(gaps + (gaps != _SKIP).astype(np.int64))
        start = int(ends[-1])
        if start > count:
            raise ValueError(f"the mask's gaps lead beyond the {count} entries")
        keep[ends[gaps != _SKIP] - 1] = True
    return keep


def _to_units(mask: Mask) -> bytes | None:
    """Encode a mask as units, or return ``None`` if an array does not keep and prune whole units."""
    parts = []
    for spec in mask.layout.prunable:
        if not spec.size:
            continue
        keep = mask.keep[spec.name].reshape(_unit_shape(spec))
        rows, columns = keep.any(axis=(1, 2)), keep.any(axis=(0, 2))
        # all kept entries lie in these rows and columns; if the counts are equal, every entry there is kept
        if np.count_nonzero(rows) * np.count_nonzero(columns) * keep.shape[2] != mask.kept_by_name[spec.name]:
            return None
        parts += [rows, columns][: len(_told(keep.shape))]
    return b"".join(np.packbits(part).tobytes() for part in parts)


def _from_units(data: bytes, layout: Layout) -> Flags:
    """Decode compressed units to the flags of all prunable entries, ``(n,)``."""
    shapes = [_unit_shape(spec) for spec in layout.prunable if spec.size]
    size = sum((count + 7) // 8 for shape in shapes for count in _told(shape))
    bits = inflate(data, size, "the mask's units", exact=True)
    keep, at, start = np.zeros(layout.prunable_size, dtype=bool), 0, 0
    for shape in shapes:
        entries = keep[start : start + math.prod(shape)].reshape(shape)
        entries[...] = True
        for axis, count in enumerate(_told(shape)):
            part = bits[at : at + (count + 7) // 8]
            check_unused(part, count)
            entries &= np.expand_dims(unpack_bits(part, count), (1 - axis, 2))
            at += len(part)
        start += entries.size
    return keep


def _unit_shape(spec: ArraySpec) -> tuple[int, int, int]:
    """Return an array's shape as units (axis 0), their inputs (axis 1) and entries per pair (all other axes)."""
    rows, columns = (*spec.shape, 1, 1)[:2]
    return rows, columns, spec.size // (rows * columns)


def _told(shape: tuple[int, int, int]) -> tuple[int, ...]:
    """Return the lengths of the axes for which keep-flags are sent."""
    return shape[:2] if shape[1] > 1 else shape[:1]
