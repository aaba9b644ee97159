"""The RSS: pages of values of 64 KiB and more are mapped only while a view of them lives, whatever stored them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kit import Mount, NewRegion, blob, system
from nodedb_mem import OverflowReader, OverflowRegion

KIB, MIB = 1 << 10, 1 << 20
MOST = 6 * MIB  # of RSS, for what is not a value's: a fifth of what each test stores
STORED = 32 * MIB
LIMITS = [None, 0, system(64 << 30)]

at_each_limit = pytest.mark.parametrize("limit", LIMITS)
on_each = pytest.mark.parametrize("kind", ["ext4", "tmpfs", system("ext2"), system("btrfs"), system("xfs")])
of_each_size = pytest.mark.parametrize("size", [system(64 * KIB), 70_001, MIB, system(5 * MIB + 1)])

Mapped = Callable[[], int]


class Watched:
    """A region, and the most that its files had in the RSS of this process whenever somebody looked."""

    def __init__(self, region: OverflowRegion, mapped_kib: Callable[[Path | str], int]) -> None:
        self.region, self._mapped_kib, self.peak = region, mapped_kib, 0

    def look(self) -> int:
        assert self.region.path is not None
        mapped = self._mapped_kib(self.region.path) * KIB
        self.peak = max(self.peak, mapped)
        return mapped

    def fill(self, size: int) -> list[int]:
        """Write values of this size, and have a look now and then."""
        data, count = memoryview(blob(size)), STORED // size
        slots = []
        for number in range(count):
            slots.append(self.region.write(data, 0))
            if number % (count // 8 + 1) == 0:
                self.look()
        self.look()
        return slots


@pytest.fixture
def watch(tmp_path: Path, new_region: NewRegion, mapped_kib: Callable[[Path | str], int]) -> Callable[..., Watched]:
    """Open regions on the tests' disk."""
    number = itertools.count()

    def make(limit: int | None, directory: Path = tmp_path, **options: int) -> Watched:
        options = {"initial_capacity": MIB, "max_capacity": 1 << 30} | options
        region = new_region(directory / f"region{next(number)}", cache_limit=limit, **options)
        return Watched(region, mapped_kib)

    return make


Watch = Callable[..., Watched]


@at_each_limit
@of_each_size
def test_writing_and_rewriting(watch: Watch, limit: int | None, size: int) -> None:
    watched = watch(limit)
    region = watched.region
    slots = watched.fill(size)
    for _ in range(2):
        for number, slot in enumerate(slots):
            region.free(slot)
            slots[number] = region.write(blob(size, 1), 0)
        watched.look()
    assert watched.peak <= MOST
    assert all(region.read_bytes(slot) == blob(size, 1) for slot in slots[:3])


@on_each
def test_on_each_file_system(mount: Mount, watch: Watch, kind: str) -> None:
    watched = watch(None, mount(kind, 300), max_capacity=200 * MIB)
    region = watched.region
    for _ in range(2):
        slots = watched.fill(MIB)
        for slot in slots:
            assert region.read(slot)[::4096] == blob(MIB)[::4096]
        watched.look()
        region.free_many(slots[::2])
        region.compact()
        watched.look()
        region.free_many(slots[1::2])
    assert watched.peak <= MOST


@at_each_limit
def test_large_values_where_small_ones_were(watch: Watch, limit: int | None) -> None:
    # The small ones' pages are mapped. They are no longer once a large value has their place.
    watched = watch(limit)
    region = watched.region
    for size in (4000, 60_000):
        slots = region.write_many([blob(size)] * (STORED // size), 0)
        assert all(region.read(slot)[::4096] == blob(size)[::4096] for slot in slots)
        region.free_many(slots)
        region.free_many(region.write_many([blob(MIB)] * (region.used_bytes // MIB), 0))
        assert watched.look() <= MOST


@at_each_limit
@of_each_size
def test_allocating(watch: Watch, limit: int | None, size: int) -> None:
    watched = watch(limit)
    region = watched.region
    for _ in range(2):  # fresh space, then space that values were in
        slots = []
        for _ in range(STORED // size):
            slot, view = region.allocate(size, 0)
            view[::4096] = bytes(len(view[::4096]))
            slots.append(slot)
            del view
            region.commit(slot)
        assert watched.look() <= MOST
        region.free_many(slots)


@at_each_limit
@of_each_size
def test_batches(watch: Watch, limit: int | None, size: int) -> None:
    watched = watch(limit)
    region = watched.region
    count = 32 * MIB // size
    packed = np.frombuffer(blob(size) * count, np.uint8)
    room = np.empty_like(packed)
    for _ in range(STORED // (32 * MIB)):
        slots = region.write_many([blob(size)] * count, 0)
        again = region.write_many(packed, 0, lengths=np.full(count, size, np.int64))
        watched.look()
        region.read_many_into(slots, room)
        assert (room == packed).all()
        watched.look()
        for views in region.read_many(slots), region.read_many(again):
            assert sum(int(np.frombuffer(view, np.uint8)[::4096].sum()) for view in views) >= 0
        del views
        watched.look()
        region.free_many(slots)
        region.free_many(again)
    assert watched.peak <= MOST


@at_each_limit
@pytest.mark.parametrize("part", [100, 4096, 65_537])
@pytest.mark.parametrize("aligned", [False, True])
def test_gathering(watch: Watch, limit: int | None, part: int, aligned: bool) -> None:
    watched = watch(limit, alignment=4096)
    region = watched.region
    count = 4 * MIB // max(part, 4096 if aligned else 0)
    parts = [blob(part, number % 7) for number in range(count)]
    for _ in range(2):
        slots = [region.write_vectored(parts, 0, aligned=aligned) for _ in range(16)]
        watched.look()
        view = region.read(slots[3])
        assert [bytes(piece) for piece in region.parts(slots[3]).split(view)] == parts
        del view
        region.free_many(slots)
    assert watched.peak <= MOST


@at_each_limit
@of_each_size
@pytest.mark.parametrize("gap", [64, 4096, 100_000, 3 * MIB])
def test_compacting(watch: Watch, limit: int | None, size: int, gap: int) -> None:
    watched = watch(limit)
    region = watched.region
    values, gaps = [], []
    for number in range(STORED // size):
        if number % 8 == 0 and gap > 64:
            gaps.append(region.write(bytes(gap), 0))
        values.append(region.write(blob(size, number), 0))
    if gap == 64:  # what follows slides by little, over itself
        values[0], first = region.write(blob(size, 0), 0), values[0]
        gaps = [first, values.pop(2)]
    region.free_many(gaps)
    budget = 16 * MIB if gap == 64 else None
    region.compact(budget)
    assert watched.look() <= MOST
    assert all(region.read(slot) == blob(size, number) for number, slot in enumerate(values[:2]))
    assert watched.look() <= MOST


@at_each_limit
@of_each_size
def test_recovering(watch: Watch, mapped_kib: Callable[[Path | str], int], limit: int | None, size: int) -> None:
    watched = watch(limit)
    slots = watched.fill(size)
    path = watched.region.path
    assert path is not None
    watched.region.close()
    with OverflowRegion(path, max_capacity=1 << 30, cache_limit=limit, recover=True) as region:
        assert len(region) == len(slots)
        assert mapped_kib(path) * KIB <= MOST
        for slot in slots:
            assert region.read(slot)[::4096] == blob(size)[::4096]
        for number, slot in enumerate(slots):
            region.free(slot)
            slots[number] = region.write(blob(size), 0)
        assert mapped_kib(path) * KIB <= MOST


@at_each_limit
@of_each_size
@pytest.mark.parametrize("every", [1, 2])
def test_reading(watch: Watch, limit: int | None, size: int, every: int) -> None:
    # A fault maps pages of the neighbours, too, which may never be read.
    watched = watch(limit)
    region = watched.region
    slots = watched.fill(size)
    random.Random(size).shuffle(slots)
    for slot in slots[::every]:
        assert region.read(slot)[::4096] == blob(size)[::4096]
    watched.look()
    for slot in slots[::every]:
        restored = region.restore(slot)
        restored[::4096] = bytes(len(restored[::4096]))
        del restored
    for slot in slots[::every]:
        assert region.read_bytes(slot)[:10] == blob(size)[:10]
    watched.look()
    assert watched.peak <= MOST


@of_each_size
def test_a_reader(watch: Watch, size: int) -> None:
    watched = watch(None)
    region = watched.region
    references = [region.share(slot) for slot in watched.fill(size)]
    assert region.path is not None
    with OverflowReader(region.path) as reader:
        for reference in references:
            assert reader.read(reference)[::4096] == blob(size)[::4096]
        watched.look()
        for reference in references:
            assert reader.read_bytes(reference) == blob(size)
        watched.look()
        for reference in references:
            with reader.lease(reference) as view:
                assert view[::4096] == blob(size)[::4096]
            del view
        watched.look()
    assert watched.peak <= MOST


@pytest.mark.parametrize("size", [64 * KIB, 128 * KIB])
@pytest.mark.parametrize("before", [MIB, 2 * MIB])
def test_a_reader_where_larger_values_were(watch: Watch, size: int, before: int) -> None:
    """Their folios stay when they go, and a fault maps all of one."""
    watched = watch(None)
    region = watched.region
    for slot in watched.fill(before):
        region.free(slot)
    references = [region.share(slot) for slot in watched.fill(size)]
    assert region.path is not None
    with OverflowReader(region.path) as reader:
        for reference in references:
            with reader.lease(reference) as view:
                assert view[::4096] == blob(size)[::4096]
            del view
        watched.look()
    assert watched.peak <= MOST


@at_each_limit
def test_values_of_all_sizes(watch: Watch, limit: int | None) -> None:
    watched = watch(limit)
    region = watched.region
    rng = random.Random(1)
    live: dict[int, bytes] = {}
    stored = 0
    while stored < 2 * STORED:
        size = rng.choice([64 * KIB, 100_000, 300_000, MIB, 2 * MIB, 3 * MIB, 4 * MIB + 5])
        data = blob(size, rng.randrange(100))
        live[region.write(data, 0)] = data
        stored += size
        while sum(map(len, live.values())) > STORED // 2:
            slot = rng.choice(list(live))
            assert region.read(slot) == live.pop(slot)
            region.free(slot)
        if rng.random() < 0.02:
            region.compact(8 * MIB)
            region.trim()
    assert watched.look() <= MOST
    assert all(region.read(slot) == data for slot, data in live.items())


@at_each_limit
@pytest.mark.parametrize("small", [100, 5000, 60_000])
@pytest.mark.parametrize("large", [64 * KIB, 300_000])
def test_small_values_among_large_ones(watch: Watch, limit: int | None, small: int, large: int) -> None:
    # A fault maps all of a folio: to store or look at a small value maps its large neighbours.
    watched = watch(limit)
    region = watched.region
    count = STORED // (small + large)
    pairs = [(region.write(blob(small), 0), region.write(blob(large), 0)) for _ in range(count)]
    assert watched.look() <= MOST
    for number in range(0, count, 2):
        region.free(pairs[number][0])
        pairs[number] = region.write(blob(small, 1), 0), pairs[number][1]
    assert watched.look() <= MOST
    views = [region.read(one) for one, _ in pairs]
    assert all(view == blob(small, 1 - number % 2) for number, view in enumerate(views))
    del views
    assert watched.look() <= MOST
    assert all(region.read_bytes(one)[::4096] == blob(small, 1 - n % 2)[::4096] for n, (one, _) in enumerate(pairs))
    assert watched.look() <= MOST
    for _ in range(2):
        filled = []
        for _ in range(20):
            slot, view = region.allocate(small, 0)
            view[:] = blob(small)
            del view
            filled.append(slot)
        region.free_many(filled)
    region.free_many([slot for pair in pairs[::3] for slot in pair])
    region.compact()
    assert watched.look() <= MOST
    region.free_many([one for number, (_, one) in enumerate(pairs) if number % 3])  # only the small are left
    assert all(region.read(one)[:100] == blob(small, 1 - n % 2)[:100] for n, (one, _) in enumerate(pairs) if n % 3)


def test_views_keep_their_pages_while_they_live(watch: Watch) -> None:
    watched = watch(None)
    region = watched.region
    slots = watched.fill(MIB)
    kept = [slot for number, slot in enumerate(slots) if number % 8 < 2]  # two are in the same 2 MiB
    views = [region.read(slot) for slot in kept]
    assert all(view == blob(MIB) for view in views)
    least = len(views) * MIB
    assert watched.look() >= least
    for slot in slots:
        assert slot in kept or region.read(slot)[::4096] == blob(MIB)[::4096]
    region.free_many(slots)
    region.compact()
    assert watched.look() >= least
    assert all(view == blob(MIB) for view in views)
    del views
    assert watched.look() <= MOST


@at_each_limit
def test_keep_mapped_keeps_what_was_viewed(watch: Watch, limit: int | None) -> None:
    watched = watch(limit, keep_mapped=True)
    region = watched.region
    slots = [region.write(blob(MIB), 0) for _ in range(3)]
    for _ in range(3):
        assert all(region.read(slot) == blob(MIB) for slot in slots)
    assert watched.look() >= 3 * MIB
    region.evict()
    assert watched.look() <= MIB
    assert all(region.read(slot) == blob(MIB) for slot in slots)


@at_each_limit
@pytest.mark.parametrize("size", [64 * KIB, 256 * KIB - 1, 256 * KIB])
def test_keep_mapped_stores_medium_values_through_the_mapping(watch: Watch, limit: int | None, size: int) -> None:
    watched = watch(limit, keep_mapped=True, alignment=4096)
    region = watched.region
    slots = [region.write(blob(size, number), 0) for number in range(8)]
    stored = watched.look()
    assert stored >= 8 * size if size < 256 * KIB else stored == 0
    for _ in range(2):
        for number, slot in enumerate(slots):
            region.free(slot)
            slots[number] = region.write(blob(size, number + 1), 0)
        region.evict()  # the second time, into space that is not in RAM
    assert all(region.read_bytes(slot) == blob(size, number + 1) for number, slot in enumerate(slots))
    region.evict()
    room = bytearray(8 * size)
    region.read_many_into(slots, room)
    assert room == b"".join(blob(size, number + 1) for number in range(8))
    assert all(region.read(slot) == blob(size, number + 1) for number, slot in enumerate(slots))


@pytest.mark.parametrize("keep", [False, True])
def test_keep_mapped_of_a_temporary_region(tmp_path: Path, mapped_of_deleted: Mapped, keep: bool) -> None:
    with OverflowRegion.temporary(tmp_path, keep_mapped=keep) as region:
        before = mapped_of_deleted()
        assert region.read(region.write(blob(MIB), 0)) == blob(MIB)
        assert (mapped_of_deleted() - before >= MIB) == keep


@pytest.fixture
def mapped_of_deleted() -> Mapped:
    """How many bytes of unnamed files are in this process's RSS."""

    def measure() -> int:
        total, ours = 0, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if "-" in line.split()[0]:
                ours = line.endswith("(deleted)")
            elif ours and line.startswith("Rss:"):
                total += int(line.split()[1]) * KIB
        return total

    return measure
