"""Arrays and tables on a region's bytes, without a copy."""

from __future__ import annotations

import gc
import random
from array import array
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from kit import Check, NewRegion, Unchanged

DTYPES = ["?", "i1", "u2", "<i4", ">i4", "f2", "f4", "f8", "c16", "M8[ns]", "S7", "U3", "i4,f8"]


def address(buffer: Any) -> int:
    return np.frombuffer(buffer, np.uint8).ctypes.data


# NumPy


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_array_is_stored_and_seen_in_place(new_region: NewRegion, dtype: str) -> None:
    region = new_region()
    source = np.frombuffer(random.Random(1).randbytes(np.dtype(dtype).itemsize * 500), np.uint8).copy()
    if np.dtype(dtype) == np.bool_:
        source &= 1
    if np.dtype(dtype).kind == "U":
        source = np.array(["abc", "é", ""] * 100).view(np.uint8)
    # datetime64 exports no buffer: its bytes do.
    slot = region.write(source, 0)
    stored = np.frombuffer(region.read(slot), dtype)
    assert stored.tobytes() == source.tobytes()
    assert not stored.flags.writeable and not stored.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        stored[0] = stored[1]
    with pytest.raises(ValueError):
        stored.flags.writeable = True


def test_three_lines_of_numpy(new_region: NewRegion) -> None:
    region = new_region()
    slot = region.write(np.arange(1000.0), 0)
    stored = np.frombuffer(region.read(slot), np.float64)
    assert stored.sum() == 499_500


def test_the_array_keeps_its_bytes(new_region: NewRegion, check: Check) -> None:
    region = new_region()
    slot = region.write(np.arange(1000), 0)
    part = np.frombuffer(region.read(slot), np.int64).reshape(10, 100)[3:5, ::7].T
    region.free(slot)
    region.write_many([b"\xff" * 8000] * 3, 0)
    assert (part == np.arange(1000).reshape(10, 100)[3:5, ::7].T).all()
    check(region)
    region.close()
    assert part[0, 0] == 300
    del part
    gc.collect()


@pytest.mark.parametrize("order", ["strided", "fortran", "reversed", "broadcast"])
def test_an_array_that_is_not_contiguous_is_refused(new_region: NewRegion, unchanged: Unchanged, order: str) -> None:
    region = new_region()
    source = {
        "strided": np.arange(20)[::2],
        "fortran": np.asfortranarray(np.ones((3, 4))),
        "reversed": np.arange(20)[::-1],
        "broadcast": np.broadcast_to(np.int64(1), 5),
    }[order]
    with unchanged(region):
        for call in (
            lambda: region.write(source, 0),
            lambda: region.write_many([b"a", source], 0),
            lambda: region.write_vectored([b"a", source], 0),
            lambda: region.write_many(source, 0, lengths=array("q", [source.nbytes])),
        ):
            with pytest.raises(BufferError, match="contiguous"):
                call()


@pytest.mark.parametrize("alignment", [64, 128, 4096])
def test_every_slot_and_every_aligned_part_starts_at_64_bytes(new_region: NewRegion, alignment: int) -> None:
    region = new_region(alignment=alignment)
    lengths = [random.Random(i).randrange(1, 700) for i in range(200)]
    slots = [
        region.write(bytes(13), 0),
        *region.write_many([bytes(n) for n in lengths], 0),
        *region.write_many(bytes(sum(lengths)), 0, lengths=np.array(lengths)),
        region.write_vectored([bytes(n) for n in lengths], 0, aligned=True),
        region.allocate(77, 0)[0],
        region.write(bytes(300_001), 0),
    ]
    region.free_many(slots[3:300:3])
    live = [slot for slot in slots if slot in region]
    for views in ([region.read(s) for s in live], region.read_many(live), [region.restore(s) for s in live]):
        assert all(np.frombuffer(view, np.uint8).ctypes.data % alignment == 0 for view in views)
    assert address(region.allocate(5, 0)[1]) % alignment == 0
    vectored = next(slot for slot in live if len(region.parts(slot).sizes) > 1)
    parts = region.parts(vectored).split(region.read(vectored))
    assert all(np.frombuffer(part, np.uint8).ctypes.data % 64 == 0 for part in parts)


def test_rows_are_stored_without_a_loop(new_region: NewRegion) -> None:
    region = new_region()
    rows = np.random.default_rng(1).random((500, 16))
    lengths = np.full(500, rows[0].nbytes)
    slots = np.frombuffer(region.write_many(rows, 0, lengths=lengths), np.int64)
    assert slots.tolist() == list(range(500))
    picked = np.array([3, 499, 3, 70])
    out = np.empty((4, 16))
    assert (np.frombuffer(region.read_many_into(slots[picked], out), np.int64) == 128).all()
    assert (out == rows[picked]).all()
    region.free_many(slots[::2])
    assert len(region) == 250


# Arrow


def test_an_arrow_buffer_shares_the_bytes(new_region: NewRegion, check: Check) -> None:
    region = new_region()
    slot = region.write(np.arange(1000), 0)
    view = region.read(slot)
    buffer = pa.py_buffer(view)
    assert (buffer.address, buffer.size, buffer.is_mutable) == (address(view), 8000, False)
    column = pa.Array.from_buffers(pa.int64(), 1000, [None, buffer])
    del view, buffer
    region.free(slot)
    region.write_many([b"\xff" * 8000] * 2, 0)
    assert column.to_pylist() == list(range(1000))
    check(region)
    del column
    gc.collect()
    assert region.stats().pinned_bytes == 0


def test_arrow_buffers_are_values(new_region: NewRegion) -> None:
    region = new_region()
    column = pa.array(["one", None, "three"])
    buffers = column.buffers()
    slot = region.write_vectored(buffers, 0, aligned=True)
    back = [pa.py_buffer(part) for part in region.parts(slot).split(region.read(slot))]
    assert pa.Array.from_buffers(pa.string(), 3, back).equals(column)
    assert all(buffer.address % 64 == 0 for buffer in back)
    assert [len(part) for part in region.parts(slot).split(region.read(slot))] == [b.size for b in buffers]


def message_size(table: pa.Table) -> int:
    sink = pa.MockOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.size()


def test_an_ipc_stream_is_written_in_place_and_read_without_a_copy(new_region: NewRegion, check: Check) -> None:
    region = new_region()
    table = pa.table(
        {
            "number": np.arange(5000),
            "real": np.linspace(0, 1, 5000),
            "text": [f"row {i}" if i % 7 else None for i in range(5000)],
        }
    )
    slot, view = region.allocate(message_size(table), 0)
    with pa.ipc.new_stream(pa.FixedSizeBufferWriter(pa.py_buffer(view)), table.schema) as writer:
        writer.write_table(table)
    region.commit(slot)
    del view, writer

    stored = region.read(slot)
    start, end = address(stored), address(stored) + len(stored)
    back = pa.ipc.open_stream(pa.py_buffer(stored)).read_all()
    del stored
    assert back.equals(table)
    buffers = [b for column in back.columns for chunk in column.chunks for b in chunk.buffers() if b is not None]
    assert len(buffers) >= 4
    for buffer in buffers:
        assert start <= buffer.address and buffer.address + buffer.size <= end
        assert buffer.address % 8 == 0
    del buffer, buffers
    region.free(slot)
    region.evict()
    region.write(b"\xff" * 200_000, 0)
    assert back.equals(table)
    check(region)
    del back
    gc.collect()
    assert region.stats().pinned_bytes == 0


def test_a_restored_table_is_private(new_region: NewRegion) -> None:
    region = new_region()
    slot = region.write(np.arange(100), 0)
    buffer = pa.py_buffer(region.restore(slot))
    assert buffer.is_mutable
    np.frombuffer(buffer, np.int64)[:] = 7
    assert set(pa.Array.from_buffers(pa.int64(), 100, [None, buffer]).to_pylist()) == {7}
    assert (np.frombuffer(region.read(slot), np.int64) == np.arange(100)).all()


def test_a_message_that_is_longer_than_its_room_is_arrows_error(new_region: NewRegion, check: Check) -> None:
    region = new_region()
    table = pa.table({"number": np.arange(5000)})
    before = region.write(b"\x01" * 500, 0)
    _, view = region.allocate(1000, 0)
    after = region.write(b"\x02" * 500, 0)
    sink = pa.FixedSizeBufferWriter(pa.py_buffer(view))
    with pytest.raises((OSError, pa.ArrowInvalid)):
        pa.ipc.new_stream(sink, table.schema).write_table(table)
    assert region.read_bytes(before) + region.read_bytes(after) == b"\x01" * 500 + b"\x02" * 500
    check(region)
