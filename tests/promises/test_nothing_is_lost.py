"""What might be lost on the way out and back: odd holders, odd objects, odd callers. A dict keeps it all."""

from __future__ import annotations

import functools
import mmap
import operator
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest

from kit import NewRegion
from nodedb_mem import OverflowMap, SpillMapping

Mapping = SpillMapping[str, Any]


@pytest.fixture
def mapping(tmp_path: Path) -> Iterator[Mapping]:
    with SpillMapping[str, Any](1 << 30, tmp_path) as made:
        yield made


def try_all(mapping: Mapping) -> None:
    """Put out whatever goes."""
    for _ in range(3):
        mapping.evict()


# Ways to assign: the caller keeps the value


def by_call(mapping: Mapping, value: Any) -> None:
    mapping.__setitem__("a", value)


def by_names(mapping: Mapping, value: Any) -> None:
    mapping.__setitem__(key="a", value=value)


def by_tuple(mapping: Mapping, value: Any) -> None:
    both = ("a", value)
    mapping.__setitem__(*both)


def by_partial(mapping: Mapping, value: Any) -> None:
    functools.partial(mapping.__setitem__, "a", value)()


def by_operator(mapping: Mapping, value: Any) -> None:
    operator.setitem(mapping, "a", value)


def by_map(mapping: Mapping, value: Any) -> None:
    list(map(mapping.__setitem__, "a", [value]))


def by_thread(mapping: Mapping, value: Any) -> None:
    thread = threading.Thread(target=mapping.__setitem__, args=("a", value))
    thread.start()
    thread.join()


def by_statement(mapping: Mapping, value: Any) -> None:
    mapping["a"] = value


def by_update(mapping: Mapping, value: Any) -> None:
    mapping.update({"a": value})


def by_setdefault(mapping: Mapping, value: Any) -> None:
    mapping.setdefault("a", value)


WAYS = [
    *(by_call, by_names, by_tuple, by_partial, by_operator, by_map, by_thread, by_statement, by_update, by_setdefault)
]


@pytest.mark.parametrize("assign", WAYS)
@pytest.mark.parametrize("make", [lambda: [0], lambda: np.zeros(50_000), lambda: {0: 0}])
def test_whoever_assigns_may_go_on_with_the_value(
    tmp_path: Path, assign: Callable[..., None], make: Callable[[], Any]
) -> None:
    with SpillMapping[str, Any](0, tmp_path) as mapping:
        value = make()
        assign(mapping, value)
        value[0] = 1
        assert mapping["a"][0] == 1


def test_a_subclass_that_assigns_may_go_on_with_the_value(tmp_path: Path) -> None:
    class Appending(SpillMapping[str, Any]):
        def __setitem__(self, key: str, value: Any) -> None:
            super().__setitem__(key, value)
            value.append(1)

    with Appending(0, tmp_path) as mapping:
        mapping["a"] = [0]
        assert mapping["a"] == [0, 1]


# Objects that are more than their bytes


class Number(int):
    tag = 0


class Plain:
    def __init__(self, inside: Any = None) -> None:
        self.inside = inside


class Copying(Plain):
    def __getstate__(self) -> dict[str, Any]:
        return {"inside": list(self.inside)}


class Finalized(Plain):
    ended = 0

    def __del__(self) -> None:
        Finalized.ended += 1


class Unmakeable:
    """It can be pickled, and not made again."""

    def __init__(self, one: object, two: object) -> None:
        self.one = one

    def __reduce__(self) -> tuple[Any, ...]:
        return Unmakeable, (self.one,)


def counter() -> Callable[[], int]:
    count = 0

    def step() -> int:
        nonlocal count
        count += 1
        return count

    return step


@pytest.mark.parametrize("make", [counter, lambda: [counter()], lambda: Plain(counter())])
def test_a_function_goes_on_counting(mapping: Mapping, make: Callable[[], Any]) -> None:
    mapping["a"] = make()
    for number in range(1, 4):
        value = mapping["a"]
        function = value.inside if isinstance(value, Plain) else value[0] if isinstance(value, list) else value
        assert function() == number
        del value, function
        try_all(mapping)


def test_attributes_of_numbers_are_kept(mapping: Mapping) -> None:
    mapping["a"] = Number(5)
    for number in range(3):
        mapping["a"].tag = number
        try_all(mapping)
        assert mapping["a"].tag == number and mapping["a"] == 5


def test_a_record_of_an_array_can_be_stored_to(mapping: Mapping) -> None:
    mapping["a"] = np.zeros(1, [("n", "i4"), ("x", "f8", (50,))])[0]
    mapping["b"] = [np.zeros(1, [("n", "i4")])[0]]
    for number in range(3):
        mapping["a"]["n"] = mapping["b"][0]["n"] = number
        try_all(mapping)
        assert mapping["a"]["n"] == mapping["b"][0]["n"] == number


def test_buffers_of_arrow_on_memory_of_others(mapping: Mapping) -> None:
    memory = bytearray(100_000)
    mapping["a"] = pyarrow.py_buffer(memory)
    mapping["b"] = pyarrow.py_buffer(bytes(100_000))
    for number in range(3):
        try_all(mapping)
        memory[0] = number
        assert mapping["a"][0] == number
    assert mapping.stats().keys_out == 1


@pytest.mark.parametrize("make", [lambda memory: np.frombuffer(memory, "u1"), lambda memory: [np.asarray(memory)]])
def test_memory_of_a_file_stays_memory_of_the_file(
    mapping: Mapping, tmp_path: Path, make: Callable[[Any], Any]
) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(100_000))
    with open(file, "r+b") as opened:
        memory = mmap.mmap(opened.fileno(), 0)
    mapping["a"] = make(memory)
    del memory
    mapping["b"] = np.memmap(file, "u1", "r+")
    try_all(mapping)
    first = mapping["a"] if isinstance(mapping["a"], np.ndarray) else mapping["a"][0]
    first[0], mapping["b"][1] = 5, 6
    assert file.read_bytes()[:2] == b"\5\6"


def test_no_finalizer_runs_before_its_time(mapping: Mapping) -> None:
    Finalized.ended = 0
    mapping["a"], mapping["b"] = Finalized([1]), [Finalized([2])]
    try_all(mapping)
    assert Finalized.ended == 0 and mapping["b"][0].inside == [2]
    mapping.clear()
    assert Finalized.ended == 2


class Growing:
    def __init__(self) -> None:
        self.room = np.zeros(1 << 16)
        self.used = self.room[:10]


COMMON = {
    "attributes": Growing,
    "a view beside its array": lambda: (lambda a: {"all": a, "tail": a[5:]})(np.zeros(10_000)),
    "views that overlap": lambda: (lambda a: [a[:50], a[40:]])(np.zeros(10_000)),
    "a transposed one": lambda: (lambda a: (a, a.T))(np.zeros((100, 100))),
    "a small part": lambda: (lambda a: [a, a[::2]])(np.zeros(20)),
    "a bytearray": lambda: (lambda b: [b, np.frombuffer(b, "u1")])(bytearray(100_000)),
    "rows that overlap": lambda: np.lib.stride_tricks.as_strided(np.zeros(10_000), (3, 10_000), (0, 8)),
    "windows": lambda: np.lib.stride_tricks.sliding_window_view(np.zeros(10_000), 5, writeable=True),
    "a buffer's rows": lambda: np.ndarray((3, 10_000), buffer=np.zeros(10_000), strides=(0, 8)),
}


@pytest.mark.parametrize("make", COMMON.values(), ids=COMMON)
def test_memory_that_parts_of_a_value_have_in_common_stays(mapping: Mapping, make: Callable[[], Any]) -> None:
    mapping["a"] = make()
    assert mapping.evict() == 0 and mapping.stats().keys_out == 0
    value = mapping["a"]
    parts = list(vars(value).values() if isinstance(value, Growing) else getattr(value, "values", lambda: value)())
    assert np.shares_memory(*(np.frombuffer(each, "u1") if isinstance(each, bytearray) else each for each in parts[:2]))


def test_parts_of_an_array_that_are_apart_go_out(mapping: Mapping) -> None:
    array = np.arange(10_000)
    mapping["a"] = [array[:5_000], array[5_000:]]
    del array
    assert mapping.evict() > 0 and mapping.stats().keys_out == 1
    assert mapping["a"][1][0] == 5_000
    mapping["b"] = np.broadcast_to(np.arange(1_000), (10, 1_000))  # nobody can store to it
    assert mapping.evict(["b"]) > 0 and mapping["b"][3][5] == 5


def test_a_memoryview_inside_is_not_made_bytes(mapping: Mapping) -> None:
    with pytest.raises(TypeError, match=r"'a'.*memoryview"):
        mapping["a"] = [memoryview(bytearray(100_000))]
    assert len(mapping) == 0


def test_what_cannot_be_made_again_does_not_go_out(mapping: Mapping, new_region: NewRegion) -> None:
    mapping["a"] = Unmakeable(1, 2)
    with pytest.raises(TypeError, match=r"'a'.*missing"):
        mapping.evict()
    assert isinstance(mapping["a"], Unmakeable) and mapping.stats().keys_out == 0
    objects = OverflowMap[str, Any](new_region())
    with pytest.raises(TypeError, match="'a'"):
        objects["a"] = {"inside": Unmakeable(1, 2)}
    assert len(objects) == len(objects.region) == 0


def test_a_class_that_stores_to_its_buffers_when_it_is_made_again(mapping: Mapping) -> None:
    mapping["a"] = Negating(np.ones(50_000))
    try_all(mapping)
    assert mapping.stats().keys_out == 1 and mapping["a"].array[0] == -1


class Negating:
    def __init__(self, array: Any) -> None:
        self.array = array

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.array = state["array"]
        self.array *= -1


# Holders of what is inside


def test_holders_of_attributes_see_changes_and_are_seen(mapping: Mapping) -> None:
    mapping["a"], mapping["b"] = Plain([1]), Copying([1])
    attributes, inside = vars(mapping["a"]), mapping["b"].inside
    try_all(mapping)
    attributes["inside"] = 7
    inside.append(2)
    assert mapping["a"].inside == 7 and mapping["b"].inside == [1, 2]
    del attributes, inside
    try_all(mapping)
    assert mapping.stats().keys_out == 2


def test_what_many_share_is_one_with_local_classes_too(mapping: Mapping) -> None:
    class Local:
        pass

    shared = {"depth": 1}
    for key in "abc":
        mapping[key] = {"shared": shared, "local": Local()}
    try_all(mapping)
    assert mapping.stats().keys_out == 3
    shared["depth"] = 2
    assert all(mapping[key]["shared"] is shared for key in "abc")


@pytest.mark.parametrize("size", [500, 50_000])
def test_views_of_the_memory_itself_are_seen(mapping: Mapping, size: int) -> None:
    mapping["a"] = {"rows": np.zeros(size)}
    mapping.evict()
    base = mapping["a"]["rows"]
    while isinstance(base, np.ndarray):
        base = base.base
    memory = memoryview(base).cast("B")
    del base
    for number in range(3):
        try_all(mapping)
        memory[-8:] = np.float64(number).tobytes()
        assert mapping["a"]["rows"][-1] == number
    del memory
    try_all(mapping)
    assert mapping.stats().keys_out == 1 and mapping["a"]["rows"][-1] == 2


def test_a_weak_reference_that_becomes_a_strong_one_meanwhile(mapping: Mapping) -> None:
    mapping["a"] = np.zeros(4 << 20)
    known, seen, ends = weakref.ref(mapping["a"]), threading.Event(), threading.Event()
    last = 0

    def take() -> None:
        nonlocal last
        while not ends.is_set() and (value := known()) is not None:
            value[0] = last = last + 1
            seen.set()
            del value

    thread = threading.Thread(target=take)
    thread.start()
    seen.wait(60)
    for _ in range(20):
        mapping.evict()
    ends.set()
    thread.join()
    assert mapping["a"][0] == last


# Interruptions


class SignalError(KeyboardInterrupt):
    pass


def test_exceptions_of_signals_lose_nothing(tmp_path: Path) -> None:
    def interrupt(*arguments: object) -> None:
        raise SignalError

    model: dict[int, Any] = {}
    random = np.random.default_rng(4)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with SpillMapping[int, Any](100_000, tmp_path) as mapping:
            for number in range(20):
                mapping[number] = [np.full(3000, number)]
                model[number] = number
            interruptions = 0
            for _ in range(300):
                key = int(random.integers(20))
                try:
                    try:
                        signal.setitimer(signal.ITIMER_REAL, float(random.uniform(1e-5, 4e-4)))
                        for _ in range(20):
                            if mapping[key][0][-1] != model[key]:
                                raise AssertionError(key)
                            mapping.evict(int(random.integers(50_000)))
                    finally:
                        signal.setitimer(signal.ITIMER_REAL, 0)
                except SignalError:
                    interruptions += 1
            assert interruptions > 50
            assert all(mapping[key][0][-1] == value for key, value in model.items())
            mapping.evict()
            with mapping._lock, mapping._session as tiers:
                assert tiers.bytes == sum(entry.weight for entry in tiers.hot)
    finally:
        signal.signal(signal.SIGALRM, before)
