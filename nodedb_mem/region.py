"""`OverflowRegion`: the owner's side of an overflow file."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from contextlib import suppress
from operator import index
from typing import TYPE_CHECKING, Any, NoReturn, Self

from nodedb_mem import _memory
from nodedb_mem._core import ffi, lib
from nodedb_mem._memory import CoreError
from nodedb_mem.engine import KNOWN_ENGINES, EngineId
from nodedb_mem.errors import InvalidSlotError, RepeatedSlotError, details_of, error_of
from nodedb_mem.reader import SlotRef
from nodedb_mem.refs import SlotParts
from nodedb_mem.stats import Compaction, EngineUsage, OverflowSlot, RegionStats
from nodedb_mem.tuning import (
    DEFAULT_ALIGNMENT,
    DEFAULT_CACHE_LIMIT,
    DEFAULT_INITIAL_CAPACITY,
    DEFAULT_MAX_CAPACITY,
    MemoryTuning,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

    from typing_extensions import Buffer

    Slots = Iterable[int] | Buffer  # slot numbers, or a buffer of int64

_from_buffer = ffi.from_buffer
_write = _memory.write
_read = _memory.read
_read_bytes = _memory.read_bytes
_free = _memory.free

_NO_LIMIT = (1 << 63) - 1
_UNLIMITED = (1 << 64) - 1
_INT64 = frozenset({"q", "l", "<q", "<l"})  # ctypes names the byte order

_PLAIN_FIGURES = tuple(RegionStats.__dataclass_fields__.keys() - {"can_punch", "engines"})


class OverflowRegion:
    """One overflow file and its mapping, owned by the thread that opens it.

    Every verb raises `WrongThreadError` on any other thread and in a forked child, and `RegionClosedError` after
    `close`. Only `path`, `closed`, `repr` and `with` work everywhere. When an error is raised, nothing has been
    changed.

    Parameters
    ----------
    path
        The file to create or open (mode 0600; symlinks are refused). Beside it, `path` + ".slots" holds the slot
        table. A file left by an earlier region keeps its size as capacity and starts empty; only bytes that a living
        reader leases stay pinned.
    initial_capacity
        Size of a new file, in bytes.
    max_capacity
        The most the file may grow to, in bytes.
    alignment
        Of the start of every value, in bytes: a power of two, 1 to 4096. 1 packs values without gaps.
    cache_limit
        The most bytes of the file that may stay in RAM, page cache and RSS together: beyond, a background thread of the
        core writes the oldest to disk and drops them. 0: as little as possible, about 4 MiB. Views that are in use may
        hold more. Under any limit the pages of values of 64 KiB and more leave the RSS with their last view. None: no
        limit, and pages that were read stay mapped, so that reading them again costs no faults; to keep the RSS low
        all the same, set a limit larger than the file. Without effect on tmpfs, which has no other place than RAM.
    recover
        Keep the values of an earlier region, whose owner closed it or was killed, under their slots; references to them
        stay good, and its alignment holds. A value being written when the owner died is not among them. Values survive
        the death of the process, not that of the machine.

    Warns
    -----
    ResourceWarning
        The file is on tmpfs: what is spilled there stays in RAM.

    Raises
    ------
    ValueError
        A size or the alignment is outside its range.
    RegionBusyError
        The file is held by another region, in this process or another.
    CapacityExceededError
        The file is already larger than `max_capacity`.
    RegionIOError
        The system refused, or the path is not a regular file (EINVAL), or holds data that no region wrote (EEXIST), or
        the slot table is cut off or, to be recovered, torn (EUCLEAN), or is of a newer version or, to be recovered, of
        another one (EINVAL).
    """

    __slots__ = (
        "__weakref__",
        "_absolute",
        "_alignment",
        "_beside",
        "_engines",
        "_handle",
        "_holder",
        "_parts",
        "_path",
        "_where",
    )

    _handle: Any

    def __init__(
        self,
        path: str | bytes | os.PathLike[str] | os.PathLike[bytes],
        *,
        initial_capacity: int = DEFAULT_INITIAL_CAPACITY,
        max_capacity: int = DEFAULT_MAX_CAPACITY,
        alignment: int = DEFAULT_ALIGNMENT,
        cache_limit: int | None = DEFAULT_CACHE_LIMIT,
        recover: bool = False,
    ) -> None:
        name = os.fsdecode(path)
        # A later chdir() must not lead share() elsewhere.
        absolute = os.path.join(os.getcwd(), name) if name else ""
        self._open(name, absolute, initial_capacity, max_capacity, alignment, cache_limit, recover=recover)

    def _open(
        self,
        path: str | None,
        where: str,
        initial: int,
        maximum: int,
        alignment: int,
        cache_limit: int | None,
        *,
        recover: bool = False,
    ) -> None:
        """Open the file at `where`; or an unnamed one in that folder, where `path` is None."""
        name = os.fsencode(where)
        if b"\0" in name:
            raise ValueError("embedded null byte in the path")
        sizes = [index(initial), index(maximum), index(alignment)]
        if not all(0 <= size < 1 << 63 for size in sizes):
            raise ValueError("capacities and alignment must be positive and below 2**63")
        limit = _UNLIMITED if cache_limit is None else index(cache_limit)
        if limit < 0:
            raise ValueError("cache_limit must not be negative")
        shown = where if path is None else path
        beside = None if path is None else (shown + ".slots", shown + ".leases")
        if hasattr(self, "_holder"):
            raise RuntimeError(f"{shown}: a region is initialised once: make another")
        if lib.ndm_path_in_memory(name):
            message = f"{shown} is on tmpfs: what is spilled there stays in RAM"
            warnings.warn(message, ResourceWarning, stacklevel=_outside_stacklevel())
        try:
            holder = _memory.open_region(name, path is None, *sizes, min(limit, _UNLIMITED), bool(recover))
        except CoreError as caught:
            raise _error_of(caught, path=shown, beside=beside) from None
        try:
            # The holder owns the region, and each use of the handle keeps the holder.
            handle = _from_buffer("ndm_region *", holder)
            if recover:  # the alignment of the file holds
                figures = ffi.new("ndm_stats *")
                if (status := lib.ndm_region_stats(handle, figures)) < 0:
                    raise error_of(status, path=shown, beside=beside)
                sizes[2] = figures.alignment
            if hasattr(self, "_holder"):
                raise RuntimeError(f"{shown}: a region is initialised once: make another")
            self._path, self._absolute, self._where, self._beside = path, where, shown, beside
            self._engines: dict[int, int] = KNOWN_ENGINES
            self._parts: dict[int, tuple[int, SlotParts]] = {}
            self._alignment = sizes[2]
            self._handle, self._holder = handle, holder
        except BaseException:
            del holder  # the traceback would keep the file open
            handle = None
            raise

    @classmethod
    def open(
        cls,
        path: str | bytes | os.PathLike[str] | os.PathLike[bytes],
        *,
        initial_capacity: int = DEFAULT_INITIAL_CAPACITY,
        max_capacity: int = DEFAULT_MAX_CAPACITY,
        alignment: int = DEFAULT_ALIGNMENT,
        cache_limit: int | None = DEFAULT_CACHE_LIMIT,
        recover: bool = False,
    ) -> Self:
        """Create or open the region at `path`; the same as calling the class."""
        return cls(
            path,
            initial_capacity=initial_capacity,
            max_capacity=max_capacity,
            alignment=alignment,
            cache_limit=cache_limit,
            recover=recover,
        )

    @classmethod
    def open_with_capacity(cls, path: str | os.PathLike[str], initial: int) -> Self:
        """Open with an initial capacity in bytes. The ceiling is the default, or `initial` where that is more."""
        return cls(path, initial_capacity=initial, max_capacity=max(index(initial), DEFAULT_MAX_CAPACITY))

    @classmethod
    def open_with_config(cls, path: str | os.PathLike[str], initial: int, maximum: int) -> Self:
        """Open with an initial capacity and a ceiling, both in bytes."""
        return cls(path, initial_capacity=initial, max_capacity=maximum)

    @classmethod
    def open_with_tuning(cls, path: str | os.PathLike[str], tuning: MemoryTuning) -> Self:
        """Open with the sizes of a `MemoryTuning`."""
        if not isinstance(tuning, MemoryTuning):
            raise TypeError(f"a MemoryTuning is needed, not {type(tuning).__name__!r}")
        return cls(path, initial_capacity=tuning.overflow_initial_bytes, max_capacity=tuning.overflow_max_bytes)

    @classmethod
    def temporary(
        cls,
        directory: str | bytes | os.PathLike[str] | os.PathLike[bytes] | None = None,
        *,
        initial_capacity: int = DEFAULT_INITIAL_CAPACITY,
        max_capacity: int = DEFAULT_MAX_CAPACITY,
        alignment: int = DEFAULT_ALIGNMENT,
        cache_limit: int | None = DEFAULT_CACHE_LIMIT,
    ) -> Self:
        """Open a region on an unnamed file, which leaves nothing behind however the process ends.

        Parameters
        ----------
        directory
            Where its blocks are taken from; by default the directory for temporary files. On many systems that is
            a tmpfs, which keeps them in RAM.
        initial_capacity, max_capacity, alignment, cache_limit
            As for the class.
        """
        region = cls.__new__(cls)
        folder = os.fsdecode(tempfile.gettempdir() if directory is None else directory)
        region._open(None, folder, initial_capacity, max_capacity, alignment, cache_limit)
        return region

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
        TypeError, BufferError
            `data` is no buffer; it is not C-contiguous.
        ValueError
            `engine` is not 0 to 255.
        CapacityExceededError
            The file would have to grow past `max_capacity`.
        RegionIOError
            The disk is full (ENOSPC), or the system refused otherwise.
        """
        if engine.__class__ is not EngineId:
            self._learn_engine(engine)
        try:
            return _write(self._holder, data, engine)
        except CoreError as caught:
            raise self._error(caught) from None

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
            The slot's number. `parts` tells where its parts are.

        Raises
        ------
        ValueError
            There are no buffers.
        TypeError, BufferError, ValueError, CapacityExceededError, RegionIOError
            As for `write`.
        """
        if engine.__class__ is not EngineId:
            self._learn_engine(engine)
        written = None
        try:
            written = _memory.write_vectored(self._holder, buffers, engine, aligned)
            slot, (generation, sizes) = written
            self._parts[slot] = generation, SlotParts.layout(sizes, self._alignment if aligned else 1)
        except CoreError as caught:
            raise self._error(caught) from None
        except BaseException:
            if written is not None:
                with suppress(CoreError):
                    _free(self._holder, written[0])
            raise
        return slot

    def parts(self, slot: int) -> SlotParts:
        """Tell where the parts of a live slot lie in its value: one part, unless `write_vectored` wrote it.

        The layout is the region object's knowledge, not the file's.
        """
        slot = index(slot)
        facts = self._facts(slot)
        if not facts.occupied:
            raise InvalidSlotError(slot, "has been freed")
        generation, layout = self._parts.get(slot, (None, None))
        return layout if layout and generation == facts.generation else SlotParts((0,), (facts.size,))

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
        if engine.__class__ is not EngineId:
            self._learn_engine(engine)
        if lengths is not None:
            return self._write_packed(buffers, lengths, engine)  # type: ignore[arg-type]
        try:
            return _memory.write_many(self._holder, buffers, engine)
        except CoreError as caught:
            raise self._error(caught) from None

    def _write_packed(self, data: Buffer, lengths: Buffer, engine: int) -> memoryview:
        sizes = _int64_array(lengths)
        source = _exported(data)
        room, count = len(source), len(sizes)
        slots = memoryview(bytearray(8 * count)).cast("q")
        target = _from_buffer("int64_t[]", slots)
        status = lib.ndm_region_write_packed(self._handle, source, room, sizes, count, engine, target)
        refusal = _refusal(status)
        del source, target  # or the exception's traceback would keep the buffer exported
        if status == lib.NDM_ERR_ARGUMENT:
            _check_lengths(ffi.unpack(sizes, count), room)
        if refusal:
            raise self._error(refusal)
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
        ValueError
            `size` is negative, or `engine` is not 0 to 255.
        CapacityExceededError, RegionIOError
            As for `write`; EOPNOTSUPP on a file system (btrfs) where a store might find no block.
        """
        if engine.__class__ is not EngineId:
            self._learn_engine(engine)
        length = index(size)
        if not 0 <= length < 1 << 63:
            raise ValueError("size must not be negative, and below 2**63")
        try:
            return _memory.allocate(self._holder, length, engine)
        except CoreError as caught:
            raise self._error(caught) from None

    def commit(self, slot: int) -> None:
        """Declare the value of an allocated slot complete. Its views stay writable, but should be left alone now."""
        self._slot_call(lib.ndm_region_commit, slot)

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
        try:
            return _memory.restore(self._holder, slot)
        except CoreError as caught:
            raise self._error(caught, slot) from None

    def read_many(self, slots: Slots) -> list[memoryview]:
        """View many values, as `read` does, in one call; all or none. `slots` may be a buffer of int64."""
        try:
            return _memory.read_many(self._holder, ffi.buffer(_slot_array(slots)))
        except CoreError as caught:
            raise self._error(caught) from None

    def read_many_into(self, slots: Slots, buffer: Buffer) -> memoryview:
        """Copy many values to a writable buffer, one after the other.

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
        wanted = _slot_array(slots)
        target = _exported(buffer, require_writable=True)
        lengths = memoryview(bytearray(8 * len(wanted))).cast("q")
        out = _from_buffer("int64_t[]", lengths)
        room = len(target)
        size = lib.ndm_region_load_many(self._handle, wanted, len(wanted), target, room, out)
        refusal = _refusal(size)
        del target, out
        if refusal:
            raise self._error(refusal)
        if size > room:
            raise ValueError(f"the values have {size} bytes, the buffer has room for {room}")
        return lengths

    def free_many(self, slots: Slots) -> None:
        """Free many slots in one call, all or none. `slots` may be a buffer of int64.

        Raises
        ------
        RepeatedSlotError
            A slot is listed twice (a `ValueError`, with `slot`); nothing has been freed.
        InvalidSlotError
            One of `slots` is no live slot; nothing has been freed.
        """
        wanted = _slot_array(slots)
        status = lib.ndm_region_free_many(self._handle, wanted, len(wanted))
        if status == lib.NDM_ERR_ARGUMENT:
            raise RepeatedSlotError(_first_repeated(wanted))
        self._check(status)
        if self._parts:
            for slot in wanted:
                self._parts.pop(slot, None)

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
        try:
            return _read(self._holder, slot)
        except CoreError as caught:
            raise self._error(caught, slot) from None

    def read_bytes(self, slot: int) -> bytes:
        """Copy a value out. Raises `InvalidSlotError` as `read` does."""
        try:
            return _read_bytes(self._holder, slot)
        except CoreError as caught:
            raise self._error(caught, slot) from None

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
        try:
            return _memory.read_into(self._holder, slot, buffer)
        except CoreError as caught:
            raise self._error(caught, slot) from None

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
        try:
            _free(self._holder, slot)
        except CoreError as caught:
            raise self._error(caught, slot) from None
        if layout and self._parts.get(slot) is layout:  # not that of a value written there meanwhile
            del self._parts[slot]

    def slot(self, slot: int) -> OverflowSlot:
        """Describe a slot, live or freed.

        Raises
        ------
        InvalidSlotError
            The slot never existed.
        """
        facts = self._facts(index(slot))
        engine = self._engines.get(facts.engine, facts.engine)
        return OverflowSlot(facts.offset, facts.size, engine, bool(facts.occupied))

    # -- the region -----------------------------------------------------------------------------------------------

    def stats(self) -> RegionStats:
        """Figures of the region.

        Constant time but for `resident_bytes` and `unwritten_bytes`, which are linear in the pages that are in RAM.
        """
        out = ffi.new("ndm_stats *")
        self._check(lib.ndm_region_stats(self._handle, out))
        usage = zip(ffi.unpack(out.engine_bytes, 256), ffi.unpack(out.engine_slots, 256), strict=True)
        figures = {name: getattr(out, name) for name in _PLAIN_FIGURES}
        return RegionStats(
            **figures,
            can_punch=bool(out.can_punch),
            engines={
                self._engines.get(engine, engine): EngineUsage(size, slots)
                for engine, (size, slots) in enumerate(usage)
                if slots
            },
        )

    def share(self, slot: int) -> SlotRef:
        """Make a reference to a value, for an `OverflowReader` in another thread or process.

        The reference is small and picklable. It names the value, not the slot: once the slot is freed, it is stale. For
        a temporary region it works while this process lives, for processes of the same user.

        Raises
        ------
        InvalidSlotError
            The slot never existed, or has been freed.
        RegionIOError
            The leases file cannot be made.
        """
        slot = index(slot)
        facts = self._facts(slot)
        shared = ffi.new("ndm_shared *")
        self._check(lib.ndm_region_allow_leases(self._handle))
        self._slot_call(lib.ndm_region_share, slot, shared)
        if self._path is None:
            owner = f"/proc/{os.getpid()}/fd"
            paths = f"{owner}/{shared.data}", f"{owner}/{shared.slots}", f"{owner}/{shared.leases}"
        else:
            path = self._absolute
            paths = path, path + ".slots", path + ".leases"
        return SlotRef(paths[0], shared.incarnation, slot, shared.generation, facts.size, *paths[1:])

    def trim(self) -> int:
        """Give unused space back to the file system.

        Lowers `used_bytes` past free space at the end, shrinks the file to it (not below its size when opened; while
        readers are there the end becomes a hole instead), and punches holes into free extents of 64 KiB and more.
        Linear in the number of values.

        Returns
        -------
        int
            Bytes of disk given back.
        """
        return self._check(lib.ndm_region_trim(self._handle))

    def compact(self, budget: int | None = None) -> Compaction:
        """Move values toward the start of the file, so that free space gathers at its end.

        Slots keep their numbers. Values with a live view stay where they are, and so do values larger than `budget`.
        Done when the holes are under 1 % of the live bytes. Give the space at the end back with `trim`.

        Parameters
        ----------
        budget
            The most bytes to move in this call; None for no limit.

        Raises
        ------
        ValueError
            `budget` is negative.
        RegionIOError
            A hole that `trim` had punched cannot get its blocks back (ENOSPC). Every value is intact.
        """
        limit = _NO_LIMIT if budget is None else index(budget)
        if limit < 0:
            raise ValueError("budget must not be negative")
        out = ffi.new("ndm_compaction *")
        self._check(lib.ndm_region_compact(self._handle, min(limit, _NO_LIMIT), out))
        return Compaction(out.moved_bytes, out.remaining_bytes)

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
        """
        if slots is None:
            self._check(lib.ndm_region_evict(self._handle, ffi.NULL, 0))
        else:
            wanted = _slot_array(slots)
            self._check(lib.ndm_region_evict(self._handle, wanted, len(wanted)))

    def flush(self) -> None:
        """Wait until every value is written back to the disk. Raises `RegionIOError` if that failed: call it again."""
        self._check(lib.ndm_region_flush(self._handle))

    def close(self) -> None:
        """Close the region; closing again does nothing. Live views stay readable, and keep the file locked.

        A named file stays where it is.
        """
        self._check(lib.ndm_region_close(self._handle))

    @property
    def path(self) -> str | None:
        """The file's path; None for a temporary region."""
        return self._path

    @property
    def closed(self) -> bool:
        """Whether `close` has been called."""
        return bool(lib.ndm_region_is_closed(self._handle))

    @property
    def handle(self) -> int:
        """A number that stands for the open region in native code (``ndm_h_write`` and the like): a uint64, not 0.

        It owns nothing: once the region is closed or collected, native calls on it return ``NDM_ERR_CLOSED``. They
        have to come from the owning thread, like every verb.
        """
        handle: int = lib.ndm_region_handle(self._handle)
        if handle == 0:
            self._raise(lib.ndm_last_error().status)
        return handle

    @property
    def capacity(self) -> int:
        """The file's size in bytes."""
        return self._check(lib.ndm_region_capacity(self._handle))

    @property
    def max_capacity(self) -> int:
        """The most the file may grow to, in bytes. It may be raised, not lowered (`ValueError`)."""
        return self._check(lib.ndm_region_max_capacity(self._handle))

    @max_capacity.setter
    def max_capacity(self, value: int) -> None:
        size = index(value)
        if not 0 <= size < 1 << 63:
            raise ValueError("max_capacity must be positive and below 2**63")
        self._check(lib.ndm_region_set_max_capacity(self._handle, size))

    @property
    def used_bytes(self) -> int:
        """End of the furthest byte ever allocated: the high-water mark."""
        return self._check(lib.ndm_region_used_bytes(self._handle))

    @property
    def live_bytes(self) -> int:
        """Sum of the sizes of live values."""
        return self._check(lib.ndm_region_live_bytes(self._handle))

    @property
    def slot_count(self) -> int:
        """Entries of the slot table, live or freed."""
        return self._check(lib.ndm_region_slot_count(self._handle))

    def __len__(self) -> int:
        """Count the live slots."""
        return self._check(lib.ndm_region_live_slots(self._handle))

    def __contains__(self, slot: object) -> bool:
        """Tell whether `slot` is the number of a live slot."""
        try:
            return bool(self._check(lib.ndm_region_contains(self._handle, index(slot))))  # type: ignore[arg-type]
        except (OverflowError, TypeError):
            return False

    def __bool__(self) -> bool:
        """A region is true, also when it is empty."""
        return True

    def __enter__(self) -> Self:
        """Give the region itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the region."""
        self.close()

    def __repr__(self) -> str:
        """Name the file, and the figures where they may be asked for."""
        where = self._path if self._path is not None else f"temporary in {self._where}"
        out = ffi.new("ndm_stats *")
        if self.closed:
            state = "closed"
        elif (status := lib.ndm_region_stats(self._handle, out)) < 0:
            state = (
                "owned by another thread or process"
                if status == lib.NDM_ERR_WRONG_THREAD
                else "its figures cannot be had"
            )
        else:
            state = f"{out.live_slots} slots, {out.live_bytes} of {out.capacity} bytes"
        return f"<{type(self).__name__} {where}: {state}>"

    def __reduce__(self) -> NoReturn:
        """Refuse: a region cannot be copied or pickled."""
        raise TypeError(f"cannot copy or pickle {type(self).__name__!r}: a region has one owner")

    # -- helpers --------------------------------------------------------------------------------------------------

    def _learn_engine(self, engine: int) -> None:
        """Remember an engine that is no `EngineId`, so that `slot` gives it back as it was given."""
        number = index(engine)
        if not 0 <= number <= 255:
            raise ValueError("engine must be 0 to 255")
        if engine.__class__ is not int and number not in KNOWN_ENGINES:
            self._engines = self._engines | {number: engine}

    def _facts(self, slot: int) -> Any:
        """The `ndm_slot` of a slot."""
        facts = ffi.new("ndm_slot *")
        self._slot_call(lib.ndm_region_slot, slot, facts)
        return facts

    def _slot_call(self, function: Any, slot: int, *more: Any) -> None:
        try:
            status = function(self._handle, index(slot), *more)
        except OverflowError:
            status = lib.NDM_ERR_NO_SLOT
        if status < 0:
            self._raise(status, slot)

    def _check(self, status: int) -> int:
        if status < 0:
            self._raise(status)
        return status

    def _raise(self, status: int, slot: int | None = None) -> NoReturn:
        raise error_of(status, path=self._where, slot=slot, beside=self._beside)

    def _error(self, refusal: CoreError, slot: int | None = None) -> Exception:
        number = None if slot is None else index(slot)
        return _error_of(refusal, path=self._where, slot=number, beside=self._beside)


def _refusal(status: int) -> CoreError | None:
    """What cffi's function has just refused, before anything else can be: CoreError, not raised, or None."""
    return CoreError(ffi.buffer(lib.ndm_last_error())[:]) if status < 0 else None


def _outside_stacklevel() -> int:
    """How many frames up the caller of this package stands."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__") == __name__:
        level, frame = level + 1, frame.f_back
    return level


def _error_of(refusal: CoreError, **where: Any) -> Exception:
    """What the refusal of a native verb means."""
    error = details_of(refusal)
    return error_of(error.status, error, **where)


def _exported(data: Buffer, *, require_writable: bool = False) -> Any:
    try:
        return _from_buffer(data, require_writable=require_writable)
    except ValueError as error:
        if "contiguous" in str(error):  # NumPy says it with a ValueError
            raise BufferError(str(error)) from None
        raise


def _check_lengths(lengths: list[int], size: int) -> None:
    """Say what is wrong with lengths that the core has refused."""
    for number, length in enumerate(lengths):
        if length < 0:
            raise ValueError(f"lengths[{number}] is negative: {length}")
    if (total := sum(lengths)) != size:
        raise ValueError(f"the lengths add up to {total} bytes, the buffer has {size}")


def _first_repeated(slots: Iterable[int]) -> int:
    seen: set[int] = set()
    for slot in slots:
        if slot in seen:
            return slot
        seen.add(slot)
    raise AssertionError


def _int64_array(data: Buffer) -> Any:
    try:
        view = memoryview(data)
    except TypeError:
        raise TypeError(f"a buffer of int64 is needed, not {type(data).__name__!r}") from None
    with view:
        if view.format not in _INT64 or view.itemsize != 8:
            raise TypeError(f"a buffer of int64 is needed, not of {view.format!r}")
        # A copy: the core reads it more than once, and another thread may write to `data` meanwhile.
        return _from_buffer("int64_t[]", view.tobytes())


def _slot_array(slots: Slots) -> Any:
    if isinstance(slots, list | tuple):
        numbers = slots
    else:
        try:
            return _int64_array(slots)  # type: ignore[arg-type]
        except TypeError:
            if isinstance(slots, bytes | bytearray | memoryview) or not hasattr(slots, "__iter__"):
                raise
            numbers = list(slots)  # type: ignore[arg-type]
    values = list(map(index, numbers))
    try:
        return ffi.new("int64_t[]", values)
    except OverflowError:
        raise InvalidSlotError(max(values, key=abs)) from None
