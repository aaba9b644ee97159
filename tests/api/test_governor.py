"""Reservations: limits, the ceiling, headroom, over-commitment; how they end; who waits."""

from __future__ import annotations

import asyncio
import copy
import gc
import json
import os
import pickle
import threading
import time
import warnings
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import pytest

import nodedb_mem
from kit import in_thread, sound
from nodedb_mem import (
    BudgetExhaustedError,
    EngineId,
    GlobalCeilingExceededError,
    MemoryGovernor,
    PressureLevel,
    PressureThresholds,
    UnknownEngineError,
    _memory,
)
from nodedb_mem._system import default_ceiling

MIB = 1 << 20
V, Q, W = EngineId.VECTOR, EngineId.QUERY, EngineId.WAL


class Mine(IntEnum):
    INDEX = 200


def governor_of_three(**options: Any) -> MemoryGovernor:
    return MemoryGovernor(64 * MIB, {V: 32 * MIB, Q: 16 * MIB, Mine.INDEX: 16 * MIB}, **options)


# What may be reserved


def test_a_reservation_counts_until_it_is_released() -> None:
    governor = governor_of_three()
    one, two = governor.reserve(V, 1000), governor.reserve(Mine.INDEX, 24)
    assert (one.size, one.engine, two.engine) == (1000, V, Mine.INDEX)
    assert type(two.engine) is Mine and type(one.engine) is EngineId
    assert governor.snapshot().allocated == 1024
    one.release()
    assert governor.snapshot().allocated == 24
    with two as same:
        assert same is two
    assert governor.snapshot().allocated == 0 and two.released
    sound(governor)


def test_an_engine_stays_within_its_limit() -> None:
    governor = governor_of_three()
    held = governor.reserve(V, 20 * MIB), governor.reserve(Q, MIB), governor.charge(Mine.INDEX, 2 * MIB)
    with pytest.raises(BudgetExhaustedError) as caught:
        governor.reserve(V, 12 * MIB + 1)
    error = caught.value
    assert (error.engine, error.requested, error.available, error.limit) == (V, 12 * MIB + 1, 12 * MIB, 32 * MIB)
    assert error.holders == ((V, 20 * MIB), (Mine.INDEX, 2 * MIB), (Q, MIB))
    assert "vector" in str(error) and f"{20 * MIB}" in str(error)
    assert governor.try_reserve(V, 12 * MIB + 1) is None
    assert governor.snapshot().engines[V].rejections == 2
    with governor.reserve(V, 12 * MIB):
        assert governor.snapshot().engines[V].utilization == 100
    for each in held:
        each.release()
    sound(governor)


def test_all_stay_within_the_ceiling() -> None:
    governor = governor_of_three()
    governor.set_ceiling(40 * MIB)
    with governor.reserve(V, 30 * MIB), governor.reserve(Q, 4 * MIB):
        with pytest.raises(GlobalCeilingExceededError) as caught:
            governor.reserve(Mine.INDEX, 7 * MIB)
        error = caught.value
        assert (error.allocated, error.ceiling, error.requested) == (34 * MIB, 40 * MIB, 7 * MIB)
        assert error.holders == ((V, 30 * MIB), (Q, 4 * MIB))
        assert governor.snapshot().engines[Mine.INDEX].rejections == 1
    sound(governor)


def test_an_engine_without_a_budget() -> None:
    governor = governor_of_three()
    with governor.reserve(V, 5):
        for verb in (governor.reserve, governor.try_reserve, governor.charge, governor.set_limit):
            with pytest.raises(UnknownEngineError, match=r"wal has no budget \(most is held by vector: 5\)") as caught:
                verb(W, 0)
            assert caught.value.engine is W and caught.value.holders == ((V, 5),)
        with pytest.raises(UnknownEngineError):
            governor.pressure(W)
        with pytest.raises(UnknownEngineError):
            governor.reserve(W, 1, timeout=5)


def test_limits_add_up_to_no_more_than_the_ceiling() -> None:
    with pytest.raises(ValueError, match="add up"):
        MemoryGovernor(10, {V: 6, Q: 5})
    governor = MemoryGovernor(10, {V: 6, Q: 4})
    with pytest.raises(ValueError, match="add up"):
        governor.add_engine(W, 1)
    with pytest.raises(UnknownEngineError):
        governor.reserve(W, 0)
    with pytest.raises(ValueError, match="add up"):
        governor.set_limit(V, 7)
    governor.set_limit(Q, 3)
    governor.set_limit(V, 7)
    governor.add_engine(V, 7)
    for limit, spillable in ((8, True), (7, False)):
        with pytest.raises(ValueError, match="is known"):
            governor.add_engine(V, limit, spillable=spillable)
    governor.set_ceiling(5)
    governor.set_limit(V, 6)  # lower, though the sum is above the ceiling still


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: MemoryGovernor(0),
        lambda: MemoryGovernor(-1),
        lambda: MemoryGovernor(1 << 63),
        lambda: MemoryGovernor(10, headroom=11),
        lambda: MemoryGovernor(10, headroom=-1),
        lambda: MemoryGovernor(10, {256: 1}),
        lambda: MemoryGovernor(10, {-1: 1}),
        lambda: MemoryGovernor(10, {0: -1}),
        lambda: governor_of_three().reserve(256, 1),
        lambda: governor_of_three().reserve(-1, 1),
        lambda: governor_of_three().reserve(V, -1),
        lambda: governor_of_three().reserve(V, 1 << 63),
        lambda: governor_of_three().set_ceiling(0),
        lambda: governor_of_three().set_ceiling(5, headroom=6),
        lambda: PressureThresholds(0, 1, 2),
        lambda: PressureThresholds(70, 60, 95),
        lambda: PressureThresholds(hysteresis=101),
    ],
)
def test_numbers_outside_their_range(wrong: Callable[[], object]) -> None:
    with pytest.raises(ValueError):
        wrong()


def test_wrong_types() -> None:
    governor = governor_of_three()
    for arguments in ((V,), (), (V, 1, 0), ("vector", 1), (V, "1"), (V, 1.5), (None, 1)):
        with pytest.raises(TypeError):
            governor.reserve(*arguments)
    for names in ({"time": 1}, {"timeout": 1, "more": 2}):
        with pytest.raises(TypeError):
            governor.reserve(V, 1, **names)  # type: ignore[call-arg]
    for attempt in (_memory.Reservation, lambda: copy.copy(governor), lambda: pickle.dumps(governor)):
        with pytest.raises(TypeError):
            attempt()
    with pytest.raises(RuntimeError):
        MemoryGovernor.__new__(MemoryGovernor).reserve(V, 1)
    with pytest.raises(RuntimeError, match="once"):
        governor.__init__(10)  # type: ignore[misc]
    assert governor.snapshot().ceiling == 64 * MIB
    with governor.reserve(200, 1) as reservation:
        assert reservation.engine is Mine.INDEX


def test_a_lowered_limit_takes_nothing_away() -> None:
    governor = governor_of_three()
    parts = [governor.reserve(V, MIB) for _ in range(20)]
    governor.set_limit(V, 10 * MIB)
    assert governor.snapshot().engines[V].overcommitted == 10 * MIB
    while len(parts) > 10:
        with pytest.raises(BudgetExhaustedError) as caught:
            governor.reserve(V, 1)
        assert caught.value.available == 0
        parts.pop().release()
    parts.pop().release()
    parts.append(governor.reserve(V, MIB))
    governor.set_ceiling(5 * MIB)
    assert governor.snapshot().overcommitted == 5 * MIB
    with pytest.raises(GlobalCeilingExceededError):
        governor.reserve(Q, 1)
    for part in parts:
        part.release()
    sound(governor)


def test_spillable_engines_leave_the_headroom_to_the_others() -> None:
    """2.3 GB of spillable consumers refused 877 bytes to one that could not spill."""
    governor = MemoryGovernor(100 * MIB, {V: 40 * MIB, Q: 40 * MIB}, headroom=20 * MIB)
    governor.add_engine(W, 20 * MIB, spillable=False)
    with governor.reserve(V, 40 * MIB), governor.reserve(Q, 40 * MIB), governor.reserve(W, 877):
        governor.reserve(W, 20 * MIB - 877).release()
    governor.set_ceiling(90 * MIB)
    with governor.reserve(V, 40 * MIB):
        with pytest.raises(GlobalCeilingExceededError) as caught:
            governor.reserve(Q, 31 * MIB)
        assert (caught.value.allocated, caught.value.ceiling) == (40 * MIB, 70 * MIB)
        governor.set_ceiling(90 * MIB, headroom=0)
        governor.reserve(Q, 31 * MIB).release()
    assert governor.snapshot().headroom == 0


def test_a_charge_is_never_refused_and_shows() -> None:
    governor = governor_of_three()
    charged = governor.charge(Q, 70 * MIB)
    shot = governor.snapshot()
    assert (shot.allocated, shot.overcommitted, shot.engines[Q].overcommitted) == (70 * MIB, 6 * MIB, 54 * MIB)
    assert shot.engines[Q].rejections == 0 and shot.pressure is PressureLevel.EMERGENCY
    with pytest.raises(GlobalCeilingExceededError):
        governor.reserve(V, 1)
    charged.resize(16 * MIB)
    governor.reserve(V, 1).release()
    charged.release()
    sound(governor)


def test_the_ceiling_by_default_is_a_share_of_what_there_is() -> None:
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < default_ceiling() <= physical * 80 // 100
    assert MemoryGovernor().snapshot().ceiling == default_ceiling()


# How reservations change and end


def test_releasing_twice_is_harmless_and_counted() -> None:
    governor = governor_of_three()
    one, two = governor.reserve(V, 10), governor.reserve(V, 20)
    one.release()
    one.release()
    one.release()
    with one:
        pass
    assert governor.snapshot().allocated == 20 and governor.snapshot().repeated_releases == 2
    two.release()


def test_a_reservation_grows_shrinks_and_is_split() -> None:
    governor = governor_of_three()
    whole = governor.reserve(V, 10 * MIB)
    whole.resize(30 * MIB)
    whole.resize(12 * MIB)
    assert governor.snapshot().allocated == 12 * MIB
    part = whole.split(5 * MIB)
    assert (whole.size, part.size, part.engine) == (7 * MIB, 5 * MIB, V)
    with pytest.raises(BudgetExhaustedError) as caught:
        whole.resize(28 * MIB)
    assert (caught.value.requested, caught.value.available) == (21 * MIB, 20 * MIB)
    assert whole.size == 7 * MIB and governor.snapshot().allocated == 12 * MIB
    with pytest.raises(ValueError, match="split off"):
        part.split(5 * MIB + 1)
    for wrong in (-1, 1 << 63):
        with pytest.raises(ValueError):
            whole.resize(wrong)
        with pytest.raises(ValueError):
            whole.split(wrong)
    whole.release()
    assert governor.snapshot().allocated == 5 * MIB
    for use in (lambda: whole.resize(1), lambda: whole.split(0)):
        with pytest.raises(ValueError, match="released"):
            use()
    part.resize(0)
    assert not part.released and governor.snapshot().allocated == 0
    part.release()
    sound(governor)


def test_a_resize_waits() -> None:
    governor = governor_of_three()
    one, two = governor.reserve(V, MIB), governor.reserve(V, 31 * MIB)
    timer = threading.Timer(0.05, two.release)
    timer.start()
    one.resize(2 * MIB, timeout=60)
    timer.join()
    assert one.size == 2 * MIB
    one.release()


def test_what_is_collected_unreleased_is_returned_counted_and_reported() -> None:
    governor = governor_of_three()
    reservation = governor.reserve(V, 123)
    with pytest.warns(ResourceWarning, match="unreleased reservation of 123 bytes, engine vector"):
        del reservation
    assert governor.snapshot().allocated == 0 and governor.snapshot().unreleased == 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reservation = governor.reserve(V, 5)
        del reservation
    kept = caught[0].source  # it lives on, and stands for nothing
    assert kept.released and kept.size == 0
    del caught, kept
    assert governor.snapshot().allocated == 0
    sound(governor)


def test_a_warning_that_is_an_error_goes_to_the_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr("sys.unraisablehook", lambda info: told.append(type(info.exc_value)))
    governor = governor_of_three()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reservation = governor.reserve(V, 5)
        del reservation
    assert told == [ResourceWarning] and governor.snapshot().allocated == 0


@pytest.mark.parametrize(
    ("options", "told"), [(["-X", "dev"], "(made at "), (["-X", "tracemalloc"], "Object allocated at")]
)
def test_where_it_was_made_is_told(options: list[str], told: str, tmp_path: Any) -> None:
    import subprocess
    import sys

    from kit import environment

    script = tmp_path / "leak.py"
    script.write_text(
        "from nodedb_mem import MemoryGovernor\n"
        "governor = MemoryGovernor(100, {0: 100})\n"
        "\n"
        "def leak():\n"
        "    governor.reserve(0, 7)\n"
        "\n"
        "leak()\n"
    )
    command = [sys.executable, *options, "-W", "always", script]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert "unreleased reservation of 7 bytes" in done.stderr and told in done.stderr
    assert "leak.py" in done.stderr


def test_reservations_outlive_the_governor() -> None:
    governor = governor_of_three()
    reservation = governor.reserve(V, 5)
    del governor
    gc.collect()
    assert reservation.size == 5
    with pytest.raises(RuntimeError, match="gone"):
        reservation.resize(6)
    reservation.resize(2)
    reservation.release()


def test_a_governor_in_a_cycle_is_collected(run_python: Callable[..., str]) -> None:
    script = """
    import gc, weakref
    from nodedb_mem import MemoryGovernor
    governor = MemoryGovernor(100, {0: 100})
    governor.me = governor
    governor.held = governor.reserve(0, 5)
    governor.add_reclaimer(0, lambda wanted: governor.held.size)
    governor.on_pressure(lambda *_: governor)
    there = weakref.ref(governor)
    governor.held.release()
    del governor
    gc.collect()
    print(there())
    """
    assert run_python(script).strip() == "None"


# Waiting


def test_a_release_lets_the_next_one_in() -> None:
    governor = governor_of_three()
    first = governor.reserve(V, 32 * MIB)
    timer = threading.Timer(0.05, first.release)
    timer.start()
    with governor.reserve(V, MIB, timeout=60) as second:
        assert second.size == MIB
    timer.join()
    assert governor.snapshot().engines[V].waits == 1 and governor.snapshot().engines[V].rejections == 0


def test_a_time_that_is_over_is_a_refusal() -> None:
    governor = governor_of_three()
    with governor.reserve(V, 32 * MIB):
        with pytest.raises(BudgetExhaustedError) as caught:
            governor.reserve(V, 1, timeout=0.05)
        assert caught.value.available == 0
        assert governor.snapshot().engines[V].rejections == 1 and governor.snapshot().waiting == 0
        start = time.monotonic()
        with pytest.raises(BudgetExhaustedError):  # it could never fit
            governor.reserve(V, 33 * MIB, timeout=None)
        assert time.monotonic() - start < 30
    sound(governor)


def test_waiters_are_served_in_order_and_the_large_is_not_starved() -> None:
    governor = governor_of_three()
    order: list[str] = []
    held = [governor.reserve(V, 8 * MIB) for _ in range(4)]

    def wait(name: str, size: int) -> None:
        with governor.reserve(V, size, timeout=60):
            order.append(name)

    def start(name: str, size: int, place: int) -> threading.Thread:
        thread = threading.Thread(target=wait, args=(name, size))
        thread.start()
        while governor.snapshot().waiting < place:
            time.sleep(0.001)
        return thread

    threads = [start("large", 30 * MIB, 1), start("small", 3 * MIB, 2), start("other", 3 * MIB, 3)]
    held.pop().release()
    time.sleep(0.02)
    assert order == [] and governor.try_reserve(V, 1) is None  # it would fit, and keep the large one waiting
    governor.reserve(Q, 16 * MIB).release()  # another engine is not concerned
    for each in held:
        each.release()
    for thread in threads:
        thread.join()
    assert order[0] == "large" and sorted(order) == ["large", "other", "small"]
    sound(governor)


def test_a_signal_ends_a_wait(run_python: Callable[..., str]) -> None:
    script = """
    import signal
    from nodedb_mem import MemoryGovernor
    governor = MemoryGovernor(100, {0: 100})
    held = governor.reserve(0, 100)
    signal.signal(signal.SIGALRM, lambda *_: 1 / 0)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        governor.reserve(0, 1, timeout=None)
    except ZeroDivisionError:
        print(governor.snapshot().waiting, governor.snapshot().allocated)
    held.release()
    """
    assert run_python(script).strip() == "0 100"


def test_a_coroutine_waits_and_the_loop_goes_on() -> None:
    governor = governor_of_three()

    async def main() -> int:
        held = governor.reserve(V, 32 * MIB)
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while not held.released:
                ticks += 1
                await asyncio.sleep(0.001)

        async def take(size: int) -> int:
            with await governor.reserve_async(V, size) as reservation:
                return reservation.size

        waiters = [asyncio.create_task(take(size)) for size in (MIB, 30 * MIB, 5)]
        ticking = asyncio.create_task(tick())
        await asyncio.sleep(0.05)
        assert governor.snapshot().waiting == 3
        held.release()
        assert await asyncio.gather(*waiters) == [MIB, 30 * MIB, 5]
        await ticking
        return ticks

    assert asyncio.run(main()) > 3
    assert governor.snapshot().allocated == 0
    sound(governor)


def test_a_coroutine_is_refused_in_time_or_cancelled() -> None:
    governor = governor_of_three()

    async def main() -> None:
        held = governor.reserve(V, 32 * MIB)
        with pytest.raises(BudgetExhaustedError):
            await governor.reserve_async(V, 1, timeout=0.02)
        with pytest.raises(BudgetExhaustedError):
            await governor.reserve_async(V, 33 * MIB)
        with pytest.raises(UnknownEngineError):
            await governor.reserve_async(W, 1)
        with pytest.raises(ValueError):
            await governor.reserve_async(V, -1)
        task = asyncio.create_task(governor.reserve_async(V, 1))
        await asyncio.sleep(0.01)
        assert governor.snapshot().waiting == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert governor.snapshot().waiting == 0
        held.release()
        with await governor.reserve_async(V, 32 * MIB):
            pass

    asyncio.run(main())
    assert governor.snapshot().unreleased == 0
    sound(governor)


# What is shown


def test_a_snapshot_has_the_figures_and_is_json() -> None:
    governor = governor_of_three(thresholds=PressureThresholds(50, 60, 70, 1), headroom=MIB)
    with governor.reserve(V, 20 * MIB):
        pass
    with governor.reserve(V, 16 * MIB), governor.reserve(Mine.INDEX, MIB):
        shot = governor.snapshot()
    assert (shot.path, shot.ceiling, shot.headroom, shot.allocated) == (None, 64 * MIB, MIB, 17 * MIB)
    assert shot.peak == 20 * MIB and shot.engines[V].peak == 20 * MIB and shot.engines[Mine.INDEX].peak == MIB
    assert shot.engines[V].pressure is PressureLevel.WARNING and shot.pressure is PressureLevel.NORMAL
    assert shot.rss > MIB and shot.unmanaged == shot.rss - 17 * MIB and not shot.forked
    assert [process.pid for process in shot.processes] == [os.getpid()]
    told = json.loads(json.dumps(shot.as_json()))
    assert set(told["engines"]) == {"vector", "query", str(Mine.INDEX)}
    assert told["engines"]["vector"]["pressure"] == "warning" and told["engines"]["vector"]["utilization"] == 50
    assert told["utilization"] == 26.56 and told["processes"][0]["peak"] == 20 * MIB
    with pytest.raises(AttributeError):
        shot.ceiling = 5  # type: ignore[misc]
    assert governor.thresholds == PressureThresholds(50, 60, 70, 1)
    assert repr(governor) == f"<MemoryGovernor: 0 of {64 * MIB} bytes>"
    reservation = governor.reserve(Mine.INDEX, 5)
    assert repr(reservation) == f"<Reservation of 5 bytes, engine {Mine.INDEX}>"
    reservation.release()
    assert "released" in repr(reservation)


def test_any_thread_may_use_it() -> None:
    governor = governor_of_three()
    reservation = in_thread(lambda: governor.reserve(V, 5))
    assert in_thread(governor.snapshot).allocated == 5
    assert in_thread(reservation.release) is None
    assert governor.snapshot().allocated == 0


def test_the_public_names_are_there() -> None:
    names = {"MemoryGovernor", "Reservation", "GovernorSnapshot", "PressureLevel", "PressureThresholds"}
    assert names | {"SpillAction", "SpillController", "GovernorIOError", "EngineBudget"} <= set(nodedb_mem.__all__)
