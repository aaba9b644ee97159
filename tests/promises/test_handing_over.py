"""Closing races, handing a region over, what a forked child lets go of, mappings that cannot be cut."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from kit import VERBS, NewRegion, RunPython, StartPython, blob, in_thread
from nodedb_mem import (
    CapacityExceededError,
    InvalidSlotError,
    OverflowReader,
    OverflowRegion,
    RegionBusyError,
    RegionClosedError,
    WrongThreadError,
    _control,
)

MIB = 1 << 20


# Closing


def test_closing_beside_the_owner_is_refused_or_finds_it_closed(tmp_path: Path) -> None:
    seen: list[BaseException] = []
    shared: list[OverflowRegion] = []
    stop = threading.Event()

    def meddle() -> None:  # a thread that has never opened a region
        while not stop.is_set():
            for region in shared[-1:]:
                for verb in (region.close, lambda region=region: VERBS["write"](region, 0)):
                    try:
                        verb()
                    except (WrongThreadError, RegionClosedError):
                        pass
                    except BaseException as error:
                        seen.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=meddle)
    thread.start()
    try:
        for _ in range(150):
            region = OverflowRegion.temporary(tmp_path, initial_capacity=MIB, max_capacity=MIB, cache_limit=None)
            slots = region.write_many([b"x" * 64] * 3000, 0)
            views = region.read_many(slots)
            region.free_many(slots)
            shared.append(region)
            del views  # 3000 extents come home in close(), without the GIL
            region.close()
            assert region.closed
            del shared[:-1]
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert not seen


def test_with_on_another_thread_leaves_the_region_alone(new_region: NewRegion) -> None:
    region = new_region()

    def leave() -> None:
        with region:
            raise KeyError("the block's own")

    assert isinstance(in_thread(leave), KeyError)
    assert not region.closed and len(region) == 0


@pytest.mark.parametrize("what", ["region", "lease"])
def test_with_in_a_child_keeps_the_blocks_exception(tmp_path: Path, run_python: RunPython, what: str) -> None:
    script = """
    import os, sys
    from nodedb_mem import OverflowReader, OverflowRegion
    with OverflowRegion.open(sys.argv[1], initial_capacity=1 << 16) as region:
        ref = region.share(region.write(b"x", 0))
        with OverflowReader(ref) as reader, reader.lease(ref) if sys.argv[2] == "lease" else region:
            child = os.fork()
            if child == 0:
                sys.exit(7)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            if sys.argv[2] == "lease":
                assert reader.stats().leases == 1
    """
    assert run_python(script, tmp_path / "r", what) == "7\n"


# Handing over


def test_a_released_region_is_nobodys_until_it_is_adopted(new_region: NewRegion) -> None:
    region = new_region()
    slot = region.write(b"value", 0)
    handle = region.handle
    assert isinstance(in_thread(region.adopt), WrongThreadError)
    region.adopt()  # one's own
    region.release_ownership()
    for verb in (region.stats, region.close, region.release_ownership, lambda: region.read(slot)):
        with pytest.raises(WrongThreadError):
            verb()
        assert isinstance(in_thread(verb), WrongThreadError)

    def take() -> bytes:
        region.adopt()
        value = region.read_bytes(slot)
        assert region.handle == handle
        region.release_ownership()
        return value

    assert in_thread(take) == b"value"
    region.adopt()
    assert region.read_bytes(slot) == b"value" and region.write(b"more", 0) == slot + 1


def test_a_region_whose_thread_has_ended_can_be_adopted_and_closed(tmp_path: Path) -> None:
    regions: list[OverflowRegion] = []
    views: list[memoryview] = []

    def own() -> None:
        region = OverflowRegion.open(tmp_path / "r", initial_capacity=1 << 16)
        region.write(b"value", 0)
        views.append(region.read(0))
        regions.append(region)

    in_thread(own)
    (region,) = regions
    with pytest.raises(WrongThreadError):
        region.close()
    region.adopt()
    assert region.read_bytes(0) == b"value"
    views.clear()
    region.close()
    with pytest.raises(RegionClosedError):
        region.adopt()
    OverflowRegion.open(tmp_path / "r").close()


def test_one_of_many_threads_adopts(new_region: NewRegion) -> None:
    region = new_region()
    for _ in range(15):
        region.release_ownership()
        start, done = threading.Barrier(4), threading.Barrier(4)
        winners: list[int] = []

        def race(start: threading.Barrier = start, done: threading.Barrier = done, winners: Any = winners) -> None:
            start.wait()
            with suppress(WrongThreadError):
                region.adopt()
                winners.append(region.write(b"x", 0))
            done.wait()  # nobody's thread ends before all have tried

        threads = [threading.Thread(target=race) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(winners) == 1
        region.adopt()  # the winner's thread has ended
        region.free(winners[0])


# Forked children


def _open_files() -> set[str]:
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found.add(os.readlink(f"/proc/self/fd/{fd}"))
    return found


def _in_child(function: Callable[[], object]) -> None:
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if function() else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_child_holds_no_descriptor_and_no_unused_mapping(tmp_path: Path) -> None:
    path = str(tmp_path / "r")
    region = OverflowRegion.open(path, initial_capacity=1 << 20)
    ref = region.share(region.write(blob(100_000), 0))
    reader = OverflowReader(ref)
    reader.read_bytes(ref)
    with reader.lease(ref) as leased:
        assert leased[:4] == blob(100_000)[:4]
    del leased
    gc.collect()

    def holds_nothing() -> bool:
        maps = Path("/proc/self/maps").read_text()
        return not any(link.startswith(path) for link in _open_files()) and path not in maps

    assert any(link.startswith(path) for link in _open_files()) and path in Path("/proc/self/maps").read_text()
    _in_child(holds_nothing)
    reader.close()
    region.close()


@pytest.mark.parametrize("owner", ["idle", "ended"])
def test_a_child_of_another_thread_holds_no_descriptor_and_no_mapping(tmp_path: Path, owner: str) -> None:
    path = str(tmp_path / "r")

    def open_region() -> OverflowRegion:
        region = OverflowRegion.open(path, initial_capacity=1 << 20)
        region.share(region.write(blob(100_000), 0))
        return region

    def holds_nothing() -> bool:
        maps = Path("/proc/self/maps").read_text()
        return not any(link.startswith(path) for link in _open_files()) and path not in maps

    region = open_region() if owner == "idle" else in_thread(open_region)
    assert any(link.startswith(path) for link in _open_files()) and path in Path("/proc/self/maps").read_text()
    assert in_thread(lambda: _in_child(holds_nothing)) is None
    if owner == "ended":
        region.adopt()
    region.close()


def test_a_childs_views_stay_readable_and_end_there(tmp_path: Path) -> None:
    path = str(tmp_path / "r")
    region = OverflowRegion.open(path, initial_capacity=1 << 20)
    views = [region.read(region.write(blob(100_000, seed), 0)) for seed in range(3)]

    def ends() -> bool:
        nonlocal region
        true = all(view == blob(100_000, seed) for seed, view in enumerate(views))
        del region
        gc.collect()
        mapped = path in Path("/proc/self/maps").read_text()
        true = true and all(view == blob(100_000, seed) for seed, view in enumerate(views))
        views.clear()
        gc.collect()
        return true and mapped and path not in Path("/proc/self/maps").read_text()

    _in_child(ends)
    assert all(view == blob(100_000, seed) for seed, view in enumerate(views))
    views.clear()
    region.close()


def test_a_daemonized_child_can_open_its_file(tmp_path: Path, start_python: StartPython) -> None:
    owner = start_python(
        """
        import gc, os, sys, time
        from nodedb_mem import OverflowRegion
        region = OverflowRegion.open(sys.argv[1], initial_capacity=1 << 20)
        slot = region.write(b"value", 0)
        parent = os.getpid()
        if os.fork():
            os._exit(0)
        while os.getppid() == parent:
            time.sleep(0.001)
        del region
        gc.collect()
        with OverflowRegion.open(sys.argv[1], recover=True) as region:
            print(bytes(region.read(slot)), flush=True)
        """,
        tmp_path / "r",
    )
    assert owner.stdout.readline() == "b'value'\n"


def test_a_child_does_not_keep_a_closed_regions_disk_space(tmp_path: Path) -> None:
    def blocks() -> int:
        return sum(os.stat(f"/proc/self/fd/{fd}").st_blocks for fd in fds)

    region = OverflowRegion.temporary(tmp_path, initial_capacity=1 << 20)
    region.write(blob(4 * MIB), 0)
    fds = [fd for fd in os.listdir("/proc/self/fd") if _is_deleted_below(fd, tmp_path)]
    assert fds and blocks() > 0
    go, stop = os.pipe()
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(stop)
        os.write(told, b".")
        os.read(go, 1)
        os._exit(0)
    os.read(ready, 1)
    copies = [fd for fd in os.listdir(f"/proc/{child}/fd") if _is_deleted_below(fd, tmp_path, child)]
    assert not copies and str(tmp_path) not in Path(f"/proc/{child}/maps").read_text()
    region.close()
    for fd in (stop, go, ready, told):
        os.close(fd)
    os.waitpid(child, 0)


def _is_deleted_below(fd: str, folder: Path, pid: int | str = "self") -> bool:
    try:
        link = os.readlink(f"/proc/{pid}/fd/{fd}")
    except OSError:
        return False
    return link.startswith(str(folder)) and link.endswith(" (deleted)")


def test_a_readers_lease_ends_with_the_reader_although_its_child_lives(tmp_path: Path) -> None:
    region = OverflowRegion.open(tmp_path / "r", initial_capacity=1 << 20)
    ref = region.share(region.write(b"v" * 1000, 0))
    go, stop = os.pipe()
    ready, told = os.pipe()
    reader = os.fork()
    if reader == 0:
        other = OverflowReader(ref)
        lease = other.lease(ref)
        if os.fork() == 0:
            os.close(stop)
            os.write(told, b".")
            os.read(go, 1)
            os._exit(0)
        os.read(ready, 1)
        del lease, other
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(reader, 0)
    region.free(ref.slot)
    region.trim()  # leases of the dead end
    assert region.stats().pinned_bytes == 0
    for fd in (go, stop, ready, told):
        os.close(fd)
    region.close()


def test_only_forked_children_are_named_as_such(tmp_path: Path, start_python: StartPython) -> None:
    owner = start_python(
        """
        import os, sys
        from nodedb_mem import OverflowRegion
        region = OverflowRegion.open(sys.argv[1], initial_capacity=65536)
        view = region.read(region.write(b"owner", 0))
        pid = os.fork()
        if pid == 0:
            sys.stdin.readline()
            os._exit(0)
        print(pid, flush=True)
        sys.stdin.readline()
        """,
        tmp_path / "r",
    )
    child = int(owner.stdout.readline())
    owner.kill()
    owner.wait()
    with pytest.raises(RegionBusyError, match="forked from its owner") as caught:
        OverflowRegion.open(tmp_path / "r")
    assert caught.value.children == caught.value.holders == (child,)
    owner.stdin.close()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with suppress(RegionBusyError):
            OverflowRegion.open(tmp_path / "r").close()
            return
    raise AssertionError("still held")


# What the system refuses


def test_mappings_that_cannot_be_cut_go_later(tmp_path: Path, run_python: RunPython) -> None:
    script = """
    import gc, sys
    from nodedb_mem import OverflowRegion
    most = int(open("/proc/sys/vm/max_map_count").read())
    if most > 100_000:
        print("skipped"); sys.exit()
    count = 2 * most + 10_000
    def mapped(): return sum("(deleted)" in line for line in open("/proc/self/maps"))
    region = OverflowRegion.temporary(sys.argv[1], max_capacity=1 << 30, alignment=4096, cache_limit=None)
    views = [region.restore(slot) for slot in reversed(region.write_many([b"x" * 4096] * count, 0))]
    views[::2] = [None] * len(views[::2])  # each is cut out of the middle of a mapping
    assert sum(1 for _ in open("/proc/self/maps")) > most - 100, "nothing was refused"
    assert all(view is None or view == b"x" * 4096 for view in views)
    views.clear()
    gc.collect()
    region.close()
    print(mapped())
    """
    assert run_python(script, tmp_path) in ("0\n", "skipped\n")


def test_details_of_a_refusal_are_that_calls(tmp_path: Path) -> None:
    region = OverflowRegion.open(tmp_path / "a", initial_capacity=MIB, max_capacity=MIB)
    other = OverflowRegion.open(tmp_path / "b", initial_capacity=MIB)
    before = signal.getsignal(signal.SIGALRM)

    def refuse(*_: object) -> None:
        with suppress(InvalidSlotError):
            other.read(10**6)

    signal.signal(signal.SIGALRM, refuse)
    signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
    large, lengths = bytes(2 * MIB), array("q", [2 * MIB])
    try:
        for _ in range(3000):
            with pytest.raises(CapacityExceededError):
                region.write_many(large, 0, lengths=lengths)
            with pytest.raises(ValueError, match="can only be raised"):
                region.max_capacity = 5
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    region.close()
    other.close()


def test_details_of_a_refused_figure_are_that_calls(new_region: NewRegion, monkeypatch: pytest.MonkeyPatch) -> None:
    region, real = new_region(), _control._info
    asked, closed = threading.Event(), threading.Event()

    def late(handle: object, out: object) -> int:
        details = real(handle, out)
        if threading.current_thread() is not threading.main_thread():
            asked.set()
            closed.wait(10)
        return int(details)

    monkeypatch.setattr(_control, "_info", late)
    with ThreadPoolExecutor(1) as pool:
        refused = pool.submit(lambda: region.capacity)
        assert asked.wait(10)
        region.close()
        with pytest.raises(RegionClosedError):
            len(region)
        closed.set()
        assert isinstance(refused.exception(10), WrongThreadError)
