"""Overflow regions, which take cold buffers out of RAM; and a governor that keeps engines within their budgets."""

import sys

if sys.platform != "linux":
    raise ImportError("nodedb_mem needs Linux: it is built on mremap, fallocate and flock")

# First: it makes sure that the core which the others use is the right one.
from nodedb_mem.native import get_include, get_libraries, get_library_dirs  # isort: skip

from nodedb_mem.budgets import EngineBudget, GovernorSnapshot, ProcessUsage
from nodedb_mem.engine import EngineId
from nodedb_mem.errors import (
    BudgetExhaustedError,
    CapacityExceededError,
    GlobalCeilingExceededError,
    GovernorIOError,
    InvalidSlotError,
    MemError,
    RegionBusyError,
    RegionClosedError,
    RegionError,
    RegionIOError,
    RegionSizeError,
    RepeatedSlotError,
    StaleSlotError,
    UndecodableError,
    UnknownEngineError,
    WrongThreadError,
)
from nodedb_mem.governor import MemoryGovernor, Reservation
from nodedb_mem.objects import ObjectRef
from nodedb_mem.overflow_map import OverflowMap
from nodedb_mem.pressure import PressureLevel, PressureThresholds, SpillAction, SpillController
from nodedb_mem.reader import Lease, OverflowReader
from nodedb_mem.refs import SlotParts, SlotRef
from nodedb_mem.region import OverflowRegion
from nodedb_mem.spilling import SpillMapping
from nodedb_mem.stats import Compaction, EngineUsage, OverflowSlot, ReaderSlot, ReaderStats, RegionStats, SpillStats
from nodedb_mem.tuning import MemoryTuning

__all__ = [
    "BudgetExhaustedError",
    "CapacityExceededError",
    "Compaction",
    "EngineBudget",
    "EngineId",
    "EngineUsage",
    "GlobalCeilingExceededError",
    "GovernorIOError",
    "GovernorSnapshot",
    "InvalidSlotError",
    "Lease",
    "MemError",
    "MemoryGovernor",
    "MemoryTuning",
    "ObjectRef",
    "OverflowMap",
    "OverflowReader",
    "OverflowRegion",
    "OverflowSlot",
    "PressureLevel",
    "PressureThresholds",
    "ProcessUsage",
    "ReaderSlot",
    "ReaderStats",
    "RegionBusyError",
    "RegionClosedError",
    "RegionError",
    "RegionIOError",
    "RegionSizeError",
    "RegionStats",
    "RepeatedSlotError",
    "Reservation",
    "SlotParts",
    "SlotRef",
    "SpillAction",
    "SpillController",
    "SpillMapping",
    "SpillStats",
    "StaleSlotError",
    "UndecodableError",
    "UnknownEngineError",
    "WrongThreadError",
    "get_include",
    "get_libraries",
    "get_library_dirs",
]
