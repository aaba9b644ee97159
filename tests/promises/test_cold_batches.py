"""Many values that are not in RAM: the disk is asked for all of them before the first is touched."""

from __future__ import annotations

import itertools
import os
import random
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit import Check, NewRegion, blob
from nodedb_mem import InvalidSlotError, OverflowReader, OverflowRegion
from nodedb_mem._core import lib

PAGE = os.sysconf("SC_PAGESIZE")
KIB, MIB = 1 << 10, 1 << 20
SLACK = 4 * MIB  # what may lie above a limit while the writer is at work


@pytest.fixture
def new(tmp_path: Path, new_region: NewRegion) -> NewRegion:
    """Make regions on a disk; afterwards check the open ones and close them."""
    with OverflowRegion.temporary(tmp_path) as probe:
        if lib.ndm_region_in_memory(probe._handle):
            pytest.skip("the tests' directory is in memory")
    number = itertools.count()

    def make(**options: Any) -> OverflowRegion:
        options = {"initial_capacity": MIB, "max_capacity": 256 * MIB} | options
        return new_region(tmp_path / f"region{next(number)}", **options)

    return make


def fill(region: OverflowRegion, count: int, size: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Write that many values; returns their slots, in random order, and the values in the same order."""
    values = np.random.default_rng(1).integers(0, 256, (count, size), np.uint8)
    slots = np.frombuffer(region.write_many(values, 0, lengths=np.full(count, size, np.int64)), np.int64)
    order = np.random.default_rng(2).permutation(count)
    return slots[order], values[order]


@contextmanager
def waits() -> Iterator[Callable[[], int]]:
    """How often this thread has waited so far: for a page, among other things."""
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
    yield lambda: resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - before


@pytest.mark.parametrize("limit", [None, 64 * MIB, 4 * MIB])
def test_no_small_value_of_a_batch_of_copies_is_waited_for_by_itself(new: NewRegion, limit: int | None) -> None:
    region = new(cache_limit=limit)
    slots, values = fill(region, 100_000)
    region.evict()
    room = np.zeros_like(values)
    with waits() as count:
        region.read_many_into(slots, room)
        assert count() < values.size // PAGE // 20
    assert (room == values).all()


@pytest.mark.parametrize("limit", [None, 64 * MIB])
@pytest.mark.parametrize("verb", ["read_many", "prefetch"])
def test_no_small_value_of_a_batch_of_views_is_waited_for_by_itself(
    new: NewRegion, limit: int | None, verb: str
) -> None:
    region = new(cache_limit=limit)
    slots, values = fill(region, 20_000)
    region.evict()
    with waits() as count:
        if verb == "read_many":
            found = [bytes(view) for view in region.read_many(slots)]
        else:
            region.prefetch(slots)
            found = [region.read_bytes(slot) for slot in slots.tolist()]
        assert count() < values.size // PAGE // 20
    assert found == [value.tobytes() for value in values]


@pytest.mark.parametrize("limit", [None, 64 * MIB])
def test_what_an_earlier_owner_left_on_the_disk_is_asked_for_too(
    new: NewRegion, check: Check, limit: int | None
) -> None:
    region = new()
    slots, values = fill(region, 20_000)
    region.evict()
    region.close()
    assert region.path is not None
    with OverflowRegion.open(region.path, max_capacity=256 * MIB, cache_limit=limit, recover=True) as again:
        room = np.zeros_like(values)
        with waits() as count:
            again.read_many_into(slots, room)
            assert count() < values.size // PAGE // 20
        assert (room == values).all()
        check(again)


@pytest.mark.parametrize("limit", [None, 4 * MIB])
@pytest.mark.parametrize("left", ["all", "some", "none"])
def test_values_of_any_size_come_back_equal(new: NewRegion, check: Check, limit: int | None, left: str) -> None:
    region = new(cache_limit=limit)
    sizes = [0, 1, 100, 4096, 4097, 65_535, 65_536, 600_000, 3 * MIB] * 4 + [7] * 500
    values = {region.write(blob(size, seed), 0): blob(size, seed) for seed, size in enumerate(sizes)}
    wanted = random.Random(1).choices(list(values), k=400)  # some of them twice
    for _ in range(3):
        if left != "all":
            region.evict(None if left == "none" else wanted[::3])
        expected = [values[slot] for slot in wanted]
        room = bytearray(sum(map(len, expected)))
        lengths = region.read_many_into(wanted, room)
        assert lengths.tolist() == [len(value) for value in expected]
        assert room == b"".join(expected)
        if left != "all":
            region.evict(None if left == "none" else wanted[::3])
        assert region.read_many(wanted) == expected
        region.prefetch(wanted)
        check(region)


@pytest.mark.parametrize("size", [100, 300 * KIB])
def test_a_batch_larger_than_the_limit_stays_below_it(new: NewRegion, size: int) -> None:
    limit = 8 * MIB
    region = new(cache_limit=limit)
    slots, values = fill(region, 48 * MIB // max(size, 128), size)
    region.evict()
    assert region.path is not None
    room, peak, over = np.zeros_like(values), [0], threading.Event()

    def watch(reader: OverflowReader) -> None:
        while not over.is_set():
            peak.append(reader.stats().resident_bytes or 0)

    with OverflowReader(region.path) as reader:
        watcher = threading.Thread(target=watch, args=(reader,))
        watcher.start()
        region.read_many_into(slots, room)
        over.set()
        watcher.join()
    assert (room == values).all()
    assert max(peak) <= limit + SLACK


def test_a_value_larger_than_the_limit_among_small_ones(new: NewRegion) -> None:
    region = new(cache_limit=4 * MIB)
    values = [blob(100, 1), blob(24 * MIB, 2), blob(100, 3), blob(24 * MIB, 4), blob(100, 5)]
    slots = [region.write(value, 0) for value in values]
    region.evict()
    room = bytearray(sum(map(len, values)))
    region.read_many_into(slots[::-1], room)
    assert room == b"".join(values[::-1])
    region.evict()
    assert region.read_many(slots[::-1]) == values[::-1]


def in_ram(region: OverflowRegion) -> int:
    return region.stats().resident_bytes


def test_prefetched_values_come_to_ram_without_being_touched(new: NewRegion) -> None:
    region = new(cache_limit=None)
    slots = [region.write(blob(MIB, i), 0) for i in range(16)]
    region.evict()
    assert in_ram(region) < MIB
    region.prefetch(slots[::-2])
    deadline = time.monotonic() + 20
    while in_ram(region) < 8 * MIB and time.monotonic() < deadline:
        time.sleep(0.001)
    assert 8 * MIB <= in_ram(region) < 12 * MIB
    assert all(region.read(slot) == blob(MIB, i) for i, slot in enumerate(slots))


def test_a_slot_that_is_none_is_an_error_and_nothing_is_asked_for(new: NewRegion) -> None:
    region = new(cache_limit=None)
    slots = [region.write(blob(MIB, i), 0) for i in range(4)]
    region.free(slots[2])
    region.evict()
    for bad in (slots[2], 4, -1):
        with pytest.raises(InvalidSlotError):
            region.prefetch([slots[0], bad, slots[1]])
    with pytest.raises(TypeError):
        region.prefetch("012")  # type: ignore[arg-type]
    region.prefetch([])
    time.sleep(0.05)
    assert in_ram(region) < MIB


def test_writes_and_frees_go_on_between_cold_batches(new: NewRegion, check: Check) -> None:
    region = new(cache_limit=4 * MIB)
    chance = random.Random(3)
    values: dict[int, bytes] = {}
    for step in range(60):
        for _ in range(chance.randrange(60)):
            value = blob(chance.choice([10, 100, 5000, 70_000]), chance.randrange(1 << 30))
            values[region.write(value, 0)] = value
        for slot in chance.sample(list(values), len(values) // 4):
            region.free(slot)
            del values[slot]
        if step % 3 == 0:
            region.evict()
        wanted = chance.sample(list(values), len(values) // 2)
        room = bytearray(sum(len(values[slot]) for slot in wanted))
        region.read_many_into(wanted, room)
        assert room == b"".join(values[slot] for slot in wanted)
        assert region.read_many(wanted) == [values[slot] for slot in wanted]
    check(region)
