"""Room to fill in place: allocate and commit."""

from __future__ import annotations

import gc
import os
import socket
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit import Check, Mount, NewRegion, RunToEnd, Unchanged, blob
from nodedb_mem import CapacityExceededError, InvalidSlotError, OverflowRegion, RegionClosedError

sizes = pytest.mark.parametrize("size", [1, 4095, 4096, 100_000, 524_288, 1_700_000])
file_systems = pytest.mark.parametrize("kind", ["tmpfs", "ext4"])


# Zeros


@sizes
@pytest.mark.parametrize("alignment", [1, 64, 4096])
def test_fresh_room_is_zero_and_writable(new_region: NewRegion, check: Check, size: int, alignment: int) -> None:
    region = new_region(alignment=alignment)
    region.write(b"before", 0)
    slot, view = region.allocate(size, 9)
    check(region)
    assert (view.nbytes, view.format, view.itemsize, view.readonly, view.contiguous) == (size, "B", 1, False, True)
    assert not any(view)
    assert region.read(slot) == bytes(size)
    data = blob(size)
    view[:] = data
    assert region.read_bytes(slot) == data
    region.commit(slot)
    facts = region.slot(slot)
    assert (facts.size, facts.engine, facts.occupied, facts.offset % alignment) == (size, 9, True, 0)
    assert region.live_bytes == 6 + size


@sizes
@pytest.mark.parametrize("alignment", [1, 4096])
@pytest.mark.parametrize("how", ["reused", "evicted", "trimmed", "trimmed-and-grown"])
@pytest.mark.parametrize("kind", ["here", "tmpfs", "ext4"])
def test_reused_room_is_zero_and_the_neighbours_keep_their_bytes(
    mount: Mount, tmp_path: Path, check: Check, size: int, alignment: int, how: str, kind: str
) -> None:
    directory = tmp_path if kind == "here" else mount(kind, 16)
    with OverflowRegion(
        directory / "region", initial_capacity=1 << 16, max_capacity=1 << 23, alignment=alignment
    ) as region:
        before = region.write(blob(5001, 1), 0)
        dirty = region.write(b"\xff" * size, 0)
        after = None if how == "trimmed-and-grown" else region.write(blob(5003, 2), 0)
        if how == "evicted":
            region.evict()
        region.free(dirty)
        if how.startswith("trimmed"):
            region.trim()
        slot, view = region.allocate(size, 0)
        assert region.slot(slot).offset == region.slot(dirty).offset
        assert not np.frombuffer(view, np.uint8).any()
        check(region)
        view[:] = b"\xee" * size
        assert region.read_bytes(before) == blob(5001, 1)
        assert after is None or region.read_bytes(after) == blob(5003, 2)
        region.evict([slot])
        assert region.read_bytes(slot) == b"\xee" * size
        del view


def test_a_part_of_a_large_hole_is_zero(new_region: NewRegion, check: Check) -> None:
    region = new_region(alignment=1)
    dirty = region.write(b"\xff" * 3_000_000, 0)
    region.write(b"guard", 0)
    region.free(dirty)
    views = [region.allocate(size, 0)[1] for size in (1, 100, 5000, 524_287, 524_289, 70_001)]
    for number, view in enumerate(views):
        assert not any(view)
        view[:] = bytes([number + 1]) * len(view)
    check(region)
    assert all(set(view) == {number + 1} for number, view in enumerate(views))
    slot = region.write(b"\xff" * 100_000, 0)
    assert region.read_bytes(slot) == b"\xff" * 100_000
    assert all(set(view) == {number + 1} for number, view in enumerate(views))


def test_no_bytes_are_a_value_too(new_region: NewRegion, check: Check) -> None:
    region = new_region()
    slot, view = region.allocate(0, 0)
    assert (len(view), view.readonly) == (0, False)
    region.commit(slot)
    assert region.read_bytes(slot) == b""
    region.free(slot)
    check(region)


# Filling it


def test_a_file_is_read_into_it(new_region: NewRegion, tmp_path: Path) -> None:
    data = blob(300_000)
    (tmp_path / "source").write_bytes(data)
    region = new_region()
    slot, view = region.allocate(len(data), 0)
    with open(tmp_path / "source", "rb", buffering=0) as file:
        assert file.readinto(view) == len(data)  # by the system, straight into the mapping
    region.commit(slot)
    assert region.read(slot) == data
    with open(tmp_path / "source", "rb") as file:
        assert os.preadv(file.fileno(), [view[:100], view[200:300]], 7) == 200
    assert region.read_bytes(slot)[:300] == data[7:107] + data[100:200] + data[107:207]


def test_a_socket_is_received_into_it(new_region: NewRegion) -> None:
    data = blob(20_000)
    region = new_region()
    slot, view = region.allocate(len(data), 0)
    left, right = socket.socketpair()
    with left, right:
        left.sendall(data)
        left.shutdown(socket.SHUT_WR)
        done = 0
        while count := right.recv_into(view[done:]):
            done += count
    region.commit(slot)
    assert region.read_bytes(slot) == data


def test_numpy_computes_into_it(new_region: NewRegion) -> None:
    region = new_region()
    slot, view = region.allocate(8 * 1000, 0)
    out = np.frombuffer(view, np.float64)
    assert out.flags.writeable
    assert out.ctypes.data % 64 == 0
    np.multiply(np.arange(1000.0), 3, out=out)
    region.commit(slot)
    assert (np.frombuffer(region.read(slot)) == np.arange(1000.0) * 3).all()
    out[:10] = -1
    assert np.frombuffer(region.read_bytes(slot))[:11].tolist() == [-1.0] * 10 + [30.0]


def test_another_thread_may_fill_and_drop_it(new_region: NewRegion, check: Check) -> None:
    region = new_region()
    slot, view = region.allocate(100_000, 0)
    held = [view]
    del view

    def fill() -> None:
        held[0][:] = b"t" * 100_000
        held.clear()

    thread = threading.Thread(target=fill)
    thread.start()
    thread.join()
    assert region.read_bytes(slot) == b"t" * 100_000
    region.free(slot)
    assert region.stats().pinned_bytes == 0
    check(region)


# Pins


def test_it_stays_in_place_while_the_view_lives(new_region: NewRegion, check: Check) -> None:
    region = new_region()
    hole = region.write(bytes(10_000), 0)
    slot, view = region.allocate(5000, 0)
    region.free(hole)
    offset = region.slot(slot).offset
    region.compact()
    region.evict()
    region.evict([slot])
    region.trim()
    assert region.slot(slot).offset == offset
    view[:] = blob(5000)
    assert region.read_bytes(slot) == blob(5000)
    del view
    region.compact()
    assert region.slot(slot).offset < offset
    assert region.read_bytes(slot) == blob(5000)
    check(region)


def test_freed_while_the_view_lives_its_bytes_are_nobody_elses(new_region: NewRegion, check: Check) -> None:
    region = new_region()
    slot, view = region.allocate(5000, 0)
    offset = region.slot(slot).offset
    array = np.frombuffer(view, np.uint8)[100:200]
    del view
    region.free(slot)
    with pytest.raises(InvalidSlotError, match="freed"):
        region.commit(slot)
    assert region.stats().pinned_bytes >= 5000
    others = [region.write(b"o" * 5000, 0) for _ in range(5)]
    array[:] = 255  # a late store reaches no other value
    assert all(region.read_bytes(other) == b"o" * 5000 for other in others)
    assert all(region.slot(other).offset != offset for other in others)
    check(region)
    del array
    gc.collect()
    again, view = region.allocate(5000, 0)
    assert region.slot(again).offset == offset
    assert not any(view)


def test_the_view_outlives_the_region(new_region: NewRegion) -> None:
    region = new_region()
    _, view = region.allocate(5000, 0)
    region.close()
    view[:] = blob(5000)
    assert view == blob(5000)
    with pytest.raises(RegionClosedError):
        region.allocate(1, 0)
    with pytest.raises(RegionClosedError):
        region.commit(0)


def test_the_view_and_the_value_stay_one_while_the_file_grows(new_region: NewRegion, check: Check) -> None:
    region = new_region(initial_capacity=4096, max_capacity=1 << 16)
    slot, view = region.allocate(5000, 0)
    view[:10] = b"0123456789"
    for number in range(4):
        region.max_capacity *= 8  # beyond what was reserved: the mapping is doubled
        region.write(bytes(region.max_capacity // 2), 0)
        view[number] = 100 + number
        view[4999 - number] = 200 + number
        assert region.read(slot)[number] == 100 + number
        assert region.read_bytes(slot)[4999 - number] == 200 + number
        check(region)
    late, other = region.allocate(region.max_capacity * 3 // 8, 0)  # and room past the first reservation
    assert not np.frombuffer(other, np.uint8).any()
    other[-1] = 9
    assert region.read(late)[-1] == 9


# Refused


@pytest.mark.parametrize("size", [-1, -(1 << 63), -(1 << 70), 1 << 63, 1 << 70])
def test_an_impossible_size_is_a_value_error(new_region: NewRegion, unchanged: Unchanged, size: int) -> None:
    region = new_region()
    with unchanged(region), pytest.raises(ValueError, match="size"):
        region.allocate(size, 0)


@pytest.mark.parametrize("size", [1.0, "1", None, b"1", [1]], ids=repr)
def test_a_size_that_is_no_integer_is_a_type_error(new_region: NewRegion, unchanged: Unchanged, size: Any) -> None:
    region = new_region()
    with unchanged(region), pytest.raises(TypeError):
        region.allocate(size, 0)


@pytest.mark.parametrize("size", [(1 << 24) + 1, 1 << 47, 1 << 62, (1 << 63) - 1])
def test_a_size_past_the_ceiling_is_refused(new_region: NewRegion, unchanged: Unchanged, size: int) -> None:
    region = new_region()
    with unchanged(region), pytest.raises(CapacityExceededError) as caught:
        region.allocate(size, 0)
    assert (caught.value.required, caught.value.max_capacity) == (size, 1 << 24)


def test_numpy_integers_are_sizes(new_region: NewRegion) -> None:
    region = new_region()
    slot, view = region.allocate(np.uint16(300), 0)
    assert region.slot(slot).size == len(view) == 300


@pytest.mark.parametrize(("wrong", "reason"), [(0, "freed"), (7, "never"), (-1, "never"), (1 << 70, "never")])
def test_only_a_live_slot_is_committed(new_region: NewRegion, unchanged: Unchanged, wrong: int, reason: str) -> None:
    region = new_region()
    region.free(region.write(b"", 0))
    with unchanged(region), pytest.raises(InvalidSlotError, match=reason):
        region.commit(wrong)
    for not_a_slot in (1.0, "1", None):
        with pytest.raises(TypeError):
            region.commit(not_a_slot)


def test_committing_again_changes_nothing(new_region: NewRegion, unchanged: Unchanged) -> None:
    region = new_region()
    slot, view = region.allocate(10, 0)
    view[:] = b"0123456789"
    with unchanged(region):
        region.commit(slot)
        region.commit(np.int64(slot))


# Full disks: what could end in SIGBUS has a process of its own


@file_systems
@pytest.mark.parametrize("size", [3000, 70_000, 900_000])
def test_every_byte_of_what_was_given_can_be_stored_on_a_full_disk(
    mount: Mount, run_to_end: RunToEnd, kind: str, size: int
) -> None:
    script = """
directory, size = sys.argv[1], int(sys.argv[2])
for initial in (1 << 16, 1 << 26):  # growing, and a file whose blocks are missing
    region = OverflowRegion.open(directory + "/region", initial_capacity=initial, max_capacity=1 << 30)
    model, views = {}, {}
    while True:
        before = region.stats()
        try:
            slot, views[slot] = region.allocate(size, 0)
        except RegionIOError as error:
            assert error.errno == errno.ENOSPC, error
            break
    assert len(views) * size > 4 << 20
    assert region.stats() == before
    assert os.stat(directory + "/region").st_size == before.capacity
    fill_disk(directory + "/filler")
    for round in range(2):
        for slot, view in views.items():
            assert round or bytes(view) == bytes(size)
            view[:] = bytes([1 + (slot + round) % 255]) * size
        region.flush()
        region.evict(list(views))
        for slot, view in views.items():
            assert bytes(view) == bytes([1 + (slot + round) % 255]) * size
    assert lib.ndm_region_check(region._handle) == 0
    views.clear()
    view = None
    region.close()
    os.unlink(directory + "/region")
    os.unlink(directory + "/filler")
"""
    run_to_end(script, mount(kind, 10), size)


@file_systems
@pytest.mark.parametrize("size", [5000, 70_000, 100_000, 600_000])
@pytest.mark.parametrize("between", ["nothing", "read", "read_bytes", "restore"])
def test_trim_takes_no_block_that_a_store_would_need(
    mount: Mount, run_to_end: RunToEnd, kind: str, size: int, between: str
) -> None:
    # A store into a clean page asks for the blocks of its whole folio, which may reach into what was punched.
    script = """
directory, size, between = sys.argv[1], int(sys.argv[2]), sys.argv[3]
region = OverflowRegion.open(directory + "/region", initial_capacity=1 << 16, max_capacity=1 << 23)
front = region.write(os.urandom(200_001), 0)
slot, view = region.allocate(size, 0)
behind = region.write(os.urandom(300_000), 0)
last = region.write(os.urandom(1_200_000), 0)
view[:] = bytes([1]) * size
for gone in (front, behind):
    region.free(gone)
    region.trim()
fill_disk(directory + "/filler")
region.evict([slot])
if between != "nothing":
    bytes(getattr(region, between)(slot))
for at in range(size - 1, -1, -1000):
    view[at] = 2
region.flush()
region.evict([slot])
assert region.read_bytes(slot) == bytes(2 if (size - 1 - at) % 1000 == 0 else 1 for at in range(size))
assert lib.ndm_region_check(region._handle) == 0

# With the view gone, its neighbourhood is given back, too.
del view
os.unlink(directory + "/filler")
before = region.stats().disk_bytes
region.trim()
assert region.stats().disk_bytes < before
assert set(region.read_bytes(slot)) == {1, 2}
"""
    run_to_end(script, mount(kind, 16), size, between)


@file_systems
def test_a_view_that_another_thread_ends_lets_trim_punch_again(mount: Mount, kind: str) -> None:
    with OverflowRegion(mount(kind, 16) / "region", initial_capacity=1 << 16, max_capacity=1 << 23) as region:
        held = [region.allocate(1000, 0)[1]]
        gone = region.write(blob(400_000), 0)
        region.write(blob(10_000), 0)
        region.free(gone)
        region.free(0)
        region.flush()
        assert region.trim() < 300_000
        thread = threading.Thread(target=held.clear)
        thread.start()
        thread.join()
        assert region.trim() >= 300_000
