"""OverflowMap: a mapping whose values all lie in a region."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from zict.tests import utils_test as zict_checks

from kit import Check, NewRegion, in_thread
from nodedb_mem import (
    CapacityExceededError,
    EngineId,
    OverflowMap,
    OverflowRegion,
    RegionClosedError,
    WrongThreadError,
)
from nodedb_mem._core import lib


def test_it_is_a_mapping_as_zict_checks_mappings(new_region: NewRegion, check: Check) -> None:
    region = new_region()
    zict_checks.check_mapping(OverflowMap(region))
    check(region)


def test_keys_of_all_kinds_and_none_that_cannot_be_hashed(new_region: NewRegion) -> None:
    mapping: OverflowMap[Any, Any] = OverflowMap(new_region())
    for key in (1, "1", (1, "a"), None, 2.5, frozenset({1})):
        mapping[key] = [key]
    assert mapping[1] == mapping[1.0] == [1] and mapping[None] == [None] and len(mapping) == 6
    with pytest.raises(TypeError):
        mapping[[1]] = 1  # type: ignore[index]
    with pytest.raises(TypeError):
        mapping.update({1: 2}.items(), a=1) or mapping.update([([1], 2)])
    assert len(mapping.region) == len(mapping) == 7


def test_a_value_is_a_writable_copy_each_time(new_region: NewRegion) -> None:
    mapping: OverflowMap[str, Any] = OverflowMap(new_region())
    for size in (100, 1000, 100_000):  # shorter ones lie inside the pickle
        value = np.arange(float(size))
        mapping["a"] = value
        value[:] = 7
        first, second = mapping["a"], mapping["a"]
        first[0] = -1
        assert second[0] == 0 and second[1] == 1 and mapping["a"][0] == 0
        assert first.flags.writeable and first.ctypes.data % 64 == 0
        mapping["a"] = first
        assert mapping["a"][0] == -1


def test_large_values_cost_no_memory_until_they_are_touched(new_region: NewRegion) -> None:
    region = new_region(max_capacity=1 << 28)
    mapping: OverflowMap[str, Any] = OverflowMap(region)
    mapping["a"] = np.ones(12 << 20)

    def rss() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = rss()
    values = [mapping["a"] for _ in range(10)]
    assert rss() - before < 16 << 20
    assert values[9][-1] == 1


def test_replacing_and_deleting_leave_what_is_in_use(new_region: NewRegion, check: Check) -> None:
    region = new_region()
    mapping: OverflowMap[str, Any] = OverflowMap(region)
    mapping["a"] = mapping["b"] = np.arange(100_000)
    mapping["c"] = memoryview(bytes(range(256)) * 1000)
    first, part, view = mapping["a"], mapping["b"][500:600], mapping["c"][256:512]
    mapping["a"] = mapping["b"] = np.zeros(100_000)
    del mapping["b"], mapping["c"]
    for _ in range(3):
        mapping["d"] = b"\xff" * 800_000
    assert (first == np.arange(100_000)).all() and (part == np.arange(500, 600)).all() and view == bytes(range(256))
    check(region)
    del first, part, view
    gc.collect()
    mapping.clear()
    assert len(region) == 0 and region.stats().pinned_bytes == 0
    check(region)


def test_values_outlive_the_region(new_region: NewRegion) -> None:
    region = new_region()
    mapping: OverflowMap[str, Any] = OverflowMap(region)
    mapping["a"] = {"x": np.arange(100_000), "y": "text"}
    value = mapping["a"]
    region.close()
    value["x"][0] = 5
    assert value["x"].sum() == np.arange(100_000).sum() + 5
    with pytest.raises(RegionClosedError):
        mapping["a"]
    with pytest.raises(RegionClosedError):
        mapping["b"] = 1
    with pytest.raises(RegionClosedError):
        del mapping["a"]
    assert list(mapping) == ["a"]


def test_many_at_once(new_region: NewRegion, check: Check) -> None:
    region = new_region()
    mapping: OverflowMap[int, Any] = OverflowMap(region)
    plain: dict[int, Any] = {}
    for number in range(3000):
        plain[number] = np.full(number, number) if number % 10 == 0 else {"n": number, "t": "x" * (number % 50)}
    mapping.update(plain)
    mapping.update([(5, "a"), (7, "b"), (5, "c")])
    plain.update({5: "c", 7: "b"})
    assert len(region) == len(mapping) == 3000
    keys = [2990, 5, 7, 5, 0, 10, 11]
    for one, other in zip(mapping.get_many(keys), (plain[key] for key in keys), strict=True):
        assert type(one) is type(other) and np.array_equal(one, other)
    assert mapping.get_many([]) == [] and mapping.get_many(iter([5])) == ["c"]
    with pytest.raises(KeyError):
        mapping.get_many([1, 5000])
    check(region)


def test_changing_the_size_while_iterating_is_an_error(new_region: NewRegion) -> None:
    mapping: OverflowMap[Any, Any] = OverflowMap(new_region())
    mapping.update(a=1, b=2)
    for view in (mapping, mapping.keys(), mapping.values(), mapping.items()):
        with pytest.raises(RuntimeError):
            for _ in view:
                mapping[len(mapping)] = 0
    for key in mapping:
        mapping[key] = "another"  # the same size
    assert mapping.popitem() and mapping.pop("a") == "another" and mapping.setdefault("z", 3) == 3


# Refused


def test_what_cannot_be_pickled_names_the_key_and_changes_nothing(new_region: NewRegion) -> None:
    region = new_region()
    mapping: OverflowMap[Any, Any] = OverflowMap(region)
    mapping.update(a=1, b=2)
    bad = threading.Lock()
    with pytest.raises(TypeError, match="'the key'"):
        mapping["the key"] = bad
    with pytest.raises(TypeError, match="'a'"):
        mapping["a"] = [bad]
    with pytest.raises(TypeError, match="'c'"):
        mapping.update(a=3, c=bad, d=4)
    assert dict(mapping) == {"a": 1, "b": 2} and len(region) == 2


def test_a_full_region_names_the_key_and_changes_nothing(new_region: NewRegion, check: Check) -> None:
    region = new_region(max_capacity=1 << 20)
    mapping: OverflowMap[Any, Any] = OverflowMap(region)
    mapping["a"] = b"kept"
    with pytest.raises(CapacityExceededError) as caught:
        mapping["big"] = bytes(2 << 20)
    assert caught.value.key == "big"
    with pytest.raises(CapacityExceededError) as caught:
        mapping.update(a=b"new", array=np.zeros(1 << 20), b=2)
    assert caught.value.key == "array"
    with pytest.raises(CapacityExceededError):
        mapping["a"] = np.zeros(1 << 20)
    assert dict(mapping) == {"a": b"kept"} and len(region) == 1
    check(region)
    mapping["a"] = np.zeros(1 << 10)


def test_the_alignment_of_the_region_must_suit_arrays(new_region: NewRegion) -> None:
    with pytest.raises(ValueError, match="alignment 64"):
        OverflowMap(new_region(alignment=32))
    mapping: OverflowMap[str, Any] = OverflowMap(new_region("other", alignment=4096))
    mapping["a"] = [np.arange(1000), np.arange(50_000)]
    assert all(array.ctypes.data % 64 == 0 for array in mapping["a"])


def test_other_threads_are_refused(new_region: NewRegion) -> None:
    mapping: OverflowMap[str, Any] = OverflowMap(new_region())
    mapping["a"] = 1

    def assign() -> None:
        mapping["a"] = 2

    assert isinstance(in_thread(assign), WrongThreadError)
    assert isinstance(in_thread(lambda: mapping["a"]), WrongThreadError)
    assert mapping["a"] == 1


def test_the_engine_is_the_owner_of_the_values(new_region: NewRegion) -> None:
    region = new_region()
    OverflowMap(region)["a"] = 1
    OverflowMap(region, engine=EngineId.VECTOR).update(b=np.zeros(1000), c=2)
    assert region.stats().engines[EngineId.QUERY].live_slots == 1
    assert region.stats().engines[EngineId.VECTOR].live_slots == 2


# Against a dict

_values = (
    st.integers()
    | st.text()
    | st.binary(max_size=40_000)
    | st.lists(st.integers(), max_size=5)
    | st.integers(0, 40_000).map(lambda size: np.arange(size, dtype="u4"))
)


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.region = OverflowRegion.temporary(max_capacity=1 << 28)
        self.mapping: OverflowMap[int, Any] = OverflowMap(self.region)
        self.model: dict[int, Any] = {}
        self.held: list[tuple[Any, Any]] = []

    keys = st.integers(0, 8)

    @rule(key=keys, value=_values)
    def assign(self, key: int, value: Any) -> None:
        self.mapping[key] = self.model[key] = value

    @rule(pairs=st.lists(st.tuples(keys, _values), max_size=6))
    def update(self, pairs: list[tuple[int, Any]]) -> None:
        self.mapping.update(pairs)
        self.model.update(pairs)

    @rule(key=keys)
    def delete(self, key: int) -> None:
        assert (self.mapping.pop(key, None) is None) == (self.model.pop(key, None) is None)

    @rule(key=keys)
    def hold(self, key: int) -> None:
        if key in self.model:
            self.held.append((self.mapping[key], self.model[key]))

    @rule()
    def let_go(self) -> None:
        if self.held:
            self.held.pop(0)

    @rule()
    def maintain(self) -> None:
        self.region.compact()
        self.region.trim()

    @invariant()
    def is_equal(self) -> None:
        assert list(self.mapping) == list(self.model)
        for one, other in [*zip(self.mapping.values(), self.model.values(), strict=True), *self.held]:
            assert type(one) is type(other) and np.array_equal(one, other)
        assert len(self.region) == len(self.model)
        assert lib.ndm_region_check(self.region._handle) == 0

    def teardown(self) -> None:
        self.region.close()


TestAgainstADict = Machine.TestCase
TestAgainstADict.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)


def test_all_threads_may_use_one_map(new_region: NewRegion, check: Check) -> None:
    region = new_region(ownership="process", max_capacity=1 << 28)
    mapping: OverflowMap[int, Any] = OverflowMap(region)
    made = iter(range(1 << 30))

    def value_of(key: int) -> Any:
        number = next(made)
        kind = number % 4
        if kind == 0:
            return {"key": key, "number": number}
        size = (100, 3000, 30_000)[kind - 1]
        array = np.full(size, number)
        array[0] = key
        return array

    def is_whole(key: int, value: Any) -> bool:
        if isinstance(value, dict):
            return bool(value["key"] == key)
        return bool(value[0] == key and (value[1:] == value[1]).all())

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(600):
            key = rng.randrange(12)
            with suppress(KeyError):
                match rng.randrange(8):
                    case 0 | 1:
                        mapping[key] = value_of(key)
                    case 2:
                        del mapping[key]
                    case 3:
                        mapping.update({each: value_of(each) for each in range(key, key + 3)})
                    case 4:
                        keys = [key, (key + 1) % 12, key]
                        assert all(map(is_whole, keys, mapping.get_many(keys)))
                    case 5:
                        popped, value = mapping.popitem() if rng.random() < 0.1 else (key, mapping[key])
                        assert is_whole(popped, value)
                    case 6:
                        region.free(region.write(b"no object" * 100, 0))  # others use the region, too
                    case _:
                        assert is_whole(key, mapping[key])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert all(is_whole(key, value) for key, value in mapping.items())
    assert len(region) == len(mapping)
    mapping.clear()
    assert len(region) == 0
    check(region)


def test_coroutines_get_and_set(new_region: NewRegion) -> None:
    threads: list[int] = []

    class Watched(OverflowMap[str, Any]):
        def __getitem__(self, key: str) -> Any:
            threads.append(threading.get_ident())
            return super().__getitem__(key)

        def __setitem__(self, key: str, value: Any) -> None:
            threads.append(threading.get_ident())
            super().__setitem__(key, value)

    mapping = Watched(new_region(ownership="process"))

    async def use() -> Any:
        await asyncio.gather(*(mapping.aset(str(number), np.full(100_000, number)) for number in range(20)))
        return await asyncio.gather(*(mapping.aget(str(number)) for number in range(20)))

    values = asyncio.run(use())
    assert len(threads) == 40 and threading.get_ident() not in threads  # the loop's own did not wait
    assert all((value == number).all() for number, value in enumerate(values))


def test_a_child_may_not_free(new_region: NewRegion) -> None:
    mapping: OverflowMap[str, Any] = OverflowMap(new_region(ownership="process"))
    mapping["key"] = 1
    with mapping._lock:  # by another thread, say
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(10)
            status = 1
            try:
                for verb in (
                    mapping.clear,
                    mapping.popitem,
                    lambda: mapping.__delitem__("key"),
                    lambda: mapping["key"],
                ):
                    try:
                        verb()
                    except WrongThreadError:
                        continue
                    break
                else:
                    status = 0
            finally:
                os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert mapping == {"key": 1}
