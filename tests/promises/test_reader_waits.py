"""Readers wait neither for ever nor deaf: locks, moves that do not end, long tables, files that are something else."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kit import NewRegion, RunPython, StartPython, system
from nodedb_mem import (
    InvalidSlotError,
    OverflowReader,
    OverflowRegion,
    RegionBusyError,
    RegionClosedError,
    RegionIOError,
    StaleSlotError,
)

KIB, MIB = 1 << 10, 1 << 20
HEADER, RECORD = 4096, 24
COUNT = 56  # where the header has the number of records
UNUSED, LIVE, FREED, DRAFT, MOVING = range(5)


class AlarmError(Exception):
    """A signal was heard."""


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise `AlarmError` in the main thread after some time, from a signal handler."""

    def handler(*_: object) -> None:
        raise AlarmError

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def set_state(region: OverflowRegion, slot: int, state: int) -> None:
    with open(f"{region.path}.slots", "r+b") as file:
        file.seek(HEADER + RECORD * slot + 15)
        file.write(bytes([state]))


VERBS: dict[str, Any] = {
    "read": lambda reader, slot: reader.read(slot),
    "read_bytes": lambda reader, slot: reader.read_bytes(slot),
    "borrow": lambda reader, slot: reader.borrow(slot).__enter__(),
    "lease": lambda reader, slot: reader.lease(slot),
    "slots": lambda reader, slot: reader.slots(),
}


# ---- values on the move ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_a_signal_is_heard_while_a_value_is_on_the_move(new_region: NewRegion, verb: str) -> None:
    region = new_region()
    slot = region.write(b"value", 0)
    ref = region.share(slot)
    with OverflowReader(region.path) as reader:
        set_state(region, slot, MOVING)
        with alarm(0.1), pytest.raises(AlarmError):
            reader.is_current(ref)
        with alarm(0.1), pytest.raises(AlarmError):
            VERBS[verb](reader, slot)
        set_state(region, slot, LIVE)
        assert reader.read_bytes(slot) == b"value" and reader.stats().leases == 0


def test_what_waits_goes_on_when_the_move_has_ended(new_region: NewRegion) -> None:
    region = new_region()
    slot = region.write(b"value", 0)
    with OverflowReader(region.path) as reader:
        set_state(region, slot, MOVING)
        timer = threading.Timer(0.2, set_state, (region, slot, LIVE))
        timer.start()
        assert reader.read_bytes(slot) == b"value"
        timer.join()


def test_a_reader_serves_others_while_one_thread_waits(new_region: NewRegion) -> None:
    region = new_region()
    slot, other = region.write(b"value", 0), region.write(b"other", 0)
    results: list[object] = []
    with OverflowReader(region.path) as reader:
        set_state(region, slot, MOVING)

        def wait() -> None:
            try:
                reader.read_bytes(slot)
            except Exception as error:
                results.append(error.with_traceback(None))

        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.05)
        assert reader.read_bytes(other) == b"other" and bytes(reader.read(other)) == b"other"
        assert waiting.is_alive()
        reader.close()  # ends the waiting, too
        waiting.join(5)
        assert not waiting.is_alive() and [type(error) for error in results] == [RegionClosedError]
        set_state(region, slot, LIVE)


@pytest.mark.parametrize("verb", VERBS)
def test_an_owner_that_died_while_it_moved_a_value_is_stale_at_once(new_region: NewRegion, verb: str) -> None:
    region = new_region()
    slot, other = region.write(b"value", 0), region.write(b"other", 0)
    ref = region.share(slot)
    set_state(region, slot, MOVING)
    region.close()
    with OverflowReader(region.path) as reader:
        with pytest.raises(StaleSlotError, match="died while it moved"):
            VERBS[verb](reader, slot)
        assert not reader.is_current(ref)
        assert reader.read_bytes(other) == b"other"


def test_who_may_only_read_cannot_pass_for_a_living_owner(new_region: NewRegion) -> None:
    region = new_region()
    slot = region.write(b"value", 0)
    set_state(region, slot, MOVING)
    region.close()
    with OverflowReader(region.path) as reader, open(f"{region.path}.slots", "rb") as file:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 0, 1, 0))
        assert reader.stats().owner is None
        with pytest.raises(StaleSlotError, match="died"):
            reader.read(slot)


@pytest.mark.system
def test_a_move_that_does_not_end_is_stale_after_ten_seconds(new_region: NewRegion) -> None:
    region = new_region()
    slot = region.write(b"value", 0)
    with OverflowReader(region.path) as reader:
        set_state(region, slot, MOVING)
        for verb in (reader.read_bytes, lambda _: reader.slots()):
            with pytest.raises(StaleSlotError, match="is being moved"):
                verb(slot)
        set_state(region, slot, LIVE)


def test_a_stopped_owner_stops_nobody(new_region: NewRegion, start_python: StartPython, tmp_path: Path) -> None:
    """An owner that moves large values all the time is stopped at any moment: signals are heard, values are whole."""
    owner = start_python(
        """
        import sys
        from nodedb_mem import OverflowRegion
        region = OverflowRegion(sys.argv[1], initial_capacity=1 << 26, max_capacity=1 << 27)
        slots = [region.write(bytes([i]) * (4 << 20), 0) for i in range(6)]
        print("ready", flush=True)
        while True:
            region.free(slots.pop(0))
            region.compact()
            slots.append(region.write(bytes([slots[-1] % 251]) * (4 << 20), 0))
        """,
        tmp_path / "region",
    )
    assert owner.stdout.readline() == "ready\n"
    with OverflowReader(tmp_path / "region") as reader:
        for _ in range(20):
            time.sleep(0.003)
            os.kill(owner.pid, signal.SIGSTOP)
            try:
                with alarm(0.03):
                    for slot in range(6):
                        try:
                            value = reader.read_bytes(slot)
                            assert value == value[:1] * len(value)
                        except (InvalidSlotError, StaleSlotError):
                            pass
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except AlarmError:
                pass
            os.kill(owner.pid, signal.SIGCONT)


# ---- opening --------------------------------------------------------------------------------------------------


def test_a_signal_is_heard_while_readers_are_kept_out(new_region: NewRegion) -> None:
    region = new_region()
    slot = region.write(b"value", 0)
    with open(f"{region.path}.slots", "rb") as file:  # read access is enough
        fcntl.flock(file, fcntl.LOCK_EX)
        with alarm(0.1), pytest.raises(AlarmError):
            OverflowReader(region.path)
        timer = threading.Timer(0.2, fcntl.flock, (file, fcntl.LOCK_UN))
        timer.start()
        with OverflowReader(region.path) as reader:
            assert reader.read_bytes(slot) == b"value"
        timer.join()


@pytest.mark.system
def test_readers_that_are_kept_out_for_ten_seconds_are_told_by_whom(
    new_region: NewRegion, start_python: StartPython
) -> None:
    region = new_region()
    child = start_python(
        """
        import fcntl, sys
        file = open(sys.argv[1], "rb")
        fcntl.flock(file, fcntl.LOCK_EX)
        print("locked", flush=True)
        sys.stdin.read()
        """,
        f"{region.path}.slots",
    )
    assert child.stdout.readline() == "locked\n"
    with pytest.raises(RegionBusyError, match=str(child.pid)) as caught:
        OverflowReader(region.path)
    assert caught.value.holders == (child.pid,) and caught.value.path == f"{region.path}.slots"
    region.write(b"the owner", 0)
    region.trim()


def test_a_reference_whose_files_are_others_is_refused_at_once(new_region: NewRegion, tmp_path: Path) -> None:
    region, other = new_region(), new_region("other")
    ref, foreign = region.share(region.write(bytes(9000), 0)), other.share(other.write(b"other", 0))
    (tmp_path / "text").write_bytes(b"text" * 4000)
    os.mkfifo(tmp_path / "fifo")
    os.symlink(ref.path, tmp_path / "link")
    names = ["text", "fifo", "link"]
    wrong = [ref.path, ref.leases_path, foreign.slots_path, str(tmp_path), *(str(tmp_path / name) for name in names)]
    with alarm(10):
        for path in wrong:
            with pytest.raises(RegionIOError) as caught:
                OverflowReader(ref._replace(slots_path=path))
            assert caught.value.filename == path
        for path in (ref.slots_path, ref.leases_path, foreign.path, str(tmp_path / "text")):
            whose = "another region" if path == foreign.path else "another file"
            with pytest.raises(RegionIOError, match=whose):
                OverflowReader(ref._replace(path=path))
        for path in (*wrong[:1], *wrong[2:], ref.slots_path, foreign.path):
            with OverflowReader(ref._replace(leases_path=path)) as reader:
                with pytest.raises(RegionIOError) as caught:
                    reader.lease(ref)
                assert caught.value.filename == path
    assert region.read_bytes(ref.slot) == bytes(9000) and other.read_bytes(foreign.slot) == b"other"


def test_a_value_that_looks_like_leases_is_not_written_to(new_region: NewRegion) -> None:
    region = new_region(alignment=1)
    likeness = b"NDMLEASE" + struct.pack("=3Q", 3, 1, 0) + bytes(64_000)
    slot = region.write(likeness, 0)  # at the file's start
    ref = region.share(slot)
    with OverflowReader(ref._replace(leases_path=ref.path)) as reader:
        with pytest.raises(RegionIOError, match="not a leases file") as caught:
            reader.lease(ref)
        assert caught.value.errno == errno.EINVAL
    assert region.read_bytes(slot) == likeness


# ---- tables that lie ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1 << 20, 1 << 36, 1 << 40])
def test_a_sparse_table_is_torn(new_region: NewRegion, size: int) -> None:
    region = new_region()
    region.write(b"value", 0)
    region.close()
    table = f"{region.path}.slots"
    os.truncate(table, size)
    with open(table, "r+b") as file:
        file.seek(COUNT)
        file.write(struct.pack("=Q", (size - HEADER) // RECORD))
    with alarm(10):
        try:
            reader = OverflowReader(region.path)
        except RegionIOError as error:
            assert error.errno == errno.EINVAL and size == 1 << 40  # more slots than can be numbered
            return
        with reader:
            assert reader.read_bytes(0) == b"value"
            for verb in (
                reader.slots,
                lambda: reader.read(1),
                lambda: reader.read_bytes((size - HEADER) // RECORD - 1),
            ):
                with pytest.raises(RegionIOError, match="torn") as caught:
                    verb()
                assert caught.value.errno == errno.EUCLEAN and caught.value.filename == table


def test_a_long_table_of_freed_slots_hears_signals_and_is_complete(new_region: NewRegion) -> None:
    region = new_region(alignment=1, max_capacity=1 << 26)
    region.free_many(region.write_many([b"x"] * 1_000_000, 0))
    with OverflowReader(region.path) as reader:
        assert reader.slots() == []
        set_state(region, 999_999, LIVE)
        assert [found.slot for found in reader.slots()] == [999_999]
        set_state(region, 999_999, FREED)
        with alarm(0.05), pytest.raises(AlarmError):
            while True:
                reader.slots()


@pytest.mark.parametrize("state", [UNUSED, 5, 255])
def test_a_record_without_a_known_state_is_torn(new_region: NewRegion, state: int) -> None:
    region = new_region()
    slot, other = region.write(b"value", 0), region.write(b"other", 0)
    ref = region.share(slot)
    with OverflowReader(region.path) as reader:
        set_state(region, slot, state)
        for verb in (reader.read, reader.read_bytes, reader.lease):
            for name in (slot, ref):
                with pytest.raises(RegionIOError, match="torn"):
                    verb(name)
        with pytest.raises(RegionIOError, match="torn"):
            reader.slots()
        assert reader.read_bytes(other) == b"other"
        set_state(region, slot, LIVE)


def test_slots_are_listed_whole_or_not_at_all(run_python: RunPython, tmp_path: Path) -> None:
    script = """
        import errno, resource, sys
        from nodedb_mem import OverflowReader, OverflowRegion, RegionIOError
        region = OverflowRegion(sys.argv[1], initial_capacity=1 << 20)
        region.write(b"a", 0)
        reader = OverflowReader(sys.argv[1])
        assert len(reader.slots()) == 1
        region.write_many([b"b"] * 100_000, 0)  # the table outgrows what the reader has mapped
        size = int(open("/proc/self/statm").read().split()[0]) * 4096
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 20), hard))
        try:
            print(len(reader.slots()))
        except RegionIOError as error:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
            print(error.errno == errno.ENOMEM, error.filename == sys.argv[1] + ".slots")
        print(len(reader.slots()))
        """
    assert run_python(script, tmp_path / "region") == "True True\n100001\n"


def test_freed_and_uncommitted_slots_are_passed_over(new_region: NewRegion) -> None:
    region = new_region()
    slots = [region.write(b"value", 0) for _ in range(5)]
    draft, view = region.allocate(10, 0)
    region.free(slots[0])
    region.free(slots[3])
    with OverflowReader(region.path) as reader:
        assert [found.slot for found in reader.slots()] == [slots[1], slots[2], slots[4]]
        view.release()
        region.commit(draft)
        assert [found.slot for found in reader.slots()] == [slots[1], slots[2], slots[4], draft]


# ---- files that were cut short under a reader -----------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 100, HEADER - 1, HEADER, HEADER + RECORD, HEADER + 10 * RECORD])
def test_a_table_cut_short_under_a_reader_is_an_error(run_python: RunPython, tmp_path: Path, length: int) -> None:
    script = """
        import os, sys
        from nodedb_mem import OverflowReader, OverflowRegion, RegionIOError, StaleSlotError
        path, length = sys.argv[1], int(sys.argv[2])
        region = OverflowRegion(path, initial_capacity=1 << 20)
        slots = region.write_many([b"value"] * 1000, 0)
        region.share(0)
        region.close()
        reader = OverflowReader(path)
        borrowed = reader.borrow(999)
        borrowed.__enter__()
        os.truncate(path + ".slots", length)
        for verb in (reader.read, reader.read_bytes, reader.lease, lambda _: reader.slots(),
                     lambda slot: reader.borrow(slot).__enter__()):
            try:
                verb(999)
                print("read")
            except (RegionIOError, StaleSlotError) as error:
                assert not isinstance(error, OSError) or error.filename == path + ".slots", error
        try:
            borrowed.__exit__(None, None, None)
            print("true")
        except (RegionIOError, StaleSlotError):
            pass
        try:
            reader.stats()
        except (RegionIOError, StaleSlotError):
            pass
        reader.close()
        """
    assert run_python(script, tmp_path / "region", length) == ""


@pytest.mark.parametrize("size", [100, 5000, system(3_000_000)])
def test_a_copy_from_a_data_file_cut_short_is_an_error(run_python: RunPython, tmp_path: Path, size: int) -> None:
    script = """
        import errno, os, sys
        from nodedb_mem import OverflowReader, OverflowRegion, RegionIOError
        path, size = sys.argv[1], int(sys.argv[2])
        region = OverflowRegion(path, initial_capacity=1 << 20)
        slots = [region.write(bytes([i]) * size, 0) for i in range(10)]
        region.close()
        reader = OverflowReader(path)
        views = [reader.read(slot) for slot in slots]  # all is mapped
        for length in (size * 10 - 1, size * 5 + 1, 0):
            os.truncate(path, length)
            try:
                reader.read_bytes(slots[9])
                print("read")
            except RegionIOError as error:
                print(error.errno == errno.EIO, error.filename == path)
        """
    assert run_python(script, tmp_path / "region", size) == "True True\n" * 3
