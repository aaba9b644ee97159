"""How a region grows: up to its ceiling, past its first ceiling, past its reservation, and what a refusal leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit import Check, Footprint, NewRegion, blob
from nodedb_mem import CapacityExceededError

MIB = 1 << 20


def address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data)


# Up to the ceiling (rule 4)


def test_growth_doubles(new_region: NewRegion) -> None:
    region = new_region(initial_capacity=4096)
    capacities = []
    for _ in range(33):
        region.write(bytes(1024), 0)
        if not capacities or region.capacity != capacities[-1]:
            capacities.append(region.capacity)
    assert capacities == [4096, 8192, 16384, 32768, 65536]
    assert region.stats().growths == 4


def test_growth_goes_to_what_is_needed_where_doubling_is_not_enough(new_region: NewRegion) -> None:
    region = new_region(initial_capacity=4096)
    slot = region.write(blob(100_001), 0)
    assert 100_001 <= region.capacity < 100_001 + 4096
    assert region.stats().growths == 1
    assert region.read(slot) == blob(100_001)


def test_a_value_that_fits_under_the_ceiling_fits_where_doubling_would_not(new_region: NewRegion) -> None:
    region = new_region(initial_capacity=600, max_capacity=1000)
    slot = region.write(blob(900), 0)
    assert 900 <= region.capacity <= 1000
    assert region.read(slot) == blob(900)


@pytest.mark.parametrize("alignment", [1, 64, 4096])
def test_a_value_may_fill_the_ceiling_to_the_last_byte(new_region: NewRegion, alignment: int) -> None:
    region = new_region(initial_capacity=600, max_capacity=1000, alignment=alignment)
    slot = region.write(blob(1000), 0)
    assert (region.capacity, region.used_bytes) == (1000, 1000)
    assert region.read(slot) == blob(1000)


def test_a_second_value_may_fill_the_ceiling_to_the_last_byte(new_region: NewRegion) -> None:
    region = new_region(initial_capacity=600, max_capacity=1000, alignment=64)
    first = region.write(blob(600, 1), 0)
    with pytest.raises(CapacityExceededError) as caught:
        region.write(blob(361), 0)
    assert (caught.value.required, caught.value.max_capacity) == (1001, 1000)
    second = region.write(blob(360, 2), 0)
    assert region.used_bytes == 1000
    assert (region.read(first), region.read(second)) == (blob(600, 1), blob(360, 2))


def test_a_value_past_the_ceiling_is_refused_with_both_numbers(
    new_region: NewRegion, tmp_path: Path, check: Check
) -> None:
    region = new_region(initial_capacity=600, max_capacity=1000)
    kept = region.write(blob(100), 0)
    before = region.stats()
    for size in (1001, 5000, 1 << 20):
        with pytest.raises(CapacityExceededError) as caught:
            region.write(bytes(size), 0)
        assert caught.value.max_capacity == 1000
        assert caught.value.required == 128 + size
        assert "1000" in str(caught.value) and str(128 + size) in str(caught.value)
        assert region.stats() == before
        assert (tmp_path / "region").stat().st_size == before.capacity == 600
    check(region)
    assert region.read(kept) == blob(100)
    assert region.read(region.write(blob(700), 0)) == blob(700)


def test_the_first_value_past_the_ceiling_names_its_size(new_region: NewRegion) -> None:
    region = new_region(initial_capacity=600, max_capacity=1000)
    with pytest.raises(CapacityExceededError) as caught:
        region.write(bytes(1001), 0)
    assert (caught.value.required, caught.value.max_capacity) == (1001, 1000)
    assert region.capacity == 600


def test_free_space_at_the_end_counts_towards_a_larger_value(new_region: NewRegion) -> None:
    region = new_region(initial_capacity=600, max_capacity=1000)
    first = region.write(bytes(64), 0)
    region.free(region.write(bytes(800), 0))
    slot = region.write(blob(936), 0)
    assert region.slot(slot).offset == 64
    assert region.read(slot) == blob(936)
    assert region.read(first) == bytes(64)


def test_no_growth_while_free_space_holds_the_value(new_region: NewRegion) -> None:
    region = new_region(initial_capacity=4096)
    for _ in range(1000):
        region.free(region.write(bytes(4096), 0))
    assert (region.capacity, region.used_bytes, region.stats().growths) == (4096, 4096, 0)


def test_a_full_region_takes_values_again_after_free(new_region: NewRegion) -> None:
    region = new_region(initial_capacity=4096, max_capacity=8192)
    slots = [region.write(blob(1024, seed), 0) for seed in range(8)]
    with pytest.raises(CapacityExceededError):
        region.write(b"x", 0)
    region.free(slots[5])
    slots[5] = region.write(blob(1024, 50), 0)
    expected = [50 if seed == 5 else seed for seed in range(8)]
    assert [region.read(slot) for slot in slots] == [blob(1024, seed) for seed in expected]


def test_a_region_already_at_its_ceiling_needs_no_room_for_an_empty_value(new_region: NewRegion) -> None:
    region = new_region(initial_capacity=4096, max_capacity=4096)
    region.write(bytes(4096), 0)
    slot = region.write(b"", 0)
    assert region.read(slot) == b""


# Views and growth (rule 5)


def test_the_base_does_not_move_while_the_region_grows(new_region: NewRegion) -> None:
    region = new_region(initial_capacity=4096, max_capacity=64 * MIB)
    slot = region.write(blob(3000), 0)
    view = region.read(slot)
    array = np.frombuffer(view, np.uint8)
    where = address(view)
    while region.capacity < 32 * MIB:
        region.write(blob(region.capacity), 0)
        assert address(region.read(slot)) == where
    assert region.stats().growths >= 10
    assert view == blob(3000)
    np.testing.assert_array_equal(array, np.frombuffer(blob(3000), np.uint8))


@pytest.mark.parametrize("size", [10, 3000, 40_000, 300_000])
def test_a_view_of_the_region_itself_is_stored_while_it_grows(new_region: NewRegion, size: int) -> None:
    region = new_region(initial_capacity=size, max_capacity=64 * MIB, alignment=1)
    slot = region.write(blob(size), 0)
    for _ in range(5):
        before = region.capacity
        twin = region.write(region.read(slot), 0)  # no other reference holds the view
        assert region.read(twin) == region.read(slot) == blob(size)
        part = region.write(region.read(slot)[1 : size - 1], 0)
        assert region.read(part) == blob(size)[1:-1]
        region.write(bytes(region.capacity - before + size), 0)
    assert region.stats().growths >= 3


def test_a_view_of_a_freed_slot_is_stored_right(new_region: NewRegion) -> None:
    region = new_region(initial_capacity=4096)
    slot = region.write(blob(4000), 0)
    view = region.read(slot)
    region.free(slot)
    twin = region.write(view, 0)
    assert region.slot(twin).offset >= 4000
    assert region.read(twin) == view == blob(4000)


# Raising the ceiling


def test_raising_the_ceiling_lets_a_refused_value_in(new_region: NewRegion) -> None:
    region = new_region(initial_capacity=600, max_capacity=1000)
    kept = region.write(blob(500, 1), 0)
    with pytest.raises(CapacityExceededError):
        region.write(blob(2000), 0)
    region.max_capacity = 4000
    assert (region.max_capacity, region.capacity) == (4000, 600)
    slot = region.write(blob(2000), 0)
    assert (region.read(kept), region.read(slot)) == (blob(500, 1), blob(2000))
    with pytest.raises(CapacityExceededError) as caught:
        region.write(bytes(4000), 0)
    assert caught.value.max_capacity == 4000


@pytest.mark.parametrize("with_views", [False, True], ids=["no_views", "views"])
@pytest.mark.parametrize("factor", [2, 3, 10])
def test_growth_past_the_first_ceiling(new_region: NewRegion, check: Check, with_views: bool, factor: int) -> None:
    region = new_region(initial_capacity=8192, max_capacity=65536)
    expected: dict[int, bytes] = {}
    views: list[tuple[memoryview, bytes, int]] = []
    for round_ in range(6):
        region.max_capacity *= factor if round_ < 2 else 2
        for number in range(4):
            data = blob(region.max_capacity // 8 - number, 10 * round_ + number) if round_ < 3 else blob(5000, number)
            slot = region.write(data, 0)
            expected[slot] = data
            if with_views:
                view = region.read(slot)
                views.append((view, data, address(view)))
            check(region)
        assert all(region.read(slot) == data for slot, data in expected.items())
        assert all(view == data and address(view) == where for view, data, where in views)
    assert region.capacity > 65536
    for slot in list(expected)[::2]:
        region.free(slot)
    assert all(view == data for view, data, _ in views)


def test_growing_past_the_reservation_does_not_shift_what_was_stored(new_region: NewRegion, tmp_path: Path) -> None:
    region = new_region(initial_capacity=4096, max_capacity=4096)
    before = region.write(blob(4096, 1), 0)
    view = region.read(before)
    region.max_capacity = MIB
    after = region.write(blob(100_000, 2), 0)
    offset = region.slot(after).offset
    region.close()
    stored = (tmp_path / "region").read_bytes()
    assert stored[:4096] == blob(4096, 1) == view
    assert stored[offset : offset + 100_000] == blob(100_000, 2)


def test_old_and_new_views_of_one_slot_see_the_same_bytes(new_region: NewRegion) -> None:
    region = new_region(initial_capacity=4096, max_capacity=4096)
    slot = region.write(blob(4000), 0)
    old = region.read(slot)
    region.max_capacity = 64 * MIB
    region.write(bytes(32 * MIB), 0)
    new = region.read(slot)
    assert old == new == blob(4000)
    region.free(slot)
    del new
    for _ in range(3):
        region.write(b"\xff" * 4000, 0)
    assert old == blob(4000)
    del old
    assert region.slot(region.write(b"\xff" * 4000, 0)).offset == 0


def test_a_duplicated_mapping_goes_with_its_last_view(
    new_region: NewRegion, tmp_path: Path, footprint: Footprint
) -> None:
    region = new_region(initial_capacity=MIB, max_capacity=MIB)
    views = [region.read(region.write(blob(1000, seed), 0)) for seed in range(3)]
    for ceiling in (4, 16, 64):
        region.max_capacity = ceiling * MIB
        views.append(region.read(region.write(bytes(ceiling * MIB // 2), 0)))
    with_views = footprint(tmp_path / "region")[1]
    views.clear()
    region.write(b"the owner comes by", 0)
    without = footprint(tmp_path / "region")[1]
    assert without < with_views
    region.max_capacity = 256 * MIB
    region.write(bytes(100 * MIB), 0)
    assert 128 * MIB <= footprint(tmp_path / "region")[1] <= 260 * MIB


def test_growth_past_the_reservation_without_views_leaves_one_mapping(
    new_region: NewRegion, tmp_path: Path, footprint: Footprint
) -> None:
    region = new_region(initial_capacity=MIB, max_capacity=MIB)
    slot = region.write(blob(1000), 0)
    for ceiling in (4, 16, 64):
        region.max_capacity = ceiling * MIB
        region.write(bytes(ceiling * MIB // 2), 0)
    assert region.read(slot) == blob(1000)
    assert 64 * MIB <= footprint(tmp_path / "region")[1] < 72 * MIB


def test_views_over_a_raised_ceiling_outlive_the_region(new_region: NewRegion) -> None:
    region = new_region(initial_capacity=4096, max_capacity=8192)
    first = region.read(region.write(blob(4096, 1), 0))
    region.max_capacity = MIB
    second = region.read(region.write(blob(100_000, 2), 0))
    region.close()
    assert (first, second) == (blob(4096, 1), blob(100_000, 2))


@pytest.mark.parametrize("value", [4096, 8191, 1, 0, -1])
def test_the_ceiling_cannot_be_lowered(new_region: NewRegion, value: int) -> None:
    region = new_region(initial_capacity=4096, max_capacity=8192)
    with pytest.raises(ValueError):
        region.max_capacity = value
    assert region.max_capacity == 8192
    region.max_capacity = 8192
    assert region.max_capacity == 8192


@pytest.mark.parametrize("value", [1 << 64, 1 << 70])
def test_a_ceiling_that_no_size_can_hold_is_refused(new_region: NewRegion, value: int) -> None:
    region = new_region(initial_capacity=4096, max_capacity=8192)
    with pytest.raises(ValueError):
        region.max_capacity = value
    assert region.max_capacity == 8192


@pytest.mark.parametrize("value", ["9000", 9000.0, None])
def test_a_ceiling_that_is_no_integer_is_a_type_error(new_region: NewRegion, value: Any) -> None:
    region = new_region(initial_capacity=4096, max_capacity=8192)
    with pytest.raises(TypeError):
        region.max_capacity = value
    assert region.max_capacity == 8192


def test_a_ceiling_beyond_the_address_space_costs_nothing_until_used(new_region: NewRegion) -> None:
    region = new_region(initial_capacity=4096, max_capacity=8192)
    view = region.read(region.write(blob(4000), 0))
    region.max_capacity = (1 << 47) - 1
    slot = region.write(blob(100_000), 0)
    assert (view, region.read(slot)) == (blob(4000), blob(100_000))


def test_opening_with_a_ceiling_beyond_the_address_space_works(new_region: NewRegion) -> None:
    region = new_region(initial_capacity=4096, max_capacity=(1 << 47) - 1)
    views = [region.read(region.write(blob(size, size), 0)) for size in (3000, 30_000, 300_000)]
    assert views == [blob(size, size) for size in (3000, 30_000, 300_000)]


# A refused reservation


ADDRESS_SPACE = """
import mmap, random, re, resource, sys
from nodedb_mem import OverflowRegion, RegionIOError
from nodedb_mem._core import lib

MIB = 1 << 20

def limit(room):
    size = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (size + room, resource.getrlimit(resource.RLIMIT_AS)[1]))

def blob(size, seed=0):
    return random.Random(seed).randbytes(size)
"""


@pytest.mark.parametrize("with_views", [False, True], ids=["no_views", "views"])
def test_a_region_works_where_its_reservation_is_refused(
    run_python: Callable[..., str], tmp_path: Path, sanitized: bool, with_views: bool
) -> None:
    if sanitized:
        pytest.skip("AddressSanitizer cannot live under RLIMIT_AS")
    script = (
        ADDRESS_SPACE
        + """
limit(256 * MIB)
region = OverflowRegion.open(sys.argv[1], initial_capacity=4096, max_capacity=64 << 30)
assert region.max_capacity == 64 << 30
expected, views = {}, []
for number in range(40):
    data = blob(1000 * (number + 1), number)
    slot = region.write(data, 0)
    expected[slot] = data
    if sys.argv[2] == "True":
        views.append((region.read(slot), data))
    assert lib.ndm_region_check(region._handle) == 0
    assert all(view == data for view, data in views)
assert region.stats().growths > 3
assert all(region.read(slot) == data for slot, data in expected.items())
region.close()
assert all(view == data for view, data in views)
print("done")
"""
    )
    assert run_python(script, tmp_path / "region", with_views) == "done\n"


def test_growth_that_finds_no_address_space_changes_nothing(
    run_python: Callable[..., str], tmp_path: Path, sanitized: bool
) -> None:
    if sanitized:
        pytest.skip("AddressSanitizer cannot live under RLIMIT_AS")
    script = (
        ADDRESS_SPACE
        + """
import errno, os
source = mmap.mmap(-1, 200 * MIB)
limit(64 * MIB)
region = OverflowRegion.open(sys.argv[1], initial_capacity=4096, max_capacity=64 << 30)
slot = region.write(blob(4000), 0)
for keep in (False, True):
    view = region.read(slot) if keep else None
    before = region.stats()
    for _ in range(3):
        try:
            region.write(source, 0)
        except MemoryError:
            pass
        except RegionIOError as error:
            assert error.errno == errno.ENOMEM, error
        else:
            raise AssertionError("200 MiB mapped in 64 MiB of address space")
        assert region.stats() == before, (before, region.stats())
        assert os.stat(sys.argv[1]).st_size == before.capacity
        assert lib.ndm_region_check(region._handle) == 0
    assert region.read(slot) == blob(4000)
    assert region.read(region.write(blob(9000), 0)) == blob(9000)
    assert view is None or view == blob(4000)
print("done")
"""
    )
    assert run_python(script, tmp_path / "region") == "done\n"


def test_a_refused_growth_can_be_tried_again(run_python: Callable[..., str], tmp_path: Path, sanitized: bool) -> None:
    if sanitized:
        pytest.skip("AddressSanitizer cannot live under RLIMIT_AS")
    script = (
        ADDRESS_SPACE
        + """
source = mmap.mmap(-1, 100 * MIB)
source[-4:] = b"tail"
limit(32 * MIB)
region = OverflowRegion.open(sys.argv[1], initial_capacity=4096, max_capacity=64 << 30)
try:
    region.write(source, 0)
except (MemoryError, RegionIOError):
    pass
else:
    raise AssertionError("100 MiB mapped in 32 MiB of address space")
resource.setrlimit(resource.RLIMIT_AS, (resource.getrlimit(resource.RLIMIT_AS)[1],) * 2)
slot = region.write(source, 0)
assert region.slot(slot).offset == 0
assert region.read(slot)[-4:] == b"tail"
print("done")
"""
    )
    assert run_python(script, tmp_path / "region") == "done\n"
