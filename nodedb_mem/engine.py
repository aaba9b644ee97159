"""The subsystems that own values."""

from enum import IntEnum


class EngineId(IntEnum):
    """A known engine; `str()` gives its lower-case name."""

    VECTOR = 0
    SPARSE = 1
    CRDT = 2
    TIMESERIES = 3
    QUERY = 4
    WAL = 5
    BRIDGE = 6

    def __str__(self) -> str:
        return self.name.lower()


KNOWN_ENGINES: dict[int, int] = {int(engine): engine for engine in EngineId}
