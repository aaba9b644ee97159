"""Opening: what fails has destroyed nothing; files know each other after a move; one that is missing is named."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from kit import Mount, NewRegion, RunPython, StartPython, blob, let_others_in, system
from nodedb_mem import MemoryTuning, OverflowReader, OverflowRegion, RegionError, RegionIOError, RegionSizeError

KIB, MIB = 1 << 10, 1 << 20
INCARNATION, LIVE_BYTES, HAS_LEASES = 48, 88, 184
IDENTITY = "user.nodedb_mem.identity"
ENDINGS = ("", ".slots", ".leases")


def beside(path: Path | str, ending: str) -> Path:
    return Path(f"{path}{ending}")


def contents(path: Path) -> dict[str, bytes]:
    return {name: (path.parent / name).read_bytes() for name in sorted(os.listdir(path.parent))}


def patch(path: Path, offset: int, *words: int) -> None:
    with open(f"{path}.slots", "r+b") as file:
        file.seek(offset)
        file.write(struct.pack(f"={len(words)}Q", *words))


def each_file(path: Path, target: Path, how: Callable[[Any, Any], object]) -> Path:
    target.mkdir(exist_ok=True)
    for ending in ENDINGS:
        if beside(path, ending).exists():
            how(beside(path, ending), beside(target / path.name, ending))
    return target / path.name


@pytest.fixture
def closed(new_region: NewRegion, tmp_path: Path) -> Path:
    """Give the path of a region that was closed: slot 0 holds a value that was shared."""
    region = new_region()
    region.share(region.write(blob(1000), 0))
    region.close()
    return tmp_path / "region"


@pytest.fixture
def other_disk(tmp_path: Path) -> Path:
    """Give a folder on another file system that keeps attributes."""
    for folder in ("/dev/shm", "/var/tmp", "/tmp"):
        if os.path.isdir(folder) and os.stat(folder).st_dev != os.stat(tmp_path).st_dev:
            probe = Path(tempfile.mkdtemp(dir=folder))
            with suppress(OSError):
                os.setxattr(_touched(probe / "probe"), IDENTITY, b"x")
                return probe
    pytest.skip("no other file system with attributes")


def _touched(path: Path) -> Path:
    path.touch()
    return path


# ---- what fails has destroyed nothing ---------------------------------------------------------------------------

_FAILS = """
import os, resource, sys
from nodedb_mem import MemError, OverflowRegion
path, how, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
def limit(kind, soft):
    resource.setrlimit(kind, (soft, resource.getrlimit(kind)[1]))
if how == "address space":
    pages = int(open("/proc/self/statm").read().split()[0])
    limit(resource.RLIMIT_AS, pages * 4096 + size)
elif how == "file size":
    limit(resource.RLIMIT_FSIZE, size)
else:
    limit(resource.RLIMIT_NOFILE, len(os.listdir("/proc/self/fd")) - 1 + size)
opened = False
try:
    OverflowRegion(path, max_capacity=1 << 30).close()
    opened = True
except (MemError, MemoryError, OSError):
    pass
for kind in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE):
    limit(kind, resource.getrlimit(kind)[1])
region = OverflowRegion(path, recover=True)
print(opened, len(region), region.read_bytes(0)[:4] if len(region) else None)
"""


@pytest.mark.parametrize(
    ("how", "size"),
    [("address space", size << 10) for size in (0, 300, 1000, 3000, 4000, 7000)]
    + [("file size", size) for size in (0, 100, 20_000, 65_536, MIB - 1)]
    + [("descriptors", size) for size in range(4)],
)
@pytest.mark.parametrize("shared", [False, True])
def test_a_default_open_that_fails_leaves_the_values(
    new_region: NewRegion, run_python: RunPython, sanitized: bool, how: str, size: int, shared: bool
) -> None:
    if sanitized and how == "address space":
        pytest.skip("AddressSanitizer needs address space by the terabyte")
    region = new_region(initial_capacity=MIB)
    slot = region.write(b"A" * 1000, 0)
    if shared:
        region.share(slot)
    region.close()
    opened, count, value = run_python(_FAILS, region.path, how, size).split(maxsplit=2)
    assert (opened, count) in (("False", "1"), ("True", "0"))
    assert value.strip() == ("b'AAAA'" if opened == "False" else "None")
    assert how != "file size" or opened == "False"


def test_a_default_open_on_a_full_disk_leaves_the_values(new_region: NewRegion, mount: Mount) -> None:
    disk = mount("ext4", 16)
    region = new_region(disk / "region", initial_capacity=4 * MIB)
    slot = region.write(blob(MIB), 0)
    region.close()
    os.truncate(disk / "region.slots", 4096 + 24)  # it needs blocks for a whole table again
    with open(disk / "filler", "wb", buffering=0) as file, suppress(OSError):
        for size in (MIB, 4096, 512):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))
    with pytest.raises(RegionIOError) as caught:
        new_region(disk / "region")
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == f"{disk}/region.slots"
    (disk / "filler").unlink()
    again = new_region(disk / "region", recover=True)
    assert again.read_bytes(slot) == blob(MIB)
    again.close()


# ---- killed while it opened for the first time ------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 56, 100, 192, 4095, 4096, None])
@pytest.mark.parametrize("recover", [False, True])
def test_a_table_without_incarnation_holds_no_values(
    closed: Path, new_region: NewRegion, size: int | None, recover: bool
) -> None:
    os.truncate(closed, 0)
    patch(closed, INCARNATION, 0)
    if size is not None:
        os.truncate(f"{closed}.slots", size)
    region = new_region(recover=recover)
    assert len(region) == 0 and region.read(region.write(b"value", 0)) == b"value"


@pytest.mark.parametrize("recover", [False, True])
def test_an_opening_that_was_killed_after_it_took_the_values_back(
    closed: Path, new_region: NewRegion, recover: bool
) -> None:
    patch(closed, INCARNATION, 0)
    region = new_region(recover=recover)
    assert len(region) == 0 and region.read(region.write(b"value", 0)) == b"value"


@pytest.mark.system
def test_an_owner_killed_in_its_first_open_can_start_again(tmp_path: Path) -> None:
    path, deadline, turn = tmp_path / "killed", time.monotonic() + 20, 0
    while time.monotonic() < deadline:
        turn += 1
        for ending in ENDINGS:
            beside(path, ending).unlink(missing_ok=True)
        ready, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(tell, b"x")
            OverflowRegion(path, initial_capacity=MIB, recover=True)
            time.sleep(5)
            os._exit(0)
        os.read(ready, 1)
        end = time.perf_counter() + turn % 100 * 6e-6
        while time.perf_counter() < end:
            pass
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ready)
        os.close(tell)
        OverflowRegion(path, initial_capacity=MIB, recover=True).close()


# ---- moved and copied -------------------------------------------------------------------------------------------


def _is_whole(path: Path) -> None:
    with OverflowReader(path) as reader:
        assert reader.read_bytes(0) == blob(1000)
    with OverflowRegion(path, recover=True) as region:
        assert region.read_bytes(0) == blob(1000)


@pytest.mark.parametrize("how", [shutil.copy2, shutil.move])
def test_a_region_moved_or_copied_to_another_disk_is_a_region(
    closed: Path, other_disk: Path, tmp_path: Path, how: Callable[[Any, Any], object]
) -> None:
    try:
        there = each_file(closed, other_disk / "new", how)
        _is_whole(there)
        if how is shutil.move:
            _is_whole(each_file(there, tmp_path / "back", how))
        else:
            _is_whole(closed)
        with OverflowRegion(there if how is shutil.copy2 else tmp_path / "back" / "region") as region:
            assert len(region) == 0
    finally:
        shutil.rmtree(other_disk)


def test_a_region_copied_by_cp_is_a_region(closed: Path, tmp_path: Path) -> None:
    each_file(
        closed, tmp_path / "copy", lambda source, target: subprocess.run(["cp", "-a", source, target], check=True)
    )
    _is_whole(tmp_path / "copy" / "region")
    _is_whole(closed)


@pytest.mark.parametrize("step", [100, 1_000, 1_000_000_000])
def test_a_copy_whose_file_system_rounds_times_is_a_region(closed: Path, tmp_path: Path, step: int) -> None:
    copy = each_file(closed, tmp_path / "copy", shutil.copy2)
    changed = copy.stat().st_mtime_ns
    os.utime(copy, ns=(changed, changed - changed % step))
    _is_whole(copy)


def test_a_copy_without_attributes_is_refused_with_what_to_do(closed: Path, tmp_path: Path) -> None:
    copy = each_file(closed, tmp_path / "copy", shutil.copyfile)
    before = contents(copy)
    for attempt in (
        lambda: OverflowReader(copy),
        lambda: OverflowRegion(copy, recover=True),
        lambda: OverflowRegion(copy),
    ):
        with pytest.raises(RegionIOError, match=r"lost its attribute user.nodedb_mem.identity.*cp -a") as caught:
            attempt()
        assert caught.value.filename == f"{copy}.slots"
    assert contents(copy) == before
    os.setxattr(copy, IDENTITY, os.getxattr(closed, IDENTITY))  # restored by hand: but the times are gone, too
    with pytest.raises(RegionIOError, match="copied while the region was open"):
        OverflowRegion(copy, recover=True)
    shutil.copystat(closed, copy)
    _is_whole(copy)


def test_a_copy_of_a_living_region_is_not_recovered(new_region: NewRegion, tmp_path: Path) -> None:
    region = new_region()
    region.write(blob(1000), 0)
    early = each_file(tmp_path / "region", tmp_path / "early", shutil.copy2)
    half = each_file(tmp_path / "region", tmp_path / "half", shutil.copy2)
    region.close()
    shutil.copy2(f"{tmp_path}/region.slots", f"{half}.slots")  # the data from before the close, the table from after
    for copy in (early, half):
        before = contents(copy)
        with pytest.raises(RegionIOError, match="while the region was open") as caught:
            OverflowRegion(copy, recover=True)
        assert caught.value.errno == errno.EUCLEAN
        with pytest.raises(RegionIOError, match="while the region was open"):
            OverflowReader(copy)
        assert contents(copy) == before
        with OverflowRegion(copy) as empty:  # the values are not wanted
            assert len(empty) == 0


def test_a_killed_region_recovers_where_it_was_and_not_elsewhere(
    closed: Path, tmp_path: Path, start_python: StartPython
) -> None:
    script = """
    import sys, time
    from nodedb_mem import OverflowRegion
    region = OverflowRegion(sys.argv[1], recover=True)
    print("open", flush=True)
    time.sleep(60)
    """
    owner = start_python(script, closed)
    owner.stdout.readline()
    owner.kill()
    owner.wait()
    copy = each_file(closed, tmp_path / "copy", shutil.copy2)
    with pytest.raises(RegionIOError, match="after its owner was killed"):
        OverflowRegion(copy, recover=True)
    _is_whole(closed)


def test_files_of_two_regions_are_refused(closed: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with OverflowRegion(tmp_path / "other" / "region", initial_capacity=64 * KIB) as other:
        other.write(blob(1000, 1), 0)
    copy = each_file(closed, tmp_path / "copy", shutil.copy2)
    with OverflowRegion(copy, recover=True) as region:  # from now on it is a region of its own
        region.write(blob(1000, 2), 0)
    for data, table in ((closed, tmp_path / "other" / "region"), (closed, copy), (copy, closed)):
        mixed = tmp_path / "mixed"
        mixed.mkdir()
        shutil.copy2(data, mixed / "region")
        shutil.copy2(f"{table}.slots", mixed / "region.slots")
        before = contents(mixed / "region")
        for recover in (True, False):
            with pytest.raises(RegionIOError, match="belongs to another region"):
                OverflowRegion(mixed / "region", recover=recover)
        with pytest.raises(RegionIOError, match="belongs to another region"):
            OverflowReader(mixed / "region")
        assert contents(mixed / "region") == before
        shutil.rmtree(mixed)


@pytest.mark.parametrize("kind", ["tmpfs", system("ext2"), system("xfs"), system("btrfs")])
def test_a_region_moves_to_and_from_each_file_system(closed: Path, tmp_path: Path, mount: Mount, kind: str) -> None:
    there = each_file(closed, mount(kind, 16) / "new", shutil.move)
    _is_whole(there)
    _is_whole(each_file(there, tmp_path / "back", shutil.move))


def test_where_files_have_no_attributes_the_place_counts(closed: Path, new_region: NewRegion, tmp_path: Path) -> None:
    os.removexattr(closed, IDENTITY)
    _is_whole(closed)  # the very file; it bears its identity again
    patch(closed, 144, 0, 0, 0, 0)
    os.removexattr(closed, IDENTITY)
    _is_whole(closed)
    assert len(os.getxattr(closed, IDENTITY)) == 16


@pytest.mark.system
def test_a_reader_on_an_overlay_whose_files_were_copied_up(closed: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    lower, parts = tmp_path / "lower", [tmp_path / name for name in ("upper", "work", "merged")]
    each_file(closed, lower, shutil.move)
    for folder in parts:
        folder.mkdir()
    options = f"lowerdir={lower},upperdir={parts[0]},workdir={parts[1]}"
    done = subprocess.run(
        ["mount", "-t", "overlay", "overlay", "-o", options, parts[2]], capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"no overlay: {done.stderr.strip()}")
    try:
        merged = parts[2] / "region"
        with OverflowReader(merged) as reader:
            assert reader.read_bytes(0) == blob(1000)
        for ending in ENDINGS:
            os.chmod(beside(merged, ending), 0o640)  # copies the file up
            with OverflowReader(merged) as reader:
                assert reader.read_bytes(0) == blob(1000)
        _is_whole(merged)
        _is_whole(merged)
    finally:
        subprocess.run(["umount", parts[2]], check=True)


# ---- one file is missing ----------------------------------------------------------------------------------------


def test_without_its_slot_table_a_region_starts_empty_or_says_so(closed: Path, new_region: NewRegion) -> None:
    beside(closed, ".slots").unlink()
    before = contents(closed)
    with pytest.raises(RegionIOError, match=r"slot table of the region is missing.*put it back") as caught:
        new_region(recover=True)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, f"{closed}.slots")
    assert contents(closed) == before
    region = new_region()
    assert len(region) == 0 and region.read(region.write(b"new", 0)) == b"new"


def test_a_reader_keeps_its_view_where_the_slot_table_was_removed(closed: Path, new_region: NewRegion) -> None:
    with OverflowReader(closed) as reader:
        leased, plain = reader.lease(0), reader.read(0)
        beside(closed, ".slots").unlink()
        region = new_region()
        region.write(b"\1" * 60_000, 0)
        assert bytes(leased.view) == blob(1000) and len(bytes(plain)) == 1000
        leased.release()


@pytest.mark.parametrize("recover", [False, True])
def test_without_its_leases_file_nothing_that_is_leased_is_overwritten(
    closed: Path, new_region: NewRegion, recover: bool
) -> None:
    with OverflowReader(closed) as reader, reader.lease(0) as view:
        beside(closed, ".leases").unlink()
        with pytest.raises(RegionIOError, match=r"leases file was removed.*close the readers") as caught:
            new_region(recover=recover)
        assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, f"{closed}.leases")
        assert bytes(view) == blob(1000)
        del view
    assert len(new_region(recover=recover)) == recover  # without readers nothing is leased


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_was_removed_is_not_shared(new_region: NewRegion, ending: str) -> None:
    region = new_region()
    slot = region.write(b"value", 0)
    region.share(slot)
    beside(str(region.path), ending).unlink()
    with pytest.raises(RegionIOError, match="was removed while the region is open") as caught:
        region.share(slot)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, f"{region.path}{ending}")
    assert region.read(slot) == b"value"


# ---- users and modes --------------------------------------------------------------------------------------------


def test_a_process_that_dropped_its_rights_makes_no_leases_file(tmp_path: Path, run_python: RunPython) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    let_others_in(tmp_path)
    tmp_path.chmod(0o777)
    script = """
    import errno, os, sys
    from nodedb_mem import OverflowRegion, RegionIOError
    before, after = OverflowRegion(sys.argv[1] + "/before"), OverflowRegion(sys.argv[1] + "/after")
    slots = [region.write(b"value", 0) for region in (before, after)]
    before.share(slots[0])
    os.setgid(65534)
    os.setuid(65534)
    before.share(before.write(b"more", 0))
    try:
        after.share(slots[1])
    except RegionIOError as error:
        assert error.errno == errno.EPERM and "changed its user" in str(error) and error.filename.endswith(".leases")
        print("refused")
    """
    assert run_python(script, tmp_path) == "refused\n"
    assert {name.stat().st_uid for name in tmp_path.iterdir()} == {0}
    for name in ("before", "after"):
        with OverflowRegion(tmp_path / name, recover=True) as region:
            assert region.read(0) == b"value"


@pytest.mark.parametrize("umask", [0o777, 0o077, 0o600, 0])
def test_the_owner_may_open_its_files_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with OverflowRegion(tmp_path / "region", initial_capacity=64 * KIB) as region:
            region.share(region.write(b"value", 0))
        with OverflowRegion.temporary(tmp_path, initial_capacity=64 * KIB) as region:
            assert os.stat(region.share(region.write(b"value", 0)).path).st_mode & 0o777 == 0o600
    finally:
        os.umask(before)
    assert [beside(tmp_path / "region", ending).stat().st_mode & 0o777 for ending in ENDINGS] == [0o600] * 3


# ---- paths ------------------------------------------------------------------------------------------------------


def test_a_removed_current_directory(tmp_path: Path, run_python: RunPython) -> None:
    script = """
    import errno, os, sys, tempfile
    from nodedb_mem import OverflowRegion, RegionIOError
    os.mkdir(sys.argv[1] + "/gone")
    os.chdir(sys.argv[1] + "/gone")
    os.rmdir(sys.argv[1] + "/gone")
    with OverflowRegion(sys.argv[1] + "/absolute") as region:
        assert region.share(region.write(b"value", 0)).path == sys.argv[1] + "/absolute"
    OverflowRegion.temporary(sys.argv[1]).close()
    for relative in ("relative", "./relative", ""):
        try:
            OverflowRegion(relative)
        except RegionIOError as error:
            assert error.errno == errno.ENOENT and error.filename == relative
        else:
            raise AssertionError
    """
    run_python(script, tmp_path)


def test_a_path_deeper_than_a_system_call_takes(tmp_path: Path, run_python: RunPython) -> None:
    script = """
    import errno, os, sys
    from nodedb_mem import OverflowReader, OverflowRegion, RegionIOError
    os.chdir(sys.argv[1])
    for _ in range(50):
        os.mkdir("d" * 100)
        os.chdir("d" * 100)
    with OverflowRegion("region") as region:
        slot = region.write(b"value", 0)
        try:
            region.share(slot)
        except RegionIOError as error:
            assert error.errno == errno.ENAMETOOLONG and error.filename == "region"
        else:
            raise AssertionError
    with OverflowRegion("region", recover=True) as region:
        assert region.read(slot) == b"value"
    with OverflowReader("region") as reader:
        assert reader.read_bytes(slot) == b"value"
    """
    run_python(script, tmp_path)


def test_no_folder_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", refuse)
    with pytest.raises(RegionIOError, match="folder for temporary files") as caught:
        OverflowRegion.temporary()
    assert caught.value.errno == errno.ENOENT


# ---- sizes ------------------------------------------------------------------------------------------------------


def test_the_initial_capacity_counts_for_a_new_file_only(closed: Path, tmp_path: Path) -> None:
    for initial, maximum in ((0, 1 << 20), (1 << 20, 8192), (0, 1)):
        with OverflowRegion.open_with_config(closed, initial, maximum) as region:
            assert (region.capacity, region.max_capacity) == (64 * KIB, maximum)
    with OverflowRegion.open_with_capacity(closed, 0, recover=True) as region:
        assert region.capacity == 64 * KIB
    (tmp_path / "empty").touch()
    for name in ("empty", "new"):
        for initial, maximum in ((0, 1 << 20), (4096, 1024)):
            with pytest.raises(RegionSizeError, match="initial_capacity"):
                OverflowRegion.open_with_config(tmp_path / name, initial, maximum)
    assert not (tmp_path / "new").exists() and not (tmp_path / "empty.slots").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"initial_capacity": 0},
        {"initial_capacity": -1},
        {"max_capacity": 0},
        {"max_capacity": 1 << 63},
        {"initial_capacity": 1 << 20, "max_capacity": 1 << 10},
        {"alignment": 3},
        {"alignment": 8192},
        {"cache_limit": -1},
    ],
)
def test_a_wrong_size_is_a_region_error_and_a_value_error(tmp_path: Path, wrong: dict[str, int]) -> None:
    for kind in (RegionError, ValueError, RegionSizeError):
        with pytest.raises(kind):
            OverflowRegion(tmp_path / "region", **wrong)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_wrong_size_of_a_verb_is_a_size_error(new_region: NewRegion) -> None:
    region = new_region()
    for size in (-1, 1 << 63):
        with pytest.raises(RegionSizeError, match="size"):
            region.allocate(size, 0)
    with pytest.raises(RegionSizeError, match="budget"):
        region.compact(-1)
    with pytest.raises(RegionSizeError):
        region.max_capacity = 4096
    with pytest.raises(RegionSizeError):
        region.max_capacity = -1


def test_every_constructor_takes_the_other_options(tmp_path: Path) -> None:
    options: dict[str, Any] = {"alignment": 16, "cache_limit": None}
    tuning = MemoryTuning(64 * KIB, MIB)
    for number, make in enumerate(
        [
            lambda path, **more: OverflowRegion(path, initial_capacity=64 * KIB, **more),
            lambda path, **more: OverflowRegion.open(path, initial_capacity=64 * KIB, **more),
            lambda path, **more: OverflowRegion.open_with_capacity(path, 64 * KIB, **more),
            lambda path, **more: OverflowRegion.open_with_config(path, 64 * KIB, MIB, **more),
            lambda path, **more: OverflowRegion.open_with_tuning(path, tuning, **more),
        ]
    ):
        with make(tmp_path / str(number), **options) as region:
            first, slot = region.write(b"x", 0), region.write(b"value", 0)
            assert (region.slot(first).offset, region.slot(slot).offset) == (0, 16)
        with make(tmp_path / str(number), **options, recover=True) as region:
            assert region.read(slot) == b"value"
    with OverflowRegion.temporary(tmp_path, **options) as region:
        assert region.slot(region.write_many([b"x"] * 2, 0)[1]).offset == 16
    assert (OverflowRegion.DEFAULT_INITIAL_CAPACITY, OverflowRegion.DEFAULT_MAX_CAPACITY) == (64 * MIB, 1024 * MIB)
