"""What a governor shows, and how its errors name the holders of memory: the half of it that changes nothing."""

from __future__ import annotations

import os
from operator import index
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from nodedb_mem import _memory
from nodedb_mem._core import ffi, lib
from nodedb_mem._system import resident_bytes
from nodedb_mem.budgets import EngineBudget, GovernorSnapshot, ProcessUsage
from nodedb_mem.errors import (
    BudgetExhaustedError,
    GlobalCeilingExceededError,
    Holders,
    UnknownEngineError,
    control,
    error_of,
)
from nodedb_mem.pressure import PressureLevel, PressureThresholds

if TYPE_CHECKING:
    from collections.abc import Callable

_Callback = TypeVar("_Callback", bound="Callable[..., object]")
_LEVELS = tuple(PressureLevel)
_new = ffi.new_allocator(should_clear_after_alloc=False)
_ENGINE_FIELDS = len(ffi.typeof("ndm_engine_figures").fields)
_PLAIN_FIELDS = ffi.offsetof("ndm_governor_figures", "engines") // 8
_PROCESS_FIELDS = len(ffi.typeof("ndm_process_figures").fields)


def engine_number(engine: int) -> int:
    """Check the number of an engine."""
    if not 0 <= (number := index(engine)) <= 255:
        raise ValueError("engine must be 0 to 255")
    return number


def size_of(size: int) -> int:
    """Check a size in bytes."""
    if not 0 <= (number := index(size)) < 1 << 63:
        raise ValueError("a size must not be negative, and below 2**63")
    return number


def callable_of(callback: _Callback) -> _Callback:
    """Check a callback."""
    if not callable(callback):
        raise TypeError(f"a callback must be callable, not {type(callback).__name__}")
    return callback


def seconds_of(timeout: float) -> float:
    """Check a number of seconds."""
    seconds = timeout + 0.0
    if not isinstance(seconds, float):
        raise TypeError("timeout must be a number of seconds, or None")
    if seconds != seconds:
        raise ValueError("timeout must be a number of seconds, or None")
    return seconds


class GovernorFigures(_memory.Governor):
    """The figures of a governor, its levels of pressure, its errors."""

    _path: str | None
    _where: tuple[str, ...]
    _names: dict[int, int]
    _holder: _memory.Holder
    _handle: Any

    def pressure(self, engine: int | None = None) -> PressureLevel:
        """Return the level of an engine, or that of all together, which is also raised by what `watch` finds."""
        return _LEVELS[self._control(lib.control_governor_pressure, -1 if engine is None else engine_number(engine))]

    def _level(self, engine: int) -> PressureLevel:
        level: PressureLevel = _LEVELS[max(0, lib.ndm_governor_pressure(self._handle, engine))]
        return level

    def snapshot(self) -> GovernorSnapshot:
        """Return the figures of this moment."""
        figures = self._figures()
        names, fields, count = self._names, _ENGINE_FIELDS, figures.engine_count
        values = ffi.unpack(ffi.cast("uint64_t *", figures), _PLAIN_FIELDS + count * fields)
        ceiling, headroom, allocated, _, peak, waiting, _, epoch, pressure, *_ = values[:_PLAIN_FIELDS]
        engines: dict[int, EngineBudget] = {}
        for engine, start in enumerate(range(_PLAIN_FIELDS, len(values), fields)):
            known, spillable, limit, held, most, rejections, waits, reclaimed, level = values[start : start + fields]
            if known:
                engines[names.get(engine, engine)] = EngineBudget(
                    bool(spillable), limit, held, most, rejections, waits, reclaimed, _LEVELS[level]
                )
        processes, rss, here = self._processes(figures), resident_bytes(), os.getpid()
        unmanaged = 0
        for process in processes:
            real = process.real_bytes or (rss if process.pid == here else 0)
            unmanaged += max(0, real - process.allocated)
        return GovernorSnapshot(
            self._path,
            ceiling,
            headroom,
            allocated,
            peak,
            max(0, allocated - ceiling),
            unmanaged,
            rss,
            waiting,
            _LEVELS[pressure],
            engines,
            processes,
            *_memory.counts(self._holder),
            epoch > 0,
        )

    @property
    def thresholds(self) -> PressureThresholds:
        """Where the levels of pressure begin."""
        figures = self._figures()
        return PressureThresholds(figures.warning, figures.critical, figures.emergency, figures.hysteresis)

    @property
    def path(self) -> str | None:
        """The file of a shared governor; None: this process alone."""
        return self._path

    @property
    def handle(self) -> int:
        """A number that stands for the governor in native code (``ndm_g_reserve`` and the like): a uint64, not 0.

        It owns nothing: once the governor is collected, native calls on it return ``NDM_ERR_CLOSED``. Any thread may
        use it.
        """
        return self._control(lib.control_governor_handle)

    def __repr__(self) -> str:
        figures = self._figures()
        where = "" if self._path is None else f" {self._path}"
        forked = ", began anew in a forked child" if figures.epoch else ""
        return f"<{type(self).__name__}{where}: {figures.allocated} of {figures.ceiling} bytes{forked}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"cannot copy or pickle {type(self).__name__!r}: open the same file in the other process")

    def _figures(self) -> Any:
        out = _new("ndm_governor_figures *")  # a finalizer may come in between, and look itself
        control(lib.control_governor_snapshot, self._where, self._handle, out)
        return out

    def _processes(self, figures: Any) -> tuple[ProcessUsage, ...]:
        count, fields = figures.process_count, _PROCESS_FIELDS
        values = ffi.unpack(ffi.cast("uint64_t *", figures.processes), count * fields)
        found = []
        for start in range(0, len(values), fields):
            pid, allocated, peak, real = values[start : start + fields]
            found.append(ProcessUsage(pid, allocated, peak, real or None))
        return tuple(found)

    def _held_here(self) -> int:
        """Bytes that this process has reserved."""
        pid = os.getpid()
        return sum(process.allocated for process in self._processes(self._figures()) if process.pid == pid)

    def _known(self) -> list[int]:
        figures = self._figures()
        return [engine for engine in range(figures.engine_count) if figures.engines[engine].known]

    def _control(self, call: Any, *arguments: Any) -> int:
        try:
            return control(call, self._where, self._handle, *arguments)
        except (BudgetExhaustedError, GlobalCeilingExceededError, UnknownEngineError) as error:
            raise self._with_holders(error) from None

    def _error(self, details: bytes) -> Exception:
        return self._with_holders(error_of(details, self._where))

    def _with_holders(self, error: Exception) -> Exception:
        """Return the error with the three engines that hold most, and engines by their names."""
        figures = self._figures()
        held = sorted(
            ((figures.engines[engine].allocated, engine) for engine in range(figures.engine_count)), reverse=True
        )
        holders: Holders = tuple((self._names.get(engine, engine), size) for size, engine in held[:3] if size)
        match error:
            case BudgetExhaustedError():
                engine = self._names.get(error.engine, error.engine)
                return BudgetExhaustedError(engine, error.requested, error.available, error.limit, holders)
            case GlobalCeilingExceededError():
                return GlobalCeilingExceededError(error.allocated, error.ceiling, error.requested, holders)
            case UnknownEngineError():
                return UnknownEngineError(self._names.get(error.engine, error.engine), holders)
            case _:
                return error
