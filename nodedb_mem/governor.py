"""The memory governor: budgets of engines under one ceiling, in one process or in several."""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections import deque
from enum import Enum
from operator import index
from typing import TYPE_CHECKING, Any, Self

from nodedb_mem import _memory
from nodedb_mem._core import ffi, lib
from nodedb_mem._governed import GovernorFigures, callable_of, engine_number, seconds_of, size_of
from nodedb_mem._memory import Reservation
from nodedb_mem._reclaim import Reclaimer, Reclaimers
from nodedb_mem._system import default_ceiling
from nodedb_mem._waking import Waker
from nodedb_mem._watch import Watch
from nodedb_mem.engine import KNOWN_ENGINES
from nodedb_mem.pressure import PressureLevel, PressureThresholds

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["MemoryGovernor", "PressureSubscription", "Reservation"]

_NAP = 0.1  # seconds; then a waiter looks, whatever has changed, and does what was posted for its thread


class PressureSubscription:
    """A callback that hears of changes of pressure. Made by `MemoryGovernor.on_pressure`."""

    __slots__ = ("_governor", "callback")

    def __init__(self, governor: MemoryGovernor, callback: Callable[[int | None, PressureLevel], object]) -> None:
        self._governor, self.callback = weakref.ref(governor), callback

    def remove(self) -> None:
        """Call it no more. Removing it again does nothing."""
        if (governor := self._governor()) is not None:
            governor._unsubscribe(self)


class MemoryGovernor(GovernorFigures):
    """Keeps engines within their limits, and all of them within a ceiling.

    An engine reserves bytes before it allocates them, and releases them afterwards. No reservation takes an engine
    past its limit, or all of them past the ceiling, whatever other threads do. What does not fit is asked back from
    reclaimers first; then it waits, or is refused. Any thread may call any method.

    A forked child of a governor starts with nothing reserved. Its `snapshot` says so, and reservations that it
    inherited stand for nothing there.

    Parameters
    ----------
    ceiling
        The most bytes for all engines. None: 80 % of what this process may use, which is the smallest of physical
        memory and the limits of its control groups.
    limits
        The most bytes for each engine, an `EngineId`, a member of another IntEnum, or a number from 0 to 255.
    thresholds
        Where the levels of pressure begin.
    headroom
        Bytes of the ceiling that spillable engines together leave to the others.

    Raises
    ------
    ValueError
        The limits add up to more than the ceiling, `headroom` is above it, or an engine or a size is outside its
        range.
    """

    _watch: Watch | None

    def __init__(
        self,
        ceiling: int | None = None,
        limits: Mapping[int, int] | None = None,
        *,
        thresholds: PressureThresholds | None = None,
        headroom: int = 0,
    ) -> None:
        size = default_ceiling() if ceiling is None else index(ceiling)
        self._begin(None, _options(size, headroom, thresholds))
        self._add_engines(dict(limits or {}))

    @classmethod
    def shared(
        cls,
        path: str | os.PathLike[str],
        ceiling: int | None = None,
        limits: Mapping[int, int] | None = None,
        *,
        thresholds: PressureThresholds | None = None,
        headroom: int = 0,
    ) -> Self:
        """Share one governor with other processes, by a file.

        All processes that open the file live under one ceiling. The file is made if it is missing, with mode 0600;
        memory is a good place for it (`/dev/shm`). Where nobody uses the file it begins anew, with what is given
        here. Where somebody does, a ceiling that is given has to be the one in force, with its headroom and
        thresholds, and so has the limit of an engine that is known. What a process holds when it ends, or is killed,
        is given back.

        The file is trusted as far as its user is. Another process of the same user may break the counts, or shorten
        the file, which is SIGBUS here.

        Raises
        ------
        GovernorIOError
            The file is not a governor's, or of another version, or corrupt, or another user's, or the system refuses
            it.
        ValueError
            What is given is not what is in force, or as in the constructor.
        """
        self = cls.__new__(cls)
        size = default_ceiling() if ceiling is None else index(ceiling)
        self._begin(os.fspath(path), _options(size, headroom, thresholds, adopt=ceiling is None))
        self._add_engines(dict(limits or {}))
        return self

    @classmethod
    def look(cls, path: str | os.PathLike[str]) -> Self:
        """Open the file of a shared governor to look at it.

        It has to be there. Nothing is claimed before a reservation.
        """
        self = cls.__new__(cls)
        self._begin(os.fspath(path), None)
        return self

    def _begin(self, path: str | None, options: bytes | None) -> None:
        if hasattr(self, "_holder"):
            raise RuntimeError("a governor is initialised once: make another")
        self._path = path if path is None else os.fsdecode(os.fsencode(path))
        self._where = ("governor", self._path or "")
        self._names: dict[int, int] = dict(KNOWN_ENGINES)
        name = None if path is None else os.fsencode(path)
        self._hold(holder := _memory.open_governor(name, options, self._where, self._names))
        self._holder = holder
        self._handle = ffi.from_buffer("ndm_governor *", holder)
        self._reclaimers = Reclaimers(self._handle)
        self._waker = Waker(self._handle)
        self._lock: Any = threading.RLock()  # a finalizer may come back with a release at any time
        self._subscriptions: tuple[PressureSubscription, ...] = ()
        self._news: deque[tuple[int | None, PressureLevel]] = deque()  # levels that callbacks have not heard of
        self._delivering = threading.Lock()
        self._seen: dict[int, PressureLevel] = {}  # by engine; -1: all
        self._watch: Watch | None = None
        self._process = os.getpid()
        self._note_attention()
        _governors.add(self)

    def _add_engines(self, limits: Mapping[int, int]) -> None:
        """Add engines; what would be refused is refused before any is added."""
        wanted = {engine_number(engine): size_of(limit) for engine, limit in limits.items()}
        figures = self._figures()
        known = {engine: figures.engines[engine].limit for engine in self._known()}
        total = sum((known | wanted).values())
        if not known.keys() >= wanted.keys() and total > figures.ceiling:
            raise ValueError(f"the limits of all engines add up to {total} bytes, the ceiling is {figures.ceiling}")
        for engine, limit in wanted.items():
            if known.get(engine, limit) != limit:
                name = self._names.get(engine, engine)
                raise ValueError(f"the limit of {name} is {known[engine]}, not {limit}: use set_limit to change it")
        for engine, limit in limits.items():
            self.add_engine(engine, limit)

    def _notice_fork(self) -> None:
        if self._process != os.getpid():
            self._process, self._watch, self._lock = os.getpid(), None, threading.RLock()
            self._news, self._delivering = deque(), threading.Lock()
            self._reclaimers.clear_running()
            self._waker.renew()

    # ---- limits ----

    def add_engine(self, engine: int, limit: int, *, spillable: bool = True) -> None:
        """Let an engine have at most `limit` bytes. `spillable`: it can give memory back by spilling.

        Adding it again with the same limit and kind does nothing.

        Raises
        ------
        ValueError
            All limits would add up to more than the ceiling, or the engine is known with another limit or kind.
        """
        number = engine_number(engine)
        self._control(lib.control_governor_add_engine, number, size_of(limit), bool(spillable))
        if isinstance(engine, Enum):
            self._names[number] = engine

    def set_limit(self, engine: int, limit: int) -> None:
        """Change an engine's limit.

        Below what is reserved is allowed: nothing is taken away, and reservations are refused until it fits.

        Raises
        ------
        ValueError
            A higher limit would take the sum of all above the ceiling.
        UnknownEngineError
            The engine was not added.
        """
        self._control(lib.control_governor_set_limit, engine_number(engine), size_of(limit))

    def set_ceiling(self, ceiling: int, *, headroom: int | None = None) -> None:
        """Change the ceiling, and the headroom unless it is None. As with limits, nothing is taken away.

        The limits may then add up to more than the ceiling.

        Raises
        ------
        ValueError
            The ceiling is 0 or negative, or below the headroom.
        """
        kept = self._figures().headroom if headroom is None else size_of(headroom)
        self._control(lib.control_governor_set_ceiling, size_of(ceiling), kept)

    # ---- reservations: reserve, try_reserve and charge are the base's; what they refuse comes here ----

    def _obtain(self, reservation: Reservation, size: int, timeout: float | None, details: bytes, quiet: bool) -> Any:
        """Fill a reservation that was refused: by reclaimers, then by waiting. None, or the error, if that fails."""
        engine = int(reservation.engine)
        self._notice_fork()
        if ffi.from_buffer("ndm_error *", details).status == lib.NDM_ERR_ENGINE:
            raise self._error(details)
        try:
            deadline = None if timeout is None else time.monotonic() + float(timeout)
            refused = self._reclaim(reservation, engine, size, details)
            if refused is not None and timeout == 0:
                lib.ndm_governor_note_rejected(self._handle, engine)
            elif refused is not None:
                refused = self._stand_in_line(reservation, size, refused, deadline)
        except BaseException:
            _memory.give_up(reservation)
            raise
        if refused is None:
            return reservation
        _memory.give_up(reservation)
        if quiet:
            return None
        raise self._error(refused)

    def _more(self, engine: int, size: int, timeout: float | None) -> Reservation:
        return self.reserve(engine, size, timeout=timeout)

    def _reclaim(self, reservation: Reservation, engine: int, size: int, details: bytes) -> bytes | None:
        """Ask reclaimers until it fits; then other processes. The details of the last refusal, None if it is filled."""
        error = ffi.from_buffer("ndm_error *", details)
        others = error.status == lib.NDM_ERR_CEILING
        short = max(1, error.allocated + error.waiting + size - error.limit)
        if self._reclaimers:
            for _ in self._reclaimers.ask(engine, short, others=others):
                refused = _memory.fill(reservation, size)
                if refused is None:
                    return None
                details = refused
            self._note_attention()
        if self._path is not None:
            self._control(lib.control_governor_ask, -1 if others else engine, short)
        return details

    def _stand_in_line(
        self, reservation: Reservation, size: int, refused: bytes, deadline: float | None
    ) -> bytes | None:
        """Wait for room. The details of the last refusal, None if it is filled."""
        can_fit = _memory.queue(reservation, size)
        while can_fit:
            left = _NAP if deadline is None else deadline - time.monotonic()
            outcome = _memory.wait(reservation, int(max(0.0, min(left, _NAP)) * 1e9))
            if outcome is None or (outcome is not False and left <= 0):
                return outcome
            self.poll()
        return refused

    async def reserve_async(self, engine: int, size: int, *, timeout: float | None = None) -> Reservation:
        """Reserve, and wait for room without blocking the event loop: in line with all others, for `timeout` seconds.

        Reclaimers that are not bound to another thread run on the loop's thread. A task that is cancelled leaves the
        line.

        Raises
        ------
        BudgetExhaustedError, GlobalCeilingExceededError
            There was no room within `timeout`, or there could never be.
        """
        number, wanted = engine_number(engine), size_of(size)
        deadline = None if timeout is None else time.monotonic() + seconds_of(timeout)
        reservation = self.charge(number, 0)
        _memory.give_up(reservation)  # it holds nothing yet, and is not missed if a signal comes here
        try:
            refused = _memory.fill(reservation, wanted)
            if refused is not None:
                refused = self._reclaim(reservation, number, wanted, refused)
            if refused is not None:
                await self._stand_in_line_async(reservation, wanted, refused, deadline)
            self._attend(number)
        except BaseException:
            _memory.give_up(reservation)
            raise
        return reservation

    async def _stand_in_line_async(
        self, reservation: Reservation, size: int, refused: bytes, deadline: float | None
    ) -> None:
        if not _memory.queue(reservation, size):
            raise self._error(refused)
        with self._waker.sleeper() as sleep:
            while (outcome := _memory.wait(reservation, 0)) is not None:
                left = _NAP if deadline is None else deadline - time.monotonic()
                if left <= 0 and outcome is not False:
                    raise self._error(outcome)
                await sleep(max(0.0, min(left, _NAP)))
                self.poll()

    # ---- reclaim ----

    def add_reclaimer(
        self, engine: int, callback: Callable[[int], int], *, priority: int = 0, thread: bool = False
    ) -> Reclaimer:
        """Ask `callback(bytes_wanted)` for memory of `engine` when a reservation does not fit.

        It releases reservations, and returns the bytes that it freed. The engine's own reclaimers are asked first,
        when its limit is the obstacle only these. Others follow by `priority`, higher ones before, then by what their
        engines hold. It is called without any lock of the governor, never while another of the same engine is
        running. An exception goes to `sys.unraisablehook`.

        Parameters
        ----------
        thread
            Call it on this thread only, such as the owner of an `OverflowRegion`. Needed elsewhere, the request is
            posted. This thread takes it up with `poll`, or with its next reservation.
        """
        entry = self._reclaimers.add(engine_number(engine), callable_of(callback), priority, thread=thread)
        self._note_attention()
        return entry

    def poll(self) -> int:
        """Do what reclaimers were asked for on this thread, and by other processes. Bytes freed."""
        self._notice_fork()
        freed = self._reclaimers.poll() if self._reclaimers.posted else 0
        sizes = None if self._path is None else ffi.new("uint64_t[256]")
        if sizes and lib.ndm_governor_asked(self._handle, sizes) > 0:
            for engine, size in enumerate(sizes):
                if size:
                    freed += self._free(engine, size, others=False)
        self._note_attention()
        return freed

    def _free(self, engine: int | None, wanted: int, *, others: bool = True) -> int:
        """Ask reclaimers until they have freed that much."""
        freed = 0
        for part in self._reclaimers.ask(engine, wanted, others=others):
            freed += part
            if freed >= wanted:
                break
        return freed

    def _relieve(self, wanted: int) -> None:
        """Ask reclaimers, here and in other processes, for what is used beyond what was reserved."""
        freed = self._free(None, wanted)
        if self._path is not None and freed < wanted:
            lib.ndm_governor_ask(self._handle, -1, wanted - freed)
        self._note_attention()

    # ---- pressure ----

    def on_pressure(self, callback: Callable[[int | None, PressureLevel], object]) -> PressureSubscription:
        """Call `callback(engine, level)` when a level has changed; engine None is all together.

        It runs on a thread whose reservation or release changed a level, or on that of `watch`, without any lock. One
        call follows the other, in the order of the changes. An exception goes to `sys.unraisablehook`.
        """
        subscription = PressureSubscription(self, callable_of(callback))
        with self._lock:
            if not self._subscriptions:
                self._seen = {engine: self._level(engine) for engine in (-1, *self._known())}
            self._subscriptions = (*self._subscriptions, subscription)
        self._note_attention()
        return subscription

    def _unsubscribe(self, subscription: PressureSubscription) -> None:
        with self._lock:
            self._subscriptions = tuple(other for other in self._subscriptions if other is not subscription)
        self._note_attention()

    def _tell(self, *engines: int) -> None:
        """Tell the callbacks of levels that have changed; -1: of all."""
        with self._lock:
            for engine in engines if self._subscriptions else ():
                level = self._level(engine)
                if self._seen.get(engine, PressureLevel.NORMAL) is not level:
                    self._seen[engine] = level
                    self._news.append((self._names.get(engine, engine) if engine >= 0 else None, level))
        # One thread at a time tells, so that callbacks hear of changes in their order; what others find meanwhile, too.
        while self._news and self._delivering.acquire(blocking=False):
            try:
                while self._news:
                    self._deliver(*self._news.popleft())
            finally:
                self._delivering.release()

    def _deliver(self, engine: int | None, level: PressureLevel) -> None:
        for subscription in self._subscriptions:
            try:
                subscription.callback(engine, level)
            except Exception as error:
                _memory.report(error, subscription.callback)

    def _attend(self, engine: int) -> None:
        """Hear that something of that engine has changed: for callbacks, and for requests that are posted."""
        self.poll()
        self._tell(engine, -1)

    def _note_attention(self) -> None:
        with self._lock:  # what is posted meanwhile is noted afterwards
            attention = self._reclaimers.posted or bool(self._subscriptions)
            _memory.watch(self._holder, attention, sys.flags.dev_mode)

    # ---- watch ----

    def watch(self, interval: float = 0.5) -> Watch:
        """Look at what is real every `interval` seconds, on a daemon thread, until the watch is stopped.

        The watch reads this process's RSS and PSS, the memory and the working set of its control group, and the
        kernel's pressure stall information. What the process has grown by without a reservation counts as use of the
        ceiling; so does use of the control group's limit. From `CRITICAL` on, reclaimers are asked for what
        is above the first threshold. It also takes up requests of other processes.

        Raises
        ------
        ModuleNotFoundError
            psutil is missing: ``pip install nodedb_mem[watch]``.
        RuntimeError
            A watch is running.
        """
        self._notice_fork()
        with self._lock:
            if self._watch is not None and self._watch.is_running:
                raise RuntimeError("the governor has a watch already: stop it first")
            self._watch = watch = Watch(self, interval)
            watch.start()
        return watch


def _options(ceiling: int, headroom: int, given: PressureThresholds | None, *, adopt: bool = False) -> bytes:
    thresholds = PressureThresholds() if given is None else given
    if not isinstance(thresholds, PressureThresholds):
        raise TypeError(f"thresholds must be PressureThresholds, not {type(thresholds).__name__}")
    fields = [
        size_of(ceiling),
        size_of(headroom),
        thresholds.warning,
        thresholds.critical,
        thresholds.emergency,
        thresholds.hysteresis,
        adopt,
    ]
    return bytes(ffi.buffer(ffi.new("ndm_governor_options *", fields)))


_governors: weakref.WeakSet[MemoryGovernor] = weakref.WeakSet()


def _begin_anew() -> None:
    for governor in list(_governors):
        governor._notice_fork()


os.register_at_fork(after_in_child=_begin_anew)
