"""Reclaimers: whom a governor asks to give memory back, in which order, on which thread."""

from __future__ import annotations

import threading
from operator import index
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from nodedb_mem import _memory
from nodedb_mem._core import lib

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Reclaimer:
    """A callback that frees memory of an engine when it is asked to. Made by `MemoryGovernor.add_reclaimer`."""

    __slots__ = ("_list", "_thread", "_wanted", "callback", "engine", "priority")

    def __init__(
        self,
        home: Reclaimers,
        engine: int,
        callback: Callable[[int], int],
        priority: int,
        thread: threading.Thread | None,
    ) -> None:
        self._list, self.engine, self.callback, self.priority, self._thread = home, engine, callback, priority, thread
        self._wanted = 0  # posted for its thread

    def remove(self) -> None:
        """Ask it no more. Removing it again does nothing."""
        self._list.remove(self)

    def __repr__(self) -> str:
        bound = "" if self._thread is None else f", on thread {self._thread.name}"
        return f"<Reclaimer of engine {self.engine}, priority {self.priority}{bound}>"


class _Call:
    """A reclaimer that is running."""

    __slots__ = ("__weakref__",)


class Reclaimers:
    """The reclaimers of one governor in one process.

    The lock is never held while a callback runs. A finalizer may come back with a release while it is held. A reclaimer
    of an engine is not asked while another of the same engine is running, on this thread or another: who frees memory
    may reserve some meanwhile, and is not asked for that.
    """

    def __init__(self, governor: Any) -> None:
        self._governor = governor  # an `ndm_governor *`
        self._lock = threading.RLock()
        self._entries: tuple[Reclaimer, ...] = ()
        # By engine; whatever becomes of the call, such as a second interrupt, its entry goes with it.
        self._running: WeakValueDictionary[int, _Call] = WeakValueDictionary()
        #: Whether something is posted for another thread.
        self.posted = False

    def add(self, engine: int, callback: Callable[[int], int], priority: int, *, thread: bool) -> Reclaimer:
        """Ask `callback` from now on."""
        entry = Reclaimer(self, engine, callback, index(priority), threading.current_thread() if thread else None)
        with self._lock:
            self._entries = (*self._entries, entry)
        return entry

    def remove(self, entry: Reclaimer) -> None:
        """Ask it no more."""
        with self._lock:
            self._entries = tuple(other for other in self._entries if other is not entry)
            self.posted = any(other._wanted for other in self._entries)

    def __bool__(self) -> bool:
        return bool(self._entries)

    def clear_running(self) -> None:
        """In a forked child: what ran on other threads does not run here."""
        self._lock = threading.RLock()
        self._running = WeakValueDictionary()

    def ask(self, engine: int | None, wanted: int, *, others: bool = True) -> Iterator[int]:
        """Ask one reclaimer after the other for `wanted` bytes, less what was freed, and give what each has freed.

        Those of `engine` come first; the rest, if `others`, by priority, then by what their engines hold. What is
        bound to another thread is posted there. The caller ends it when there is room.
        """
        here = threading.current_thread()
        entries = [entry for entry in self._entries if others or entry.engine == engine]

        def place(entry: Reclaimer) -> tuple[bool, int, int]:
            return entry.engine != engine, -entry.priority, -lib.ndm_governor_allocated(self._governor, entry.engine)

        for entry in sorted(entries, key=place):
            if entry._thread not in (None, here):
                with self._lock:
                    entry._wanted = max(entry._wanted, wanted)
                    self.posted = True
            else:
                freed = self._call(entry, wanted)
                wanted = max(1, wanted - freed)
                yield freed

    def poll(self) -> int:
        """Do what was posted for this thread. Bytes freed."""
        here = threading.current_thread()
        with self._lock:
            due = [(entry, entry._wanted) for entry in self._entries if entry._wanted and entry._thread == here]
            for entry, _ in due:
                entry._wanted = 0
            self.posted = any(entry._wanted for entry in self._entries)
        return sum(self._call(entry, wanted) for entry, wanted in due)

    def _call(self, entry: Reclaimer, wanted: int) -> int:
        with self._lock:
            if entry.engine in self._running or entry not in self._entries:
                return 0
            self._running[entry.engine] = call = _Call()
        try:
            freed = index(entry.callback(wanted))
            if freed < 0:
                raise ValueError(f"a reclaimer returned {freed} bytes")
        except Exception as error:
            _memory.report(error, entry.callback)
            return 0
        finally:
            del call
        lib.ndm_governor_note_reclaimed(self._governor, entry.engine, freed)
        return freed
