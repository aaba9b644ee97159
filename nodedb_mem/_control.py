"""The control plane of a region: opening, maintenance, figures, the end. It goes through cffi; values do not."""

from __future__ import annotations

import os
from contextlib import suppress
from operator import index
from typing import TYPE_CHECKING, NoReturn, Self

from nodedb_mem._core import ffi, lib
from nodedb_mem._opening import UNLIMITED, open_region, warn_of_locking
from nodedb_mem.engine import KNOWN_ENGINES
from nodedb_mem.errors import RegionSizeError, WrongThreadError, control, error_of
from nodedb_mem.stats import Compaction, EngineUsage, RegionStats

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Protocol

    from nodedb_mem.errors import Where
    from nodedb_mem.refs import SlotParts

    class Info(Protocol):
        """An `ndm_info`."""

        capacity: int
        max_capacity: int
        used_bytes: int
        live_bytes: int
        slot_count: int
        live_slots: int
        alignment: int


_NO_LIMIT = (1 << 63) - 1
_info = lib.control_info
_PLAIN_FIGURES = tuple(RegionStats.__dataclass_fields__.keys() - {"can_punch", "engines"})


def _refusal(details: int, where: Where) -> Exception:
    """Give the exception for what `control_info` returned."""
    if details < 0:
        return MemoryError("no memory for the details of a refusal")
    try:
        return error_of(ffi.buffer(ffi.cast("ndm_error *", details))[:], where)
    finally:
        lib.control_forget(details)


class RegionControl:
    """What `OverflowRegion` does without naming a slot or touching a value."""

    _out: Info

    __slots__ = (
        "__weakref__",
        "_alignment",
        "_engines",
        "_handle",
        "_holder",
        "_out",
        "_parts",
        "_path",
        "_place",
        "_warned",
        "_where",
    )

    def _open(self, path: str | None, place: str, options: memoryview) -> None:
        """Open the file at `place`; or an unnamed one in that folder, where `path` is None."""
        shown = os.fsdecode(os.fsencode(place if path is None else path))  # of a class derived from str: str
        where = ("region", shown) if path is None else ("region", shown, shown + ".slots", shown + ".leases")
        if hasattr(self, "_holder"):
            raise RuntimeError(f"{shown}: a region is initialised once: make another")
        out = ffi.new("ndm_info *")  # before the file is opened: there may be no memory
        holder = open_region(place, options, where, temporary=path is None)
        try:
            # The holder owns the region, and each use of the handle keeps the holder.
            handle = ffi.from_buffer("ndm_region *", holder)
            if details := _info(handle, out):
                raise _refusal(details, where)
            if hasattr(self, "_holder"):
                raise RuntimeError(f"{shown}: a region is initialised once: make another")
            self._path, self._place, self._where = path, place, where
            self._engines: dict[int, int] = dict(KNOWN_ENGINES)
            self._parts: dict[int, tuple[int, SlotParts]] = {}
            limited = ffi.from_buffer("ndm_options *", options).cache_limit != UNLIMITED
            self._warned = bool(limited and lib.ndm_mappings_are_locked())  # of locking: by open_region()
            self._alignment: int = out.alignment
            self._out, self._handle, self._holder = out, handle, holder
        except BaseException:
            del holder  # the traceback would keep the file open
            handle = None
            raise

    def stats(self) -> RegionStats:
        """Figures of the region.

        Constant time but for `resident_bytes` and `unwritten_bytes`, which are linear in the pages that are in RAM.
        """
        out = ffi.new("ndm_stats *")
        control(lib.control_stats, self._where, self._handle, out)
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

    def trim(self, budget: int | None = None) -> int:
        """Give unused space back to the file system.

        Lowers `used_bytes` past free space at the end, shrinks the file to it (not below its size when opened; while
        readers are there the end becomes a hole instead), and punches holes into free extents of 64 KiB and more. On
        tmpfs and on overlays nothing is given back while readers are there. Linear in the number of values. If the
        system refuses half-way, what was given back stays so.

        Parameters
        ----------
        budget
            The most bytes of free space to go through in this call, so that it is short; the next call goes on from
            there. None for no limit.

        Returns
        -------
        int
            Bytes of disk given back. With a budget, 0 says that there is nothing left to give back.

        Raises
        ------
        RegionSizeError
            `budget` is negative (a `ValueError`).
        """
        if budget is None:
            return control(lib.control_trim, self._where, self._handle)
        return control(lib.control_trim_some, self._where, self._handle, _budget(budget))

    def compact(self, budget: int | None = None) -> Compaction:
        """Move values toward the start of the file, so that free space gathers at its end.

        Slots keep their numbers. Values with a live view stay where they are, and so do values larger than `budget`.
        Done when the holes are under 1 % of the live bytes. Give the space at the end back with `trim`.

        Without a budget the call goes through the file once. Where the values are not in RAM, a call with a budget
        does a piece of that, and the next call goes on from there. It reads at most 2 MiB and six times the budget
        from the disk, 512 KiB more or less, so it may move less than its budget.

        Parameters
        ----------
        budget
            The most bytes to move in this call; None for no limit.

        Raises
        ------
        RegionSizeError
            `budget` is negative (a `ValueError`).
        RegionIOError
            A hole that `trim` had punched cannot get its blocks back (ENOSPC). Every value is intact, and values that
            were moved so far stay where they are.
        """
        out = ffi.new("ndm_compaction *")
        control(lib.control_compact, self._where, self._handle, _NO_LIMIT if budget is None else _budget(budget), out)
        return Compaction(out.moved_bytes, out.remaining_bytes)

    def flush(self) -> None:
        """Wait until every value is written back to the disk. Raises `RegionIOError` if that failed: call it again."""
        control(lib.control_flush, self._where, self._handle)

    def close(self) -> None:
        """Close the region; closing again does nothing. Live views stay readable, and keep the file locked.

        A named file stays where it is. Other threads that are inside a verb come to its end first.
        """
        control(lib.control_close, self._where, self._handle)

    def release_ownership(self) -> None:
        """Hand the region over: this thread lets go of it, so that another of this process may `adopt` it.

        Until then every verb raises `WrongThreadError` on every thread. Nothing happens with ``ownership="process"``.
        """
        control(lib.control_release_ownership, self._where, self._handle)

    def adopt(self) -> None:
        """Become the owner: of a region that its owner has released, or whose owner's thread has ended.

        Adopting one's own region does nothing, nor does adopting one with ``ownership="process"``.

        Raises
        ------
        WrongThreadError
            The owner lives, and has not called `release_ownership` within a tenth of a second; or this is a forked
            child.
        """
        control(lib.control_adopt, self._where, self._handle)

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
        have to come from a thread that owns the region, like every verb.
        """
        return control(lib.control_handle, self._where, self._handle)

    @property
    def capacity(self) -> int:
        """The file's size in bytes."""
        return self._figures().capacity

    @property
    def max_capacity(self) -> int:
        """The most the file may grow to, in bytes. It may be raised, not lowered (`RegionSizeError`).

        The file is larger than that if it was when it was opened; then it does not grow.
        """
        return self._figures().max_capacity

    @max_capacity.setter
    def max_capacity(self, value: int) -> None:
        size = index(value)
        if not 0 <= size < 1 << 63:
            raise RegionSizeError("max_capacity must be positive and below 2**63")
        control(lib.control_max_capacity, self._where, self._handle, size)

    @property
    def used_bytes(self) -> int:
        """End of the furthest byte ever allocated: the high-water mark."""
        return self._figures().used_bytes

    @property
    def live_bytes(self) -> int:
        """Sum of the sizes of live values."""
        return self._figures().live_bytes

    @property
    def slot_count(self) -> int:
        """Entries of the slot table, live or freed."""
        return self._figures().slot_count

    def __len__(self) -> int:
        """Count the live slots."""
        return self._figures().live_slots

    def __bool__(self) -> bool:
        """A region is true, also when it is empty."""
        return True

    def __enter__(self) -> Self:
        """Give the region itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the region; not where another thread owns it, or in a forked child."""
        with suppress(WrongThreadError):
            self.close()

    def __repr__(self) -> str:
        """Name the file, and the figures where they may be asked for."""
        where = self._where[1] if self._path is not None else f"temporary in {self._where[1]}"
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

    def _figures(self) -> Info:
        """The region's `ndm_info`. An owner's next call fills it anew, on another thread perhaps: read one figure."""
        out = self._out
        if details := _info(self._handle, out):
            raise _refusal(details, self._where)
        return out

    def _warn_if_locked(self) -> None:
        """Warn, once, that nothing can be dropped from RAM."""
        if not self._warned and lib.ndm_region_is_locked(self._handle) > 0:
            self._warned = True
            warn_of_locking(self._where)

    def _allow_leases(self) -> None:
        control(lib.control_allow_leases, self._where, self._handle)


def _budget(budget: int) -> int:
    """Check how much a call may do."""
    size = index(budget)
    if size < 0:
        raise RegionSizeError("budget must not be negative")
    return min(size, _NO_LIMIT)
