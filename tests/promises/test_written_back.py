"""Values that are written where the kernel has written back before: what was mapped for writing faults there again."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest

from kit import Check, NewRegion, StartPython, system
from nodedb_mem import OverflowReader, OverflowRegion

COUNT, MIB = 20_000, 1 << 20


def blob(number: int, size: int) -> bytes:
    return number.to_bytes(8, "little") + bytes([number % 251]) * (size - 8)


def write_back(region: OverflowRegion) -> None:
    """All of both files: what sync(1) does, for one region."""
    assert region.path is not None
    for path in (region.path, f"{region.path}.slots"):
        with open(path, "r+b") as file:
            os.fsync(file.fileno())


@pytest.mark.parametrize("by", ["flush", "fsync", "evict"])
@pytest.mark.parametrize("limit", [None, 4 * MIB, system(0)])
@pytest.mark.parametrize("size", [100, 1500])
def test_values_rewritten_after_write_back(
    new_region: NewRegion, check: Check, size: int, limit: int | None, by: str
) -> None:
    region = new_region(cache_limit=limit, max_capacity=64 * MIB)
    assert region.path is not None
    chance = random.Random(size)
    stored = {region.write(blob(number, size), 0): number for number in range(COUNT)}
    with OverflowReader(region.path) as reader:
        for turn in range(1, 4):
            gone = chance.sample(sorted(stored), COUNT // 2)
            region.free_many(gone)
            for slot in gone:
                del stored[slot]
            match by:
                case "flush":
                    region.flush()
                case "fsync":
                    write_back(region)
                case "evict":
                    region.evict()
            used = region.used_bytes
            for number in range(turn * COUNT, turn * COUNT + COUNT // 2):
                stored[region.write(blob(number, size), 0)] = number
            assert region.used_bytes == used  # free space was used first
            sample = chance.sample(sorted(stored), 500)
            assert all(reader.read_bytes(slot) == blob(stored[slot], size) for slot in sample)
        slots = sorted(stored)
        assert all(
            bytes(view) == blob(stored[slot], size) for slot, view in zip(slots, region.read_many(slots), strict=True)
        )
    check(region)


def test_large_neighbours_keep_their_bytes(new_region: NewRegion, check: Check) -> None:
    region = new_region(cache_limit=None, max_capacity=64 * MIB)
    stored = {}
    for number in range(400):
        for size in (64 << 10, 100, 100, 100):
            stored[region.write(blob(number, size), 0)] = (number, size)
    for turn in range(3):
        small = [slot for slot, (_, size) in stored.items() if size == 100]
        region.free_many(small[turn::3])
        for slot in small[turn::3]:
            del stored[slot]
        write_back(region)
        for number in range(400):
            stored[region.write(blob(number + turn, 100), 0)] = (number + turn, 100)
    assert all(region.read_bytes(slot) == blob(*what) for slot, what in stored.items())
    check(region)


_OWNER = """
import os, random, sys
from nodedb_mem import OverflowRegion

path, count = sys.argv[1], int(sys.argv[2])
blob = lambda number: number.to_bytes(8, "little") + bytes([number % 251]) * 92
region = OverflowRegion.open(path, cache_limit=None)
slots = [region.write(blob(number), 0) for number in range(count)]
for turn in (1, 2):
    for name in (path, path + ".slots"):
        with open(name, "r+b") as file:
            os.fsync(file.fileno())
    places = random.Random(turn).sample(range(count), count // 2)
    region.free_many([slots[place] for place in places])
    for place in places:
        slots[place] = region.write(blob(turn * count + place), 0)
        print(slots[place], turn * count + place)
print("done", flush=True)
sys.stdin.read()
"""


def test_what_was_rewritten_survives_a_kill(
    tmp_path: Path, new_region: NewRegion, start_python: StartPython, check: Check
) -> None:
    child = start_python(_OWNER, tmp_path / "region", COUNT)
    stored = {slot: slot for slot in range(COUNT)}
    while (line := child.stdout.readline()) != "done\n":
        slot, number = map(int, line.split())
        stored[slot] = number
    child.send_signal(signal.SIGKILL)
    child.wait()
    region = new_region(recover=True, max_capacity=64 * MIB)
    check(region)
    assert len(region) == COUNT
    assert all(region.read_bytes(slot) == blob(number, 100) for slot, number in stored.items())
