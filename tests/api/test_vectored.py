"""Several buffers gathered into one slot, and where its parts lie."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kit import Check, Mount, NewRegion, RunPython, Unchanged, blob
from nodedb_mem import CapacityExceededError, InvalidSlotError, OverflowRegion
from nodedb_mem.refs import SlotParts

alignments = pytest.mark.parametrize("alignment", [1, 64, 4096])
PARTS = {
    "one": [100],
    "empty": [0],
    "all-empty": [0, 0, 0],
    "some-empty": [0, 5, 0, 0, 70, 0],
    "two": [13, 200],
    "exact": [64, 128, 4096, 8192],
    "large": [300_000, 17, 600_001, 1],
    "many": [7] * 1000,
}
shapes = pytest.mark.parametrize("sizes", PARTS.values(), ids=PARTS.keys())


def gathered(parts: list[bytes], alignment: int) -> bytes:
    """What the value should be: zeros up to each multiple of the alignment."""
    value = bytearray()
    for part in parts:
        value += bytes(-len(value) % alignment) + part
    return bytes(value)


@alignments
@shapes
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("space", ["fresh", "reused", "evicted", "trimmed"])
def test_the_parts_are_where_the_layout_says_and_zeros_are_between(
    new_region: NewRegion, check: Check, alignment: int, sizes: list[int], aligned: bool, space: str
) -> None:
    region = new_region(alignment=alignment, max_capacity=1 << 26)
    parts = [blob(size, i) for i, size in enumerate(sizes)]
    expected = gathered(parts, alignment if aligned else 1)
    dirt = b"\xff" * len(expected)
    guards = [region.write(b"guard" * 20, 0)]
    if space != "fresh" and dirt:
        before = region.write(dirt, 0)
        guards.append(region.write(b"guard" * 20, 0))
        if space == "evicted":
            region.evict()
        region.free(before)
        if space == "trimmed":
            region.trim()
    slot = region.write_vectored(parts, 7, aligned=aligned)
    check(region)
    view = region.read(slot)
    assert view == expected
    if space != "fresh" and dirt:
        assert region.slot(slot).offset == region.slot(before).offset
    layout = region.parts(slot)
    assert layout.sizes == tuple(sizes)
    assert len(layout.offsets) == len(sizes)
    assert [bytes(part) for part in layout.split(view)] == parts
    if aligned:
        address = np.frombuffer(view, np.uint8).ctypes.data if len(view) else 0
        assert all((address + offset) % alignment == 0 for offset in layout.offsets)
    assert region.slot(slot).engine == 7
    assert [region.read_bytes(guard) for guard in guards] == [b"guard" * 20] * len(guards)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(st.lists(st.integers(0, 5000), min_size=1, max_size=8), min_size=1, max_size=8),
    aligned=st.booleans(),
    alignment=st.sampled_from([1, 2, 64, 512, 4096]),
    data=st.data(),
)
def test_any_parts_in_any_holes(
    tmp_path: Path, check: Check, values: list[list[int]], aligned: bool, alignment: int, data: st.DataObject
) -> None:
    with OverflowRegion.temporary(tmp_path, initial_capacity=1, max_capacity=1 << 24, alignment=alignment) as region:
        region.free(region.write(b"\xff" * 300_000, 0))
        model: dict[int, list[bytes]] = {}
        for number, sizes in enumerate(values):
            parts = [blob(size, 10 * number + i) for i, size in enumerate(sizes)]
            model[region.write_vectored(parts, 0, aligned=aligned)] = parts
            if data.draw(st.booleans()):
                slot = data.draw(st.sampled_from(sorted(model)))
                region.free(slot)
                del model[slot]
            check(region)
            for slot, parts in model.items():
                view = region.read(slot)
                assert view == gathered(parts, alignment if aligned else 1)
                assert [bytes(part) for part in region.parts(slot).split(view)] == parts


def test_packed_parts_are_one_value_and_take_no_more_room(new_region: NewRegion) -> None:
    region = new_region()
    slot = region.write_vectored([b"head", bytearray(b"er"), memoryview(b"!")], 0)
    assert (region.read_bytes(slot), region.live_bytes, region.used_bytes) == (b"header!", 7, 7)
    assert region.parts(slot) == SlotParts((0, 4, 6), (4, 2, 1))
    slot = region.write_vectored([b"head", b"er"], 0, aligned=True)
    assert region.parts(slot) == SlotParts((0, 64), (4, 2))
    assert region.slot(slot).size == 66


def test_any_iterable_of_any_contiguous_buffers(new_region: NewRegion) -> None:
    region = new_region()
    matrix = np.arange(6.0).reshape(2, 3)
    slot = region.write_vectored((part for part in (b"x", matrix, array("h", [5]), matrix.T.copy())), 0)
    assert region.read_bytes(slot) == b"x" + matrix.tobytes() + array("h", [5]).tobytes() + matrix.T.tobytes()
    assert region.parts(slot).sizes == (1, 48, 2, 48)


def test_parts_may_be_views_of_the_region(new_region: NewRegion, check: Check) -> None:
    region = new_region(initial_capacity=4096)
    values = [blob(size, size) for size in (100, 5000, 400_000)]
    views = [region.read(region.write(value, 0)) for value in values]
    for _ in range(3):  # the file grows below them
        slot = region.write_vectored([*views, *views], 0, aligned=True)
        assert [bytes(part) for part in region.parts(slot).split(region.read(slot))] == values * 2
        views = region.parts(slot).split(region.read(slot))[3:]
        region.free(slot)
        check(region)
    assert [bytes(view) for view in views] == values


def test_a_part_pins_the_whole_value(new_region: NewRegion) -> None:
    region = new_region()
    slot = region.write_vectored([blob(100, 1), blob(100, 2)], 0, aligned=True)
    part = region.parts(slot).split(region.read(slot))[1]
    region.free(slot)
    region.write(b"\xff" * 228, 0)
    assert part == blob(100, 2)
    assert part.readonly


# The layout


def test_a_plain_slot_is_one_part(new_region: NewRegion) -> None:
    region = new_region()
    slots = [region.write(b"plain", 0), region.write(b"", 0), *region.write_many([b"many"], 0)]
    slots.append(region.allocate(9, 0)[0])
    assert [region.parts(slot) for slot in slots] == [SlotParts((0,), (size,)) for size in (5, 0, 4, 9)]
    assert region.parts(np.int64(slots[0])) == SlotParts((0,), (5,))


@pytest.mark.parametrize("many", [False, True])
def test_a_freed_slot_has_no_parts_and_a_reused_one_its_own(new_region: NewRegion, many: bool) -> None:
    region = new_region()
    for write in (
        lambda: region.write(b"plain", 0),
        lambda: region.write_many([b"plain"], 0)[0],
        lambda: region.write_many(b"plain", 0, lengths=array("q", [5]))[0],
        lambda: region.allocate(5, 0)[0],
    ):
        slot = region.write_vectored([b"a", b"b"], 0)
        if many:
            region.free_many([slot])
        else:
            region.free(slot)
        with pytest.raises(InvalidSlotError, match="freed"):
            region.parts(slot)
        assert write() == slot
        assert region.parts(slot) == SlotParts((0,), (5,))
        region.free(slot)
    again = region.write_vectored([b"abc"], 0)
    assert (again, region.parts(again)) == (slot, SlotParts((0,), (3,)))


def test_a_refused_free_keeps_the_layout(new_region: NewRegion) -> None:
    region = new_region()
    slot = region.write_vectored([b"a", b"b"], 0)
    with pytest.raises(ValueError):
        region.free_many([slot, slot])
    with pytest.raises(InvalidSlotError):
        region.free_many([slot, 99])
    assert region.parts(slot).sizes == (1, 1)


@pytest.mark.parametrize("wrong", [-1, 5, 1 << 70])
def test_a_slot_that_never_was_has_no_parts(new_region: NewRegion, wrong: int) -> None:
    with pytest.raises(InvalidSlotError, match="never"):
        new_region().parts(wrong)


def test_the_layout_survives_compaction_eviction_and_trim(new_region: NewRegion, check: Check) -> None:
    region = new_region()
    hole = region.write(bytes(100_000), 0)
    parts = [blob(1000, 1), b"", blob(70_000, 2)]
    slot = region.write_vectored(parts, 0, aligned=True)
    region.free(hole)
    before = region.slot(slot).offset
    region.compact()
    assert region.slot(slot).offset < before
    region.trim()
    region.evict()
    assert [bytes(part) for part in region.parts(slot).split(region.read(slot))] == parts
    check(region)


def test_only_the_whole_value_is_split(new_region: NewRegion) -> None:
    region = new_region()
    slot = region.write_vectored([b"abc", b"def"], 0)
    parts, view = region.parts(slot), region.read(slot)
    for wrong in (view[:5], b"abcdefg", b""):
        with pytest.raises(ValueError, match=f"6 bytes, the buffer {len(wrong)}"):
            parts.split(wrong)
    assert [bytes(part) for part in parts.split(bytearray(view))] == [b"abc", b"def"]


# Refused


@pytest.mark.parametrize("aligned", [False, True])
def test_parts_past_the_ceiling_are_refused_whole(new_region: NewRegion, unchanged: Unchanged, aligned: bool) -> None:
    region = new_region(initial_capacity=4096, max_capacity=1 << 16)
    region.write(b"here", 0)
    with unchanged(region), pytest.raises(CapacityExceededError) as caught:
        region.write_vectored([bytes(10_000)] * 7, 0, aligned=aligned)
    assert caught.value.required > caught.value.max_capacity == 1 << 16
    with unchanged(region), pytest.raises(CapacityExceededError):
        region.write_vectored([b"x"] * 1100, 0, aligned=True)  # by the gaps between them
    region.write_vectored([b"x"] * 1100, 0)


@pytest.mark.parametrize("wrong", [b"bytes", 3, None])
def test_what_is_no_iterable_of_buffers_is_a_type_error(
    new_region: NewRegion, unchanged: Unchanged, wrong: Any
) -> None:
    region = new_region()
    with unchanged(region), pytest.raises(TypeError):
        region.write_vectored(wrong, 0)


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
@pytest.mark.parametrize("aligned", [False, True])
def test_a_disk_that_fills_up_in_the_middle_leaves_nothing(
    mount: Mount, run_python: RunPython, kind: str, aligned: bool
) -> None:
    script = """
import errno, os, sys
from nodedb_mem import OverflowRegion, RegionIOError
from nodedb_mem._core import lib

path, aligned = sys.argv[1], sys.argv[2] == "True"
region = OverflowRegion.open(path, initial_capacity=1 << 26, max_capacity=1 << 30, alignment=4096)
kept = region.write(b"k" * 100_000, 0)
for size in (700, 50_000, 900_000):
    before = region.stats()
    try:
        region.write_vectored([bytes([255]) * size] * ((20 << 20) // size), 0, aligned=aligned)
    except RegionIOError as error:
        assert error.errno == errno.ENOSPC, error
    else:
        raise AssertionError("more than the disk holds")
    assert region.stats() == before
    assert os.stat(path).st_size == before.capacity
    assert lib.ndm_region_check(region._handle) == 0
    assert region.read(kept) == b"k" * 100_000
    slot = region.write_vectored([b"a" * 10_000, b"b" * 10_000], 0, aligned=True)
    assert bytes(region.read(slot)) == b"a" * 10_000 + bytes(2288) + b"b" * 10_000
print("done")
"""
    assert run_python(script, mount(kind, 12) / "region", aligned) == "done\n"
