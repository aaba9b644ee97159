"""Wakes coroutines that stand in a governor's line."""

from __future__ import annotations

import _thread
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from nodedb_mem._core import lib

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable, Iterator

_NAP = 100_000_000  # ns; the thread sees then whether somebody sleeps still


class _Sleeper:
    """A coroutine that sleeps; it alone keeps this."""

    def __init__(self, loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
        self.loop, self.event = loop, event

    def wake(self) -> None:
        with suppress(RuntimeError):  # the loop was closed
            self.loop.call_soon_threadsafe(self.event.set)


class Waker:
    """One thread that waits for changes, as long as coroutines do, and wakes them all.

    The thread is in the core meanwhile, without the interpreter's lock. An event loop cannot wait there itself: the
    change may be made by another process, which knows nothing of it.
    """

    def __init__(self, governor: Any) -> None:
        self._governor = governor  # an `ndm_governor *`
        self._lock = threading.RLock()
        self._sleepers: WeakSet[_Sleeper] = WeakSet()
        self._runs = False

    def renew(self) -> None:
        """In a forked child: nobody sleeps here, and there is no thread."""
        self._lock = threading.RLock()
        self._sleepers = WeakSet()
        self._runs = False

    @contextmanager
    def sleeper(self) -> Iterator[Callable[[float], Awaitable[None]]]:
        """Give a coroutine function that sleeps until something has changed since it was given, or last ended."""
        import asyncio  # not before it is needed: it takes longer to import than all of this package

        event = asyncio.Event()
        me = _Sleeper(asyncio.get_running_loop(), event)

        async def sleep(seconds: float) -> None:
            try:
                async with asyncio.timeout(seconds):
                    await event.wait()
            except TimeoutError:
                pass
            event.clear()

        with self._lock:
            if not self._runs:
                _thread.start_new_thread(self._run, (lib.ndm_governor_changes(self._governor, -1, 0),))
                self._runs = True
            self._sleepers.add(me)
        try:
            yield sleep
        finally:
            with self._lock:
                self._sleepers.discard(me)

    def _run(self, seen: int) -> None:
        while True:
            now = lib.ndm_governor_changes(self._governor, seen, _NAP)
            with self._lock:
                if not self._sleepers:
                    self._runs = False
                    return
                sleepers = list(self._sleepers) if now != seen else []
            while sleepers:
                sleepers.pop().wake()
            seen = now
