"""Faults (rule 6): full disks, limits, permissions, and paths that are not ours to touch.

What could end in SIGBUS runs in a process of its own, so that a crash fails one test and not the run.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from kit import Mount, RunToEnd, blob
from nodedb_mem import OverflowRegion, RegionIOError

file_systems = pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
MIBS = {"tmpfs": 4, "ext4": 8}


# No room


@file_systems
@pytest.mark.parametrize("size", [100, 4096, 5000, 70_000, 1_000_000])
def test_a_full_disk_is_an_error_and_nothing_is_lost(mount: Mount, run_to_end: RunToEnd, kind: str, size: int) -> None:
    script = """
size, room = int(sys.argv[2]), int(sys.argv[3]) << 20
region = OverflowRegion.open(sys.argv[1], initial_capacity=65536, max_capacity=1 << 30)
written, error = write_until_refused(region, size)
assert error.errno == errno.ENOSPC, error
assert error.filename == sys.argv[1], error.filename
assert region.live_bytes >= room // 4, region.live_bytes
assert_intact(region, written)

# It stays full and stays sound.
for _ in range(5):
    before = region.stats()
    try:
        region.write(bytes(room), 0)
    except RegionIOError as error:
        assert error.errno == errno.ENOSPC
    else:
        raise AssertionError("more than the disk holds")
    assert region.stats() == before
    assert os.stat(sys.argv[1]).st_size == before.capacity
assert_intact(region, written)

# Views taken while it is full, space reused while it is full.
views = [(region.read(slot), expected) for slot, expected in list(written.items())[:3]]
for slot in list(written)[1:4]:
    region.free(slot)
    del written[slot]
del views[:]
for number in range(3):
    slot = region.write(value(number + 77, size), 0)
    written[slot] = value(number + 77, size)
assert_intact(region, written)

# Free everything: it fills up again, as far as before.
count = len(written)
for slot in written:
    region.free(slot)
again, error = write_until_refused(region, size, 1000)
assert error.errno == errno.ENOSPC
assert len(again) >= count
assert_intact(region, again)

region.close()
with OverflowRegion.open(sys.argv[1]) as region:
    slot = region.write(value(5, size), 0)
    assert region.read(slot) == value(5, size)
"""
    run_to_end(script, mount(kind, MIBS[kind]) / "region", size, MIBS[kind])


@file_systems
@pytest.mark.parametrize("size", [16, 1000, 40_000, 300_000])
def test_space_that_others_took_is_an_error(mount: Mount, run_to_end: RunToEnd, kind: str, size: int) -> None:
    # The file is already long enough: only its blocks are missing.
    script = """
size, directory = int(sys.argv[2]), os.path.dirname(sys.argv[1])
region = OverflowRegion.open(sys.argv[1], initial_capacity=3 << 20, max_capacity=1 << 30)
written = {}
for number in range(3):
    slot = region.write(value(number, size), 0)
    written[slot] = value(number, size)
fill_disk(directory + "/filler")
more, error = write_until_refused(region, size, 100)
assert error.errno == errno.ENOSPC, error
written |= more
assert_intact(region, written)
victim = next(iter(written))
region.free(victim)
del written[victim]
slot = region.write(value(9, size), 0)
written[slot] = value(9, size)
assert_intact(region, written)
os.unlink(directory + "/filler")
for number in range(3):
    slot = region.write(value(number + 500, size), 0)
    written[slot] = value(number + 500, size)
assert_intact(region, written)
"""
    run_to_end(script, mount(kind, MIBS[kind]) / "region", size)


@file_systems
@pytest.mark.parametrize("size", [100, 3000, 40_000])
def test_a_full_disk_is_no_danger_after_someone_read_the_file(
    mount: Mount, run_to_end: RunToEnd, kind: str, size: int
) -> None:
    # Read back in large pieces, pages with blocks and pages without may end up in one folio; to touch the former
    # then takes blocks for the latter.
    script = """
import ctypes
import numpy as np
size = int(sys.argv[2])
region = OverflowRegion.open(sys.argv[1], initial_capacity=1 << 20, max_capacity=1 << 30)
written, _ = write_until_refused(region, size)

def evict_and_read_back():
    base = np.frombuffer(region.read(next(iter(written))), np.uint8).ctypes.data & -4096
    libc = ctypes.CDLL(None)
    length = os.path.getsize(sys.argv[1]) & -4096
    assert libc.madvise(ctypes.c_void_p(base), ctypes.c_size_t(length), 4) == 0  # MADV_DONTNEED: unmap the pages
    with open(sys.argv[1], "rb", buffering=0) as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while file.read(1 << 17):
            pass

for number in range(4):
    evict_and_read_back()
    assert_intact(region, written)
    for slot in list(written)[number % 2 :: 2][1:]:
        region.free(slot)
        del written[slot]
    more, error = write_until_refused(region, max(1, size - 7 * number), 1000 * number)
    assert error.errno == errno.ENOSPC
    written |= more
    assert_intact(region, written)
"""
    run_to_end(script, mount(kind, MIBS[kind]) / "region", size)


@file_systems
def test_a_full_disk_with_views_and_a_raised_ceiling(mount: Mount, run_to_end: RunToEnd, kind: str) -> None:
    script = """
region = OverflowRegion.open(sys.argv[1], initial_capacity=4096, max_capacity=65536)
written, views = {}, []
region.max_capacity = 1 << 30
for number in range(100_000):
    try:
        slot = region.write(value(number, 3000), 0)
    except RegionIOError as error:
        assert error.errno == errno.ENOSPC, error
        break
    written[slot] = value(number, 3000)
    if number % 10 == 0:
        views.append((region.read(slot), written[slot]))
else:
    raise AssertionError("never refused")
assert_intact(region, written)
assert all(view == expected for view, expected in views)
view, expected = views[0]
try:
    while True:
        slot = region.write(view, 0)  # from the region itself
        written[slot] = expected
except RegionIOError as error:
    assert error.errno == errno.ENOSPC, error
assert_intact(region, written)
assert all(view == expected for view, expected in views)
region.close()
assert all(view == expected for view, expected in views)
"""
    run_to_end(script, mount(kind, MIBS[kind]) / "region")


@file_systems
def test_a_slot_table_that_cannot_grow_is_an_error(mount: Mount, run_to_end: RunToEnd, kind: str) -> None:
    # Empty values need no room of their own, but each needs a slot.
    script = """
region = OverflowRegion.open(sys.argv[1], initial_capacity=4096, max_capacity=1 << 30)
slot = region.write(b"kept", 0)
fill_disk(os.path.dirname(sys.argv[1]) + "/filler")
count = 1
try:
    for _ in range(300_000):
        region.write(b"", 0)
        count += 1
except RegionIOError as error:
    assert error.errno == errno.ENOSPC, error
assert len(region) == region.slot_count == count
assert region.read(slot) == b"kept"
assert lib.ndm_region_check(region._handle) == 0
region.free(slot)
assert region.read(region.write(b"more", 0)) == b"more"
"""
    run_to_end(script, mount(kind, MIBS[kind]) / "region")


@file_systems
def test_opening_on_a_full_disk_is_an_error_or_works(mount: Mount, run_to_end: RunToEnd, kind: str) -> None:
    script = """
directory = os.path.dirname(sys.argv[1])
fill_disk(directory + "/filler")
before = sorted(os.listdir(directory))
for open_one in (lambda: OverflowRegion.open(sys.argv[1]), lambda: OverflowRegion.temporary(directory)):
    try:
        region = open_one()
    except RegionIOError as error:
        assert error.errno == errno.ENOSPC, error
        assert sorted(os.listdir(directory)) == before
    else:
        written, error = write_until_refused(region, 100_000)
        assert error.errno == errno.ENOSPC, error
        assert_intact(region, written)
        region.close()
os.unlink(directory + "/filler")
with OverflowRegion.open(sys.argv[1]) as region:
    assert region.read(region.write(value(3, 100_000), 0)) == value(3, 100_000)
"""
    run_to_end(script, mount(kind, MIBS[kind]) / "region")


@file_systems
def test_a_temporary_region_on_a_full_disk_is_an_error(mount: Mount, run_to_end: RunToEnd, kind: str) -> None:
    script = """
region = OverflowRegion.temporary(sys.argv[1], initial_capacity=4096, max_capacity=1 << 30)
written, error = write_until_refused(region, 10_000)
assert error.errno == errno.ENOSPC, error
assert_intact(region, written)
"""
    run_to_end(script, mount(kind, MIBS[kind]))


# Limits


@pytest.mark.parametrize("size", [100, 5000, 70_000])
def test_a_file_size_limit_is_an_error_and_nothing_is_lost(run_to_end: RunToEnd, tmp_path: Path, size: int) -> None:
    script = """
size = int(sys.argv[2])
region = OverflowRegion.open(sys.argv[1], initial_capacity=4096, max_capacity=1 << 30)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
written, error = write_until_refused(region, size)
assert error.errno == errno.EFBIG, error
assert error.filename == sys.argv[1]
assert region.capacity <= 1 << 20
before = region.stats()
try:
    region.write(bytes(1 << 21), 0)
except RegionIOError as error:
    assert error.errno == errno.EFBIG, error
else:
    raise AssertionError("past the limit")
assert region.stats() == before
assert os.stat(sys.argv[1]).st_size == before.capacity
assert_intact(region, written)
victim = next(iter(written))
region.free(victim)
del written[victim]
slot = region.write(value(9, size), 0)
written[slot] = value(9, size)
assert_intact(region, written)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
slot = region.write(value(8, 1 << 21), 0)
written[slot] = value(8, 1 << 21)
assert_intact(region, written)
"""
    run_to_end(script, tmp_path / "region", size)


def test_opening_past_the_file_size_limit_leaves_nothing_behind(run_to_end: RunToEnd, tmp_path: Path) -> None:
    script = """
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
for _ in range(2):
    try:
        OverflowRegion.open(sys.argv[1], initial_capacity=2 << 20)
    except RegionIOError as error:
        assert error.errno == errno.EFBIG, error
        assert error.filename == sys.argv[1]
    else:
        raise AssertionError("past the limit")
    assert os.listdir(os.path.dirname(sys.argv[1])) == []
    try:
        OverflowRegion.temporary(os.path.dirname(sys.argv[1]), initial_capacity=2 << 20)
    except RegionIOError as error:
        assert error.errno == errno.EFBIG, error
    else:
        raise AssertionError("past the limit")
OverflowRegion.open(sys.argv[1], initial_capacity=1 << 20).close()
"""
    (tmp_path / "empty").mkdir()
    run_to_end(script, tmp_path / "empty" / "region")


def test_no_descriptors_left_is_an_error_and_leaves_nothing_behind(run_to_end: RunToEnd, tmp_path: Path) -> None:
    script = """
used = len(os.listdir("/proc/self/fd")) - 1
refused = 0
for room in range(0, 4):
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + room, hard))
    try:
        OverflowRegion.open(sys.argv[1], initial_capacity=4096).close()
        break
    except RegionIOError as error:
        assert error.errno == errno.EMFILE, error
        refused += 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    assert os.listdir(os.path.dirname(sys.argv[1])) == [], room
assert refused
"""
    (tmp_path / "empty").mkdir()
    run_to_end(script, tmp_path / "empty" / "region")


def test_a_file_cut_short_is_noticed_when_it_grows(run_to_end: RunToEnd, tmp_path: Path) -> None:
    script = """
region = OverflowRegion.open(sys.argv[1], initial_capacity=65536, max_capacity=1 << 24)
region.write(bytes(1000), 0)
os.truncate(sys.argv[1], 0)
before = region.stats()
for size in (100_000, 1_000_000):
    try:
        region.write(bytes(size), 0)
    except RegionIOError as error:
        assert error.errno == errno.EIO, error
    else:
        raise AssertionError("a short file went unnoticed")
    assert region.stats() == before
region.close()
"""
    run_to_end(script, tmp_path / "region")


# Permissions


@pytest.fixture
def foreign_directory() -> Iterator[Path]:
    """A directory that everyone may enter and only we may write."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o755)
    yield directory
    directory.chmod(0o755)
    shutil.rmtree(directory)


@pytest.fixture
def run_unprivileged(run_python: Callable[..., str], run_to_end: RunToEnd) -> RunToEnd:
    """Run a script to its end, as nobody where we are root."""
    step_down = """
import os, sys
if os.geteuid() == 0:
    try:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
    except OSError as error:
        print("cannot become nobody:", error)
        sys.exit()
"""
    if refusal := run_python(step_down):
        pytest.skip(refusal.strip())
    return lambda script, *arguments: run_to_end(step_down + script, *arguments)


def test_a_directory_without_permission_is_an_error(run_unprivileged: RunToEnd, foreign_directory: Path) -> None:
    if os.geteuid() != 0:
        foreign_directory.chmod(0o555)
    script = """
directory = sys.argv[1]
for open_one, name in (
    (lambda: OverflowRegion.open(directory + "/region"), directory + "/region"),
    (lambda: OverflowRegion.temporary(directory), directory),
):
    try:
        open_one()
    except RegionIOError as error:
        assert error.errno == errno.EACCES, error
        assert error.filename == name, error.filename
    else:
        raise AssertionError("opened")
"""
    run_unprivileged(script, foreign_directory)
    assert os.listdir(foreign_directory) == []


def test_a_region_file_of_someone_else_is_an_error(run_unprivileged: RunToEnd, foreign_directory: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to be someone else")
    with OverflowRegion.open(foreign_directory / "region", initial_capacity=4096) as region:
        region.write(blob(1000), 0)
    before = {name: (foreign_directory / name).read_bytes() for name in os.listdir(foreign_directory)}
    script = """
try:
    OverflowRegion.open(sys.argv[1])
except RegionIOError as error:
    assert error.errno == errno.EACCES, error
else:
    raise AssertionError("opened")
"""
    run_unprivileged(script, foreign_directory / "region")
    assert {name: (foreign_directory / name).read_bytes() for name in os.listdir(foreign_directory)} == before


def test_a_region_works_without_privileges(run_unprivileged: RunToEnd, foreign_directory: Path) -> None:
    foreign_directory.chmod(0o777)
    script = """
for _ in range(2):
    with OverflowRegion.open(sys.argv[1], initial_capacity=4096, max_capacity=1 << 24) as region:
        slots = {region.write(value(n, 5000), 0): value(n, 5000) for n in range(50)}
        assert_intact(region, slots)
        try:
            OverflowRegion.open(sys.argv[1])
        except Exception as error:
            assert error.holders == (os.getpid(),), error
"""
    run_unprivileged(script, foreign_directory / "region")


@file_systems
def test_a_read_only_file_system_is_an_error(mount: Mount, kind: str) -> None:
    directory = mount(kind, MIBS[kind])
    with OverflowRegion.open(directory / "old", initial_capacity=4096) as region:
        region.write(blob(1000), 0)
    subprocess.run(["mount", "-o", "remount,ro", str(directory)], check=True)
    try:
        before = sorted(os.listdir(directory))
        for name in ("old", "new"):
            with pytest.raises(RegionIOError) as caught:
                OverflowRegion.open(directory / name)
            assert caught.value.errno == errno.EROFS
            assert caught.value.filename == str(directory / name)
        with pytest.raises(RegionIOError) as caught:
            OverflowRegion.temporary(directory)
        assert caught.value.errno == errno.EROFS
        assert sorted(os.listdir(directory)) == before
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(directory)], check=True)


# Paths that are not ours


def snapshot(directory: Path) -> dict[str, tuple[Any, ...]]:
    """Everything below `directory`: kind, links, times and bytes."""
    found = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        content: object = None
        if stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        elif stat.S_ISREG(status.st_mode):
            content = path.read_bytes()
        kept = (status.st_mode, status.st_ino, status.st_nlink, status.st_size, status.st_mtime_ns, status.st_blocks)
        found[str(path.relative_to(directory))] = (*kept, content)
    return found


def make_foreign(path: Path) -> None:
    path.write_bytes(b"someone's only copy of their thesis\n")


def make_sparse_foreign(path: Path) -> None:
    with open(path, "wb") as file:
        file.seek(1 << 20)
        file.write(b"at the end")


def make_zeros(path: Path) -> None:
    path.write_bytes(bytes(8192))  # data, though all zero: not holes


STRANGERS: dict[str, Callable[[Path], Any]] = {
    "directory": Path.mkdir,
    "fifo": os.mkfifo,
    "socket": lambda path: os.mknod(path, 0o600 | stat.S_IFSOCK),
    "symlink_to_nothing": lambda path: path.symlink_to(path.with_name("target")),
    "symlink_to_itself": lambda path: path.symlink_to(path),
    "symlink_to_a_file": lambda path: (make_foreign(path.with_name("t")), path.symlink_to(path.with_name("t"))),
    "symlink_to_an_empty_file": lambda path: (path.with_name("t").touch(), path.symlink_to(path.with_name("t"))),
    "foreign": make_foreign,
    "foreign_of_a_byte": lambda path: path.write_bytes(b"\0"),
    "foreign_of_64_KiB": lambda path: path.write_bytes(blob(65536)),
    "foreign_sparse": make_sparse_foreign,
    "foreign_zeros": make_zeros,
}


@pytest.mark.parametrize("make", STRANGERS.values(), ids=STRANGERS.keys())
def test_what_is_no_region_is_refused_untouched(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    make(tmp_path / "region")
    before = snapshot(tmp_path)
    for _ in range(2):
        with pytest.raises(RegionIOError) as caught:
            OverflowRegion.open(tmp_path / "region", initial_capacity=4096)
        assert caught.value.filename == str(tmp_path / "region")
        assert caught.value.errno
        assert snapshot(tmp_path) == before


def test_the_reasons_for_refusal_have_their_own_errno(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    make_foreign(tmp_path / "foreign")
    (tmp_path / "link").symlink_to("foreign")
    expected = {
        "directory": errno.EISDIR,
        "foreign": errno.EEXIST,
        "link": errno.ELOOP,
        "missing/region": errno.ENOENT,
        "foreign/region": errno.ENOTDIR,
        "n" * 300: errno.ENAMETOOLONG,
    }
    for name, number in expected.items():
        with pytest.raises(RegionIOError) as caught:
            OverflowRegion.open(tmp_path / name)
        assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path / name))
        assert os.strerror(number) in str(caught.value) or number == errno.EEXIST
        assert str(tmp_path / name) in str(caught.value)


def test_a_device_is_refused(tmp_path: Path) -> None:
    try:
        os.mknod(tmp_path / "region", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("making a device needs root")
    with pytest.raises(RegionIOError):
        OverflowRegion.open(tmp_path / "region")
    assert os.listdir(tmp_path) == ["region"]


@pytest.mark.parametrize("with_region", ["absent", "empty", "ours"])
@pytest.mark.parametrize("make", STRANGERS.values(), ids=STRANGERS.keys())
def test_a_foreign_slot_table_is_refused_untouched(
    tmp_path: Path, make: Callable[[Path], Any], with_region: str
) -> None:
    if with_region == "empty":
        (tmp_path / "region").touch()
    elif with_region == "ours":
        with OverflowRegion.open(tmp_path / "region", initial_capacity=4096) as region:
            region.write(blob(4000), 0)
        (tmp_path / "region.slots").unlink()
    make(tmp_path / "region.slots")
    before = snapshot(tmp_path)
    for _ in range(2):
        with pytest.raises(RegionIOError):
            OverflowRegion.open(tmp_path / "region", initial_capacity=4096)
        assert snapshot(tmp_path) == before


def test_a_file_without_mark_and_slot_table_counts_as_foreign(tmp_path: Path) -> None:
    with OverflowRegion.open(tmp_path / "region", initial_capacity=4096) as region:
        region.write(blob(4000), 0)
    (tmp_path / "region.slots").unlink()
    with suppress(OSError):  # a file system without attributes
        os.removexattr(tmp_path / "region", "user.nodedb_mem.identity")
    before = snapshot(tmp_path)
    with pytest.raises(RegionIOError) as caught:
        OverflowRegion.open(tmp_path / "region")
    assert caught.value.errno == errno.EEXIST
    assert snapshot(tmp_path) == before


def test_a_slot_table_without_its_region_file_does_not_hinder(tmp_path: Path) -> None:
    with OverflowRegion.open(tmp_path / "region", initial_capacity=4096) as region:
        region.write(blob(4000), 0)
    (tmp_path / "region").unlink()
    with OverflowRegion.open(tmp_path / "region", initial_capacity=8192) as region:
        assert (region.capacity, region.slot_count) == (8192, 0)
        assert region.read(region.write(blob(100), 0)) == blob(100)


def test_a_failed_open_of_a_missing_directory_names_it(tmp_path: Path) -> None:
    with pytest.raises(RegionIOError) as caught:
        OverflowRegion.temporary(tmp_path / "missing")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, str(tmp_path / "missing"))
    make_foreign(tmp_path / "file")
    before = snapshot(tmp_path)
    with pytest.raises(RegionIOError) as caught:
        OverflowRegion.temporary(tmp_path / "file")
    assert caught.value.errno == errno.ENOTDIR
    assert snapshot(tmp_path) == before
