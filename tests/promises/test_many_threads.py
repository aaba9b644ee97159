"""A region that all threads of its process own (`ownership="process"`)."""

from __future__ import annotations

import gc
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kit import VERBS, Check, Mount, NewRegion, RunToEnd, blob, in_thread, raw_fork
from nodedb_mem import (
    CapacityExceededError,
    EngineId,
    InvalidSlotError,
    OverflowReader,
    OverflowRegion,
    RegionClosedError,
    WrongThreadError,
)

MIB = 1 << 20
PAGE = os.sysconf("SC_PAGE_SIZE")


# Thaws in any case: what waits for a frozen file system cannot be killed, and os.sync() of others may be among it.
_FREEZER = """
import fcntl, os, select, sys
folder = os.open(sys.argv[1], os.O_RDONLY)
fcntl.ioctl(folder, 0xC0045877, 0)  # FIFREEZE of linux/fs.h
try:
    print(flush=True)
    select.select([0], [], [], 20)
finally:
    fcntl.ioctl(folder, 0xC0045878, 0)  # FITHAW
"""


@contextmanager
def frozen(folder: Path) -> Iterator[None]:
    """A file system on which each write waits; for 20 seconds at most."""
    command = [sys.executable, "-S", "-c", _FREEZER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as freezer:
        assert freezer.stdin is not None
        assert freezer.stdout is not None
        assert freezer.stdout.readline()
        yield
        assert freezer.poll() is None
        freezer.stdin.close()


def is_stuck(thread: int) -> bool:
    """Whether a thread waits in the kernel, uninterruptibly. False if it has ended."""
    try:
        state = Path(f"/proc/self/task/{thread}/stat").read_text()
    except FileNotFoundError:
        return False
    return state.rpartition(")")[2].split()[0] == "D"


@contextmanager
def stuck(function: Callable[[], object], disk: Path) -> Iterator[None]:
    """A block in which another thread is inside of `function`, and waits for a disk that does nothing."""
    numbers: list[int] = []
    results: list[object] = []

    def run() -> None:
        numbers.append(threading.get_native_id())
        try:
            results.append(function())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    with frozen(disk):
        thread.start()
        while not numbers or not is_stuck(numbers[0]):
            assert not results, results
            time.sleep(0.001)
        yield
        assert not results
    thread.join()
    assert results
    assert not isinstance(results[0], BaseException), results[0]


# Who may call


def test_every_verb_works_on_every_thread(new_region: NewRegion, check: Check) -> None:
    for name, verb in VERBS.items():
        region = new_region(f"region-{name}", ownership="process")
        slot = in_thread(lambda: region.write(blob(1000), 0))  # noqa: B023
        result = in_thread(lambda: verb(region, slot))  # noqa: B023
        unknown = name.endswith("_unknown")
        assert isinstance(result, InvalidSlotError if unknown else object), (name, result)
        assert unknown or not isinstance(result, BaseException), (name, result)
        check(region)
        del result


def test_what_ownership_may_be(tmp_path: Path) -> None:
    for wrong in ("Process", "", None, 1):
        with pytest.raises(ValueError, match="ownership"):
            OverflowRegion.open(tmp_path / "region", ownership=wrong)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["open", "temporary", "capacity", "config"])
def test_each_way_of_opening_takes_it(tmp_path: Path, kind: str) -> None:
    ways: dict[str, Callable[[], OverflowRegion]] = {
        "open": lambda: OverflowRegion.open(tmp_path / "region", ownership="process"),
        "temporary": lambda: OverflowRegion.temporary(tmp_path, ownership="process"),
        "capacity": lambda: OverflowRegion.open_with_capacity(tmp_path / "region", MIB, ownership="process"),
        "config": lambda: OverflowRegion.open_with_config(tmp_path / "region", MIB, MIB, ownership="process"),
    }
    with ways[kind]() as region:
        slot = in_thread(lambda: region.write(b"value", 0))
        assert region.read(slot) == b"value"


def test_handing_over_does_nothing(new_region: NewRegion) -> None:
    region = new_region(ownership="process")
    region.release_ownership()
    slot = region.write(b"value", 0)
    assert in_thread(region.adopt) is None
    assert region.read(slot) == b"value"
    region.close()
    for verb in (region.adopt, region.release_ownership):
        with pytest.raises(RegionClosedError):
            verb()


@pytest.mark.parametrize("threads", [0, 2])  # a raw clone beside other threads stops in CPython itself
def test_a_child_is_refused_while_threads_are_at_work(new_region: NewRegion, check: Check, threads: int) -> None:
    fork = os.fork if threads else raw_fork
    region = new_region(ownership="process")
    slot = region.write(blob(1000), 0)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            region.free(region.write(blob(100_000), 0))

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for thread in workers:
        thread.start()
    for _ in range(20):
        pid = fork()
        if pid == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(20)
            status = 1
            try:
                for verb in [*VERBS.values(), lambda region, slot: region.close(), lambda region, slot: region.adopt()]:
                    try:
                        verb(region, slot)
                    except WrongThreadError:
                        continue
                    break
                else:
                    with region:
                        status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    stop.set()
    for thread in workers:
        thread.join()
    assert region.read(slot) == blob(1000)
    check(region)


# Many at once


def test_threads_keep_their_values_apart(new_region: NewRegion, check: Check) -> None:
    region = new_region(ownership="process", initial_capacity=MIB, cache_limit=8 * MIB)

    def work(number: int) -> None:
        kept: dict[int, bytes] = {}
        for turn in range(150):
            size = (100, 5000, 200_000)[turn % 3]
            value = blob(size, number * 1000 + turn)
            parts = [value[:50], value[50:]]
            kept[region.write_vectored(parts, EngineId(number)) if turn % 2 else region.write(value, 0)] = value
            slot = list(kept)[turn * 7 % len(kept)]
            assert region.read(slot) == kept[slot]
            assert region.read_bytes(slot) == kept[slot]
            assert region.restore(slot) == kept[slot]
            if turn % 10 == 9:
                slots = list(kept)
                assert region.read_many(slots) == list(kept.values())
                room = bytearray(sum(map(len, kept.values())))
                region.read_many_into(slots, room)
                assert room == b"".join(kept.values())
                region.prefetch(slots)
                region.free_many(slots[::2])
                kept = {slot: kept[slot] for slot in slots[1::2]}
        region.free_many(list(kept))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert len(region) == 0
    check(region)


def test_layouts_belong_to_their_values(new_region: NewRegion) -> None:
    region = new_region(ownership="process")

    def work(number: int) -> None:
        parts = [bytes(10 + number)] * (number + 2)
        for _ in range(500):
            slot = region.write_vectored(parts, 0)
            assert region.parts(slot).sizes == tuple(map(len, parts))
            region.free(slot)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_a_reference_has_the_size_of_its_value(new_region: NewRegion) -> None:
    region = new_region(ownership="process")
    slots = [region.write(b"", 0)]
    stop = threading.Event()

    def change() -> None:
        size = 0
        while not stop.is_set():
            region.free(slots[0])
            size = (size + 8) % 4096
            slots[0] = region.write(bytes(size), 0)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(300):
            try:
                ref = region.share(slots[0])
                with OverflowReader(ref) as reader:
                    assert len(reader.read_bytes(ref)) == ref.size
            except (InvalidSlotError, Exception) as error:
                if type(error).__name__ not in ("InvalidSlotError", "StaleSlotError"):
                    raise
    finally:
        stop.set()
        thread.join()


def test_views_die_on_other_threads(new_region: NewRegion, check: Check) -> None:
    region = new_region(ownership="process")
    views: list[Any] = []
    stop = threading.Event()

    def drop() -> None:
        while not stop.is_set() or views:
            if views:
                views.pop()

    thread = threading.Thread(target=drop)
    thread.start()
    for number in range(2000):
        slot = region.write(blob(70_000 if number % 5 == 0 else 300, number), 0)
        views.append(region.read(slot))
        views.append(region.restore(slot))
        region.free(slot)
    stop.set()
    thread.join()
    gc.collect()
    check(region)
    assert region.stats().pinned_bytes == 0


def test_close_waits_for_those_inside(new_region: NewRegion) -> None:
    for _ in range(20):
        region = new_region(ownership="process", cache_limit=8 * MIB)
        ends: list[type[BaseException]] = []

        def work(region: OverflowRegion = region, ends: list[type[BaseException]] = ends) -> None:
            try:
                while True:
                    slot = region.write(blob(80_000), 0)
                    assert region.read_bytes(slot) == blob(80_000)
                    region.free(slot)
            except BaseException as error:
                ends.append(type(error))

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.01)
        region.close()
        for thread in threads:
            thread.join()
        assert ends == [RegionClosedError] * 3
        os.unlink(str(region.path))
        os.unlink(f"{region.path}.slots")


def test_what_is_refused_leaves_the_others_alone(new_region: NewRegion, check: Check) -> None:
    # Each of them makes the file grow, and gives back what it took when it is refused, while others write behind it.
    region = new_region(ownership="process", initial_capacity=MIB, max_capacity=24 * MIB)
    refused: list[object] = []

    def work(number: int) -> None:
        kept: dict[int, bytes] = {}
        for turn in range(60):
            value = blob(100_000 + 50_000 * (turn % 9), number * 100 + turn)
            try:
                kept[region.write(value, 0)] = value
            except CapacityExceededError as error:
                refused.append(error)
                for slot in list(kept)[::2]:
                    assert region.read(slot) == kept.pop(slot)
                    region.free(slot)
        assert all(region.read(slot) == value for slot, value in kept.items())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert refused
    check(region)


def test_no_thread_waits_for_the_gil_and_the_region_at_once(run_to_end: RunToEnd) -> None:
    # Views that end, finalizers that call the region, and reads that hold the GIL, beside verbs that take long.
    run_to_end(
        """
        import faulthandler, gc, sys, threading, time
        faulthandler.dump_traceback_later(60, exit=True)
        sys.setswitchinterval(1e-5)
        from nodedb_mem import OverflowRegion, InvalidSlotError

        region = OverflowRegion.temporary("/var/tmp", ownership="process", cache_limit=8 << 20)
        end = time.monotonic() + 4

        class Trash:
            def __init__(self, slot):
                self.slot, self.me = slot, self
            def __del__(self):
                region.free(self.slot)
                region.stats()

        def write(size):
            while time.monotonic() < end:
                Trash(region.write(bytes(size), 0))

        def read():
            while time.monotonic() < end:
                for slot in range(region.slot_count):
                    try:
                        region.read(slot)
                        region.restore(slot)
                        region.read_bytes(slot)
                    except InvalidSlotError:
                        pass

        def tend():
            while time.monotonic() < end:
                gc.collect()
                region.evict()
                region.compact(1 << 20)
                region.trim()
                repr(region), len(region), region.handle

        work = [lambda: write(100), lambda: write(300_000), read, read, tend]
        threads = [threading.Thread(target=each) for each in work]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        gc.collect()
        assert len(region) == 0
        """
    )


# A disk that does nothing


def hits(region: OverflowRegion, values: dict[int, bytes]) -> None:
    """All that is there to be done with values in RAM."""
    slots = list(values)
    for slot, value in values.items():
        assert region.read(slot) == value
        assert region.read_bytes(slot) == value
        assert slot in region
        assert region.slot(slot).size == len(value)
    assert region.read_many(slots) == list(values.values())
    region.prefetch(slots)
    assert len(region) >= len(slots)
    assert region.stats().live_slots >= len(slots)


def make_values(region: OverflowRegion) -> dict[int, bytes]:
    return {region.write(blob(size, size), 0): blob(size, size) for size in (10, 1000, 20_000, 100_000, MIB)}


@pytest.mark.parametrize("vectored", [False, True])
def test_hits_go_on_while_a_large_value_is_written(mount: Mount, vectored: bool) -> None:
    disk = mount("ext4", 64)
    with OverflowRegion.open(disk / "region", initial_capacity=8 * MIB, ownership="process") as region:
        values = make_values(region)
        parts = [blob(MIB), blob(100)]
        with stuck(lambda: region.write_vectored(parts, 0) if vectored else region.write(parts[0], 0), disk):
            hits(region, values)
        assert len(region) == len(values) + 1
        assert region.read(len(values)) == b"".join(parts) if vectored else parts[0]


@pytest.mark.parametrize("size", [1000, MIB])
@pytest.mark.parametrize("many", [False, True])
def test_hits_go_on_while_a_value_is_copied_out(
    mount: Mount, new_region: NewRegion, check: Check, sanitized: bool, size: int, many: bool
) -> None:
    if sanitized:
        pytest.skip("AddressSanitizer maps memory at any time, and the kernel maps none while a fault waits for a disk")
    disk = mount("ext4", 64)
    region = new_region(ownership="process")
    values = make_values(region)
    slot = region.write(blob(size), 0)
    with open(disk / "target", "w+b") as file:
        file.truncate(2 * MIB)
        with mmap.mmap(file.fileno(), 2 * MIB) as target:  # its pages cannot be written to for a while

            def copy() -> object:
                return region.read_many_into([slot], target) if many else region.read_into(slot, target)

            with stuck(copy, disk):
                hits(region, values)
                region.free(slot)
                other = region.write(blob(size, 1), 0)  # not over what is being copied
            assert target[:size] == blob(size)
    assert region.read(other) == blob(size, 1)
    check(region)


@pytest.fixture
def slow_disk(mount: Mount, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A file system on the image in another one: when that is frozen, nothing is written back."""
    below, above = mount("ext4", 96), tmp_path / "slow"
    above.mkdir()
    image = below / "image"
    with open(image, "wb") as file:
        file.write(bytes(48 * MIB))
    try:
        subprocess.run(["mkfs.ext2", "-q", "-F", str(image)], check=True, capture_output=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(above)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no loop device: {error}")
    yield above, below
    gc.collect()
    subprocess.run(["umount", str(above)], check=True, capture_output=True)


@pytest.mark.parametrize("verb", ["flush", "evict", "evict_slots"])
def test_hits_go_on_while_values_are_written_back(slow_disk: tuple[Path, Path], verb: str) -> None:
    above, below = slow_disk
    with OverflowRegion.open(
        above / "region", initial_capacity=8 * MIB, cache_limit=None, ownership="process"
    ) as region:
        values = make_values(region)
        slots: list[int] = []

        def work() -> None:
            slots.append(
                region.write(blob(MIB, 7), 0)
            )  # now, or somebody else's sync() may have written it back before
            calls[verb]()

        calls = {"flush": region.flush, "evict": region.evict, "evict_slots": lambda: region.evict(slots)}
        with stuck(work, below):
            hits(region, values)
        hits(region, values)
        assert region.read(slots[0]) == blob(MIB, 7)


def test_hits_go_on_while_a_thread_waits_for_room_under_the_limit(slow_disk: tuple[Path, Path]) -> None:
    above, below = slow_disk
    with OverflowRegion.open(
        above / "region", initial_capacity=32 * MIB, cache_limit=4 * MIB, ownership="process"
    ) as region:
        values = make_values(region)
        written: list[int] = []
        with frozen(below):
            thread = threading.Thread(target=lambda: written.extend(region.write(blob(MIB, 9), 0) for _ in range(16)))
            thread.start()
            before = -1
            while before != len(written):  # until it has to wait
                before = len(written)
                time.sleep(0.3)
            assert before < 16
            assert region.read(written[-1])[-PAGE:] == blob(MIB, 9)[-PAGE:]  # the newest is in RAM
            assert all(region.slot(slot).size == len(value) and slot in region for slot, value in values.items())
            assert len(region) >= len(values) + before
            assert thread.is_alive()
        thread.join()
        assert len(written) == 16
        hits(region, values)
