"""SpillMapping: values in RAM up to a budget, the rest in a region."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from zict.tests import utils_test as zict_checks

from kit import NewRegion, RunPython, in_thread, system
from nodedb_mem import (
    CapacityExceededError,
    EngineId,
    MemoryGovernor,
    OverflowMap,
    RegionClosedError,
    SpillMapping,
    UnknownEngineError,
    WrongThreadError,
    _reserving,
    _tiers,
)

New = Callable[..., SpillMapping[Any, Any]]


@pytest.fixture
def new(tmp_path: Path) -> Iterator[New]:
    made: list[SpillMapping[Any, Any]] = []

    def make(budget: int = 1 << 20, **options: Any) -> SpillMapping[Any, Any]:
        made.append(SpillMapping(budget, tmp_path, **options))
        return made[-1]

    yield make
    for mapping in made:
        mapping.close()


def array(seed: int, size: int = 100_000) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, size, "u1")


# A mapping


@pytest.mark.parametrize("budget", [0, 100, 1 << 20])
def test_it_is_a_mapping_as_zict_checks_mappings(new: New, budget: int) -> None:
    zict_checks.check_mapping(new(budget))


@pytest.mark.parametrize("budget", [0, 60, 1 << 20])
def test_it_is_threadsafe_as_zict_checks_it(new: New, budget: int) -> None:
    zict_checks.check_different_keys_threadsafe(new(budget))
    zict_checks.check_same_key_threadsafe(new(budget))


def test_iteration_is_a_dicts(new: New) -> None:
    mapping = new(0)
    mapping.update(a=[1], b=[2], c=[3])
    assert list(mapping.items()) == [("a", [1]), ("b", [2]), ("c", [3])] and list(reversed(mapping)) == ["c", "b", "a"]
    for view in (mapping, mapping.keys(), mapping.values(), mapping.items()):
        with pytest.raises(RuntimeError):
            for _ in view:
                mapping[len(mapping)] = 0
    assert mapping.popitem()[1] == 0 and mapping.setdefault("a") == [1] and mapping.pop("a") == [1]
    with pytest.raises(TypeError):
        mapping[[1]] = 1


# The budget


def test_values_stay_in_ram_up_to_the_budget_and_the_rest_comes_back(new: New) -> None:
    mapping = new(1 << 20)
    for number in range(50):
        mapping[number] = array(number)
        assert mapping.stats().bytes_in_ram <= 1 << 20
    stats = mapping.stats()
    assert stats.keys_in_ram == 10 and stats.keys_out == 40 and stats.evictions == 40
    assert 4_000_000 < stats.bytes_out < 4_100_000 and stats.bytes_written == stats.bytes_out
    for number in range(50):
        assert (mapping[number] == array(number)).all()
    assert mapping.stats().misses == 50  # the coldest goes first


def test_what_was_used_last_stays(new: New) -> None:
    mapping = new(350_000)
    for number in range(3):
        mapping[number] = array(number)
    mapping[0]
    mapping[3] = array(3)
    misses = mapping.stats().misses
    assert [number for number in range(4) if mapping[number] is not None and mapping.stats().misses == misses] == [0]


def test_a_value_larger_than_the_budget_goes_straight_out(new: New) -> None:
    mapping = new(50_000)
    mapping["a"] = array(1)
    assert mapping.stats().bytes_in_ram == 0 and mapping.stats().keys_out == 1
    mine = array(2)
    mapping["b"] = mine  # in use: it would stay in RAM anyway
    assert mapping.stats().keys_in_ram == 1 and mapping["b"] is mine
    del mine
    mapping["c"] = 1
    assert mapping.stats().keys_out == 2 and (mapping["b"] == array(2)).all()


def test_a_larger_or_smaller_budget_counts_at_once(new: New) -> None:
    mapping = new(0)
    for number in range(10):
        mapping[number] = array(number)
    mapping.set_budget(1 << 20)
    assert sum(int(value[0]) for value in mapping.values()) == sum(int(array(n)[0]) for n in range(10))
    assert mapping.stats().keys_in_ram == 10 and mapping.budget == 1 << 20
    mapping.set_budget(250_000)
    assert mapping.stats().keys_in_ram == 2
    with pytest.raises(ValueError, match="negative"):
        mapping.set_budget(-1)


def test_values_are_put_out_on_request(new: New) -> None:
    mapping = new()
    for number in range(5):
        mapping[number] = array(number)
    assert mapping.evict(150_000) >= 200_000 and mapping.stats().keys_in_ram == 3
    assert mapping.evict([4, 0]) >= 100_000 and mapping.stats().keys_in_ram == 2
    assert mapping.evict() > 0 and mapping.stats().keys_in_ram == 0 and mapping.evict() == 0
    with pytest.raises(KeyError):
        mapping.evict([7])
    with pytest.raises(TypeError):
        mapping.evict("4")


def test_a_pinned_value_stays(new: New) -> None:
    mapping = new(0)
    mapping["a"] = array(1)
    with mapping.pin("a") as value:
        del value
        mapping.evict()
        mapping.evict(["a"])
        assert mapping.stats().keys_in_ram == 1
        with mapping.pin("a"):
            pass
        mapping["b"] = array(2)
        assert mapping.stats().keys_in_ram == 1
    mapping.evict()
    assert mapping.stats().keys_in_ram == 0


def test_another_weight(new: New) -> None:
    mapping = new(3, weight=lambda value: 1)
    for number in range(10):
        mapping[number] = array(number)
    assert mapping.stats().bytes_in_ram == mapping.stats().keys_in_ram == 3


def test_what_has_grown_in_place_weighs_more_when_it_comes_back(new: New) -> None:
    mapping = new()
    mapping["a"] = []
    mapping["a"].extend([b"x" * 1000 for _ in range(100)])
    mapping.evict()
    assert len(mapping["a"]) == 100 and mapping.stats().bytes_in_ram > 1000


@pytest.mark.parametrize("share", [2, 0.5, 0.4, 0.33, 0.01])
def test_it_is_right_with_any_share_of_the_ram_it_needs(new: New, share: float) -> None:
    random = np.random.default_rng(5)
    model: dict[int, Any] = {}
    mapping = new(int(4_000_000 * share))
    for step in range(600):
        key = int(random.integers(40))
        if key not in model or step % 7 == 0:
            model[key] = random.integers(0, 255, int(random.integers(1, 200_000)), "u1")
            mapping[key] = model[key].copy()
        elif step % 3 == 0:
            model[key][-1] = mapping[key][-1] = step % 256
        assert np.array_equal(mapping[key], model[key])
        assert mapping.stats().bytes_in_ram <= max(mapping.budget, 210_000)
    assert all(np.array_equal(mapping[key], value) for key, value in model.items())


def test_the_region_does_not_grow_with_time(new: New) -> None:
    random, mapping = np.random.default_rng(3), new(0)
    for _ in range(1500):
        mapping[int(random.integers(30))] = np.zeros(int(random.integers(1, 400_000)), "u1")
    with mapping._lock, mapping._session as tiers:
        assert tiers.bytes_written > 200_000_000
        assert tiers.region.used_bytes < 3 * tiers.region.live_bytes + (8 << 20)


def test_the_room_of_what_was_deleted_is_given_back(new: New, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tiers, "_TIDY", 4 << 20)
    monkeypatch.setattr(_tiers, "_HOLES", 8 << 20)
    mapping = new(0)
    for number in range(60):
        mapping[number] = array(number, 1_000_000)
    for number in range(50):
        del mapping[number]
    with mapping._lock, mapping._session as tiers:
        assert tiers.region.used_bytes < 30 << 20 and tiers.region.stats().disk_bytes < 40 << 20
    assert all((mapping[number] == array(number, 1_000_000)).all() for number in range(50, 60))


# What was changed


def changes() -> dict[str, tuple[Callable[[], Any], Callable[[Any], None]]]:
    def set_item(value: Any) -> None:
        value[1] = 77

    def deep(value: Any) -> None:
        value["a"]["b"][0][5] = 7

    return {
        "array": (lambda: array(1), set_item),
        "large array": (lambda: array(1, 1_000_000), set_item),
        "list": (lambda: [1, 2, 3], set_item),
        "bytearray": (lambda: bytearray(50_000), set_item),
        "memoryview": (lambda: memoryview(bytearray(500_000)), set_item),
        "appended": (lambda: [1], lambda value: value.append(2)),
        "nested": (lambda: {"a": {"b": [array(3, 300_000)]}}, deep),
        "slice": (lambda: array(1, 400_000), lambda value: value[10:20].fill(3)),
        "made read-only": (lambda: array(1, 400_000), lambda value: value.setflags(write=False)),
        "set": (lambda: {1, 2}, lambda value: value.add(3)),
        "swapped": (lambda: [array(1, 200_000), array(2, 200_000)], lambda value: value.reverse()),
        "same size": (lambda: {"a": "x" * 1000}, lambda value: value.update(a="y" * 1000)),
    }


@pytest.mark.parametrize("name", changes())
def test_a_change_in_place_is_written_and_no_change_is_not(new: New, name: str) -> None:
    make, change = changes()[name]
    mapping, expected = new(), make()
    mapping["a"] = make()
    for turn in range(3):
        mapping.evict()
        before = mapping.stats()
        mapping["a"]
        mapping.evict()
        after = mapping.stats()
        assert after.evictions == before.evictions + 1
        assert after.bytes_written == before.bytes_written and after.writes_saved == before.writes_saved + 1
        if turn == 0:
            change(mapping["a"])
            change(expected)
            mapping.evict()
            assert mapping.stats().bytes_written > after.bytes_written
        assert np.array_equal(mapping["a"], expected) if name != "nested" else str(mapping["a"]) == str(expected)
        if isinstance(expected, np.ndarray):
            assert mapping["a"].flags.writeable == expected.flags.writeable


def test_frames_go_out_once(new: New) -> None:
    pandas = pytest.importorskip("pandas")
    mapping = new()
    mapping["a"] = pandas.DataFrame(
        {"n": np.arange(30_000), "s": [f"text {i}" for i in range(30_000)], "o": [[1] for _ in range(30_000)]}
    )
    mapping["b"] = pandas.Series(np.arange(100_000))
    mapping.evict()
    assert mapping.stats().keys_in_ram == 0
    for _ in range(2):
        assert mapping["a"]["n"].sum() + mapping["b"].sum() == sum(range(30_000)) + sum(range(100_000))
        mapping.evict()
        assert mapping.stats().keys_in_ram == 0
    assert mapping.stats().writes_saved >= 3
    mapping["a"].loc[5, "n"] = -1
    mapping.evict()
    assert mapping["a"].loc[5, "n"] == -1


def test_what_is_read_through_old_kernels_maps(new: New) -> None:
    mapping = new()
    mapping._tiers.pages.by_page = True
    mapping["a"], mapping["b"] = array(1, 40_000_000), array(2, 400_000)
    mapping.evict()
    assert int(mapping["a"].sum()) + int(mapping["b"].sum()) > 0
    mapping["b"][399_999] ^= 255
    mapping.evict()
    assert mapping.stats().writes_saved == 1 and mapping["b"][399_999] == array(2, 400_000)[399_999] ^ 255


def test_without_maps_everything_is_written(new: New) -> None:
    mapping = new()
    mapping["a"] = array(1, 400_000)
    mapping.evict()
    mapping._tiers.pages.close()
    mapping["a"]
    mapping.evict()
    assert mapping.stats().writes_saved == 0 and (mapping["a"] == array(1, 400_000)).all()


# What is in use


class Box:
    def __init__(self, inside: Any) -> None:
        self.inside = inside


HELD: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "itself": (lambda: array(1), lambda value: value),
    "a slice": (lambda: array(1), lambda value: value[10:20]),
    "a slice of a slice": (lambda: array(1, 400_000), lambda value: value[10:20][:5]),
    "a view": (lambda: array(1), lambda value: memoryview(value)),
    "inside": (lambda: {"a": [array(1)]}, lambda value: value["a"][0]),
    "a slice inside": (lambda: {"a": [array(1)]}, lambda value: value["a"][0][3:]),
    "a list": (lambda: [1], lambda value: value),
    "a list inside": (lambda: {"a": [[1, 2]]}, lambda value: value["a"][0]),
    "an attribute": (lambda: Box([1, 2]), lambda value: value.inside),
    "of an array of objects": (lambda: np.array([[1], [2, 3]], dtype=object), lambda value: value[1]),
    "a buffer": (lambda: memoryview(bytearray(9)), lambda value: value[3:]),
    "what an array is made on": (lambda: np.frombuffer(memoryview(bytearray(9)), "u1"), lambda value: value.base),
    "bytes": (lambda: bytearray(1000), lambda value: memoryview(value)),
}


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("name", HELD)
def test_what_somebody_holds_is_changed_under_its_key_too(new: New, name: str, restored: bool) -> None:
    make, pick = HELD[name]
    mapping = new()
    mapping["a"] = make()
    if restored:
        mapping.evict()
    mine = pick(mapping["a"])
    for number in range(4):  # whatever is tried
        mapping.evict()
        mapping.evict(["a"])
        mine[0] = number
        assert pick(mapping["a"])[0] == number
    del mine
    mapping.evict()
    mapping.evict()
    assert mapping.stats().keys_in_ram == 0
    assert pick(mapping["a"])[0] == 3


def test_who_holds_the_mapping_that_an_array_came_in_is_seen(new: New) -> None:
    mapping = new()
    mapping["a"] = array(1, 400_000)
    mapping.evict()
    memory = memoryview(mapping["a"].base)
    at = mapping["a"].ctypes.data - np.frombuffer(memory, "u1").ctypes.data
    for number in range(3):
        mapping.evict()
        memory[at] = number
        assert mapping["a"][0] == number
    del memory
    mapping.evict()
    assert mapping.stats().keys_in_ram == 0 and mapping["a"][0] == 2


def test_what_is_a_view_of_something_in_use_stays(new: New) -> None:
    mapping, whole = new(), array(1)
    mapping["a"] = whole[10:1000]
    mapping.evict()
    mapping.evict()
    whole[11] = 5
    assert mapping["a"][1] == 5


def test_what_many_values_share_does_not_keep_them_in_ram(new: New) -> None:
    mapping, shared, common = new(0), {"depth": 3}, array(9)
    for number in range(20):
        mapping[number] = {"config": shared, "data": array(number), "common": common}
    for _ in range(3):
        mapping.evict()
    assert mapping.stats().keys_in_ram == 0
    shared["depth"] = 4
    common[0] = 44
    assert all(value["config"] is shared and value["common"] is common for value in mapping.values())
    assert (mapping[3]["data"] == array(3)).all()


def test_parts_of_one_array_go_out(new: New) -> None:
    mapping, whole = new(0), array(1, 400_000)
    for number, part in enumerate(np.array_split(whole, 8)):
        mapping[number] = part
    for number, part in enumerate(np.array_split(whole.reshape(400, 1000), 8, axis=1)):
        mapping["column", number] = {"a": [part]}
    del part
    mapping.evict()
    assert mapping.stats().keys_out == 0  # whoever has it may change it
    whole[7] = 77
    expected, gone = whole.copy(), weakref.ref(whole)
    del whole
    for number in range(8):
        del mapping["column", number]
    mapping.evict()
    mapping.evict()
    assert mapping.stats().keys_in_ram == 0 and gone() is None
    assert (np.concatenate([mapping[number] for number in range(8)]) == expected).all()


def test_parts_of_the_rows_of_one_array_go_out(new: New) -> None:
    mapping = new(0)
    for number, part in enumerate(np.array_split(array(1, 400_000).reshape(400, 1000).copy(), 8, axis=1)):
        mapping[number] = {"a": [part]}
    del part
    mapping.evict()
    mapping.evict()
    assert mapping.stats().keys_in_ram == 0
    assert (np.hstack([mapping[number]["a"][0] for number in range(8)]).ravel() == array(1, 400_000)).all()


def test_parts_that_overlap_stay_together(new: New) -> None:
    mapping = new(0)
    whole = array(1)
    mapping["a"], mapping["b"], mapping["c"] = whole[:600], whole[500:], whole[10:20]
    del whole
    for number in range(4):
        mapping.evict()
        mapping["b"][0] = number
        assert mapping["a"][500] == number
        mapping["c"][0] = number
        assert mapping["a"][10] == number


def test_groups_of_a_frame_go_out(new: New) -> None:
    pandas = pytest.importorskip("pandas")
    mapping = new(0)
    frame = pandas.DataFrame({"k": np.arange(30_000) % 7, "n": np.arange(30_000.0), "s": ["x"] * 30_000})
    expected = frame.groupby("k")["n"].sum().to_dict()
    for key, group in frame.groupby("k"):
        mapping[key] = group
    del frame, group
    gc.collect()
    mapping.evict()
    mapping.evict()
    assert mapping.stats().keys_in_ram == 0
    assert {key: group["n"].sum() for key, group in mapping.items()} == expected


def test_one_value_under_several_keys_is_one(new: New) -> None:
    mapping = new()
    mapping["a"] = mapping["b"] = array(1)
    mapping["c"] = mapping["a"]
    assert mapping.stats().bytes_in_ram < 110_000
    mapping.evict()
    assert mapping.stats().keys_out == 3 and mapping.stats().evictions == 1
    mapping["b"][0] = 99
    mapping.evict()
    assert mapping["a"] is mapping["c"] and mapping["c"][0] == 99
    del mapping["a"]
    mapping["c"] = 1
    mapping.evict()
    assert mapping["b"][0] == 99


def test_memory_leaves_with_the_value(new: New) -> None:
    mapping = new()

    class Kept(np.ndarray):
        pass

    mapping["a"] = array(1).view(Kept)
    gone = weakref.ref(mapping["a"])
    mapping.evict()
    assert gone() is None


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_the_rss_keeps_to_the_budget(new: New, sanitized: bool) -> None:
    if sanitized:
        pytest.skip("AddressSanitizer keeps memory that was freed")
    mapping = new(32 << 20)
    before, most = rss(), 0
    for number in range(64):
        mapping[number] = np.full(4 << 20, number, "u1")
        most = max(most, rss())
    for number in range(64):
        assert int(mapping[number].sum()) == number * (4 << 20)
        most = max(most, rss())
    assert most - before < (32 << 20) + (64 << 20)


# Refused


def test_a_value_that_cannot_be_weighed_names_its_key(new: New) -> None:
    mapping = new()
    mapping["a"] = 1
    with pytest.raises(TypeError, match="'a'"):
        mapping["a"] = [threading.Lock()]
    assert mapping["a"] == 1


@pytest.mark.parametrize("weight", [1.5, None, "1", -1])
def test_a_wrong_weight_names_the_key_and_changes_nothing(new: New, weight: Any) -> None:
    mapping = new(weight=lambda value: weight)
    with pytest.raises((TypeError, ValueError), match="'a'"):
        mapping["a"] = 1
    assert len(mapping) == mapping.stats().keys_in_ram == 0


def test_wrong_arguments_are_refused_at_once(tmp_path: Path, new: New, new_region: NewRegion) -> None:
    for wrong in (256, -1):
        with pytest.raises(ValueError, match="engine"):
            SpillMapping(1, tmp_path, engine=wrong)
        with pytest.raises(ValueError, match="engine"):
            OverflowMap(new_region(f"region {wrong}"), engine=wrong)
    with pytest.raises(TypeError):
        SpillMapping(1, tmp_path, engine="a")  # type: ignore[arg-type]
    mapping = new()
    mapping["a"] = array(1)
    assert mapping.evict(np.int64(5)) > 5
    for wrong in (1.5, "a"):
        with pytest.raises(TypeError):
            mapping.evict(wrong)


def test_a_value_that_cannot_be_pickled_is_told_once_and_stays(new: New) -> None:
    mapping = new(200, weight=lambda value: 100)
    mapping["bad"] = [threading.Lock()]
    mapping["a"] = [1]
    with pytest.raises(TypeError, match="'bad'"):
        mapping["b"] = [2]
    mapping["c"] = [3]
    mapping.evict()
    assert isinstance(mapping["bad"], list) and dict(mapping) | {"bad": 0} == {"bad": 0, "a": [1], "b": [2], "c": [3]}
    mapping["bad"].clear()
    mapping["bad"] = mapping["bad"]
    mapping.evict()
    mapping.evict()
    assert mapping.stats().keys_in_ram == 0 and mapping.stats().failures == 1


def test_a_full_region_loses_nothing_and_works_again(new: New, caplog: pytest.LogCaptureFixture) -> None:
    mapping = new(300_000, max_capacity=1 << 20)
    refused = 0
    for number in range(20):
        try:
            mapping[number] = array(number)
        except CapacityExceededError as error:
            assert error.key in mapping
            refused += 1
    assert refused > 5 and len(mapping) == 20 and mapping.stats().failures >= refused
    with caplog.at_level(logging.WARNING):
        for number in range(20):
            assert (mapping[number] == array(number)).all()
    assert sum(record.name == "nodedb_mem.spilling" for record in caplog.records) <= 20
    for number in range(15):
        del mapping[number]
    mapping[20] = array(20)
    assert mapping.stats().bytes_in_ram <= 300_000
    for number in range(15, 21):
        assert (mapping[number] == array(number)).all()


def test_it_ends(new: New) -> None:
    mapping = new(50_000)
    mapping["a"], mapping["b"] = array(1), [1]
    kept = mapping["a"]
    mapping.close()
    mapping.close()
    assert mapping.closed and "closed" in repr(mapping) and len(mapping) == 0 and (kept == array(1)).all()
    for use in (
        lambda: mapping["a"],
        lambda: mapping.update(a=1),
        lambda: mapping.pop("a"),
        lambda: mapping.evict(),
        lambda: mapping.set_budget(1),
        lambda: mapping.clear(),
    ):
        with pytest.raises(RegionClosedError):
            use()
    with new() as other:
        other["a"] = 1
    assert other.closed
    with pytest.raises(TypeError, match="pickle"):
        __import__("pickle").dumps(mapping)


def test_an_abandoned_mapping_leaves_nothing(tmp_path: Path) -> None:
    mapping: SpillMapping[str, Any] = SpillMapping(0, tmp_path)
    mapping["a"] = array(1)
    del mapping
    gc.collect()
    assert os.listdir(tmp_path) == []


# Threads, processes, loops


def test_a_forked_child_has_what_is_in_ram(new: New) -> None:
    mapping = new(150_000)
    mapping["cold"], mapping["hot"] = array(1), array(2)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            assert (mapping["hot"] == array(2)).all()
            for use in (lambda: mapping["cold"], lambda: mapping.update(a=1), lambda: mapping.evict()):
                try:
                    use()
                except WrongThreadError:
                    status = 0
                else:
                    status = 2
                    break
            mapping.close()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (mapping["cold"] == array(1)).all()


def test_a_child_does_not_wait_for_a_lock_of_its_parent(new: New) -> None:
    mapping = new(150_000)
    mapping["hot"] = 1
    with mapping._lock:
        child = os.fork()
        if child == 0:
            try:
                refused = in_thread(mapping.evict), in_thread(mapping.stats), in_thread(mapping.close)
                os._exit(list(map(type, refused)) != [WrongThreadError, WrongThreadError, type(None)])
            finally:
                os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_any_thread_may_use_it(new: New) -> None:
    mapping = new(150_000)

    def fill() -> None:
        for number in range(10):
            mapping[number] = array(number)

    assert in_thread(fill) is None
    assert all((mapping[number] == array(number)).all() for number in range(10))
    assert in_thread(lambda: int(mapping[3][5])) == int(array(3)[5])


@pytest.mark.parametrize("steps", [400, system(40_000)])  # a minute
def test_threads_at_once(new: New, steps: int) -> None:
    mapping, errors = new(2_000_000), []
    stop = threading.Event()

    def work(worker: int) -> None:
        try:
            random = np.random.default_rng(worker)
            mine: dict[Any, int] = {}
            for step in range(steps):
                key = worker, int(random.integers(30))
                if key not in mine:
                    mapping[key] = np.zeros(int(random.integers(1, 200_000)), "u1")
                    mine[key] = 0
                match int(random.integers(4)):
                    case 0:
                        mine[key] = step % 256
                        mapping[key][-1] = mine[key]
                    case 1:
                        held = mapping[key]
                        mapping.evict(int(random.integers(300_000)))
                        mine[key] = (step + 1) % 256
                        held[-1] = mine[key]
                        del held
                    case 2 if step % 7 == 0:
                        del mapping[key], mine[key]
                        continue
                assert mapping[key][-1] == mine[key]
            for key, last in mine.items():
                assert mapping[key][-1] == last
        except BaseException as error:
            errors.append(error)
        stop.set()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]
    assert mapping.stats().evictions > 100


def test_a_loop_is_not_kept_waiting(new: New) -> None:
    mapping = new(150_000)

    async def use() -> None:
        await asyncio.gather(*(mapping.aset(number, array(number)) for number in range(10)))
        found = await asyncio.gather(*(mapping.aget(number) for number in range(10)))
        assert all((value == array(number)).all() for number, value in enumerate(found))
        with pytest.raises(KeyError):
            await mapping.aget("missing")

    asyncio.run(use())


def test_nothing_is_left_after_a_kill(run_python: RunPython, tmp_path: Path) -> None:
    (tmp_path / "spilled").mkdir()
    script = """
        import os, signal, sys
        import numpy as np
        from nodedb_mem import SpillMapping
        child = os.fork()
        if child == 0:
            mapping = SpillMapping(1 << 20, sys.argv[1])
            for number in range(20):
                mapping[number] = np.ones(1 << 18)
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
        print(os.listdir(sys.argv[1]))
        """
    assert run_python(script, tmp_path / "spilled") == "[]\n"


# With a governor


QUERY = EngineId.QUERY


def governor(limit: int) -> MemoryGovernor:
    return MemoryGovernor(limit, {QUERY: limit})


def test_what_is_in_ram_is_reserved_and_given_back_when_asked_for(new: New) -> None:
    budgets = governor(1_000_000)
    mapping = new(1 << 30, governor=budgets)
    for number in range(30):
        mapping[number] = array(number)
        assert budgets.snapshot().allocated == mapping.stats().bytes_in_ram <= 1_000_000
    for number in range(30):
        assert (mapping[number] == array(number)).all()
        assert budgets.snapshot().allocated == mapping.stats().bytes_in_ram <= 1_000_000
    assert budgets.snapshot().engines[QUERY].peak <= 1_000_000
    mapping[3] = mapping[3]
    mapping["three"] = mapping[3]
    del mapping[4], mapping[3]
    assert budgets.snapshot().allocated == mapping.stats().bytes_in_ram
    with budgets.reserve(QUERY, 900_000):
        assert mapping.stats().bytes_in_ram <= 100_000
    assert budgets.snapshot().engines[QUERY].reclaimed > 0
    mapping.close()
    assert budgets.snapshot().allocated == 0 and not budgets._reclaimers


def test_what_does_not_fit_is_charged_and_goes_out(new: New) -> None:
    budgets = governor(50_000)
    mapping = new(1 << 30, governor=budgets)
    for number in range(3):
        mapping[number] = array(number)
        assert budgets.snapshot().allocated == 0
    value = mapping[1]
    assert budgets.snapshot().allocated > 100_000 and (value == array(1)).all()
    del value
    mapping["a"] = 1
    mapping.evict()
    assert budgets.snapshot().allocated == mapping.stats().bytes_in_ram == 0


def test_another_engine_has_the_ceiling_by_the_mappings_giving_way(new: New) -> None:
    budgets = MemoryGovernor(2_000_000, {QUERY: 1_000_000, EngineId.VECTOR: 1_000_000})
    mapping = new(1 << 30, governor=budgets)
    for number in range(30):
        mapping[number] = array(number)
    budgets.set_ceiling(1_200_000)
    with budgets.reserve(EngineId.VECTOR, 1_000_000):
        assert budgets.snapshot().allocated <= 1_200_000 and mapping.stats().keys_in_ram <= 2
        assert all((mapping[number] == array(number)).all() for number in range(30))


def test_two_mappings_under_one_governor_give_way_to_each_other(new: New) -> None:
    budgets = governor(1_000_000)
    first, second = new(1 << 30, governor=budgets), new(1 << 30, governor=budgets)

    def work(mapping: SpillMapping[Any, Any]) -> None:
        for number in range(60):
            mapping[number] = array(number)
            assert mapping[number // 2][5] == array(number // 2)[5]

    threads = [threading.Thread(target=work, args=(mapping,)) for mapping in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert budgets.snapshot().allocated == first.stats().bytes_in_ram + second.stats().bytes_in_ram
    assert all((mapping[number] == array(number)).all() for mapping in (first, second) for number in range(60))


def test_an_engine_that_the_governor_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(UnknownEngineError):
        SpillMapping(1, tmp_path, governor=MemoryGovernor(1_000_000))


def test_an_abandoned_mapping_gives_everything_back(tmp_path: Path) -> None:
    budgets = governor(1_000_000)
    mapping: SpillMapping[str, Any] = SpillMapping(1 << 30, tmp_path, governor=budgets)
    mapping["a"] = array(1)
    del mapping
    gc.collect()
    assert budgets.snapshot().allocated == 0 and not budgets._reclaimers


# With a watch


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    assert condition()


def test_what_grows_outside_of_a_watched_mapping_has_it_spill(new: New, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_reserving, "default_ceiling", lambda: 200 << 20)
    mapping = new(100 << 20, watch=True)
    for number in range(20):
        mapping[number] = np.full(4 << 20, number, "u1")
    assert mapping.stats().keys_out == 0
    ballast = np.ones(120 << 20, "u1")
    until(lambda: mapping.stats().keys_out > 3)
    assert ballast[-1] == 1 and all((mapping[number] == number).all() for number in range(20))


def test_a_watched_mapping_keeps_below_what_the_process_may_use(new: New, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_reserving, "default_ceiling", lambda: 8 << 20)
    mapping = new(1 << 40, watch=True)
    for number in range(20):
        mapping[number] = np.full(1 << 20, number, "u1")
        assert mapping.stats().bytes_in_ram <= 8 << 20


def test_a_watch_beside_a_governor_and_a_watch_without_psutil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="watch"):
        SpillMapping(1, tmp_path, governor=governor(1), watch=True)
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(ModuleNotFoundError, match=r"nodedb_mem\[watch\]"):
        SpillMapping(1, tmp_path, watch=True)
    assert os.listdir(tmp_path) == []


def test_an_abandoned_watch_ends(tmp_path: Path) -> None:
    mapping: SpillMapping[str, Any] = SpillMapping(1, tmp_path, watch=True)
    watch = mapping._account.watch
    del mapping
    gc.collect()
    until(lambda: not watch.is_alive())
