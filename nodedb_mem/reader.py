"""`OverflowReader`: the read-only side of a region, for other threads and processes."""

from __future__ import annotations

import os
from array import array
from contextlib import contextmanager, suppress
from operator import index
from typing import TYPE_CHECKING, NoReturn, Self

from nodedb_mem import _memory
from nodedb_mem._arrays import int64_copy, int64_room, slot_numbers
from nodedb_mem._core import ffi, lib
from nodedb_mem.engine import KNOWN_ENGINES
from nodedb_mem.errors import InvalidSlotError, RegionError, StaleSlotError, WrongThreadError, control
from nodedb_mem.refs import SlotRef
from nodedb_mem.stats import ReaderSlot, ReaderStats

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType

    from typing_extensions import Buffer

_read = _memory.read_shared
_read_bytes = _memory.read_shared_bytes

_UNKNOWN = (1 << 64) - 1


class Lease:
    """A value that stays where it is until `release`, or until nothing uses `view` any more, or this process ends.

    The owner's free does not end that, nor its death: whoever takes the file over with ``recover=True`` keeps what is
    leased. A default open of the path (``recover=False``) starts empty: it ends every value, so that from then on
    `OverflowReader.read`, `read_bytes`, `borrow` and `lease` raise `StaleSlotError`, through the reader that holds the
    lease as through others; but the bytes under `view` stay, and are pinned for the new owner, until `release`.

    `view` is the value, zero-copy and read-only. Works as a context manager.
    """

    __slots__ = ("_memory", "view")

    def __init__(self, view: memoryview) -> None:
        self.view = view
        self._memory = view.obj  # its end is the lease's

    def release(self) -> None:
        """End the lease; ending it again does nothing. The view may be overwritten from now on.

        Raises
        ------
        WrongThreadError
            This is a forked child: the lease belongs to the process that took it.
        """
        _memory.end_lease(self._memory)

    def __enter__(self) -> memoryview:
        """Give the view."""
        return self.view

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release; not in a forked child, where the block's exception is what counts."""
        with suppress(WrongThreadError):
            self.release()


class OverflowReader:
    """Read a region that another thread or process owns, without a lock on the owner's path.

    Opens the files for reading only: it can change nothing. It follows growth, trim, compact and a raised ceiling by
    itself, and may be used from every thread of the process that opened it.

    What it reads may be freed and overwritten meanwhile. `read_bytes` never gives torn bytes. `borrow` checks on
    leaving whether the view was true all along. `lease` keeps the value in place. A plain `read` is for values that the
    owner is known to keep.

    While the owner moves a value, a reader that wants it waits, for ten seconds at most, then raises `StaleSlotError`.
    Signals are heard meanwhile, and other threads may use the reader. If the owner died while it moved the value,
    `StaleSlotError` comes at once.

    Parameters
    ----------
    source
        The region's path, or a `SlotRef` into it.

    Raises
    ------
    ValueError
        The path holds a null byte.
    RegionIOError
        A file is missing (ENOENT) or may not be read, or is no region's, of another version or cut short (EINVAL),
        or torn (EUCLEAN), or the files are a copy that has lost its attribute or was made while the region was open
        (EUCLEAN).
    RegionBusyError
        The slot table was locked against readers for ten seconds. An owner does that for moments, in `trim` and when it
        opens the file.
    StaleSlotError
        `source` is a reference into a region that has been opened anew since. The verbs check whether its value is
        still there. A named region may be read after it was closed. The files of a temporary one are gone then (ENOENT,
        or EINVAL where the number of its descriptor stands for another file).
    """

    __slots__ = ("__weakref__", "_handle", "_holder", "_incarnation", "_where")

    def __init__(self, source: str | os.PathLike[str] | SlotRef) -> None:
        if isinstance(source, SlotRef):
            paths = source.path, source.slots_path, source.leases_path
        else:
            name = os.fsdecode(source)
            paths = name, name + ".slots", name + ".leases"
        names = [os.fsencode(path) for path in paths]
        if any(b"\0" in name for name in names):
            raise ValueError("embedded null byte in the path")
        if hasattr(self, "_holder"):
            raise RuntimeError(f"{paths[0]}: a reader is initialised once: make another")
        self._where = ("reader", *map(os.fsdecode, names))
        holder = _memory.open_reader(names[0], names[1], names[2], self._where)
        try:
            # The holder owns the reader, and each use of the handle keeps the holder.
            self._handle = ffi.from_buffer("ndm_reader *", holder)
            self._incarnation = self.stats().incarnation
            if isinstance(source, SlotRef):
                self._check_ref(source)
            self._holder = holder
        except BaseException:
            del holder  # the traceback would keep the files open
            self._handle = None
            raise

    # -- values ---------------------------------------------------------------------------------------------------

    def read(self, slot: int | SlotRef) -> memoryview:
        """View a value, zero-copy and read-only.

        The mapping stays as long as the view, but the bytes are the owner's: they change if it frees the slot, or
        compacts, while the view is in use.

        Raises
        ------
        InvalidSlotError
            The slot never existed, has been freed, or is not committed yet.
        StaleSlotError
            A reference's value is gone or not committed yet, or the region has been opened anew, or the value is on the
            move for more than ten seconds.
        RegionIOError
            The slot table was cut short (EIO) or is torn (EUCLEAN), or the data file is shorter than that says (EIO).
        """
        number, generation = self._name(slot)
        return _read(self._holder, number, generation)

    def read_bytes(self, slot: int | SlotRef) -> bytes:
        """Copy a value, never torn. Raises as `read` does."""
        number, generation = self._name(slot)
        return _read_bytes(self._holder, number, generation)

    def read_many(self, slots: Iterable[int | SlotRef] | Buffer) -> list[memoryview]:
        """View many values, as `read` does, in one call; all or none. `slots` may be a buffer of int64.

        The disk is asked for all values that are not in RAM, in the order of the file. Raises as `read` does, and the
        error names the slot.
        """
        return _memory.read_many_shared(self._holder, *self._names(slots))

    def read_many_into(self, slots: Iterable[int | SlotRef] | Buffer, buffer: Buffer) -> memoryview:
        """Copy many values to a writable buffer, one after the other, none of them torn.

        Values that are not in RAM are asked for, and copied, in the order of the file. The values are not all of one
        moment: the owner may write and free between two of them.

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
        InvalidSlotError, StaleSlotError, RegionIOError
            As `read`; the error names the slot. The buffer's contents are undefined then.
        """
        numbers, generations = self._names(slots)
        sizes = int64_room(len(numbers))
        _memory.read_many_shared_into(self._holder, numbers, generations, buffer, sizes)
        return sizes

    @contextmanager
    def borrow(self, slot: int | SlotRef) -> Iterator[memoryview]:
        """View a value for the length of a `with` block, and know afterwards whether it was true all along.

        Raises
        ------
        StaleSlotError
            On leaving: the owner has freed or moved the value meanwhile, so that what was read may be other bytes. Also
            where the block itself has raised an `Exception`, which these bytes may have caused: it is the cause of this
            one then. While the value is unchanged, the block's exceptions pass as they are.
        InvalidSlotError, StaleSlotError
            On entering: as `read`.
        """
        number, generation = self._name(slot)
        view, loan = _memory.borrow(self._holder, number, generation)
        try:
            yield view
        except Exception as error:
            if _is_known_changed(loan):
                raise self._changed(number) from error
            raise
        if not _memory.is_unchanged(loan):
            raise self._changed(number)

    def lease(self, slot: int | SlotRef) -> Lease:
        """Keep a value in place, through the owner's `free` and `compact`, and through its death: see `Lease`.

        Needs write access to the leases file, which the owner makes with its first `share`.

        Raises
        ------
        RegionIOError
            There is no leases file (ENOENT), or no permission, or all leases are taken (EAGAIN).
        InvalidSlotError, StaleSlotError
            As `read`.
        """
        number, generation = self._name(slot)
        return Lease(_memory.lease(self._holder, number, generation))

    def is_current(self, ref: SlotRef) -> bool:
        """Tell whether a reference's value is still there."""
        try:
            self._check_ref(ref)
            _memory.find(self._holder, *self._name(ref))
        except (InvalidSlotError, StaleSlotError):
            return False
        return True

    def slots(self) -> list[ReaderSlot]:
        """List the live slots: all of them. Linear in the slot table.

        Raises
        ------
        StaleSlotError
            A value is on the move for more than ten seconds, or its owner died while it moved the value.
        RegionIOError
            The slot table is torn (EUCLEAN) or was cut short (EIO), or there is no room to map it (ENOMEM).
        """
        found: list[ReaderSlot] = []
        while value := _memory.next_slot(self._holder, found[-1].slot + 1 if found else 0):
            slot, offset, size, engine, generation = value
            found.append(ReaderSlot(slot, offset, size, KNOWN_ENGINES.get(engine, engine), generation))
        return found

    def leased(self) -> list[tuple[int, int]]:
        """Offset and size of what living processes lease, live or freed; a value that is leased twice comes twice.

        Raises
        ------
        RegionIOError
            The leases file may not be read, or is not one.
        """
        places = ffi.new("ndm_leased[]", lib.NDM_MOST_LEASES)
        count = control(lib.control_reader_leases, self._where, self._handle, places, lib.NDM_MOST_LEASES)
        return [(place.offset, place.size) for place in places[0:count]]

    # -- the reader -----------------------------------------------------------------------------------------------

    def stats(self) -> ReaderStats:
        """Figures of the region. Linear in the pages that are in RAM."""
        out = ffi.new("ndm_reader_figures *")
        control(lib.control_reader_stats, self._where, self._handle, out)
        figures = {name: getattr(out, name) for name in ReaderStats.__dataclass_fields__}
        leases = None if out.leases == _UNKNOWN else out.leases
        resident = None if out.resident_bytes == _UNKNOWN else out.resident_bytes
        return ReaderStats(**(figures | {"owner": out.owner or None, "leases": leases, "resident_bytes": resident}))

    def close(self) -> None:
        """Close the reader, ending its leases; closing again does nothing. Views stay readable."""
        lib.ndm_reader_close(self._handle)

    @property
    def path(self) -> str:
        """The data file's path."""
        return self._where[1]

    def __enter__(self) -> Self:
        """Give the reader itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the reader."""
        self.close()

    def __repr__(self) -> str:
        """Name the file."""
        return f"<{type(self).__name__} {self.path}>"

    def __reduce__(self) -> NoReturn:
        """Refuse: open another reader where it is needed."""
        raise TypeError(f"cannot copy or pickle {type(self).__name__!r}: send its path, or a SlotRef")

    # -- helpers --------------------------------------------------------------------------------------------------

    def _name(self, slot: int | SlotRef) -> tuple[int, int]:
        """Slot number and generation, -1 for any."""
        if isinstance(slot, SlotRef):
            if slot.incarnation != self._incarnation:
                self._raise_foreign(slot)
            number, generation = index(slot.slot), index(slot.generation)
            if not 0 <= generation < 1 << 32:  # -1 would be any
                raise StaleSlotError(f"{self.path}: no value has generation {generation} (slot {number})")
        else:
            number, generation = index(slot), -1
        return number, generation

    def _names(self, slots: Iterable[int | SlotRef] | Buffer) -> tuple[array[int] | memoryview, array[int] | None]:
        """Slot numbers and generations, None where all may be any."""
        if not isinstance(slots, list | tuple):
            try:
                return int64_copy(slots), None  # type: ignore[arg-type]
            except TypeError:
                if isinstance(slots, bytes | bytearray | memoryview) or not hasattr(slots, "__iter__"):
                    raise
        elif isinstance(slots, SlotRef):
            raise TypeError("an iterable of slots is needed, not a SlotRef")
        named = [self._name(slot) for slot in slots]  # type: ignore[union-attr]
        numbers = slot_numbers([number for number, _ in named])
        generations = array("q", [generation for _, generation in named])
        return numbers, generations if any(generation >= 0 for generation in generations) else None

    def _check_ref(self, ref: SlotRef) -> None:
        if not isinstance(ref, SlotRef):
            raise TypeError(f"a SlotRef is needed, not {type(ref).__name__!r}")
        if ref.incarnation != self._incarnation:
            self._raise_foreign(ref)

    def _raise_foreign(self, ref: SlotRef) -> NoReturn:
        raise StaleSlotError(f"{self.path}: slot {ref.slot} belongs to another region, or to an earlier opening")

    def _changed(self, slot: int) -> StaleSlotError:
        return StaleSlotError(f"{self.path}: slot {slot} was freed or moved while it was borrowed")


def _is_known_changed(loan: object) -> bool:
    """Whether a borrowed value is known to have changed."""
    try:
        return not _memory.is_unchanged(loan)
    except StaleSlotError:
        return True
    except RegionError:
        return False
