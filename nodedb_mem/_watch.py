"""The watch of a governor: a thread that looks at what is real."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from nodedb_mem import _memory
from nodedb_mem._core import lib
from nodedb_mem._system import Stall, control_groups, read_stall

if TYPE_CHECKING:
    from types import TracebackType

    from psutil import Process

    from nodedb_mem.governor import MemoryGovernor

_STALLING = 10.0  # per cent of ten seconds in which all tasks waited: the level is at least CRITICAL
_MOST = 1000  # per cent, as the core takes it


@dataclass(frozen=True)
class Reading:
    """What a watch has found; sizes in bytes, None where the system does not tell.

    `pss` divides what processes share among them. `working_set` is what the control group uses, less the page cache
    that the kernel can drop; `group_limit` the smallest limit above it. `percent` is how much is in use of what may
    be used: the highest of all readings; `excess` how much of it reclaimers would be asked for.
    """

    rss: int
    pss: int
    group_current: int | None
    working_set: int | None
    group_limit: int | None
    stall: Stall | None
    percent: int
    excess: int


class Watch(threading.Thread):
    """A running watch; made by `MemoryGovernor.watch`. It ends with `stop`, with its governor, or with a with block."""

    def __init__(self, governor: MemoryGovernor, interval: float) -> None:
        if not 0 < interval <= threading.TIMEOUT_MAX:
            raise ValueError("interval must be positive, and no more seconds than a thread can wait for")
        try:
            import psutil
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "watch needs psutil: pip install nodedb_mem[watch]", name=error.name, path=error.path
            ) from None
        super().__init__(name="nodedb_mem watch", daemon=True)
        self._governor = weakref.ref(governor)
        self._interval = interval
        self._stopped = threading.Event()
        self._process: Process = psutil.Process()
        self._groups = control_groups()
        self._reading: Reading | None = None
        info = self._process.memory_full_info()
        self._before = max(0, info.pss - governor._held_here())  # what this process had besides, when the watch began

    def stop(self) -> None:
        """End the watch, and wait until it has ended. What it found counts no more."""
        self._stopped.set()
        if self.is_alive() and threading.current_thread() is not self:
            self.join()
        if (governor := self._governor()) is not None:
            lib.ndm_governor_note_real(governor._handle, 0, 0)

    @property
    def is_running(self) -> bool:
        """Whether the watch goes on."""
        return self.is_alive() and not self._stopped.is_set()

    @property
    def reading(self) -> Reading | None:
        """What was found last; None before the first look."""
        return self._reading

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def run(self) -> None:
        """Look, until it is stopped or the governor is gone."""
        while True:
            governor = self._governor()
            if governor is None:
                return
            try:
                self._look(governor)
            except Exception as error:
                _memory.report(error, self)
            del governor
            if self._stopped.wait(self._interval):
                return

    def _look(self, governor: MemoryGovernor) -> None:
        reading = self._reading = self._read(governor)
        lib.ndm_governor_note_real(governor._handle, reading.pss, reading.percent)
        governor.poll()
        governor._tell(-1, *governor._known())
        if reading.percent >= governor.thresholds.critical and reading.excess > 0:
            governor._relieve(reading.excess)

    def _read(self, governor: MemoryGovernor) -> Reading:
        info, figures, thresholds = self._process.memory_full_info(), governor._figures(), governor.thresholds
        unmanaged = max(0, info.pss - self._before - governor._held_here())
        use = _Use(figures.allocated + unmanaged, figures.ceiling, thresholds.warning)
        # What engines have reserved is within their budgets: only what nobody reserved is asked back.
        percent, excess = use.percent, min(unmanaged, use.excess)
        current = working = limit = stall = None
        for group in self._groups:
            size, most = group.working_set(), group.limit()
            stall = stall or group.stall()
            if size is not None and most and (limit is None or most < limit):
                current, working, limit = group.current(), size, most
                use = _Use(size, most, thresholds.warning)
                percent, excess = max((percent, excess), (use.percent, use.excess))
        if limit is None:
            stall = stall or read_stall(Path("/proc/pressure/memory"))
        if stall is not None and stall.full >= _STALLING:
            percent, excess = max((percent, excess), (thresholds.critical, figures.allocated // 10))
        return Reading(info.rss, info.pss, current, working, limit, stall, min(_MOST, percent), excess)


@dataclass(frozen=True)
class _Use:
    """Bytes that are used of a limit; `warning` is the first threshold."""

    used: int
    limit: int
    warning: int

    @property
    def percent(self) -> int:
        return 100 * self.used // self.limit

    @property
    def excess(self) -> int:
        """Bytes above the first threshold."""
        return max(0, self.used - self.limit * self.warning // 100)
