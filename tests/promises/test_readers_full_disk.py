"""Readers on a full disk: what the owner gives back, or empties, under their views must not kill them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit import Check, Mount, StartPython, free_bytes, system
from nodedb_mem import OverflowReader, OverflowRegion, StaleSlotError

KIB, MIB = 1 << 10, 1 << 20

# Borrows a value, tells so, and looks at each page of it when it is told to; then it ends, or reads on.
_READER = """
import sys
from nodedb_mem import OverflowReader, StaleSlotError
path, slot, closes = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
reader = OverflowReader(path)
view = reader.read(slot)
try:
    with reader.borrow(slot) as borrowed:
        if closes:
            reader.close()
        print("borrowed", flush=True)
        sys.stdin.readline()
        print(len({borrowed[i] for i in range(0, len(borrowed), 4096)}), len(set(view[::4096])), flush=True)
except Exception as error:
    print(type(error).__name__, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def on_tmpfs() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield


def fill(folder: Path) -> None:
    with open(folder / "other", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


@pytest.mark.parametrize("closes", [False, True], ids=["open", "closed with views"])
@pytest.mark.parametrize("way", ["trim", "trim with a value behind", "compact and trim", "reopen", "recover"])
@pytest.mark.parametrize("kind", ["tmpfs", system("ext4"), system("ext2")])
def test_a_borrowed_view_of_what_was_given_back(
    mount: Mount, start_python: StartPython, check: Check, kind: str, way: str, closes: bool
) -> None:
    folder = mount(kind, 32)
    options = {"initial_capacity": MIB, "max_capacity": 64 * MIB}
    region = OverflowRegion.open(folder / "region", **options)
    first = region.write(b"f" * MIB, 0)
    slot = region.write(b"v" * (4 * MIB), 0)
    last = region.write(b"last", 0) if way != "trim" else -1
    child = start_python(_READER, region.path, slot, closes)
    assert child.stdout.readline() == "borrowed\n"
    region.free(slot)
    region.free(first)
    if way == "compact and trim":
        region.compact()
    if way in ("reopen", "recover"):
        region.close()
        region = OverflowRegion.open(folder / "region", **options, recover=way == "recover")
    given = region.trim()
    assert given == 0 or kind != "tmpfs"
    fill(folder)
    child.stdin.write("\n")
    child.stdin.flush()
    assert len(child.stdout.readline().split()) == 2  # no SIGBUS
    assert child.stdout.readline() == ("RegionClosedError\n" if closes else "StaleSlotError\n")
    check(region)
    child.stdin.close()
    assert child.wait() == 0
    (folder / "other").unlink()
    before = free_bytes(folder)
    given = region.trim()  # nobody is there any more
    if kind == "tmpfs" and way != "recover":  # which takes free space for holes
        assert given >= 4 * MIB and free_bytes(folder) - before == given
    if last >= 0 and way != "reopen":
        assert region.read_bytes(last) == b"last"
    check(region)
    region.close()


def test_a_region_that_was_opened_over_readers_shows_no_old_bytes(mount: Mount, check: Check) -> None:
    folder = mount("tmpfs", 32)
    options = {"initial_capacity": MIB, "max_capacity": 16 * MIB}
    region = OverflowRegion.open(folder / "region", **options)
    slot = region.write(b"v" * (4 * MIB), 0)
    with OverflowReader(region.path) as reader:
        view = reader.read(slot)
        region.close()
        region = OverflowRegion.open(folder / "region", **options)
        assert (region.used_bytes, region.live_bytes, len(region)) == (0, 0, 0)
        with pytest.raises(StaleSlotError):
            reader.read(slot)
        assert bytes(view) == b"v" * (4 * MIB)  # as it happens
        for size in (100, 5000, 600_000, MIB):
            number, room = region.allocate(size, 0)
            assert bytes(room) == bytes(size)
            room[:] = b"n" * size
            del room
            region.commit(number)
            assert region.read_bytes(number) == b"n" * size
            assert region.read_bytes(region.write(b"w" * size, 0)) == b"w" * size
        check(region)
        del view
    for number in range(region.slot_count):
        region.free(number)
    region.trim()
    assert os.stat(folder / "region").st_blocks == 0
    region.close()


def test_what_is_leased_stays_where_a_hole_would_need_room(mount: Mount, check: Check) -> None:
    folder = mount("tmpfs", 32)
    options = {"initial_capacity": MIB, "max_capacity": 16 * MIB}
    region = OverflowRegion.open(folder / "region", **options)
    slots = [region.write(bytes([i]) * MIB, 0) for i in range(4)]
    region.share(slots[0])
    with OverflowReader(region.path) as reader, reader.lease(slots[1]) as view:
        region.close()
        region = OverflowRegion.open(folder / "region", **options)
        assert region.stats().pinned_bytes == MIB
        for _ in range(6):
            region.write(b"\xff" * MIB, 0)
        check(region)
        assert bytes(view) == b"\1" * MIB
        del view
    assert region.stats().pinned_bytes == 0
    region.close()
