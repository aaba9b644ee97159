"""How long things live: views beyond growth, free, close and the region; space beyond free; the file beyond close."""

from __future__ import annotations

import gc
import queue
import random
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from kit import VERBS, Check, Footprint, NewRegion, blob
from nodedb_mem import InvalidSlotError, OverflowRegion, RegionBusyError, RegionClosedError

MIB = 1 << 20


def call_in_thread(function: Callable[[], object]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def tie_a_knot(view: memoryview) -> list[Any]:
    knot: list[Any] = [view]
    knot.append(knot)
    return knot


# What may hold a value: each makes something of a view that keeps the bytes, but not the view object itself.
HOLDERS: dict[str, Callable[[memoryview], Any]] = {
    "view": lambda view: view,
    "slice": lambda view: view[10:90],
    "slice_of_slice": lambda view: view[5:][5:90],
    "empty_slice": lambda view: view[10:10],
    "cast": lambda view: view.cast("d"),
    "memoryview_of_it": memoryview,
    "readonly": lambda view: view.toreadonly(),
    "array": lambda view: np.frombuffer(view, np.uint8),
    "array_slice": lambda view: np.frombuffer(view, np.uint8)[::3],
    "array_cast": lambda view: np.frombuffer(view, np.float64).reshape(2, -1).T,
    "arrow": pa.py_buffer,
    "arrow_slice": lambda view: pa.py_buffer(view).slice(8, 16),
    "arrow_array": lambda view: pa.Array.from_buffers(pa.int64(), 10, [None, pa.py_buffer(view)]),
    "in_a_cycle": tie_a_knot,
}
holders = pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS.keys())


def seen(held: Any) -> bytes:
    """The bytes that a holder shows."""
    if isinstance(held, list):
        return bytes(held[0])
    if isinstance(held, pa.Array):
        return held.to_numpy(zero_copy_only=True).tobytes()
    return held.tobytes() if isinstance(held, np.ndarray) else bytes(memoryview(held).cast("B"))


# Views stay valid


def test_a_view_stays_valid_through_everything(tmp_path: Path) -> None:
    region = OverflowRegion.open(tmp_path / "region", initial_capacity=4096, max_capacity=1 * MIB)
    slot = region.write(blob(2000), 0)
    view = region.read(slot)
    array = np.frombuffer(view, np.uint8)
    for _ in range(100):
        region.write(blob(5000, 1), 0)
    assert view == blob(2000)
    region.free(slot)
    for _ in range(50):
        region.write(blob(2000, 2), 0)
    assert view == blob(2000)
    region.close()
    assert view == blob(2000)
    del region
    gc.collect()
    assert view == blob(2000)
    del view
    gc.collect()
    assert array.tobytes() == blob(2000)


@holders
def test_bytes_of_a_freed_slot_are_not_reused_while_something_shows_them(
    new_region: NewRegion, check: Check, hold: Callable[[memoryview], Any]
) -> None:
    region = new_region(max_capacity=1 * MIB)
    slot = region.write(blob(4000), 0)
    view = region.read(slot)
    held = hold(view)
    before = seen(held)
    del view
    region.free(slot)
    with pytest.raises(InvalidSlotError):
        region.read(slot)
    assert 4000 <= region.stats().pinned_bytes < 4064
    for _ in range(20):
        fresh = region.write(b"\xff" * 4000, 0)
        assert region.slot(fresh).offset >= 4000
        region.free(fresh)
    check(region)
    assert seen(held) == before
    del held
    gc.collect()
    assert region.slot(region.write(b"\xff" * 4000, 0)).offset == 0
    assert region.stats().pinned_bytes == 0


@holders
def test_a_closed_region_goes_with_the_last_thing_that_shows_it(
    tmp_path: Path, footprint: Footprint, hold: Callable[[memoryview], Any]
) -> None:
    region = OverflowRegion.open(tmp_path / "region", initial_capacity=65536)
    held = hold(region.read(region.write(blob(80), 0)))
    region.close()
    assert footprint(tmp_path)[1] > 0
    del held
    gc.collect()
    assert footprint(tmp_path) == (0, 0)
    OverflowRegion.open(tmp_path / "region").close()


def test_space_is_reused_only_after_the_last_of_several_views(new_region: NewRegion) -> None:
    region = new_region()
    slot = region.write(blob(1000), 0)
    views = [region.read(slot) for _ in range(5)]
    region.free(slot)
    while views:
        assert region.slot(region.write(bytes(1000), 0)).offset > 0
        assert all(view == blob(1000) for view in views)
        views.pop(len(views) // 2)
    assert region.slot(region.write(bytes(1000), 0)).offset == 0


def test_views_that_end_before_free_pin_nothing(new_region: NewRegion) -> None:
    region = new_region()
    slot = region.write(blob(1000), 0)
    for _ in range(10):
        assert region.read(slot) == blob(1000)
    region.free(slot)
    assert region.stats().pinned_bytes == 0
    assert region.slot(region.write(bytes(1000), 0)).offset == 0


def test_a_view_of_a_live_slot_is_not_counted_as_pinned(new_region: NewRegion) -> None:
    region = new_region()
    slot = region.write(blob(1000), 0)
    view = region.read(slot)
    assert (region.stats().pinned_bytes, region.live_bytes) == (0, 1000)
    region.free(slot)
    assert region.live_bytes == 0
    assert region.stats().pinned_bytes >= len(view)


def test_releasing_a_view_by_hand_ends_it(new_region: NewRegion) -> None:
    region = new_region()
    slot = region.write(blob(1000), 0)
    view = region.read(slot)
    part = view[500:]
    region.free(slot)
    view.release()
    assert region.slot(region.write(bytes(1000), 0)).offset > 0
    assert part == blob(1000)[500:]
    part.release()
    assert region.slot(region.write(bytes(1000), 0)).offset == 0


def test_a_view_in_a_with_block_ends_with_it(new_region: NewRegion) -> None:
    region = new_region()
    slot = region.write(blob(1000), 0)
    with region.read(slot) as view:
        region.free(slot)
        assert view == blob(1000)
    assert region.stats().pinned_bytes == 0


def test_a_reused_slot_number_does_not_touch_the_old_view(new_region: NewRegion) -> None:
    region = new_region()
    first = region.write(blob(100, 1), 0)
    old = region.read(first)
    region.free(first)
    later = [region.write(blob(100, seed), 0) for seed in range(2, 10)]
    assert old == blob(100, 1)
    del old
    assert [region.read(slot) for slot in later] == [blob(100, seed) for seed in range(2, 10)]
    assert region.slot(region.write(bytes(100), 0)).offset == 0


def test_dropping_an_old_view_does_not_unpin_the_new_value_of_its_slot(new_region: NewRegion) -> None:
    region = new_region()
    slot = region.write(blob(100, 1), 0)
    old = region.read(slot)
    region.free(slot)
    again = region.write(blob(100, 2), 0)
    new = region.read(again)
    region.free(again)
    del old
    for _ in range(5):
        region.write(b"\xff" * 100, 0)
    assert new == blob(100, 2)


def test_views_of_empty_values_hold_and_release_too(tmp_path: Path, footprint: Footprint) -> None:
    region = OverflowRegion.open(tmp_path / "region", initial_capacity=4096)
    slot = region.write(b"", 0)
    view = region.read(slot)
    region.free(slot)
    region.close()
    assert bytes(view) == b""
    del view
    assert footprint(tmp_path) == (0, 0)


# Views and threads


def test_a_view_may_be_used_and_dropped_on_another_thread(new_region: NewRegion) -> None:
    region = new_region()
    slot = region.write(blob(1000), 0)
    box: list[Any] = [region.read(slot)]
    region.free(slot)
    result: list[bool] = []

    def use() -> None:
        array = np.frombuffer(box[0][100:], np.uint8)
        result.append(array.tobytes() == blob(1000)[100:])
        box.clear()

    call_in_thread(use)
    assert result == [True]
    assert region.slot(region.write(bytes(1000), 0)).offset == 0


def test_views_outlive_the_thread_that_owned_their_region(tmp_path: Path, footprint: Footprint) -> None:
    views: list[memoryview] = []

    def own() -> None:
        region = OverflowRegion.open(tmp_path / "region", initial_capacity=4096)
        views.extend(region.read(region.write(blob(3000, seed), 0)) for seed in range(10))

    call_in_thread(own)
    gc.collect()
    assert views == [blob(3000, seed) for seed in range(10)]
    views.clear()
    assert footprint(tmp_path) == (0, 0)


def test_many_threads_drop_views_while_the_owner_writes_and_frees(new_region: NewRegion, check: Check) -> None:
    region = new_region(initial_capacity=4096, max_capacity=8 * MIB)
    inboxes: list[queue.SimpleQueue[tuple[memoryview, bytes] | None]] = [queue.SimpleQueue() for _ in range(4)]
    wrong: list[bytes] = []

    def consume(inbox: queue.SimpleQueue[tuple[memoryview, bytes] | None]) -> None:
        while (item := inbox.get()) is not None:
            view, expected = item
            if view != expected:
                wrong.append(expected)
            del view, item

    threads = [threading.Thread(target=consume, args=(inbox,)) for inbox in inboxes]
    for thread in threads:
        thread.start()
    rng = random.Random(3)
    live: dict[int, bytes] = {}
    try:
        for step in range(3000):
            data = rng.randbytes(rng.choice([1, 64, 500, 4000]))
            slot = region.write(data, 0)
            live[slot] = data
            inboxes[step % 4].put((region.read(slot), data))
            if len(live) > 30:
                victim = rng.choice(list(live))
                region.free(victim)
                del live[victim]
            if step % 500 == 0:
                check(region)
    finally:
        for inbox in inboxes:
            inbox.put(None)
        for thread in threads:
            thread.join()
    assert wrong == []
    assert {slot: region.read_bytes(slot) for slot in live} == live
    check(region)
    for slot in live:
        region.free(slot)
    stats = region.stats()
    assert (stats.pinned_bytes, stats.live_bytes) == (0, 0)
    assert stats.used_bytes <= stats.free_bytes < stats.used_bytes + 64  # all of it, up to the last unit's end


def test_growth_past_the_reservation_while_threads_read(new_region: NewRegion) -> None:
    region = new_region(initial_capacity=65536, max_capacity=65536)
    view = region.read(region.write(blob(60_000), 0))
    stop = threading.Event()
    wrong: list[str] = []

    def watch() -> None:
        while not stop.is_set():
            if view != blob(60_000):
                wrong.append("changed")

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        for power in range(17, 25):
            region.max_capacity = 1 << power
            region.write(bytes((1 << power) // 2 - 4096), 0)
    finally:
        stop.set()
        thread.join()
    assert wrong == []
    assert region.stats().growths == 8


# Close


def test_after_close_every_verb_says_so(new_region: NewRegion) -> None:
    for name, verb in VERBS.items():
        region = new_region(name)
        slot = region.write(b"x", 0)
        region.close()
        for number in (slot, 99):
            with pytest.raises(RegionClosedError):
                verb(region, number)
                pytest.fail(name)


def test_after_close_every_verb_says_so_also_while_views_live(new_region: NewRegion) -> None:
    for name, verb in VERBS.items():
        region = new_region(name)
        slot = region.write(blob(100), 0)
        view = region.read(slot)
        region.close()
        with pytest.raises(RegionClosedError):
            verb(region, slot)
            pytest.fail(name)
        assert view == blob(100)


def test_what_works_after_close(new_region: NewRegion, tmp_path: Path) -> None:
    region = new_region()
    region.close()
    region.close()
    assert region.closed
    assert region.path == str(tmp_path / "region")
    assert "closed" in repr(region)
    results: list[Any] = []
    call_in_thread(lambda: results.extend([region.close(), region.closed, region.path, repr(region)]))
    assert results == [None, True, region.path, repr(region)]


def test_the_mapping_goes_at_close_where_no_view_lives(
    new_region: NewRegion, tmp_path: Path, footprint: Footprint
) -> None:
    region = new_region()
    slots = [region.write(blob(1000), 0) for _ in range(10)]
    assert all(region.read(slot) == blob(1000) for slot in slots)
    descriptors, mapped = footprint(tmp_path)
    assert descriptors > 0 and mapped > 0
    region.close()
    assert footprint(tmp_path) == (0, 0)


def test_reopening_works_at_once_without_views(new_region: NewRegion) -> None:
    for number in range(10):
        region = new_region()
        assert region.write(bytes([number]), 0) == 0
        region.close()


def test_the_file_stays_locked_until_the_last_view_of_a_closed_region_dies(new_region: NewRegion) -> None:
    region = new_region()
    views = [region.read(region.write(blob(100, seed), 0)) for seed in range(2)]
    region.close()
    while views:
        with pytest.raises(RegionBusyError):
            new_region()
        assert views[-1] == blob(100, len(views) - 1)
        views.pop()
    assert new_region().slot_count == 0


def test_the_last_view_of_a_closed_region_may_die_on_another_thread(
    new_region: NewRegion, tmp_path: Path, footprint: Footprint
) -> None:
    region = new_region()
    box = [region.read(region.write(blob(100), 0))]
    region.close()
    call_in_thread(box.clear)
    assert footprint(tmp_path) == (0, 0)
    new_region()


def test_closing_a_temporary_region_keeps_its_views(tmp_path: Path) -> None:
    with OverflowRegion.temporary(tmp_path, initial_capacity=4096) as region:
        view = region.read(region.write(blob(50_000), 0))
    assert view == blob(50_000)


# The region object


def test_a_dropped_region_gives_back_its_file_and_its_lock(tmp_path: Path, footprint: Footprint) -> None:
    region = OverflowRegion.open(tmp_path / "region", initial_capacity=4096)
    region.write(blob(100), 0)
    del region
    gc.collect()
    assert footprint(tmp_path) == (0, 0)
    OverflowRegion.open(tmp_path / "region").close()


def test_a_dropped_region_in_a_cycle_gives_back_its_file(tmp_path: Path, footprint: Footprint) -> None:
    region = OverflowRegion.open(tmp_path / "region", initial_capacity=4096)
    knot: list[Any] = [region, region.read(region.write(blob(100), 0))]
    knot.append(knot)
    del region, knot
    gc.collect()
    assert footprint(tmp_path) == (0, 0)


def test_a_region_dropped_on_another_thread_gives_back_its_file(tmp_path: Path, footprint: Footprint) -> None:
    box = [OverflowRegion.open(tmp_path / "region", initial_capacity=4096)]
    box[0].write(blob(100), 0)
    call_in_thread(box.clear)
    gc.collect()
    assert footprint(tmp_path) == (0, 0)
    OverflowRegion.open(tmp_path / "region").close()


def test_a_dropped_region_keeps_file_and_lock_for_its_views(tmp_path: Path, footprint: Footprint) -> None:
    region = OverflowRegion.open(tmp_path / "region", initial_capacity=4096)
    view = region.read(region.write(blob(3000), 0))
    del region
    gc.collect()
    assert view == blob(3000)
    with pytest.raises(RegionBusyError):
        OverflowRegion.open(tmp_path / "region")
    del view
    assert footprint(tmp_path) == (0, 0)
    OverflowRegion.open(tmp_path / "region").close()


def test_a_view_does_not_keep_the_region_object_alive(tmp_path: Path) -> None:
    region = OverflowRegion.open(tmp_path / "region", initial_capacity=4096)
    view = region.read(region.write(blob(3000), 0))
    watcher = weakref.ref(region)
    del region
    gc.collect()
    assert watcher() is None
    assert view == blob(3000)


def test_a_region_that_failed_to_open_is_nothing_to_finalize(tmp_path: Path) -> None:
    # Errors in __del__ are failures here (see conftest).
    for options in ({"alignment": 3}, {"initial_capacity": 0}, {"nonsense": 1}, {"alignment": None}):
        with pytest.raises((TypeError, ValueError)):
            OverflowRegion.open(tmp_path / "region", **options)  # type: ignore[arg-type]
        gc.collect()


def test_an_object_made_without_opening_does_not_crash() -> None:
    hollow = OverflowRegion.__new__(OverflowRegion)
    for use in (lambda: hollow.read(0), lambda: hollow.write(b"x", 0), hollow.stats, lambda: len(hollow)):
        with pytest.raises((RegionClosedError, AttributeError, TypeError)):
            use()
    del hollow
    gc.collect()


# The end of the interpreter


def test_the_interpreter_ends_cleanly_with_everything_alive(run_python: Callable[..., str], tmp_path: Path) -> None:
    script = """
    import atexit, sys
    import numpy as np
    from nodedb_mem import OverflowRegion

    region = OverflowRegion.open(sys.argv[1], initial_capacity=4096)
    slots = [region.write(bytes([n]) * 3000, 0) for n in range(5)]
    view = region.read(slots[1])
    array = np.frombuffer(region.read(slots[2]), np.uint8)
    freed = region.read(slots[3])
    region.free(slots[3])
    closed = OverflowRegion.temporary(initial_capacity=4096)
    orphan = closed.read(closed.write(b"orphan", 0))
    closed.close()
    knot = [region, view, array]
    knot.append(knot)
    sys.modules["a_module_that_lives_long"] = knot

    @atexit.register
    def last_words():
        assert view == b"\\1" * 3000 and freed == b"\\3" * 3000 and (array == 2).all() and orphan == b"orphan"
        assert region.read(slots[4]) == b"\\4" * 3000
        print("last words")
    """
    assert run_python(script, tmp_path / "region") == "last words\n"
    OverflowRegion.open(tmp_path / "region").close()


def test_daemon_threads_may_hold_views_when_the_interpreter_ends(
    run_python: Callable[..., str], tmp_path: Path
) -> None:
    script = """
    import sys, threading
    import numpy as np
    from nodedb_mem import OverflowRegion

    region = OverflowRegion.open(sys.argv[1], initial_capacity=4096)
    slot = region.write(bytes(3000), 0)
    started = [threading.Event() for _ in range(4)]

    def hold(ready, mine):
        array = np.frombuffer(mine, np.uint8)
        ready.set()
        while True:
            part = array[10:]
            view = mine[5:]
            assert part[0] == view[0] == 0

    for ready in started:
        threading.Thread(target=hold, args=(ready, region.read(slot)), daemon=True).start()
    for ready in started:
        ready.wait()
    region.free(slot)
    """
    assert run_python(script, tmp_path / "region") == ""
    OverflowRegion.open(tmp_path / "region").close()


def test_a_daemon_thread_may_own_a_region_when_the_interpreter_ends(
    run_python: Callable[..., str], tmp_path: Path
) -> None:
    script = """
    import sys, threading
    from nodedb_mem import OverflowRegion

    ready = threading.Event()

    def own():
        region = OverflowRegion.open(sys.argv[1], initial_capacity=4096, max_capacity=1 << 20)
        views = []
        while True:
            slot = region.write(bytes(100), 0)
            views = [*views[-10:], region.read(slot)]
            region.free(slot)
            ready.set()

    threading.Thread(target=own, daemon=True).start()
    ready.wait()
    """
    assert run_python(script, tmp_path / "region") == ""
    OverflowRegion.open(tmp_path / "region").close()


def test_the_last_view_may_die_while_the_interpreter_ends(run_python: Callable[..., str], tmp_path: Path) -> None:
    script = """
    import sys
    from nodedb_mem import OverflowRegion

    class Grave:
        def __init__(self, view):
            self.view = view
        def __del__(self):
            assert bytes(self.view) == b"last"

    region = OverflowRegion.open(sys.argv[1], initial_capacity=4096)
    grave = Grave(region.read(region.write(b"last", 0)))
    region.close()
    sys.modules["grave"] = grave
    del region, grave
    """
    assert run_python(script, tmp_path / "region") == ""
    OverflowRegion.open(tmp_path / "region").close()


@pytest.mark.parametrize("how", ["os._exit(0)", "os.kill(os.getpid(), 9)"])
def test_an_abrupt_end_leaves_nothing_locked(start_python: Callable[..., Any], tmp_path: Path, how: str) -> None:
    process = start_python(
        f"""
        import os, sys
        from nodedb_mem import OverflowRegion
        region = OverflowRegion.open(sys.argv[1], initial_capacity=4096)
        view = region.read(region.write(b"x" * 3000, 0))
        {how}
        """,
        tmp_path / "region",
    )
    process.wait()
    with OverflowRegion.open(tmp_path / "region") as region:
        assert (region.capacity, region.slot_count) == (4096, 0)
