"""Objects in the slots of a region: in, out, and whether they have changed since."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, NamedTuple

from nodedb_mem import _memory
from nodedb_mem._held import Memory, is_plain_array
from nodedb_mem.codec import ALIGNMENT, Encoded, decode, encode, load, split
from nodedb_mem.errors import CapacityExceededError, RegionIOError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Buffer

    from nodedb_mem._changes import PageMap
    from nodedb_mem.region import OverflowRegion

# A private mapping costs 5 us whatever its size, a copy a fault for each of its pages.
# A process may have 65,530 mappings.
_COPIED = 32 << 10
_HEAD = 512  # bytes of a head that is kept
_SMALL = 16 << 10  # a copy of so much is less than a view


class Stored(NamedTuple):
    """Where an object is: its slot, its size there, and whether decoding copies it whole.

    `head` is what is before the buffers of a large value, if it is short. To read it from the value costs a page fault.
    """

    slot: int
    size: int
    copied: bool
    head: bytes | None = None


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
    """Encode the value of a key. Raises a TypeError that names the key where it cannot be pickled, or made again."""
    try:
        return encode(value, alignment=alignment, kept=kept, prove=True)
    except TypeError as error:
        raise TypeError(f"the value of {key!r}: {error}") from error


def put(region: OverflowRegion, key: object, encoded: Encoded, engine: int) -> Stored:
    """Write an encoded object. Raises what `OverflowRegion.write` does; errors for want of room carry the key."""
    try:
        slot = _gather(region, encoded, engine)
    except (CapacityExceededError, RegionIOError) as error:
        error.key = key
        raise
    head = None
    if encoded.size > _COPIED and not encoded.copied and len(encoded.parts) == 1 + len(encoded.buffers):
        first = encoded.parts[0]
        head = first if isinstance(first, bytes) and len(first) <= _HEAD else None
    return Stored(slot, encoded.size, encoded.copied, head)


def _gather(region: OverflowRegion, encoded: Encoded, engine: int) -> int:
    """Gather the parts into one slot; the region need not remember where they lie."""
    if len(encoded.parts) == 1:
        return region.write(encoded.parts[0], engine)
    number = region._check_engine(engine)
    slot: int = _memory.write_vectored(region._holder, encoded.parts, engine, encoded.aligned)[0]
    region._learn(number, engine)
    return slot


class ReplacedError(Exception):
    """Another thread has freed a slot before it was read."""


def get(
    region: OverflowRegion,
    stored: Stored,
    kept: Sequence[object] = (),
    *,
    may_map: bool = True,
    is_current: Callable[[], bool] | None = None,
) -> tuple[Any, Buffer | None, Memory | None]:
    """Read an object. Its buffers are writable, and its own: the stored bytes never change.

    Parameters
    ----------
    may_map
        Whether it may come back on a mapping of its own.
    is_current
        Whether the slot is still the object's; asked when its bytes can change no more, and before they are looked at.

    Raises
    ------
    ReplacedError
        It is not.

    Returns
    -------
    value
    view : buffer or None
        The private mapping that its buffers lie in; None where they are copies. It is no memoryview: one of these would
        count among those who hold the memory.
    memory : Memory or None
        What its buffers lie in; None for an array that refers to its mapping itself, and where there are none.
    """
    slot, size, copied, head = stored
    if copied:
        data = region.read(slot) if size > _SMALL else region.read_bytes(slot)
        _refuse_replaced(is_current)
        return decode(data, kept=kept), None, None
    view, mapping = private_view(region, stored, may_map=may_map)
    _refuse_replaced(is_current)
    if mapping is None:
        return decode(view, kept=kept), None, Memory(view)
    value = load(split(view, head), kept)
    if is_plain_array(value) and value.base is mapping:
        return value, mapping, None
    return value, mapping, Memory(view)


def private_view(region: OverflowRegion, stored: Stored, *, may_map: bool = True) -> tuple[memoryview, Buffer | None]:
    """View the bytes of an object, writable and the caller's own. The second is the mapping, if they are no copy."""
    size = stored.size
    if size > _COPIED and may_map:
        try:
            view = region.restore(stored.slot)
        except RegionIOError as error:
            if error.errno != errno.ENOMEM:
                raise
        else:
            return view, view.obj
    room = bytearray(size + ALIGNMENT)
    start = -_memory.address_of(room) % ALIGNMENT
    view = memoryview(room)[start : start + size]
    region.read_into(stored.slot, view)
    return view, None


def _refuse_replaced(is_current: Callable[[], bool] | None) -> None:
    if is_current is not None and not is_current():
        raise ReplacedError


def is_unchanged(
    stored: Stored,
    encoded: Encoded,
    read: Callable[[int], memoryview],
    view: Buffer | None,
    pages: PageMap,
    *,
    alignment: int = ALIGNMENT,
) -> bool:
    """Whether an object, encoded again for a region of that alignment, is what was stored.

    Parameters
    ----------
    read
        Reads a slot.
    view
        The private mapping that its buffers came in, if any. Of buffers that still lie there the kernel knows whether
        they were stored to. Others are compared.
    """
    if encoded.size != stored.size:
        return False
    parts = encoded.parts
    in_band = len(parts) - len(encoded.buffers) if encoded.aligned else len(parts)
    base = 0 if view is None else _memory.address_of(view)
    before: memoryview | None = None  # what was stored
    in_place = False
    end = 0
    for number, part in enumerate(parts):
        start = -(-end // alignment) * alignment if encoded.aligned else end
        end = start + memoryview(part).nbytes
        if number == 0 and stored.head is not None:
            if part != stored.head:
                return False
        elif base and number >= in_band and _memory.address_of(part) == base + start:
            in_place = True
        else:
            if before is None:
                before = read(stored.slot)
            if not _memory.is_at(part, before, start):
                return False
    return not (in_place and view is not None and pages.has_changed(view))
