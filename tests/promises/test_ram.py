"""What stays in RAM: eviction, write-back, the limit and its background writer, RSS, and a disk that fails."""

from __future__ import annotations

import ctypes
import gc
import itertools
import mmap
import os
import random
import resource
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit import Check, Mount, RunPython, StartPython, blob, system
from nodedb_mem import InvalidSlotError, OverflowRegion, RegionIOError
from nodedb_mem._core import lib

Open = Callable[..., OverflowRegion]

PAGE = os.sysconf("SC_PAGESIZE")
KIB, MIB = 1 << 10, 1 << 20
GRAIN = 512 * KIB  # no folio is larger,
HUGE = 2 * MIB  # but of large values
LEAST_LIMIT = 4 * MIB  # a smaller limit is taken for this
SLACK = 4 * MIB  # what may lie above the limit while the writer is at work: one kick, and a value

on_disks = pytest.mark.parametrize("kind", ["ext4", system("ext2"), system("btrfs"), system("xfs")])


def numbered(number: int, size: int) -> bytes:
    return (number.to_bytes(4, "little") * (size // 4 + 1))[:size]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A directory that is not in memory."""
    with OverflowRegion.temporary(tmp_path) as probe:
        if lib.ndm_region_in_memory(probe._handle):
            pytest.skip("the tests' directory is in memory")
    return tmp_path


@pytest.fixture
def new(disk: Path, new_region: Open) -> Open:
    """Make regions on a disk; afterwards check the open ones and close them."""
    number = itertools.count()

    def make(directory: Path = disk, **options: Any) -> OverflowRegion:
        options = {"initial_capacity": MIB, "max_capacity": 256 * MIB} | options
        return new_region(directory / f"region{next(number)}", **options)

    return make


def writers() -> int:
    """How many background writers run in this process."""
    count = 0
    for task in os.listdir("/proc/self/task"):
        try:
            count += Path(f"/proc/self/task/{task}/comm").read_text() == "nodedb-writer\n"
        except OSError:
            pass  # it has just ended
    return count


def wait_for_writers(count: int) -> None:
    """Until so many run: a thread takes a moment to get its name, and to leave."""
    deadline = time.monotonic() + 10
    while writers() != count and time.monotonic() < deadline:
        time.sleep(0.001)
    assert writers() == count


def in_ram(region: OverflowRegion, slot: int) -> int:
    """Bytes of the pages of a value that are in the page cache, as another mapping of the file sees it."""
    assert region.path is not None
    facts = region.slot(slot)
    start = facts.offset // PAGE * PAGE
    length = facts.offset + facts.size - start
    vector = (ctypes.c_ubyte * (length // PAGE + 1))()
    libc = ctypes.CDLL(None, use_errno=True)
    with (
        open(region.path, "rb") as file,
        mmap.mmap(file.fileno(), length, mmap.MAP_SHARED, mmap.PROT_READ, offset=start) as mapping,
    ):
        window = np.frombuffer(mapping, np.uint8)
        done = libc.mincore(ctypes.c_void_p(window.ctypes.data), ctypes.c_size_t(length), vector)
        del window
    assert done == 0, os.strerror(ctypes.get_errno())
    return PAGE * sum(page & 1 for page in vector)


# Evicting what is named


@on_disks
@pytest.mark.parametrize("size", [1, 100, 4096, 5000, 64 * KIB, 256 * KIB - 1, 300_000, MIB + 1])
def test_a_named_value_leaves_ram_and_comes_back_equal(mount: Mount, new: Open, kind: str, size: int) -> None:
    region = new(mount(kind, 32), alignment=64, cache_limit=None)
    slots = [region.write(blob(size, number), 0) for number in range(9)]
    assert in_ram(region, slots[4]) >= size
    region.evict([slots[4]])
    assert in_ram(region, slots[4]) == 0
    for number, slot in enumerate(slots):
        assert region.read(slot) == blob(size, number)


def test_named_values_leave_the_rest_alone(new: Open) -> None:
    region = new(cache_limit=None)
    slots = [region.write(blob(MIB, number), 0) for number in range(8)]
    region.evict(slots[:4])
    assert all(in_ram(region, slot) == 0 for slot in slots[:3])
    assert all(in_ram(region, slot) == MIB for slot in slots[5:])
    assert region.stats().resident_bytes <= 4 * MIB
    region.evict(slot for slot in slots)  # any iterable, dropped or not
    assert region.stats().resident_bytes == 0
    assert all(region.read(slot) == blob(MIB, number) for number, slot in enumerate(slots))


@pytest.mark.parametrize("size", [100, 5000, 70_000, MIB])
def test_a_pinned_value_that_is_named_leaves_too_and_its_view_stays_right(new: Open, size: int) -> None:
    region = new(cache_limit=None)
    slots = [region.write(blob(size, number), 0) for number in range(6)]
    views = [region.read(slot) for slot in slots]
    assert all(view == blob(size, number) for number, view in enumerate(views))
    region.evict(slots)
    assert region.stats().resident_bytes == 0
    assert all(view == blob(size, number) for number, view in enumerate(views))


def test_empty_values_and_duplicates_may_be_named(new: Open) -> None:
    region = new(cache_limit=None)
    empty, full = region.write(b"", 0), region.write(blob(MIB), 0)
    region.evict([empty])
    region.evict([])
    assert region.stats().resident_bytes >= MIB
    region.evict([full, empty, full, np.int64(full)])
    assert region.stats().resident_bytes == 0
    assert region.read(full) == blob(MIB)
    assert region.read(empty) == b""


@pytest.mark.parametrize("bad", ["freed", 3, 99, -1, 1 << 31, 1 << 63, 1 << 70])
def test_a_slot_that_is_none_is_an_error_and_nothing_is_dropped(new: Open, bad: int | str) -> None:
    region = new(cache_limit=None)
    slots = [region.write(blob(MIB, number), 0) for number in range(3)]
    if bad == "freed":
        bad = slots.pop()
        region.free(bad)
    before = region.stats().resident_bytes
    for wanted in ([bad], [*slots, bad], [bad, *slots]):
        with pytest.raises(InvalidSlotError) as caught:
            region.evict(wanted)  # type: ignore[arg-type]
        assert str(bad) in str(caught.value)
        assert region.stats().resident_bytes == before
        assert all(in_ram(region, slot) == MIB for slot in slots)


@pytest.mark.parametrize("bad", [5, 1.5, [1.5], ["0"], [None], "0"])
def test_what_is_no_collection_of_slots_is_a_type_error(new: Open, bad: Any) -> None:
    region = new(cache_limit=None)
    region.write(blob(MIB), 0)
    with pytest.raises(TypeError):
        region.evict(bad)
    assert region.stats().resident_bytes >= MIB


# Evicting everything


@on_disks
@pytest.mark.parametrize("size", [100, 5000, 100_000, MIB])
def test_everything_leaves_ram_and_comes_back_equal(mount: Mount, new: Open, kind: str, size: int) -> None:
    region = new(mount(kind, 32), alignment=1, cache_limit=None)
    expected = {}
    for number in range(min(4000, 6 * MIB // size)):
        expected[region.write(numbered(number, size), 0)] = numbered(number, size)
    for _ in range(2):
        region.evict()
        assert region.stats().resident_bytes == 0
        assert region.stats().unwritten_bytes == 0
        assert all(region.read(slot) == value for slot, value in expected.items())
    region.evict()
    for slot in list(expected)[::2]:  # space that was dropped is written to, and dropped again
        region.free(slot)
        del expected[slot]
    for number in range(len(expected)):
        expected[region.write(numbered(number + 7, size), 0)] = numbered(number + 7, size)
    region.evict()
    assert region.stats().resident_bytes == 0
    assert all(region.read(slot) == value for slot, value in expected.items())


@on_disks
@pytest.mark.parametrize("size", [5000, 100_000, MIB])
def test_pinned_values_stay_and_the_rest_leaves(mount: Mount, new: Open, kind: str, size: int) -> None:
    region = new(mount(kind, 32), cache_limit=None)
    slots = [region.write(numbered(number, size), 0) for number in range(12 * MIB // size)]
    pinned = slots[:: max(1, len(slots) // 3)]
    views = {slot: region.read(slot) for slot in pinned}
    assert all(view == numbered(slots.index(slot), size) for slot, view in views.items())
    region.evict()
    assert all(in_ram(region, slot) >= size for slot in pinned)
    folio = HUGE if size >= MIB else GRAIN  # no folio reaches beyond it
    folios = {
        number
        for facts in map(region.slot, pinned)
        for number in range(facts.offset // folio, (facts.offset + facts.size - 1) // folio + 1)
    }
    assert region.stats().resident_bytes <= len(folios) * folio
    assert all(view == numbered(slots.index(slot), size) for slot, view in views.items())
    assert all(region.read(slot) == numbered(number, size) for number, slot in enumerate(slots))
    views.clear()
    region.evict()
    assert region.stats().resident_bytes == 0


def test_a_view_of_a_freed_value_keeps_its_bytes_through_evictions(new: Open) -> None:
    region = new(cache_limit=0)
    slots = [region.write(blob(MIB, number), 0) for number in range(10)]
    view = region.read(slots[4])
    region.free(slots[4])
    for number in range(30):
        region.write(blob(MIB, 100 + number), 0)
        region.evict()
    assert view == blob(MIB, 4)


def test_a_mapping_that_views_keep_does_not_keep_pages(new: Open) -> None:
    # The file outgrows its reservation while a view lives: the old mapping stays for the view, its pages need not.
    region = new(initial_capacity=2 * MIB, max_capacity=2 * MIB, cache_limit=None)
    slots = [region.write(numbered(number, 5000), 0) for number in range(400)]
    view = region.read(slots[0])
    assert view == numbered(0, 5000)
    region.max_capacity = 64 * MIB
    more = [region.write(blob(MIB, number), 0) for number in range(8)]
    assert view == numbered(0, 5000)
    region.evict()
    assert region.stats().resident_bytes <= GRAIN
    assert view == numbered(0, 5000)
    assert all(region.read(slot) == numbered(number, 5000) for number, slot in enumerate(slots))
    assert all(region.read(slot) == blob(MIB, number) for number, slot in enumerate(more))


# Flush


@pytest.mark.parametrize("limit", [None, 0])
def test_flush_writes_back_and_drops_nothing(new: Open, limit: int | None) -> None:
    region = new(cache_limit=limit)
    slots = [region.write(numbered(number, 5000), 0) for number in range(200)]
    slots += [region.write(blob(MIB, number), 0) for number in range(2)]
    before = region.stats()
    region.flush()
    after = region.stats()
    assert after.unwritten_bytes == 0
    assert after.resident_bytes == before.resident_bytes >= 2 * MIB
    assert region.read(slots[-1]) == blob(MIB, 1)
    region.flush()


def test_flush_and_evict_of_an_empty_region_do_nothing(new: Open) -> None:
    region = new()
    region.flush()
    region.evict()
    region.evict([])
    assert region.stats().resident_bytes == 0


# The limit


@pytest.mark.parametrize("limit", [-1, -(1 << 70)])
def test_a_negative_limit_is_a_value_error(disk: Path, limit: int) -> None:
    with pytest.raises(ValueError, match="cache_limit"):
        OverflowRegion.open(disk / "region", cache_limit=limit)
    with pytest.raises(ValueError, match="cache_limit"):
        OverflowRegion.temporary(disk, cache_limit=limit)
    assert not (disk / "region").exists()


@pytest.mark.parametrize("limit", ["1 MiB", 1.5, b"1", object()])
def test_a_limit_of_the_wrong_type_is_a_type_error(disk: Path, limit: Any) -> None:
    with pytest.raises(TypeError):
        OverflowRegion.open(disk / "region", cache_limit=limit)
    assert not (disk / "region").exists()


@pytest.mark.parametrize("limit", [0, 1, 4095, 6 * MIB, np.int64(8 * MIB), 1 << 63, 1 << 64, 1 << 80, None])
def test_any_limit_keeps_every_value(new: Open, limit: int | None) -> None:
    region = new(cache_limit=limit)
    slots = [region.write(blob(300_000 + number, number), 0) for number in range(80)]
    assert all(region.read(slot) == blob(300_000 + number, number) for number, slot in enumerate(slots))


@on_disks
@pytest.mark.parametrize("size", [2000, 5000, 70_000, MIB, 3 * MIB])
def test_what_is_over_the_limit_leaves_ram(mount: Mount, new: Open, kind: str, size: int) -> None:
    region = new(mount(kind, 256), cache_limit=0)  # btrfs wants room for what it copies
    count = 24 * MIB // size
    most = LEAST_LIMIT + SLACK + size
    slots, peak = [], 0
    for number in range(count):
        slots.append(region.write(numbered(number, size), 0))
        if number % max(1, MIB // size) == 0:
            peak = max(peak, region.stats().resident_bytes)
    assert peak <= most
    assert region.stats().written_back_bytes >= 12 * MIB
    peak = 0
    for number, slot in enumerate(slots):  # reading brings values back, within the limit
        assert region.read(slot) == numbered(number, size)
        if number % max(1, MIB // size) == 0:
            peak = max(peak, region.stats().resident_bytes)
    assert peak <= most
    rng = random.Random(size)
    for number in rng.sample(range(count), min(count, 1000)):
        assert region.read_bytes(slots[number]) == numbered(number, size)
    assert region.stats().resident_bytes <= most


def test_a_value_larger_than_the_limit_leaves_ram_at_once(new: Open) -> None:
    region = new(cache_limit=0)
    data = blob(32 * MIB)
    slot = region.write(data, 0)
    assert region.stats().resident_bytes <= LEAST_LIMIT + SLACK
    assert region.read(slot) == data


def test_without_a_limit_everything_stays_and_no_thread_runs(new: Open) -> None:
    region = new(cache_limit=None)
    for number in range(40):
        region.write(blob(MIB, number), 0)
    assert writers() == 0
    assert region.stats().resident_bytes >= 40 * MIB
    assert region.stats().written_back_bytes == 0


def test_the_thread_starts_when_the_limit_is_near_and_ends_at_close(new: Open) -> None:
    region = new(cache_limit=32 * MIB)
    region.write(bytes(8 * MIB), 0)
    assert writers() == 0
    region.write(bytes(16 * MIB), 0)
    wait_for_writers(1)
    region.write(bytes(64 * MIB), 0)
    wait_for_writers(1)
    region.close()
    wait_for_writers(0)


def test_each_region_has_a_limit_and_a_thread_of_its_own(new: Open) -> None:
    one, two = new(cache_limit=0), new(cache_limit=0)
    first = [one.write(blob(MIB, number), 0) for number in range(12)]
    second = [two.write(blob(MIB, 100 + number), 0) for number in range(12)]
    wait_for_writers(2)
    one.close()
    second += [two.write(blob(MIB, 112 + number), 0) for number in range(12)]
    assert all(two.read(slot) == blob(MIB, 100 + number) for number, slot in enumerate(second))
    assert len(first) == 12
    two.close()
    wait_for_writers(0)


@pytest.mark.parametrize("mib", [1, 16, 64])
def test_a_cold_value_is_fetched_whole(new: Open, mib: int) -> None:
    # One request to the kernel fetches only what the device takes at once; the rest would be read page by page.
    region = new(cache_limit=None)
    slot = region.write(blob(mib * MIB), 0)
    region.evict([slot])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    assert region.read(slot) == blob(mib * MIB)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_majflt - before < mib * MIB // PAGE // 16


# RSS: of what is viewed; for what is stored, see test_rss.py


@pytest.mark.parametrize("limit", [None, 1 << 50])
@pytest.mark.parametrize("size", [64 * KIB, 70_000, MIB])
def test_the_pages_of_a_large_value_leave_rss_with_its_last_view(
    new: Open, mapped_kib: Callable[[Path | str], int], size: int, limit: int | None
) -> None:
    region = new(alignment=4096, cache_limit=limit)
    assert region.path is not None
    slot = region.write(blob(size), 0)
    view = region.read(slot)
    part = region.read(slot)[100:]
    assert np.frombuffer(view, np.uint8).sum() == sum(blob(size))
    full = mapped_kib(region.path)
    assert full >= size // KIB
    del view
    assert mapped_kib(region.path) == full  # one is left
    del part
    assert mapped_kib(region.path) <= full - size // PAGE * PAGE // KIB
    assert region.read(slot) == blob(size)


@pytest.mark.parametrize("limit", [None, 1 << 50])
def test_spilling_and_reading_back_leaves_rss_as_it_was(
    new: Open, mapped_kib: Callable[[Path | str], int], limit: int | None
) -> None:
    region = new(cache_limit=limit)
    assert region.path is not None
    data = blob(MIB)
    slots = [region.write(data, 0) for _ in range(32)]
    assert mapped_kib(region.path) <= 64
    assert all(region.read(slot) == data for slot in slots)
    assert mapped_kib(region.path) <= 64


# tmpfs


def test_tmpfs_warns_once_and_names_the_path(mount: Mount) -> None:
    directory = mount("tmpfs", 16)
    for where, open_one in (
        (directory / "region", lambda: OverflowRegion.open(directory / "region", cache_limit=0)),
        (directory / "region", lambda: OverflowRegion(directory / "region")),
        (directory, lambda: OverflowRegion.temporary(directory)),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with open_one() as region:
                slots = [region.write(blob(300_000, number), 0) for number in range(20)]
                region.evict(slots[:3])
                region.evict()
                region.flush()
                assert all(region.read(slot) == blob(300_000, number) for number, slot in enumerate(slots))
                assert region.stats().resident_bytes >= 20 * 300_000
                assert writers() == 0
        assert [warning.category for warning in caught] == [ResourceWarning]
        assert str(where) in str(caught[0].message)
        assert caught[0].filename == __file__


def test_tmpfs_leaves_nothing_open_where_the_warning_is_an_error(
    mount: Mount, footprint: Callable[[Path | str], tuple[int, int]]
) -> None:
    directory = mount("tmpfs", 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ResourceWarning, match="region"):
            OverflowRegion.open(directory / "region")
        with pytest.raises(ResourceWarning):
            OverflowRegion.temporary(directory)
    assert footprint(directory) == (0, 0)
    with OverflowRegion.open(directory / "region") as region:  # and it is not locked
        assert region.read(region.write(b"works", 0)) == b"works"


def test_a_disk_does_not_warn(disk: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OverflowRegion.open(disk / "region").close()


# Fork, close, collection and exit while the writer runs


def busy(region: OverflowRegion, count: int = 24) -> dict[int, bytes]:
    """Give the background writer of a region with the least limit work that outlasts the call."""
    values = {}
    for number in range(count):
        values[region.write(blob(MIB, number), 0)] = blob(MIB, number)
    return values


def wait_for(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("raw", [False, True])
def test_fork_while_the_writer_runs(new: Open, raw: bool) -> None:
    if raw and os.uname().machine != "x86_64":
        pytest.skip("system call number known for x86-64 only")
    region = new(cache_limit=0)
    values = busy(region)
    views = {slot: region.read(slot) for slot in list(values)[:8]}
    libc = ctypes.CDLL(None)
    for round_ in range(4):
        slot = region.write(blob(MIB, 900 + round_), 0)
        values[slot] = blob(MIB, 900 + round_)
        pid = libc.syscall(57) if raw else os.fork()
        if pid == 0:
            code = 1
            try:
                assert writers() == 0
                assert all(view == values[slot] for slot, view in views.items())
                views.clear()
                code = 0
            finally:
                os._exit(code)
        assert wait_for(pid) == 0
        values.update(busy(region, 6))
    assert all(region.read(slot) == value for slot, value in values.items())


def test_a_child_reads_on_while_its_parent_spills_and_ends(run_python: RunPython, disk: Path) -> None:
    script = """
    import os, sys, warnings
    from nodedb_mem import OverflowRegion, WrongThreadError
    warnings.simplefilter("ignore")  # of Python 3.12: the writer's thread is no danger to a fork
    region = OverflowRegion.open(sys.argv[1], cache_limit=0)
    data = [bytes([number]) * (1 << 20) for number in range(24)]
    slots = [region.write(value, 0) for value in data]
    views = [region.read(slot) for slot in slots[:6]]
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write_end)
        for _ in range(3):
            assert all(view == value for view, value in zip(views, data))
        os.read(read_end, 1)  # the parent has closed its region
        assert all(view == value for view, value in zip(views, data))
        try:
            region.write(b"", 0)
        except WrongThreadError:
            pass
        else:
            raise AssertionError
        sys.exit(0)  # with its finalizers
    os.close(read_end)
    more = [region.write(value, 0) for value in data]
    assert all(region.read(slot) == value for slot, value in zip(more, data))
    region.close()
    os.close(write_end)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    print("done")
    """
    assert run_python(script, disk / "region") == "done\n"


@pytest.mark.parametrize("with_view", [False, True])
def test_close_while_the_writer_runs(new: Open, with_view: bool) -> None:
    for _ in range(5):
        region = new(cache_limit=0)
        values = busy(region, 12)
        slot = next(iter(values))
        view = region.read(slot) if with_view else None
        region.close()
        wait_for_writers(0)
        assert view is None or view == values[slot]
        assert region.path is not None
        del view
        os.unlink(region.path)


def test_collection_while_the_writer_runs(disk: Path) -> None:
    for _ in range(5):
        region = OverflowRegion.temporary(disk, cache_limit=0)
        values = busy(region, 12)
        slot = next(iter(values))
        view = region.read(slot)
        del region
        gc.collect()
        wait_for_writers(0)
        assert view == values[slot]
        del view


def test_collection_on_another_thread_while_the_writer_runs(disk: Path) -> None:
    box = [OverflowRegion.temporary(disk, cache_limit=0)]
    busy(box[0], 12)

    def drop() -> None:
        box.clear()
        gc.collect()

    thread = threading.Thread(target=drop)
    thread.start()
    thread.join()
    wait_for_writers(0)


EXITS = {
    "end": "",
    "sys.exit": "sys.exit(0)",
    "os._exit": "sys.stdout.flush(); os._exit(0)",
    "exec": "sys.stdout.flush(); os.execv('/bin/true', ['true'])",
    "view at exit": "kept = region.read(slots[0]); import atexit; atexit.register(lambda: kept[0])",
    "cycle": "region = [region]; region.append(region); del region",
    "thread": (
        "import threading\n"
        "def own():\n"
        "    local = OverflowRegion.temporary(sys.argv[1], cache_limit=0)\n"
        "    for _ in range(12): local.write(bytes(1 << 20), 0)\n"
        "    threading.current_thread().local = local\n"
        "thread = threading.Thread(target=own); thread.start(); thread.join()\n"
    ),
}


@pytest.mark.parametrize("way", EXITS)
def test_exit_while_the_writer_runs(run_python: RunPython, disk: Path, way: str) -> None:
    script = (
        "import os, sys\n"
        "from nodedb_mem import OverflowRegion\n"
        "region = OverflowRegion.open(sys.argv[1] + '/region', cache_limit=0)\n"
        "slots = [region.write(bytes([number]) * (1 << 20), 0) for number in range(48)]\n"
        "print('spilled')\n" + EXITS[way]
    )
    assert run_python(script, disk, timeout=60) == "spilled\n"
    with OverflowRegion.open(disk / "region") as region:  # nobody holds it
        assert region.read(region.write(b"works", 0)) == b"works"


def test_kill_while_the_writer_runs(start_python: StartPython, disk: Path) -> None:
    script = """
    import sys
    from nodedb_mem import OverflowRegion
    named = OverflowRegion.open(sys.argv[1] + "/region", cache_limit=0)
    hidden = OverflowRegion.temporary(sys.argv[1], cache_limit=0)
    while True:
        for region in (named, hidden):
            slots = [region.write(bytes(1 << 20), 0) for _ in range(24)]
            for slot in slots:
                region.free(slot)
        print("spilling", flush=True)
    """
    before = set(os.listdir(disk))
    process = start_python(script, disk)
    assert process.stdout is not None
    assert process.stdout.readline() == "spilling\n"
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert set(os.listdir(disk)) - before == {"region", "region.slots"}
    with OverflowRegion.open(disk / "region", cache_limit=0) as region:
        assert len(region) == 0
        values = busy(region, 12)
        assert all(region.read(slot) == value for slot, value in values.items())


def test_a_signal_does_not_reach_the_writer(run_python: RunPython, disk: Path) -> None:
    script = """
    import os, signal, sys, threading
    from nodedb_mem import OverflowRegion
    seen = []
    signal.signal(signal.SIGALRM, lambda *_: seen.append(threading.current_thread() is threading.main_thread()))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    region = OverflowRegion.open(sys.argv[1], cache_limit=0)
    values = {region.write(bytes([number]) * (1 << 20), 0): bytes([number]) * (1 << 20) for number in range(96)}
    region.flush()
    region.evict()
    assert all(region.read(slot) == value for slot, value in values.items())
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert seen and all(seen)
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/status") as status:
            fields = dict(line.rstrip("\\n").split(":\\t", 1) for line in status)
        if fields["Name"] == "nodedb-writer":
            assert int(fields["SigBlk"], 16) >> (signal.SIGALRM - 1) & 1
            print("blocked")
    """
    assert run_python(script, disk / "region") == "blocked\n"


# Growth, trim and compaction while the writer runs


@pytest.mark.parametrize("with_views", [False, True])
def test_growth_past_the_reservation_while_the_writer_runs(new: Open, check: Check, with_views: bool) -> None:
    region = new(initial_capacity=MIB, max_capacity=2 * MIB, cache_limit=0)
    values, views = {}, []
    for number in range(120):
        size = [1000, 70_000, 600_000, MIB + 1][number % 4]
        if region.used_bytes + size > region.max_capacity:
            region.max_capacity *= 2
        slot = region.write(blob(size, number), 0)
        values[slot] = blob(size, number)
        if with_views:
            views.append((region.read(slot), values[slot]))
    wait_for_writers(1)
    check(region)
    assert all(view == value for view, value in views)
    assert all(region.read(slot) == value for slot, value in values.items())


def test_trim_and_compact_while_the_writer_runs(new: Open, check: Check) -> None:
    rng = random.Random(4)
    region = new(cache_limit=0)
    values: dict[int, bytes] = {}
    for round_ in range(12):
        for number in range(40):
            size = rng.choice([100, 5000, 70_000, 300_000, GRAIN + 1, MIB])
            values[region.write(blob(size, 100 * round_ + number), 0)] = blob(size, 100 * round_ + number)
        for slot in rng.sample(list(values), len(values) // 2):
            region.free(slot)
            del values[slot]
        if round_ % 3:
            region.trim()
        if round_ % 2:
            region.compact(rng.randrange(1, 16 * MIB))
        check(region)
        assert all(region.read(slot) == value for slot, value in values.items())
    wait_for_writers(1)
    for slot in values:
        region.free(slot)
    region.trim()
    assert region.used_bytes == 0
    slot = region.write(blob(MIB), 0)
    assert region.read(slot) == blob(MIB)


# A disk that fails


class FailingDisk:
    """A file system whose device runs out of store: what it takes, it cannot write."""

    def __init__(self, mount: Mount, path: Path, kind: str) -> None:
        self._store = mount("tmpfs", 96)
        self.path = path
        path.mkdir()
        image = self._store / "image"
        with open(image, "wb") as file:
            file.truncate(64 * MIB)
        options = ["-O", "^has_journal", "-E", "lazy_itable_init=0"] if kind == "ext4" else []
        try:
            subprocess.run([f"mkfs.{kind}", "-q", "-F", *options, str(image)], check=True, capture_output=True)
            subprocess.run(["mount", "-o", "loop", str(image), str(self.path)], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no loop device: {error}")

    def sync(self) -> None:
        fd = os.open(self.path, os.O_RDONLY)
        ctypes.CDLL(None).syncfs(fd)
        os.close(fd)

    def fail(self) -> None:
        self.sync()
        with open(self._store / "filler", "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(PAGE))
            except OSError:
                pass

    def heal(self) -> None:
        (self._store / "filler").unlink(missing_ok=True)

    def open(self, **options: Any) -> OverflowRegion:
        return OverflowRegion.open(self.path / "region", initial_capacity=40 * MIB, max_capacity=40 * MIB, **options)

    def unmount(self) -> None:
        self.heal()
        self.sync()
        subprocess.run(["umount", str(self.path)], check=True, capture_output=True)


@pytest.fixture(params=["ext2", "ext4"])
def failing_disk(request: pytest.FixtureRequest, mount: Mount, tmp_path: Path) -> Iterator[FailingDisk]:
    made = FailingDisk(mount, tmp_path / "failing", request.param)
    yield made
    gc.collect()
    made.unmount()


def flush_until_well(region: OverflowRegion) -> None:
    for _ in range(5):  # failures from before may still be reported
        try:
            region.flush()
        except RegionIOError:
            continue
        return
    region.flush()


@pytest.mark.parametrize("size", [5000, MIB])
def test_values_survive_a_disk_that_fails_for_a_while(failing_disk: FailingDisk, size: int) -> None:
    # The kernel takes pages that it could not write for clean ones: they must not be dropped, but written again. (One
    # that writes back by itself within the second, and reclaims all the time, can still win: see rescue.c.)
    with failing_disk.open(cache_limit=None) as region:
        values = {region.write(numbered(number, size), 0): numbered(number, size) for number in range(4 * MIB // size)}
        region.flush()
        failing_disk.fail()
        for number in range(8 * MIB // size):
            values[region.write(numbered(number + 9, size), 0)] = numbered(number + 9, size)
        for verb in (region.flush, region.evict, lambda: region.evict(list(values)[-9:]), region.flush):
            with pytest.raises(RegionIOError) as caught:
                verb()
            assert caught.value.filename == region.path
            assert region.read(next(reversed(values))) == values[next(reversed(values))]
        failing_disk.heal()
        flush_until_well(region)
        region.evict()
        assert region.stats().resident_bytes == 0
        assert all(region.read(slot) == value for slot, value in values.items())
        slot = region.write(blob(MIB), 0)
        region.evict()
        assert region.read(slot) == blob(MIB)


class Reclaim(threading.Thread):
    """A kernel in want of memory: drops every clean page of a file that it gets hold of."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path
        self._end = threading.Event()

    def run(self) -> None:
        pageout = 21  # MADV_PAGEOUT; what is dirty stays
        with open(self._path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
            while not self._end.is_set():
                for start in range(0, 12 * MIB, GRAIN):
                    window = np.frombuffer(mapping, np.uint8, GRAIN, start)[::PAGE]
                    window.sum()  # only mapped pages are dropped
                    del window
                    mapping.madvise(pageout, start, GRAIN)

    def end(self) -> None:
        self._end.set()
        self.join()


@pytest.mark.parametrize("size", [5000, MIB])
def test_what_was_not_written_is_kept_from_being_dropped(failing_disk: FailingDisk, size: int) -> None:
    # Once a failure is known, no page may be clean, and so in reach of the kernel, before it is found on disk.
    with failing_disk.open(cache_limit=None) as region:
        failing_disk.fail()
        values = {region.write(numbered(number, size), 0): numbered(number, size) for number in range(12 * MIB // size)}
        with pytest.raises(RegionIOError):
            region.flush()
        assert region.path is not None
        reclaim = Reclaim(os.fspath(region.path))
        reclaim.start()
        try:
            for verb in (region.flush, region.evict, lambda: region.evict(list(values)[-9:]), region.flush):
                with pytest.raises(RegionIOError):
                    verb()
        finally:
            reclaim.end()
        failing_disk.heal()
        flush_until_well(region)
        region.evict()
        assert all(region.read(slot) == value for slot, value in values.items())


@pytest.mark.parametrize("size", [5000, MIB])
def test_the_writers_error_is_the_owners_next_error(failing_disk: FailingDisk, size: int) -> None:
    region = failing_disk.open(cache_limit=0)
    values = {region.write(numbered(number, size), 0): numbered(number, size) for number in range(8 * MIB // size)}
    region.flush()
    failing_disk.fail()
    with pytest.raises(RegionIOError, match=r"writ(e|ing).* back to disk") as caught:
        for number in range(32 * MIB // size):
            values[region.write(numbered(number + 9, size), 0)] = numbered(number + 9, size)
    assert caught.value.errno in (5, 28)
    assert caught.value.filename == region.path
    failing_disk.heal()
    flush_until_well(region)
    region.evict()
    assert all(region.read(slot) == value for slot, value in values.items())
    more = {region.write(numbered(number, size), 0): numbered(number, size) for number in range(12 * MIB // size)}
    assert all(region.read(slot) == value for slot, value in more.items())
    assert all(region.read(slot) == value for slot, value in values.items())
    assert region.stats().resident_bytes <= LEAST_LIMIT + SLACK  # it is counted again
    assert lib.ndm_region_check(region._handle) == 0
    region.close()


def test_looking_at_a_region_does_not_take_its_writers_error(failing_disk: FailingDisk) -> None:
    with failing_disk.open(cache_limit=0) as region:
        failing_disk.fail()
        data = blob(16 * MIB)
        slot = region.write(data, 0)  # waits for the writer, and so until that has failed
        failing_disk.heal()
        for _ in range(2):
            assert repr(region).endswith(f"region: 1 slots, {len(data)} of {40 * MIB} bytes>")
            assert region.stats().live_slots == 1
        with pytest.raises(RegionIOError, match="writing spilled values back to disk failed"):
            region.read(slot)
        flush_until_well(region)
        region.evict()
        assert region.read(slot) == data


def test_a_region_closes_though_its_disk_fails(failing_disk: FailingDisk) -> None:
    region = failing_disk.open(cache_limit=0)
    region.write(bytes(MIB), 0)
    region.flush()
    failing_disk.fail()
    with pytest.raises(RegionIOError):
        for _ in range(30):
            region.write(blob(MIB), 0)
    try:
        region.write(blob(MIB), 0)  # sets the writer to work again
    except RegionIOError:
        pass
    time.sleep(0.5)  # it fails again, most likely; then close() tells
    try:
        region.close()
    except RegionIOError as error:
        assert error.filename == region.path
    assert region.closed
    wait_for_writers(0)
    region.close()
    failing_disk.heal()
    with OverflowRegion.open(failing_disk.path / "region") as again:
        assert again.read(again.write(b"works", 0)) == b"works"
