"""Write rows to slots and read them in place from a compiled loop: `python numba_loop.py DIRECTORY`."""

from __future__ import annotations

import sys

import numba
import numpy as np

from nodedb_mem import EngineId, OverflowRegion
from nodedb_mem import numba as spill


@numba.njit
def write_rows(handle, rows, slots):  # type: ignore[no-untyped-def]
    """Give each row a slot; a negative status ends it."""
    for i in range(len(rows)):
        slots[i] = spill.write(handle, rows[i], EngineId.TIMESERIES)
        if slots[i] < 0:
            return slots[i]
    return 0


@numba.njit
def sum_rows(handle, slots, sums):  # type: ignore[no-untyped-def]
    """Sum each row where it lies, with no copy."""
    for i in range(len(slots)):
        size, data = spill.pin(handle, slots[i])
        if size < 0:
            return size
        sums[i] = data.view(np.float64).sum()
        spill.unpin(data)
    return 0


def main() -> None:
    """Compare what the loops did with what Python reads."""
    rows = np.random.default_rng(7).random((1000, 64))
    slots, sums = np.empty(len(rows), np.int64), np.empty(len(rows))
    with OverflowRegion.temporary(sys.argv[1]) as region:
        spill.check(write_rows(region.handle, rows, slots))
        spill.check(sum_rows(region.handle, slots, sums))
        for row, slot in zip(rows, slots, strict=True):
            assert np.array_equal(np.frombuffer(region.read(slot)), row)
    assert np.allclose(sums, rows.sum(axis=1))
    print(f"{len(rows)} rows: all as written")


if __name__ == "__main__":
    main()
