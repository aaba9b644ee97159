"""Private, writable views: restore."""

from __future__ import annotations

import gc
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit import Check, Mount, NewRegion, RunPython, Unchanged, blob
from nodedb_mem import InvalidSlotError, RegionClosedError

sizes = pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 100_000, 1_700_000])
alignments = pytest.mark.parametrize("alignment", [1, 64, 4096])


def memory_of(address: int) -> dict[str, int]:
    """The figures, in bytes, of the mapping that holds an address."""
    figures: dict[str, int] = {}
    inside = False
    with open("/proc/self/smaps") as maps:
        for line in maps:
            name, *fields = line.split()
            if "-" in name and not name.endswith(":"):
                start, end = (int(part, 16) for part in name.split("-"))
                inside = start <= address < end
            elif inside and fields[-1] == "kB":
                figures[name.rstrip(":")] = int(fields[0]) << 10
    return figures


@sizes
@alignments
def test_it_is_a_writable_copy_that_leaves_the_stored_bytes_alone(
    new_region: NewRegion, check: Check, size: int, alignment: int
) -> None:
    region = new_region(alignment=alignment)
    region.write(b"odd", 0)
    values = [blob(size, 1), blob(size, 2), blob(size, 3)]
    slots = region.write_many(values, 0)
    shown = region.read(slots[1])
    first, second = region.restore(slots[1]), region.restore(slots[1])
    for view in (first, second):
        assert (view.nbytes, view.format, view.readonly) == (size, "B", False)
        assert view == values[1]
    first[:] = b"\x11" * size
    assert second == values[1]  # each call has its own
    second[:] = b"\x22" * size
    assert set(first) == {0x11} and set(second) == {0x22}
    assert shown == values[1]
    assert [region.read_bytes(slot) for slot in slots] == values
    assert region.restore(slots[1]) == values[1]
    check(region)


@alignments
def test_stores_at_its_edges_reach_no_neighbour(new_region: NewRegion, alignment: int) -> None:
    region = new_region(alignment=alignment)
    values = [blob(700 + i, i) for i in range(40)]  # several to a page
    slots = region.write_many(values, 0)
    private = [region.restore(slot) for slot in slots]
    for number, view in enumerate(private):
        view[0] = view[-1] = number
    assert [region.read_bytes(slot) for slot in slots] == values
    for number, (view, value) in enumerate(zip(private, values, strict=True)):
        assert view == bytes([number]) + value[1:-1] + bytes([number])


def test_arrays_on_it_are_ordinary_arrays(new_region: NewRegion) -> None:
    region = new_region()
    numbers = np.arange(100_000, dtype=np.float64)
    slot = region.write(numbers, 0)
    array = np.frombuffer(region.restore(slot), np.float64)
    assert array.flags.writeable and array.ctypes.data % 64 == 0
    array += 1
    array[::-1].sort()
    np.negative(array, out=array)
    assert (array == -(numbers + 1)[::-1]).all()
    assert (np.frombuffer(region.read(slot)) == numbers).all()
    table = np.frombuffer(region.restore(slot), np.float64).reshape(100, 1000)
    table[5] = 0
    assert table.sum() == numbers.sum() - numbers[5000:6000].sum()


def test_no_bytes_are_restored_too(new_region: NewRegion, check: Check) -> None:
    region = new_region()
    slot = region.write(b"", 0)
    view = region.restore(slot)
    assert (len(view), view.readonly) == (0, False)
    region.free(slot)
    check(region)


@pytest.mark.parametrize("evicted", [False, True])
def test_untouched_pages_cost_no_memory_of_their_own(new_region: NewRegion, evicted: bool) -> None:
    region = new_region(max_capacity=1 << 27)
    size, page = 64 << 20, 4096
    slot = region.write(np.ones(size, np.uint8), 0)
    region.flush()
    if evicted:
        region.evict()
    array = np.frombuffer(region.restore(slot), np.uint8)
    address = array.ctypes.data
    assert memory_of(address)["Size"] >= size
    assert memory_of(address)["Anonymous"] == 0
    assert int(array.sum()) == size  # every page is read
    assert memory_of(address)["Anonymous"] == 0
    assert memory_of(address)["Private_Dirty"] <= 16 * page
    array[5 * page] = 2
    array[9 * page : 11 * page] += 1
    figures = memory_of(address)
    assert 3 * page <= figures["Anonymous"] <= 3 * max(page, 65536)
    assert figures["Private_Dirty"] <= 3 * 65536
    assert int(array.sum()) == size + 1 + 2 * page


# Pins


def test_it_pins_like_a_view_of_read(new_region: NewRegion, check: Check) -> None:
    region = new_region()
    value = blob(50_000)
    hole = region.write(bytes(100_000), 0)
    slot = region.write(value, 0)
    view = region.restore(slot)
    view[7] ^= 255
    part = view[10_000:20_000]
    del view
    region.free(hole)
    offset = region.slot(slot).offset
    region.compact()
    assert region.slot(slot).offset == offset
    region.free(slot)
    assert region.stats().pinned_bytes >= 50_000
    others = [region.write(b"\xff" * 50_000, 0) for _ in range(4)]
    assert all(region.slot(other).offset != offset for other in others)
    assert part == value[10_000:20_000]
    check(region)
    del part
    gc.collect()
    check(region)
    assert region.stats().pinned_bytes == 0


@pytest.mark.parametrize("size", [3000, 70_000, 1_500_000])
def test_it_stays_right_whatever_the_region_does(new_region: NewRegion, check: Check, size: int) -> None:
    region = new_region(alignment=1, initial_capacity=4096, max_capacity=1 << 22)
    fillers = [region.write(blob(size // 3 + 1, i), 0) for i in range(2)]
    value = blob(size, 9)
    slot = region.write(value, 0)
    tail = region.write(blob(size, 4), 0)
    view = region.restore(slot)
    view[0] ^= 255
    view[size // 2] ^= 255
    expected = bytearray(value)
    expected[0] ^= 255
    expected[size // 2] ^= 255

    def assert_right() -> None:
        assert view == expected
        check(region)

    region.evict([slot])
    assert_right()
    region.free_many([*fillers, tail])
    region.trim()
    assert_right()
    region.compact()
    region.evict()
    assert_right()
    assert region.read(slot) == value
    fillers = [region.write(b"\xff" * (size // 3 + 1), 0) for _ in range(3)]
    assert_right()
    region.max_capacity = 1 << 26  # past the reservation
    region.write(b"\xff" * (1 << 24), 0)
    assert_right()
    view[1] ^= 255
    expected[1] ^= 255
    assert region.read(slot) == value
    region.free(slot)
    region.trim()
    region.write(b"\xff" * size, 0)
    assert_right()
    region.flush()
    region.close()
    assert view == expected
    view[:] = b"\x33" * size
    assert set(view) == {0x33}
    with pytest.raises(RegionClosedError):
        region.restore(slot)


def test_closing_leaves_the_stored_bytes_in_the_file(new_region: NewRegion, tmp_path: Path) -> None:
    region = new_region()
    slot = region.write(blob(10_000), 0)
    offset = region.slot(slot).offset
    view = region.restore(slot)
    view[:] = b"\xff" * 10_000
    region.close()
    assert (tmp_path / "region").read_bytes()[offset : offset + 10_000] == blob(10_000)
    assert set(view) == {255}


def test_many_at_once_and_again_and_again(new_region: NewRegion, check: Check) -> None:
    region = new_region(alignment=1)
    values = [blob(random.Random(i).randrange(1, 9000), i) for i in range(100)]
    slots = region.write_many(values, 0)
    views = [(number % 100, region.restore(slots[number % 100])) for number in range(2000)]
    for number, (index, view) in enumerate(views):
        assert view == values[index]
        view[0] = number % 256
    random.Random(1).shuffle(views)
    del views[::2]
    assert all(view[1:] == values[index][1:] for index, view in views)
    region.free_many(slots)
    views.clear()
    del view
    gc.collect()
    check(region)
    assert region.stats().pinned_bytes == 0


def test_any_thread_may_use_and_drop_it(new_region: NewRegion, check: Check) -> None:
    region = new_region()
    slot = region.write(blob(100_000), 0)
    held: list[Any] = [region.restore(slot)]

    def change() -> None:
        held[0][:] = bytes(100_000)
        held.clear()

    thread = threading.Thread(target=change)
    thread.start()
    thread.join()
    assert region.read_bytes(slot) == blob(100_000)
    region.free(slot)
    assert region.stats().pinned_bytes == 0
    check(region)


def test_it_shows_what_was_stored_in_place(new_region: NewRegion) -> None:
    region = new_region()
    slot, room = region.allocate(5000, 0)
    room[:] = blob(5000)
    region.commit(slot)
    private = region.restore(slot)
    private[:10] = b"0123456789"
    assert room == region.read(slot) == blob(5000)
    assert private == b"0123456789" + blob(5000)[10:]


# Processes


def test_parent_and_child_have_their_own(run_python: RunPython, tmp_path: Path) -> None:
    script = """
import os, sys
from nodedb_mem import OverflowRegion, WrongThreadError

region = OverflowRegion.open(sys.argv[1])
value = os.urandom(20_000)
slot = region.write(value, 0)
view = region.restore(slot)
view[:5] = b"hello"
to_child, to_parent = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    status = 1
    try:
        assert view == b"hello" + value[5:]
        view[9000:9005] = b"child"
        view[:5] = b"child"
        try:
            region.restore(slot)
        except WrongThreadError:
            os.write(to_parent[1], b"x")
            assert os.read(to_child[0], 1) == b"x"
            assert view == b"child" + value[5:9000] + b"child" + value[9005:]
            del view
            status = 0
    finally:
        os._exit(status)
assert os.read(to_parent[0], 1) == b"x"
assert view == b"hello" + value[5:]
view[9000:9005] = b"paren"
os.write(to_child[1], b"x")
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert view == b"hello" + value[5:9000] + b"paren" + value[9005:]
assert region.read(slot) == value
print("done")
"""
    assert run_python(script, tmp_path / "region") == "done\n"


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_stores_to_it_need_no_disk(mount: Mount, run_python: RunPython, kind: str) -> None:
    script = """
import errno, os, sys
from nodedb_mem import OverflowRegion

region = OverflowRegion.open(sys.argv[1], initial_capacity=65536)
values = [os.urandom(size) for size in (1000, 70_000, 900_000)]
slots = region.write_many(values, 0)
hole = region.write(bytes(600_000), 0)
region.write(b"last", 0)
region.free(hole)
region.trim()
try:
    with open(sys.argv[1] + ".filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
except OSError as error:
    assert error.errno == errno.ENOSPC
region.evict()
views = [region.restore(slot) for slot in slots]
for view, value in zip(views, values, strict=True):
    view[:] = bytes(byte ^ 255 for byte in value)
assert [region.read_bytes(slot) for slot in slots] == values
print("done")
"""
    assert run_python(script, mount(kind, 8) / "region") == "done\n"


# Refused


@pytest.mark.parametrize(
    ("wrong", "reason"), [(0, "freed"), (2, "never"), (-1, "never"), (1 << 63, "never"), (1 << 70, "never")]
)
def test_only_a_live_slot_is_restored(new_region: NewRegion, unchanged: Unchanged, wrong: int, reason: str) -> None:
    region = new_region()
    region.write_many([b"a", b"b"], 0)
    region.free(0)
    with unchanged(region), pytest.raises(InvalidSlotError, match=reason) as caught:
        region.restore(wrong)
    assert caught.value.slot == wrong


@pytest.mark.parametrize("wrong", [1.0, "1", None, b"1"], ids=repr)
def test_a_slot_that_is_no_integer_is_a_type_error(new_region: NewRegion, unchanged: Unchanged, wrong: Any) -> None:
    region = new_region()
    region.write(b"a", 0)
    with unchanged(region), pytest.raises(TypeError):
        region.restore(wrong)
    assert region.restore(np.int64(0)) == b"a"


def test_without_address_space_it_is_an_error_and_nothing_changes(
    run_python: RunPython, tmp_path: Path, sanitized: bool
) -> None:
    if sanitized:
        pytest.skip("AddressSanitizer needs address space")
    script = """
import errno, resource, sys
from nodedb_mem import OverflowRegion, RegionIOError
from nodedb_mem._core import lib

region = OverflowRegion.open(sys.argv[1], max_capacity=1 << 27)
value = b"v" * (50 << 20)
slot = region.write(value, 0)
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, resource.RLIM_INFINITY))
views = []
try:
    while len(views) < 30:
        views.append(region.restore(slot))
except RegionIOError as error:
    assert error.errno == errno.ENOMEM, error
    assert error.filename == sys.argv[1]
else:
    raise AssertionError("more than there is")
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert lib.ndm_region_check(region._handle) == 0
count = len(views)
views.clear()
region.free(slot)
assert region.stats().pinned_bytes == 0
slot = region.write(b"again", 0)
view = region.restore(slot)
view[:1] = b"A"
assert (bytes(view), region.read_bytes(slot)) == (b"Again", b"again")
print("done")
"""
    assert run_python(script, tmp_path / "region") == "done\n"
