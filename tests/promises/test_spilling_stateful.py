"""A SpillMapping is a dict: whatever is changed in place, held, sliced, shared between keys and put out in between."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nodedb_mem import SpillMapping
from nodedb_mem._core import lib

KEYS = st.integers(0, 6)

# What a value is made of; `build` makes it, twice the same.
_leaves = (
    st.tuples(st.just("array"), st.sampled_from([3, 900, 20_000, 200_000, 700_000]))
    | st.tuples(st.just("bytearray"), st.integers(1, 3000))
    | st.tuples(st.just("text"), st.text(max_size=20))
    | st.tuples(st.just("number"), st.integers())
)
SPECS = st.recursive(
    _leaves,
    lambda inner: (
        st.tuples(st.just("list"), st.lists(inner, min_size=1, max_size=3))
        | st.tuples(st.just("dict"), st.dictionaries(st.sampled_from("abc"), inner, min_size=1))
        | st.tuples(st.just("tuple"), st.lists(inner, min_size=1, max_size=2))
        | st.tuples(st.just("object"), inner)
        | st.tuples(st.just("objects"), st.lists(inner, min_size=1, max_size=2))
    ),
    max_leaves=5,
)


class Thing:
    def __init__(self, inside: Any) -> None:
        self.inside = inside


def build(spec: tuple[str, Any]) -> Any:
    kind, what = spec
    match kind:
        case "array":
            return np.arange(what, dtype="u4").astype("u1")
        case "bytearray":
            return bytearray(what)
        case "list":
            return [build(each) for each in what]
        case "tuple":
            return tuple(build(each) for each in what)
        case "dict":
            return {key: build(each) for key, each in what.items()}
        case "object":
            return Thing(build(what))
        case "objects":
            made = np.empty(len(what), dtype=object)
            for number, each in enumerate(what):
                made[number] = build(each)
            return made
    return what


def is_equal(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, Thing):
        return is_equal(one.inside, other.inside)
    if isinstance(one, np.ndarray) and one.dtype != object:
        return np.array_equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple | np.ndarray):
        return len(one) == len(other) and all(map(is_equal, one, other))
    return bool(one == other)


def inside(value: Any, path: list[int]) -> Any:
    """Something inside the value, or a slice of it."""
    for step in path:
        if isinstance(value, Thing):
            value = value.inside
        elif isinstance(value, dict) and value:
            value = value[sorted(value)[step % len(value)]]
        elif (isinstance(value, list | tuple) and value) or (isinstance(value, np.ndarray) and value.dtype == object):
            value = value[step % len(value)]
        elif isinstance(value, np.ndarray) and len(value) > 1:
            value = value[step % len(value) :]
        elif isinstance(value, bytearray):
            return memoryview(value)
    return value


def change(value: Any, number: int) -> None:
    """Change something in place."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        if len(value):
            value[number % len(value)] = number % 251
    elif isinstance(value, memoryview):
        value[number % len(value)] = number % 251
    elif isinstance(value, bytearray):
        value.append(number % 251)
    elif isinstance(value, list):
        value.append(number)
    elif isinstance(value, dict):
        value[str(number)] = number
    elif isinstance(value, Thing):
        value.inside = [number]


PATHS = st.lists(st.integers(0, 50), max_size=4)


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.mapping: SpillMapping[int, Any] = SpillMapping(300_000)
        self.model: dict[int, Any] = {}
        self.held: list[tuple[Any, Any]] = []

    @rule(key=KEYS, spec=SPECS)
    def assign(self, key: int, spec: Any) -> None:
        self.mapping[key] = build(spec)
        self.model[key] = build(spec)

    @rule(key=KEYS, spec=SPECS)
    def assign_what_is_held(self, key: int, spec: Any) -> None:
        mine, other = build(spec), build(spec)
        self.mapping[key], self.model[key] = mine, other
        self.held.append((mine, other))

    @precondition(lambda self: self.model)
    @rule(one=KEYS, other=KEYS, path=PATHS)
    def assign_from_another(self, one: int, other: int, path: list[int]) -> None:
        if other in self.model:
            found = inside(self.mapping[other], path)
            if not isinstance(found, memoryview):
                self.mapping[one], self.model[one] = found, inside(self.model[other], path)

    @precondition(lambda self: self.model)
    @rule(key=KEYS, path=PATHS, number=st.integers(0, 1 << 20))
    def change_in_place(self, key: int, path: list[int], number: int) -> None:
        if key in self.model:
            change(inside(self.mapping[key], path), number)
            change(inside(self.model[key], path), number)

    @precondition(lambda self: self.model)
    @rule(key=KEYS, path=PATHS)
    def hold(self, key: int, path: list[int]) -> None:
        if key in self.model:
            self.held.append((inside(self.mapping[key], path), inside(self.model[key], path)))

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 100), number=st.integers(0, 1 << 20))
    def change_what_is_held(self, which: int, number: int) -> None:
        for each in self.held[which % len(self.held)]:
            change(each, number)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 100))
    def let_go(self, which: int) -> None:
        del self.held[which % len(self.held)]

    @rule(key=KEYS)
    def delete(self, key: int) -> None:
        if key in self.model:
            del self.mapping[key], self.model[key]

    @rule(size=st.none() | st.integers(0, 1 << 20))
    def put_out(self, size: int | None) -> None:
        self.mapping.evict(size)

    @rule(key=KEYS)
    def put_one_out(self, key: int) -> None:
        if key in self.model:
            self.mapping.evict([key])

    @rule(size=st.sampled_from([0, 50_000, 300_000, 2_000_000]))
    def budget(self, size: int) -> None:
        self.mapping.set_budget(size)

    @rule()
    def maintain(self) -> None:
        with self.mapping._lock, self.mapping._session as tiers:
            tiers.region.compact()
            tiers.region.trim()

    @rule(key=KEYS)
    def look(self, key: int) -> None:
        if key in self.model:
            assert is_equal(self.mapping[key], self.model[key])

    @rule()
    def look_at_all(self) -> None:
        for key in self.model:
            assert is_equal(self.mapping[key], self.model[key])

    @invariant()
    def is_sound(self) -> None:
        assert list(self.mapping) == list(self.model)
        assert all(is_equal(one, other) for one, other in self.held)
        tiers = self.mapping._tiers
        assert tiers.bytes == sum(entry.weight for entry in tiers.hot)
        entries = set(self.mapping._entries.values())
        assert set(tiers.hot) == {entry for entry in entries if id(entry.value) in tiers.by_value}
        assert tiers.bytes_out == sum(entry.stored.size for entry in entries if entry not in tiers.hot)
        assert tiers.mappings == sum(entry.view is not None for entry in entries)
        with self.mapping._lock, self.mapping._session:
            assert len(tiers.region) == sum(entry.stored is not None for entry in entries)
            assert lib.ndm_region_check(tiers.region._handle) == 0

    def teardown(self) -> None:
        for key in self.model:
            assert is_equal(self.mapping[key], self.model[key])
        self.held.clear()
        self.mapping.close()


TestSpillMapping = Machine.TestCase
TestSpillMapping.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
