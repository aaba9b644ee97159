"""Many values in one call of a reader: equal to one by one, all or nothing, never torn."""

from __future__ import annotations

import os
import random
import resource
import threading
from array import array
from typing import Any

import numpy as np
import pytest

from kit import NewRegion, RunPython, blob
from nodedb_mem import InvalidSlotError, OverflowReader, OverflowRegion, RegionClosedError, StaleSlotError

PAGE = os.sysconf("SC_PAGESIZE")
KIB = 1 << 10
SIZES = [0, 1, 100, 4096, 16_383, 16_384, 70_000, 600_000, 0]


def reader_of(region: OverflowRegion) -> OverflowReader:
    assert region.path is not None
    return OverflowReader(region.path)


def copied(reader: OverflowReader, slots: Any, size: int) -> tuple[bytes, list[int]]:
    room = bytearray(size)
    lengths = reader.read_many_into(slots, room)
    assert (lengths.format, lengths.itemsize) == ("q", 8)
    return bytes(room), lengths.tolist()


@pytest.mark.parametrize("evicted", [False, True])
def test_a_batch_is_what_one_by_one_gives(new_region: NewRegion, evicted: bool) -> None:
    region = new_region(alignment=1)
    values = [blob(size, number) for number, size in enumerate(SIZES * 3 + [50] * 2000)]
    slots = region.write_many(values, 0)
    with reader_of(region) as reader:
        for wanted in (slots, slots[::-1], random.Random(1).choices(slots, k=999), []):
            if evicted:
                region.evict()
            expected = [values[slot] for slot in wanted]
            assert reader.read_many(wanted) == expected
            if evicted:
                region.evict()
            found, lengths = copied(reader, wanted, sum(map(len, expected)))
            assert found == b"".join(expected)
            assert lengths == [len(value) for value in expected]


def test_slots_are_numbers_references_or_a_buffer_of_int64(new_region: NewRegion) -> None:
    region = new_region()
    slots = region.write_many([b"one", b"two", b"three"], 0)
    refs = [region.share(slot) for slot in slots]
    with reader_of(region) as reader:
        for wanted in (
            refs,
            tuple(refs),
            (ref for ref in refs),
            [refs[0], 1, refs[2]],
            array("q", slots),
            np.array(slots),
            {0: None, 1: None, 2: None},
        ):
            wanted = list(wanted) if iter(wanted) is wanted else wanted
            assert [bytes(view) for view in reader.read_many(wanted)] == [b"one", b"two", b"three"]
            assert copied(reader, wanted, 11) == (b"onetwothree", [3, 3, 5])
        assert copied(reader, iter(refs), 20)[0] == b"onetwothree" + bytes(9)
        for wrong in (7, refs[0], b"012", np.array([0.5]), ["0"], [None]):
            with pytest.raises(TypeError):
                reader.read_many(wrong)  # type: ignore[arg-type]
            with pytest.raises(TypeError):
                reader.read_many_into(wrong, bytearray(20))  # type: ignore[arg-type]


def test_views_are_read_only_and_outlive_the_reader(new_region: NewRegion) -> None:
    region = new_region()
    slots = region.write_many([b"one", b"two"], 0)
    with reader_of(region) as reader:
        views = reader.read_many(slots)
    assert all(view.readonly for view in views)
    assert [bytes(view) for view in views] == [b"one", b"two"]
    with pytest.raises(RegionClosedError):
        reader.read_many(slots)
    with pytest.raises(RegionClosedError):
        reader.read_many_into([], bytearray())


def test_a_slot_that_gives_no_value_refuses_the_batch_and_is_named(new_region: NewRegion) -> None:
    region = new_region()
    slots = region.write_many([blob(100, number) for number in range(1000)], 0)
    refs = [region.share(slot) for slot in slots]
    draft, view = region.allocate(10, 0)
    region.free(slots[500])
    room, sizes = bytearray(b"." * 200_000), None
    with reader_of(region) as reader:
        for bad, number in ((slots[500], 500), (1 << 40, 1 << 40), (-1, -1), (draft, draft), (1 << 70, 1 << 70)):
            wanted = [*slots[:300], bad, *slots[600:]]
            for call in (reader.read_many, lambda wanted: reader.read_many_into(wanted, room)):
                with pytest.raises(InvalidSlotError) as refused:
                    call(wanted)
                assert refused.value.slot == number
        for stale in (refs[500], refs[3]._replace(generation=9), refs[3]._replace(incarnation=9)):
            wanted = [*refs[:3], stale, *refs[600:]]
            for call in (reader.read_many, lambda wanted: reader.read_many_into(wanted, room)):
                with pytest.raises(StaleSlotError, match=f"slot {stale.slot}"):
                    call(wanted)
        assert room == b"." * 200_000 and sizes is None  # they were looked up before anything was copied
    del view


def test_a_buffer_that_is_no_room_for_them(new_region: NewRegion) -> None:
    region = new_region()
    slots = region.write_many([blob(100, i) for i in range(10)], 0)
    room = bytearray(b"." * 999)
    with reader_of(region) as reader:
        with pytest.raises(ValueError, match="1000 bytes"):
            reader.read_many_into(slots, room)
        with pytest.raises(BufferError):
            reader.read_many_into(slots, bytes(1000))
        with pytest.raises(TypeError):
            reader.read_many_into(slots, [0] * 1000)  # type: ignore[arg-type]
    assert room == b"." * 999


def test_a_region_that_was_opened_anew(new_region: NewRegion) -> None:
    region = new_region()
    slots = region.write_many([b"one", b"two"], 0)
    refs = [region.share(slot) for slot in slots]
    assert region.path is not None
    with reader_of(region) as reader:
        region.close()
        assert copied(reader, refs, 6)[0] == b"onetwo"  # closed, not gone
        with OverflowRegion.open(region.path) as again:
            again.write_many([b"three", b"four"], 0)
            for wanted in (slots, refs, []):
                with pytest.raises(StaleSlotError):
                    reader.read_many(wanted)
                with pytest.raises(StaleSlotError):
                    reader.read_many_into(wanted, bytearray(100))


def test_a_batch_follows_growth(new_region: NewRegion) -> None:
    region = new_region(initial_capacity=4096, max_capacity=64 << 20)
    with reader_of(region) as reader:
        for number in range(6):
            region.write_many([blob(200_000, number * 10 + i) for i in range(10)], 0)
            slots = list(range(len(region)))
            assert reader.read_many(slots) == [blob(200_000, slot) for slot in slots]
            assert copied(reader, slots, 200_000 * len(slots))[0] == b"".join(blob(200_000, slot) for slot in slots)


@pytest.mark.parametrize("size", [100, 70_000])
def test_no_value_is_torn_while_the_owner_moves_and_frees(new_region: NewRegion, size: int) -> None:
    region = new_region(max_capacity=1 << 30)
    kept: dict[int, bytes] = {}
    others: list[int] = []
    for number in range(1200 if size == 100 else 60):
        others.append(region.write(bytes(size // 3), 0))
        value = bytes([number % 251]) * size
        kept[region.write(value, 0)] = value
    over, found = threading.Event(), list[bool]()

    def read() -> None:
        chance = random.Random(7)
        with reader_of(region) as reader:
            while not over.is_set():
                wanted = chance.sample(list(kept), len(kept) // 2)
                room = bytearray(size * len(wanted))
                lengths = reader.read_many_into(wanted, room)
                expected = b"".join(kept[slot] for slot in wanted)
                found.append(room == expected and lengths.tolist() == [size] * len(wanted))

    thread = threading.Thread(target=read)
    thread.start()
    chance = random.Random(8)
    while len(found) < 60 and thread.is_alive():
        region.free_many([others.pop(chance.randrange(len(others))) for _ in range(40)])
        region.compact(1 << 20)
        others += [region.write(b"\xff" * chance.choice([10, 500, 5000, size]), 0) for _ in range(40)]
    over.set()
    thread.join()
    assert region.stats().moved_bytes > 0
    assert len(found) >= 60 and all(found)


def test_the_disk_is_asked_before_the_values_are_touched(new_region: NewRegion) -> None:
    region = new_region(max_capacity=1 << 28, cache_limit=None)
    count = 40_000
    values = np.random.default_rng(1).integers(0, 256, (count, 100), np.uint8)
    slots = np.frombuffer(region.write_many(values, 0, lengths=np.full(count, 100, np.int64)), np.int64)
    order = np.random.default_rng(2).permutation(count)
    with reader_of(region) as reader:
        region.evict()
        room = np.zeros_like(values)
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
        reader.read_many_into(slots[order], room)
        assert resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - before < values.size // PAGE // 5
        assert (room == values[order]).all()


def test_another_process_reads_a_batch(new_region: NewRegion, run_python: RunPython) -> None:
    region = new_region()
    region.write_many([blob(1000, number) for number in range(300)], 0)
    region.evict()
    script = """
    import sys
    from nodedb_mem import OverflowReader
    with OverflowReader(sys.argv[1]) as reader:
        room = bytearray(300_000)
        reader.read_many_into(range(300), room)
        assert [room[i * 1000 : (i + 1) * 1000] for i in range(300)] == reader.read_many(range(300))
        print(hash(bytes(room)) and len(room))
    """
    assert run_python(script, region.path).strip() == "300000"
