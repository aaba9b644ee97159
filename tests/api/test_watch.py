"""The watch: what is real, of this process and its control group; in a real group, spilling in time and survival."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kit import environment
from nodedb_mem import EngineId, MemoryGovernor, PressureLevel, _system, _watch
from nodedb_mem._system import ControlGroup, Stall, control_groups, default_ceiling, read_stall

MIB = 1 << 20
V = EngineId.VECTOR


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    assert condition()


# What the system says


def a_process(folder: Path, groups: str, mounts: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cgroup").write_text(groups)
    (folder / "mountinfo").write_text(mounts)
    return str(folder)


def files(folder: Path, **contents: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_a_group_of_version_2(tmp_path: Path) -> None:
    top = tmp_path / "cg two"
    mount = str(top).replace(" ", "\\040")
    files(top)
    files(top / "a", memory__current=900, memory__max=1000, memory__high="max")
    files(
        top / "a/b", memory__current=800, memory__max="max", memory__high=950, memory__stat="anon 5\ninactive_file 300"
    )
    (top / "a/b/memory.pressure").write_text("some avg10=1.50 avg60=0 total=3\nfull avg10=0.25 avg60=0 total=1\n")
    process = a_process(tmp_path / "proc", "0::/a/b\n", f"30 20 0:26 / {mount} rw - cgroup2 cgroup2 rw\n")
    (group,) = control_groups(process)
    assert (group.version, group.limit(), group.current(), group.working_set()) == (2, 950, 800, 500)
    assert group.stall() == Stall(1.5, 0.25)


def test_a_group_of_version_1_in_a_name_space(tmp_path: Path) -> None:
    top = tmp_path / "memory"
    files(top, memory__limit_in_bytes=(1 << 63) - 4096, memory__usage_in_bytes=5000)
    files(top / "c", memory__limit_in_bytes=4000, memory__usage_in_bytes=3000, memory__stat="total_inactive_file 1000")
    mounts = f"35 31 0:32 /docker/x {top} rw - cgroup cgroup rw,memory\n36 31 0:33 / /cpu rw - cgroup cgroup rw,cpu\n"
    process = a_process(tmp_path / "proc", "4:memory:/docker/x/c\n2:cpu:/\n0::/\n", mounts)
    (group,) = control_groups(process)
    assert (group.version, group.limit(), group.working_set(), group.stall()) == (1, 4000, 2000, None)
    process = a_process(tmp_path / "proc", "4:memory:/elsewhere\n", mounts)
    (group,) = control_groups(process)  # not ours to see: what is mounted is what we are in
    assert group.folder == top and group.limit() is None


def test_a_system_without_groups(tmp_path: Path) -> None:
    assert control_groups(a_process(tmp_path / "proc", "", "")) == []
    assert control_groups(str(tmp_path / "nowhere")) == []
    assert read_stall(tmp_path / "nowhere") is None


def test_the_smallest_limit_decides_the_ceiling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files(tmp_path, memory__max=1000 * MIB, memory__current=1)
    monkeypatch.setattr(_system, "control_groups", lambda: [ControlGroup(tmp_path, tmp_path, 2)])
    assert default_ceiling() == MemoryGovernor().snapshot().ceiling == 800 * MIB


# The watch


def test_what_nobody_reserved_is_shown_and_raises_the_level() -> None:
    governor = MemoryGovernor(100 * MIB, {V: 50 * MIB})
    heard: list[tuple[Any, PressureLevel]] = []
    governor.on_pressure(lambda engine, level: heard.append((engine, level)))
    with governor.watch(0.01) as watch:
        until(lambda: watch.reading)
        assert watch.is_running and governor.pressure() is PressureLevel.NORMAL
        before = governor.snapshot().unmanaged
        ballast = bytearray(97 * MIB)
        until(lambda: governor.pressure() is PressureLevel.EMERGENCY)
        shot = governor.snapshot()
        assert shot.unmanaged > before + 80 * MIB and shot.processes[0].real_bytes > 90 * MIB
        until(lambda: (None, PressureLevel.EMERGENCY) in heard)
        del ballast
        until(lambda: governor.pressure() is PressureLevel.NORMAL)
    assert not watch.is_running and governor.snapshot().processes[0].real_bytes is None


def test_what_was_reserved_is_not_counted_again() -> None:
    governor = MemoryGovernor(100 * MIB, {V: 90 * MIB})
    asked: list[int] = []
    governor.add_reclaimer(V, lambda wanted: asked.append(wanted) or 0)  # type: ignore[func-returns-value]
    with governor.watch(0.01) as watch, governor.reserve(V, 60 * MIB):
        ballast = bytearray(60 * MIB)
        until(lambda: watch.reading and watch.reading.pss > len(ballast))
        assert watch.reading.percent < 70 and asked == []


def test_reclaimers_are_asked_for_what_is_too_much() -> None:
    governor = MemoryGovernor(200 * MIB, {V: 100 * MIB})
    held = [(governor.reserve(V, 10 * MIB), bytearray(10 * MIB)) for _ in range(10)]
    asked: list[int] = []

    def reclaim(wanted: int) -> int:
        asked.append(wanted)
        freed = 0
        while held and freed < wanted:
            reservation, _ = held.pop()
            freed += reservation.size
            reservation.release()
        return freed

    governor.add_reclaimer(V, reclaim)
    with governor.watch(0.01):
        ballast = bytearray(90 * MIB)
        until(lambda: asked)
        until(lambda: governor.pressure() < PressureLevel.CRITICAL)
    assert ballast and governor.snapshot().engines[V].reclaimed > 0
    for reservation, _ in held:
        reservation.release()


def test_a_reclaimer_bound_to_a_thread_is_posted() -> None:
    governor = MemoryGovernor(100 * MIB, {V: 90 * MIB})
    threads: list[int] = []
    governor.add_reclaimer(V, lambda wanted: threads.append(threading.get_ident()) or 0, thread=True)  # type: ignore[func-returns-value]
    with governor.watch(0.01):
        ballast = bytearray(90 * MIB)
        until(lambda: governor.poll() or threads)
    assert ballast and set(threads) == {threading.get_ident()}


def test_stalls_of_the_kernel_are_pressure(monkeypatch: pytest.MonkeyPatch) -> None:
    governor = MemoryGovernor(1000 * MIB, {V: 100 * MIB})
    monkeypatch.setattr(_watch, "read_stall", lambda path: Stall(40.0, 12.0))
    monkeypatch.setattr(_watch, "control_groups", list)
    with governor.watch(0.01) as watch:
        until(lambda: governor.pressure() is PressureLevel.CRITICAL)
        assert watch.reading.stall == Stall(40.0, 12.0)


def test_page_cache_is_no_pressure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files(tmp_path, memory__max=1000, memory__current=990, memory__stat="inactive_file 900")
    monkeypatch.setattr(_watch, "control_groups", lambda: [ControlGroup(tmp_path, tmp_path, 2)])
    governor = MemoryGovernor(1000 * MIB, {V: 100 * MIB})
    with governor.watch(0.01) as watch:
        until(lambda: watch.reading)
        assert (watch.reading.group_current, watch.reading.working_set, watch.reading.percent) == (990, 90, 9)
        assert governor.pressure() is PressureLevel.NORMAL
        files(tmp_path, memory__stat="inactive_file 10")
        until(lambda: governor.pressure() is PressureLevel.EMERGENCY)


def test_one_watch_at_a_time_and_it_ends_with_its_governor() -> None:
    governor = MemoryGovernor(100 * MIB)
    watch = governor.watch(0.01)
    with pytest.raises(RuntimeError, match="already"):
        governor.watch()
    watch.stop()
    watch.stop()
    other = governor.watch(0.01)
    del governor
    gc.collect()  # a traceback of the error above may have it
    until(lambda: not other.is_alive())
    for wrong in (0, -1, float("nan")):
        with pytest.raises(ValueError):
            MemoryGovernor(100).watch(wrong)


def test_a_watch_needs_psutil(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(ModuleNotFoundError, match=r"nodedb_mem\[watch\]"):
        MemoryGovernor(100).watch()


# In a real control group

GROUP_LIMIT = 160 * MIB

GROWING = """
    import os, sys, time
    from nodedb_mem import MemoryGovernor, PressureLevel

    MIB = 1 << 20
    open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
    governor = MemoryGovernor(limits={0: 100 * MIB})
    assert governor.snapshot().ceiling == 128 * MIB, governor.snapshot()
    cache = [(governor.reserve(0, 2 * MIB), bytearray(2 * MIB)) for _ in range(35)]

    def spill(wanted):
        freed = 0
        while cache and freed < wanted:
            reservation, data = cache.pop()
            freed += reservation.size
            reservation.release()
        return freed

    governor.add_reclaimer(0, spill)
    if sys.argv[2] == "watched":
        watch = governor.watch(0.02)
    ballast = []
    for _ in range(45):  # 90 MiB that nobody reserves, beside 70 that are, and the interpreter
        ballast.append(bytearray(2 * MIB))
        time.sleep(0.04)
    print(len(ballast), len(cache), governor.snapshot().engines[0].reclaimed // MIB)
    for reservation, data in cache:
        reservation.release()
    """


@pytest.fixture
def group() -> Iterator[Path]:
    """A memory control group with a limit, of whichever version there is."""
    old, new = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    if (old / "memory.limit_in_bytes").exists():
        home, limits = old, ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
    elif (new / "cgroup.subtree_control").exists() and "memory" in (new / "cgroup.subtree_control").read_text():
        home, limits = new, ("memory.max",)
    else:
        pytest.skip("no memory control group can be made here")
    folder = home / f"nodedb_mem-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no memory control group can be made here: {error}")
    try:
        for name in limits:
            if (folder / name).exists():
                (folder / name).write_text(str(GROUP_LIMIT))
        if (folder / "memory.swap.max").exists():
            (folder / "memory.swap.max").write_text("0")
        yield folder
    finally:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                folder.rmdir()
                break
            except OSError:
                time.sleep(0.01)


@pytest.mark.system
def test_in_a_group_it_spills_in_time_and_is_killed_without_the_watch(group: Path, sanitized: bool) -> None:
    if sanitized:
        pytest.skip("AddressSanitizer keeps freed memory, which the group counts")

    def run(how: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", textwrap.dedent(GROWING), str(group), how]
        return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)

    unwatched = run("unwatched")
    assert unwatched.returncode == -signal.SIGKILL, (unwatched.stdout, unwatched.stderr)
    watched = run("watched")
    assert watched.returncode == 0, (watched.stdout, watched.stderr)
    grown, left, reclaimed = map(int, watched.stdout.split())
    assert grown == 45 and left < 35 and reclaimed == 2 * (35 - left)


WATCHED_MAPPING = """
    import os, sys, time
    import numpy as np
    from nodedb_mem import SpillMapping

    MIB = 1 << 20
    open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
    mapping = SpillMapping(1 << 40, sys.argv[3], watch=sys.argv[2] == "watched")
    for number in range(35):
        mapping[number] = np.full(2 * MIB, number, "u1")
    ballast = []
    for _ in range(100):
        ballast.append(bytearray(MIB))
        time.sleep(0.04)
    out = mapping.stats().keys_out
    del ballast
    assert all((mapping[number] == number).all() for number in range(35))
    print(out)
    mapping.close()
    """


@pytest.mark.system
def test_in_a_group_a_watched_mapping_spills_in_time(group: Path, tmp_path: Path, sanitized: bool) -> None:
    if sanitized:
        pytest.skip("AddressSanitizer keeps freed memory, which the group counts")

    def run(how: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", textwrap.dedent(WATCHED_MAPPING), str(group), how, str(tmp_path)]
        return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)

    unwatched = run("unwatched")
    assert unwatched.returncode == -signal.SIGKILL, (unwatched.stdout, unwatched.stderr)
    watched = run("watched")
    assert watched.returncode == 0, (watched.stdout, watched.stderr)
    assert int(watched.stdout) > 0
