"""Whoever may lease may write to the leases file: what that can do to the owner, to values and to other readers."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import struct
from pathlib import Path

import pytest

from kit import Check, NewRegion, RunPython, StartPython
from nodedb_mem import OverflowReader, OverflowRegion, RegionIOError, StaleSlotError

KIB, MIB = 1 << 10, 1 << 20
SIZE = 100_000
FULL = 32 + 2000 * 32  # bytes of a whole leases file

# What a process with write access to the file can do to it.
DAMAGES = {
    "emptied": "os.truncate(leases, 0)",
    "cut in the mark": "os.truncate(leases, 5)",
    "cut in the header": "os.truncate(leases, 12)",
    "no entries": "os.truncate(leases, 32)",
    "cut in an entry": "os.truncate(leases, 32 + 40)",
    "one page": "os.truncate(leases, 4096)",
    "a terabyte": "os.truncate(leases, 1 << 40)",
    "punched": "os.truncate(leases, 0); os.truncate(leases, full)",
    "ones": "open(leases, 'r+b').write(b'\\xff' * full)",
    "removed": "os.unlink(leases)",
}

# The owner at work after that; prints "done" when it has survived, with all values as they were.
_OWNER = """
import errno, os, sys
from nodedb_mem import OverflowReader, OverflowRegion, RegionError, RegionIOError
path, damage, verb, full = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
leases = path + ".leases"
region = OverflowRegion(path, initial_capacity=1 << 16, max_capacity=1 << 24)
values = {region.write(bytes([i]) * 100_000, 0): bytes([i]) * 100_000 for i in range(6)}
region.share(0)
reader = OverflowReader(path)
held, gone = reader.lease(1), reader.lease(3)
del values[3]
region.free(3)
exec(damage)
match verb:
    case "free":
        for slot in (0, 1):
            region.free(slot)
            del values[slot]
    case "compact":
        region.free(0)
        del values[0]
        region.compact()
    case "trim":
        region.trim()
    case "write":
        for i in range(40):
            value = bytes([100 + i]) * 300_000
            values[region.write(value, 0)] = value
    case "share":
        try:
            region.share(2)
        except RegionError as error:
            print(error, file=sys.stderr)
    case "release":
        held.release()
        gone.release()
    case "lease":
        for slot in (0, 1, 2):
            try:
                reader.lease(slot).release()
            except RegionError as error:
                print(error, file=sys.stderr)
    case "close" | "recover" | "anew":
        region.close()
if verb in ("recover", "anew") and not os.path.exists(leases):
    try:  # nobody can know what the reader leases: nothing may be overwritten
        OverflowRegion(path, recover=verb == "recover")
    except RegionIOError as error:
        assert error.errno == errno.ENOENT and error.filename == leases
    else:
        raise AssertionError("opened over a reader's leases")
    reader.close()
    del held, gone  # the views of the leases keep the table locked
if verb == "recover":
    region = OverflowRegion(path, initial_capacity=1 << 16, max_capacity=1 << 24, recover=True)
if verb == "anew":
    region = OverflowRegion(path, initial_capacity=1 << 16, max_capacity=1 << 24)
    values = {region.write(bytes([50 + i]) * 100_000, 0): bytes([50 + i]) * 100_000 for i in range(6)}
if verb != "close":
    assert {slot: region.read_bytes(slot) for slot in values} == values
    from nodedb_mem._core import lib
    assert lib.ndm_region_check(region._handle) == 0
print("done")
"""


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "verb", ["free", "compact", "trim", "write", "share", "release", "lease", "close", "recover", "anew"]
)
def test_the_owner_survives_and_keeps_its_values(
    start_python: StartPython, tmp_path: Path, damage: str, verb: str
) -> None:
    owner = start_python(_OWNER, tmp_path / "region", DAMAGES[damage], verb, FULL)
    assert owner.stdout.read() == "done\n" and owner.wait() == 0


def test_another_readers_lease_is_lost_at_most(new_region: NewRegion, check: Check) -> None:
    region = new_region()
    slots = [region.write(bytes([i]) * SIZE, 0) for i in range(4)]
    region.share(slots[0])
    with OverflowReader(region.path) as reader:
        lease = reader.lease(slots[1])
        os.truncate(f"{region.path}.leases", 0)
        assert reader.stats().leases == 0 and reader.leased() == []
        region.free(slots[1])
        assert region.stats().pinned_bytes == 0
        lease.release()
        with reader.lease(slots[2]) as view:  # one that has the file open makes it grow again
            region.free(slots[2])
            assert region.stats().pinned_bytes >= SIZE
            assert bytes(view) == b"\2" * SIZE
        assert region.stats().pinned_bytes == 0
    check(region)


@pytest.mark.parametrize("length", [0, 5, 12, 32, 4096, FULL - 1])
def test_share_mends_a_file_that_was_cut_short(new_region: NewRegion, length: int) -> None:
    region = new_region()
    slot = region.write(b"value", 0)
    region.share(slot)
    leases = f"{region.path}.leases"
    os.truncate(leases, length)
    region.share(slot)
    assert os.stat(leases).st_size == FULL
    with OverflowReader(region.path) as reader, reader.lease(slot):
        assert reader.stats().leases == 1


@pytest.mark.parametrize("recover", [False, True])
@pytest.mark.parametrize("length", [16, 32, 4096, FULL - 1, FULL + 1, 1 << 40])
def test_a_file_of_another_length_is_used_and_completed(new_region: NewRegion, length: int, recover: bool) -> None:
    region = new_region()
    region.share(region.write(b"value", 0))
    region.close()
    leases = f"{region.path}.leases"
    os.truncate(leases, length)
    region = new_region(recover=recover)
    assert os.stat(leases).st_size == max(length, FULL)
    slot = region.write(b"v" * SIZE, 0)
    with OverflowReader(region.path) as reader, reader.lease(slot) as view:
        region.free(slot)
        assert region.stats().pinned_bytes >= SIZE
        assert bytes(view) == b"v" * SIZE


def test_entries_that_nobody_claims_keep_nothing(new_region: NewRegion) -> None:
    """The kernel knows who lives: what is written into an entry counts only under a lock."""
    region = new_region()
    slots = [region.write(bytes([i]) * SIZE, 0) for i in range(3)]
    ref = region.share(slots[1])
    with open(f"{region.path}.leases", "r+b") as file:
        for entry in range(2000):
            file.seek(32 + 32 * entry)
            file.write(struct.pack("=4Q", slots[1] + 1 | ref.generation << 32, ref.incarnation, 0, 1 << 40))
        file.flush()
        region.free(slots[1])
        assert region.stats().pinned_bytes == 0
        with OverflowReader(region.path) as reader, reader.lease(slots[0]):
            assert reader.stats().leases == 1
            region.compact()
            region.free(slots[0])
            assert region.stats().pinned_bytes >= SIZE
            held = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 7, 1, 0)
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, held)  # claimed, and a lie
            region.free(slots[2])
    region.trim()
    assert region.stats().pinned_bytes == 0


def test_who_may_only_read_the_leases_can_neither_hold_nor_end_one(new_region: NewRegion, check: Check) -> None:
    region = new_region()
    slots = [region.write(bytes([i]) * SIZE, 0) for i in range(4)]
    region.share(slots[0])
    region.close()
    region = new_region(recover=True)
    with OverflowReader(region.path) as reader, open(f"{region.path}.leases", "rb") as file:
        lease = reader.lease(slots[1])
        everything = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 1, 0, 0)
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, everything)  # all but the byte of the first entry, which is leased
        assert reader.stats().leases == 1 and len(reader.leased()) == 1
        region.free(slots[1])
        assert region.stats().pinned_bytes >= SIZE and bytes(lease.view) == b"\1" * SIZE
        with pytest.raises(RegionIOError, match="all leases are taken") as caught:
            reader.lease(slots[2])  # what it can do: let no others lease
        assert caught.value.errno == errno.EAGAIN
        lease.release()
        assert region.stats().pinned_bytes == 0 and reader.stats().leases == 0
        region.free(slots[2])
        assert region.stats().pinned_bytes == 0
        region.compact()
        check(region)


def test_leases_beside_a_process_that_cuts_the_file_short_all_the_time(
    new_region: NewRegion, start_python: StartPython, check: Check
) -> None:
    chance = random.Random(5)
    region = new_region()
    live = {region.write(bytes([i]) * SIZE, 0): bytes([i]) * SIZE for i in range(12)}
    region.share(0)
    reader = OverflowReader(region.path)
    lease = reader.lease(0)  # so that it has the file open
    cutter = start_python(
        """
        import os, random, sys
        chance = random.Random(1)
        print("ready", flush=True)
        while True:
            os.truncate(sys.argv[1], chance.choice([0, 16, 32, 4096, 64_032, 1 << 30]))
        """,
        f"{region.path}.leases",
    )
    assert cutter.stdout.readline() == "ready\n"
    taken = 0
    for step in range(3000):
        try:
            lease = reader.lease(chance.choice(list(live)))
            taken += 1
            if chance.random() < 0.8:
                lease.release()
        except (RegionIOError, StaleSlotError):
            pass
        if chance.random() < 0.3:
            slot = chance.choice(list(live))
            region.free(slot)
            del live[slot]
            value = bytes([step % 256]) * (SIZE + step)
            live[region.write(value, 0)] = value
        if step % 100 == 0:
            region.compact()
            region.trim()
    del lease
    reader.close()
    cutter.kill()
    cutter.wait()
    assert {slot: region.read_bytes(slot) for slot in live} == live
    check(region)
    region.trim()
    assert region.stats().pinned_bytes == 0
    assert taken > 0


def test_a_lease_on_a_full_disk_is_an_error(new_region: NewRegion, run_python: RunPython, tmp_path: Path) -> None:
    with OverflowRegion.open(tmp_path / "region", initial_capacity=MIB) as region:
        slot = region.write(b"value", 0)
        region.share(slot)
        path = region.path
        os.truncate(f"{path}.leases", 16)
        script = """
            import resource, sys
            from nodedb_mem import OverflowReader, RegionIOError
            reader = OverflowReader(sys.argv[1])
            resource.setrlimit(resource.RLIMIT_FSIZE, (16, resource.RLIM_INFINITY))
            try:
                reader.lease(int(sys.argv[2]))
            except RegionIOError as error:
                print(error.errno, error.filename == sys.argv[1] + ".leases", reader.stats().leases)
            """
        assert run_python(script, path, slot) == f"{errno.EFBIG} True 0\n"
