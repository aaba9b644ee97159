"""recover=True: what a closed or killed owner left is taken over; what is torn is refused."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kit import Check, NewRegion, StartPython, system
from nodedb_mem import InvalidSlotError, OverflowReader, OverflowRegion, RegionIOError, StaleSlotError

KIB, MIB = 1 << 10, 1 << 20
HEADER_ROOM, RECORD = 4096, 24
ALIGNMENT, COUNT, MOVE_SLOT = 24, 56, 104  # offsets in the table's header
LIVE, FREED, DRAFT, MOVING = 1, 2, 3, 4


def blob(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def fields(region: OverflowRegion, offset: int, count: int = 1) -> tuple[int, ...]:
    with open(f"{region.path}.slots", "rb") as file:
        file.seek(offset)
        return struct.unpack(f"={count}Q", file.read(8 * count))


def patch(region: OverflowRegion, offset: int, *words: int) -> None:
    with open(f"{region.path}.slots", "r+b") as file:
        file.seek(offset)
        file.write(struct.pack(f"={len(words)}Q", *words))


def record_at(slot: int) -> int:
    return HEADER_ROOM + slot * RECORD


def with_state(shape: int, state: int) -> int:
    return shape & ~(0xFF << 56) | state << 56


# ---- after close ----------------------------------------------------------------------------------------------


def test_every_value_is_there_after_close(new_region: NewRegion, check: Check) -> None:
    region = new_region(alignment=16)
    sizes = [0, 1, 15, 16, 17, 4096, 70_000, 3 * MIB, 0, 5]
    slots = [region.write(blob(i, size), i) for i, size in enumerate(sizes)]
    for gone in (1, 5, 6):
        region.free(slots[gone])
    refs = {slot: region.share(slot) for slot in slots if slot in region}
    figures = region.stats()
    usage = figures.engines
    region.close()

    again = new_region(recover=True)
    check(again)
    assert (len(again), again.slot_count, again.live_bytes) == (7, 10, figures.live_bytes)
    assert again.stats().engines == usage and again.capacity == figures.capacity
    for i, slot in enumerate(slots):
        if i in (1, 5, 6):
            with pytest.raises(InvalidSlotError):
                again.read(slot)
        else:
            assert again.read_bytes(slot) == blob(i, sizes[i])
    with OverflowReader(again.path) as reader:
        for slot, ref in refs.items():
            assert reader.read_bytes(ref) == again.read_bytes(slot)
            assert again.share(slot) == ref


def test_work_goes_on_after_recovery(new_region: NewRegion, check: Check) -> None:
    region = new_region()
    chance = random.Random(5)
    known: dict[int, int] = {}
    for turn in range(6):
        for step in range(200):
            if known and chance.random() < 0.45:
                slot = chance.choice(list(known))
                del known[slot]
                region.free(slot)
            else:
                seed = turn * 1000 + step
                known[region.write(blob(seed, seed % 9001), seed % 256)] = seed
            if step % 60 == 0:
                region.compact(50_000)
        region.close()
        region = new_region(recover=True)
        check(region)
        assert len(region) == len(known)
        for slot, seed in known.items():
            assert region.read_bytes(slot) == blob(seed, seed % 9001)
        region.trim()
        check(region)


def test_drafts_are_not_kept(new_region: NewRegion, check: Check) -> None:
    region = new_region()
    done, view = region.allocate(1000, 0)
    view[:] = blob(1, 1000)
    region.commit(done)
    draft, unfinished = region.allocate(1000, 0)
    del view, unfinished  # they would keep the file locked
    region.close()
    again = new_region(recover=True)
    check(again)
    assert again.read_bytes(done) == blob(1, 1000) and draft not in again


def test_the_alignment_of_the_file_holds(new_region: NewRegion, check: Check) -> None:
    region = new_region(alignment=16)
    slots = [region.write(blob(i, 17), 0) for i in range(10)]
    region.close()
    again = new_region(recover=True, alignment=4096)
    assert again.slot(again.write(b"value", 0)).offset % 16 == 0
    assert again.used_bytes < 4096
    parts = again.write_vectored([b"a", b"b"], 0, aligned=True)
    assert again.read_bytes(parts) == b"a" + bytes(15) + b"b"
    assert again.parts(parts).offsets == (0, 16)
    assert [again.read_bytes(slot) for slot in slots] == [blob(i, 17) for i in range(10)]
    check(again)


def test_the_default_open_starts_empty(new_region: NewRegion) -> None:
    region = new_region()
    ref = region.share(region.write(b"value", 0))
    region.close()
    again = new_region()
    assert (len(again), again.slot_count, again.live_bytes) == (0, 0, 0)
    assert again.share(again.write(b"other", 0)).incarnation != ref.incarnation
    again.close()
    third = new_region(recover=True)
    assert [third.read_bytes(slot) for slot in range(len(third))] == [b"other"]


def test_nothing_to_recover(new_region: NewRegion, tmp_path: Path, check: Check) -> None:
    region = new_region(recover=True)
    assert len(region) == 0
    region.close()
    region = new_region(recover=True)
    assert len(region) == 0
    check(region)
    (tmp_path / "foreign").write_bytes(b"not ours")
    with pytest.raises(RegionIOError) as caught:
        new_region("foreign", recover=True)
    assert caught.value.errno == errno.EEXIST and (tmp_path / "foreign").read_bytes() == b"not ours"


def test_a_reader_stays_through_a_recovery(new_region: NewRegion) -> None:
    region = new_region()
    ref = region.share(region.write(blob(1, 100_000), 0))
    with OverflowReader(ref) as reader:
        view = reader.read(ref)
        region.close()
        again = new_region(recover=True)
        assert reader.is_current(ref) and bytes(view) == reader.read_bytes(ref) == blob(1, 100_000)
        other = again.share(again.write(b"other", 0))
        assert reader.read_bytes(other) == b"other"
        again.free(ref.slot)
        assert not reader.is_current(ref)


# ---- after kill -9 --------------------------------------------------------------------------------------------

# Tells each value only after write() has returned, and each free before it begins. A seed tells a value's bytes.
_OWNER = """
import os, random, sys
from nodedb_mem import CapacityExceededError, OverflowRegion
path, turn, recover = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
chance = random.Random(turn)
# In half of the turns the ceiling is low, and writes make room by moving values.
ceiling = 1 << 26 if turn % 2 else max(1 << 22, os.path.getsize(path) if recover else 0)
region = OverflowRegion(path, initial_capacity=1 << 16, max_capacity=ceiling, recover=recover)
region.share(0 if recover else region.write(b"", 0))
live = [slot for slot in range(1, region.slot_count) if slot in region]
tell = sys.stdout.write
step = turn * 1_000_000
while True:
    step += 1
    kind = chance.randrange(20)
    if kind == 0:
        if chance.randrange(3) == 0:
            region.evict()  # what is moved has to be read then
        region.compact(chance.choice([None, 200_000]))
    elif kind == 1:
        region.trim()
    elif kind < 10 and len(live) > 20 or len(live) > 80:
        slot = live.pop(chance.randrange(len(live)))
        tell(f"free {slot}\\n")
        sys.stdout.flush()
        region.free(slot)
    else:
        size = chance.choice([0, 100, 5000, 70_000, 400_000])
        try:
            slot = region.write(random.Random(step).randbytes(size), step % 256)
        except CapacityExceededError:
            continue
        live.append(slot)
        ref = region.share(slot)
        tell(f"live {slot} {step} {size} {ref.generation}\\n")
        sys.stdout.flush()
"""


@pytest.mark.parametrize("turns", [3, system(12)])
def test_an_owner_killed_at_random_points(
    tmp_path: Path, new_region: NewRegion, start_python: StartPython, check: Check, turns: int
) -> None:
    path = tmp_path / "region"
    known: dict[int, tuple[int, int, int]] = {}
    for turn in range(turns):
        child = start_python(_OWNER, path, turn + 1, turn > 0)
        pause = random.Random(turn).uniform(0.2, 0.8)
        first = child.stdout.readline()
        time_to_kill = time.monotonic() + pause
        lines = [first]
        while time.monotonic() < time_to_kill:
            lines.append(child.stdout.readline())
        child.send_signal(signal.SIGKILL)
        lines += child.stdout.read().splitlines(keepends=True)
        child.wait()
        for line in lines:
            if not line.endswith("\n"):
                continue  # cut: the write is committed, but nobody was told
            word, slot, *rest = line.split()
            if word == "free":
                known.pop(int(slot))
            else:
                step, size, generation = map(int, rest)
                known[int(slot)] = (step, size, generation)
        with OverflowReader(path) as reader:
            assert reader.stats().owner is None
            for slot, (step, size, _) in known.items():
                try:
                    assert reader.read_bytes(slot) == blob(step, size)
                except StaleSlotError:  # it died while it moved this one: an error, never other bytes
                    assert fields_of(path, slot)[1] >> 56 == MOVING
            region = new_region(recover=True, max_capacity=1 << 26)
            check(region)
            for slot, (step, size, generation) in known.items():
                assert region.read_bytes(slot) == blob(step, size) == reader.read_bytes(slot)
                assert region.share(slot).generation == generation
        extra = [slot for slot in range(1, region.slot_count) if slot in region and slot not in known]
        assert len(extra) <= 1
        for slot in extra:  # written, or not yet freed, when it could not tell
            region.free(slot)
        written = region.write(blob(7, 50_000), 0)
        assert region.read_bytes(written) == blob(7, 50_000)
        region.free(written)
        region.compact()
        check(region)
        for slot, (step, size, _) in known.items():
            assert region.read_bytes(slot) == blob(step, size)
        region.close()
        del region


def fields_of(path: Path, slot: int) -> tuple[int, ...]:
    with open(f"{path}.slots", "rb") as file:
        file.seek(record_at(slot))
        return struct.unpack("=3Q", file.read(24))


# ---- as if it had died in the middle --------------------------------------------------------------------------


def test_a_free_that_was_half_done_leaves_no_reference_good(new_region: NewRegion, check: Check) -> None:
    region = new_region()
    ref = region.share(region.write(b"old", 0))
    region.write(b"more", 0)
    region.close()
    (shape,) = fields(region, record_at(0) + 8)
    patch(region, record_at(0) + 8, with_state(shape, FREED))  # withdrawn; its generation has not grown yet
    again = new_region(recover=True)
    check(again)
    assert again.write(b"new", 0) == ref.slot
    with OverflowReader(again.path) as reader, pytest.raises(StaleSlotError):
        reader.read_bytes(ref)


@pytest.mark.parametrize("moved", [0, 5000, 100_000])
@pytest.mark.parametrize("distance", [100_032, 5056])
def test_a_move_that_was_half_done_is_finished(new_region: NewRegion, check: Check, moved: int, distance: int) -> None:
    region = new_region()
    hole, slot = region.write(bytes(distance), 0), region.write(blob(1, 100_000), 0)
    ref = region.share(slot)
    region.free(hole)
    region.close()
    place, shape, _ = fields(region, record_at(slot), 3)
    assert place == distance
    value = blob(1, 100_000)
    with open(region.path or "", "r+b") as file:
        file.write(value[:moved])  # over the old place where they overlap
    patch(region, record_at(slot) + 8, with_state(shape, MOVING))
    patch(region, MOVE_SLOT, slot + 1, distance, 0, moved)
    with OverflowReader(ref) as reader:
        with pytest.raises(StaleSlotError):
            reader.read_bytes(ref)
        again = new_region(recover=True)
        check(again)
        assert again.slot(slot).offset == 0
        assert again.read_bytes(slot) == value == reader.read_bytes(ref)


# ---- torn -----------------------------------------------------------------------------------------------------


def _overlap(region: OverflowRegion) -> None:
    patch(region, record_at(1), fields(region, record_at(0))[0] + 64)


def _past_the_end(region: OverflowRegion) -> None:
    patch(region, record_at(1), (1 << 40))


def _huge(region: OverflowRegion) -> None:
    patch(region, record_at(1) + 8, (1 << 48) - 1 | LIVE << 56)


def _misaligned(region: OverflowRegion) -> None:
    patch(region, record_at(2), fields(region, record_at(2))[0] + 1)


def _bad_state(region: OverflowRegion) -> None:
    patch(region, record_at(1) + 8, with_state(fields(region, record_at(1) + 8)[0], 77))


def _moving_to_no_place(region: OverflowRegion) -> None:
    patch(region, record_at(1) + 8, with_state(fields(region, record_at(1) + 8)[0], MOVING))


def _moved(region: OverflowRegion, slot: int, to: int, moved: int = 0) -> None:
    place, shape, _ = fields(region, record_at(1), 3)
    patch(region, record_at(1) + 8, with_state(shape, MOVING))
    patch(region, MOVE_SLOT, slot, place & ((1 << 48) - 1), to, moved)


def _count(region: OverflowRegion) -> None:
    patch(region, COUNT, 1 << 40)


def _alignment(region: OverflowRegion) -> None:
    patch(region, ALIGNMENT, 48)


def _cut_short(region: OverflowRegion) -> None:
    os.truncate(f"{region.path}.slots", HEADER_ROOM + RECORD)


def _cut_to_less_than_a_page(region: OverflowRegion) -> None:
    os.truncate(f"{region.path}.slots", 1000)


def _data_cut_short(region: OverflowRegion) -> None:
    os.truncate(region.path or "", 8192)


TEARS: dict[str, Callable[[OverflowRegion], None]] = {
    "overlap": _overlap,
    "past the end": _past_the_end,
    "huge": _huge,
    "misaligned": _misaligned,
    "bad state": _bad_state,
    "moving to no place": _moving_to_no_place,
    "moved past the end": lambda region: _moved(region, 2, 1 << 40),
    "moved past the end, wrapping": lambda region: _moved(region, 2, (1 << 64) - 4096),
    "moved to a crooked place": lambda region: _moved(region, 2, 200_001),
    "moved more than there is": lambda region: _moved(region, 2, 200_000, 1 << 50),
    "moved a slot that is none": lambda region: _moved(region, 99, 0),
    "moved the slot -1": lambda region: _moved(region, (1 << 64) - 1, 0),
    "count": _count,
    "alignment": _alignment,
    "cut short": _cut_short,
    "cut to less than a page": _cut_to_less_than_a_page,
    "data cut short": _data_cut_short,
}


@pytest.mark.parametrize("tear", TEARS.values(), ids=TEARS.keys())
def test_torn_tables_are_refused(new_region: NewRegion, tear: Callable[[OverflowRegion], None]) -> None:
    region = new_region(initial_capacity=MIB)
    region.write_many([blob(i, 10_000) for i in range(4)], 0)
    region.close()
    tear(region)
    with pytest.raises(RegionIOError, match="slot table") as caught:
        new_region(recover=True, initial_capacity=MIB)
    assert caught.value.errno == errno.EUCLEAN
    assert caught.value.filename == f"{region.path}.slots"
    with pytest.raises(RegionIOError):  # and nothing was done to make it good
        new_region(recover=True, initial_capacity=MIB)
    again = new_region(initial_capacity=MIB)
    assert len(again) == 0 and again.read_bytes(again.write(b"value", 0)) == b"value"


@pytest.mark.parametrize("size", [1, 7, 8, 12, 103, 143])
def test_a_table_cut_off_within_its_header(new_region: NewRegion, tmp_path: Path, size: int) -> None:
    region = new_region()
    region.write(b"value", 0)
    region.close()
    os.truncate(f"{region.path}.slots", size)
    table = Path(f"{region.path}.slots").read_bytes()
    for recover in (True, False):  # what is left does not tell whose the data is
        with pytest.raises(RegionIOError, match="slot table is cut short") as caught:
            new_region(recover=recover)
        assert caught.value.errno == errno.EUCLEAN and caught.value.filename == f"{region.path}.slots"
    assert (tmp_path / "region").read_bytes()[:5] == b"value"
    assert (tmp_path / "region.slots").read_bytes() == table


@pytest.mark.parametrize("recover", [False, True])
@pytest.mark.parametrize("table", [b"N0", b"NDMSLOTZ", b"something else, and long enough" * 10])
def test_data_beside_a_table_that_is_none(new_region: NewRegion, tmp_path: Path, recover: bool, table: bytes) -> None:
    region = new_region()
    region.write(b"value", 0)
    region.close()
    (tmp_path / "region.slots").write_bytes(table)
    with pytest.raises(RegionIOError) as caught:
        new_region(recover=recover)
    assert (caught.value.errno, caught.value.filename) == (errno.EEXIST, f"{region.path}.slots")
    assert (tmp_path / "region").read_bytes()[:5] == b"value"
    assert (tmp_path / "region.slots").read_bytes() == table


def _stamp(region: OverflowRegion, what: str, value: int) -> bytes:
    with open(f"{region.path}.slots", "r+b") as file:
        file.seek({"version": 8, "page size": 16}[what])
        file.write(struct.pack("=I", value))
        file.seek(0)
        return file.read()


@pytest.mark.parametrize(("what", "value"), [("version", 1), ("version", 77), ("page size", 77)])
def test_tables_of_another_version_are_not_recovered(
    new_region: NewRegion, tmp_path: Path, what: str, value: int
) -> None:
    region = new_region()
    region.write(b"value", 0)
    region.close()
    table = _stamp(region, what, value)
    with pytest.raises(RegionIOError, match=what) as caught:
        new_region(recover=True)
    assert caught.value.errno == errno.EINVAL and caught.value.filename == f"{region.path}.slots"
    assert (tmp_path / "region.slots").read_bytes() == table


def test_a_default_open_replaces_an_older_table_and_leaves_a_newer_one(new_region: NewRegion, tmp_path: Path) -> None:
    region = new_region()
    region.write(b"value", 0)
    region.close()
    _stamp(region, "version", 1)
    region = new_region()
    assert len(region) == 0
    region.write(b"value", 0)
    region.close()
    table = _stamp(region, "version", 77)
    with pytest.raises(RegionIOError, match="version") as caught:
        new_region()
    assert caught.value.errno == errno.EINVAL and caught.value.filename == f"{region.path}.slots"
    assert (tmp_path / "region").read_bytes()[:5] == b"value"
    assert (tmp_path / "region.slots").read_bytes() == table


def test_a_table_of_another_file(new_region: NewRegion, tmp_path: Path) -> None:
    for name, value in (("one", b"1"), ("two", b"2")):
        region = new_region(name)
        region.write(value, 0)
        region.close()
    shutil.copy(tmp_path / "one.slots", tmp_path / "two.slots")
    with pytest.raises(RegionIOError):
        new_region("two", recover=True)
    assert (tmp_path / "two").read_bytes()[:1] == b"2"


@pytest.mark.parametrize("how", ["emptied", "deleted", "replaced"])
def test_a_table_whose_data_is_gone(new_region: NewRegion, tmp_path: Path, how: str) -> None:
    region = new_region()
    region.write(b"value", 0)
    region.close()
    match how:
        case "emptied":
            os.truncate(tmp_path / "region", 0)
        case "deleted":
            (tmp_path / "region").unlink()
        case "replaced":
            (tmp_path / "region").unlink()
            (tmp_path / "region").touch()
    table = (tmp_path / "region.slots").read_bytes()
    with pytest.raises(RegionIOError) as caught:
        new_region(recover=True)
    assert caught.value.errno == errno.EUCLEAN and caught.value.filename == f"{tmp_path}/region.slots"
    assert (tmp_path / "region.slots").read_bytes() == table
    assert (tmp_path / "region").exists() == (how != "deleted")
    region = new_region()  # says that the values are not wanted
    assert len(region) == 0
    assert region.read(region.write(b"new", 0)) == b"new"


def test_an_empty_region_whose_file_was_emptied_has_lost_nothing(new_region: NewRegion, tmp_path: Path) -> None:
    region = new_region()
    empty, gone = region.write(b"", 0), region.write(b"value", 0)
    region.free(gone)
    region.close()
    os.truncate(tmp_path / "region", 0)
    region = new_region(recover=True)
    assert region.read(empty) == b""
    values = {region.write(bytes([number]) * 70_000, 0): bytes([number]) * 70_000 for number in range(9)}
    assert all(region.read(slot) == value for slot, value in values.items())
