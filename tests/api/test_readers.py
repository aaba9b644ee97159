"""Readers: in this process and in others, by path and by reference, while the owner works."""

from __future__ import annotations

import errno
import gc
import mmap
import multiprocessing
import os
import pickle
import shutil
import struct
import threading
from collections.abc import Callable
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import pytest

from kit import NewRegion, RunPython, StartPython
from nodedb_mem import (
    EngineId,
    InvalidSlotError,
    OverflowReader,
    OverflowRegion,
    RegionClosedError,
    RegionIOError,
    SlotRef,
    StaleSlotError,
    WrongThreadError,
)

KIB, MIB = 1 << 10, 1 << 20


def blob(size: int, seed: int = 0) -> bytes:
    return bytes((seed + i * 7) & 255 for i in range(256)) * (size // 256) + bytes([seed & 255]) * (size % 256)


def patch(path: str, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


# ---- in another process ---------------------------------------------------------------------------------------


def _read_all(refs: list[SlotRef], pipe: Any) -> None:
    with OverflowReader(refs[0]) as reader:
        pipe.send([reader.read_bytes(ref) for ref in refs])
        pipe.recv()


@pytest.mark.parametrize("kind", ["named", "temporary"])
def test_references_go_to_a_spawned_process(new_region: NewRegion, tmp_path: Path, kind: str) -> None:
    values = [b"", b"x", blob(5000, 1), blob(3 * MIB, 2)]
    region = new_region() if kind == "named" else OverflowRegion.temporary(tmp_path, initial_capacity=64 * KIB)
    refs = [region.share(region.write(value, EngineId.VECTOR)) for value in values]
    assert pickle.loads(pickle.dumps(refs)) == refs and len(pickle.dumps(refs[0])) < 1000
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_read_all, args=(refs, there))
    process.start()
    try:
        assert here.poll(120)
        assert here.recv() == values
        here.send(None)
        process.join(60)
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join()
        process.close()
        here.close()
        there.close()
        region.close()
        resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]  # spawn has started it


def test_a_process_reads_by_path_and_sees_what_is_written_later(
    new_region: NewRegion, start_python: StartPython
) -> None:
    region = new_region()
    first = region.write(b"first", 0)
    child = start_python(
        """
        import sys
        from nodedb_mem import OverflowReader
        with OverflowReader(sys.argv[1]) as reader:
            for line in sys.stdin:
                value = reader.read(int(line))
                print(len(value), value[:5].hex(), reader.read_bytes(int(line)) == bytes(value), flush=True)
        """,
        region.path,
    )

    def ask(slot: int) -> str:
        child.stdin.write(f"{slot}\n")
        child.stdin.flush()
        return str(child.stdout.readline().strip())

    assert ask(first) == f"5 {b'first'.hex()} True"
    second = region.write(blob(4 * MIB, 3), 0)  # grows the file
    assert ask(second) == f"{4 * MIB} {blob(256, 3)[:5].hex()} True"
    region.max_capacity = 1 << 26
    third = region.write(blob(30 * MIB, 4), 0)  # past the ceiling it knew
    assert ask(third) == f"{30 * MIB} {blob(256, 4)[:5].hex()} True"
    region.free(second)
    region.compact()
    region.trim()
    assert ask(third) == f"{30 * MIB} {blob(256, 4)[:5].hex()} True"


# ---- following the owner --------------------------------------------------------------------------------------


def test_many_slots_grow_the_table_under_a_reader(new_region: NewRegion) -> None:
    region = new_region(alignment=1)
    region.write(b"0", 0)
    with OverflowReader(region.path) as reader:
        slots = region.write_many([b"%d" % i for i in range(1, 8000)], 3)
        assert reader.read_bytes(slots[-1]) == b"7999"
        assert [found.slot for found in reader.slots()] == list(range(8000))
        assert reader.stats().slot_count == 8000


def test_figures_follow_the_owner(new_region: NewRegion) -> None:
    region = new_region()
    slots = [region.write(blob(100_000, i), i) for i in range(8)]
    with OverflowReader(region.path) as reader:

        def same() -> None:
            stats = reader.stats()
            assert (stats.capacity, stats.max_capacity) == (region.capacity, region.max_capacity)
            assert (stats.used_bytes, stats.live_bytes) == (region.used_bytes, region.live_bytes)
            assert (stats.slot_count, stats.alignment, stats.owner) == (region.slot_count, 64, os.getpid())

        same()
        for slot in slots[:3]:
            region.free(slot)
        same()
        region.compact()
        same()
        for slot in slots[3:]:
            region.free(slot)
        region.trim()
        same()
        region.max_capacity *= 2
        same()
        region.close()
        assert reader.stats().owner is None


def test_slots_are_listed_as_the_owner_knows_them(new_region: NewRegion) -> None:
    region = new_region()
    slots = [region.write(blob(100 * i, i), i) for i in range(6)]
    region.free(slots[2])
    with OverflowReader(region.path) as reader:
        listed = {found.slot: found for found in reader.slots()}
        assert listed.keys() == {0, 1, 3, 4, 5}
        for slot, found in listed.items():
            facts = region.slot(slot)
            assert (found.offset, found.size, found.engine) == (facts.offset, facts.size, facts.engine)
        assert isinstance(listed[0].engine, EngineId)


def test_a_draft_is_not_seen_before_its_commit(new_region: NewRegion) -> None:
    region = new_region()
    slot, view = region.allocate(1000, 0)
    ref = region.share(slot)
    with OverflowReader(region.path) as reader:
        assert reader.slots() == []
        with pytest.raises(StaleSlotError, match="not committed yet"):
            reader.read(ref)
        with pytest.raises(InvalidSlotError, match="not committed yet") as caught:
            reader.read(slot)
        assert caught.value.slot == slot
        with pytest.raises(StaleSlotError, match="freed"):
            reader.read(ref._replace(generation=ref.generation + 1))
        view[:] = blob(1000, 5)
        view.release()
        region.commit(slot)
        assert reader.read_bytes(ref) == blob(1000, 5)


def test_values_stay_readable_when_the_owner_has_closed(new_region: NewRegion) -> None:
    region = new_region()
    ref = region.share(region.write(blob(9000, 1), 0))
    region.close()
    with OverflowReader(ref) as reader:
        assert reader.read_bytes(ref) == blob(9000, 1)
        assert reader.stats().owner is None


def test_a_reader_serves_several_threads(new_region: NewRegion) -> None:
    region = new_region()
    refs = [region.share(region.write(blob(3000 + i, i), 0)) for i in range(50)]
    wrong: list[int] = []
    with OverflowReader(region.path) as reader:

        def work() -> None:
            for i, ref in enumerate(refs):
                with reader.borrow(ref) as view:
                    if bytes(view) != blob(3000 + i, i) or reader.read_bytes(ref) != view:
                        wrong.append(i)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


# ---- stale references -----------------------------------------------------------------------------------------


def test_the_working_directory_changes_before_the_first_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with OverflowRegion("region", initial_capacity=64 * KIB) as region:
        slot = region.write(b"value", 0)
        monkeypatch.chdir(tmp_path / "elsewhere")
        ref = region.share(slot)
        assert ref.path == str(tmp_path / "region") and os.listdir() == []
        with OverflowReader(ref) as reader, reader.lease(ref) as view:
            assert bytes(view) == b"value"


def test_a_freed_and_a_reused_slot(new_region: NewRegion) -> None:
    region = new_region()
    slot = region.write(b"old", 0)
    ref = region.share(slot)
    with OverflowReader(ref) as reader:
        assert reader.is_current(ref)
        region.free(slot)
        assert not reader.is_current(ref)
        with pytest.raises(StaleSlotError, match=str(region.path)):
            reader.read(ref)
        with pytest.raises(InvalidSlotError):
            reader.read(slot)
        assert region.write(b"new", 0) == slot
        for verb in (reader.read, reader.read_bytes, reader.lease):
            with pytest.raises(StaleSlotError):
                verb(ref)
        with pytest.raises(StaleSlotError), reader.borrow(ref):
            pass
        assert not reader.is_current(ref)
        assert reader.read_bytes(slot) == b"new"
        assert reader.read_bytes(region.share(slot)) == b"new"


def test_a_moved_value_keeps_its_reference(new_region: NewRegion) -> None:
    region = new_region()
    hole = region.write(blob(200_000, 1), 0)
    slot = region.write(blob(300_000, 2), 0)
    ref = region.share(slot)
    with OverflowReader(ref) as reader:
        region.free(hole)
        with pytest.raises(StaleSlotError), reader.borrow(ref) as view:
            assert bytes(view) == blob(300_000, 2)
            assert region.compact().moved_bytes == 300_000
        assert reader.is_current(ref)
        assert reader.read_bytes(ref) == blob(300_000, 2)


def test_a_borrow_is_true_unless_its_own_value_goes(new_region: NewRegion) -> None:
    region = new_region()
    slot, other = region.write(b"kept", 0), region.write(b"other", 0)
    with OverflowReader(region.path) as reader:
        with reader.borrow(slot) as view:
            region.free(other)
            region.write(blob(3 * MIB), 0)
            region.trim()
            assert bytes(view) == b"kept"
        with pytest.raises(StaleSlotError, match=str(region.path)), reader.borrow(slot):
            region.free(slot)
        slot = region.write(b"again", 0)
        with pytest.raises(ZeroDivisionError), reader.borrow(slot):
            region.free(region.write(b"another", 0))
            raise ZeroDivisionError  # not by foreign bytes


@pytest.mark.parametrize("change", ["free", "reopen"])
def test_what_a_borrow_of_changed_bytes_raises_is_stale(new_region: NewRegion, change: str) -> None:
    region = new_region()
    slot = region.write(b"value", 0)
    with OverflowReader(region.path) as reader:
        with pytest.raises(StaleSlotError, match="borrowed") as caught, reader.borrow(slot):
            if change == "free":
                region.free(slot)
            else:
                region.close()
                new_region()
            raise ZeroDivisionError
        assert type(caught.value.__cause__) is ZeroDivisionError


def test_a_borrow_passes_what_is_no_error_of_its_bytes(new_region: NewRegion) -> None:
    region = new_region()
    slot = region.write(b"value", 0)
    reader = OverflowReader(region.path)
    with pytest.raises(KeyboardInterrupt), reader.borrow(slot):
        region.free(slot)
        raise KeyboardInterrupt
    slot = region.write(b"value", 0)
    with pytest.raises(ZeroDivisionError), reader.borrow(slot):
        reader.close()  # so nothing can be said of the value
        raise ZeroDivisionError


def test_references_made_by_hand(new_region: NewRegion) -> None:
    region = new_region()
    ref = region.share(region.write(b"value", 0))
    with OverflowReader(ref) as reader:
        for slot in (-1, 7, 1 << 32, 1 << 63, 1 << 70, -(1 << 70)):
            wrong = ref._replace(slot=slot)
            assert not reader.is_current(wrong)
            for verb in (reader.read, reader.read_bytes, reader.lease):
                with pytest.raises(InvalidSlotError) as caught:
                    verb(wrong)
                assert caught.value.slot == slot
        for generation in (-1, 1, (1 << 32) - 1, 1 << 32, 1 << 64, -(1 << 70)):
            wrong = ref._replace(generation=generation)
            assert not reader.is_current(wrong)
            for verb in (reader.read, reader.read_bytes, reader.lease):
                with pytest.raises(StaleSlotError):
                    verb(wrong)
        for size in (-1, 0, 1, 1 << 40, 1 << 70, -(1 << 70)):
            assert reader.read_bytes(ref._replace(size=size)) == b"value"


def test_a_reopened_region(new_region: NewRegion) -> None:
    region = new_region()
    ref = region.share(region.write(blob(100_000, 1), 0))
    with OverflowReader(region.path) as reader:
        view = reader.read(ref)
        region.close()
        again = new_region()
        assert again.write(blob(100_000, 2), 0) == ref.slot
        for verb in (reader.read, reader.read_bytes, reader.lease):
            for which in (ref, ref.slot):
                with pytest.raises(StaleSlotError, match=str(region.path)):
                    verb(which)
        for figure in (reader.stats, reader.slots):
            with pytest.raises(StaleSlotError):
                figure()
        assert not reader.is_current(ref)
        len(bytes(view))  # other bytes, but no SIGBUS
        with pytest.raises(StaleSlotError):
            OverflowReader(ref)
        del view
    with OverflowReader(again.path) as reader, pytest.raises(StaleSlotError):
        reader.read(ref)


def test_a_borrow_across_a_reopening(new_region: NewRegion) -> None:
    region = new_region()
    ref = region.share(region.write(blob(100_000, 1), 0))
    with OverflowReader(region.path) as reader, pytest.raises(StaleSlotError), reader.borrow(ref):
        region.close()
        new_region()


def test_a_reference_into_another_region(new_region: NewRegion) -> None:
    one, two = new_region("one"), new_region("two")
    ref, other = one.share(one.write(b"1", 0)), two.share(two.write(b"2", 0))
    with OverflowReader(ref) as reader:
        with pytest.raises(StaleSlotError):
            reader.read_bytes(other)
        assert not reader.is_current(other)
    with pytest.raises(StaleSlotError):
        OverflowReader(ref._replace(path=other.path, slots_path=other.slots_path))


def test_a_file_put_in_place_of_another(new_region: NewRegion, tmp_path: Path) -> None:
    region = new_region()
    region.write(b"value", 0)
    shutil.copy(tmp_path / "region", tmp_path / "copy")
    shutil.copy(tmp_path / "region.slots", tmp_path / "copy.slots")
    with pytest.raises(RegionIOError, match="another file") as caught:
        OverflowReader(tmp_path / "copy")
    assert caught.value.filename == str(tmp_path / "copy.slots")


# ---- views and the file's end ---------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", [False, True])
def test_trim_leaves_the_file_to_a_reader_and_to_its_views(new_region: NewRegion, closed: bool) -> None:
    region = new_region()
    slot = region.write(blob(4 * MIB, 1), 0)
    reader = OverflowReader(region.path)
    view = reader.read(slot)
    if closed:
        reader.close()
        assert bytes(view) == blob(4 * MIB, 1)
    region.free(slot)
    before = region.capacity
    region.trim()
    assert region.capacity == before == os.stat(region.path).st_size
    assert len(bytes(view)) == 4 * MIB  # no SIGBUS
    del view
    reader.close()
    gc.collect()
    region.trim()
    assert region.capacity == 64 * KIB


@pytest.mark.parametrize("closed", [False, True])
def test_a_reopening_leaves_the_file_to_a_reader_and_to_its_views(new_region: NewRegion, closed: bool) -> None:
    region = new_region()
    reader = OverflowReader(region.path)
    view = reader.read(region.write(blob(4 * MIB, 1), 0))
    if closed:
        reader.close()
    region.close()
    again = new_region()
    assert again.capacity >= 4 * MIB
    assert len(bytes(view)) == 4 * MIB
    del view
    reader.close()


def test_closing(new_region: NewRegion, footprint: Callable[..., tuple[int, int]]) -> None:
    region = new_region()
    slot = region.write(b"value", 0)
    before = footprint(region.path)
    reader = OverflowReader(region.path)
    assert repr(reader) == f"<OverflowReader {region.path}>" and reader.path == region.path
    reader.close()
    reader.close()
    assert footprint(region.path) == before
    for verb in (reader.read, reader.read_bytes, reader.lease):
        with pytest.raises(RegionClosedError, match=str(region.path)):
            verb(slot)
    for figure in (reader.stats, reader.slots):
        with pytest.raises(RegionClosedError):
            figure()
    with pytest.raises(TypeError):
        pickle.dumps(reader)


# ---- nothing can be changed -----------------------------------------------------------------------------------


def test_a_reader_has_no_way_to_write(new_region: NewRegion, start_python: StartPython) -> None:
    region = new_region()
    slot = region.write(blob(100_000, 1), 0)
    child = start_python(
        """
        import os, sys
        from nodedb_mem import OverflowReader
        reader = OverflowReader(sys.argv[1])
        view = reader.read(int(sys.argv[2]))
        for fd in os.listdir("/proc/self/fd"):
            try:
                name = os.readlink("/proc/self/fd/" + fd)
            except OSError:
                continue
            if name.startswith(sys.argv[1]):
                flags = dict(line.split(":\\t") for line in open("/proc/self/fdinfo/" + fd).read().splitlines()
                             if ":\\t" in line)["flags"]
                print("fd", int(flags, 8) & os.O_ACCMODE)
        for line in open("/proc/self/maps"):
            if sys.argv[1] in line:
                print("map", line.split()[1])
        print("view", view.readonly)
        """,
        region.path,
        slot,
    )
    lines = child.stdout.read().split("\n")[:-1]
    assert sorted(set(lines)) == [f"fd {os.O_RDONLY}", "map r--s", "view True"]
    assert lines.count(f"fd {os.O_RDONLY}") == 2


def test_views_are_read_only(new_region: NewRegion) -> None:
    region = new_region()
    slot = region.write(b"value", 0)
    with OverflowReader(region.path) as reader, reader.borrow(slot) as view, pytest.raises(TypeError):
        view[0] = 1


# ---- bad input ------------------------------------------------------------------------------------------------


def test_paths_that_are_no_region(tmp_path: Path) -> None:
    def refused(path: Path, code: str, suffix: str = "") -> None:
        with pytest.raises(RegionIOError) as caught:
            OverflowReader(path)
        assert caught.value.filename == f"{path}{suffix}" and code in str(caught.value)

    refused(tmp_path / "missing", "No such file")
    refused(tmp_path, "not a regular file")
    (tmp_path / "alone").write_bytes(bytes(100))
    refused(tmp_path / "alone", "cannot open the slot table: No such file", ".slots")
    (tmp_path / "alone.slots").write_bytes(b"")
    refused(tmp_path / "alone", "cut short", ".slots")
    (tmp_path / "alone.slots").write_bytes(bytes(8192))
    refused(tmp_path / "alone", "its mark is missing", ".slots")
    os.mkfifo(tmp_path / "fifo")
    refused(tmp_path / "fifo", "not a regular file")


# Where the fields of the table's header are: magic 8, version, byte order, page size, record size: 4 each, ...
HEADER = {"magic": 0, "version": 8, "byte_order": 12, "page_size": 16, "record_size": 20, "identity": 144, "count": 56}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("magic", b"NOTSLOTS", "mark is missing"),
        ("version", struct.pack("=I", 1), "version"),  # an older one
        ("version", struct.pack("=I", 77), "version"),
        ("byte_order", struct.pack(">I" if struct.pack("=H", 1) == b"\1\0" else "<I", 0x01020304), "byte order"),
        ("page_size", struct.pack("=I", 3 * mmap.PAGESIZE), "page size"),
        ("record_size", struct.pack("=I", 32), "version"),
        ("identity", struct.pack("=Q", 1), "another region"),
        ("count", struct.pack("=Q", 1 << 40), "cut short"),
    ],
)
def test_foreign_tables(new_region: NewRegion, field: str, value: bytes, message: str) -> None:
    region = new_region()
    region.write(b"value", 0)
    region.close()
    patch(f"{region.path}.slots", HEADER[field], value)
    with pytest.raises(RegionIOError, match=message) as caught:
        OverflowReader(region.path)
    assert caught.value.filename == f"{region.path}.slots"


@pytest.mark.parametrize("size", [0, 100, 4095, 4096 + 24])
def test_a_table_cut_short(new_region: NewRegion, size: int) -> None:
    region = new_region()
    region.write_many([b"value"] * 10, 0)
    region.close()
    os.truncate(f"{region.path}.slots", size)
    with pytest.raises(RegionIOError, match="cut short") as caught:
        OverflowReader(region.path)
    assert caught.value.filename == f"{region.path}.slots"


def test_errors_about_the_leases_name_their_file(new_region: NewRegion, tmp_path: Path) -> None:
    region = new_region()
    slot = region.write(b"value", 0)
    leases = tmp_path / "region.leases"
    with OverflowReader(region.path) as reader:
        with pytest.raises(RegionIOError) as missing:
            reader.lease(slot)
        assert (missing.value.errno, missing.value.filename) == (errno.ENOENT, str(leases))
        leases.mkdir()
        for verb in (region.share, reader.lease):
            with pytest.raises(RegionIOError) as caught:
                verb(slot)
            assert (caught.value.errno, caught.value.filename) == (errno.EISDIR, str(leases))
        assert reader.read_bytes(slot) == b"value"


def test_a_reference_names_its_own_files_in_errors(new_region: NewRegion, tmp_path: Path) -> None:
    region = new_region()
    ref = region.share(region.write(b"value", 0))
    elsewhere = ref._replace(slots_path=str(tmp_path / "elsewhere"), leases_path=str(tmp_path / "no leases"))
    with pytest.raises(RegionIOError) as caught:
        OverflowReader(elsewhere)
    assert caught.value.filename == elsewhere.slots_path
    with (
        OverflowReader(elsewhere._replace(slots_path=ref.slots_path)) as reader,
        pytest.raises(RegionIOError) as caught,
    ):
        reader.lease(ref)
    assert caught.value.filename == elsewhere.leases_path


def test_an_owner_that_finds_a_foreign_table_names_it(tmp_path: Path) -> None:
    path, table = tmp_path / "region", tmp_path / "region.slots"
    table.write_bytes(b"somebody's data")
    with pytest.raises(RegionIOError) as caught:
        OverflowRegion(path)
    assert (caught.value.errno, caught.value.filename) == (errno.EEXIST, str(table))
    table.unlink()
    path.write_bytes(b"somebody's data")
    with pytest.raises(RegionIOError) as caught:
        OverflowRegion(path)
    assert (caught.value.errno, caught.value.filename) == (errno.EEXIST, str(path))


OTHER_USER = """
import os, sys
from nodedb_mem import OverflowReader
with OverflowReader(sys.argv[1]) as reader:
    print(reader.stats().resident_bytes is not None)
    os.chmod(sys.argv[1], 0o644)
    os.seteuid(65534)
    print(reader.stats().resident_bytes)
    os.seteuid(0)
    os.chmod(sys.argv[1], 0o666)
    os.seteuid(65534)
    print(reader.stats().resident_bytes is not None)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs two users")
def test_what_is_in_ram_is_unknown_to_who_may_not_ask(new_region: NewRegion, run_python: RunPython) -> None:
    region = new_region(initial_capacity=8 * MIB)
    region.write(blob(MIB), 0)
    assert run_python(OTHER_USER, region.path).split() == ["True", "None", "True"]


def test_files_cut_short_under_a_reader(new_region: NewRegion) -> None:
    region = new_region()
    slots = region.write_many([blob(1000, i) for i in range(5000)], 0)
    region.close()
    with OverflowReader(region.path) as reader:
        os.truncate(region.path, 4096)
        with pytest.raises(RegionIOError, match="shorter than its table"):
            reader.read(slots[-1])
        with pytest.raises(RegionIOError):
            reader.read_bytes(slots[-1])


def test_a_reader_outlives_its_path(new_region: NewRegion) -> None:
    region = new_region()
    slot = region.write(blob(70_000, 1), 0)
    with OverflowReader(region.path) as reader:
        os.unlink(region.path)
        os.unlink(f"{region.path}.slots")
        assert reader.read_bytes(slot) == blob(70_000, 1)


def test_a_temporary_region_is_gone_with_its_owner(tmp_path: Path) -> None:
    region = OverflowRegion.temporary(tmp_path)
    ref = region.share(region.write(b"value", 0))
    with OverflowReader(ref) as reader:
        region.close()
        assert reader.read_bytes(ref) == b"value"
    with pytest.raises(RegionIOError, match="/proc/"):
        OverflowReader(ref)


def test_wrong_types(new_region: NewRegion) -> None:
    region = new_region()
    slot = region.write(b"value", 0)
    region.share(slot)
    for source in (None, 3, 1.5, object(), ("a", "b")):
        with pytest.raises(TypeError):
            OverflowReader(source)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="null byte"):
        OverflowReader(f"{region.path}\0.other")
    with OverflowReader(region.path) as reader:
        for verb in (reader.read, reader.read_bytes, reader.lease):
            for wrong in (None, "0", 1.0):
                with pytest.raises(TypeError):
                    verb(wrong)  # type: ignore[arg-type]
            for number in (-1, 1, 1 << 62, 1 << 80, -(1 << 80)):
                with pytest.raises(InvalidSlotError):
                    verb(number)
        for wrong in (slot, None, "0"):
            with pytest.raises(TypeError):
                reader.is_current(wrong)  # type: ignore[arg-type]


def test_a_forked_child_may_not_use_its_parents_reader(new_region: NewRegion) -> None:
    region = new_region()
    slot = region.write(b"value", 0)
    with OverflowReader(region.path) as reader:
        view = reader.read(slot)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                try:
                    reader.read(slot)
                except WrongThreadError as error:
                    if str(region.path) in str(error) and bytes(view) == b"value":
                        del view
                        reader.close()
                        status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert reader.read_bytes(slot) == b"value"
        del view


# ---- one owner at work, four readers --------------------------------------------------------------------------

_STRESS_READER = """
import hashlib, random, sys
from nodedb_mem import InvalidSlotError, OverflowReader, StaleSlotError
path, operations = sys.argv[1], int(sys.argv[2])
chance = random.Random(int(sys.argv[3]))
def true(value):
    value = bytes(value)
    return hashlib.blake2b(value[16:], digest_size=16).digest() == value[:16]
read = stale = wrong = 0
reader = OverflowReader(path)
while read + stale < operations:
    slot = chance.randrange(48)
    try:
        kind = chance.randrange(8)
        if kind < 5:
            good = true(reader.read_bytes(slot))
        elif kind < 7:
            with reader.borrow(slot) as view:
                value = bytes(view)
            good = true(value)
        else:
            with reader.lease(slot) as view:
                good = true(view) and true(view)
        read += 1
        wrong += not good
    except (InvalidSlotError, StaleSlotError):
        stale += 1
print(read, stale, wrong)
"""


def test_four_readers_beside_a_working_owner(
    new_region: NewRegion, start_python: StartPython, check: Callable[[OverflowRegion], None]
) -> None:
    import hashlib
    import random

    chance = random.Random(6)
    region = new_region(max_capacity=1 << 26)

    def value() -> bytes:
        body = chance.randbytes(chance.choice([0, 10, 300, 5000, 70_000, 300_000]))
        return hashlib.blake2b(body, digest_size=16).digest() + body

    live = [region.write(value(), 0) for _ in range(40)]
    region.share(live[0])
    readers = [start_python(_STRESS_READER, region.path, 4000, seed) for seed in range(4)]
    steps = 0
    while any(reader.poll() is None for reader in readers) and steps < 200_000:
        steps += 1
        match chance.randrange(40):
            case 0:
                region.compact(chance.choice([None, 500_000]))
            case 1:
                region.trim()
            case n if n < 20 and live:
                region.free(live.pop(chance.randrange(len(live))))
            case _ if len(live) < 44:
                live.append(region.write(value(), 0))
    read = 0
    for reader in readers:
        assert reader.wait(120) == 0
        good, _, wrong = map(int, reader.stdout.read().split())
        assert wrong == 0
        read += good
    assert read > 1000
    check(region)
