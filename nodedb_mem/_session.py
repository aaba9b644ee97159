"""What one thread at a time does to a mapping that spills, and how it is mended after an exception came in between."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nodedb_mem.errors import RegionClosedError

if TYPE_CHECKING:
    import threading

    from nodedb_mem._tiers import Entry, Tiers


class Session:
    """What one thread does, with the lock of the mapping."""

    __slots__ = ("entries", "lock", "tiers")

    def __init__(self, lock: threading.RLock, tiers: Tiers, entries: dict[Any, Entry]) -> None:
        self.lock = lock
        self.tiers = tiers
        self.entries = entries

    def __enter__(self) -> Tiers:
        tiers = self.tiers
        if tiers.closed:
            raise RegionClosedError("the mapping is closed")
        if tiers.unsettled and " count=1 " in repr(self.lock):  # not inside of another session
            tiers.mend(self.entries)
        return tiers

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None and self.tiers.transit is None:
            self.tiers.unsettled = False
