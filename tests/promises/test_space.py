"""Space that is no longer needed: trim gives it back to the file system, compact gathers it, stats tell."""

from __future__ import annotations

import os
import random
import threading
from dataclasses import FrozenInstanceError

import pytest

from kit import Check, Mount, NewRegion, RunToEnd, blob, system
from nodedb_mem import EngineId, OverflowRegion, RegionClosedError, WrongThreadError

KIB, MIB = 1 << 10, 1 << 20
file_systems = pytest.mark.parametrize("kind", ["tmpfs", "ext4"])


def on_disk(region: OverflowRegion) -> int:
    assert region.path is not None
    return os.stat(region.path).st_blocks * 512


def fill(region: OverflowRegion, count: int, size: int) -> dict[int, bytes]:
    return {region.write(data, 0): data for data in (blob(size, seed) for seed in range(count))}


def free_some(region: OverflowRegion, values: dict[int, bytes], slots: list[int]) -> None:
    for slot in slots:
        region.free(slot)
        del values[slot]


def assert_holds(region: OverflowRegion, values: dict[int, bytes]) -> None:
    assert len(region) == len(values)
    for slot, expected in values.items():
        assert region.read(slot) == expected


# trim


def test_trim_lowers_the_mark_to_the_end_of_the_last_value(new_region: NewRegion) -> None:
    region = new_region()
    values = fill(region, 10, 5001)
    free_some(region, values, [3, 7, 8, 9])
    used = region.used_bytes
    assert region.slot(6).offset + 5001 < used
    region.trim()
    assert region.used_bytes == region.slot(6).offset + 5001
    assert_holds(region, values)


def test_trim_of_an_empty_region_gives_everything_back(new_region: NewRegion) -> None:
    region = new_region()
    values = fill(region, 50, 100_000)
    free_some(region, values, list(values))
    before = on_disk(region)
    assert region.trim() == before - on_disk(region) > 4 * MIB
    assert (region.used_bytes, region.stats().free_bytes, region.capacity) == (0, 0, 1 << 16)
    assert on_disk(region) <= 8 * KIB


@pytest.mark.parametrize("initial", [1, 600, 65536, 3 * MIB])
def test_trim_does_not_shrink_the_file_below_its_initial_size(new_region: NewRegion, initial: int) -> None:
    region = new_region(initial_capacity=initial)
    values = fill(region, 40, 100_000)
    free_some(region, values, list(range(1, 40)))
    region.trim()
    assert region.path is not None
    assert region.capacity == max(initial, 100_000) == os.stat(region.path).st_size
    assert_holds(region, values)
    region.free(0)
    region.trim()
    assert region.capacity == initial == os.stat(region.path).st_size
    values = fill(region, 40, 100_000)
    assert_holds(region, values)


def test_the_initial_size_of_a_reopened_file_is_the_one_it_had(new_region: NewRegion) -> None:
    region = new_region(initial_capacity=MIB)
    fill(region, 30, 100_000)
    capacity = region.capacity
    region.close()
    region = new_region(initial_capacity=4096)
    region.trim()
    assert region.capacity == capacity > MIB


def test_trim_punches_holes_in_the_middle(new_region: NewRegion, check: Check) -> None:
    region = new_region()
    values = fill(region, 16, 256 * KIB)
    middle = list(range(4, 12))
    free_some(region, values, middle)
    used, capacity, before = region.used_bytes, region.capacity, on_disk(region)
    given = region.trim()
    assert given >= 8 * 256 * KIB - 64 * KIB
    assert before - on_disk(region) == given
    assert (region.used_bytes, region.stats().disk_bytes) == (used, on_disk(region))
    assert region.capacity <= capacity
    assert_holds(region, values)
    # The space is written again, without growth and correctly.
    for seed in range(8):
        data = blob(256 * KIB - seed, 100 + seed)
        values[region.write(data, 0)] = data
    assert region.used_bytes == used
    assert_holds(region, values)
    check(region)


def test_neighbours_of_64_kib_together_are_punched_and_smaller_holes_stay(new_region: NewRegion) -> None:
    region = new_region()
    values = fill(region, 64, 20_000)
    assert region.trim() >= 0  # what lies ahead of the mark
    free_some(region, values, [10, 30])
    before = on_disk(region)
    assert region.trim() == 0
    assert on_disk(region) == before
    free_some(region, values, [11, 12, 13])
    assert region.trim() >= 64 * KIB
    assert_holds(region, values)


def test_trim_twice_finds_nothing_more(new_region: NewRegion) -> None:
    region = new_region()
    values = fill(region, 16, 256 * KIB)
    free_some(region, values, [2, 3, 9, 15])
    assert region.trim() > 0
    before = region.stats()
    assert region.trim() == 0
    assert region.stats() == before


def test_a_freed_value_that_is_shown_is_not_trimmed_until_it_is_let_go(new_region: NewRegion, check: Check) -> None:
    region = new_region()
    values = fill(region, 4, 512 * KIB)
    shown = [region.read(1), region.read(3)]
    expected = [values[1], values[3]]
    free_some(region, values, [1, 3])
    used = region.used_bytes
    region.trim()
    assert region.used_bytes == used
    assert shown == expected
    before = on_disk(region)
    assert region.stats().pinned_bytes == 2 * 512 * KIB
    shown.clear()
    assert region.trim() >= MIB - 16 * KIB
    assert on_disk(region) <= before - MIB + 16 * KIB
    assert region.stats().pinned_bytes == 0
    assert region.used_bytes == region.slot(2).offset + 512 * KIB
    assert_holds(region, values)
    check(region)


FULL_DISK = """
region = OverflowRegion.open(sys.argv[1], initial_capacity=65536, max_capacity=1 << 30)
filler = os.path.dirname(sys.argv[1]) + "/filler"
size = int(sys.argv[2])
written = {}
for number in range(3 * (1 << 20) // size):
    slot = region.write(value(number, size), 0)
    written[slot] = value(number, size)
count = len(written)
view, seen = region.read(count - 1), written[count - 1]
"""


@file_systems
@pytest.mark.parametrize("size", [700, 30_000, 300_000])
def test_punched_space_on_a_full_disk_is_an_error_never_a_crash(
    mount: Mount, run_to_end: RunToEnd, kind: str, size: int
) -> None:
    script = """
for slot in range(count // 4, 3 * count // 4):
    region.free(slot)
    del written[slot]
used = region.used_bytes
assert region.trim() > 1 << 20
assert region.stats().can_punch
fill_disk(filler)
refused = 0
for number in range(count // 2):
    try:
        slot = region.write(value(number + 1000, size), 0)
    except RegionIOError as error:
        assert error.errno == errno.ENOSPC, error
        refused += 1
    else:
        written[slot] = value(number + 1000, size)
assert refused
assert_intact(region, written)
os.unlink(filler)
for number in range(refused):
    slot = region.write(value(number + 2000, size), 0)
    written[slot] = value(number + 2000, size)
assert region.used_bytes == used, "punched space is used again"
assert_intact(region, written)
assert view == seen
"""
    run_to_end(FULL_DISK + script, mount(kind, 8) / "region", size)


@file_systems
@pytest.mark.parametrize("size", [system(700), 30_000, 300_000])
def test_a_full_disk_in_the_middle_of_compact_loses_nothing(
    mount: Mount, run_to_end: RunToEnd, kind: str, size: int
) -> None:
    script = """
third = count // 3
for slot in [*range(third // 2, third), *range(third, 2 * third, 2)]:
    region.free(slot)
    del written[slot]
region.trim()
fill_disk(filler)
refused = 0
for _ in range(50):
    try:
        done = region.compact(10 * size)
    except RegionIOError as error:
        assert error.errno == errno.ENOSPC, error
        refused += 1
    assert_intact(region, written)
    region.trim()
    assert_intact(region, written)
    fill_disk(filler + "2")
assert refused
assert view == seen
os.unlink(filler)
os.unlink(filler + "2")
del view
assert region.compact().remaining_bytes == 0
assert_intact(region, written)
assert region.used_bytes <= 1.02 * region.live_bytes + 64 * len(region)
"""
    run_to_end(FULL_DISK + script, mount(kind, 8) / "region", size)


# compact


@pytest.mark.parametrize("alignment", [1, 64, 4096])
@pytest.mark.parametrize("sizes", [(1, 200), (100, 100), (1000, 30_000), (1, 300_000)], ids=str)
def test_a_full_compact_leaves_no_holes(
    new_region: NewRegion, check: Check, alignment: int, sizes: tuple[int, int]
) -> None:
    chance = random.Random(f"{alignment} {sizes}")
    region = new_region(alignment=alignment, max_capacity=1 << 30)
    total, values = 0, {}
    while total < 4 * MIB and len(values) < 3000:
        data = chance.randbytes(chance.randint(*sizes))
        values[region.write(data, 0)] = data
        total += len(data)
    free_some(region, values, [slot for slot in values if chance.random() < 0.7])
    offsets = {slot: region.slot(slot).offset for slot in values}
    live = region.live_bytes
    done = region.compact()
    assert done.remaining_bytes == 0
    assert done.moved_bytes == region.stats().moved_bytes > 0
    padded = sum(-(-len(data) // alignment) * alignment for data in values.values())
    assert region.used_bytes <= 1.02 * live + (padded - live)
    assert region.live_bytes == live
    assert_holds(region, values)  # under the same numbers
    assert any(region.slot(slot).offset < offset for slot, offset in offsets.items())
    assert all(region.slot(slot).offset % alignment == 0 for slot in values)
    check(region)
    region.trim()
    assert on_disk(region) <= region.used_bytes + 8 * KIB or region.used_bytes < region.capacity
    assert_holds(region, values)
    again = region.compact()
    assert (again.moved_bytes, again.remaining_bytes) == (0, 0)


@pytest.mark.parametrize("budget", [1000, 1001, 5000, 123_456])
def test_a_budget_is_never_exceeded_and_in_the_end_nothing_remains(
    new_region: NewRegion, check: Check, budget: int
) -> None:
    region = new_region()
    values = fill(region, 400, 1000)
    free_some(region, values, list(range(0, 400, 2)))
    moved = 0
    for _ in range(1000):
        before = region.stats()
        done = region.compact(budget)
        after = region.stats()
        assert 0 <= done.moved_bytes <= budget
        assert after.moved_bytes - before.moved_bytes == done.moved_bytes
        assert after.used_bytes <= before.used_bytes
        assert after.live_bytes == before.live_bytes
        check(region)
        moved += done.moved_bytes
        if done.remaining_bytes == 0:
            break
        assert done.moved_bytes > 0
    else:
        pytest.fail("it never ends")
    assert moved >= 100 * 1000
    assert region.used_bytes <= 1.02 * 200 * 1024
    assert_holds(region, values)


def test_a_budget_of_nothing_moves_nothing(new_region: NewRegion) -> None:
    region = new_region()
    values = fill(region, 10, 1000)
    free_some(region, values, [0, 2, 4])
    before = region.stats()
    assert region.compact(0).moved_bytes == 0
    assert region.stats() == before


def test_values_larger_than_the_budget_stay_where_they_are(new_region: NewRegion) -> None:
    region = new_region()
    values = fill(region, 10, 10_000)
    free_some(region, values, [0, 4])
    before = {slot: region.slot(slot) for slot in values}
    done = region.compact(9_999)
    assert (done.moved_bytes, done.remaining_bytes) == (0, 0)
    assert {slot: region.slot(slot) for slot in values} == before


def test_shown_values_stay_where_they_are_and_are_packed_around(new_region: NewRegion, check: Check) -> None:
    region = new_region(alignment=64)
    values = fill(region, 300, 3000)
    free_some(region, values, [slot for slot in range(300) if slot % 5 not in (0, 1)])
    shown = {slot: region.read(slot) for slot in (100, 200)}
    freed = region.read(50)
    expected, freed_at = values[50], region.slot(50).offset
    region.free(50)
    del values[50]
    places = {slot: region.slot(slot) for slot in shown}
    assert region.compact().remaining_bytes == 0
    assert {slot: region.slot(slot) for slot in shown} == places
    assert freed == expected
    assert all(view == values[slot] for slot, view in shown.items())
    assert_holds(region, values)
    check(region)
    # The last one shown sets the mark, and no hole is left but in front of what is shown.
    assert region.used_bytes == places[200].offset + 3000
    stays = {freed_at, *(place.offset for place in places.values())}
    end = 0
    for offset in sorted({freed_at, *(region.slot(slot).offset for slot in values)}):
        assert offset == end or offset in stays
        end = offset + 3008
    del freed
    shown.clear()
    region.compact()
    assert region.used_bytes <= 1.02 * len(values) * 3008
    assert_holds(region, values)
    check(region)


def test_compact_moves_values_that_overlap_their_new_place(new_region: NewRegion) -> None:
    region = new_region(alignment=1)
    slots = [region.write(b"x", 0), region.write(blob(1_500_001), 0)]
    region.free(slots[0])
    pad = region.write(blob(500_000, 1), 0)
    region.free(slots[1])
    data = blob(1_400_000, 2)
    slot = region.write(data, 0)
    region.free(pad)
    region.compact()
    assert region.read(slot) == data


def test_an_empty_region_compacts_to_nothing(new_region: NewRegion) -> None:
    region = new_region()
    assert region.compact() == region.compact(5)
    region.free(region.write(blob(1000), 0))
    region.write(b"", 0)
    done = region.compact()
    assert (done.moved_bytes, done.remaining_bytes, region.used_bytes) == (0, 0, 0)


def test_moved_values_can_be_read_shown_freed_and_replaced(new_region: NewRegion, check: Check) -> None:
    region = new_region()
    values = fill(region, 100, 2000)
    for seed in range(20):
        free_some(region, values, sorted(values)[seed % 3 :: 7])
        region.compact(20_000)
        for slot, data in fill_more(region, len(values), seed).items():
            assert slot not in values
            values[slot] = data
        assert_holds(region, values)
        check(region)


def fill_more(region: OverflowRegion, count: int, seed: int) -> dict[int, bytes]:
    data = [blob(1000 + 37 * number % 3000, seed * 1000 + number) for number in range(100 - count)]
    return {region.write(item, 0): item for item in data}


# Wrong use


@pytest.mark.parametrize("budget", [-1, -(1 << 70)])
def test_a_negative_budget_is_refused(new_region: NewRegion, budget: int) -> None:
    with pytest.raises(ValueError):
        new_region().compact(budget)


@pytest.mark.parametrize("budget", ["1", 1.5, b"1"])
def test_a_budget_that_is_no_integer_is_refused(new_region: NewRegion, budget: object) -> None:
    with pytest.raises(TypeError):
        new_region().compact(budget)  # type: ignore[arg-type]


def test_a_budget_of_any_size_will_do(new_region: NewRegion) -> None:
    region = new_region()
    values = fill(region, 10, 1000)
    free_some(region, values, [0, 1, 2, 3, 4])
    assert region.compact(1 << 100).remaining_bytes == 0
    assert_holds(region, values)


def test_trim_and_compact_are_the_owners_alone(new_region: NewRegion) -> None:
    region = new_region()
    values = fill(region, 10, 100_000)
    free_some(region, values, [2, 9])
    before = region.stats()
    caught: list[BaseException] = []

    def intrude() -> None:
        for verb in (region.trim, region.compact, lambda: region.compact(1), region.stats):
            try:
                verb()
            except WrongThreadError as error:
                caught.append(error)

    thread = threading.Thread(target=intrude)
    thread.start()
    thread.join()
    assert len(caught) == 4
    caught.clear()
    assert region.stats() == before


def test_a_closed_region_neither_trims_nor_compacts(new_region: NewRegion) -> None:
    region = new_region()
    region.close()
    for verb in (region.trim, region.compact, lambda: region.compact(5), region.stats):
        with pytest.raises(RegionClosedError):
            verb()


# stats


def test_the_figures_of_a_fresh_region(new_region: NewRegion) -> None:
    stats = new_region(initial_capacity=70_000, max_capacity=1 << 20).stats()
    assert (stats.capacity, stats.max_capacity, stats.used_bytes) == (70_000, 1 << 20, 0)
    assert (stats.live_bytes, stats.free_bytes, stats.pinned_bytes, stats.largest_free_bytes) == (0, 0, 0, 0)
    assert (stats.slot_count, stats.live_slots, stats.growths, stats.moved_bytes) == (0, 0, 0, 0)
    assert (stats.fragmentation, stats.engines, stats.can_punch) == (0.0, {}, True)
    with pytest.raises(FrozenInstanceError):
        stats.capacity = 1  # type: ignore[misc]


def test_the_engines_share_the_live_bytes(new_region: NewRegion) -> None:
    region = new_region()
    first = next(iter(EngineId))
    slots = [region.write(blob(100), first), region.write(blob(200), 200), region.write(b"", 201)]
    slots.append(region.write(blob(1000), first))
    engines = region.stats().engines
    assert {int(engine): (usage.live_bytes, usage.live_slots) for engine, usage in engines.items()} == {
        int(first): (1100, 2),
        200: (200, 1),
        201: (0, 1),
    }
    assert isinstance(next(engine for engine in engines if engine == first), EngineId)
    view = region.read(slots[0])
    for slot in slots:
        region.free(slot)
    assert region.stats().engines == {}  # what is shown and freed is no engine's
    del view


def test_fragmentation_is_the_free_share_outside_the_longest_hole(new_region: NewRegion) -> None:
    region = new_region(alignment=1)
    slots = [region.write(blob(1000), 0) for _ in range(10)]
    assert region.stats().fragmentation == 0
    region.free(slots[1])
    stats = region.stats()
    assert (stats.free_bytes, stats.largest_free_bytes, stats.fragmentation) == (1000, 1000, 0)
    region.free(slots[5])
    region.free(slots[6])
    stats = region.stats()
    assert (stats.free_bytes, stats.largest_free_bytes) == (3000, 2000)
    assert stats.fragmentation == pytest.approx(1 / 3)
    region.free(slots[9])  # a hole that ends at the mark counts
    assert region.stats().free_bytes == 4000
    assert region.stats().fragmentation == pytest.approx(1 / 2)
    region.compact()
    region.trim()
    assert (region.stats().free_bytes, region.stats().fragmentation) == (0, 0)


@pytest.mark.parametrize("alignment", [1, 64, 4096])
def test_the_free_bytes_end_at_the_mark(new_region: NewRegion, alignment: int) -> None:
    region = new_region(alignment=alignment)
    region.free(region.write(blob(13), 0))
    stats = region.stats()
    assert (stats.used_bytes, stats.free_bytes, stats.largest_free_bytes) == (13, 13, 13)


def test_disk_bytes_are_those_of_the_file(new_region: NewRegion) -> None:
    region = new_region()
    fill(region, 30, 100_000)
    assert region.stats().disk_bytes == on_disk(region) >= 3_000_000
    assert region.stats().growths > 0


def test_trimming_with_a_budget_gives_back_all_in_pieces(new_region: NewRegion) -> None:
    region = new_region(initial_capacity=1 << 20, max_capacity=1 << 28)
    if not region.stats().can_punch:
        pytest.skip("the file system cannot punch holes")
    slots = [region.write(bytes([i]) * (1 << 20), 0) for i in range(24)]
    for slot in slots[::2]:
        region.free(slot)
    given = []
    while piece := region.trim(2 << 20):
        given.append(piece)
    assert len(given) >= 6 and max(given) <= 3 << 20
    assert region.stats().disk_bytes <= 13 << 20
    region.free_many(slots[1::2])
    while region.trim(2 << 20):
        pass
    assert region.stats().disk_bytes <= 1 << 20 and region.trim() == 0
    with pytest.raises(ValueError, match="budget"):
        region.trim(-1)


def test_trimming_with_a_budget_goes_on_where_it_stopped(new_region: NewRegion) -> None:
    region = new_region(initial_capacity=1 << 20, max_capacity=1 << 28)
    if not region.stats().can_punch:
        pytest.skip("the file system cannot punch holes")
    slots = [region.write(bytes([i]) * 200_000, 0) for i in range(100)]
    for slot in slots[::2]:
        region.free(slot)
    while region.trim(1 << 20):
        pass
    before = region.stats().disk_bytes
    assert region.trim() == 0 and before <= 50 * 212_992 + (2 << 20)
    for number in range(1, 100, 2):
        assert region.read_bytes(slots[number]) == bytes([number]) * 200_000
