"""Levels of pressure with their hysteresis, callbacks, the spill controller."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodedb_mem import (
    EngineId,
    MemoryGovernor,
    PressureLevel,
    PressureThresholds,
    SpillAction,
    SpillController,
)

V, Q = EngineId.VECTOR, EngineId.QUERY
NORMAL, WARNING, CRITICAL, EMERGENCY = PressureLevel

# Levels


def test_levels_are_ordered_and_named() -> None:
    assert NORMAL < WARNING < CRITICAL < EMERGENCY
    assert [str(level) for level in PressureLevel] == ["normal", "warning", "critical", "emergency"]


def test_a_level_begins_at_its_threshold_and_ends_below_it() -> None:
    governor = MemoryGovernor(1000, {V: 100})
    held = governor.reserve(V, 0)
    steps = (69, NORMAL), (70, WARNING), (65, WARNING), (64, NORMAL), (86, CRITICAL), (80, CRITICAL), (79, WARNING)
    for used, level in (*steps, (100, EMERGENCY), (90, EMERGENCY), (89, CRITICAL), (0, NORMAL)):
        held.resize(used)
        assert governor.pressure(V) is level, used
        assert governor.snapshot().engines[V].pressure is level
    held.release()


def test_all_together_have_a_level_of_their_own() -> None:
    governor = MemoryGovernor(100, {V: 50, Q: 50}, thresholds=PressureThresholds(50, 60, 80, hysteresis=0))
    with governor.reserve(V, 40):
        assert (governor.pressure(), governor.pressure(V), governor.pressure(Q)) == (NORMAL, EMERGENCY, NORMAL)
        with governor.reserve(Q, 25):
            assert (governor.pressure(), governor.pressure(Q)) == (CRITICAL, WARNING)
        assert (governor.pressure(), governor.pressure(Q)) == (NORMAL, NORMAL)


@given(st.lists(st.integers(0, 110), max_size=30), st.integers(0, 20))
def test_levels_agree_with_their_definition(walk: list[int], hysteresis: int) -> None:
    bounds = (70, 85, 95)
    governor = MemoryGovernor(1000, {V: 100}, thresholds=PressureThresholds(*bounds, hysteresis))
    held, level = governor.charge(V, 0), 0
    for used in walk:
        held.release()
        held = governor.charge(V, used)
        reached = sum(used >= bound for bound in bounds)
        while level > reached and used < bounds[level - 1] - hysteresis:
            level -= 1
        level = max(level, reached)
        assert governor.pressure(V) == level
    held.release()


# Callbacks


def test_callbacks_hear_of_changes_and_of_nothing_else() -> None:
    governor = MemoryGovernor(200, {V: 100, Q: 100})
    heard: list[tuple[Any, PressureLevel]] = []
    handle = governor.on_pressure(lambda engine, level: heard.append((engine, level)))
    one = governor.reserve(V, 69)
    assert heard == []
    two = governor.reserve(V, 1)
    assert heard == [(V, WARNING)]
    one.resize(60)
    one.resize(66)
    assert heard == [(V, WARNING), (V, NORMAL)]
    one.release()
    with governor.charge(Q, 150):
        assert heard[2:] == [(Q, EMERGENCY), (None, WARNING)]
    assert heard[4:] == [(Q, NORMAL), (None, NORMAL)]
    handle.remove()
    handle.remove()
    governor.charge(Q, 150).release()
    assert len(heard) == 6
    two.release()


def test_a_callback_may_reserve_and_one_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr("sys.unraisablehook", lambda info: told.append(type(info.exc_value)))
    governor = MemoryGovernor(200, {V: 100, Q: 100})
    heard: list[tuple[Any, PressureLevel]] = []

    def reserve_more(engine: int | None, level: PressureLevel) -> None:
        if engine is V and level is WARNING and len(heard) == 1:
            governor.reserve(V, 20).release()

    governor.on_pressure(lambda engine, level: 1 / 0)
    governor.on_pressure(lambda engine, level: heard.append((engine, level)))
    governor.on_pressure(reserve_more)
    governor.reserve(V, 70).release()
    assert (V, CRITICAL) in heard and heard[-1] == (V, NORMAL)
    assert set(told) == {ZeroDivisionError}


def test_engines_of_their_own_enum_come_back_as_such() -> None:
    from enum import IntEnum

    class Mine(IntEnum):
        INDEX = 99

    governor = MemoryGovernor(100, {Mine.INDEX: 100})
    heard: list[Any] = []
    governor.on_pressure(lambda engine, level: heard.append(engine))
    governor.reserve(99, 99).release()
    assert type(heard[0]) is Mine and heard[1] is None


# The spill controller


def test_spilling_goes_on_down_to_the_restore_threshold() -> None:
    controller = SpillController()
    walk = (50, 89.9, 90, 95, 89, 76, 75.1, 75, 74, 80, 89, 91, 10)
    none, begin, go_on, restore = SpillAction
    expected = [none, none, begin, go_on, go_on, go_on, go_on, restore, none, none, none, begin, restore]
    assert [controller.check(used) for used in walk] == expected
    assert controller.spill_count == 2 and not controller.is_spilling


def test_entries_are_counted_until_the_cycle_is_reset() -> None:
    controller = SpillController(80, 60)
    controller.check(85)
    controller.record_spill(3)
    controller.record_spill()
    assert controller.is_spilling and controller.entries_spilled == 4 and controller.spill_count == 1
    assert repr(controller) == "<SpillController 80/60 %: spilling, 4 entries>"
    controller.reset_cycle()
    assert not controller.is_spilling and controller.entries_spilled == 0 and controller.spill_count == 1
    assert controller.check(70) is SpillAction.NONE


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: SpillController(75, 75),
        lambda: SpillController(75, 90),
        lambda: SpillController(75, -1),
        lambda: SpillController().check(-1),
        lambda: SpillController().check(float("nan")),
        lambda: SpillController().record_spill(-1),
    ],
)
def test_numbers_outside_their_range(wrong: Any) -> None:
    with pytest.raises(ValueError):
        wrong()


@given(st.lists(st.floats(0, 200), max_size=40))
def test_begin_and_restore_alternate(walk: list[float]) -> None:
    controller = SpillController()
    begun = False
    for used in walk:
        action = controller.check(used)
        assert action is not SpillAction.BEGIN_SPILL or (not begun and used >= 90)
        assert action is not SpillAction.BEGIN_RESTORE or (begun and used <= 75)
        assert (action is SpillAction.CONTINUE_SPILL) <= (begun and used > 75)
        begun = action in (SpillAction.BEGIN_SPILL, SpillAction.CONTINUE_SPILL)
        assert controller.is_spilling is begun
