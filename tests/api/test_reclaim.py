"""Reclaimers: who is asked, in which order, on which thread; and what goes wrong in them."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kit import in_thread, sound
from nodedb_mem import (
    BudgetExhaustedError,
    EngineId,
    GlobalCeilingExceededError,
    MemoryGovernor,
    OverflowRegion,
    Reservation,
)

MIB = 1 << 20
V, Q, W = EngineId.VECTOR, EngineId.QUERY, EngineId.WAL


class Cache:
    """An engine that holds reservations of 1 MiB, and gives back the oldest when it is asked to."""

    def __init__(self, governor: MemoryGovernor, engine: int, count: int) -> None:
        self.held: list[Reservation] = [governor.reserve(engine, MIB) for _ in range(count)]
        self.asked: list[int] = []
        self.threads: list[int] = []

    def reclaim(self, wanted: int) -> int:
        self.asked.append(wanted)
        self.threads.append(threading.get_ident())
        freed = 0
        while self.held and freed < wanted:
            freed += self.held[0].size
            self.held.pop(0).release()
        return freed

    def clear(self) -> None:
        for reservation in self.held:
            reservation.release()


def governor_of(ceiling: int, **limits: int) -> MemoryGovernor:
    return MemoryGovernor(ceiling * MIB, {EngineId[name]: limit * MIB for name, limit in limits.items()})


def test_what_does_not_fit_is_asked_back_from_its_own_engine() -> None:
    governor = governor_of(100, VECTOR=10, QUERY=10)
    mine, other = Cache(governor, V, 10), Cache(governor, Q, 10)
    governor.add_reclaimer(V, mine.reclaim)
    governor.add_reclaimer(Q, other.reclaim, priority=9)
    with governor.reserve(V, 3 * MIB - 5):
        assert mine.asked == [3 * MIB - 5] and other.asked == []  # the limit is the engine's own
        engines = governor.snapshot().engines
        assert engines[V].reclaimed == 3 * MIB and engines[V].rejections == 0 and engines[Q].reclaimed == 0
    mine.clear()
    other.clear()
    sound(governor)


def test_the_order_is_own_engine_then_priority_then_most_held() -> None:
    governor = MemoryGovernor(100, dict.fromkeys(range(5), 20))
    held = [governor.reserve(engine, size) for engine, size in ((1, 10), (2, 20), (3, 15), (4, 12))]
    asked: list[Any] = []

    def ask(name: Any) -> Callable[[int], int]:
        return lambda wanted: asked.append((name, wanted)) or 0  # type: ignore[func-returns-value]

    for engine, priority in ((1, 0), (2, 0), (3, 0), (4, 5), (0, -5)):
        governor.add_reclaimer(engine, ask(engine), priority=priority)
    governor.set_ceiling(60)
    with pytest.raises(GlobalCeilingExceededError):
        governor.reserve(0, 10)
    assert asked == [(0, 7), (4, 7), (2, 7), (3, 7), (1, 7)]
    for each in held:
        each.release()


def test_asking_ends_when_it_fits() -> None:
    governor = governor_of(20, VECTOR=10, QUERY=5, WAL=5)
    governor.set_ceiling(10 * MIB)
    first, second = Cache(governor, Q, 5), Cache(governor, W, 5)
    governor.add_reclaimer(Q, first.reclaim, priority=2)
    governor.add_reclaimer(W, second.reclaim, priority=1)
    with governor.reserve(V, 4 * MIB):
        assert len(first.held) == 1 and len(second.held) == 5 and second.asked == []
    with governor.reserve(V, 8 * MIB):
        assert first.held == [] and len(second.held) == 2
    first.clear()
    second.clear()


def test_a_removed_reclaimer_is_not_asked() -> None:
    governor = governor_of(10, VECTOR=5)
    cache = Cache(governor, V, 5)
    handle = governor.add_reclaimer(V, cache.reclaim)
    assert "vector" in repr(handle) or "0" in repr(handle)
    handle.remove()
    handle.remove()
    with pytest.raises(BudgetExhaustedError):
        governor.reserve(V, 1)
    assert cache.asked == [] and governor.try_reserve(V, 1) is None
    cache.clear()


def test_a_reclaimer_is_not_entered_again_for_its_engine() -> None:
    governor = governor_of(20, VECTOR=10, QUERY=10)
    cache = Cache(governor, V, 10)
    depth: list[str] = []

    def reclaim(wanted: int) -> int:
        depth.append("in")
        assert governor.try_reserve(V, MIB) is None  # would ask this one again
        governor.reserve(Q, MIB).release()
        depth.append("out")
        return cache.reclaim(wanted)

    governor.add_reclaimer(V, reclaim)
    governor.reserve(V, MIB).release()
    assert depth == ["in", "out"]
    cache.clear()
    sound(governor)


def test_a_reclaimer_runs_outside_every_lock() -> None:
    """Another thread does everything meanwhile."""
    governor = governor_of(20, VECTOR=10, QUERY=10)
    cache = Cache(governor, V, 10)

    def everything() -> None:
        governor.reserve(Q, MIB).release()
        governor.snapshot()
        governor.pressure(V)
        governor.add_reclaimer(Q, lambda wanted: 0).remove()
        governor.on_pressure(lambda *_: None).remove()
        governor.set_limit(Q, 9 * MIB)
        assert governor.try_reserve(V, MIB) is None

    def reclaim(wanted: int) -> int:
        assert in_thread(everything) is None
        return cache.reclaim(wanted)

    governor.add_reclaimer(V, reclaim)
    governor.reserve(V, MIB).release()
    cache.clear()


@pytest.mark.parametrize("wrong", [lambda wanted: 1 / 0, lambda wanted: None, lambda wanted: -1, lambda wanted: "much"])
def test_one_that_fails_is_reported_and_skipped(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr("sys.unraisablehook", lambda info: told.append((type(info.exc_value), info.object)))
    governor = governor_of(20, VECTOR=10, QUERY=10)
    cache = Cache(governor, V, 10)
    governor.add_reclaimer(V, wrong, priority=1)
    governor.add_reclaimer(V, cache.reclaim)
    governor.reserve(V, MIB).release()
    assert len(told) == 1 and told[0][1] is wrong and issubclass(told[0][0], Exception)
    cache.clear()
    del told


def test_an_interrupt_is_not_swallowed() -> None:
    governor = governor_of(20, VECTOR=10)
    cache = Cache(governor, V, 10)

    def interrupt(wanted: int) -> int:
        raise KeyboardInterrupt

    governor.add_reclaimer(V, interrupt)
    with pytest.raises(KeyboardInterrupt):
        governor.reserve(V, MIB)
    assert governor.snapshot().allocated == 10 * MIB
    cache.clear()


def test_after_asking_in_vain_it_waits_or_fails() -> None:
    governor = governor_of(20, VECTOR=10)
    cache = Cache(governor, V, 10)
    asked: list[int] = []
    governor.add_reclaimer(V, lambda wanted: asked.append(wanted) or 0)  # type: ignore[func-returns-value]
    with pytest.raises(BudgetExhaustedError):
        governor.reserve(V, MIB)
    timer = threading.Timer(0.05, cache.clear)
    timer.start()
    governor.reserve(V, MIB, timeout=60).release()
    timer.join()
    assert asked == [MIB, MIB]


# Bound to a thread


def test_the_thread_it_is_bound_to_asks_it_directly() -> None:
    governor = governor_of(20, VECTOR=10)
    cache = Cache(governor, V, 10)
    governor.add_reclaimer(V, cache.reclaim, thread=True)
    governor.reserve(V, MIB).release()
    assert cache.threads == [threading.get_ident()]
    cache.clear()


@pytest.mark.parametrize("how", ["poll", "reserve", "release", "wait"])
def test_a_request_of_another_thread_is_posted(how: str) -> None:
    governor = governor_of(20, VECTOR=10, QUERY=10)
    cache = Cache(governor, V, 10)
    governor.add_reclaimer(V, cache.reclaim, thread=True)
    mine = governor.reserve(Q, 9 * MIB)

    assert in_thread(lambda: governor.try_reserve(V, 2 * MIB)) is None
    assert cache.asked == []
    if how == "poll":
        assert governor.poll() == 2 * MIB and governor.poll() == 0
    elif how == "reserve":
        governor.reserve(Q, MIB).release()
    elif how == "release":
        mine.release()
    else:
        with pytest.raises(BudgetExhaustedError):
            governor.reserve(Q, 2 * MIB, timeout=0.01)
    assert cache.asked == [2 * MIB] and cache.threads == [threading.get_ident()]
    assert in_thread(lambda: governor.try_reserve(V, 2 * MIB).release()) is None  # type: ignore[union-attr]
    mine.release()
    cache.clear()


def test_the_owner_of_a_region_spills_for_another_thread(tmp_path: Path) -> None:
    governor = governor_of(20, VECTOR=10)
    ready, done = threading.Event(), threading.Event()
    spilled: list[int] = []

    def own() -> None:
        values = {n: (governor.reserve(V, MIB), bytes([n]) * MIB) for n in range(10)}
        with OverflowRegion.open(tmp_path / "region") as region:

            def spill(wanted: int) -> int:
                freed = 0
                while values and freed < wanted:
                    _, (reservation, value) = values.popitem()
                    spilled.append(region.write(value, V))
                    freed += reservation.size
                    reservation.release()
                return freed

            governor.add_reclaimer(V, spill, thread=True)
            ready.set()
            while not done.wait(0.001):
                governor.poll()
            assert sorted(region.read(slot)[0] for slot in spilled) == [7, 8, 9]
            for reservation, _ in values.values():
                reservation.release()

    owner = threading.Thread(target=own)
    owner.start()
    ready.wait()
    with governor.reserve(V, 3 * MIB, timeout=60):
        assert len(spilled) == 3
    done.set()
    owner.join()
    sound(governor)


def test_threads_that_ask_each_other_come_to_an_end() -> None:
    governor = MemoryGovernor(40, {0: 20, 1: 20})
    governor.set_ceiling(20)
    stop = threading.Event()

    def work(engine: int) -> None:
        held: list[Reservation] = []
        lock = threading.Lock()

        def reclaim(wanted: int) -> int:
            freed = 0
            while freed < wanted:
                with lock:
                    if not held:
                        break
                    reservation = held.pop()
                freed += reservation.size
                reservation.release()
            return freed

        handle = governor.add_reclaimer(engine, reclaim)
        for _ in range(300):
            reservation = governor.try_reserve(engine, 7)
            if reservation is not None:
                with lock:
                    held.append(reservation)
        handle.remove()
        reclaim(1 << 30)

    threads = [threading.Thread(target=work, args=(engine,)) for engine in (0, 1, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    assert governor.snapshot().allocated == 0
    sound(governor)
    gc.collect()
