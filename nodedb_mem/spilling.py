"""`SpillMapping`: a mapping that keeps to a budget of RAM, and moves what is coldest to a region.

Threads: a hit takes no lock. All else is done by one thread at a time. How values move is told in `nodedb_mem._tiers`.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import MutableMapping
from contextlib import contextmanager
from operator import index
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Self, SupportsIndex, TypeVar

from nodedb_mem._governed import engine_number
from nodedb_mem._reserving import Account
from nodedb_mem._session import Session
from nodedb_mem._sizeof import sizeof
from nodedb_mem._tiers import COLD, Entry, Tiers
from nodedb_mem.engine import EngineId
from nodedb_mem.errors import RegionClosedError, WrongThreadError
from nodedb_mem.overflow_map import OverflowMap
from nodedb_mem.region import OverflowRegion
from nodedb_mem.stats import SpillStats
from nodedb_mem.tuning import DEFAULT_INITIAL_CAPACITY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType

    from nodedb_mem.governor import MemoryGovernor
    from nodedb_mem.objects import ObjectRef

__all__ = ["OverflowMap", "SpillMapping", "SpillStats", "sizeof"]

K = TypeVar("K")
V = TypeVar("V")

_log = logging.getLogger(__name__)

_MOST_HELD = 64  # values in use that one insertion passes over on its way to one that can go out
_PATIENCE = 0.1  # seconds that a governor's question waits for another thread's work


class SpillMapping(MutableMapping[K, V], Generic[K, V]):
    """A mapping whose values stay in RAM up to a budget. The coldest go to a temporary region and come back when asked.

    It is used as a dict is: a value that was changed in place (``m["a"][3] = 7``) comes back changed. It may be used
    from all threads of its process. In a forked child only values in RAM can be had.

    Parameters
    ----------
    budget
        The most bytes of values that stay in RAM, as `weight` weighs them when they are assigned. Values in use, and
        pinned ones, stay beyond it.
    directory
        Where the region's file takes its blocks; by default the directory for temporary files.
    governor
        A memory governor. Every byte of values in RAM is reserved there, and values go out when it asks for memory.
        What does not fit is charged, and as much goes out.
    watch
        Follow what is real, where there is no governor: values go out, too, when this process has come near the most
        memory that it may use, or its control group has. Needs psutil (extra `watch`).
    engine
        The owner of the values, as for `OverflowRegion.write`, and for the governor.
    max_capacity
        The most the file may grow to; by default the size of the file system.
    cache_limit
        The most bytes of the file that may stay in RAM, as for `OverflowRegion`; by default the kernel decides.
    weight
        Tells how many bytes of RAM a value holds.

    Raises
    ------
    UnknownEngineError
        The governor does not know the engine.
    ValueError
        The budget is negative, the engine is not 0 to 255, or `watch` is set beside a governor, which has a `watch` of
        its own.
    ModuleNotFoundError
        `watch` finds no psutil.

    Warns
    -----
    ResourceWarning
        As `OverflowRegion` warns.
    """

    def __init__(
        self,
        budget: int,
        directory: str | os.PathLike[str] | None = None,
        *,
        governor: MemoryGovernor | None = None,
        watch: bool = False,
        engine: int = EngineId.QUERY,
        max_capacity: int | None = None,
        cache_limit: int | None = None,
        weight: Callable[[Any], int] = sizeof,
    ) -> None:
        self._budget = _checked(budget)
        engine_number(engine)
        self._account = Account(governor, engine, watch=watch)
        folder = tempfile.gettempdir() if directory is None else directory
        ceiling = shutil.disk_usage(folder).total if max_capacity is None else index(max_capacity)
        region = OverflowRegion.temporary(
            folder,
            initial_capacity=min(DEFAULT_INITIAL_CAPACITY, ceiling),
            max_capacity=ceiling,
            cache_limit=cache_limit,
            ownership="process",
        )
        self._lock = threading.RLock()
        self._process = os.getpid()
        self._entries: dict[K, Entry] = {}
        self._tiers = Tiers(region, engine, weight)
        self._session = Session(self._lock, self._tiers, self._entries)
        try:
            self._account.open(self._give_back)
        except BaseException:
            self.close()
            raise
        self._has_logged = False

    # -- the mapping ----------------------------------------------------------------------------------------------

    def __getitem__(self, key: K) -> V:
        """Give a value, from RAM or from the region.

        Raises
        ------
        KeyError
            There is no such key.
        RegionIOError, MemoryError
            The value cannot be brought back now; it is where it was.
        """
        entry = self._entries.get(key)
        if entry is None:
            self._miss(key)
        value: V = entry.value
        if value is COLD:
            return self._bring_back(key)
        try:
            self._tiers.hot.move_to_end(entry)
        except KeyError:  # it has just gone out; the value is the caller's now, and is seen to be in use
            return self._bring_back(key)
        if entry.shares:  # from here on others may have it
            entry.shares = {}
        self._tiers.hits += 1
        return value

    def __setitem__(self, key: K, value: V) -> None:
        """Store a value. It is in RAM afterwards, unless it is larger than the budget.

        Raises
        ------
        TypeError
            The value has to be pickled to be weighed, and cannot be, or its weight is no integer; the message names the
            key. Nothing has changed.
        ValueError
            Its weight is negative. Nothing has changed.
        CapacityExceededError, RegionIOError
            Another value was to make room, and found none in the region: it is `key`'s. It stays in RAM, and what was
            assigned is stored.
        """
        entry, beyond = self._insert(key, value)
        if beyond or self._tiers.bytes > self._budget:
            with self._mine(), self._session as tiers:
                tiers.shrink(min(self._budget, tiers.bytes - beyond), _MOST_HELD, own=entry, caller=sys._getframe(1))
                tiers.tidy()

    def __delitem__(self, key: K) -> None:
        """Remove a key. Its value is freed, if no other key names it."""
        with self._mine(), self._session as tiers:
            entry = self._entries.get(key)
            if entry is None:
                self._miss(key)
            tiers.unsettled = True
            del self._entries[key]
            tiers.forget(entry, key)
            tiers.tidy()

    def update(self, other: Any = (), /, **more: Any) -> None:
        """Store many values, as a dict's update does. Raises as assignment does; what came before is stored."""
        super().update(other, **more)
        del other
        with self._mine(), self._session as tiers:
            tiers.shrink(self._budget, _MOST_HELD)

    def popitem(self) -> tuple[K, V]:
        """Remove and give the pair that was inserted last. KeyError if there is none."""
        with self._mine():
            for key in reversed(self._entries):
                return key, self.pop(key)
        raise KeyError("popitem(): the mapping is empty")

    def clear(self) -> None:
        """Remove all keys."""
        with self._mine(), self._session as tiers:
            for key, entry in list(self._entries.items()):
                tiers.unsettled = True
                del self._entries[key]
                tiers.forget(entry, key)

    def __contains__(self, key: object) -> bool:
        """Tell whether there is such a key."""
        return key in self._entries

    def __iter__(self) -> Iterator[K]:
        """Give the keys in the order of insertion. RuntimeError if their number changes meanwhile."""
        return iter(self._entries)

    def __reversed__(self) -> Iterator[K]:
        """Give the keys in the reverse order of insertion."""
        return reversed(self._entries)

    def __len__(self) -> int:
        """Count the keys."""
        return len(self._entries)

    def __repr__(self) -> str:
        """Tell how much there is, not what."""
        state = (
            "closed"
            if self._tiers.closed
            else f"{self._tiers.bytes} of {self._budget} bytes in RAM, {self._tiers.bytes_out} out"
        )
        return f"<{type(self).__name__} of {len(self)} keys: {state}>"

    async def aget(self, key: K) -> V:
        """Give a value without keeping the event loop waiting: it comes back on a worker thread. Raises as ``[]``."""
        entry = self._entries.get(key)
        if entry is not None and entry.value is not COLD:
            return self[key]
        import asyncio  # takes longer to import than all of this package

        return await asyncio.to_thread(self.__getitem__, key)

    async def aset(self, key: K, value: V) -> None:
        """Store a value on a worker thread: what has to make room is written there. Raises as assignment."""
        import asyncio  # as above

        await asyncio.to_thread(self.__setitem__, key, value)

    def share(self, key: K) -> ObjectRef:
        """Make a reference to a value as it is now, for other processes: it is written, if it has changed.

        The reference is stale once the value has gone out changed, or its key is assigned again or deleted.

        Raises
        ------
        KeyError
            There is no such key.
        TypeError
            The value cannot be pickled.
        CapacityExceededError, RegionIOError
            The value finds no room in the region, or the leases file cannot be made.
        """
        with self._mine(), self._session as tiers:
            entry = self._entries.get(key)
            if entry is None:
                self._miss(key)
            return tiers.share(entry)

    # -- the budget -----------------------------------------------------------------------------------------------

    @contextmanager
    def pin(self, key: K) -> Iterator[V]:
        """Keep a value in RAM for the length of a ``with`` block, which gets the value."""
        with self._mine():
            value = self[key]
            entry = self._entries[key]
            entry.pins += 1
        try:
            yield value
        finally:
            with self._mine():
                entry.pins -= 1

    def evict(self, what: SupportsIndex | Iterable[K] | None = None) -> int:
        """Put values out now, whatever the budget.

        Parameters
        ----------
        what
            How many bytes, of the coldest values; or which keys; None for all. Values in use, and pinned ones, stay.

        Returns
        -------
        int
            Bytes of RAM that left.

        Raises
        ------
        KeyError
            One of the keys is missing.
        CapacityExceededError, RegionIOError
            A value found no room; `key` is its key.
        """
        if isinstance(what, str | bytes):
            raise TypeError("a number of bytes or an iterable of keys is needed")
        with self._mine(), self._session as tiers:
            before = tiers.bytes
            if what is None:
                tiers.shrink(0, len(tiers.hot))
            elif hasattr(what, "__index__"):
                tiers.shrink(max(0, before - index(what)), len(tiers.hot))  # type: ignore[arg-type]
            else:
                for entry in [self._entries[key] for key in what]:
                    if entry in tiers.hot and not entry.pins:
                        tiers.put_out(entry)
            tiers.tidy()
            return before - tiers.bytes

    def set_budget(self, budget: int) -> None:
        """Set how many bytes of values may stay in RAM; what is beyond goes out. Raises as `evict`."""
        with self._mine(), self._session as tiers:
            self._budget = _checked(budget)
            tiers.shrink(self._budget, len(tiers.hot))

    @property
    def budget(self) -> int:
        """How many bytes of values may stay in RAM."""
        return self._budget

    def stats(self) -> SpillStats:
        """Tell what was done so far."""
        with self._mine():
            tiers = self._tiers
            in_ram = sum(len(entry.keys) for entry in self._entries.values() if entry.value is not COLD)
            counted = {name: getattr(tiers, name) for name in SpillStats.__dataclass_fields__ if hasattr(tiers, name)}
            keys = {"keys_in_ram": in_ram, "keys_out": len(self._entries) - in_ram}
            return SpillStats(bytes_in_ram=tiers.bytes, **keys, **counted)

    # -- the end --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Drop all values, those in the region, too; closing again does nothing. What came out of it stays readable."""
        if os.getpid() == self._process:
            with self._lock:
                if not self._tiers.closed:
                    self._entries = self._session.entries = {}
                    self._account.close()
                    self._tiers.close()

    @property
    def closed(self) -> bool:
        """Whether `close` has been called."""
        return self._tiers.closed

    def __enter__(self) -> Self:
        """Give the mapping itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the mapping."""
        self.close()

    def __del__(self) -> None:
        """Let go of the descriptors, and of what is reserved."""
        if hasattr(self, "_tiers"):
            self._account.leave()
            self._tiers.abandon()

    def __reduce__(self) -> NoReturn:
        """Refuse: share the values instead."""
        raise TypeError(f"cannot copy or pickle {type(self).__name__!r}")

    # -- one thread at a time -------------------------------------------------------------------------------------

    def _mine(self) -> threading.RLock:
        """Give the lock, which nobody releases in a forked child."""
        if os.getpid() != self._process:
            raise WrongThreadError("the mapping belongs to the process that made it: this one was forked from it")
        return self._lock

    def _miss(self, key: object) -> NoReturn:
        if self._tiers.closed:
            raise RegionClosedError("the mapping is closed")
        raise KeyError(key)

    def _bring_back(self, key: K) -> V:
        entry = self._entries.get(key)
        if entry is None:
            self._miss(key)
        reservation, fits = self._account.obtain(entry.weight)
        try:
            with self._mine(), self._session as tiers:
                if self._entries.get(key) is entry:
                    value: V = entry.value
                    if value is not COLD:
                        tiers.hot.move_to_end(entry)
                        tiers.hits += 1
                        entry.shares = {}
                        return value
                    value = tiers.bring_back(entry, reservation)
                    beyond, reservation = 0 if fits else entry.weight, None
                    try:
                        tiers.shrink(min(self._budget, tiers.bytes - beyond), _MOST_HELD)
                        self._has_logged = False
                    except Exception as error:  # the value is there; whoever inserts is told
                        self._note(error)
                    return value
        finally:
            if reservation is not None:
                reservation.release()
        return self[key]  # another value by now

    def _insert(self, key: K, value: V) -> tuple[Entry, int]:
        """Make a value hot under a key. Give its entry, and how many bytes were charged beyond what there is."""
        hash(key)
        tiers = self._tiers
        try:
            weight = index(tiers.weigh(value))
        except TypeError as error:
            raise TypeError(f"the value of {key!r}: {error}") from error
        if weight < 0:
            raise ValueError(f"the weight of the value of {key!r} is {weight}")
        reservation, fits = self._account.obtain(weight)
        beyond = 0 if fits else weight
        try:
            with self._mine(), self._session:
                before = self._entries.get(key)
                entry = tiers.by_value.get(id(value))
                if entry is None:
                    entry = Entry(key, weight)
                    tiers.add(entry, value, reservation=reservation)
                    reservation = None
                else:
                    tiers.weigh_again(entry, weight, reservation)
                    reservation = None
                    if entry is before:
                        return entry, beyond
                    entry.keys.append(key)
                self._entries[key] = entry
                if before is not None:
                    tiers.forget(before, key)
                return entry, beyond
        finally:
            if reservation is not None:
                reservation.release()

    def _give_back(self, wanted: int) -> int:
        """Put values out for a governor. Bytes that were freed; 0 where another thread is at work here."""
        if os.getpid() != self._process or not self._lock.acquire(timeout=_PATIENCE):
            return 0
        try:
            with self._session as tiers:
                before = tiers.bytes
                try:
                    tiers.shrink(max(0, before - wanted), _MOST_HELD)
                except Exception as error:
                    self._note(error)
                return before - tiers.bytes
        except RegionClosedError:
            return 0
        finally:
            self._lock.release()

    def _note(self, error: Exception) -> None:
        """Log what failed while nobody could be told, once until it works again."""
        if not self._has_logged:
            self._has_logged = True
            # As text: the error's traceback has the value.
            _log.warning("a value stays in RAM, beyond the budget: %s", str(error))


def _checked(budget: int) -> int:
    size = index(budget)
    if size < 0:
        raise ValueError("budget must not be negative")
    return size
