"""`OverflowRegion`: the owner's side of an overflow file."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from operator import index
from typing import TYPE_CHECKING

from nodedb_mem import _memory
from nodedb_mem._arrays import int64_copy, int64_room, slot_numbers
from nodedb_mem._constructors import RegionConstructors
from nodedb_mem.engine import KNOWN_ENGINES, EngineId
from nodedb_mem.errors import InvalidSlotError, RegionError, RegionIOError, RegionSizeError
from nodedb_mem.objects import ObjectRef
from nodedb_mem.refs import SlotParts, SlotRef
from nodedb_mem.stats import OverflowSlot

if TYPE_CHECKING:
    from collections.abc import Iterable

    from typing_extensions import Buffer

    from nodedb_mem._arrays import Slots

_write = _memory.write
_read = _memory.read
_read_bytes = _memory.read_bytes
_free = _memory.free


class OverflowRegion(RegionConstructors):
    """One overflow file and its mapping, owned by the thread that opens it, or by all threads of its process.

    Every verb raises `WrongThreadError` on a thread that does not own the region and in a forked child, and
    `RegionClosedError` after `close`. Only `path`, `closed`, `repr`, `adopt` and `with` work everywhere. A verb that
    raises has changed nothing. There are four exceptions. `close` closes the region and then reports that a write-back
    failed. `compact` and `trim` may stop half-way: every value is intact then, and what was done so far stays. A write
    that the disk refuses may have moved other values to make room.

    A write needs free bytes, and they need not lie together. Where they are scattered, the region moves values until
    they do. Values with a live view or a lease stay where they are, and room is made between them.

    Parameters
    ----------
    path
        The file to create or open (mode 0600; symlinks are refused). Beside it, `path` + ".slots" holds the slot
        table. A file left by an earlier region keeps its size as capacity and starts empty. Only bytes that a living
        reader leases stay pinned. None opens an unnamed file in `directory`, as `temporary` does.
    directory
        Where an unnamed file takes its blocks.
    initial_capacity
        Size of a new file, in bytes. Where the file is there and is not empty, nobody looks at it.
    max_capacity
        The most the file may grow to, in bytes. A file that is larger opens, and does not grow.
    alignment
        Every value starts at a multiple of it, in bytes. It is a power of two from 1 to 4096. 1 packs values without
        gaps.
    cache_limit
        The most bytes of the file that may stay in RAM, page cache and RSS together. A background thread of the core
        writes what is beyond it to disk, oldest first, and drops it. 0 keeps as little as possible, about 4 MiB. Views
        that are in use may hold more. None sets no limit: the kernel decides what stays in the page cache. The limit
        has no effect on tmpfs, which has no other place than RAM.
    keep_mapped
        Whether pages of values of 64 KiB and more stay in the RSS after their last view. By default they are in the
        RSS only while a view of them lives, at every `cache_limit`, and the next view maps them again. True is for who
        views the same large values again and again, and does not mind the RSS. Values below 256 KiB are then mapped
        once they are written.
    ownership
        Who may call. "thread" is the thread that opens the region. "process" is every thread of the process: the core
        lets one in at a time, and others while it waits for the disk or copies a large value, but moves no value.
    recover
        Keep the values of an earlier region under their slots, whether its owner closed it or was killed. References to
        them stay good, and the earlier alignment holds. A value that was being written when the owner died is lost.
        Values survive the death of the process, not that of the machine.

    Warns
    -----
    ResourceWarning
        The file is on tmpfs or ramfs, or on an overlay that writes to one of these: what is spilled there stays in RAM.
        Or `cache_limit` is set, and ``mlockall`` keeps in RAM whatever the process maps.

    Raises
    ------
    RegionSizeError
        A size or the alignment is outside its range (a `ValueError`).
    RegionBusyError
        The file is held by another region, in this process or another.
    RegionIOError
        The system refused, or the path is not a regular file (EINVAL), or holds data that no region wrote (EEXIST), or
        the slot table is cut off or, to be recovered, torn (EUCLEAN), or is of a newer version or, to be recovered, of
        another one (EINVAL). Or the files do not belong together: they are of two regions (EINVAL); the data file is a
        copy without its attributes, or, to be recovered, of a region that was open (EUCLEAN); one of them is missing
        (ENOENT). Whenever opening is refused, the values of an earlier region are still there.
    """

    # -- values ---------------------------------------------------------------------------------------------------

    def write(self, data: Buffer, engine: int) -> int:
        """Copy a value into a slot.

        Parameters
        ----------
        data
            Any C-contiguous buffer; its bytes are copied once. It may be a view of this region.
        engine
            The owner of the value: an `EngineId`, another IntEnum, or an int, 0 to 255.

        Returns
        -------
        int
            The slot's number.

        Raises
        ------
        TypeError
            `data` is no buffer, or its bytes are pointers, or it is a masked array.
        BufferError
            `data` is not C-contiguous.
        ValueError
            `engine` is not 0 to 255.
        CapacityExceededError
            The file would have to grow past `max_capacity`.
        RegionIOError
            The disk is full (ENOSPC), or the system refused otherwise.
        """
        if engine.__class__ is EngineId:
            return _write(self._holder, data, engine)
        number = self._check_engine(engine)
        slot = _write(self._holder, data, engine)
        if number >= 0:
            self._learn(number, engine)
        return slot

    def write_vectored(self, buffers: Iterable[Buffer], engine: int, *, aligned: bool = False) -> int:
        """Gather several buffers into one slot, with one copy each.

        Parameters
        ----------
        buffers
            The parts, in order; C-contiguous.
        engine
            As for `write`.
        aligned
            Start every part at a multiple of the region's alignment, with zeros between. Otherwise they follow each
            other without gaps.

        Returns
        -------
        int
            The slot's number. `parts` says where its parts are.

        Raises
        ------
        ValueError
            There are no buffers.
        TypeError, BufferError, ValueError, CapacityExceededError, RegionIOError
            As for `write`.
        """
        number = self._check_engine(engine)
        written = None
        try:
            written = _memory.write_vectored(self._holder, buffers, engine, aligned)
            slot, (generation, sizes) = written
            self._parts[slot] = generation, SlotParts.layout(sizes, self._alignment if aligned else 1)
        except BaseException:
            if written is not None:
                with suppress(RegionError):
                    _free(self._holder, written[0])
            raise
        self._learn(number, engine)
        return slot

    def parts(self, slot: int) -> SlotParts:
        """Say where the parts of a live slot lie in its value. A value has one part, unless `write_vectored` wrote it.

        The region object knows the layout; the file does not.
        """
        slot = index(slot)
        _, size, _, occupied, generation = _memory.slot(self._holder, slot)
        if not occupied:
            raise InvalidSlotError(slot, "has been freed")
        written, layout = self._parts.get(slot, (None, None))
        return layout if layout and written == generation else SlotParts((0,), (size,))

    def write_many(
        self, buffers: Iterable[Buffer] | Buffer, engine: int, *, lengths: Buffer | None = None
    ) -> list[int] | memoryview:
        """Write many values in one call, all or none.

        Parameters
        ----------
        buffers
            A value each; or, with `lengths`, one buffer with the values one after the other.
        engine
            As for `write`.
        lengths
            Bytes of each value: a buffer of int64 that add up to the size of `buffers`.

        Returns
        -------
        list of int, or memoryview
            The slots, in order. With `lengths`, a buffer of int64 (`numpy.frombuffer(slots, "int64")`).

        Raises
        ------
        ValueError
            There are no buffers; a length is negative; the lengths don't add up to the buffer.
        TypeError, BufferError, ValueError, CapacityExceededError, RegionIOError
            As for `write`; nothing has been written.
        """
        number = self._check_engine(engine)
        slots: list[int] | memoryview
        if lengths is None:
            slots = _memory.write_many(self._holder, buffers, engine)
        else:
            sizes = int64_copy(lengths)
            slots = int64_room(len(sizes))
            _memory.write_packed(self._holder, buffers, sizes, engine, slots)  # type: ignore[arg-type]
        self._learn(number, engine)
        return slots

    def allocate(self, size: int, engine: int) -> tuple[int, memoryview]:
        """Make room for a value that is filled in place, without a copy.

        Parameters
        ----------
        size
            Of the value, in bytes.
        engine
            As for `write`.

        Returns
        -------
        slot : int
        view : memoryview
            Writable, all zeros. It pins the slot like a view of `read`. Call `commit` when the value is complete:
            readers in other processes see it only then.

        Raises
        ------
        RegionSizeError
            `size` is negative, or 2**63 and more (a `ValueError`).
        ValueError
            `engine` is not 0 to 255.
        CapacityExceededError, RegionIOError
            As for `write`; EOPNOTSUPP on a file system (btrfs) where a store might find no block.
        """
        number = self._check_engine(engine)
        length = index(size)
        if not 0 <= length < 1 << 63:
            raise RegionSizeError("size must not be negative, and below 2**63")
        room = _memory.allocate(self._holder, length, engine)
        self._learn(number, engine)
        return room

    def commit(self, slot: int) -> None:
        """Declare the value of an allocated slot complete. Its views stay writable, but should be left alone now."""
        _memory.commit(self._holder, slot)

    def restore(self, slot: int) -> memoryview:
        """View a value as a private, writable copy, made page by page when it is written to.

        Returns
        -------
        memoryview
            Writable bytes. The stored value never changes, untouched pages cost no RAM of their own, and the slot is
            pinned as by `read`.

        Raises
        ------
        InvalidSlotError
            The slot never existed, or has been freed.
        RegionIOError
            The system has no room for one more mapping (ENOMEM).
        """
        return _memory.restore(self._holder, slot)

    def read_many(self, slots: Slots) -> list[memoryview]:
        """View many values, as `read` does, in one call; all or none. `slots` may be a buffer of int64.

        The disk is asked for all values that are not in RAM, in the order of the file. Under a cache limit, views of
        more than half of it are for values that stay in RAM: use `read_many_into`, or several calls.
        """
        return _memory.read_many(self._holder, slot_numbers(slots))

    def read_many_into(self, slots: Slots, buffer: Buffer) -> memoryview:
        """Copy many values to a writable buffer, one after the other.

        Values that are not in RAM are asked for, and copied, in the order of the file, in windows that fit under the
        cache limit.

        Returns
        -------
        memoryview
            Their sizes in bytes, as int64.

        Raises
        ------
        TypeError, BufferError
            `buffer` is no buffer; it is read-only, or not C-contiguous.
        ValueError
            The buffer is too small; nothing has been copied.
        InvalidSlotError
            One of `slots` is no live slot; nothing has been copied.
        """
        wanted = slot_numbers(slots)
        sizes = int64_room(len(wanted))
        _memory.read_many_into(self._holder, wanted, buffer, sizes)
        return sizes

    def free_many(self, slots: Slots) -> None:
        """Free many slots in one call, all or none. `slots` may be a buffer of int64.

        Raises
        ------
        RepeatedSlotError
            A slot is listed twice (a `ValueError`, with `slot`); nothing has been freed.
        InvalidSlotError
            One of `slots` is no live slot; nothing has been freed.
        """
        wanted = slot_numbers(slots)
        layouts = {slot: self._parts.get(slot) for slot in wanted} if self._parts else {}
        _memory.free_many(self._holder, wanted)
        for slot, layout in layouts.items():
            self._forget(slot, layout)

    def read(self, slot: int) -> memoryview:
        """View a value in place, without a copy.

        Returns
        -------
        memoryview
            Read-only bytes. The slot's bytes neither move nor change while it, or anything made from it (a slice, a
            NumPy array), lives; also after `free` and `close`.

        Raises
        ------
        InvalidSlotError
            The slot never existed, or has been freed.
        """
        return _read(self._holder, slot)

    def read_bytes(self, slot: int) -> bytes:
        """Copy a value out. Raises `InvalidSlotError` as `read` does."""
        return _read_bytes(self._holder, slot)

    def read_into(self, slot: int, buffer: Buffer) -> int:
        """Copy a value to the start of a writable, C-contiguous buffer.

        Returns
        -------
        int
            The value's size in bytes.

        Raises
        ------
        TypeError, BufferError
            `buffer` is no buffer; it is read-only, or not C-contiguous.
        ValueError
            The buffer is smaller than the value; it is left as it was.
        InvalidSlotError
            The slot never existed, or has been freed.
        """
        return _memory.read_into(self._holder, slot, buffer)

    def free(self, slot: int) -> None:
        """Free a slot. Its number is invalid at once; its bytes are reused when no view of them is left.

        Raises
        ------
        InvalidSlotError
            The slot never existed, or has been freed already.
        """
        if slot.__class__ is not int:
            slot = index(slot)
        layout = self._parts.get(slot) if self._parts else None
        _free(self._holder, slot)
        self._forget(slot, layout)

    def slot(self, slot: int) -> OverflowSlot:
        """Describe a slot, live or freed.

        Raises
        ------
        InvalidSlotError
            The slot never existed.
        """
        offset, size, engine, occupied, _ = _memory.slot(self._holder, slot)
        return OverflowSlot(offset, size, self._engines.get(engine, engine), occupied)

    # -- the region -----------------------------------------------------------------------------------------------

    def share(self, slot: int) -> SlotRef:
        """Make a reference to a value, for an `OverflowReader` in another thread or process.

        The reference is small and picklable. It names the value, not the slot: once the slot is freed, it is stale. For
        a temporary region it works while this process lives, for processes of the same user.

        Raises
        ------
        InvalidSlotError
            The slot never existed, or has been freed.
        RegionIOError
            The leases file cannot be made; or the process has changed its user since it opened the region, and made
            none before (EPERM); or one of the files was removed (ENOENT); or the region was opened by a relative path
            in a folder whose own path is too long (ENAMETOOLONG).
        """
        slot = index(slot)
        _memory.slot(self._holder, slot)  # before a leases file is made
        if self._path is not None and not os.path.isabs(self._place):
            message = f"no reader can be led to a file by its relative path: {os.strerror(errno.ENAMETOOLONG)}"
            raise RegionIOError(errno.ENAMETOOLONG, message, self._where[1])
        self._allow_leases()
        known, generation = 0, -1
        while known != generation:  # another thread may have given the slot to another value
            _, size, *_, known = _memory.slot(self._holder, slot)
            *files, generation, incarnation = _memory.share(self._holder, slot)
        if self._path is None:
            paths = [f"/proc/{os.getpid()}/fd/{number}" for number in files]
        else:
            paths = [self._place, self._place + ".slots", self._place + ".leases"]
        return SlotRef(paths[0], incarnation, slot, generation, size, *paths[1:])

    def share_object(self, slot: int) -> ObjectRef:
        """Make a reference to an object that `nodedb_mem.codec` has encoded, for other processes. As `share`."""
        return ObjectRef(self.share(slot))

    def evict(self, slots: Slots | None = None) -> None:
        """Write values back to disk and drop them from RAM, now.

        Parameters
        ----------
        slots
            Which values; None for all that have no live view. Values that share a page leave together; a view of one
            still works, reading from disk when it is touched.

        Raises
        ------
        InvalidSlotError
            One of `slots` is no live slot; nothing has been dropped.
        RegionIOError
            Writing back failed.

        Warns
        -----
        ResourceWarning
            The mapping is locked in RAM (``mlockall``), so that nothing can be dropped; once a region.
        """
        self._warn_if_locked()
        _memory.evict(self._holder, None if slots is None else slot_numbers(slots))

    def prefetch(self, slots: Slots) -> None:
        """Ask the disk for values that are about to be read one by one. Does not wait for them.

        The disk gets all requests at once, in the order of the file. `read_many` and `read_many_into` do this by
        themselves. Values in RAM cost little. Of values that need more room than half the cache limit, only a part is
        asked for.

        Raises
        ------
        InvalidSlotError
            One of `slots` is no live slot; nothing has been asked for.
        """
        _memory.prefetch(self._holder, slot_numbers(slots))

    def __contains__(self, slot: object) -> bool:
        """Tell whether `slot` is the number of a live slot."""
        try:
            return _memory.contains(self._holder, slot)
        except TypeError:
            return False

    def _forget(self, slot: int, layout: tuple[int, SlotParts] | None) -> None:
        """Forget the layout of a freed value; not that of a value that was written there meanwhile."""
        if layout is not None and (found := self._parts.pop(slot, None)) is not layout and found is not None:
            self._parts.setdefault(slot, found)

    def _check_engine(self, engine: int) -> int:
        """Give the number of an engine that is to be learnt once the core has accepted it; -1 for others."""
        if engine.__class__ is EngineId:
            return -1
        number = index(engine)
        if not 0 <= number <= 255:
            raise ValueError("engine must be 0 to 255")
        return -1 if engine.__class__ is int or number in KNOWN_ENGINES else number

    def _learn(self, number: int, engine: int) -> None:
        """Remember an engine, so that `slot` gives it back as it was given."""
        if number >= 0:
            self._engines[number] = engine
