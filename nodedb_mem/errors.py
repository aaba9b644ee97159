"""`MemError` and its family, and the one function that turns a refusal of the C core into an exception.

The extension calls that function for whatever the core refuses to it; `check` does for what goes through cffi.
"""

import os
from pathlib import Path
from typing import Any, NoReturn

from nodedb_mem import _memory
from nodedb_mem._core import ffi, lib

#: Of what an error message speaks: "region" or "reader", the path of its file, and those of its slot table and leases
#: where they have paths.
Where = tuple[str, ...]


_UNKNOWN = (1 << 64) - 1


class MemError(Exception):
    """Base of every error that this package defines."""


class RegionError(MemError):
    """Base of the errors of an overflow region."""


class InvalidSlotError(RegionError, LookupError):
    """The slot never existed, or has been freed, or (for readers) is allocated, but not committed yet.

    Attributes
    ----------
    slot : int or None
        None where the core does not know which.
    reason : str
        "never existed", "has been freed" or "is not committed yet".
    """

    def __init__(self, slot: int | None, reason: str = "never existed") -> None:
        super().__init__(slot, reason)
        self.slot = slot
        self.reason = reason

    def __str__(self) -> str:
        return f"{'the slot' if self.slot is None else f'slot {self.slot}'} {self.reason}"


class RegionSizeError(RegionError, ValueError):
    """A size, a capacity or an alignment is outside its range."""


class RepeatedSlotError(RegionError, ValueError):
    """A slot is listed twice where each may be named once.

    Attributes
    ----------
    slot : int
    """

    def __init__(self, slot: int) -> None:
        super().__init__(slot)
        self.slot = slot

    def __str__(self) -> str:
        return f"slot {self.slot} is listed twice"


class _NoRoom:
    """What a region had, when a verb found no room in it. Each figure is None where the core did not say."""

    free_bytes: int | None = None
    largest_free_bytes: int | None = None
    pinned_bytes: int | None = None
    views: int | None = None
    disk_free: int | None = None
    #: Where a mapping of objects found no room: the key whose value did not go to the region.
    key: object = None

    def _note_space(self, error: Any) -> None:
        if error.space_known:
            self.free_bytes = error.free_bytes
            self.largest_free_bytes = error.largest_free_bytes
            self.pinned_bytes = error.pinned_bytes
            self.views = error.views
            self.disk_free = None if error.disk_free == _UNKNOWN else error.disk_free

    def _space(self) -> str:
        """Say it in words, to follow the message."""
        if self.free_bytes is None:
            return ""
        parts = [f"{self.free_bytes} bytes are free in the region, {self.largest_free_bytes} of them together"]
        if self.pinned_bytes:
            by = f"{self.views} live views" if self.views != 1 else "1 live view"
            parts.append(f"{self.pinned_bytes} freed bytes are pinned by {by if self.views else 'leases'}")
        if self.disk_free is not None:
            parts.append(f"the disk has {self.disk_free} bytes left")
        return f" ({'; '.join(parts)})"


class CapacityExceededError(_NoRoom, RegionError):
    """The region would have to grow past its ceiling.

    Attributes
    ----------
    required : int
        Capacity that the request needs, in bytes.
    max_capacity : int
        The ceiling in force, in bytes.
    free_bytes, largest_free_bytes : int or None
        Bytes that are free below `used_bytes`, and how many of them lie together. `compact` gathers them.
    pinned_bytes, views : int or None
        Bytes of freed values that are kept, and the live views that keep them; leases keep the others.
    disk_free : int or None
        Bytes that the file system has left for this user.
    """

    def __init__(self, required: int, max_capacity: int) -> None:
        super().__init__(required, max_capacity)
        self.required = required
        self.max_capacity = max_capacity

    def __str__(self) -> str:
        return f"{self.required} bytes are required, max_capacity is {self.max_capacity}{self._space()}"


class WrongThreadError(RegionError):
    """The call came from a thread or process that does not own the region."""


class RegionClosedError(RegionError):
    """The region is closed."""


class RegionBusyError(RegionError):
    """Another region holds the file, or views of a closed one do; or readers are kept out of the slot table.

    Attributes
    ----------
    path : str
    holders : tuple of int
        Process ids that hold the file as regions do, as far as they may be seen. From a reader: those that keep readers
        out.
    readers : tuple of int
        Process ids that only read it. They keep a new region off where the file system punches no holes, or where they
        have locked a file, which an `OverflowReader` never does in a way that keeps a region off.
    children : tuple of int
        Those of the holders that have no descriptor of the file: forked children of an owner, by views that they
        inherited. Such a child lets go when its last view of the region is gone, or when it ends.
    """

    def __init__(
        self, path: str, holders: tuple[int, ...] = (), readers: tuple[int, ...] = (), children: tuple[int, ...] = ()
    ) -> None:
        super().__init__(path, holders, readers, children)
        self.path = path
        self.holders = tuple(sorted({*holders, *children}))
        self.readers = readers
        self.children = children

    def __str__(self) -> str:
        who = _list(self.holders) or "a process that cannot be seen from here"
        if self.readers and not self.holders:
            who = f"its readers ({_list(self.readers)}), or {who}"
        here = " (this one: a region, or live views of a closed one)" if os.getpid() in self.holders else ""
        forked = ""
        if self.holders and self.holders == self.children:
            forked = (
                " (forked from its owner: views that it inherited keep the file until they are dropped, or it ends)"
            )
        return f"{self.path}: held by {who}{here}{forked}"


class StaleSlotError(RegionError):
    """A reference names a value that is no longer there."""


class RegionIOError(_NoRoom, RegionError, OSError):
    """The system refused: a full disk, a size limit, a permission. `errno` and `filename` as in `OSError`.

    Where a write finds no block on the disk (ENOSPC, EDQUOT), `free_bytes`, `largest_free_bytes`, `pinned_bytes`,
    `views` and `disk_free` are as in `CapacityExceededError`. They are None otherwise.
    """

    def __str__(self) -> str:
        return OSError.__str__(self) + self._space()


class UndecodableError(MemError, ValueError):
    """The bytes are no encoded object, or are cut off or damaged, or what they name cannot be had here."""


#: Engines, and the bytes that they hold: the three largest.
Holders = tuple[tuple[int, int], ...]


def _held_by(holders: Holders) -> str:
    return f" (most is held by {', '.join(f'{engine}: {size}' for engine, size in holders)})" if holders else ""


class BudgetExhaustedError(MemError):
    """An engine asked for more than its budget has left.

    Attributes
    ----------
    engine : int
    requested, available, limit : int
        In bytes. What waiters are to have first is not available.
    holders : tuple of (engine, bytes)
        The three engines that hold most.
    """

    def __init__(self, engine: int, requested: int, available: int, limit: int, holders: Holders = ()) -> None:
        super().__init__(engine, requested, available, limit, holders)
        self.engine = engine
        self.requested = requested
        self.available = available
        self.limit = limit
        self.holders = holders

    def __str__(self) -> str:
        return (
            f"engine {self.engine} asked for {self.requested} bytes, "
            f"{self.available} of its {self.limit} are available{_held_by(self.holders)}"
        )


class GlobalCeilingExceededError(MemError):
    """All engines together would exceed the ceiling; or all spillable engines, what the headroom leaves of it.

    Attributes
    ----------
    allocated, ceiling, requested : int
        In bytes. What waiters are to have first counts as allocated.
    holders : tuple of (engine, bytes)
        The three engines that hold most.
    """

    def __init__(self, allocated: int, ceiling: int, requested: int, holders: Holders = ()) -> None:
        super().__init__(allocated, ceiling, requested, holders)
        self.allocated = allocated
        self.ceiling = ceiling
        self.requested = requested
        self.holders = holders

    def __str__(self) -> str:
        asked = f"{self.requested} bytes asked for"
        return f"{asked}, {self.allocated} of {self.ceiling} are allocated{_held_by(self.holders)}"


class UnknownEngineError(MemError):
    """The governor has no budget for the engine.

    Attributes
    ----------
    engine : int
    holders : tuple of (engine, bytes)
        The three engines that hold most.
    """

    def __init__(self, engine: int, holders: Holders = ()) -> None:
        super().__init__(engine, holders)
        self.engine = engine
        self.holders = holders

    def __str__(self) -> str:
        return f"engine {self.engine} has no budget{_held_by(self.holders)}"


class GovernorIOError(MemError, OSError):
    """The file of a shared governor cannot be used. `errno` and `filename` as in `OSError`.

    EINVAL: it is not the file of a governor, or of another version. EUCLEAN: it was cut short, or its counters
    contradict each other. EPERM: it belongs to another user. EAGAIN: it has no room for another process, or for
    another waiter. ETIMEDOUT: a process that was stopped has the lock on it.
    """


def _list(pids: tuple[int, ...]) -> str:
    return ", ".join(f"process {pid}" for pid in pids)


def users_of(path: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Process ids that use the file at `path`: those that may write to it, those that only read it, those that map it.

    The last have it mapped for writing, and not open: forked children with views that they inherited. All as far as
    /proc shows them to this user.
    """
    try:
        wanted = os.stat(path)
    except OSError:
        return (), (), ()
    writers: list[int] = []
    readers: list[int] = []
    mappers: list[int] = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        modes = {_may_write(entry) for entry in _entries(process / "fd") if _is_open_as(entry, wanted)}
        if modes:
            (writers if True in modes else readers).append(int(process.name))
        elif _maps_for_writing(process, wanted):
            mappers.append(int(process.name))
    return tuple(sorted(writers)), tuple(sorted(readers)), tuple(sorted(mappers))


def _maps_for_writing(process: Path, wanted: os.stat_result) -> bool:
    device = f"{os.major(wanted.st_dev):02x}:{os.minor(wanted.st_dev):02x}"
    try:
        with open(process / "maps", encoding="utf-8", errors="surrogateescape") as maps:
            fields = (line.split(maxsplit=5) for line in maps)
            return any(f[3] == device and f[4] == str(wanted.st_ino) and f[1].startswith("rw") for f in fields)
    except OSError:
        return False


def _flock_holders(path: str) -> tuple[int, ...]:
    """Process ids that hold the file at `path` locked as a whole, as far as they may be seen."""
    try:
        facts = os.stat(path)
        locks = Path("/proc/locks").read_text().split("\n")
    except OSError:
        return ()
    device = f"{os.major(facts.st_dev):02x}:{os.minor(facts.st_dev):02x}:{facts.st_ino}"
    fields = [line.split() for line in locks]  # number, FLOCK, ADVISORY, WRITE, pid, device and inode, ...
    found = {int(line[4]) for line in fields if line[1:4:2] == ["FLOCK", "WRITE"] and line[5] == device}
    return tuple(sorted(pid for pid in found if pid > 0))


def _may_write(descriptor: Path) -> bool:
    try:
        facts = (descriptor.parents[1] / "fdinfo" / descriptor.name).read_text()
    except OSError:  # just closed
        return False
    flags = next((line.split()[1] for line in facts.splitlines() if line.startswith("flags:")), "0")
    return int(flags, 8) & os.O_ACCMODE != os.O_RDONLY


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:  # another user's process, or one that has just ended
        return []


def _is_open_as(descriptor: Path, wanted: os.stat_result) -> bool:
    try:
        return os.path.samestat(descriptor.stat(), wanted)
    except OSError:
        return False


def error_of(details: bytes, where: Where = (), slot: int | None = None) -> Exception:
    """Return the exception that a refusal of the C core stands for.

    Parameters
    ----------
    details
        The bytes of its `ndm_error`.
    where
        What refused, for the message.
    slot
        The slot asked for, for the message; None where the core knows which of several it was.
    """
    error = ffi.from_buffer("ndm_error *", details)
    if slot is None and error.slot_known:
        slot = error.slot
    kind, path, *beside = where or ("region", None)
    file = beside[error.file - 1] if error.file != lib.NDM_FILE_DATA and beside else path
    message = ffi.string(error.message).decode() if error.message else ""
    match error.status:
        case lib.NDM_ERR_ARGUMENT if kind == "governor":
            return ValueError(message)
        case lib.NDM_ERR_ARGUMENT:
            return RegionSizeError(message) if slot is None else RepeatedSlotError(slot)
        case lib.NDM_ERR_NO_SLOT:
            return InvalidSlotError(slot, "never existed")
        case lib.NDM_ERR_FREED_SLOT:
            return InvalidSlotError(slot, "has been freed")
        case lib.NDM_ERR_UNCOMMITTED:
            return InvalidSlotError(slot, "is not committed yet")
        case lib.NDM_ERR_CAPACITY:
            full = CapacityExceededError(error.required, error.limit)
            full._note_space(error)
            return full
        case lib.NDM_ERR_WRONG_THREAD:
            return WrongThreadError(f"{path}: {message}" if kind == "reader" else message)
        case lib.NDM_ERR_CLOSED:
            return RegionClosedError(f"{path}: {message}" if kind == "reader" else message)
        case lib.NDM_ERR_BUSY if kind == "reader" and file:
            return RegionBusyError(file, _flock_holders(file))
        case lib.NDM_ERR_BUSY:
            writers, readers, children = users_of(file) if file else ((), (), ())
            if beside:  # a closed reader whose views live has the slot table open, no more
                readers = tuple(sorted({*readers, *users_of(beside[0])[1]} - {*writers}))
            return RegionBusyError(file or "", writers, readers, children)
        case lib.NDM_ERR_BUDGET:
            left = max(0, error.limit - error.allocated - error.waiting)
            return BudgetExhaustedError(error.engine, error.required, left, error.limit)
        case lib.NDM_ERR_CEILING:
            return GlobalCeilingExceededError(error.allocated + error.waiting, error.limit, error.required)
        case lib.NDM_ERR_ENGINE:
            return UnknownEngineError(error.engine)
        case lib.NDM_ERR_IO if kind == "governor":
            return GovernorIOError(error.os_errno, f"{message}: {os.strerror(error.os_errno)}", path)
        case lib.NDM_ERR_IO:
            code = error.os_errno
            refused = RegionIOError(code, f"{message}: {os.strerror(code)}", file)
            refused._note_space(error)
            return refused
        case lib.NDM_ERR_STALE:
            before = f"{path}: " if path else ""
            return StaleSlotError(f"{before}{message}" + ("" if slot is None else f" (slot {slot})"))
        case lib.NDM_ERR_MEMORY:
            return MemoryError(message)
        case status:
            return SystemError(f"nodedb_mem: unknown status {status}")


def raise_status(status: int, where: Where = ()) -> NoReturn:
    """Raise what a call on this thread has just returned: a negative `ndm_status`.

    For calls whose details were not taken along. Another failure may have come since: its details are not believed.
    """
    last = lib.ndm_last_error()
    details = ffi.new("ndm_error *", last[0] if last.status == status else {"status": status})
    raise error_of(ffi.buffer(details)[:], where)


def control(call: Any, where: Where, *arguments: Any) -> int:
    """Call a function of the control plane, and raise what it refuses; its details come with the call."""
    refusal = ffi.new("ndm_error *")
    result: int = call(*arguments, refusal)
    if result < 0:
        raise error_of(ffi.buffer(refusal)[:], where)
    return result


_memory.translate_with(error_of)
