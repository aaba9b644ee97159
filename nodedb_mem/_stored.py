"""Objects in the slots of a region: in, out, and whether they have changed since."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, NamedTuple

from nodedb_mem._changes import PageMap, address_of, is_same
from nodedb_mem.codec import ALIGNMENT, Encoded, decode, encode
from nodedb_mem.errors import CapacityExceededError, RegionIOError
from nodedb_mem.refs import SlotParts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nodedb_mem.region import OverflowRegion

# A private mapping costs 5 us whatever its size, and a fault for each page that is touched. Up to this size a copy is
# less, and a process may have 65,530 mappings.
_COPIED = 128 << 10


class Stored(NamedTuple):
    """Where an object is: its slot, its size there, and whether decoding copies it whole."""

    slot: int
    size: int
    copied: bool


def alignment_of(region: OverflowRegion) -> int:
    """Return the alignment of a region that takes objects.

    Raises
    ------
    ValueError
        It is less than what arrays need.
    """
    if region._alignment < ALIGNMENT:
        raise ValueError(f"objects need a region of alignment {ALIGNMENT} or more, not {region._alignment}")
    return region._alignment


def encode_for(key: object, value: object, alignment: int, kept: Sequence[object] = ()) -> Encoded:
    """Encode the value of a key. Raises a TypeError that names the key where it cannot be pickled."""
    try:
        return encode(value, alignment=alignment, kept=kept)
    except TypeError as error:
        raise TypeError(f"the value of {key!r}: {error}") from error


def put(region: OverflowRegion, key: object, encoded: Encoded, engine: int) -> Stored:
    """Write an encoded object. Raises what `OverflowRegion.write` does; errors for want of room carry the key."""
    try:
        return Stored(region._gather(encoded.parts, engine, encoded.aligned), encoded.size, encoded.copied)
    except (CapacityExceededError, RegionIOError) as error:
        error.key = key
        raise


def get(
    region: OverflowRegion, stored: Stored, kept: Sequence[object] = (), *, may_map: bool = True
) -> tuple[Any, memoryview | None]:
    """Read an object. Its buffers are writable, and its own: the stored bytes never change.

    Returns
    -------
    value
    view : memoryview or None
        The private mapping that its buffers lie in; None where they are copies.
    """
    slot, size, copied = stored
    if copied:
        return decode(region.read(slot), kept=kept), None
    if size > _COPIED and may_map:
        try:
            view = region.restore(slot)
        except RegionIOError as error:
            if error.errno != errno.ENOMEM:
                raise
        else:
            return decode(view, kept=kept), view
    room = bytearray(size + ALIGNMENT)
    start = -address_of(room) % ALIGNMENT
    view = memoryview(room)[start : start + size]
    region.read_into(slot, view)
    return decode(view, kept=kept), None


def is_unchanged(
    region: OverflowRegion, stored: Stored, encoded: Encoded, view: memoryview | None, pages: PageMap
) -> bool:
    """Whether an object, encoded again, is what was stored.

    Parameters
    ----------
    view
        The private mapping that its buffers came in, if any. Of buffers that still lie there the kernel knows whether
        they were stored to. Others are compared.
    """
    if encoded.size != stored.size:
        return False
    at = region.read(stored.slot)
    sizes = [memoryview(part).nbytes for part in encoded.parts]
    layout = SlotParts.layout(sizes, region._alignment if encoded.aligned else 1)
    before = len(encoded.parts) - len(encoded.buffers) if encoded.aligned else len(encoded.parts)
    base = address_of(view) if view is not None else 0
    in_place = False
    for number, (part, start, size) in enumerate(zip(encoded.parts, layout.offsets, sizes, strict=True)):
        if number >= before and base and address_of(part) == base + start:
            in_place = True
        elif not is_same(part, at[start:], size):
            return False
    return not (in_place and pages.has_changed(base, stored.size))
