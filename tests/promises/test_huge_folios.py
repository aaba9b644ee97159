"""Huge folios: whole, aligned 2 MiB of a large value get them, and a full disk is no SIGBUS."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from kit import Mount, NewRegion, RunPython, blob, system
from nodedb_mem import OverflowRegion

KIB, MIB = 1 << 10, 1 << 20
HUGE = 2 * MIB


def are_there_huge_folios(path: Path) -> bool:
    """Whether a store of 2 MiB is mapped whole, as far as this system's kernel and file system go."""
    with OverflowRegion(path / "probe", cache_limit=None) as region:
        assert region.path is not None
        view = region.read(region.write(bytes(HUGE), 0))
        assert view[0] == 0
        return huge_kib(region.path) == HUGE // KIB


def huge_kib(path: str) -> int:
    """How many KiB of a file's mappings in this process are mapped by huge pages."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            ours = line.endswith(path)
        elif ours and line.startswith("FilePmdMapped:"):
            total += int(line.split()[1])
    return total


@pytest.mark.parametrize("size", [HUGE, 3 * MIB, 4 * MIB + 12_345, 16 * MIB])
def test_large_values_are_mapped_by_few_faults(tmp_path: Path, new_region: NewRegion, size: int) -> None:
    if not are_there_huge_folios(tmp_path):
        pytest.skip("no huge folios here")
    region = new_region(tmp_path / "region", max_capacity=1 << 30, cache_limit=None)
    slots = [region.write(blob(size, number), 0) for number in range(4)]
    views = [region.read(slot) for slot in slots]
    assert all(view[::4096] == blob(size, number)[::4096] for number, view in enumerate(views))
    assert region.path is not None
    places = [region.slot(slot).offset for slot in slots]
    whole = sum((offset + size) // HUGE - -(-offset // HUGE) for offset in places)
    assert huge_kib(region.path) >= whole * HUGE // KIB > 0


FULL_DISK = """
import os, random, sys
from nodedb_mem import OverflowRegion, RegionError, RegionIOError
from nodedb_mem._core import lib

path, seed, recover = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
rng = random.Random(seed)
MIB = 1 << 20
directory = os.path.dirname(path)
options = dict(initial_capacity=rng.choice([MIB, 3 * MIB + 4096]), max_capacity=1 << 30)
options |= dict(alignment=rng.choice([64, 4096]), cache_limit=rng.choice([None, 0]))
options |= dict(keep_mapped=rng.choice([False, True]))
region = OverflowRegion.open(path, **options)
live, drafts = {}, []
file = os.open(path, os.O_RDONLY)

def value(size):
    return rng.randbytes(1000) * (size // 1000 + 1)

def fill_disk():
    with open(directory + "/filler", "ab", buffering=0) as filler:
        for piece in (MIB, 4096):
            try:
                while filler.write(bytes(piece)) > 0:
                    pass
            except OSError:
                pass
        try:
            os.fsync(filler.fileno())
        except OSError:
            pass

def write(size):
    data = value(size)[:size]
    try:
        if rng.random() < 0.3:
            drafts.append((*region.allocate(size, 0), data))
        else:
            live[region.write(data, 0)] = data
    except RegionError:
        pass

def finish_drafts(most):
    while len(drafts) > most:
        slot, view, data = drafts.pop(0)
        view[:] = data
        del view
        region.commit(slot)
        live[slot] = data

for step in range(250):
    choice = rng.random()
    finish_drafts(3)
    for draft in range(len(drafts)):
        drafts[draft][1][rng.randrange(len(drafts[draft][1]))] = step % 256
    if choice < 0.5:
        write(rng.choice([100, 5000, 60_000, 300_000, MIB, MIB + 4096, 2 * MIB, 3 * MIB, 5 * MIB]))
    elif choice < 0.75 and live:
        slot = rng.choice(list(live))
        region.free(slot)
        del live[slot]
    elif choice < 0.82:
        region.trim()
        fill_disk() if rng.random() < 0.7 else None
    elif choice < 0.87:
        try:
            region.evict()
        except RegionIOError:
            pass
    elif choice < 0.92:
        os.fsync(file)  # what is clean asks for blocks with the next store
    elif choice < 0.95:
        try:
            region.compact(4 * MIB)
        except RegionIOError:
            pass
    elif choice < 0.97 and recover:
        finish_drafts(0)
        region.close()
        if os.path.exists(directory + "/filler"):  # opening may want room for its table
            os.unlink(directory + "/filler")
        region = OverflowRegion.open(path, **options | {"recover": True})
        fill_disk()
    elif os.path.exists(directory + "/filler"):
        os.unlink(directory + "/filler")
    while sum(map(len, live.values())) > 24 * MIB:
        slot = rng.choice(list(live))
        region.free(slot)
        del live[slot]
    if step % 20 == 0:
        assert lib.ndm_region_check(region._handle) == 0
        assert all(region.read(slot) == data for slot, data in live.items())
finish_drafts(0)
assert all(region.read(slot) == data for slot, data in live.items())
region.close()
print("done")
"""


@pytest.mark.parametrize("kind", ["ext4", system("xfs"), system("ext2")])
@pytest.mark.parametrize("seed", [1, *(system(seed) for seed in range(2, 6))])
@pytest.mark.parametrize("recover", [True, system(False)])
def test_a_full_disk_beside_huge_folios(
    mount: Mount, run_python: RunPython, kind: str, seed: int, recover: bool
) -> None:
    assert run_python(FULL_DISK, mount(kind, 40) / "region", seed, recover) == "done\n"


UNSPLIT = """
import os, sys
from nodedb_mem import OverflowRegion

MIB = 1 << 20
path = sys.argv[1]
region = OverflowRegion.open(path, initial_capacity=16 * MIB, max_capacity=16 * MIB, cache_limit=None)
slot = region.write(bytes(2 * MIB), 0)
file = os.open(path, os.O_RDONLY)
held, holder = os.pipe()  # what is in a pipe keeps its folio, if that is dirty, from being split
assert os.splice(file, holder, 4096, offset_src=MIB) == 4096
region.free(slot)
slots = [region.write(bytes([number]) * 5000, 0) for number in range(120)]
assert region.trim() > 0  # the rest of the folio has no blocks
with open(os.path.dirname(path) + "/filler", "wb", buffering=0) as filler:
    for piece in (MIB, 4096):
        try:
            while filler.write(bytes(piece)) > 0:
                pass
        except OSError:
            pass
os.fsync(file)  # what is clean asks for blocks with the next store
for number in range(100):
    region.free(slots[number])
    slots[number] = region.write(bytes([number]) * 5000, 0)
assert all(region.read(slot) == bytes([number]) * 5000 for number, slot in enumerate(slots))
print("done")
"""


def test_a_huge_folio_with_a_hole_is_no_sigbus(mount: Mount, run_python: RunPython) -> None:
    assert run_python(UNSPLIT, mount("ext4", 40) / "region") == "done\n"


def test_a_part_of_a_huge_folio_gives_its_blocks_back(
    mount: Mount, new_region: NewRegion, mapped_kib: Callable[[Path | str], int]
) -> None:
    region = new_region(mount("ext4", 40) / "region", initial_capacity=MIB, max_capacity=32 * MIB, cache_limit=None)
    rng = random.Random(1)
    slots = [region.write(bytes(HUGE), 0) for _ in range(6)]
    for slot in slots[1::2]:  # free, and partly in use again
        region.free(slot)
        region.write(blob(70_000, slot), 0)
    live = {slot: bytes(HUGE) for slot in slots[::2]}
    before = region.stats().disk_bytes
    assert region.trim() > 0
    assert region.stats().disk_bytes < before
    for number in range(600):
        data = blob(rng.randrange(1, 8000), number)
        live[region.write(data, 0)] = data
    assert all(region.read(slot) == data for slot, data in live.items())
    region.evict()
    assert region.stats().resident_bytes == 0
    assert all(region.read(slot) == data for slot, data in live.items())
    assert region.path is not None and mapped_kib(region.path) <= 12 * MIB // KIB
