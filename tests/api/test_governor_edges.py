"""A governor at its edges: signals, finalizers and callbacks that come in between, threads that end, odd timeouts."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from types import FrameType
from typing import Any

import pytest

from kit import in_thread, sound
from nodedb_mem import (
    BudgetExhaustedError,
    EngineId,
    MemoryGovernor,
    PressureLevel,
    Reservation,
    UnknownEngineError,
)
from nodedb_mem import (
    governor as governor_module,
)

V, Q = EngineId.VECTOR, EngineId.QUERY


def governor_of(limit: int) -> MemoryGovernor:
    return MemoryGovernor(2 * limit, {V: limit, Q: limit})


# Signals


def interrupt_at(number: int) -> Callable[[FrameType, str, object], Any]:
    """A tracer that raises KeyboardInterrupt at the instruction of that number in the governor's Python code."""
    left = number

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(os.path.dirname(governor_module.__file__)):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    return trace


@pytest.mark.untraced
@pytest.mark.parametrize("gives", [0, 60])
def test_an_interrupt_anywhere_leaves_nobody_in_the_line_and_nothing_reserved(gives: int) -> None:
    governor = governor_of(100)
    held = governor.reserve(V, 60)

    def reclaim(wanted: int) -> int:
        held.resize(60 - gives)
        return gives

    governor.add_reclaimer(V, reclaim)
    number = 0
    while True:
        number += 3
        held.resize(60)
        before, reservation = sys.gettrace(), None
        sys.settrace(interrupt_at(number))
        try:
            reservation = governor.reserve(V, 50, timeout=0.001)
        except (KeyboardInterrupt, BudgetExhaustedError) as error:
            failed = type(error)
        else:
            failed = type(None)
        finally:
            sys.settrace(before)
        if reservation is not None:
            reservation.release()
        shot = governor.snapshot()
        assert (shot.allocated, shot.waiting, shot.unreleased) == (held.size, 0, 0)
        if failed is not KeyboardInterrupt:
            break
    assert number > 60 and failed is (type(None) if gives else BudgetExhaustedError)
    held.release()
    sound(governor)


def test_an_interrupt_in_a_callback_ends_the_call_and_nothing_is_lost() -> None:
    governor = governor_of(100)

    def interrupt(engine: int | None, level: PressureLevel) -> None:
        raise KeyboardInterrupt

    subscription = governor.on_pressure(interrupt)
    for call in (lambda: governor.reserve(V, 99), lambda: governor.charge(V, 99), lambda: governor.try_reserve(V, 99)):
        with pytest.raises(KeyboardInterrupt):
            call()
        assert governor.snapshot().allocated == 0 and governor.snapshot().unreleased == 0
        with pytest.raises(KeyboardInterrupt):
            governor._tell(V, -1)  # it hears that the levels have come down
        governor._tell(V, -1)
    subscription.remove()
    held = governor.reserve(V, 99)
    governor.on_pressure(interrupt)
    with pytest.raises(KeyboardInterrupt):
        held.release()
    assert held.released and governor.snapshot().allocated == 0
    sound(governor)


# Finalizers


def test_a_finalizer_may_release_while_a_lock_is_held(run_python: Callable[..., str]) -> None:
    """A collection comes at any allocation, and its finalizers run on the thread that holds the lock."""
    script = """
    import os
    from nodedb_mem import MemoryGovernor
    governor = MemoryGovernor(100, {0: 100})
    governor.on_pressure(lambda *_: None)
    governor.add_reclaimer(0, lambda wanted: 0)

    def come_back():
        held = governor.reserve(0, 99)
        with governor._lock, governor._reclaimers._lock:
            held.release()
            assert governor.try_reserve(0, 101) is None

    come_back()
    pid = os.fork()
    come_back()
    if pid == 0:
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    print(governor.snapshot().allocated)
    """
    assert run_python(script).strip() == "0"


def test_the_interpreter_ends_cleanly_while_some_wait(run_python: Callable[..., str]) -> None:
    script = """
    import asyncio, threading, time
    from nodedb_mem import MemoryGovernor
    governor = MemoryGovernor(100, {0: 100})
    held = governor.reserve(0, 100)
    governor.on_pressure(lambda *_: None)

    def wait():
        governor.reserve(0, 1, timeout=None)

    threading.Thread(target=wait, daemon=True).start()
    threading.Thread(target=lambda: asyncio.run(governor.reserve_async(0, 1)), daemon=True).start()
    while governor.snapshot().waiting < 2:
        time.sleep(0.001)
    held.release()
    held = governor.reserve(0, 1, timeout=60)
    while governor.snapshot().waiting:
        time.sleep(0.001)
    """
    run_python(script)


# Callbacks


def test_callbacks_hear_of_changes_in_their_order() -> None:
    """The first one causes another change before the second has heard of the first."""
    governor = governor_of(100)
    heard: list[Any] = []

    def act(engine: int | None, level: PressureLevel) -> None:
        if engine is V and level is PressureLevel.EMERGENCY:
            held.pop().release()

    held: list[Reservation] = [governor.reserve(V, 50)]
    governor.on_pressure(act)
    governor.on_pressure(lambda engine, level: heard.append(level) if engine is V else None)
    held.append(governor.reserve(V, 30))
    held.append(governor.charge(V, 19))
    assert heard == [PressureLevel.WARNING, PressureLevel.EMERGENCY, PressureLevel.WARNING]
    assert governor.pressure(V) is PressureLevel.WARNING
    for each in held:
        each.release()


def test_what_is_heard_last_is_so() -> None:
    """Threads that change a level at once."""
    governor = governor_of(100)
    heard: list[PressureLevel] = []
    governor.on_pressure(lambda engine, level: heard.append(level) if engine is V else None)

    def work() -> None:
        for _ in range(200):
            governor.charge(V, 99).release()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert heard and heard[-1] is PressureLevel.NORMAL is governor.pressure(V)
    assert all(before is not after for before, after in pairwise(heard))
    sound(governor)


def test_a_second_subscriber_takes_no_news_from_the_first() -> None:
    governor = governor_of(100)
    heard: list[Any] = []
    governor.on_pressure(lambda engine, level: heard.append((engine, level)))
    governor.set_limit(V, 10)
    held = governor.reserve(V, 1)
    governor.set_limit(V, 1)  # which tells nobody yet
    governor.on_pressure(lambda engine, level: None)
    held.release()
    assert not heard
    held = governor.reserve(V, 1)
    assert heard == [(V, PressureLevel.EMERGENCY)]
    held.release()


# Threads


def test_a_thread_with_the_number_of_one_that_has_ended_is_another() -> None:
    governor = governor_of(100)
    asked: list[int] = []
    in_thread(lambda: governor.add_reclaimer(V, lambda wanted: asked.append(wanted) or 0, thread=True))  # type: ignore[func-returns-value]
    with governor.reserve(V, 100):
        for _ in range(20):  # one of them has its number
            assert in_thread(lambda: governor.try_reserve(V, 1)) is None
            assert in_thread(governor.poll) == 0
    assert asked == []


# Timeouts


@pytest.mark.parametrize(
    ("timeout", "error"), [(float("nan"), ValueError), ("1", TypeError), ((), TypeError), (1j, TypeError)]
)
@pytest.mark.parametrize("size", [1, 60])
def test_odd_timeouts_are_refused_whether_there_is_room_or_not(timeout: Any, error: type[Exception], size: int) -> None:
    governor = governor_of(100)
    with governor.reserve(V, 50) as held:
        for call in (
            lambda: governor.reserve(V, size, timeout=timeout),
            lambda: held.resize(50 + size, timeout=timeout),
            lambda: asyncio.run(governor.reserve_async(V, size, timeout=timeout)),
        ):
            with pytest.raises(error):
                call()
        assert held.size == 50
    assert governor.snapshot().allocated == 0
    sound(governor)


def test_what_could_never_fit_is_refused_at_once_and_counted() -> None:
    governor = governor_of(100)
    start = time.monotonic()
    with governor.reserve(V, 30):
        for timeout in (0, 60, None, -1, float("inf")):
            with pytest.raises(BudgetExhaustedError) as caught:
                governor.reserve(V, 101, timeout=timeout)
            assert (caught.value.requested, caught.value.available, caught.value.limit) == (101, 70, 100)
        with pytest.raises(BudgetExhaustedError) as caught:
            asyncio.run(governor.reserve_async(V, 101))
    assert (caught.value.requested, caught.value.available, caught.value.limit) == (101, 70, 100)
    assert governor.snapshot().engines[V].rejections == 6 and governor.snapshot().engines[V].waits == 0
    with governor.reserve(V, 100), pytest.raises(BudgetExhaustedError):
        governor.reserve(V, 1, timeout=-1)
    assert governor.snapshot().engines[V].rejections == 7 and time.monotonic() - start < 50


# Coroutines


def test_a_coroutine_is_woken_by_a_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would look by itself after a minute."""
    monkeypatch.setattr(governor_module, "_NAP", 60)
    governor = governor_of(100)
    held = governor.reserve(V, 100)

    async def several() -> None:
        waiting = [asyncio.create_task(governor.reserve_async(V, 40)) for _ in range(5)]
        while governor.snapshot().waiting < 5:
            await asyncio.sleep(0)
        threading.Timer(0.01, held.release).start()
        for task in waiting:
            (await asyncio.wait_for(task, 30)).release()

    asyncio.run(several())
    assert governor.snapshot().allocated == 0
    sound(governor)


def test_a_loop_that_is_closed_leaves_nobody_in_the_line() -> None:
    governor = governor_of(100)
    held = governor.reserve(V, 100)
    loop = asyncio.new_event_loop()
    task = loop.create_task(governor.reserve_async(V, 1))
    while governor.snapshot().waiting == 0:
        loop.run_until_complete(asyncio.sleep(0))
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    held.release()
    del task, loop
    gc.collect()
    assert governor.snapshot().waiting == 0
    sound(governor)


def test_coroutines_of_unknown_engines_and_cancelled_ones() -> None:
    governor = governor_of(100)

    async def cancelled() -> None:
        with pytest.raises(UnknownEngineError):
            await governor.reserve_async(EngineId.WAL, 1)
        with governor.reserve(V, 100):
            task = asyncio.create_task(governor.reserve_async(V, 1))
            while governor.snapshot().waiting == 0:
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert governor.snapshot().waiting == 0 and governor.snapshot().unreleased == 0

    asyncio.run(cancelled())
    sound(governor)


# What is wrong from the start


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: governor_of(100).add_reclaimer(V, None),
        lambda: governor_of(100).add_reclaimer(V, lambda wanted: 0, priority="high"),
        lambda: governor_of(100).on_pressure(3),
        lambda: MemoryGovernor(100, thresholds=(70, 85, 95)),
        lambda: MemoryGovernor(100, thresholds=0),
        lambda: MemoryGovernor(100, [1, 2]),
        lambda: MemoryGovernor(100, {"vector": 5}),
        lambda: MemoryGovernor.shared(None),
        lambda: governor_of(100).watch("often"),
    ],
)
def test_what_is_of_a_wrong_type_is_refused_where_it_is_given(wrong: Callable[[], object]) -> None:
    with pytest.raises(TypeError):
        wrong()


@pytest.mark.parametrize("interval", [0, -1, float("nan"), float("inf"), 1e30])
def test_intervals_that_no_thread_can_wait_for(interval: float) -> None:
    with pytest.raises(ValueError, match="interval"):
        governor_of(100).watch(interval)


def test_numbers_that_are_wrong_are_plain_value_errors() -> None:
    """They are no region's."""
    governor, held = governor_of(100), list[Reservation]()
    for wrong in (
        lambda: governor.add_engine(EngineId.WAL, 1),
        lambda: governor.set_limit(V, 101),
        lambda: governor.set_ceiling(0),
        lambda: held.append(governor.charge(V, (1 << 63) - 1)) or governor.charge(V, 1),
    ):
        with pytest.raises(ValueError) as caught:
            wrong()
        assert type(caught.value) is ValueError
    for reservation in held:
        reservation.release()
