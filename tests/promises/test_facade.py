"""The Python objects: views and regions whoever holds them, whenever they go, and whatever interrupts a verb."""

from __future__ import annotations

import ctypes
import gc
import io
import os
import signal
import sys
import threading
import warnings
import weakref
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from kit import raw_fork
from nodedb_mem import (
    CapacityExceededError,
    InvalidSlotError,
    OverflowReader,
    OverflowRegion,
    RegionClosedError,
    WrongThreadError,
    _memory,
)
from nodedb_mem._core import lib

OLD, NEW = b"old!" * 16, b"NEW?" * 16


@pytest.fixture
def region(tmp_path: Path) -> Iterator[OverflowRegion]:
    with OverflowRegion(tmp_path / "r", initial_capacity=1 << 20, max_capacity=1 << 24) as region:
        yield region
        assert lib.ndm_region_check(region._handle) == 0


# Views


def test_each_read_gives_a_view_of_its_own(region: OverflowRegion) -> None:
    slot = region.write(OLD, 0)
    first, second = region.read(slot), region.read(slot)
    assert first is not second
    first.release()
    assert second == OLD
    assert second.readonly
    assert (second.format, second.ndim, second.shape) == ("B", 1, (64,))
    assert region.read_bytes(slot) == OLD


@pytest.mark.parametrize("size", [0, 1, 4096, 4097, 70_000, 3 << 20])
def test_values_of_any_size_come_back_however_often(region: OverflowRegion, size: int) -> None:
    value = os.urandom(size)
    slot = region.write(value, 0)
    for _ in range(4):
        assert region.read_bytes(slot) == value
        assert region.read(slot) == value


@pytest.mark.parametrize("way", ["read", "read_many", "reader", "borrow", "lease"])
def test_nothing_that_leads_to_the_memory_of_a_read_view_is_writable(region: OverflowRegion, way: str) -> None:
    slot = region.write(OLD, 0)
    ref = region.share(slot)
    with OverflowReader(ref) as reader, ExitStack() as stack:
        views: dict[str, Callable[[], memoryview]] = {
            "read": lambda: region.read(slot),
            "read_many": lambda: region.read_many([slot])[0],
            "reader": lambda: reader.read(ref),
            "borrow": lambda: stack.enter_context(reader.borrow(ref)),
            "lease": lambda: stack.enter_context(reader.lease(ref)),
        }
        view = views[way]()
        assert view.readonly and memoryview(view.obj).readonly
        for memory in (view, view.obj):
            with pytest.raises(TypeError):
                memoryview(memory)[:3] = b"new"
            with pytest.raises((TypeError, BufferError)):
                ctypes.c_char.from_buffer(memory)
            with pytest.raises((TypeError, BufferError)):
                io.BytesIO(NEW).readinto(memory)  # type: ignore[arg-type]
            assert not np.frombuffer(memory, np.uint8).flags.writeable
        del view, memory
    assert region.read(slot) == OLD


def test_what_stands_for_memory_cannot_be_made_by_hand(region: OverflowRegion) -> None:
    view = region.read(region.write(OLD, 0))
    for kind in (type(view.obj), type(region._holder)):
        with pytest.raises(TypeError):
            kind()
        with pytest.raises(TypeError):
            kind.__new__(kind)
        with pytest.raises(TypeError):
            kind.size = 1 << 40


def test_the_native_verbs_take_what_they_are_made_for_only(region: OverflowRegion, tmp_path: Path) -> None:
    slot = region.write(OLD, 0)
    with OverflowReader(tmp_path / "r") as reader:
        for holder in (reader._holder, region, None, id(region), region._handle, region.read(slot).obj):
            for call in (
                lambda h: _memory.read(h, slot),
                lambda h: _memory.read_bytes(h, slot),
                lambda h: _memory.read_many(h, array("q", [slot])),
                lambda h: _memory.write(h, OLD, 0),
                lambda h: _memory.write_many(h, [OLD], 0),
            ):
                with pytest.raises(TypeError, match="holder"):
                    call(holder)
        with pytest.raises(TypeError, match="holder"):
            _memory.read_shared(region._holder, slot, -1)
    for few in ((), (region._holder,)):
        for verb in (_memory.read, _memory.read_bytes, _memory.read_many, _memory.read_shared):
            with pytest.raises(TypeError, match="arguments"):
                verb(*few)
    assert len(region) == 1


def test_a_view_ends_with_the_last_object_made_from_it(region: OverflowRegion) -> None:
    slot = region.write(OLD, 0)
    derived: list[Any] = [region.read(slot)[8:24], np.frombuffer(region.read(slot), np.uint8)[::2], region.read(slot)]
    region.free(slot)
    while derived:
        assert region.stats().pinned_bytes == 64
        derived.pop()
    assert region.stats().pinned_bytes == 0


# Slots


def test_a_freed_slot_is_gone_and_its_bytes_are_free(region: OverflowRegion) -> None:
    slot = region.write(OLD, 0)
    assert region.read(slot) == OLD
    region.free(slot)
    assert region.stats().pinned_bytes == 0
    for verb in (region.read, region.read_bytes, region.free):
        with pytest.raises(InvalidSlotError, match="freed"):
            verb(slot)
    assert region.write(NEW, 0) == slot
    assert region.slot(slot).offset == 0
    assert region.read(slot) == region.read_bytes(slot) == NEW


def test_slots_freed_together_are_gone_and_their_bytes_are_free(region: OverflowRegion) -> None:
    slots = [region.write(OLD, 0) for _ in range(5)]
    assert region.read_many(slots) == [OLD] * 5
    region.free_many(slots[1:4])
    assert region.stats().pinned_bytes == 0
    for slot in slots[1:4]:
        with pytest.raises(InvalidSlotError, match="freed"):
            region.read(slot)
    assert sorted(region.write(NEW, 0) for _ in range(3)) == slots[1:4]
    assert [bytes(region.read(slot)) for slot in slots] == [OLD, NEW, NEW, NEW, OLD]


def test_a_view_outlives_its_slot(region: OverflowRegion) -> None:
    slot = region.write(OLD, 0)
    view = region.read(slot)
    region.free(slot)
    assert region.stats().pinned_bytes == 64
    assert region.write(NEW, 0) == slot
    assert view == OLD
    assert region.read(slot) == NEW
    del view
    assert region.stats().pinned_bytes == 0


def test_a_value_filled_in_place_is_seen_through_earlier_views(region: OverflowRegion) -> None:
    slot, view = region.allocate(64, 0)
    earlier = region.read(slot)
    assert earlier == bytes(64)
    view[:] = NEW
    assert earlier == region.read(slot) == region.read_bytes(slot) == NEW


@pytest.mark.parametrize("slot", [-1, -5, -(1 << 20), -(1 << 20) - 1, 1, 1 << 20, 1 << 40, 1 << 70, -(1 << 70)])
def test_numbers_of_no_slot_are_refused(region: OverflowRegion, slot: int) -> None:
    region.write(OLD, 0)
    for verb in (region.read, region.read_bytes, region.free):
        with pytest.raises(InvalidSlotError, match="never existed"):
            verb(slot)
    assert region.read(0) == OLD


@pytest.mark.parametrize("slot", [0.0, "0", None, b"0", (0,), slice(0, 1), ..., [0], (), 0j, np.array([0, 0])])
def test_what_is_no_integer_is_a_type_error(region: OverflowRegion, slot: Any) -> None:
    region.write(OLD, 0)
    for verb in (region.read, region.read_bytes, region.free):
        with pytest.raises(TypeError):
            verb(slot)


def test_whatever_has_an_index_is_a_slot(region: OverflowRegion) -> None:
    class Index:
        def __index__(self) -> int:
            return 0

    region.write(OLD, 0)
    for slot in (False, np.int64(0), np.uint8(0), Index()):
        assert region.read(slot) == region.read_bytes(slot) == OLD


@pytest.mark.parametrize("error", [KeyError, IndexError, TypeError, AttributeError, ValueError])
def test_an_error_from_an_index_comes_through(region: OverflowRegion, error: type[Exception]) -> None:
    class Bad:
        def __index__(self) -> int:
            raise error("mine")

    region.write(OLD, 0)
    for verb in (region.read, region.read_bytes):
        with pytest.raises(error, match="mine"):
            verb(Bad())  # type: ignore[arg-type]


def test_closing_unlocks_the_file(tmp_path: Path) -> None:
    region = OverflowRegion(tmp_path / "r")
    slot = region.write(OLD, 0)
    assert region.read(slot) == OLD
    region.close()
    for verb in (region.read, region.read_bytes, region.free):
        with pytest.raises(RegionClosedError):
            verb(slot)
    OverflowRegion(tmp_path / "r").close()


def test_dropping_the_region_unlocks_the_file(tmp_path: Path) -> None:
    region = OverflowRegion(tmp_path / "r")
    assert region.read(region.write(OLD, 0)) == OLD
    del region
    OverflowRegion(tmp_path / "r").close()


def test_views_that_ended_do_not_stop_compaction(region: OverflowRegion) -> None:
    holes = [region.write(bytes(4096), 0) for _ in range(4)]
    slot = region.write(OLD, 0)
    assert region.read(slot) == OLD
    region.free_many(holes)
    assert region.compact().moved_bytes == 64
    assert region.slot(slot).offset == 0
    assert region.read(slot) == region.read_bytes(slot) == OLD
    region.trim()
    assert region.used_bytes == 64
    assert region.read(slot) == OLD


def test_views_that_ended_do_not_keep_an_old_mapping(tmp_path: Path) -> None:
    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count(f"{tmp_path}/r\n")

    with OverflowRegion(tmp_path / "r", initial_capacity=1 << 16, max_capacity=1 << 16) as region:
        slots = [region.write(bytes([i]) * 1000, 0) for i in range(20)]
        region.max_capacity = 1 << 30
        for slot in slots * 3:
            region.read(slot)
        region.write(bytes(4 << 20), 0)
        assert mappings() == 1
        for _ in range(3):
            assert [bytes(region.read(slot)) for slot in slots] == [bytes([i]) * 1000 for i in range(20)]


def test_a_value_that_was_dropped_from_ram_comes_back(tmp_path: Path) -> None:
    with OverflowRegion(tmp_path / "r", cache_limit=4 << 20) as region:
        if lib.ndm_region_in_memory(region._handle):
            pytest.skip("a file in memory is never dropped from it")
        slots = [region.write(OLD, 0), region.write(os.urandom(200_000), 0)]
        values = [region.read_bytes(slot) for slot in slots]
        for _ in range(40):
            region.write(os.urandom(1 << 20), 0)
        region.flush()
        for _ in range(3):
            assert [region.read(slot) for slot in slots] == values
            assert [region.read_bytes(slot) for slot in slots] == values


@pytest.mark.parametrize("named", [False, True])
def test_evicted_values_come_back(region: OverflowRegion, named: bool) -> None:
    slots = [region.write(os.urandom(8000), 0) for _ in range(10)]
    values = region.read_many(slots) if named else [bytes(region.read(slot)) for slot in slots]
    region.evict(slots if named else None)
    assert [region.read(slot) for slot in slots] == values


# Who is asking


def test_another_thread_finds_nothing(region: OverflowRegion) -> None:
    slot = region.write(OLD, 0)
    errors: list[type[BaseException]] = []

    def intrude() -> None:
        for verb in (region.read, region.read_bytes, region.free):
            try:
                verb(slot)
            except Exception as error:
                errors.append(type(error))

    thread = threading.Thread(target=intrude)
    thread.start()
    thread.join()
    assert errors == [WrongThreadError] * 3
    assert region.read(slot) == OLD


def test_a_thread_that_inherits_the_owners_identity_finds_nothing(tmp_path: Path) -> None:
    found: dict[str, Any] = {}

    def own() -> None:
        found["ident"] = threading.get_ident()
        found["region"] = OverflowRegion(tmp_path / "r")
        found["slot"] = found["region"].write(OLD, 0)

    def inherit() -> None:
        found["same"] = threading.get_ident() == found["ident"]
        try:
            found["region"].read(found["slot"])
        except WrongThreadError:
            found["refused"] = True

    for _ in range(20):
        for target in (own, inherit):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
        assert found.pop("refused", False)
        del found["region"]
        if found["same"]:
            return
    pytest.skip("no identity was used again")


@pytest.mark.parametrize("fork", [os.fork, raw_fork])
def test_a_forked_child_finds_nothing(region: OverflowRegion, fork: Callable[[], int]) -> None:
    slot = region.write(OLD, 0)
    pid = fork()
    if pid == 0:
        refused = 0
        try:
            for verb in (region.read, region.read_bytes, region.free):
                try:
                    verb(slot)
                except WrongThreadError:
                    refused += 1
        finally:
            os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    assert region.read(slot) == OLD


# Collected with a cycle, whose finalizers run in any order


@pytest.mark.parametrize("first", ["finalizer", "region"])
def test_a_finalizer_in_the_same_cycle_finds_everything_alive(tmp_path: Path, first: str) -> None:
    """Not as with ffi.gc(), a finalizer itself: what it ended would be freed memory to those that run after it."""
    found: list[Any] = []

    class Holds:
        def __del__(self) -> None:
            self.region.free(self.slot)
            self.region.write(NEW, 0)  # into the same place, if nothing kept it
            found.extend(
                (bytes(self.view), bytes(self.array), bytes(self.copy), bytes(self.shared), bytes(self.leased))
            )
            found.append(self.region.read_bytes(self.other))
            found.append(self.reader.read_bytes(self.other))
            self.region.close()

    def make() -> None:
        if first == "finalizer":  # the collector goes by age
            holds, region = Holds(), OverflowRegion(tmp_path / "r")
        else:
            region, holds = OverflowRegion(tmp_path / "r"), Holds()
        holds.region, holds.slot, holds.other = region, region.write(OLD, 0), region.write(b"other", 0)
        holds.view, holds.copy = region.read(holds.slot), region.restore(holds.slot)
        holds.array = np.frombuffer(region.read(holds.slot), np.uint8)
        holds.reader = OverflowReader(region.path)
        ref = region.share(holds.slot)
        holds.shared, holds.lease = holds.reader.read(ref), holds.reader.lease(ref)
        holds.leased = holds.lease.view
        holds.cycle = [holds, holds.view, holds.leased, region]

    make()
    gc.collect()
    assert found == [OLD] * 5 + [b"other"] * 2
    OverflowRegion(tmp_path / "r").close()  # all has ended


@pytest.mark.parametrize("kind", ["region", "reader"])
def test_what_is_open_cannot_be_opened_again(tmp_path: Path, kind: str) -> None:
    """Half of its verbs would see the one file, half the other, in a thread that is in the middle of one."""
    with OverflowRegion(tmp_path / "r") as region, OverflowRegion(tmp_path / "other") as other:
        slot = region.write(OLD, 0)
        other.write(NEW, 0)
        opened = region if kind == "region" else OverflowReader(tmp_path / "r")
        for path in ("other", "third"):
            with pytest.raises(RuntimeError, match="once"):
                opened.__init__(tmp_path / path)  # type: ignore[misc]
        assert opened.path == str(tmp_path / "r")
        assert opened.read(slot) == opened.read_bytes(slot) == OLD
        assert not (tmp_path / "third").exists()


def test_opening_within_opening_is_refused(tmp_path: Path) -> None:
    class Meddles:
        def __index__(self) -> int:
            region.__init__(tmp_path / "inner")  # type: ignore[misc]
            return 1 << 20

    region = OverflowRegion.__new__(OverflowRegion)
    with pytest.raises(RuntimeError, match="once"):
        region.__init__(tmp_path / "outer", initial_capacity=Meddles())  # type: ignore[arg-type,misc]
    assert region.path == str(tmp_path / "inner")
    assert region.read(region.write(OLD, 0)) == OLD
    assert region.stats().live_slots == 1
    assert not (tmp_path / "outer").exists()
    region.close()


def test_a_warning_made_an_error_leaves_a_file_in_memory_as_it_was() -> None:
    path = Path("/dev/shm", f"nodedb-mem-test-{os.getpid()}")
    if not lib.ndm_path_in_memory(os.fsencode(path)):
        pytest.skip("/dev/shm is no tmpfs")
    try:
        with OverflowRegion(path) as region:
            slot = region.write(OLD, 0)
        with warnings.catch_warnings():
            warnings.simplefilter("error", ResourceWarning)
            with pytest.raises(ResourceWarning, match="tmpfs"):
                OverflowRegion(path)
            with pytest.raises(ResourceWarning, match="tmpfs"):
                OverflowRegion.temporary("/dev/shm")
        with OverflowRegion(path, recover=True) as region:
            assert region.read(slot) == OLD
    finally:
        for name in (path, f"{path}.slots"):
            Path(name).unlink(missing_ok=True)


def test_a_failed_open_keeps_no_file_while_its_exception_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    OverflowRegion(tmp_path / "r").close()
    with monkeypatch.context() as patch:
        asked: list[int] = []  # the second question comes when the file is open
        patch.setattr("nodedb_mem._control.hasattr", lambda *_: 1 / 0 if asked else asked.append(1), raising=False)
        with pytest.raises(ZeroDivisionError) as caught:
            OverflowRegion(tmp_path / "r")
    OverflowRegion(tmp_path / "r").close()
    assert caught.value.__traceback__ is not None


# Out of memory, anywhere

LACKING: dict[str, Callable[[OverflowRegion, OverflowReader, int], object]] = {
    "write": lambda region, reader, slot: region.write(NEW, 0),
    "write_many": lambda region, reader, slot: region.write_many([NEW] * 20, 0),
    "write_vectored": lambda region, reader, slot: region.write_vectored([NEW] * 3, 0),
    "allocate": lambda region, reader, slot: region.allocate(64, 0),
    "read": lambda region, reader, slot: region.read(slot),
    "read_bytes": lambda region, reader, slot: region.read_bytes(slot),
    "read_many": lambda region, reader, slot: region.read_many([slot] * 20),
    "restore": lambda region, reader, slot: region.restore(slot),
    "shared read": lambda region, reader, slot: reader.read(slot),
    "shared bytes": lambda region, reader, slot: reader.read_bytes(slot),
    "lease": lambda region, reader, slot: reader.lease(slot),
}


@pytest.mark.untraced
@pytest.mark.parametrize("call", LACKING.values(), ids=LACKING.keys())
def test_a_verb_that_finds_no_memory_has_done_nothing(
    region: OverflowRegion, call: Callable[[OverflowRegion, OverflowReader, int], object]
) -> None:
    memory = pytest.importorskip("_testcapi")  # CPython's own, which some distributions pack apart
    slot = region.write(OLD * 100, 0)
    for _ in range(300):  # numbers that Python has to make, where a batch gives them
        region.write(b"", 0)
    region.share(slot)
    with OverflowReader(str(region.path)) as reader:
        gc.collect()
        before = len(region), region.live_bytes
        refused = 0
        for step in range(200):
            try:
                memory.set_nomemory(step, step + 1)
                try:
                    call(region, reader, slot)
                finally:
                    memory.remove_mem_hooks()
            except MemoryError:
                refused += 1
                assert (len(region), region.live_bytes) == before
            else:
                for new in range(before[0], region.slot_count):
                    if new in region:
                        region.free(new)
        assert refused > 0
        region.free(slot)
        assert (region.stats().pinned_bytes, reader.leased()) == (0, [])


def test_a_collection_in_the_middle_of_a_batch_sees_no_half_made_list(region: OverflowRegion) -> None:
    slots = [region.write(OLD, 0) for _ in range(3000)]

    def look(phase: str, _: object) -> None:
        for thing in gc.get_objects():
            if type(thing) is list and len(thing) == 3000:
                assert all(item is not None for item in thing)

    threshold = gc.get_threshold()
    gc.callbacks.append(look)
    gc.set_threshold(50)
    try:
        views = region.read_many(slots)
        again = region.write_many([OLD] * 3000, 0)
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(look)
    assert [bytes(view) for view in views] == [OLD] * 3000
    assert len(again) == 3000


# Errors that a later call must not hide


def test_the_error_of_a_generator_comes_through(region: OverflowRegion) -> None:
    def numbers() -> Iterator[bytes]:
        yield OLD
        raise ValueError("the ids must be contiguous")

    for verb in (region.write_many, region.write_vectored):
        with pytest.raises(ValueError, match="ids"):
            verb(numbers(), 0)
    assert len(region) == 0


@pytest.mark.parametrize("gaps", [np.arange(10)[::2], np.arange(12).reshape(3, 4).T, np.asfortranarray(np.eye(3))])
def test_an_array_that_is_not_contiguous_is_a_buffer_error(region: OverflowRegion, gaps: Any) -> None:
    slot = region.write(bytes(gaps.nbytes), 0)
    for call in (
        lambda: region.write(gaps, 0),
        lambda: region.write_many([gaps], 0),
        lambda: region.write_vectored([OLD, gaps], 0),
        lambda: region.read_into(slot, gaps),
    ):
        with pytest.raises(BufferError, match="contiguous"):
            call()
    frozen = np.arange(5)
    frozen.flags.writeable = False
    with pytest.raises(BufferError, match="read-only"):
        region.read_into(slot, frozen)
    assert len(region) == 1


def test_a_refused_call_keeps_nothing_of_its_caller_alive(region: OverflowRegion) -> None:
    class Mark:
        pass

    def refused() -> weakref.ref[Mark]:
        mark = Mark()
        calls: list[Callable[[], object]] = [
            lambda: region.read(77),
            lambda: region.write_many([], 0),
            lambda: region.write(np.arange(9)[::2], 0),
            lambda: region.write_many(b"abc", 0, lengths=array("q", [9])),
            lambda: region.allocate(1 << 40, 0),
            lambda: region.free(77),
        ]
        for call in calls:
            try:
                call()
            except Exception:
                pass
            else:
                raise AssertionError
        return weakref.ref(mark)

    gc.disable()
    try:
        assert refused()() is None
    finally:
        gc.enable()


def test_a_read_from_disk_leaves_the_last_error_of_native_code_alone(region: OverflowRegion) -> None:
    slots = [region.write(os.urandom(size), 0) for size in (100, 100_000)]
    region.evict()
    assert lib.ndm_region_free(region._handle, 77) == lib.ndm_last_error().status == lib.NDM_ERR_NO_SLOT
    for slot in slots:
        region.read(slot)
    assert lib.ndm_last_error().status == lib.NDM_ERR_NO_SLOT


def test_an_index_is_asked_once(region: OverflowRegion) -> None:
    class Index:
        def __init__(self, *values: int) -> None:
            self.values = list(values)

        def __index__(self) -> int:
            return self.values.pop(0)

    first, second = (region.write_vectored([OLD, NEW], 0) for _ in range(2))
    region.free(Index(first, second))  # type: ignore[arg-type]
    assert first not in region
    assert region.parts(second).sizes == (64, 64)


def test_parts_are_those_of_the_value_not_of_the_slot(region: OverflowRegion) -> None:
    slot = region.write_vectored([b"aaaa", b"bb"], 0)
    assert region.parts(slot).sizes == (4, 2)
    assert lib.ndm_h_free(region.handle, slot) == 0
    assert region.write(bytes(100), 0) == slot
    assert region.parts(slot).sizes == (100,)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="no __buffer__ before Python 3.12")
@pytest.mark.parametrize("name", ["write", "write_many", "write_vectored"])
def test_a_buffer_that_uses_the_region_when_it_is_asked_for(region: OverflowRegion, name: str) -> None:
    class Busy:
        def __buffer__(self, flags: int) -> memoryview:
            region.free(region.write(NEW * 1000, 0))
            with pytest.raises(InvalidSlotError):
                region.read(1 << 20)
            gc.collect()
            return memoryview(OLD)

        def __release_buffer__(self, view: memoryview) -> None:
            with pytest.raises(InvalidSlotError):
                region.read(1 << 20)

    class BigBusy(Busy):
        def __buffer__(self, flags: int) -> memoryview:
            return memoryview(bytes(1 << 24))

    values: Any = Busy() if name == "write" else (item for item in (bytes(bytearray(65_000)), Busy(), Busy()))
    slots: Any = getattr(region, name)(values, 0)
    expected = {"write": [OLD], "write_many": [bytes(65_000), OLD, OLD], "write_vectored": [bytes(65_000) + OLD + OLD]}
    assert [region.read(slot) for slot in (slots if name == "write_many" else [slots])] == expected[name]
    with pytest.raises(CapacityExceededError) as caught:
        region.write_many(BigBusy(), 0, lengths=array("q", [1 << 24]))
    assert caught.value.required > caught.value.max_capacity == 1 << 24
    big = Busy() if name == "write" else [Busy(), bytes(1 << 24)]
    if name != "write":
        with pytest.raises(CapacityExceededError) as caught:
            getattr(region, name)(big, 0)
        assert caught.value.required > caught.value.max_capacity == 1 << 24


@pytest.mark.untraced
def test_a_signal_leaves_no_region_open_and_nothing_pinned(tmp_path: Path) -> None:
    """A handler that raises does so as soon as the core has answered: what it gave has an owner by then."""

    class StruckError(Exception):
        pass

    def strike(*_: object) -> None:
        raise StruckError

    def struck(work: Callable[[], object]) -> int:
        count = 0
        for delay in range(200):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-6 * (1 + delay))
                for _ in range(10):
                    work()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except StruckError:
                count += 1
        return count

    before = signal.signal(signal.SIGALRM, strike)
    try:
        with OverflowRegion(tmp_path / "r") as region:
            slot = region.write(OLD, 0)
            ref = region.share(slot)
            with OverflowReader(ref) as reader:
                assert struck(lambda: region.restore(slot)) > 0
                assert struck(lambda: reader.lease(ref)) > 0
                assert struck(lambda: OverflowReader(ref)) > 0
                assert reader.leased() == []
            region.free(slot)
            assert region.stats().pinned_bytes == 0
        assert struck(lambda: OverflowRegion(tmp_path / "r")) > 0
        OverflowRegion(tmp_path / "r").close()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# Interrupted between any two instructions


@contextmanager
def at_instruction(code: Any, number: int, action: Callable[[], object]) -> Iterator[list[bool]]:
    """Run `action` before the given instruction of the next call of `code`, as a signal handler or finalizer may."""
    done: list[bool] = []
    passed = 0

    def step() -> None:
        nonlocal passed
        if passed == number and not done:
            done.append(True)
            stop()
            action()
        passed += 1

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code is not code or done:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            step()
        return trace

    if sys.version_info >= (3, 12):
        monitoring = sys.monitoring
        tool, events = monitoring.DEBUGGER_ID, monitoring.events
        before = None
        monitoring.use_tool_id(tool, "test")
        monitoring.register_callback(tool, events.INSTRUCTION, lambda *_: step())
        monitoring.set_local_events(tool, code, events.INSTRUCTION)

        def stop() -> None:
            monitoring.set_local_events(tool, code, events.NO_EVENTS)
    else:
        before = sys.gettrace()
        sys.settrace(trace)

        def stop() -> None:
            sys.settrace(None)

    try:
        yield done
    finally:
        stop()
        if sys.version_info >= (3, 12):
            monitoring.free_tool_id(tool)
        else:
            sys.settrace(before)


def replace(region: OverflowRegion, slot: int) -> None:
    region.free(slot)
    assert region.write(NEW, 0) == slot
    assert region.read(slot) == NEW


def overwrite(region: OverflowRegion, slot: int) -> None:
    """Free the slot, and fill every free place with other bytes."""
    region.free(slot)
    for _ in range(4):
        region.write(NEW, 0)


ACTIONS: dict[str, Callable[[OverflowRegion, int], object]] = {
    "free": lambda region, slot: region.free(slot),
    "free_many": lambda region, slot: region.free_many([slot]),
    "replace": replace,
    "overwrite": overwrite,
    "read": lambda region, slot: region.read(slot),
    "compact": lambda region, slot: region.compact(),
    "evict": lambda region, slot: region.evict([slot]),
    "raise_max_capacity": lambda region, slot: setattr(region, "max_capacity", region.max_capacity * 2),
    "close": lambda region, slot: region.close(),
}
CALLS: dict[str, Callable[[OverflowRegion, int], Any]] = {
    "read": lambda region, slot: region.read(slot),
    "read_bytes": lambda region, slot: region.read_bytes(slot),
    "free": lambda region, slot: region.free(slot),
    "free_many": lambda region, slot: region.free_many([slot]),
}


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS.keys())
@pytest.mark.parametrize("name", CALLS)
def test_interrupted_anywhere(tmp_path: Path, name: str, action: Callable[[OverflowRegion, int], object]) -> None:
    code = getattr(OverflowRegion, name).__code__
    for number in range(1000):
        region = OverflowRegion(tmp_path / "r", initial_capacity=1 << 16, max_capacity=1 << 20)
        region.write(bytes(64), 0)
        slot = region.write(OLD, 0)
        region.free(0)
        result = None
        with at_instruction(code, number, lambda: action(region, slot)) as done:  # noqa: B023
            try:
                result = CALLS[name](region, slot)
            except (InvalidSlotError, RegionClosedError):
                assert done
        if result is not None:
            assert result in (OLD, NEW)
        if not region.closed:
            for other in range(region.slot_count):
                if other in region:
                    value = bytes(region.read(other))
                    assert value in (OLD, NEW)
                    assert value == region.read_bytes(other)
                    assert result != NEW or value == NEW
            assert region.stats().pinned_bytes in (0, 64 if isinstance(result, memoryview) else 0)
            assert lib.ndm_region_check(region._handle) == 0
            result = None
            assert region.stats().pinned_bytes == 0
        result = None
        region.close()
        OverflowRegion(tmp_path / "r").close()  # nothing keeps the file locked
        (tmp_path / "r").unlink()
        if not done:
            assert number >= 5
            return
    pytest.fail("the verb has no end")
