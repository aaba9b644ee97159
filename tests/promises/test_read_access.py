"""What a process with read access alone can do to the owner, and what it cannot."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kit import Check, NewRegion, StartPython
from nodedb_mem import OverflowReader, RegionBusyError

# Opens files for reading only, and locks them in every way that this allows.
_LOCKER = """
import contextlib, fcntl, os, struct, sys
files = [open(name, "rb") for name in sys.argv[2:]]
for file in files:
    with contextlib.suppress(BlockingIOError):  # the owner has it
        if "flock" in sys.argv[1]:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    with contextlib.suppress(BlockingIOError):
        if "bytes" in sys.argv[1]:
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0))
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(("lock", "suffix"), [("flock", ""), ("bytes", ".slots")], ids=["the data", "the slot table"])
@pytest.mark.parametrize("recover", [False, True])
def test_a_lock_of_a_reader_keeps_an_owner_out_and_is_named(
    new_region: NewRegion, start_python: StartPython, tmp_path: Path, lock: str, suffix: str, recover: bool
) -> None:
    """The documented worst: no exclusive lock is out of reach for who may read the file."""
    region = new_region()
    slot = region.write(b"value", 0)
    region.close()
    child = start_python(_LOCKER, lock, f"{region.path}{suffix}")
    assert child.stdout.readline() == "locked\n"
    with pytest.raises(RegionBusyError, match=str(child.pid)) as caught:
        new_region(recover=recover)
    assert caught.value.holders == () and caught.value.readers == (child.pid,)
    with OverflowReader(region.path) as reader:  # nothing has been changed
        assert reader.read_bytes(slot) == b"value" and reader.stats().owner is None
    child.kill()
    child.wait()
    assert (slot in new_region(recover=recover)) == recover


@pytest.mark.parametrize("recover", [False, True])
def test_no_lock_of_a_reader_lets_a_second_owner_in(
    new_region: NewRegion, start_python: StartPython, recover: bool
) -> None:
    region = new_region()
    slot = region.write(b"value", 0)
    region.share(slot)
    names = [f"{region.path}{suffix}" for suffix in ("", ".slots", ".leases")]
    child = start_python(_LOCKER, "bytes", *names[:1], names[2])
    assert child.stdout.readline() == "locked\n"
    with pytest.raises(RegionBusyError) as caught:
        new_region(recover=recover)
    assert os.getpid() in caught.value.holders
    assert region.read_bytes(slot) == b"value"


def test_an_owner_at_work_is_not_stopped(new_region: NewRegion, start_python: StartPython, check: Check) -> None:
    region = new_region()
    region.share(region.write(b"value", 0))
    names = [f"{region.path}{suffix}" for suffix in ("", ".slots", ".leases")]
    for number, lock in enumerate(("flock bytes", "bytes", "flock")):
        for name in names:  # some are refused: the owner has them
            assert start_python(_LOCKER, lock, name).stdout.readline() == "locked\n"
        values = {region.write(bytes([number]) * size, 0): bytes([number]) * size for size in (10, 100_000, 3_000_000)}
        region.free(min(values))
        region.compact()
        region.trim()
        region.share(max(values))
        assert all(region.read_bytes(slot) == value for slot, value in values.items() if slot in region)
        check(region)
    region.close()
