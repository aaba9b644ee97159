"""`OverflowMap`: a mapping of objects whose values all lie in a region."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from nodedb_mem._governed import engine_number
from nodedb_mem._stored import Stored, alignment_of, encode_for, get, put
from nodedb_mem.codec import decode
from nodedb_mem.engine import EngineId
from nodedb_mem.errors import CapacityExceededError, InvalidSlotError, RegionError, RegionIOError, WrongThreadError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nodedb_mem.codec import Encoded
    from nodedb_mem.objects import ObjectRef
    from nodedb_mem.region import OverflowRegion

K = TypeVar("K")
V = TypeVar("V")

_BATCH = 1000  # values that `update` encodes before it writes them
_BATCH_BYTES = 16 << 20


class OverflowMap(MutableMapping[K, V]):
    """A mapping whose values all lie in a region, encoded by `nodedb_mem.codec`.

    A value comes back as an object of its own, each time anew: arrays on private, copy-on-write memory, writable and
    aligned, whose stored bytes never change. To keep a change, assign the value again. Replacing or deleting a key
    leaves what came from it as it is.

    The keys stay in RAM, as in a dict, and so does the order of insertion. The map does not close the region. `clear`
    frees its slots. All verbs that touch values are for the region's owner: `WrongThreadError` elsewhere. With a region
    of ``ownership="process"`` every thread of the process may use the map. A thread that waits for the disk does not
    hold up the others.

    Parameters
    ----------
    region
        Where the values go; its alignment is 64 bytes or more. Others may use it, too.
    engine
        The owner of the values, as for `OverflowRegion.write`.

    Raises
    ------
    ValueError
        The region's alignment is less than 64 bytes, or the engine is not 0 to 255.
    """

    def __init__(self, region: OverflowRegion, *, engine: int = EngineId.QUERY) -> None:
        self._alignment = alignment_of(region)
        engine_number(engine)
        self._engine = engine
        self._slots: dict[K, Stored] = {}
        self._lock = threading.Lock()  # of whoever frees slots
        self._process = os.getpid()
        self.region = region

    def __getitem__(self, key: K) -> V:
        """Make the object again.

        Raises
        ------
        KeyError
            There is no such key.
        UndecodableError
            Its class cannot be had, or refuses.
        RegionError
            As `OverflowRegion.restore` raises.
        """
        while True:
            stored = self._slots[key]
            try:
                value: V = get(self.region, stored, is_current=lambda: self._slots.get(key) is stored)[0]  # noqa: B023
            except Exception:
                if self._slots.get(key) is stored:
                    raise
            else:
                return value

    def __setitem__(self, key: K, value: V) -> None:
        """Store an object; nothing has changed where that fails.

        Raises
        ------
        TypeError
            The object cannot be pickled; the message names the key.
        CapacityExceededError, RegionIOError
            As `OverflowRegion.write` raises, with `key`.
        """
        hash(key)
        encoded = encode_for(key, value, self._alignment)
        self._replace(key, put(self.region, key, encoded, self._engine))

    def __delitem__(self, key: K) -> None:
        """Free a value. What came from it stays as it is. A key whose value cannot be freed is the last one then."""
        with self._freeing():
            stored = self._slots.pop(key)
            try:
                self.region.free(stored.slot)
            except RegionError:
                self._slots[key] = stored
                raise

    def get_many(self, keys: Iterable[K]) -> list[V]:
        """Make many objects, in the order of the keys. Small ones that hold no buffers are read in one call.

        Raises
        ------
        KeyError
            One of the keys is missing.
        """
        wanted = [(key, self._slots[key]) for key in keys]
        plain = [number for number, (_, stored) in enumerate(wanted) if stored.copied]
        views: dict[int, memoryview] = {}
        try:
            found = self.region.read_many([wanted[number][1].slot for number in plain])
            views = dict(zip(plain, found, strict=True))
        except InvalidSlotError:  # another thread has freed one of them
            if all(self._slots.get(key) is stored for key, stored in wanted):
                raise
        values: list[Any] = []
        for number, (key, stored) in enumerate(wanted):
            view = views.pop(number, None)
            current = view is not None and self._slots.get(key) is stored
            values.append(decode(view) if view is not None and current else self[key])
        return values

    def update(self, other: Any = (), /, **more: Any) -> None:
        """Store many objects, as a dict's update does. Small ones are written in one call, a thousand at a time.

        Raises
        ------
        TypeError, CapacityExceededError, RegionIOError
            As assignment raises. Earlier batches are stored; no value of the one that failed is.
        """
        batch: list[tuple[K, Encoded]] = []
        size = 0
        for key, value in _pairs(other, more):
            hash(key)
            batch.append((key, encode_for(key, value, self._alignment)))
            size += batch[-1][1].size
            if len(batch) == _BATCH or size >= _BATCH_BYTES:
                self._write(batch)
                batch, size = [], 0
        if batch:
            self._write(batch)

    def popitem(self) -> tuple[K, V]:
        """Remove and give the pair that was inserted last. KeyError if there is none."""
        while self._slots:
            with suppress(KeyError, StopIteration):  # another thread has removed it meanwhile
                key = next(reversed(self._slots))
                return key, self.pop(key)
        raise KeyError("popitem(): the mapping is empty")

    def clear(self) -> None:
        """Free all values in one call."""
        with self._freeing():
            before = dict(self._slots)
            self._slots.clear()
            try:
                self.region.free_many([stored.slot for stored in before.values()])
            except RegionError:
                self._slots.update(before)
                raise

    async def aget(self, key: K) -> V:
        """Give a value without keeping the event loop waiting, on a worker thread. Raises as ``[]``."""
        import asyncio  # takes longer to import than all of this package

        return await asyncio.to_thread(self.__getitem__, key)

    async def aset(self, key: K, value: V) -> None:
        """Store a value on a worker thread. Raises as assignment."""
        import asyncio  # as above

        await asyncio.to_thread(self.__setitem__, key, value)

    def share(self, key: K) -> ObjectRef:
        """Make a reference to a value, for other processes. It is stale once the key is assigned again or deleted.

        Raises
        ------
        KeyError
            There is no such key.
        RegionIOError
            As `OverflowRegion.share` raises.
        """
        while True:
            stored = self._slots[key]
            try:
                ref = self.region.share_object(stored.slot)
            except InvalidSlotError:
                if self._slots.get(key) is stored:
                    raise
            else:
                if self._slots.get(key) is stored:
                    return ref

    def __contains__(self, key: object) -> bool:
        """Tell whether there is such a key."""
        return key in self._slots

    def __iter__(self) -> Iterator[K]:
        """Give the keys in the order of insertion. RuntimeError if their number changes meanwhile."""
        return iter(self._slots)

    def __reversed__(self) -> Iterator[K]:
        """Give the keys in the reverse order of insertion."""
        return reversed(self._slots)

    def __len__(self) -> int:
        """Count the keys."""
        return len(self._slots)

    def __repr__(self) -> str:
        """Tell how much there is, not what."""
        return f"<{type(self).__name__} of {len(self)} keys in {self.region!r}>"

    def _replace(self, key: K, stored: Stored) -> None:
        """Put a slot in the place of the one before, which is freed.

        In this order: whoever reads a slot, and finds it under its key afterwards, has read that value.
        """
        with self._freeing():
            before = self._slots.get(key)
            self._slots[key] = stored
            if before is None:
                return
            try:
                self.region.free(before.slot)
            except RegionError:
                self._slots[key] = before
                with suppress(RegionError):
                    self.region.free(stored.slot)
                raise

    @contextmanager
    def _freeing(self) -> Iterator[None]:
        """Keep others from freeing slots. In a forked child the lock may be held for ever."""
        if os.getpid() != self._process:
            raise WrongThreadError("the mapping belongs to the process that made it: this one was forked from it")
        with self._lock:
            yield

    def _write(self, batch: list[tuple[K, Encoded]]) -> None:
        """Write what was encoded, all or nothing; values that are one buffer go together."""
        stored: dict[int, Stored] = {}
        single = [number for number, (_, encoded) in enumerate(batch) if len(encoded.parts) == 1]
        try:
            if single:
                slots = self._write_single([batch[number] for number in single])
                stored.update(zip(single, slots, strict=True))
            for number, (key, encoded) in enumerate(batch):
                if number not in stored:
                    stored[number] = put(self.region, key, encoded, self._engine)
        except BaseException:
            with suppress(RegionError):
                self.region.free_many([each.slot for each in stored.values()])
            raise
        for number, (key, _) in enumerate(batch):
            self._replace(key, stored[number])

    def _write_single(self, batch: list[tuple[K, Encoded]]) -> list[Stored]:
        """Write values that are one buffer each in one call."""
        try:
            slots = self.region.write_many([encoded.parts[0] for _, encoded in batch], self._engine)
        except (CapacityExceededError, RegionIOError) as error:
            error.key = batch[0][0]
            raise
        return [Stored(slot, encoded.size, encoded.copied) for slot, (_, encoded) in zip(slots, batch, strict=True)]


def _pairs(other: Any, more: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Give keys and values of what `update` takes."""
    if isinstance(other, Mapping):
        yield from other.items()
    elif hasattr(other, "keys"):
        for key in other.keys():  # noqa: SIM118
            yield key, other[key]
    else:
        yield from other
    yield from more.items()
