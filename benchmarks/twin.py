"""A pure-Python overflow region: the rival that the C core has to beat.

`TwinRegion` keeps the promises of `nodedb_mem.OverflowRegion` for the verbs it has: one owner thread and process,
one region per file, exact sizes, best-fit reuse with splitting and coalescing, growth to a ceiling without moving
the base, blocks allocated before they are touched, and zero-copy views that pin their bytes. It is written to be
as fast as CPython and the standard library allow; the tricks are explained where they stand.

Where it promises less: a slot may be given as 1.0, and a signal handler or finalizer must not call a verb, because
it could come in the middle of another one.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import itertools
import mmap
import os
import stat
import threading
import weakref
from bisect import bisect_left, insort
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from nodedb_mem.errors import (
    CapacityExceededError,
    InvalidSlotError,
    RegionBusyError,
    RegionClosedError,
    RegionError,
    RegionIOError,
    WrongThreadError,
    users_of,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

MIB = 1 << 20

# Values of this size and more are written by pwrite; smaller ones by memcpy, into space that one pwrite of zeros has
# prepared for many of them. Measured on ext4, us per MiB: fresh space memcpy 350 (4 KiB) and 300 (64 KiB, 1 MiB),
# prepared 170, 140, 150, pwrite 690, 137, 107. Reused space: memcpy 40 where memcpy was last, but 1500 where pwrite
# or writeback was, because each page has to be made writable again.
PWRITE_FROM = 256 << 10
ZEROS = bytes(512 << 10)

# A hole is one integer, (length << OFFSET_BITS) + offset: a list of them is sorted by length, then by offset, and
# bisect compares no tuples.
OFFSET_BITS = 47
OFFSET_MASK = (1 << OFFSET_BITS) - 1

# Views kept for reading a slot again: a slice of a kept view costs an eighth of a new one. Bounded because a kept
# view takes some 500 bytes of RAM.
KEPT_VIEWS = 8192

MARKER = "user.nodedb_mem.twin"


class TwinSlot(NamedTuple):
    """What `TwinRegion.slot` tells about a slot; sizes and offsets in bytes."""

    offset: int
    size: int
    engine: int
    generation: int
    occupied: bool


class _Byte(ctypes.Union):
    """One byte. A union, because ctypes exports its array in the plain format that memoryview can index ("B")."""

    _fields_ = (("value", ctypes.c_ubyte),)


@functools.lru_cache(maxsize=32)
def _pin_type(length: int) -> Any:
    """The type of exporter for a mapping of `length` bytes.

    Every view, slice and array keeps the exporter of its buffer alive, so the death of the exporter is the death of
    the last of them. An instance made by `from_address` costs a quarter of one made by `from_buffer`; it keeps the
    mapping through an attribute.
    """

    class Pin(_Byte * length):  # type: ignore[misc]
        __slots__ = ("mapping",)

    return Pin


class _Owned(threading.local):
    """What only the owner sees: in any other thread `mapping` does not exist."""

    mapping: mmap.mmap


def _process_word() -> memoryview:
    """A number that the kernel sets to 0 in a child, however it is forked.

    Reading it takes 25 ns; asking for the process number takes a system call, 155 ns.
    """
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    page.madvise(getattr(mmap, "MADV_WIPEONFORK", 18))
    return memoryview(page).cast("Q")


_process = _process_word()
_process_numbers = itertools.count(1)  # copied by a fork, so that a child's number differs from its parent's


class TwinRegion:
    """One overflow file and its mapping. Parameters and errors as for `nodedb_mem.OverflowRegion`."""

    __slots__ = (
        "__weakref__",
        "_base",
        "_capacity",
        "_closed",
        "_died",
        "_ends",
        "_fd",
        "_freed",
        "_holes",
        "_live",
        "_live_bytes",
        "_mark",
        "_mask",
        "_max_capacity",
        "_new_pin",
        "_owned",
        "_path",
        "_pinned",
        "_prepared",
        "_process",
        "_starts",
        "_used_bytes",
        "_views",
        "_waiting",
    )

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        initial_capacity: int = 64 * MIB,
        max_capacity: int = 1024 * MIB,
        alignment: int = 64,
    ) -> None:
        self._fd = -1
        self._closed = True
        if not 1 <= initial_capacity <= max_capacity < 1 << 47:
            raise ValueError("capacities must satisfy 1 <= initial_capacity <= max_capacity < 2**47")
        if not 1 <= alignment <= 4096 or alignment & (alignment - 1):
            raise ValueError("alignment must be a power of two from 1 to 4096")
        self._path = os.fspath(path)
        self._max_capacity = max_capacity
        self._mask = alignment - 1
        try:
            mapping = self._open_file(initial_capacity)
        except OSError as error:
            self._close_file()
            if isinstance(error, RegionError):
                raise
            raise RegionIOError(error.errno, error.strerror, self._path) from error
        except BaseException:
            self._close_file()
            raise
        pin_type = _pin_type(max_capacity)
        self._base = ctypes.addressof(pin_type.from_buffer(mapping))
        self._new_pin = pin_type.from_address
        self._closed = False
        self._owned = _Owned()
        self._owned.mapping = mapping
        if _process[0] == 0:
            _process[0] = next(_process_numbers)
        self._process = _process[0]

        self._used_bytes = 0  # end of the furthest byte
        self._live_bytes = 0
        self._mark = 0  # `_used_bytes`, rounded up to the alignment
        self._prepared = 0  # memcpy below this offset finds pages in the cache
        # Slots: (offset, end, engine, generation). `_freed` is also the stack of slot numbers to give out again.
        self._live: dict[int, tuple[int, int, int, int]] = {}
        self._freed: dict[int, tuple[int, int, int, int]] = {}
        # Free space, by length and by both ends: {start: length}, {end: length}.
        self._holes: list[int] = []
        self._starts: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        # Pins: views kept for live slots, weak references to the pins of live slots whose kept view was dropped, and
        # freed extents that wait for their pin to die, by id of the reference that tells: (it, offset, length).
        self._views: dict[int, memoryview] = {}
        self._pinned: dict[int, weakref.ref[Any]] = {}
        self._waiting: dict[int, tuple[weakref.ref[Any], int, int]] = {}
        self._died: deque[weakref.ref[Any]] = deque()  # appended to on any thread

    @classmethod
    def open(cls, path: str | os.PathLike[str], **options: int) -> Self:
        """Create or open the region at `path`; see the class."""
        return cls(path, **options)

    # --- the file ------------------------------------------------------------------------------------------------

    def _open_file(self, initial_capacity: int) -> mmap.mmap:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        self._fd = fd = os.open(self._path, flags, 0o600)
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RegionBusyError(self._path, *users_of(self._path)) from None
        if _has_data(fd) and not _is_marked(fd):
            raise OSError(errno.EEXIST, "holds data that no region wrote")
        capacity = facts.st_size or initial_capacity
        if capacity > self._max_capacity:
            raise CapacityExceededError(capacity, self._max_capacity)
        # Python maps no further than the end of the file. So extend it for a moment: the address space for the
        # ceiling stays when the file shrinks again, and the base never has to move.
        os.ftruncate(fd, self._max_capacity)
        try:
            mapping = mmap.mmap(fd, self._max_capacity)
        finally:
            os.ftruncate(fd, capacity)
        os.posix_fallocate(fd, 0, capacity)
        _mark_file(fd)
        mapping.madvise(mmap.MADV_DONTDUMP)
        self._capacity = capacity
        return mapping

    def _close_file(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _grow(self, required: int) -> None:
        """Double the file, or give it `required` bytes; a failure changes nothing."""
        if required > self._max_capacity:
            raise CapacityExceededError(required, self._max_capacity)
        old = self._capacity
        target = min(max(2 * old, required), self._max_capacity)
        try:
            try:
                os.posix_fallocate(self._fd, old, target - old)
            except OSError:
                if target == required:
                    raise
                target = required
                os.posix_fallocate(self._fd, old, target - old)
        except OSError as error:
            os.ftruncate(self._fd, old)
            raise RegionIOError(error.errno, error.strerror, self._path) from error
        self._capacity = target

    def _store(self, mapping: mmap.mmap, offset: int, end: int, data: Buffer) -> None:
        """Store a value that is large, or reaches beyond the prepared space."""
        try:
            if end - offset >= PWRITE_FROM:
                done = os.pwrite(self._fd, data, offset)
                while offset + done < end:  # a signal, or more than 2 GiB
                    rest = memoryview(memoryview(data).tobytes())[done:]
                    done += os.pwrite(self._fd, rest, offset + done)
                self._prepared = max(self._prepared, end)
                return
            prepared = self._prepared
            while prepared < end:
                prepared += os.pwrite(self._fd, ZEROS[: self._capacity - prepared], prepared)
            self._prepared = prepared
        except OSError as error:
            raise RegionIOError(error.errno, error.strerror, self._path) from error
        mapping[offset:end] = data

    # --- the verbs -----------------------------------------------------------------------------------------------

    def write(self, data: Buffer, engine: int) -> int:
        """Copy a C-contiguous buffer into a slot and return the slot's number."""
        try:
            mapping = self._owned.mapping
        except AttributeError:
            raise self._refusal() from None
        if _process[0] != self._process:
            raise self._refusal()
        size = len(data) if type(data) is bytes else _size(data)
        if not 0 <= engine <= 255:
            raise ValueError("engine must be from 0 to 255")
        if self._died:
            self._settle()

        # Where: the shortest hole that is long enough, or the mark (or a hole that touches it).
        length = (size + self._mask) & ~self._mask
        holes = self._holes
        place = bisect_left(holes, length << OFFSET_BITS) if holes else 0
        if place < len(holes):
            hole = holes[place]
            offset = hole & OFFSET_MASK
            end = offset + size
            if size < PWRITE_FROM:
                mapping[offset:end] = data
            else:
                self._store(mapping, offset, end, data)
            if length:  # else nothing is taken
                hole >>= OFFSET_BITS
                del holes[place], self._starts[offset], self._ends[offset + hole]
                if hole > length:
                    offset_of_rest = offset + length
                    hole -= length
                    insort(holes, (hole << OFFSET_BITS) + offset_of_rest)
                    self._starts[offset_of_rest] = self._ends[offset_of_rest + hole] = hole
        else:
            offset = self._mark if size else 0
            tail = self._ends.get(offset, 0) if holes else 0
            offset -= tail
            end = offset + size
            if end > self._capacity:
                self._grow(end)
            if end > self._prepared or size >= PWRITE_FROM:
                self._store(mapping, offset, end, data)
            else:
                mapping[offset:end] = data
            if tail:
                self._remove_hole(offset, tail)
            if size:
                self._mark = offset + length
                self._used_bytes = end

        self._live_bytes += size
        if self._freed:
            slot, old = self._freed.popitem()
            self._live[slot] = (offset, end, engine, old[3] + 1)
        else:
            slot = len(self._live)
            self._live[slot] = (offset, end, engine, 0)
        return slot

    def read(self, slot: int) -> memoryview:
        """Return a read-only view of a slot's bytes, which stay while it or anything made from it lives."""
        try:
            mapping = self._owned.mapping
        except AttributeError:
            raise self._refusal() from None
        if _process[0] != self._process:
            raise self._refusal()
        view = self._views.get(slot)
        if view is not None:
            return view[:]
        try:
            offset, end, _, _ = self._live[slot]
        except KeyError:
            raise self._missing(slot) from None
        pin = self._pinned.pop(slot)() if slot in self._pinned else None
        if pin is None:
            pin = self._new_pin(self._base)
            pin.mapping = mapping
        if len(self._views) >= KEPT_VIEWS:
            self._drop_views()
        view = self._views[slot] = memoryview(pin)[offset:end].toreadonly()
        return view[:]

    def read_bytes(self, slot: int) -> bytes:
        """Return a copy of a slot's bytes."""
        try:
            mapping = self._owned.mapping
            if _process[0] != self._process:
                raise self._refusal()
            offset, end, _, _ = self._live[slot]
        except AttributeError:
            raise self._refusal() from None
        except KeyError:
            raise self._missing(slot) from None
        return mapping[offset:end]

    def read_into(self, slot: int, buffer: Buffer) -> int:
        """Copy a slot's bytes to the start of a writable buffer and return their number."""
        try:
            mapping = self._owned.mapping
            if _process[0] != self._process:
                raise self._refusal()
            offset, end, _, _ = self._live[slot]
        except AttributeError:
            raise self._refusal() from None
        except KeyError:
            raise self._missing(slot) from None
        with memoryview(buffer) as view, memoryview(mapping) as source:
            if view.readonly or not view.c_contiguous:
                raise BufferError("the buffer must be writable and C-contiguous")
            if view.nbytes < end - offset:
                raise ValueError(f"slot {slot} has {end - offset} bytes, the buffer {view.nbytes}")
            if end > offset:
                view.cast("B")[: end - offset] = source[offset:end]
        return end - offset

    def free(self, slot: int) -> None:
        """Free a slot; its bytes may be reused when no view of them is left."""
        try:
            self._owned.mapping  # noqa: B018
            if _process[0] != self._process:
                raise self._refusal()
            entry = self._live.pop(slot)
        except AttributeError:
            raise self._refusal() from None
        except KeyError:
            raise self._missing(slot) from None
        self._freed[slot] = entry
        offset, end, _, _ = entry
        size = end - offset
        self._live_bytes -= size
        if size:
            length = (size + self._mask) & ~self._mask
            if not (self._views or self._pinned) or not self._is_pinned(slot, offset, length):
                self._release(offset, length)

    def slot(self, slot: int) -> TwinSlot:
        """Describe a slot, live or freed."""
        self._check()
        entry = self._live.get(slot)
        occupied = entry is not None
        if entry is None:
            entry = self._freed.get(slot)
        if entry is None:
            raise self._missing(slot)
        offset, end, engine, generation = entry
        return TwinSlot(offset, end - offset, engine, generation + (not occupied), occupied)

    def close(self) -> None:
        """Close the file; live views stay readable."""
        if self._closed:
            return
        self._check()
        self._closed = True
        self._owned = _Owned()
        self._views.clear()
        self._close_file()

    @property
    def path(self) -> str:
        """The file."""
        return self._path

    @property
    def capacity(self) -> int:
        """Bytes of file."""
        self._check()
        return self._capacity

    @property
    def max_capacity(self) -> int:
        """The most bytes of file."""
        self._check()
        return self._max_capacity

    @property
    def used_bytes(self) -> int:
        """End of the furthest byte ever allocated."""
        self._check()
        return self._used_bytes

    @property
    def live_bytes(self) -> int:
        """Sum of the sizes of the live values."""
        self._check()
        return self._live_bytes

    @property
    def slot_count(self) -> int:
        """Slots ever given out, live or freed."""
        self._check()
        return len(self._live) + len(self._freed)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def __len__(self) -> int:
        self._check()
        return len(self._live)

    def __contains__(self, slot: object) -> bool:
        self._check()
        return slot in self._live

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._close_file()

    # --- free space ----------------------------------------------------------------------------------------------

    def _release(self, offset: int, length: int) -> None:
        """Turn an extent into a hole, joined with its free neighbours."""
        if self._holes:
            after = self._starts.get(offset + length)
            if after:
                self._remove_hole(offset + length, after)
                length += after
            before = self._ends.get(offset)
            if before:
                offset -= before
                self._remove_hole(offset, before)
                length += before
        insort(self._holes, (length << OFFSET_BITS) + offset)
        self._starts[offset] = self._ends[offset + length] = length

    def _remove_hole(self, offset: int, length: int) -> None:
        del self._holes[bisect_left(self._holes, (length << OFFSET_BITS) + offset)]
        del self._starts[offset], self._ends[offset + length]

    # --- pins ----------------------------------------------------------------------------------------------------

    def _is_pinned(self, slot: int, offset: int, length: int) -> bool:
        """Whether a view of a slot lives; if so, have its extent released when the last one dies."""
        view = self._views.pop(slot, None)
        if view is not None:
            tell = weakref.ref(view.obj)
            del view  # the pin dies here if nobody else has a view
        else:
            found = self._pinned.pop(slot, None)
            if found is None:
                return False
            tell = found
        pin = tell()
        if pin is None:
            return False
        # The callback knows the deque only: it may run on any thread, and must not keep the region.
        tell = weakref.ref(pin, self._died.append)
        self._waiting[id(tell)] = (tell, offset, length)
        return True

    def _settle(self) -> None:
        """Release the freed extents whose pin has died."""
        while self._died:
            _, offset, length = self._waiting.pop(id(self._died.popleft()))
            self._release(offset, length)

    def _drop_views(self) -> None:
        """Forget the kept views, but not the pins that live on without them."""
        pinned = [(slot, weakref.ref(view.obj)) for slot, view in self._views.items()]
        pinned += self._pinned.items()
        self._views.clear()
        self._pinned = {slot: pin for slot, pin in pinned if pin() is not None}

    # --- refusals ------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        try:
            self._owned.mapping  # noqa: B018
        except AttributeError:
            raise self._refusal() from None
        if _process[0] != self._process:
            raise self._refusal()

    def _refusal(self) -> RegionError:
        if self._closed:
            return RegionClosedError(f"{self._path}: the region is closed")
        return WrongThreadError(f"{self._path}: only the thread and process that opened the region may use it")

    def _missing(self, slot: int) -> Exception:
        if not isinstance(slot, int):
            return TypeError(f"a slot is an int, not {type(slot).__name__}")
        return InvalidSlotError(slot, "has been freed" if slot in self._freed else "never existed")


def _size(data: Buffer) -> int:
    """Bytes of a C-contiguous buffer."""
    with memoryview(data) as view:
        if not view.c_contiguous:
            raise BufferError("the buffer must be C-contiguous")
        return view.nbytes


def _has_data(fd: int) -> bool:
    try:
        os.lseek(fd, 0, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return False
        raise
    return True


def _is_marked(fd: int) -> bool:
    try:
        return os.getxattr(fd, MARKER) == b"1"
    except OSError:
        return False


def _mark_file(fd: int) -> None:
    try:
        os.setxattr(fd, MARKER, b"1")
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
