"""Leases where the owner's books, the system's limits or the leases file itself could cost a reader its bytes."""

from __future__ import annotations

import errno
import os
import resource
import struct
from pathlib import Path

import pytest

from kit import Check, NewRegion, StartPython
from nodedb_mem import OverflowReader, OverflowRegion, RegionIOError, StaleSlotError

KIB, MIB = 1 << 10, 1 << 20
SIZE = 100_000

# Leases the value that it is told of, and keeps it until it is killed.
_HOLDER = """
import sys
from nodedb_mem import OverflowReader
lease = OverflowReader(sys.argv[1]).lease(int(sys.argv[2]))
print("leased", flush=True)
sys.stdin.read()
"""


def blob(seed: int, size: int = SIZE) -> bytes:
    return seed.to_bytes(1, "little") * size


def overwrite(region: OverflowRegion) -> None:
    """Write where nobody keeps anything."""
    for slot in [region.write(b"\xff" * SIZE, 0) for _ in range(6)]:
        region.free(slot)
    region.compact()
    region.trim()


@pytest.mark.parametrize("before", [False, True], ids=["after a value", "after a hole"])
@pytest.mark.parametrize("many", [False, True], ids=["write", "write_many"])
def test_growing_takes_a_dead_readers_lease_next_to_the_last_hole(
    new_region: NewRegion, start_python: StartPython, check: Check, before: bool, many: bool
) -> None:
    region = new_region(initial_capacity=MIB, max_capacity=64 * MIB)
    first, hole, leased, last = (region.write(blob(i, 300 * KIB - i), 0) for i in range(4))
    region.share(leased)
    child = start_python(_HOLDER, region.path, leased)
    assert child.stdout.readline() == "leased\n"
    for slot in (leased, last, hole)[: 3 if before else 2]:
        region.free(slot)
    child.kill()
    child.wait()
    values = [blob(5, 2 * MIB), blob(6, 2 * MIB)]  # the first goes to the last hole, which is too short for it
    slots = region.write_many(values, 0) if many else [region.write(value, 0) for value in values]
    check(region)
    assert region.stats().pinned_bytes == 0
    assert [region.read_bytes(slot) for slot in slots] == values
    assert region.read_bytes(first) == blob(0, 300 * KIB)


@pytest.mark.parametrize("recover", [False, True])
def test_a_lease_of_a_region_that_has_shared_nothing_yet(new_region: NewRegion, recover: bool) -> None:
    region = new_region()
    region.share(region.write(blob(1), 0))
    region.close()
    region = new_region(recover=recover)  # the leases file is there
    slot = region.write(blob(2), 0)
    with OverflowReader(region.path) as reader, reader.lease(slot) as view:
        region.free(slot)
        overwrite(region)
        region.share(region.write(b"value", 0))
        overwrite(region)
        assert bytes(view) == blob(2)
    assert region.stats().pinned_bytes == 0


@pytest.mark.parametrize("recover", [False, True])
def test_what_is_leased_is_kept_when_files_run_out(new_region: NewRegion, recover: bool) -> None:
    region = new_region()
    slot = region.write(blob(1), 0)
    region.share(slot)
    with OverflowReader(region.path) as reader, reader.lease(slot) as view:
        region.free(slot)
        region.close()
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = max(map(int, os.listdir("/proc/self/fd")))
        fillers = [os.dup(0)]
        while fillers[-1] <= used:  # the limit is on numbers, and some are free below
            fillers.append(os.dup(0))
        refused, used = 0, fillers[-1] + 1
        for room in range(6):
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + room, limits[1]))
            try:
                region = new_region(recover=recover)
            except RegionIOError as error:
                assert error.errno == errno.EMFILE
                refused += 1
                continue
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            overwrite(region)
            assert bytes(view) == blob(1)
            region.close()
        for filler in fillers:
            os.close(filler)
        assert refused > 0


def test_values_stay_while_readers_cannot_be_told_that_they_go(new_region: NewRegion) -> None:
    region = new_region()
    ref = region.share(region.write(blob(1), 0))
    with OverflowReader(ref) as reader:
        region.close()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
        try:
            with pytest.raises(RegionIOError) as caught:
                new_region()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert caught.value.errno == errno.EFBIG
        assert reader.read_bytes(ref) == blob(1)
        assert new_region(recover=True).read_bytes(ref.slot) == blob(1)


def test_an_empty_value_with_a_place_is_torn(new_region: NewRegion) -> None:
    region = new_region()
    region.write(b"", 0)
    region.close()
    with open(f"{region.path}.slots", "r+b") as file:
        file.seek(4096)
        file.write(struct.pack("=Q", 8192))
    with pytest.raises(RegionIOError, match="an empty value has a place") as caught:
        new_region(recover=True)
    assert caught.value.errno == errno.EUCLEAN


def test_a_table_whose_owner_died_while_it_grew_gets_its_blocks(new_region: NewRegion) -> None:
    region = new_region()
    slot = region.write(blob(1), 0)
    region.close()
    os.truncate(f"{region.path}.slots", MIB)
    region = new_region(recover=True)
    assert os.stat(f"{region.path}.slots").st_blocks * 512 >= MIB
    assert region.read_bytes(slot) == blob(1)


@pytest.mark.parametrize("recover", [False, True])
def test_a_sparse_copy_of_the_leases_gets_its_blocks(new_region: NewRegion, tmp_path: Path, recover: bool) -> None:
    region = new_region()
    region.share(region.write(blob(1), 0))
    region.close()
    leases = tmp_path / "region.leases"
    whole = leases.read_bytes()
    leases.unlink()
    leases.write_bytes(whole[:32])
    os.truncate(leases, len(whole))
    region = new_region(recover=recover)
    assert leases.stat().st_blocks * 512 >= len(whole)
    with OverflowReader(region.path) as reader, reader.lease(region.write(blob(2), 0)) as view:
        assert bytes(view) == blob(2)


@pytest.mark.parametrize("recover", [False, True])
def test_a_leases_file_of_another_user_is_refused(new_region: NewRegion, tmp_path: Path, recover: bool) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to be somebody else")
    region = new_region()
    region.share(region.write(blob(1), 0))
    region.close()
    os.chown(tmp_path / "region.leases", 65534, 65534)
    with pytest.raises(RegionIOError, match="another user") as caught:
        new_region(recover=recover)  # who may cut it short under the owner
    assert caught.value.errno == errno.EPERM
    (tmp_path / "region.leases").rename(tmp_path / "other")
    region = new_region(recover=True)
    (tmp_path / "other").rename(tmp_path / "region.leases")
    with pytest.raises(RegionIOError, match="another user"):
        region.share(0)
    assert region.read_bytes(0) == blob(1)


def test_a_reader_of_files_that_were_replaced_leases_nothing(new_region: NewRegion, tmp_path: Path) -> None:
    region = new_region()
    ref = region.share(region.write(blob(1), 0))
    with OverflowReader(ref) as reader:
        for name in ("region", "region.slots", "region.leases"):
            (tmp_path / name).unlink()
        other = new_region()
        other.share(other.write(blob(2), 0))
        with pytest.raises((RegionIOError, StaleSlotError)):
            reader.lease(ref)
        with OverflowReader(other.path) as second:
            assert second.stats().leases == 0
