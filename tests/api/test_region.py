"""The verbs of a region, its properties, the kinds of data and engines it takes."""

from __future__ import annotations

import array
import copy
import ctypes
import dataclasses
import enum
import itertools
import mmap
import os
import pickle
import random
import stat
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import nodedb_mem
from kit import NewRegion, blob
from nodedb_mem import (
    CapacityExceededError,
    EngineId,
    InvalidSlotError,
    MemoryTuning,
    OverflowRegion,
    OverflowSlot,
    RegionError,
    RegionStats,
)

MIB = 1 << 20
SIZES = [0, 1, 13, 63, 64, 65, 4095, 4096, 4097, 32767, 32768, 40_000, 1_000_003]


# Opening


def test_open_makes_a_region_with_the_default_sizes(tmp_path: Path) -> None:
    with OverflowRegion.open(tmp_path / "region") as region:
        assert region.capacity == 64 * MIB
        assert region.max_capacity == 1024 * MIB
        assert (region.used_bytes, region.live_bytes, region.slot_count, len(region)) == (0, 0, 0, 0)
        assert not region.closed


def test_the_class_itself_opens(tmp_path: Path) -> None:
    with OverflowRegion(tmp_path / "region", initial_capacity=4096, max_capacity=8192, alignment=8) as region:
        assert (region.capacity, region.max_capacity) == (4096, 8192)
        region.write(b"x", 0)
        assert region.slot(region.write(b"y", 0)).offset == 8


def test_open_takes_sizes_by_keyword_only(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        OverflowRegion.open(tmp_path / "region", 4096)  # type: ignore[misc]
    assert os.listdir(tmp_path) == []


def test_open_with_capacity_keeps_the_default_ceiling(tmp_path: Path) -> None:
    with OverflowRegion.open_with_capacity(tmp_path / "region", 12345) as region:
        assert (region.capacity, region.max_capacity) == (12345, 1024 * MIB)


def test_open_with_config_sets_both_sizes(tmp_path: Path) -> None:
    with OverflowRegion.open_with_config(tmp_path / "region", 600, 1000) as region:
        assert (region.capacity, region.max_capacity) == (600, 1000)


def test_open_with_tuning_takes_the_sizes_of_the_tuning(tmp_path: Path) -> None:
    with OverflowRegion.open_with_tuning(tmp_path / "region", MemoryTuning(4096, 65536)) as region:
        assert (region.capacity, region.max_capacity) == (4096, 65536)


@pytest.mark.parametrize("kind", [str, Path, os.fsencode])
def test_a_path_may_be_any_path_like(tmp_path: Path, kind: Callable[[Path], Any]) -> None:
    path = tmp_path / "region"
    with OverflowRegion.open(kind(path), initial_capacity=4096) as region:
        assert region.path == str(path)
        assert type(region.path) is str
        assert path.stat().st_size == 4096


@pytest.mark.parametrize("name", [b"caf\xc3\xa9 \xe2\x82\xac", b"not utf-8 \xff\xfe", b"line\nbreak", b"-rf", b"%s{}"])
def test_a_path_may_hold_any_bytes(tmp_path: Path, name: bytes) -> None:
    path = tmp_path / os.fsdecode(name)
    with OverflowRegion.open(path, initial_capacity=4096) as region:
        assert os.fsencode(region.path or "") == os.fsencode(path)
        assert path.exists()
        repr(region)


def test_a_path_with_a_null_byte_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        OverflowRegion.open(str(tmp_path / "region") + "\0tail")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("path", [None, 3, 3.5, ["region"]])
def test_what_is_no_path_is_a_type_error(path: Any) -> None:
    with pytest.raises(TypeError):
        OverflowRegion.open(path)


@pytest.mark.parametrize("size", [0, -1, -(1 << 70), 1 << 64, 1 << 70])
@pytest.mark.parametrize("name", ["initial_capacity", "max_capacity"])
def test_impossible_sizes_are_refused_before_anything_is_made(tmp_path: Path, name: str, size: int) -> None:
    with pytest.raises(ValueError):
        OverflowRegion.open(tmp_path / "region", **{name: size})
    assert os.listdir(tmp_path) == []


def test_sizes_that_no_file_system_has_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises((ValueError, RegionError)):
        OverflowRegion.open(tmp_path / "region", initial_capacity=(1 << 63) - 1, max_capacity=(1 << 63) - 1)
    assert os.listdir(tmp_path) == []


def test_an_initial_capacity_above_the_ceiling_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        OverflowRegion.open_with_config(tmp_path / "region", 1001, 1000)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("alignment", [0, -1, -64, 3, 48, 8192, 1 << 70])
def test_an_alignment_must_be_a_power_of_two_up_to_a_page(tmp_path: Path, alignment: int) -> None:
    with pytest.raises(ValueError):
        OverflowRegion.open(tmp_path / "region", alignment=alignment)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["initial_capacity", "max_capacity", "alignment"])
@pytest.mark.parametrize("value", ["64", 4096.0, None, b"1"])
def test_sizes_that_are_no_integers_are_type_errors(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(TypeError):
        OverflowRegion.open(tmp_path / "region", **{name: value})
    assert os.listdir(tmp_path) == []


def test_the_files_are_private_whatever_the_umask(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        with OverflowRegion.open(tmp_path / "region", initial_capacity=4096) as region:
            region.write(b"secret", 0)
            modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in os.listdir(tmp_path)}
    finally:
        os.umask(umask)
    assert modes == {"region": 0o600, "region.slots": 0o600}


def test_the_file_is_as_long_as_the_capacity(new_region: NewRegion, tmp_path: Path) -> None:
    region = new_region(initial_capacity=1000)
    assert (tmp_path / "region").stat().st_size == region.capacity == 1000
    region.write(bytes(5000), 0)
    assert (tmp_path / "region").stat().st_size == region.capacity >= 5000


def test_a_named_file_stays_after_close(tmp_path: Path) -> None:
    with OverflowRegion.open(tmp_path / "region", initial_capacity=4096) as region:
        region.write(b"x", 0)
    assert (tmp_path / "region").stat().st_size == 4096


def test_reopening_keeps_the_size_and_starts_empty(new_region: NewRegion) -> None:
    first = new_region(initial_capacity=4096)
    slot = first.write(blob(10_000), 0)
    capacity = first.capacity
    first.close()
    second = new_region(initial_capacity=512)
    assert second.capacity == capacity
    assert (second.used_bytes, second.live_bytes, second.slot_count, len(second)) == (0, 0, 0, 0)
    with pytest.raises(InvalidSlotError):
        second.read(slot)
    assert second.write(b"new", 0) == 0
    assert second.used_bytes == 3


def test_reopening_does_not_enlarge_the_file(new_region: NewRegion) -> None:
    new_region(initial_capacity=4096).close()
    assert new_region(initial_capacity=1 << 20).capacity == 4096


@pytest.mark.parametrize("recover", [False, True])
def test_a_file_larger_than_the_ceiling_opens_and_does_not_grow(new_region: NewRegion, recover: bool) -> None:
    first = new_region(initial_capacity=1 << 20)
    first.write(blob(5000), 0)
    first.close()
    region = new_region(initial_capacity=4096, max_capacity=8192, recover=recover)
    assert (region.capacity, region.max_capacity, len(region)) == (1 << 20, 8192, int(recover))
    slot = region.write(blob(1_000_000), 0)  # what the file has can be used
    with pytest.raises(CapacityExceededError) as caught:
        region.write(blob(100_000), 0)
    assert caught.value.max_capacity == 8192 and region.read(slot) == blob(1_000_000)
    region.max_capacity = 1 << 22
    region.write(blob(100_000), 0)
    region.trim()


def test_a_file_of_holes_is_adopted_at_its_size(new_region: NewRegion, tmp_path: Path) -> None:
    with open(tmp_path / "region", "wb") as file:
        file.truncate(200_000)
    region = new_region(initial_capacity=4096)
    assert region.capacity == 200_000
    slot = region.write(blob(100_000), 0)
    assert region.read(slot) == blob(100_000)


def test_an_empty_file_is_adopted(new_region: NewRegion, tmp_path: Path) -> None:
    (tmp_path / "region").touch()
    assert new_region(initial_capacity=4096).capacity == 4096


def test_temporary_has_no_path_and_no_name(tmp_path: Path) -> None:
    with OverflowRegion.temporary(tmp_path, initial_capacity=4096, max_capacity=1 << 20, alignment=1) as region:
        slots = [region.write(blob(5000, seed), 0) for seed in range(4)]
        assert region.path is None
        assert (region.max_capacity, region.used_bytes) == (1 << 20, 20_000)
        assert os.listdir(tmp_path) == []
        assert [region.read(slot) for slot in slots] == [blob(5000, seed) for seed in range(4)]
    assert region.closed
    assert os.listdir(tmp_path) == []


def test_temporary_needs_no_directory() -> None:
    with OverflowRegion.temporary(initial_capacity=4096) as region:
        assert region.read_bytes(region.write(b"somewhere", 0)) == b"somewhere"


def test_many_temporary_regions_share_a_directory(tmp_path: Path) -> None:
    regions = [OverflowRegion.temporary(tmp_path, initial_capacity=4096) for _ in range(5)]
    slots = [region.write(bytes([number]) * 100, 0) for number, region in enumerate(regions)]
    for number, (region, slot) in enumerate(zip(regions, slots, strict=True)):
        assert region.read(slot) == bytes([number]) * 100
        region.close()


# Write and read


@pytest.mark.parametrize("alignment", [1, 8, 64, 4096])
@pytest.mark.parametrize("size", SIZES)
def test_what_is_read_is_what_was_written(new_region: NewRegion, size: int, alignment: int) -> None:
    region = new_region(alignment=alignment)
    expected = [blob(size, 1), blob(5, 2), blob(size, 3)]
    slots = [region.write(data, 0) for data in expected]
    assert slots == [0, 1, 2]
    for slot, data in zip(slots, expected, strict=True):
        assert region.read(slot) == data
        assert bytes(region.read(slot)) == region.read_bytes(slot) == data
        assert region.slot(slot).size == len(data)


def test_a_view_is_a_flat_read_only_memoryview_of_bytes(new_region: NewRegion) -> None:
    region = new_region()
    view = region.read(region.write(np.arange(10.0), 0))
    assert type(view) is memoryview
    assert (view.format, view.itemsize, view.ndim, view.shape, view.strides) == ("B", 1, 1, (80,), (1,))
    assert view.readonly and view.c_contiguous and view.contiguous
    with pytest.raises(TypeError):
        view[0] = 1
    assert not np.frombuffer(view, np.float64).flags.writeable


def test_a_view_of_an_empty_value_is_an_empty_view(new_region: NewRegion) -> None:
    region = new_region()
    slots = [region.write(b"", 3) for _ in range(3)]
    for slot in slots:
        view = region.read(slot)
        assert (len(view), view.nbytes, view.readonly, view.format) == (0, 0, True, "B")
        assert region.read_bytes(slot) == b""
        assert region.read_into(slot, bytearray()) == 0
        assert region.slot(slot).size == 0
    assert (len(region), region.live_bytes, region.used_bytes) == (3, 0, 0)
    region.free(slots[1])
    assert (len(region), slots[1] in region) == (2, False)


def test_reads_share_the_stored_bytes(new_region: NewRegion) -> None:
    region = new_region()
    slot = region.write(blob(1000), 0)
    assert np.shares_memory(np.frombuffer(region.read(slot), np.uint8), np.frombuffer(region.read(slot), np.uint8))


def test_neither_write_nor_read_copies_through_the_heap(new_region: NewRegion) -> None:
    region = new_region(initial_capacity=32 * MIB, max_capacity=64 * MIB)
    sources = [bytearray(8 * MIB), np.zeros(MIB), memoryview(array.array("d", bytes(8 * MIB)))]
    tracemalloc.start()
    try:
        for source in sources:
            region.free(region.write(source, 0))
        view = region.read(region.write(sources[0], 0))
        part = view[MIB : 2 * MIB]
        assert len(part) == MIB
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MIB


def test_a_shorter_value_in_reused_space_shows_no_old_bytes(new_region: NewRegion) -> None:
    region = new_region()
    region.free(region.write(b"\xaa" * 4096, 0))
    slot = region.write(b"short", 0)
    assert region.slot(slot).offset == 0
    assert region.read(slot) == region.read_bytes(slot) == b"short"
    target = bytearray(b"." * 64)
    assert region.read_into(slot, target) == 5
    assert target == b"short" + b"." * 59


def test_read_bytes_is_an_independent_copy(new_region: NewRegion) -> None:
    region = new_region()
    slot = region.write(blob(500), 0)
    data = region.read_bytes(slot)
    assert type(data) is bytes
    region.free(slot)
    region.write(bytes(500), 0)
    assert data == blob(500)
    assert region.stats().pinned_bytes == 0


@pytest.mark.parametrize(
    "target",
    [
        lambda: bytearray(1000),
        lambda: memoryview(bytearray(1000)),
        lambda: array.array("d", bytes(1000)),
        lambda: np.zeros((25, 5)),
        lambda: mmap.mmap(-1, 1000),
        lambda: (ctypes.c_char * 1000)(),
    ],
    ids=["bytearray", "memoryview", "array", "numpy", "mmap", "ctypes"],
)
def test_read_into_fills_any_writable_buffer(new_region: NewRegion, target: Callable[[], Any]) -> None:
    region = new_region()
    buffer = target()
    assert region.read_into(region.write(blob(1000), 0), buffer) == 1000
    assert bytes(memoryview(buffer).cast("B")) == blob(1000)


def test_read_into_leaves_the_rest_of_a_larger_buffer(new_region: NewRegion) -> None:
    region = new_region()
    buffer = bytearray(b"-" * 20)
    assert region.read_into(region.write(b"0123456789", 0), memoryview(buffer)[5:]) == 10
    assert buffer == b"-----0123456789-----"


def test_read_into_a_buffer_that_is_too_small_copies_nothing(new_region: NewRegion) -> None:
    region = new_region()
    slot = region.write(blob(10), 0)
    buffer = bytearray(b"-" * 9)
    with pytest.raises(ValueError):
        region.read_into(slot, buffer)
    assert buffer == b"-" * 9


def test_read_into_needs_a_writable_contiguous_buffer(new_region: NewRegion) -> None:
    region = new_region()
    slot = region.write(b"abc", 0)
    readonly = bytes(3)
    with pytest.raises((BufferError, TypeError)):
        region.read_into(slot, readonly)
    assert readonly == b"\0\0\0"
    with pytest.raises((BufferError, TypeError)):
        region.read_into(slot, region.read(slot))
    strided = bytearray(8)
    with pytest.raises(BufferError):
        region.read_into(slot, memoryview(strided)[::2])
    assert strided == bytes(8)
    with pytest.raises(TypeError):
        region.read_into(slot, [0, 0, 0])


def test_no_export_of_a_buffer_outlives_the_call(new_region: NewRegion) -> None:
    region = new_region()
    buffer = bytearray(b"resizable")
    slot = region.write(buffer, 0)
    buffer.append(0)
    region.read_into(slot, buffer)
    buffer.append(0)
    with pytest.raises(ValueError):
        region.write(buffer, 256)
    with pytest.raises(ValueError):
        region.read_into(region.write(bytes(100), 0), buffer)
    buffer.append(0)
    assert region.read(slot) == b"resizable"


def test_later_changes_of_the_source_do_not_reach_the_region(new_region: NewRegion) -> None:
    region = new_region()
    for size in (10, 100_000):
        source = bytearray(blob(size))
        slot = region.write(source, 0)
        source[:] = bytes(size)
        assert region.read(slot) == blob(size)


# Kinds of data


@pytest.mark.parametrize(
    "source",
    [
        blob(1000),
        bytearray(blob(1000)),
        memoryview(blob(1000)),
        memoryview(blob(1000))[100:900],
        memoryview(blob(1000)).cast("d"),
        memoryview(blob(1000)).cast("B", (10, 100)),
        memoryview(array.array("H", blob(1000))),
        array.array("b", blob(1000)),
        array.array("d", blob(1000)),
        (ctypes.c_int32 * 250).from_buffer_copy(blob(1000)),
        np.frombuffer(blob(1000), np.float32),
        np.frombuffer(blob(1000), np.int16).reshape(20, 25),
        np.frombuffer(blob(1000), ">f8"),
        np.frombuffer(blob(1000), [("a", "<i4"), ("b", "<f4"), ("c", "S2")]),
        np.frombuffer(blob(1000), np.uint8)[::1][7:],
        np.array([True, False, True]),
        np.array(3.5),
        np.array([1 + 2j]),
        np.empty((0, 7)),
        pa.py_buffer(blob(1000)),
        pa.array([1, 2, 3], pa.int64()).buffers()[1],
        pa.array(np.arange(100.0)).buffers()[1].slice(8, 80),
    ],
    ids=lambda source: type(source).__name__,
)
def test_any_c_contiguous_buffer_is_stored_as_its_bytes(new_region: NewRegion, source: Any) -> None:
    region = new_region()
    view = memoryview(source)
    expected = view.tobytes()
    slot = region.write(source, 0)
    assert region.read_bytes(slot) == expected
    assert region.slot(slot).size == len(expected)


@pytest.mark.parametrize("access", [mmap.ACCESS_READ, mmap.ACCESS_WRITE, mmap.ACCESS_COPY])
def test_a_mapped_file_is_a_source(new_region: NewRegion, tmp_path: Path, access: int) -> None:
    (tmp_path / "source").write_bytes(blob(10_000))
    region = new_region()
    with open(tmp_path / "source", "r+b") as file, mmap.mmap(file.fileno(), 0, access=access) as mapped:
        slot = region.write(mapped, 0)
    assert region.read(slot) == blob(10_000)


def test_an_array_comes_back_without_a_copy(new_region: NewRegion) -> None:
    region = new_region(max_capacity=32 * MIB)
    source = np.random.default_rng(0).standard_normal((1000, 100))
    view = region.read(region.write(source, EngineId.VECTOR))
    array_ = np.frombuffer(view, np.float64).reshape(1000, 100)
    np.testing.assert_array_equal(array_, source)
    arrow = pa.py_buffer(view)
    assert arrow.address == array_.ctypes.data
    assert arrow.to_pybytes() == source.tobytes()


@pytest.mark.parametrize(
    "source",
    [
        np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        np.arange(12.0).reshape(3, 4).T,
        np.arange(12)[::2],
        np.arange(12)[::-1],
        np.arange(24).reshape(4, 6)[:, 1:5],
        np.broadcast_to(np.arange(3), (4, 3)),
        memoryview(b"abcdef")[::2],
        memoryview(b"abcdef")[::-1],
    ],
    ids=["fortran", "transposed", "strided", "reversed", "columns", "broadcast", "strided_view", "reversed_view"],
)
def test_a_buffer_that_is_not_c_contiguous_is_a_buffer_error(new_region: NewRegion, source: Any) -> None:
    region = new_region()
    with pytest.raises(BufferError):
        region.write(source, 0)
    assert (region.slot_count, region.used_bytes) == (0, 0)


@pytest.mark.parametrize("source", ["text", ["a", "list"], [1, 2], None, 5, 5.0, object(), {1: 2}, (b"x",)])
def test_what_is_no_buffer_is_a_type_error(new_region: NewRegion, source: Any) -> None:
    region = new_region()
    with pytest.raises(TypeError):
        region.write(source, 0)
    assert (region.slot_count, region.used_bytes) == (0, 0)


def test_a_released_view_is_refused(new_region: NewRegion) -> None:
    region = new_region()
    view = memoryview(b"gone")
    view.release()
    with pytest.raises(ValueError):
        region.write(view, 0)
    assert region.slot_count == 0


# Engines


def test_engines_have_their_lower_case_name() -> None:
    names = ["VECTOR", "SPARSE", "CRDT", "TIMESERIES", "QUERY", "WAL", "BRIDGE"]
    assert [engine.name for engine in EngineId] == names
    assert [str(engine) for engine in EngineId] == [name.lower() for name in names]
    assert issubclass(EngineId, enum.IntEnum)
    assert all(0 <= engine <= 255 for engine in EngineId)


@pytest.mark.parametrize("engine", list(EngineId))
def test_a_known_engine_comes_back_as_itself(new_region: NewRegion, engine: EngineId) -> None:
    region = new_region()
    assert region.slot(region.write(b"x", engine)).engine is engine
    assert region.slot(region.write(b"x", int(engine))).engine == engine


@pytest.mark.parametrize("engine", [*range(0, 256, 15), 254, 255])
def test_any_engine_from_0_to_255_comes_back(new_region: NewRegion, engine: int) -> None:
    region = new_region()
    stored = region.slot(region.write(b"x", engine)).engine
    assert stored == engine
    assert isinstance(stored, int)


def test_a_users_own_enum_is_an_engine(new_region: NewRegion) -> None:
    class Mine(enum.IntEnum):
        GRAPH = 200

    region = new_region()
    assert region.slot(region.write(b"x", Mine.GRAPH)).engine == Mine.GRAPH


@pytest.mark.parametrize("engine", [-1, 256, 1000, 1 << 63, -(1 << 63), 1 << 70])
def test_an_engine_outside_its_range_is_a_value_error(new_region: NewRegion, engine: int) -> None:
    region = new_region()
    with pytest.raises(ValueError):
        region.write(b"x", engine)
    assert (region.slot_count, region.used_bytes) == (0, 0)


@pytest.mark.parametrize("engine", ["vector", 1.0, None, b"\1", np.float32(1)])
def test_an_engine_that_is_no_integer_is_a_type_error(new_region: NewRegion, engine: Any) -> None:
    region = new_region()
    with pytest.raises(TypeError):
        region.write(b"x", engine)
    assert (region.slot_count, region.used_bytes) == (0, 0)


# Slots, free space, figures


def test_slots_count_up_from_zero_and_freed_ones_may_come_again(new_region: NewRegion) -> None:
    region = new_region()
    assert [region.write(b"x", 0) for _ in range(5)] == [0, 1, 2, 3, 4]
    region.free(2)
    assert (region.slot_count, len(region)) == (5, 4)
    slot = region.write(b"again", 0)
    assert slot in (2, 5)
    assert region.slot_count == (5 if slot == 2 else 6)
    assert region.read(slot) == b"again"


def test_freed_slot_numbers_keep_the_table_short(new_region: NewRegion) -> None:
    region = new_region()
    for _ in range(10_000):
        region.free(region.write(b"x", 0))
    assert region.slot_count < 10_000
    assert region.used_bytes == 1


def test_membership_follows_the_life_of_a_slot(new_region: NewRegion) -> None:
    region = new_region()
    slot = region.write(b"x", 0)
    assert slot in region
    assert np.int64(slot) in region
    region.free(slot)
    assert slot not in region
    for stranger in (-1, 1, 1 << 40, 1 << 63, 1 << 70, -(1 << 70), "0", 0.5, None, b"0", (0,), object()):
        assert stranger not in region


def test_numpy_integers_are_slots_and_engines(new_region: NewRegion) -> None:
    region = new_region()
    slot = region.write(b"x", np.uint8(7))  # type: ignore[arg-type]
    assert region.read(np.int64(slot)) == b"x"  # type: ignore[arg-type]
    assert region.slot(np.uint16(slot)).engine == 7  # type: ignore[arg-type]


def test_slot_describes_a_live_and_a_freed_value(new_region: NewRegion) -> None:
    region = new_region(alignment=64)
    region.write(b"x" * 100, EngineId.WAL)
    slot = region.write(b"y" * 50, EngineId.CRDT)
    assert region.slot(slot) == OverflowSlot(offset=128, size=50, engine=EngineId.CRDT, occupied=True)
    region.free(slot)
    assert region.slot(slot).occupied is False
    region.write(b"z" * 10, 0)
    assert region.slot(0).occupied is True


def test_the_first_write_of_13_bytes_uses_13(new_region: NewRegion) -> None:
    region = new_region()
    region.write(bytes(13), 0)
    assert (region.used_bytes, region.live_bytes) == (13, 13)
    region.write(bytes(5), 0)
    assert (region.used_bytes, region.live_bytes) == (69, 18)


@pytest.mark.parametrize("alignment", [1 << power for power in range(13)])
def test_values_start_at_multiples_of_the_alignment(new_region: NewRegion, alignment: int) -> None:
    region = new_region(alignment=alignment)
    end = 0
    for size in (1, 3, 64, 100, 4096, 5000, 33_000):
        slot = region.write(blob(size), 0)
        offset = region.slot(slot).offset
        assert offset == -(-end // alignment) * alignment
        assert np.frombuffer(region.read(slot), np.uint8).ctypes.data % alignment == 0
        end = offset + size
    assert region.used_bytes == end


def test_used_bytes_does_not_fall_on_free(new_region: NewRegion) -> None:
    region = new_region()
    slots = [region.write(bytes(64), 0) for _ in range(3)]
    for slot in reversed(slots):
        region.free(slot)
        assert region.used_bytes == 192
    assert (region.live_bytes, region.stats().free_bytes, len(region)) == (0, 192, 0)


def test_free_bytes_lie_below_the_mark(new_region: NewRegion) -> None:
    region = new_region()
    region.free(region.write(bytes(13), 0))
    assert (region.used_bytes, region.stats().free_bytes) == (13, 13)


def test_free_space_is_reused_before_the_mark_moves(new_region: NewRegion) -> None:
    region = new_region()
    slots = [region.write(bytes(1024), 0) for _ in range(8)]
    region.free(slots[3])
    assert region.slot(region.write(blob(1000), 0)).offset == 3 * 1024
    assert region.used_bytes == 8 * 1024


def test_the_rest_of_a_split_extent_stays_free(new_region: NewRegion) -> None:
    region = new_region()
    first = region.write(bytes(1024), 0)
    region.write(bytes(64), 0)
    region.free(first)
    assert [region.slot(region.write(bytes(256), 0)).offset for _ in range(4)] == [0, 256, 512, 768]
    assert (region.used_bytes, region.stats().free_bytes) == (1088, 0)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_free_neighbours_coalesce_in_any_order(new_region: NewRegion, order: tuple[int, ...]) -> None:
    region = new_region()
    region.write(bytes(64), 0)
    slots = [region.write(bytes(64), 0) for _ in range(3)]
    region.write(bytes(64), 0)
    for position in order:
        region.free(slots[position])
    assert region.slot(region.write(bytes(192), 0)).offset == 64
    assert region.used_bytes == 5 * 64


def test_the_best_fitting_hole_is_taken(new_region: NewRegion) -> None:
    region = new_region()
    holes = {}
    for size in (8192, 128, 1024, 64, 4096):
        holes[size] = region.write(bytes(size), 0)
        region.write(b"wall", 0)
    offsets = {size: region.slot(slot).offset for size, slot in holes.items()}
    for slot in holes.values():
        region.free(slot)
    for size in (1024, 64, 8192, 4096, 128):
        assert region.slot(region.write(bytes(size), 0)).offset == offsets[size]


def test_values_neither_overlap_nor_change_under_random_churn(
    new_region: NewRegion, check: Callable[[OverflowRegion], None]
) -> None:
    region = new_region(initial_capacity=4096, max_capacity=4 * MIB, alignment=16)
    rng = random.Random(7)
    model: dict[int, bytes] = {}
    for _ in range(3000):
        if model and (rng.random() < 0.45 or len(model) > 60):
            slot = rng.choice(list(model))
            assert region.read_bytes(slot) == model.pop(slot)
            region.free(slot)
        else:
            data = rng.randbytes(rng.choice([0, 1, 15, 16, 17, 200, 3000, 30_000, 50_000]))
            slot = region.write(data, rng.randrange(256))
            assert slot not in model
            model[slot] = data
    check(region)
    extents = sorted((s.offset, s.offset + s.size) for s in map(region.slot, model) if s.size)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(extents))
    assert region.live_bytes == sum(map(len, model.values()))
    assert {slot: region.read_bytes(slot) for slot in model} == model


def test_stats_agree_with_the_properties(new_region: NewRegion) -> None:
    region = new_region(initial_capacity=4096, max_capacity=65536)
    slots = [region.write(bytes(1024), 0) for _ in range(5)]
    region.free(slots[0])
    region.free(slots[2])
    stats = region.stats()
    assert type(stats) is RegionStats
    assert stats.capacity == region.capacity == 8192
    assert stats.max_capacity == region.max_capacity == 65536
    assert stats.used_bytes == region.used_bytes == 5120
    assert stats.live_bytes == region.live_bytes == 3072
    assert stats.slot_count == region.slot_count == 5
    assert stats.live_slots == len(region) == 3
    assert (stats.free_bytes, stats.pinned_bytes, stats.growths) == (2048, 0, 1)


def test_properties_other_than_the_ceiling_cannot_be_set(new_region: NewRegion) -> None:
    region = new_region()
    for name in ("path", "capacity", "used_bytes", "live_bytes", "slot_count", "closed"):
        with pytest.raises(AttributeError):
            setattr(region, name, 1)


# The objects around a region


@pytest.mark.parametrize(
    "instance",
    [
        MemoryTuning(),
        OverflowSlot(offset=0, size=1, engine=2, occupied=True),
    ],
    ids=lambda instance: type(instance).__name__,
)
def test_the_dataclasses_are_frozen_comparable_and_picklable(instance: Any) -> None:
    assert dataclasses.is_dataclass(instance)
    for field in dataclasses.fields(instance):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(instance, field.name, 5)
    twin = pickle.loads(pickle.dumps(instance))
    assert twin == instance and hash(twin) == hash(instance) and twin is not instance
    assert dataclasses.replace(instance, **{dataclasses.fields(instance)[0].name: 77}) != instance


def test_stats_are_a_frozen_snapshot(new_region: NewRegion) -> None:
    region = new_region()
    before = region.stats()
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.capacity = 1  # type: ignore[misc]
    region.write(b"x", 0)
    assert before.used_bytes == 0
    assert before != region.stats() == region.stats()
    assert pickle.loads(pickle.dumps(before)) == before


def test_tuning_has_the_default_sizes() -> None:
    assert MemoryTuning() == MemoryTuning(overflow_initial_bytes=64 * MIB, overflow_max_bytes=1024 * MIB)
    assert [field.name for field in dataclasses.fields(MemoryTuning)][:2] == [
        "overflow_initial_bytes",
        "overflow_max_bytes",
    ]


def test_a_with_block_gives_the_region_and_closes_it(tmp_path: Path) -> None:
    region = OverflowRegion.open(tmp_path / "region", initial_capacity=4096)
    with pytest.raises(ZeroDivisionError), region as inside:
        assert inside is region
        assert not region.closed
        1 / 0  # noqa: B018
    assert region.closed


def test_repr_tells_where_and_whether_it_is_open(tmp_path: Path) -> None:
    path = tmp_path / "r.ovf"
    region = OverflowRegion.open(path, initial_capacity=4096)
    opened = repr(region)
    region.close()
    for text in (opened, repr(region)):
        assert "OverflowRegion" in text
        assert str(path) in text
    assert "closed" in repr(region).replace(str(path), "")
    assert "closed" not in opened.replace(str(path), "")
    with OverflowRegion.temporary(tmp_path, initial_capacity=4096) as temporary:
        assert "OverflowRegion" in repr(temporary)


def test_an_empty_region_is_true(new_region: NewRegion) -> None:
    # `if region:` asks whether there is one, not whether it holds something.
    region = new_region()
    assert len(region) == 0
    assert bool(region)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps], ids=["copy", "deepcopy", "pickle"])
def test_a_region_can_be_neither_copied_nor_pickled(
    new_region: NewRegion, duplicate: Callable[[OverflowRegion], object]
) -> None:
    region = new_region()
    slot = region.write(b"x", 0)
    with pytest.raises(TypeError):
        duplicate(region)
    assert region.read(slot) == b"x"


def test_the_public_names_are_there() -> None:
    names = {
        "OverflowRegion",
        "OverflowSlot",
        "RegionStats",
        "MemoryTuning",
        "EngineId",
        "MemError",
        "RegionError",
        "InvalidSlotError",
        "CapacityExceededError",
        "WrongThreadError",
        "RegionClosedError",
        "RegionBusyError",
        "StaleSlotError",
        "RegionIOError",
        "BudgetExhaustedError",
        "GlobalCeilingExceededError",
        "UnknownEngineError",
    }
    assert names <= set(nodedb_mem.__all__)
    assert all(hasattr(nodedb_mem, name) for name in nodedb_mem.__all__)
