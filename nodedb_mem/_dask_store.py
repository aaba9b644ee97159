"""The frames of Dask's serialization in the slots of a region, in the place of a file a key.

A slot holds what a worker's spill file holds: the lengths of the frames, the header and the frames. Each frame starts
at a multiple of the region's alignment, so that arrays come back aligned.

A key that was brought back keeps its slot (`kept`). If its value goes out again unchanged, nothing is written.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Hashable, Iterator, MutableMapping
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import msgpack
from distributed.protocol import deserialize_bytes
from distributed.protocol.compression import decompress
from distributed.protocol.serialize import merge_and_deserialize
from distributed.spill import MaxSpillExceeded
from distributed.utils import ensure_memoryview

from nodedb_mem._changes import PageMap
from nodedb_mem._stored import Stored, alignment_of, is_unchanged, private_view, put
from nodedb_mem.codec import Encoded
from nodedb_mem.engine import EngineId
from nodedb_mem.errors import CapacityExceededError, RegionIOError
from nodedb_mem.refs import SlotParts, SlotRef

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from nodedb_mem.region import OverflowRegion
    from nodedb_mem.stats import RegionStats

_MOST_MAPPINGS = 16_384  # of the 65,530 that a process may have; beyond it values come back as copies
_MOVED_AT_ONCE = 256 << 10  # bytes that a step of housekeeping moves: some milliseconds where they are not in RAM
_GIVEN_BACK_AT_ONCE = 2 << 20  # bytes of disk that a step gives back: about a millisecond
_TIDY_FOR = 0.003  # seconds after which no step begins
_WORTH = 1 << 20  # bytes freed from which on there is something to do
_SPARE = 256 << 20  # free bytes that stay for the next values while values go out


class Pickled(NamedTuple):
    """A header and the frames that it tells of, as views of a slot. Its length is that of Dask's file, in bytes."""

    header: bytes
    frames: list[memoryview]
    size: int

    def __len__(self) -> int:
        """Give the bytes of it all, without what is between the frames."""
        return self.size


class Kept(NamedTuple):
    """A slot whose value is in RAM again, and the private mapping that the value came in, if it did."""

    stored: Stored
    mapping: Buffer | None


def load(pickled: Any) -> object:
    """Make the value again: from a slot, or from a file of Dask's own."""
    if not isinstance(pickled, Pickled):
        return deserialize_bytes(pickled)
    header = unpack_header(pickled.header)
    return merge_and_deserialize(header, decompress(header, pickled.frames))


def unpack_header(packed: bytes) -> dict[str, Any]:
    """Make the header of frames again."""
    header: dict[str, Any] = msgpack.loads(packed, raw=False, use_list=False)
    return header


def split(view: memoryview, alignment: int, head: bytes | None = None) -> Pickled:
    """Take a slot apart. `head` is a copy of its first part: with it the first page is not touched."""
    first = view if head is None else memoryview(head)
    (count,) = struct.unpack_from("Q", first)
    lengths = struct.unpack_from(f"{count}Q", first, 8)
    start = 8 * (1 + count)
    end = start + lengths[0]
    layout = SlotParts.layout([end, *lengths[1:]], alignment)
    frames = [view[at : at + size] for at, size in zip(layout.offsets[1:], layout.sizes[1:], strict=True)]
    return Pickled(bytes(first[start:end]), frames, end + sum(lengths[1:]))


class FrameStore(MutableMapping[Hashable, Any]):
    """Key to frames. Lists go in, as ``serialize_bytelist`` makes them, and `Pickled` comes out.

    Frames that are no host memory go to `files`, where the keys stay that were there before. All threads of the process
    may use it.

    A value on a private mapping keeps its bytes in the file for as long as it lives. Where the store does not map (not
    `maps`), or once a write was refused, values come back as copies, and the file holds no more than what is out.
    """

    def __init__(self, region: OverflowRegion, files: MutableMapping[Any, Any], *, maps: bool) -> None:
        self.alignment = alignment_of(region)
        self._region = region
        self._files = files
        self._most_mappings = _MOST_MAPPINGS if maps else 0
        self._slots: dict[Hashable, Stored] = {}
        self.kept: dict[Hashable, Kept] = {}
        self._restoring: dict[Hashable, Buffer | None] = {}
        self._lent: dict[int, int] = {}
        self._unwanted: dict[int, Stored] = {}  # lent, and to be freed afterwards
        self._pages = PageMap()
        self._lock = threading.RLock()  # of the books here; the region has its own
        self._freed = self._written = self._seen = 0

    # -- the mapping ----------------------------------------------------------------------------------------------

    def __setitem__(self, key: Hashable, frames: list[Any]) -> None:
        """Write frames.

        Raises
        ------
        MaxSpillExceeded
            The region is at its ceiling.
        OSError
            The disk is full, or refuses otherwise.
        """
        encoded = self._encode(frames)
        if encoded is None:
            self._files[key] = frames
            return
        with self._lock:
            self._slots[key] = self._put(key, encoded)
        self._written += encoded.size

    def __getitem__(self, key: Hashable) -> Any:
        """View the frames, copy-on-write. Frames in a file are read, as Dask does."""
        stored = self._slots.get(key)
        if stored is None:
            return self._files[key]
        with self._lock:
            view, mapping = private_view(self._region, stored, may_map=len(self.kept) < self._most_mappings)
        if key in self._restoring:
            self._restoring[key] = mapping
        return split(view, self.alignment, stored.head)

    def __delitem__(self, key: Hashable) -> None:
        """Free the slot; or keep it, if the value is on its way back."""
        if key not in self._slots:
            del self._files[key]
        elif key in self._restoring:
            self.kept[key] = Kept(self._slots.pop(key), self._restoring[key])
        else:
            self._free(self._slots.pop(key))

    def __contains__(self, key: object) -> bool:
        """Tell whether there is such a key."""
        return key in self._slots or key in self._files

    def __iter__(self) -> Iterator[Hashable]:
        """Give the keys."""
        yield from self._slots
        yield from self._files

    def __len__(self) -> int:
        """Count the keys."""
        return len(self._slots) + len(self._files)

    # -- slots that are kept --------------------------------------------------------------------------------------

    @contextmanager
    def restoring(self, key: Hashable) -> Iterator[None]:
        """Keep the slot of a key that is deleted in this block."""
        self._restoring[key] = None
        try:
            yield
        finally:
            self._restoring.pop(key, None)

    def is_unchanged(self, key: Hashable, frames: list[Any]) -> bool:
        """Whether the slot of a kept key holds these frames."""
        stored, mapping = self.kept[key]
        encoded = self._encode(frames)
        if encoded is None:
            return False
        with self._lock:
            return is_unchanged(stored, encoded, self._region.read, mapping, self._pages, alignment=self.alignment)

    def revive(self, key: Hashable) -> None:
        """Make a kept slot the key's value again."""
        self._slots[key] = self.kept.pop(key).stored

    def forget(self, key: Hashable) -> None:
        """Free the slot that was kept for a key, if any."""
        kept = self.kept.pop(key, None)
        if kept is not None:
            self._free(kept.stored)

    def peek(self, key: Hashable) -> Pickled | None:
        """View the frames where they lie, read-only. None if they are in a file."""
        stored = self._slots.get(key)
        if stored is None:
            return None
        with self._lock:
            return split(self._region.read(stored.slot), self.alignment, stored.head)

    # -- slots that are lent ----------------------------------------------------------------------------------------

    def sample(self, size: int) -> Hashable | None:
        """Give a key in a slot of so many bytes or more."""
        return next((key for key, stored in self._slots.items() if stored.size >= size), None)

    def head(self, key: Hashable, size: int) -> bytes:
        """Copy the first bytes of a slot."""
        with self._lock:
            return bytes(self._region.read(self._slots[key].slot)[:size])

    def lend(self, key: Hashable) -> SlotRef:
        """Make a reference to a slot, for another process. The slot stays until `take_back`."""
        with self._lock:
            ref = self._region.share(self._slots[key].slot)
            self._lent[ref.slot] = self._lent.get(ref.slot, 0) + 1
            return ref

    def take_back(self, ref: SlotRef) -> None:
        """End what `lend` began. Whoever has leased the slot by now keeps its bytes."""
        with self._lock:
            self._lent[ref.slot] -= 1
            if not self._lent[ref.slot]:
                del self._lent[ref.slot]
                stored = self._unwanted.pop(ref.slot, None)
                if stored is not None and not self._region.closed:
                    self._free(stored)

    # -- the region -----------------------------------------------------------------------------------------------

    def tidy(self) -> None:
        """Do a small piece of what is to be done when values have gone: close holes, and give disk back.

        While values go out, what is free is left for them, up to what lives and to 256 MiB.
        """
        busy, self._seen = self._written != self._seen, self._written
        if self._freed < _WORTH or self._region.closed:
            return
        with self._lock:
            if busy and self._region.capacity - self._region.live_bytes < max(_SPARE, 2 * self._region.live_bytes):
                return
            until = perf_counter() + _TIDY_FOR
            while self._freed and perf_counter() < until:
                if self._region.trim(_GIVEN_BACK_AT_ONCE) == 0 and not self._close_holes():
                    self._freed = 0

    def _close_holes(self) -> bool:
        """Move some values together, if much of the disk is held by holes too small to give back. False if not."""
        figures = self._region.stats()
        if figures.disk_bytes <= figures.live_bytes * 5 // 4 + _WORTH:
            return False
        try:
            return self._region.compact(_MOVED_AT_ONCE).moved_bytes > 0
        except RegionIOError:  # no room to move in
            return False

    def close(self) -> None:
        """Drop everything. Values that came back stay readable."""
        with self._lock:
            self._slots.clear()
            self.kept.clear()
            self._pages.close()
            if not self._region.closed:
                self._region.close()
        close = getattr(self._files, "close", None)
        if close is not None:
            close()

    @property
    def maps(self) -> bool:
        """Whether values that are in use may keep bytes in the file that are no longer out."""
        return self._most_mappings > 0

    def stats(self) -> RegionStats:
        """Tell what the region is like."""
        with self._lock:
            return self._region.stats()

    def _put(self, key: Hashable, encoded: Encoded) -> Stored:
        """Write to a slot. Kept ones make room if need be."""
        try:
            try:
                return put(self._region, key, encoded, EngineId.QUERY)
            except (CapacityExceededError, RegionIOError):
                self._most_mappings = 0
                if not self.kept:
                    raise
            for each in list(self.kept):
                self.forget(each)
            return put(self._region, key, encoded, EngineId.QUERY)
        except CapacityExceededError as error:
            raise MaxSpillExceeded(key) from error

    def _free(self, stored: Stored) -> None:
        with self._lock:
            if stored.slot in self._lent:
                self._unwanted[stored.slot] = stored
                return
            self._region.free(stored.slot)
        self._freed += stored.size

    # -- the layout -----------------------------------------------------------------------------------------------

    def _encode(self, frames: list[Any]) -> Encoded | None:
        """Lay frames out. None if one of them is no host memory."""
        lengths, header, *rest = frames
        try:
            buffers = [ensure_memoryview(each) for each in rest]
        except TypeError:
            return None
        head = b"".join((lengths, header))
        layout = SlotParts.layout([len(head), *(each.nbytes for each in buffers)], self.alignment)
        size = layout.offsets[-1] + layout.sizes[-1]
        return Encoded([head, *buffers], True, size, buffers, False)
