"""`ObjectRef`: an object in a region, for other processes, without sending it."""

from __future__ import annotations

import errno
import mmap
import os
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary

from nodedb_mem import _memory
from nodedb_mem.codec import ALIGNMENT, decode
from nodedb_mem.errors import RegionIOError
from nodedb_mem.reader import OverflowReader
from nodedb_mem.refs import SlotRef

if TYPE_CHECKING:
    from nodedb_mem.reader import Lease

_SMALL = 64 << 10  # up to this size, a copy is less than a lease

#: The readers whose values are in use here, by process, path and opening: a value keeps its reader.
_readers: WeakValueDictionary[tuple[int, str, int], OverflowReader] = WeakValueDictionary()


class ObjectRef(NamedTuple):
    """A reference to an object in a region: small, picklable, and good in any process of the same user.

    It is made by `OverflowRegion.share_object`, `OverflowMap.share` and `SpillMapping.share`. It names the value that
    was there then: once the owner has freed it, the reference is stale. A reference into a temporary region works while
    the owner lives and has the region open. What `get` has given works on.

    Attributes
    ----------
    slot : SlotRef
        The value in its region.
    """

    slot: SlotRef

    def get(self, *, writable: bool = False) -> Any:
        """Make the object here.

        Its large buffers are the region's own bytes, without a copy. They stay where they are, whatever the owner does,
        until the last array on them is gone: a lease keeps them. Where all leases are taken, they are a copy.

        Parameters
        ----------
        writable
            The buffers are copy-on-write: writable here, and nobody else sees what is written. Otherwise they are
            read-only.

        Raises
        ------
        StaleSlotError
            The value has been freed, or the region has been opened anew.
        RegionIOError
            The owner has ended, so that a temporary region's files are gone (ENOENT); or there is no permission.
        UndecodableError
            The bytes are no object, or its classes cannot be had here.
        """
        if writable:
            return decode(private_view(self.slot))
        reader = _reader_of(self.slot)
        lease = _lease(reader, self.slot)
        return decode(reader.read_bytes(self.slot) if lease is None else lease.view)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the paths that follow from the first."""
        path, incarnation, slot, generation, size, *beside = self.slot
        if beside == [path + ".slots", path + ".leases"]:
            beside = []
        return _ref, (path, incarnation, slot, generation, size, *beside)


def _ref(path: str, incarnation: int, slot: int, generation: int, size: int, *beside: str) -> ObjectRef:
    """Make a reference again that was pickled."""
    slots, leases = beside or (path + ".slots", path + ".leases")
    return ObjectRef(SlotRef(path, incarnation, slot, generation, size, slots, leases))


def private_view(ref: SlotRef) -> memoryview:
    """View a value copy-on-write, where a lease keeps it. Small ones are copied, and others where all leases are taken.

    Raises as `ObjectRef.get` does.
    """
    reader = _reader_of(ref)
    lease = _lease(reader, ref)
    return _copy(reader, ref) if lease is None else _private(reader, lease)


def _lease(reader: OverflowReader, ref: SlotRef) -> Lease | None:
    """Lease a value. None if a copy is less, or all leases are taken."""
    if ref.size <= _SMALL:
        return None
    try:
        return reader.lease(ref)
    except RegionIOError as error:
        if error.errno != errno.EAGAIN:
            raise
        return None


def _reader_of(ref: SlotRef) -> OverflowReader:
    key = os.getpid(), ref.path, ref.incarnation
    reader = _readers.get(key)
    if reader is None:
        reader = _readers[key] = OverflowReader(ref)
    return reader


def _copy(reader: OverflowReader, ref: SlotRef) -> memoryview:
    """Copy a value to memory that is writable and aligned."""
    data = reader.read_bytes(ref)
    room = bytearray(len(data) + ALIGNMENT)
    start = -_memory.address_of(room) % ALIGNMENT
    view = memoryview(room)[start : start + len(data)]
    view[:] = data
    return view


class _PrivateMapping(mmap.mmap):
    """A private mapping of a leased value; the lease ends with it."""

    lease: Lease


def _private(reader: OverflowReader, lease: Lease) -> memoryview:
    """Map a leased value copy-on-write."""
    offset, size = _memory.leased_at(lease.view.obj), lease.view.nbytes
    before = offset % mmap.ALLOCATIONGRANULARITY
    file = os.open(reader.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        mapping = _PrivateMapping(
            file,
            before + size,
            flags=mmap.MAP_PRIVATE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
            offset=offset - before,
        )
    except OSError as error:
        raise RegionIOError(error.errno, f"cannot map the value: {error.strerror}", reader.path) from None
    finally:
        os.close(file)
    mapping.lease = lease
    return memoryview(mapping)[before:]
