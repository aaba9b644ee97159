"""A region against a dict of bytes: any order of verbs, with views alive all along, sound after every step."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nodedb_mem import (
    CapacityExceededError,
    EngineId,
    InvalidSlotError,
    OverflowRegion,
    RegionBusyError,
    RegionClosedError,
)
from nodedb_mem._core import lib

SIZES = st.one_of(
    st.integers(0, 130),
    st.sampled_from([0, 1, 63, 64, 65, 1023, 1024, 4095, 4096, 4097, 32768]),
    st.integers(0, 20_000),
)
ENGINES = st.one_of(st.sampled_from(EngineId), st.integers(0, 255))


def value(number: int, size: int) -> bytes:
    """Bytes that differ from value to value and from place to place."""
    return np.random.default_rng(number).bytes(size)


@dataclass(eq=False)
class Stored:
    """What the model knows of one value: its place is taken while it is live or somebody shows it."""

    data: bytes
    engine: int
    offset: int
    live: bool = True
    views: int = 0


@dataclass(eq=False)
class Shown:
    """Something that shows (a part of) a value."""

    holder: Any
    expected: bytes
    source: Stored | None


class RegionMachine(RuleBasedStateMachine):
    """Drives one region at a time; views may outlive the region they came from."""

    alignment: int
    region: OverflowRegion

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.files = 0
        self.written = 0
        self.shown: list[Shown] = []

    @initialize(
        alignment=st.sampled_from([1, 8, 64, 512, 4096]),
        initial=st.sampled_from([1, 600, 4096, 65536]),
        maximum=st.sampled_from([65536, 100_000, 1 << 20]),
        temporary=st.booleans(),
    )
    def open(self, alignment: int, initial: int, maximum: int, temporary: bool) -> None:
        self.alignment = alignment
        options = {"initial_capacity": initial, "max_capacity": maximum, "alignment": alignment}
        if temporary:
            self.region = OverflowRegion.temporary(self.directory.name, **options)
        else:
            self.files += 1
            self.region = OverflowRegion.open(f"{self.directory.name}/region{self.files}", **options)
        assert self.region.capacity == initial
        self.start_empty(maximum)

    def start_empty(self, maximum: int) -> None:
        self.maximum = maximum
        self.live: dict[int, Stored] = {}
        self.freed: set[int] = set()
        self.pinned: list[Stored] = []  # freed, and still shown
        self.used = 0
        self.initial = self.region.capacity

    def teardown(self) -> None:
        for shown in self.shown:
            assert bytes(memoryview(shown.holder)) == shown.expected
        if hasattr(self, "region"):
            self.region.close()
        self.shown.clear()
        self.directory.cleanup()

    # What the model says about space

    def round_up(self, size: int) -> int:
        return -(-size // self.alignment) * self.alignment

    def taken(self) -> list[tuple[int, int]]:
        """Places in use, each rounded up; an empty value is granted one unit, should it want it."""
        stored = [*self.live.values(), *(pinned for pinned in self.pinned if pinned.views)]
        return sorted((s.offset, s.offset + max(self.round_up(len(s.data)), self.alignment)) for s in stored)

    def has_gap(self, size: int) -> bool:
        end = 0
        for start, stop in self.taken():
            if start - end >= self.round_up(size):
                return True
            end = max(end, stop)
        # The tail below the mark counts as far as the mark, to the byte.
        return self.used - end >= size

    def has_room(self, sizes: list[int]) -> bool:
        """Do the values fit one behind the other, once all is moved together that is not shown?"""
        sizes = [size for size in sizes if size]
        padded = sum(map(self.round_up, sizes))
        needed = padded - self.round_up(sizes[-1]) + sizes[-1] if sizes else 0
        stored = [*self.live.values(), *(pinned for pinned in self.pinned if pinned.views)]
        fixed = sorted((s.offset, s.offset + self.round_up(len(s.data))) for s in stored if s.views and s.data)
        start = 0
        for stays, stop in [*fixed, (1 << 62, 1 << 62)]:
            moves = [s for s in stored if not s.views and s.data and start <= s.offset < stays]
            end = start + sum(self.round_up(len(s.data)) for s in moves)
            if stays - end >= padded and (stays < 1 << 62 or end + needed <= self.maximum):
                return True
            start = stop
        return False

    # Rules

    def store(self, source: Any, data: bytes, engine: int) -> None:
        self.store_by(lambda: self.region.write(source, engine), data, engine)

    def store_by(self, write: Callable[[], int], data: bytes, engine: int) -> None:
        fits = not data or self.has_gap(len(data))
        has_room = fits or self.has_room([len(data)])
        before = self.region.stats()
        try:
            slot = write()
        except CapacityExceededError as error:
            assert not has_room, "refused, though free space would hold it"
            assert error.max_capacity == self.maximum < error.required
            assert self.region.stats() == before
            return
        self.follow()
        self.enter(slot, data, engine, before.slot_count)
        if fits:
            # A free extent at the mark ends where its last unit does, a few bytes above used_bytes perhaps.
            assert self.region.used_bytes <= self.round_up(self.used), "the mark moved past free space"
        self.used = max(self.used, self.live[slot].offset + len(data)) if data else self.used

    def follow(self) -> None:
        """Room may have been made by moving values that are not shown."""
        for slot, stored in self.live.items():
            offset = self.region.slot(slot).offset
            assert offset == stored.offset or not stored.views
            stored.offset = offset

    def enter(self, slot: int, data: bytes, engine: int, slot_count: int) -> None:
        assert slot not in self.live
        assert slot in self.freed or slot == slot_count
        stored = Stored(data, engine, self.region.slot(slot).offset)
        if data:
            end = stored.offset + len(data)
            for other in (*self.live.values(), *(pinned for pinned in self.pinned if pinned.views)):
                if other.data:
                    assert end <= other.offset or other.offset + len(other.data) <= stored.offset, "overlap"
        self.freed.discard(slot)
        self.live[slot] = stored

    @rule(
        sizes=st.lists(SIZES, min_size=1, max_size=12),
        engine=ENGINES,
        kind=st.sampled_from([bytes, bytearray, "lengths"]),
    )
    def write_many(self, sizes: list[int], engine: int, kind: Any) -> None:
        values = [value(self.written + i, size) for i, size in enumerate(sizes, 1)]
        self.written += len(values)
        before = self.region.stats()
        try:
            if kind == "lengths":
                slots = list(self.region.write_many(b"".join(values), engine, lengths=np.array(sizes, np.int64)))
            else:
                slots = self.region.write_many(list(map(kind, values)), engine)
        except CapacityExceededError as error:
            assert not self.has_room(sizes), "refused, though all fit together"
            assert error.max_capacity == self.maximum < error.required
            assert self.region.stats() == before
            return
        self.follow()
        slot_count = before.slot_count
        for slot, data in zip(slots, values, strict=True):
            self.enter(slot, data, engine, slot_count)
            slot_count += slot == slot_count
            self.used = max(self.used, self.live[slot].offset + len(data)) if data else self.used

    @rule(sizes=st.lists(SIZES, min_size=1, max_size=6), engine=ENGINES, aligned=st.booleans())
    def write_vectored(self, sizes: list[int], engine: int, aligned: bool) -> None:
        parts = [value(self.written + i, size) for i, size in enumerate(sizes, 1)]
        self.written += len(parts)
        data = b""
        for part in parts:
            data += bytes(-len(data) % self.alignment if aligned else 0) + part
        self.store_by(lambda: self.region.write_vectored(parts, engine, aligned=aligned), data, engine)

    @rule(size=SIZES, engine=ENGINES, keep=st.booleans())
    def allocate(self, size: int, engine: int, keep: bool) -> None:
        self.written += 1
        data = value(self.written, size)
        filled: list[tuple[int, memoryview]] = []

        def fill() -> int:
            slot, view = self.region.allocate(size, engine)
            assert not view.readonly and view == bytes(size)
            view[:] = data
            self.region.commit(slot)
            if keep:
                filled.append((slot, view))
            return slot

        self.store_by(fill, data, engine)
        for slot, view in filled:
            self.live[slot].views += 1
            self.shown.append(Shown(view, data, self.live[slot]))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), change=st.booleans())
    def restore(self, data: st.DataObject, change: bool) -> None:
        stored = self.live[slot := data.draw(st.sampled_from(sorted(self.live)))]
        view = self.region.restore(slot)
        assert not view.readonly and view == stored.data
        expected = stored.data
        if change and expected:
            start = data.draw(st.integers(0, len(expected)))
            stop = data.draw(st.integers(start, len(expected)))
            view[start:stop] = bytes(byte ^ 255 for byte in view[start:stop])
            expected = bytes(view)
        stored.views += 1
        self.shown.append(Shown(view, expected, stored))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def read_many(self, data: st.DataObject) -> None:
        slots = data.draw(st.lists(st.sampled_from(sorted(self.live)), max_size=8))
        for slot, view in zip(slots, self.region.read_many(slots), strict=True):
            self.live[slot].views += 1
            self.shown.append(Shown(view, self.live[slot].data, self.live[slot]))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), wrong=st.sampled_from(["none", "none", "none", "twice", "unknown"]), as_array=st.booleans())
    def free_many(self, data: st.DataObject, wrong: str, as_array: bool) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.live)), min_size=1, max_size=8, unique=True))
        if wrong != "none":
            before = self.region.stats()
            bad = [*chosen, chosen[0] if wrong == "twice" else self.region.slot_count]
            with pytest.raises(ValueError if wrong == "twice" else InvalidSlotError):
                self.region.free_many(np.array(bad, np.int64) if as_array else bad)
            assert self.region.stats() == before
            return
        self.region.free_many(np.array(chosen, np.int64) if as_array else chosen)
        for slot in chosen:
            self.forget(slot)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        slots = data.draw(st.none() | st.lists(st.sampled_from(sorted(self.live)), max_size=4))
        self.region.evict(slots)

    @rule(size=SIZES, engine=ENGINES, kind=st.sampled_from([bytes, bytearray, np.array]))
    def write(self, size: int, engine: int, kind: Any) -> None:
        self.written += 1
        data = value(self.written, size)
        source = np.frombuffer(data, np.uint8) if kind is np.array else kind(data)
        self.store(source, data, engine)

    def draw_shown(self, data: st.DataObject) -> Shown:
        # By number: what is drawn itself, hypothesis keeps, and with it the views.
        return self.shown[data.draw(st.integers(0, len(self.shown) - 1))]

    @precondition(lambda self: self.shown)
    @rule(data=st.data(), engine=ENGINES)
    def write_something_shown(self, data: st.DataObject, engine: int) -> None:
        shown = self.draw_shown(data)
        self.store(shown.holder, shown.expected, engine)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        stored = self.live[slot := data.draw(st.sampled_from(sorted(self.live)))]
        stored.views += 1
        view = self.region.read(slot)
        assert view.readonly
        self.shown.append(Shown(view, stored.data, stored))

    @precondition(lambda self: self.shown)
    @rule(data=st.data())
    def slice_what_is_shown(self, data: st.DataObject) -> None:
        shown = self.draw_shown(data)
        start = data.draw(st.integers(0, len(shown.expected)))
        stop = data.draw(st.integers(start, len(shown.expected)))
        if shown.source is not None:
            shown.source.views += 1
        self.shown.append(Shown(memoryview(shown.holder)[start:stop], shown.expected[start:stop], shown.source))

    @precondition(lambda self: self.shown)
    @rule(data=st.data())
    def make_an_array_of_what_is_shown(self, data: st.DataObject) -> None:
        shown = self.draw_shown(data)
        if shown.source is not None:
            shown.source.views += 1
        self.shown.append(Shown(np.frombuffer(shown.holder, np.uint8), shown.expected, shown.source))

    @precondition(lambda self: self.shown)
    @rule(data=st.data())
    def drop_what_is_shown(self, data: st.DataObject) -> None:
        shown = self.draw_shown(data)
        self.shown.remove(shown)
        if shown.source is not None:
            shown.source.views -= 1

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def read_copies(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.live)))
        expected = self.live[slot].data
        assert self.region.read_bytes(slot) == expected
        room = bytearray(b"\xa5" * (len(expected) + 3))
        assert self.region.read_into(slot, room) == len(expected)
        assert room == expected + b"\xa5" * 3
        if expected:
            short = bytearray(len(expected) - 1)
            with pytest.raises(ValueError):
                self.region.read_into(slot, short)
            assert not any(short)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.live)))
        self.region.free(slot)
        self.forget(slot)

    def forget(self, slot: int) -> None:
        stored = self.live.pop(slot)
        stored.live = False
        if stored.views:
            self.pinned.append(stored)
        self.freed.add(slot)

    @precondition(lambda self: self.freed)
    @rule(data=st.data())
    def use_a_freed_slot(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.freed)))
        for use in (self.region.read, self.region.read_bytes, self.region.free):
            with pytest.raises(InvalidSlotError, match="freed"):
                use(slot)
        assert slot not in self.region
        assert self.region.slot(slot).occupied is False

    @rule(beyond=st.integers(0, 1 << 40))
    def use_a_slot_that_never_was(self, beyond: int) -> None:
        slot = self.region.slot_count + beyond
        with pytest.raises(InvalidSlotError, match="never"):
            self.region.read(slot)
        assert slot not in self.region

    def end(self) -> int:
        """Where the last byte in use ends, whether it is live or only shown."""
        stored = (*self.live.values(), *(pinned for pinned in self.pinned if pinned.views))
        return max((s.offset + len(s.data) for s in stored if s.data), default=0)

    @rule(budget=st.sampled_from([None, 0, 70_000, 1 << 20]))
    def trim(self, budget: int | None) -> None:
        self.region.trim(budget)
        assert self.end() <= self.region.used_bytes <= min(self.used, self.round_up(self.end()))
        self.used = self.region.used_bytes
        least = max(self.used, self.initial)
        assert self.region.capacity == least if budget is None else self.region.capacity >= least

    @rule(budget=st.one_of(st.none(), st.integers(0, 100_000), st.sampled_from([1, 64, 4096])))
    def compact(self, budget: int | None) -> None:
        before = self.region.stats()
        done = self.region.compact(budget)
        after = self.region.stats()
        assert after.moved_bytes - before.moved_bytes == done.moved_bytes
        assert budget is None or done.moved_bytes <= budget
        assert (after.capacity, after.live_bytes) == (before.capacity, before.live_bytes)
        # Shown values have not moved; every place is checked against the file by what_is_shown and the_values.
        for slot, stored in self.live.items():
            offset = self.region.slot(slot).offset
            if stored.views or (budget is not None and len(stored.data) > budget):
                assert offset == stored.offset
            stored.offset = offset
        self.pinned = [pinned for pinned in self.pinned if pinned.views]
        places = sorted((s.offset, len(s.data)) for s in (*self.live.values(), *self.pinned) if s.data)
        assert all(first[0] + first[1] <= second[0] for first, second in pairwise(places)), "overlap"
        assert self.end() <= after.used_bytes <= self.used
        self.used = after.used_bytes
        if budget is None:
            assert done.remaining_bytes == 0
        if budget is None and not self.pinned and not any(stored.views for stored in self.live.values()):
            padded = sum(self.round_up(len(stored.data)) for stored in self.live.values())
            assert self.used <= padded + after.live_bytes // 50

    @rule(factor=st.sampled_from([1, 2, 4]), extra=st.sampled_from([0, 1, 5000]))
    def raise_the_ceiling(self, factor: int, extra: int) -> None:
        maximum = self.maximum * factor + extra
        if maximum > 1 << 24:
            return
        self.region.max_capacity = maximum
        self.maximum = maximum
        with pytest.raises(ValueError):
            self.region.max_capacity = maximum - 1

    @rule(maximum=st.sampled_from([65536, 1 << 20]), keep_views=st.booleans())
    def close_and_open_again(self, maximum: int, keep_views: bool) -> None:
        capacity, path = self.region.capacity, self.region.path
        # Whether a view of an empty value, which shows no byte of the file, keeps the lock is left open.
        locked = keep_views and any(shown.source is not None and shown.source.data for shown in self.shown)
        if not locked:
            self.shown = [shown for shown in self.shown if shown.source is None]
        slots = list(self.live)
        self.region.close()
        for slot in slots[:1]:
            with pytest.raises(RegionClosedError):
                self.region.read(slot)
        for shown in self.shown:
            shown.source = None  # no space of the next region is taken by it
        if path is None or locked:
            if path is not None:
                with pytest.raises(RegionBusyError):
                    OverflowRegion.open(path)
            self.open(self.alignment, 4096, maximum, path is None)
            return
        maximum = max(maximum, capacity)
        self.region = OverflowRegion.open(path, initial_capacity=1, max_capacity=maximum, alignment=self.alignment)
        assert self.region.capacity == capacity
        self.start_empty(maximum)

    # After every step

    @invariant()
    def the_region_is_sound(self) -> None:
        if hasattr(self, "region"):
            assert lib.ndm_region_check(self.region._handle) == 0

    @invariant()
    def what_is_shown_is_unchanged(self) -> None:
        for shown in self.shown:
            assert bytes(memoryview(shown.holder)) == shown.expected

    @invariant()
    def the_values_are_those_of_the_model(self) -> None:
        if not hasattr(self, "region"):
            return
        for slot, stored in self.live.items():
            assert self.region.read_bytes(slot) == stored.data
            facts = self.region.slot(slot)
            assert (facts.size, facts.engine, facts.occupied) == (len(stored.data), stored.engine, True)
            if stored.data:
                assert facts.offset == stored.offset
                assert facts.offset % self.alignment == 0
                assert facts.offset + facts.size <= self.region.used_bytes

    @invariant()
    def the_figures_are_those_of_the_model(self) -> None:
        if not hasattr(self, "region"):
            return
        stats = self.region.stats()
        self.pinned = [pinned for pinned in self.pinned if pinned.views]
        pinned = sum(len(stored.data) for stored in self.pinned)
        assert stats.live_bytes == sum(len(stored.data) for stored in self.live.values())
        assert stats.live_slots == len(self.region) == len(self.live)
        assert stats.slot_count == len(self.live) + len(self.freed)
        assert stats.used_bytes == self.used <= stats.capacity <= stats.max_capacity == self.maximum
        assert pinned <= stats.pinned_bytes <= pinned + self.alignment * len(self.pinned)
        assert stats.live_bytes + stats.free_bytes + stats.pinned_bytes <= self.round_up(stats.used_bytes)
        if self.region.path is not None:
            assert os.stat(self.region.path).st_size == stats.capacity


RegionMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("NODEDB_MEM_EXAMPLES", "80")),
    stateful_step_count=40,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestRegion = RegionMachine.TestCase
