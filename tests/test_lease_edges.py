"""Leases where the owner's books, the system's limits or the leases file itself could cost a reader its bytes."""

from __future__ import annotations

import errno
import os
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nodedb_mem import OverflowReader, OverflowRegion, RegionIOError, StaleSlotError

NewRegion = Callable[..., OverflowRegion]
StartPython = Callable[..., Any]
Check = Callable[[OverflowRegion], None]

KIB, MIB = 1 << 10, 1 << 20
SIZE = 100_000

# Leases the value that it is told of, and keeps it until it is killed.
_HOLDER = """
import sys
from nodedb_mem import OverflowReader
lease = OverflowReader(sys.argv[1]).lease(int(sys.argv[2]))
print("leased", flush=True)
sys.stdin.read()
"""


def blob(seed: int, size: int = SIZE) -> bytes:
    return seed.to_bytes(1, "little") * size


def overwrite(region: OverflowRegion) -> None:
    """Write where nobody keeps anything."""
    for slot in [region.write(b"\xff" * SIZE, 0) for _ in range(6)]:
        region.free(slot)
    region.compact()
    region.trim()


@pytest.mark.parametrize("before", [False, True], ids=["after a value", "after a hole"])
@pytest.mark.parametrize("many", [False, True], ids=["write", "write_many"])
def test_growing_takes_a_dead_readers_lease_next_to_the_last_hole(
    new_region: NewRegion, start_python: StartPython, check: Check, before: bool, many: bool
) -> None:
    region = new_region(initial_capacity=MIB, max_capacity=64 * MIB)
    first, hole, leased, last = (region.write(blob(i, 300 * KIB - i), 0) for i in range(4))
    region.share(leased)
    child = start_python(_HOLDER, region.path, leased)
    assert child.stdout.readline() == "leased\n"
    for slot in (leased, last, hole)[: 3 if before else 2]:
        region.free(slot)
    child.kill()
    child.wait()
    values = [blob(5, 2 * MIB), blob(6, 2 * MIB)]  # the first goes to the last hole, which is too short for it
    slots = region.write_many(values, 0) if many else [region.write(value, 0) for value in values]
    check(region)
    assert region.stats().pinned_bytes == 0
    assert [region.read_bytes(slot) for slot in slots] == values
    assert region.read_bytes(first) == blob(0, 300 * KIB)
