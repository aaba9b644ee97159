"""A first look at an installed wheel: `python tests/smoke.py`. Needs nothing but the package itself."""

from __future__ import annotations

import array
import os
import sys
import tempfile
import threading
import warnings

from nodedb_mem import (
    BudgetExhaustedError,
    CapacityExceededError,
    EngineId,
    InvalidSlotError,
    MemError,
    MemoryGovernor,
    MemoryTuning,
    OverflowRegion,
    RegionBusyError,
    RegionClosedError,
    WrongThreadError,
)
from nodedb_mem._core import lib


def refused(kind: type[BaseException], function, *arguments) -> None:  # type: ignore[no-untyped-def]
    """Assert that the call raises `kind`."""
    try:
        function(*arguments)
    except kind as error:
        assert isinstance(error, MemError) or not issubclass(kind, MemError)
    else:
        raise AssertionError(f"{function} raised no {kind.__name__}")


def govern(path: str) -> None:
    """Reserve, privately and shared; leave a reservation unreleased, and keep what the warning has of it."""
    for governor in (MemoryGovernor(1000, {0: 1000}), MemoryGovernor.shared(path, 1000, {0: 1000})):
        with governor.reserve(EngineId.VECTOR, 600) as held:
            refused(BudgetExhaustedError, governor.reserve, 0, 401)
            held.resize(500)
            part = held.split(100)
            assert (held.size, part.size, part.engine) == (400, 100, EngineId.VECTOR)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            del part
        assert caught[0].category is ResourceWarning and caught[0].source.released
        del caught
        assert governor.snapshot().allocated == 0 and governor.snapshot().unreleased == 1
        assert governor.try_reserve(0, 1001) is None
        assert lib.ndm_governor_check(governor._handle) == 0


def main() -> None:
    """Use each part once."""
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "region")
        with OverflowRegion.open_with_tuning(path, MemoryTuning(4096, 1 << 20)) as region:
            values = [os.urandom(size) for size in (0, 1, 13, 4096, 100_000)]
            slots = [region.write(value, EngineId.VECTOR) for value in values]
            assert slots == [0, 1, 2, 3, 4]
            views = [region.read(slot) for slot in slots]
            assert views == values == [region.read_bytes(slot) for slot in slots]
            assert region.slot(4).engine is EngineId.VECTOR and str(EngineId.VECTOR) == "vector"
            room = bytearray(13)
            assert region.read_into(2, room) == 13 and room == values[2]

            region.free(4)
            refused(InvalidSlotError, region.read, 4)
            again = region.write(array.array("d", [0.5] * 12_500), 200)
            assert views[4] == values[4] and region.slot(again).engine == 200
            refused(CapacityExceededError, region.write, bytes(1 << 21), 0)
            refused(TypeError, region.write, "text", 0)
            refused(RegionBusyError, OverflowRegion.open, path)

            outcome: list[BaseException] = []

            def intrude() -> None:
                try:
                    region.write(b"x", 0)
                except BaseException as error:
                    outcome.append(error)

            thread = threading.Thread(target=intrude)
            thread.start()
            thread.join()
            assert type(outcome[0]) is WrongThreadError

            assert (len(region), 0 in region, 99 in region) == (5, True, False)
            assert region.stats().live_bytes == region.live_bytes
            assert lib.ndm_region_check(region._handle) == 0
        refused(RegionClosedError, region.read, 0)
        assert views == values
        with OverflowRegion.temporary(directory) as region:
            assert region.read(region.write(b"gone soon", EngineId.WAL)) == b"gone soon"
        assert sorted(os.listdir(directory)) == ["region", "region.slots"]
        govern(os.path.join(directory, "governor"))
    print(f"smoke test passed on Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
