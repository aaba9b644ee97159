"""Many values in one call: all or nothing, from lists and from arrays of lengths and slots."""

from __future__ import annotations

import ctypes
import sys
import threading
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kit import Check, Mount, NewRegion, RunPython, Unchanged, blob
from nodedb_mem import CapacityExceededError, InvalidSlotError, OverflowRegion, RegionClosedError

has_buffer_method = pytest.mark.skipif(sys.version_info < (3, 12), reason="__buffer__ came with 3.12")

# What the core is told of values in three ways: joined bytes, addresses, one buffer with lengths.
WAYS = ["bytes", "buffers", "lengths"]
ways = pytest.mark.parametrize("way", WAYS)


def write(region: OverflowRegion, values: list[bytes], way: str, engine: int = 0) -> list[int]:
    if way == "lengths":
        sizes = array("q", map(len, values))
        return list(region.write_many(b"".join(values), engine, lengths=sizes))
    return list(region.write_many(values if way == "bytes" else [bytearray(v) for v in values], engine))


def int64s(kind: str, numbers: list[int]) -> Any:
    match kind:
        case "numpy":
            return np.array(numbers, np.int64)
        case "array":
            return array("q", numbers)
        case "memoryview":
            return memoryview(array("q", numbers).tobytes()).cast("q")
        case "strided":
            return np.repeat(np.array(numbers, np.int64), 2)[::2]
        case _:
            return (ctypes.c_int64 * len(numbers))(*numbers)


int64_kinds = pytest.mark.parametrize("kind", ["numpy", "array", "memoryview", "strided", "ctypes"])


# Writing


@ways
@pytest.mark.parametrize("alignment", [1, 64, 4096])
@pytest.mark.parametrize(
    "sizes",
    [[0], [1], [64] * 1000, [0, 5, 0, 0, 7, 0], [4096, 1, 4095], [300_000, 17, 600_000], [5000] * 50],
    ids=["empty", "byte", "equal", "some-empty", "pages", "large", "many"],
)
def test_each_value_is_read_back(
    new_region: NewRegion, check: Check, way: str, alignment: int, sizes: list[int]
) -> None:
    region = new_region(alignment=alignment)
    values = [blob(size, i) for i, size in enumerate(sizes)]
    slots = write(region, values, way, 3)
    check(region)
    assert slots == list(range(len(sizes)))
    assert [region.read_bytes(slot) for slot in slots] == values
    assert [bytes(view) for view in region.read_many(slots)] == values
    assert all(region.slot(slot).offset % alignment == 0 for slot in slots)
    assert region.live_bytes == sum(sizes)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    before=st.lists(st.integers(0, 9000), max_size=12),
    freed=st.sets(st.integers(0, 11)),
    sizes=st.lists(st.integers(0, 9000), min_size=1, max_size=30),
    way=st.sampled_from(WAYS),
    alignment=st.sampled_from([1, 64, 4096]),
)
def test_a_batch_fills_the_holes_and_touches_no_other_value(
    tmp_path: Path, check: Check, before: list[int], freed: set[int], sizes: list[int], way: str, alignment: int
) -> None:
    with OverflowRegion.temporary(tmp_path, initial_capacity=1, max_capacity=1 << 20, alignment=alignment) as region:
        model = {region.write(blob(size, i), 0): blob(size, i) for i, size in enumerate(before)}
        for slot in freed & model.keys():
            region.free(slot)
            del model[slot]
        values = [blob(size, 100 + i) for i, size in enumerate(sizes)]
        for slot, value in zip(write(region, values, way), values, strict=True):
            assert slot not in model
            model[slot] = value
        check(region)
        assert {slot: region.read_bytes(slot) for slot in model} == model
        assert len(region) == len(model)


@ways
def test_slot_numbers_follow_the_order_of_the_values_and_freed_ones_come_back(new_region: NewRegion, way: str) -> None:
    region = new_region()
    assert write(region, [b"a", b"b", b"c"], way) == [0, 1, 2]
    assert write(region, [b"d", b"e"], way) == [3, 4]
    region.free_many([1, 3])
    again = write(region, [b"f", b"g", b"h"], way)
    assert set(again) == {1, 3, 5}
    assert [region.read_bytes(slot) for slot in again] == [b"f", b"g", b"h"]
    assert region.slot_count == 6


@ways
def test_a_batch_reuses_freed_space(new_region: NewRegion, way: str) -> None:
    region = new_region()
    slots = write(region, [blob(1000, i) for i in range(100)], way)
    used = region.used_bytes
    for round_ in range(5):
        region.free_many(slots)
        slots = write(region, [blob(1000, i + round_) for i in range(100)], way)
    assert (region.used_bytes, region.slot_count) == (used, 100)


@ways
def test_a_batch_grows_the_file_once(new_region: NewRegion, way: str) -> None:
    region = new_region(initial_capacity=4096)
    write(region, [blob(1000, i) for i in range(1000)], way)
    assert region.stats().growths == 1
    assert region.capacity >= region.used_bytes >= 1_000_000


def test_views_of_the_region_may_be_values_of_a_batch(new_region: NewRegion, check: Check) -> None:
    region = new_region(initial_capacity=4096)
    values = [blob(size, size) for size in (10, 5000, 300_000)]
    views = region.read_many(region.write_many(values, 0))
    copies = region.write_many(views, 0)  # which grows the file
    region.free_many([0, 1, 2])
    assert [region.read_bytes(slot) for slot in copies] == values
    packed = region.write_many(region.read(copies[2]), 0, lengths=array("q", [100_000] * 3))
    assert b"".join(map(region.read_bytes, packed)) == values[2]
    private = region.restore(copies[0])
    private[:3] = b"xyz"
    assert region.read_bytes(region.write_many([private], 0)[0]) == b"xyz" + values[0][3:]
    check(region)


def test_any_iterable_and_any_contiguous_buffer_will_do(new_region: NewRegion) -> None:
    region = new_region()
    matrix = np.arange(12, dtype=np.float64).reshape(3, 4)
    assert [region.read_bytes(s) for s in region.write_many(matrix, 0)] == [row.tobytes() for row in matrix]
    mixed: list[Any] = [b"one", bytearray(b"two"), memoryview(b"three"), array("i", [4]), np.float32(5), b""]
    got = region.write_many((value for value in mixed), 0)
    assert [region.read_bytes(s) for s in got] == [bytes(memoryview(v).cast("B")) if v else b"" for v in mixed]
    assert [region.read_bytes(s) for s in region.write_many({b"key": 1}, 0)] == [b"key"]


@int64_kinds
def test_lengths_and_slots_are_any_buffer_of_int64(new_region: NewRegion, kind: str) -> None:
    region = new_region()
    slots = region.write_many(b"abcdef", 2, lengths=int64s(kind, [1, 0, 3, 2]))
    assert isinstance(slots, memoryview)
    assert (slots.format, slots.itemsize, slots.tolist()) == ("q", 8, [0, 1, 2, 3])
    assert np.frombuffer(slots, np.int64).tolist() == [0, 1, 2, 3]
    wanted = int64s(kind, [3, 2, 0, 2])
    assert [bytes(view) for view in region.read_many(wanted)] == [b"ef", b"bcd", b"a", b"bcd"]
    room = bytearray(b"." * 10)
    assert region.read_many_into(wanted, room).tolist() == [2, 3, 1, 3]
    assert room == b"efbcdabcd."
    region.evict(wanted)
    region.free_many(int64s(kind, [0, 2]))
    assert [slot in region for slot in range(4)] == [False, True, False, True]
    assert region.slot(1).engine == 2


def test_no_lengths_are_no_values(new_region: NewRegion, unchanged: Unchanged) -> None:
    region = new_region()
    with unchanged(region):
        assert region.write_many(b"", 0, lengths=array("q")).tolist() == []
        assert region.write_many(b"", 0, lengths=np.empty(0, np.int64)).tolist() == []


# Refused batches


@pytest.mark.parametrize(
    ("last", "error"),
    [
        (3, TypeError),
        ("text", TypeError),
        (None, TypeError),
        (np.zeros((4, 4))[:, 1], BufferError),
        (memoryview(bytearray(8))[::2], BufferError),
    ],
    ids=["int", "str", "None", "strided", "strided-memoryview"],
)
@pytest.mark.parametrize("first", [bytes, bytearray])
def test_a_wrong_value_at_the_end_refuses_the_batch(
    new_region: NewRegion, unchanged: Unchanged, first: type, last: Any, error: type[Exception]
) -> None:
    region = new_region(initial_capacity=4096)
    region.write_many([b"here", b"before", b"gone"], 0)
    region.free(2)
    ahead = [first(blob(5000, i)) for i in range(20)]
    with unchanged(region):
        for call in (region.write_many, region.write_vectored):
            with pytest.raises(error) as caught:
                call([*ahead, last], 0)
            if first is bytearray:
                ahead[0].append(1)  # no longer exported, though the traceback lives
            assert caught.value is not None
    assert region.write(b"next", 0) == 2


@ways
@pytest.mark.parametrize("at", ["first", "middle", "last"])
def test_a_batch_past_the_ceiling_is_refused_whole(
    new_region: NewRegion, unchanged: Unchanged, way: str, at: str
) -> None:
    region = new_region(initial_capacity=4096, max_capacity=1 << 17)
    kept = write(region, [blob(700, i) for i in range(20)], way)
    region.free_many(kept[3:15:2])  # holes that the batch would fill
    values = [blob(600, i) for i in range(30)]
    values.insert({"first": 0, "middle": 15, "last": 30}[at], bytes(1 << 17))
    with unchanged(region), pytest.raises(CapacityExceededError) as caught:
        write(region, values, way)
    assert caught.value.max_capacity == 1 << 17 < caught.value.required
    with unchanged(region), pytest.raises(CapacityExceededError):
        write(region, [blob(1000, i) for i in range(200)], way)  # none too large by itself
    slots = write(region, values[1:15], way)
    assert [region.read_bytes(slot) for slot in slots] == values[1:15]


@ways
def test_a_batch_that_just_fits_is_written(new_region: NewRegion, unchanged: Unchanged, way: str) -> None:
    region = new_region(initial_capacity=64, max_capacity=64 * 100 + 10)
    with unchanged(region), pytest.raises(CapacityExceededError):
        write(region, [bytes(64)] * 100 + [bytes(11)], way)
    write(region, [bytes(64)] * 100 + [bytes(10)], way)
    assert region.used_bytes == region.capacity == region.max_capacity


@pytest.mark.parametrize("engine", [-1, 256, 1 << 70])
def test_a_wrong_engine_refuses_the_batch(new_region: NewRegion, unchanged: Unchanged, engine: int) -> None:
    region = new_region()
    with unchanged(region):
        for call in (
            lambda: region.write_many([b"a"], engine),
            lambda: region.write_many(b"a", engine, lengths=array("q", [1])),
            lambda: region.write_vectored([b"a"], engine),
            lambda: region.allocate(1, engine),
        ):
            with pytest.raises(ValueError, match="engine"):
                call()


@pytest.mark.parametrize("make", [list, tuple, lambda values: iter(values)], ids=["list", "tuple", "generator"])
def test_no_buffers_are_a_mistake(new_region: NewRegion, unchanged: Unchanged, make: Any) -> None:
    region = new_region()
    with unchanged(region):
        with pytest.raises(ValueError, match="no buffers"):
            region.write_many(make([]), 0)
        with pytest.raises(ValueError, match="no buffers"):
            region.write_vectored(make([]), 0)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([5], "add up to 5 bytes, the buffer has 6"),
        ([], "add up to 0 bytes, the buffer has 6"),
        ([7], "add up to 7 bytes, the buffer has 6"),
        ([6, 1], "add up to 7 bytes"),
        ([0, 6, 0, 1], "add up to 7 bytes"),
        ([-1, 7], r"lengths\[0\] is negative: -1"),
        ([7, -1], r"lengths\[1\] is negative: -1"),
        ([6, -1, 1], r"lengths\[1\] is negative: -1"),
        ([-(1 << 63), 6], r"lengths\[0\] is negative: -9223372036854775808"),
        ([1 << 62] * 4, f"add up to {1 << 64} bytes"),  # wraps to 0
        ([1 << 62, 1 << 62, 1 << 62, 1 << 62, 6], f"add up to {(1 << 64) + 6} bytes"),  # wraps to 6
        ([6, (1 << 63) - 1, (1 << 63) - 1, 2], f"add up to {(1 << 64) + 6} bytes"),  # wraps to 6
    ],
)
def test_lengths_that_do_not_add_up_refuse_the_batch(
    new_region: NewRegion, unchanged: Unchanged, lengths: list[int], message: str
) -> None:
    region = new_region()
    with unchanged(region), pytest.raises(ValueError, match=message):
        region.write_many(b"sixsix", 0, lengths=array("q", lengths))


@pytest.mark.parametrize(
    "lengths",
    [
        np.array([1, 2], np.int32),
        np.array([1, 2], np.uint64),
        np.array([1.0, 2.0]),
        np.array([1, 2], ">i8"),
        array("i", [1, 2]),
        array("d", [1, 2]),
        (1).to_bytes(8, "little") + (2).to_bytes(8, "little"),
        bytearray(16),
        [1, 2],
        (1, 2),
        3,
        "12",
    ],
    ids=lambda lengths: f"{type(lengths).__name__}-{getattr(lengths, 'dtype', getattr(lengths, 'typecode', ''))}",
)
def test_lengths_that_are_no_int64_are_a_type_error(new_region: NewRegion, unchanged: Unchanged, lengths: Any) -> None:
    region = new_region()
    data = bytearray(b"abc")
    with unchanged(region):
        with pytest.raises(TypeError, match="a buffer of int64 is needed, not") as caught:
            region.write_many(data, 0, lengths=lengths)
        data.append(1)  # no longer exported, though the traceback lives
        assert caught.value is not None


def test_a_list_of_buffers_takes_no_lengths(new_region: NewRegion, unchanged: Unchanged) -> None:
    region = new_region()
    with unchanged(region), pytest.raises(TypeError):
        region.write_many([b"a", b"b"], 0, lengths=array("q", [1, 1]))
    with unchanged(region), pytest.raises(TypeError):
        region.write_many(b"ab", 0)  # whose items are numbers


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        *(("ext4", way) for way in WAYS),
        ("tmpfs", "buffers"),
        *(pytest.param("tmpfs", way, marks=pytest.mark.system) for way in WAYS if way != "buffers"),
    ],
)
@pytest.mark.parametrize("size", [1500, 70_000, 900_000])
def test_a_disk_that_fills_up_in_the_middle_refuses_the_batch(
    mount: Mount, run_python: RunPython, kind: str, way: str, size: int
) -> None:
    script = """
import errno, os, random, sys
from array import array
from nodedb_mem import OverflowRegion, RegionIOError
from nodedb_mem._core import lib

path, way, size = sys.argv[1], sys.argv[2], int(sys.argv[3])

def values(total, seed):
    data = random.Random(seed).randbytes(total)
    return [data[start : start + size] for start in range(0, total, size)]

def write(region, values):
    if way == "lengths":
        return list(region.write_many(b"".join(values), 0, lengths=array("q", map(len, values))))
    return region.write_many(values if way == "bytes" else list(map(bytearray, values)), 0)

def state():
    assert lib.ndm_region_check(region._handle) == 0
    return region.stats(), region.used_bytes, os.stat(path).st_size, {s: region.read_bytes(s) for s in model}

for initial in (1 << 16, 1 << 26):  # growing, and a file whose blocks are missing
    region = OverflowRegion.open(path, initial_capacity=initial, max_capacity=1 << 30)
    some = values(2 << 20, 1)
    model = dict(zip(write(region, some), some, strict=True))
    for slot in list(model)[::3]:
        region.free(slot)
        del model[slot]
    before = state()
    for attempt in range(2):
        try:
            write(region, values(16 << 20, 100))
        except RegionIOError as error:
            assert error.errno == errno.ENOSPC, error
        else:
            raise AssertionError("more than the disk holds")
        assert state() == before, attempt
    more = values(1 << 20, 7)
    model |= zip(write(region, more), more, strict=True)
    assert state()[3] == model
    region.close()
    os.unlink(path)
print("done")
"""
    directory = mount(kind, 12)
    assert run_python(script, directory / "region", way, size) == "done\n"


# Reading and freeing


def test_reading_many_pins_each_slot(new_region: NewRegion, check: Check) -> None:
    region = new_region()
    values = [blob(3000, i) for i in range(10)]
    slots = region.write_many(values, 0)
    views = region.read_many([*slots, slots[0]])
    assert all(view.readonly for view in views)
    region.free_many(slots)
    assert region.stats().pinned_bytes >= 30_000
    region.write_many([blob(3000, 50 + i) for i in range(10)], 0)
    assert [bytes(view) for view in views] == [*values, values[0]]
    del views[0]
    assert bytes(views[-1]) == values[0]  # listed twice, still shown
    views.clear()
    check(region)
    assert region.stats().pinned_bytes == 0


def test_empty_lists_of_slots_do_nothing(new_region: NewRegion, unchanged: Unchanged) -> None:
    region = new_region()
    region.write_many([b"a", b"b"], 0)
    with unchanged(region):
        for none in ([], (), iter(()), array("q"), np.empty(0, np.int64), set()):
            assert region.read_many(none) == []
            region.free_many(none)
            region.evict(none)
            assert region.read_many_into(none, bytearray()).tolist() == []


def test_slots_are_any_integers(new_region: NewRegion) -> None:
    region = new_region()
    region.write_many([b"0", b"1", b"2", b"3"], 0)
    for slots in (
        [np.int64(2), np.uint8(1)],
        range(2, 0, -1),
        (slot for slot in (2, 1)),
        np.array([2, 1], np.uint64),
        np.array([2, 1], np.int16),
        dict.fromkeys([2, 1]),
    ):
        assert [bytes(view) for view in region.read_many(slots)] == [b"2", b"1"]
    region.free_many({0, 1})
    region.free_many(range(2, 4))
    assert len(region) == 0


def test_slots_that_are_no_integers_are_a_type_error(new_region: NewRegion, unchanged: Unchanged) -> None:
    region = new_region()
    region.write_many([b"a", b"b"], 0)
    wrong: list[Any] = [[0.0], [b"0"], ["0"], [None], "01", b"\0", bytearray(8), memoryview(bytes(8)), 3, None]
    with unchanged(region):
        for slots in [*wrong, np.array([0.0])]:
            calls = [region.read_many, region.free_many, lambda slots: region.read_many_into(slots, bytearray(9))]
            if slots is not None:
                calls.append(region.evict)
            for call in calls:
                with pytest.raises(TypeError):
                    call(slots)
                    pytest.fail(repr(slots))


@pytest.mark.parametrize("as_array", [False, True])
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [(3, "freed"), (5, "never"), (-1, "never"), ((1 << 63) - 1, "never"), (-(1 << 63), "never"), (1 << 32, "never")],
)
def test_a_slot_that_is_not_live_refuses_the_batch(
    new_region: NewRegion, unchanged: Unchanged, wrong: int, reason: str, as_array: bool
) -> None:
    region = new_region()
    region.write_many([b"0", b"1", b"2", b"3", b"4"], 0)
    region.free(3)
    listed = [0, 1, wrong, 2]
    slots: Any = array("q", listed) if as_array else listed
    room = bytearray(b"." * 9)
    with unchanged(region):
        for call in (
            region.read_many,
            region.free_many,
            region.evict,
            lambda slots: region.read_many_into(slots, room),
        ):
            with pytest.raises(InvalidSlotError, match=reason) as caught:
                call(slots)
            assert caught.value.slot == wrong
    assert room == b"." * 9
    if as_array:
        slots.append(1)  # no longer exported


@pytest.mark.parametrize("wrong", [1 << 63, -(1 << 63) - 1, 1 << 200])
def test_slots_beyond_64_bits_never_existed(new_region: NewRegion, unchanged: Unchanged, wrong: int) -> None:
    region = new_region()
    region.write_many([b"0", b"1"], 0)
    with unchanged(region):
        for call in (
            lambda: region.read_many([0, wrong]),
            lambda: region.free_many([0, wrong]),
            lambda: region.evict([0, wrong]),
            lambda: region.read_many_into([0, wrong], bytearray(9)),
            lambda: region.restore(wrong),
            lambda: region.commit(wrong),
            lambda: region.parts(wrong),
        ):
            with pytest.raises(InvalidSlotError, match="never") as caught:
                call()
            assert caught.value.slot == wrong


@pytest.mark.parametrize("slots", [[1, 1], [0, 1, 2, 0], [199, *range(200)]])
@pytest.mark.parametrize("as_array", [False, True])
def test_a_slot_listed_twice_is_freed_by_none(
    new_region: NewRegion, unchanged: Unchanged, slots: list[int], as_array: bool
) -> None:
    region = new_region()
    region.write_many([bytes([i]) for i in range(200)], 0)
    with unchanged(region), pytest.raises(ValueError, match="twice"):
        region.free_many(array("q", slots) if as_array else slots)
    region.free_many(range(200))


def test_reading_into_too_small_a_buffer_copies_nothing(new_region: NewRegion, unchanged: Unchanged) -> None:
    region = new_region()
    slots = region.write_many([blob(100, i) for i in range(10)], 0)
    room = bytearray(b"." * 999)
    with unchanged(region):
        with pytest.raises(ValueError, match="1000 bytes"):
            region.read_many_into(slots, room)
        with pytest.raises(BufferError):
            region.read_many_into(slots, bytes(1000))
        with pytest.raises(TypeError):
            region.read_many_into(slots, [0] * 1000)
        with pytest.raises(BufferError):
            region.read_many_into(slots, np.zeros(2000, np.uint8)[::2])
    assert room == b"." * 999


@pytest.mark.parametrize("evicted", [False, True])
def test_values_are_copied_to_a_buffer_one_after_the_other(new_region: NewRegion, evicted: bool) -> None:
    region = new_region()
    values = [blob(size, size) for size in (0, 1, 100, 70_000, 600_000, 0)]
    slots = region.write_many(values, 0)
    if evicted:
        region.evict()
    room = np.zeros(sum(map(len, values)) + 5, np.uint8)
    lengths = region.read_many_into(slots[::-1], room)
    assert (lengths.format, lengths.tolist()) == ("q", [len(value) for value in values[::-1]])
    assert room.tobytes() == b"".join(values[::-1]) + bytes(5)
    slot, view = region.allocate(len(room), 0)
    region.read_many_into(slots, view)  # into the region itself
    assert region.read_bytes(slot) == b"".join(values) + bytes(5)


# What happens in the middle


def test_a_generator_may_use_the_region(new_region: NewRegion, check: Check) -> None:
    region = new_region()
    region.write_many([b"old"] * 3, 0)

    def values() -> Iterator[bytes]:
        for slot in range(3):
            region.free(slot)
            yield region.read_bytes(region.write(b"inner%d" % slot, 0))

    got = region.write_many(values(), 0)
    assert [region.read_bytes(slot) for slot in got] == [b"inner0", b"inner1", b"inner2"]
    assert len(region) == 6
    assert [bytes(view) for view in region.read_many(slot for slot in list(got))] == [b"inner0", b"inner1", b"inner2"]
    check(region)


def closing(region: OverflowRegion) -> Iterator[Any]:
    yield b"value"
    region.close()
    yield b"value"


class ClosingNumber:
    def __init__(self, act: Callable[[], object], number: int = 0) -> None:
        self.act = act
        self.number = number

    def __index__(self) -> int:
        self.act()
        return self.number


def test_a_region_closed_in_the_middle_says_so(new_region: NewRegion) -> None:
    for number, call in enumerate(
        [
            lambda region: region.write_many(closing(region), 0),
            lambda region: region.write_vectored(closing(region), 0),
            lambda region: region.read_many([0, ClosingNumber(region.close)]),
            lambda region: region.free_many([0, ClosingNumber(region.close, 1)]),
            lambda region: region.read_many_into([ClosingNumber(region.close)], bytearray(9)),
            lambda region: region.evict([ClosingNumber(region.close)]),
            lambda region: region.restore(ClosingNumber(region.close)),
            lambda region: region.commit(ClosingNumber(region.close)),
            lambda region: region.allocate(ClosingNumber(region.close, 9), 0),
        ]
    ):
        region = new_region(f"region{number}")
        region.write_many([b"a", b"b"], 0)
        with pytest.raises(RegionClosedError):
            call(region)


def test_an_error_from_the_iterable_is_passed_on(new_region: NewRegion, unchanged: Unchanged) -> None:
    def failing() -> Iterator[Any]:
        yield b"value"
        raise ZeroDivisionError

    region = new_region()
    region.write(b"", 0)
    with unchanged(region):
        for call in (
            lambda: region.write_many(failing(), 0),
            lambda: region.write_vectored(failing(), 0),
            lambda: region.read_many(1 // 0 for _ in range(3)),
            lambda: region.free_many([0, ClosingNumber(lambda: 1 // 0)]),
        ):
            with pytest.raises(ZeroDivisionError):
                call()


class Exporter:
    def __init__(self, act: Callable[[], object], data: Any) -> None:
        self.act = act
        self.data = data

    def __buffer__(self, flags: int) -> memoryview:
        self.act()
        return memoryview(self.data)


@has_buffer_method
def test_an_exporter_may_use_the_region(new_region: NewRegion, check: Check) -> None:
    region = new_region(initial_capacity=4096)
    slots = region.write_many([b"old"] * 4, 0)
    inner: list[int] = []
    growing = Exporter(lambda: inner.append(region.write(bytes(100_000), 0)), b"value")
    freeing = Exporter(lambda: region.free(slots.pop()), b"value")
    for got in (
        region.write_many([b"first", growing, freeing], 0),
        list(region.write_many(growing, 0, lengths=Exporter(lambda: region.free(slots.pop()), array("q", [5])))),
        [region.write_vectored([freeing, growing], 0)],
        [region.write(freeing, 0)],
    ):
        check(region)
        assert not set(got) & set(inner)
        assert {region.read_bytes(slot) for slot in got} <= {b"first", b"value", b"valuevalue"}
    inside = region.write_many([b"a", b"b"], 0)
    region.free(inside[0])
    with pytest.raises(InvalidSlotError):
        region.read_many(Exporter(lambda: region.free(inside[1]), array("q", [inside[1]])))
    check(region)


@has_buffer_method
def test_an_exporter_that_closes_the_region_is_told_so(new_region: NewRegion) -> None:
    ones = array("q", [1, 1])
    for number, call in enumerate(
        [
            lambda region: region.write_many([b"a", Exporter(region.close, b"b")], 0),
            lambda region: region.write_many(Exporter(region.close, b"ab"), 0, lengths=ones),
            lambda region: region.write_many(b"ab", 0, lengths=Exporter(region.close, ones)),
            lambda region: region.write_vectored([b"a", Exporter(region.close, b"b")], 0),
            lambda region: region.read_many(Exporter(region.close, array("q", [0]))),
            lambda region: region.free_many(Exporter(region.close, array("q", [0]))),
            lambda region: region.read_many_into([0], Exporter(region.close, bytearray(9))),
        ]
    ):
        region = new_region(f"region{number}")
        region.write(b"a", 0)
        with pytest.raises(RegionClosedError):
            call(region)


def test_a_buffer_cannot_be_resized_while_it_is_written(new_region: NewRegion, check: Check) -> None:
    region = new_region(max_capacity=1 << 26)
    data, stop = bytearray(1000), threading.Event()

    def resize() -> None:
        while not stop.is_set():
            for change in (lambda: data.extend(bytes(100_000)), lambda: data.__delitem__(slice(1000, None))):
                try:
                    change()
                except BufferError:
                    pass  # exported just now

    thread = threading.Thread(target=resize)
    thread.start()
    try:
        for _ in range(200):
            slots = region.write_many([data] * 20, 0)
            assert {region.slot(slot).size for slot in slots} <= {1000, 101_000}
            region.free_many(slots)
            region.free(region.write_vectored([data] * 3, 0))
            try:
                slots = region.write_many(data, 0, lengths=array("q", [500, 500]))
            except ValueError:
                continue
            region.free_many(slots)
    finally:
        stop.set()
        thread.join()
    check(region)
    assert len(region) == 0


def test_lengths_and_slots_that_another_thread_changes_break_nothing(run_python: RunPython, tmp_path: Path) -> None:
    # In a process of its own: the core reads both arrays more than once, without the GIL.
    script = """
import sys, threading
from array import array
from nodedb_mem import InvalidSlotError, OverflowRegion
from nodedb_mem._core import lib

COUNT = 20_000
sys.setswitchinterval(1e-5)
region = OverflowRegion.open(sys.argv[1], max_capacity=1 << 30)
shared, forms = array("q", [64] * COUNT), []

def flip():
    view = memoryview(shared)
    while forms is not None:
        for form in list(forms or ()):
            view[:] = form

thread = threading.Thread(target=flip)
try:
    forms += [array("q", [64] * COUNT), array("q", [0, 128] * (COUNT // 2))]
    thread.start()
    for _ in range(20):
        slots = region.write_many(bytes(64 * COUNT), 0, lengths=shared)
        assert lib.ndm_region_check(region._handle) == 0
        assert region.live_bytes == 64 * COUNT
        region.free_many(slots)
    assert region.write_many([b"x"] * COUNT, 0)[-1] < COUNT
    forms[:] = [array("q", range(COUNT)), array("q", [1 << 40] * COUNT), array("q", [-1 << 40] * COUNT)]
    for call in (region.read_many, lambda slots: region.read_many_into(slots, bytearray(COUNT)), region.free_many):
        for _ in range(20):
            try:
                call(shared)
            except InvalidSlotError as error:
                assert abs(error.slot) == 1 << 40 or not error.slot in region, error
            except ValueError:
                pass  # still lengths
            assert lib.ndm_region_check(region._handle) == 0
            if len(region) == 0:
                region.write_many([b"x"] * COUNT, 0)
            assert len(region) == COUNT
finally:
    forms = None
    thread.join()
print("done")
"""
    assert run_python(script, tmp_path / "region") == "done\n"
