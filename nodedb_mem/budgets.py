"""What a governor shows of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nodedb_mem.pressure import PressureLevel


@dataclass(frozen=True, slots=True)
class EngineBudget:
    """What an engine may have and has; sizes in bytes.

    `waits` counts reservations that stood in line, `rejections` those that were refused for want of room. `reclaimed`
    is what its reclaimers have freed.
    """

    spillable: bool
    limit: int
    allocated: int
    peak: int
    rejections: int
    waits: int
    reclaimed: int
    pressure: PressureLevel

    @property
    def utilization(self) -> float:
        """Per cent of the limit that is reserved."""
        return _percent(self.allocated, self.limit)

    @property
    def overcommitted(self) -> int:
        """Bytes above the limit: charged, or reserved before it was lowered."""
        return max(0, self.allocated - self.limit)


@dataclass(frozen=True, slots=True)
class ProcessUsage:
    """What a process has reserved; `real_bytes` is the RAM that it has, None where it runs no watch."""

    pid: int
    allocated: int
    peak: int
    real_bytes: int | None


@dataclass(frozen=True, slots=True)
class GovernorSnapshot:
    """A governor at one moment; sizes in bytes.

    Attributes
    ----------
    path
        The file of a shared governor; None: this process alone.
    ceiling, headroom
        What all engines may have; what spillable ones leave to the others.
    allocated, peak
        What is reserved, and was at most. Of several processes, `peak` is the highest sum at a moment when one of
        them had to look at all.
    overcommitted
        Bytes above the ceiling: charged, or reserved before it was lowered.
    unmanaged
        Bytes of RAM that the processes have and nobody reserved. Interpreter and libraries are among them. Of a
        shared governor, the processes that run a watch, and this one.
    rss
        This process's resident set.
    waiting
        Reservations that stand in line.
    pressure
        The level of all together.
    engines, processes
        By engine; the processes, one if the governor is not shared.
    repeated_releases, unreleased
        This process's: releases of what had been released, and reservations that were collected unreleased.
    forked
        Whether the governor was made in a parent of this process: it started with nothing reserved.
    """

    path: str | None
    ceiling: int
    headroom: int
    allocated: int
    peak: int
    overcommitted: int
    unmanaged: int
    rss: int
    waiting: int
    pressure: PressureLevel
    engines: dict[int, EngineBudget]
    processes: tuple[ProcessUsage, ...]
    repeated_releases: int
    unreleased: int
    forked: bool

    @property
    def utilization(self) -> float:
        """Per cent of the ceiling that is reserved."""
        return _percent(self.allocated, self.ceiling)

    def as_json(self) -> dict[str, Any]:
        """Everything, of types that `json.dumps` knows; engines by name, levels by name."""
        plain = _fields(self)
        plain["engines"] = {
            str(engine): _fields(budget) | {"utilization": round(budget.utilization, 2)}
            for engine, budget in self.engines.items()
        }
        plain["processes"] = [_fields(process) for process in self.processes]
        return plain | {"utilization": round(self.utilization, 2)}


def _fields(record: Any) -> dict[str, Any]:
    values = ((name, getattr(record, name)) for name in record.__dataclass_fields__)
    return {name: str(value) if isinstance(value, PressureLevel) else value for name, value in values}


def _percent(used: int, limit: int) -> float:
    return 100 * used / limit if limit else (100.0 if used else 0.0)
