"""The ways by which bytes get into the file: memcpy into zeroed grains, pwrite, streaming stores; and full disks.

On five file systems, because each makes the core choose differently. What could end in SIGBUS runs in a process of its
own.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kit import Check, Mount, RunPython, blob, system
from nodedb_mem import OverflowRegion, RegionIOError

Open = Callable[..., OverflowRegion]

PAGE = os.sysconf("SC_PAGESIZE")
KIB, MIB = 1 << 10, 1 << 20
GRAIN = 512 * KIB  # every write is cut at multiples of it
THRESHOLDS = (PAGE, 64 * KIB, 256 * KIB, GRAIN, 2 * GRAIN)
STRADDLING = tuple(size + step for size in THRESHOLDS for step in (-1, 0, 1))

on_each = pytest.mark.parametrize("kind", ["ext4", "tmpfs", system("ext2"), system("btrfs"), system("xfs")])
each_alignment = pytest.mark.parametrize("alignment", [1, 64, 4096])


@pytest.fixture
def open_on(mount: Mount, check: Check) -> Iterator[Open]:
    """Open a region on a file system of the given kind, 64 MiB large or more."""
    made: list[OverflowRegion] = []

    def make(kind: str, **options: int | None) -> OverflowRegion:
        options.setdefault("initial_capacity", 1 << 16)
        options.setdefault("max_capacity", 48 * MIB)
        made.append(OverflowRegion.open(mount(kind, 64) / "region", **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for region in made:
        check(region)
        region.close()


def assert_equal(region: OverflowRegion, expected: dict[int, bytes]) -> None:
    assert len(region) == len(expected)
    buffer = bytearray(max(map(len, expected.values()), default=0))
    for number, (slot, value) in enumerate(expected.items()):
        if number % 2:
            assert region.read(slot) == value, f"slot {slot}, {len(value)} bytes"
        else:
            size = region.read_into(slot, buffer)
            assert memoryview(buffer)[:size] == value, f"slot {slot}, {len(value)} bytes"


def assert_equal_after_evictions(region: OverflowRegion, expected: dict[int, bytes]) -> None:
    assert_equal(region, expected)
    region.evict(list(expected)[::2])
    assert_equal(region, expected)
    region.evict()
    assert_equal(region, expected)


# Sizes that straddle the thresholds


@on_each
@each_alignment
def test_sizes_around_each_threshold_come_back(open_on: Open, kind: str, alignment: int) -> None:
    region = open_on(kind, alignment=alignment)
    expected = {}
    for step in (0, 1, 4099):  # shifts every value against pages and grains
        if step:
            expected[region.write(blob(step, 1), 0)] = blob(step, 1)
        for number, size in enumerate(STRADDLING):
            expected[region.write(blob(size, number), 0)] = blob(size, number)
    assert_equal_after_evictions(region, expected)


@on_each
@pytest.mark.parametrize("alignment", [1, 4096])
def test_freed_space_is_written_again_whether_it_was_dropped_or_not(open_on: Open, kind: str, alignment: int) -> None:
    # Each round leaves grains in another state: in RAM, dropped, or with some of their values dropped.
    region = open_on(kind, alignment=alignment)
    expected = {}
    for number, size in enumerate(STRADDLING):
        expected[region.write(blob(size, number), 0)] = blob(size, number)
    for round_ in range(4):
        if round_:
            region.evict(list(expected)[::3] if round_ == 2 else None)
        freed = list(expected)[round_ % 2 :: 2]
        sizes = [len(expected.pop(slot)) for slot in freed]
        for slot in freed:
            region.free(slot)
        for number, size in enumerate(sizes):
            size = max(1, size - number % 3)
            data = blob(size, 1000 * round_ + number)
            expected[region.write(data, 0)] = data
        assert_equal(region, expected)
    assert_equal_after_evictions(region, expected)


@on_each
@pytest.mark.parametrize("size", [1, 100, 4095, 40_000])
def test_many_small_values_fill_grains_without_gaps(open_on: Open, kind: str, size: int) -> None:
    region = open_on(kind, alignment=1)
    expected = {}
    for number in range(min(20_000, 3 * MIB // size)):
        data = number.to_bytes(4, "little") * (size // 4 + 1)
        expected[region.write(data[:size], 0)] = data[:size]
    assert region.used_bytes == size * len(expected)
    assert_equal_after_evictions(region, expected)


# Grains: vacant, dropped, partial


@on_each
def test_a_value_written_into_a_dropped_grain_leaves_its_neighbours_alone(open_on: Open, kind: str) -> None:
    region = open_on(kind, alignment=1)
    slots = [region.write(blob(999, number), 0) for number in range(2000)]
    expected = {slot: blob(999, number) for number, slot in enumerate(slots)}
    for slot in slots[1::2]:
        region.free(slot)
        del expected[slot]
    region.evict()
    for number in range(900):
        data = blob(998 - number % 7, 5000 + number)
        expected[region.write(data, 0)] = data
    assert_equal_after_evictions(region, expected)


@on_each
def test_a_grain_that_was_dropped_and_then_freed_is_used_anew(open_on: Open, kind: str) -> None:
    region = open_on(kind, alignment=64)
    kept = region.write(b"kept" * 100, 0)
    for round_ in range(4):
        slots = [region.write(blob(3000, round_ * 1000 + number), 0) for number in range(900)]
        region.evict(slots if round_ % 2 else None)
        assert all(region.read(slot) == blob(3000, round_ * 1000 + number) for number, slot in enumerate(slots))
        region.evict()
        for slot in slots:
            region.free(slot)
        data = blob(700_000, round_)
        large = region.write(data, 0)  # over the dropped ones: some grains whole, some in part
        region.evict([large])
        assert region.read(large) == data
        region.free(large)
    assert region.read(kept) == b"kept" * 100
    assert region.used_bytes < 8 * MIB


@on_each
@pytest.mark.parametrize("size", [100, 5000, 300_000])
def test_grains_that_lost_some_of_their_blocks_are_filled_again(open_on: Open, kind: str, size: int) -> None:
    region = open_on(kind, alignment=64)
    guards, between = {}, []
    for number in range(24):
        data = blob(1000, number)
        guards[region.write(data, 0)] = data
        between.append(region.write(bytes(150_000), 0))
    for slot in between:
        region.free(slot)
    region.trim()  # punches holes between the guards, where the file system can
    expected = dict(guards)
    for number in range(3 * MIB // size):
        data = blob(size - number % 5, 100 + number)
        expected[region.write(data, 0)] = data
    assert_equal_after_evictions(region, expected)


@on_each
def test_a_view_of_a_dropped_value_can_be_written_back_to_its_own_region(open_on: Open, kind: str) -> None:
    region = open_on(kind)
    expected = {}
    for number, size in enumerate(STRADDLING):
        slot = region.write(blob(size, number), 0)
        expected[slot] = blob(size, number)
        view = region.read(slot)
        region.evict([slot])
        expected[region.write(view, 0)] = expected[slot]
        region.evict()
        del view
    assert_equal_after_evictions(region, expected)


# Streaming copies: warm space, 256 KiB and more


@on_each
@pytest.mark.parametrize("lead", [0, 1, 63, 65])
def test_large_values_into_warm_space_touch_no_byte_outside(open_on: Open, kind: str, lead: int) -> None:
    region = open_on(kind, alignment=1)
    front = region.write(blob(lead, 1), 0) if lead else None
    hole = region.write(bytes(3 * MIB), 0)
    back = region.write(blob(4097, 2), 0)
    sizes = [size + odd for size in (256 * KIB, GRAIN, 2 * MIB) for odd in (-1, 0, 1, 63, 64, 193)]
    for number, size in enumerate(sizes):
        region.free(hole)
        source = memoryview(blob(size + 7, 50 + number))[number % 8 :][:size]  # starts anywhere, too
        hole = region.write(source, 0)
        assert region.slot(hole).offset == lead
        assert region.read(hole) == source
        assert region.read(back) == blob(4097, 2)
        if front is not None:
            assert region.read(front) == blob(lead, 1)
        filler = region.write(blob(100, number), 0)  # right behind it
        assert region.slot(filler).offset == lead + size
        assert region.read(hole) == source
        region.free(filler)


# At random, against a dict


@on_each
@pytest.mark.parametrize("seed", [0, system(1), system(2)])
def test_a_random_walk_keeps_every_value(open_on: Open, check: Check, kind: str, seed: int) -> None:
    rng = random.Random(seed)
    region = open_on(kind, alignment=[1, 64, 4096][seed], cache_limit=[0, 8 * MIB, None][seed])
    expected: dict[int, bytes] = {}
    views: list[tuple[memoryview, bytes]] = []
    for step in range(500):
        action = rng.random()
        if action < 0.5 or not expected:
            size = rng.choice([rng.choice(STRADDLING), rng.randrange(1, 3000), rng.randrange(1, 300_000)])
            while sum(map(len, expected.values())) + size > 12 * MIB:
                victim = rng.choice(list(expected))
                region.free(victim)
                del expected[victim]
            data = blob(size, step)
            expected[region.write(data, step % 4)] = data
        elif action < 0.7:
            victim = rng.choice(list(expected))
            region.free(victim)
            del expected[victim]
        elif action < 0.8:
            slot = rng.choice(list(expected))
            views.append((region.read(slot), expected[slot]))
        elif action < 0.85:
            del views[: len(views) // 2]
        elif action < 0.9:
            region.evict(rng.sample(list(expected), len(expected) // 2))
        elif action < 0.92:
            region.evict()
        elif action < 0.95:
            region.trim()
        elif action < 0.98:
            region.compact(rng.randrange(4 * MIB))
        else:
            check(region)
            assert_equal(region, expected)
        assert all(view == value for view, value in views[-2:])
    assert all(view == value for view, value in views)
    views.clear()
    check(region)
    assert_equal_after_evictions(region, expected)


# A full disk, in each path

FULL_DISK = """
import ctypes, errno, os, sys
from nodedb_mem import OverflowRegion, RegionIOError
from nodedb_mem._core import lib

path, size, limit = sys.argv[1], int(sys.argv[2]), {"None": None, "0": 0}[sys.argv[3]]
directory = os.path.dirname(path)

def value(number):
    return (number.to_bytes(4, "little") * (size // 4 + 1))[:size]

def sync():
    fd = os.open(directory, os.O_RDONLY)
    assert ctypes.CDLL(None).syncfs(fd) == 0
    os.close(fd)

def fill_disk(name, room):
    with open(name, "wb", buffering=0) as file:
        for piece in (1 << 20, 1 << 16, 1 << 12):
            try:
                while True:
                    assert file.write(bytes(piece)) > 0
            except OSError as error:
                assert error.errno == errno.ENOSPC
        os.fsync(file.fileno())
        file.truncate(max(0, file.tell() - room))
        os.fsync(file.fileno())
    sync()

def fill(region, written, start):
    for number in range(start, start + 200_000):
        try:
            written[region.write(value(number), 0)] = value(number)
        except RegionIOError as error:
            assert error.errno == errno.ENOSPC, error
            return
    raise AssertionError("never refused")

def assert_intact(region, written):
    assert lib.ndm_region_check(region._handle) == 0
    assert len(region) == len(written)
    for slot, expected in written.items():
        assert region.read(slot) == expected, slot

region = OverflowRegion.open(path, initial_capacity=1 << 20, max_capacity=1 << 30, cache_limit=limit)
written = {}
written[region.write(value(0), 0)] = value(0)
fill_disk(directory + "/filler", 3 << 20)
fill(region, written, 1)
assert region.live_bytes > 1 << 20, region.live_bytes
assert_intact(region, written)
region.evict()
assert_intact(region, written)
sync()  # what was stored through a mapping is clean now: the next store may want a block

for round_ in range(4):
    for slot in list(written)[round_ % 2 :: 2]:
        region.free(slot)
        del written[slot]
    if round_ == 2:
        region.trim()
    fill(region, written, 1000 * (round_ + 1))
    assert_intact(region, written)
    region.evict(list(written)[::2] if round_ % 2 else None)
    assert_intact(region, written)
    sync()

os.unlink(directory + "/filler")
sync()
for number in range(20):
    written[region.write(value(number), 0)] = value(number)
region.evict()
assert_intact(region, written)
region.close()
print("done")
"""


@on_each
@pytest.mark.parametrize(
    ("size", "limit"), [(100, None), (5000, 0), (5000, None), (40_000, 0), (300_000, None), (300_000, 0)]
)
def test_a_full_disk_is_an_error_in_each_path(
    mount: Mount, run_python: RunPython, kind: str, size: int, limit: int | None
) -> None:
    if kind == "btrfs":
        size = max(
            size, 1000
        )  # fewer slots: for each page of their table it searches the full disk for room, 0.2 s long
    assert run_python(FULL_DISK, mount(kind, 16) / "region", size, limit) == "done\n"


def test_btrfs_is_never_stored_to_through_the_mapping(open_on: Open, mapped_kib: Callable[[Path | str], int]) -> None:
    # It copies on write: a store into a clean page needs a new block, whatever was allocated, or it is SIGBUS.
    region = open_on("btrfs", initial_capacity=4 * MIB)
    assert region.path is not None
    for size in (100, 5000, 40_000, 300_000):
        slots = [region.write(bytes(size), 0) for _ in range(MIB // size)]
        for slot in slots[::2]:
            region.free(slot)
        for _ in slots[::2]:
            region.write(bytes(size), 0)
    assert mapped_kib(region.path) == 0
    with pytest.raises(RegionIOError) as caught:
        region.allocate(5000, 0)  # its view would be stored to
    assert caught.value.errno == errno.EOPNOTSUPP
