"""Nothing is refused for being scattered: room is made by moving values, at the ceiling and on a full disk."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from kit import Check, Mount, NewRegion, RunToEnd, blob, system
from nodedb_mem import CapacityExceededError, OverflowReader, OverflowRegion

KIB, MIB = 1 << 10, 1 << 20

# Each stores these bytes in one slot, by another verb.


def write(region: OverflowRegion, data: bytes) -> int:
    return region.write(data, 0)


def write_vectored(region: OverflowRegion, data: bytes) -> int:
    return region.write_vectored([data[:1000], data[1000:]], 0)


def write_many(region: OverflowRegion, data: bytes) -> int:
    return region.write_many([data], 0)[0]


def allocate(region: OverflowRegion, data: bytes) -> int:
    slot, view = region.allocate(len(data), 0)
    view[:] = data
    region.commit(slot)
    return slot


VERBS = [write, write_vectored, write_many, allocate]
Verb = Callable[[OverflowRegion, bytes], int]


def striped(region: OverflowRegion, count: int, size: int) -> dict[int, bytes]:
    """Fill the region, then free every other value."""
    values = {region.write(blob(size, seed), 0): blob(size, seed) for seed in range(count)}
    for slot in sorted(values)[::2]:
        region.free(slot)
        del values[slot]
    return values


def assert_holds(region: OverflowRegion, values: dict[int, bytes], check: Check) -> None:
    check(region)
    assert len(region) == len(values)
    for slot, data in values.items():
        assert region.read(slot) == data


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("size", [16 * KIB + 1, 400_000, 512 * KIB])
def test_what_is_free_in_all_can_be_had(new_region: NewRegion, check: Check, verb: Verb, size: int) -> None:
    region = new_region(initial_capacity=MIB, max_capacity=MIB)
    values = striped(region, 64, 16 * KIB)
    data = blob(size, 99)
    values[verb(region, data)] = data
    assert_holds(region, values, check)
    with pytest.raises(CapacityExceededError) as caught:
        verb(region, bytes(MIB - region.live_bytes + 1))
    assert caught.value.free_bytes == region.stats().free_bytes
    assert_holds(region, values, check)


def test_no_more_is_moved_than_it_takes(new_region: NewRegion) -> None:
    region = new_region(initial_capacity=MIB, max_capacity=MIB)
    striped(region, 64, 16 * KIB)
    region.write(blob(20 * KIB), 0)
    assert region.stats().moved_bytes == 16 * KIB


@pytest.mark.parametrize("alignment", [1, 64, 4096])
def test_room_at_the_ceiling_counts(new_region: NewRegion, check: Check, alignment: int) -> None:
    # Of 100 units: 30 are free, 50 are used, and 20 were never used.
    region = new_region(initial_capacity=100 * alignment, max_capacity=100 * alignment, alignment=alignment)
    first = region.write(blob(30 * alignment), 0)
    values = {region.write(blob(50 * alignment, 1), 0): blob(50 * alignment, 1)}
    region.free(first)
    data = blob(50 * alignment, 2)
    values[region.write(data, 0)] = data
    assert region.used_bytes == 100 * alignment
    assert_holds(region, values, check)


def test_a_region_of_scraps_is_filled_to_the_last_byte(new_region: NewRegion, check: Check) -> None:
    chance = random.Random(3)
    region = new_region(initial_capacity=4096, max_capacity=200_000, alignment=1)
    values: dict[int, bytes] = {}
    for seed in range(2000):
        free = 200_000 - region.live_bytes
        size = min(chance.randrange(1, 9000), free)
        if size == 0 or len(values) > 60:
            for slot in chance.sample(sorted(values), len(values) // 3):
                region.free(slot)
                del values[slot]
            continue
        values[region.write(blob(size, seed), 0)] = blob(size, seed)
    assert region.stats().moved_bytes > 0
    data = blob(200_000 - region.live_bytes, 5)
    values[region.write(data, 0)] = data
    assert region.live_bytes == region.capacity == 200_000
    assert_holds(region, values, check)


def test_a_batch_counts_as_a_whole(new_region: NewRegion, check: Check) -> None:
    region = new_region(initial_capacity=MIB, max_capacity=MIB)
    values = striped(region, 64, 16 * KIB)
    data = [blob(size, size) for size in (40_000, 0, 30_000, 100, 0)]
    values.update(zip(region.write_many(data, 0), data, strict=True))
    assert_holds(region, values, check)
    before = region.stats()
    with pytest.raises(CapacityExceededError):
        region.write_many([bytes(200_000)] * 3, 0)
    assert region.stats() == before


def test_views_stay_and_what_lies_between_them_is_gathered(new_region: NewRegion, check: Check) -> None:
    region = new_region(initial_capacity=MIB, max_capacity=MIB)
    values = striped(region, 64, 16 * KIB)
    slots = sorted(values)
    views = {slots[10]: region.read(slots[10]), slots[21]: region.read(slots[21])}
    places = {slot: region.slot(slot) for slot in views}
    before = region.stats()
    with pytest.raises(CapacityExceededError):  # 11, 11 and 10 holes of 16 KiB between those that stay
        region.write(bytes(11 * 16 * KIB + 1), 0)
    assert region.stats() == before
    data = blob(11 * 16 * KIB, 7)
    values[region.write(data, 0)] = data
    assert {slot: region.slot(slot) for slot in views} == places
    assert all(view == values[slot] for slot, view in views.items())
    assert_holds(region, values, check)
    views.clear()
    data = blob(MIB - region.live_bytes, 8)
    values[region.write(data, 0)] = data
    assert_holds(region, values, check)


def test_a_leased_value_stays(new_region: NewRegion, check: Check) -> None:
    region = new_region(initial_capacity=MIB, max_capacity=MIB)
    values = striped(region, 64, 16 * KIB)
    slot = sorted(values)[15]
    ref, place = region.share(slot), region.slot(slot)
    with OverflowReader(region.path) as reader:
        with reader.lease(ref) as view:
            with pytest.raises(CapacityExceededError):
                region.write(bytes(512 * KIB), 0)
            data = blob(16 * 16 * KIB, 7)
            values[region.write(data, 0)] = data
            assert region.slot(slot) == place and bytes(view) == values[slot]
            assert_holds(region, values, check)
        del view
    data = blob(16 * 16 * KIB, 8)
    values[region.write(data, 0)] = data
    assert_holds(region, values, check)


def test_raising_the_ceiling_is_not_needed(new_region: NewRegion, check: Check) -> None:
    """Alignment 1: the values hold 30 and 50 of 100 bytes, and 40 are wanted."""
    region = new_region(initial_capacity=100, max_capacity=100, alignment=1)
    first = region.write(b"a" * 40, 0)
    region.free(first)
    second = region.write(b"b" * 30, 0)
    values = {region.write(b"c" * 50, 0): b"c" * 50}
    region.free(second)
    values[region.write(b"d" * 40, 0)] = b"d" * 40
    assert_holds(region, values, check)


# A full disk


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
@pytest.mark.parametrize("verb", ["write", "write_vectored", "write_many", "allocate"])
def test_a_full_disk_has_the_room_that_the_region_has(mount: Mount, run_to_end: RunToEnd, kind: str, verb: str) -> None:
    script = """
verb = sys.argv[2]
region = OverflowRegion.open(sys.argv[1], initial_capacity=65536, max_capacity=1 << 30)
filler = os.path.dirname(sys.argv[1]) + "/filler"
size = 20_000
written = {}
for number in range(150):
    written[region.write(value(number, size), 0)] = value(number, size)
fill_disk(filler)
extra, error = write_until_refused(region, size, 1000)
written |= extra
assert error.errno == errno.ENOSPC
for slot in sorted(written)[20:100:2]:
    region.free(slot)
    del written[slot]
view = region.read(sorted(written)[-1])
data = value(7, 600_000)
if verb == "write":
    slot = region.write(data, 0)
elif verb == "write_vectored":
    slot = region.write_vectored([data[:1000], data[1000:]], 0)
elif verb == "write_many":
    slot, = region.write_many([data], 0)
else:
    slot, room = region.allocate(len(data), 0)
    room[:] = data
    region.commit(slot)
written[slot] = data
assert_intact(region, written)
before = region.stats()
try:
    region.write(value(8, 600_000), 0)
except RegionIOError as error:
    assert error.errno == errno.ENOSPC
    assert error.free_bytes == region.stats().free_bytes < 600_000
else:
    raise AssertionError("there was no room")
assert region.stats() == before
assert_intact(region, written)
"""
    run_to_end(script, mount(kind, 8) / "region", verb)


@pytest.mark.parametrize(("size", "most"), [(12, 4.0), system(48, 22.0)])
def test_small_values_fill_a_small_disk(mount: Mount, run_to_end: RunToEnd, size: int, most: float) -> None:
    script = """
region = OverflowRegion.open(sys.argv[1], max_capacity=1 << 30)
count = 0
try:
    while True:
        region.write(value(count, 100), 0)
        count += 1
except RegionIOError as error:
    assert error.errno == errno.ENOSPC
assert count * 100 >= float(sys.argv[2]) * 1e6, count
assert lib.ndm_region_check(region._handle) == 0
for number in range(count):
    assert region.read_bytes(number) == value(number, 100)
for number in range(0, count, 2):
    region.free(number)
for number in range(0, count, 2):
    assert region.read_bytes(region.write(value(number, 100), 0)) == value(number, 100)
region.close()
again = OverflowRegion.open(sys.argv[1], recover=True, max_capacity=1 << 30)
assert len(again) == count and lib.ndm_region_check(again._handle) == 0
"""
    run_to_end(script, mount("ext4", size) / "region", most)
