"""The family of errors: who inherits from whom, what they carry, what they say, and that they travel."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kit import NewRegion
from nodedb_mem import (
    BudgetExhaustedError,
    CapacityExceededError,
    EngineId,
    GlobalCeilingExceededError,
    GovernorIOError,
    InvalidSlotError,
    MemError,
    OverflowRegion,
    RegionBusyError,
    RegionClosedError,
    RegionError,
    RegionIOError,
    RegionSizeError,
    RepeatedSlotError,
    StaleSlotError,
    UnknownEngineError,
    WrongThreadError,
)


@pytest.mark.parametrize(
    ("kind", "parents"),
    [
        (MemError, [Exception]),
        (RegionError, [MemError]),
        (InvalidSlotError, [RegionError, LookupError]),
        (CapacityExceededError, [RegionError]),
        (WrongThreadError, [RegionError]),
        (RegionClosedError, [RegionError]),
        (RegionBusyError, [RegionError]),
        (StaleSlotError, [RegionError]),
        (RepeatedSlotError, [RegionError, ValueError]),
        (RegionSizeError, [RegionError, ValueError]),
        (RegionIOError, [RegionError, OSError]),
        (BudgetExhaustedError, [MemError]),
        (GlobalCeilingExceededError, [MemError]),
        (UnknownEngineError, [MemError]),
        (GovernorIOError, [MemError, OSError]),
    ],
)
def test_the_family(kind: type[BaseException], parents: list[type[BaseException]]) -> None:
    for parent in parents:
        assert issubclass(kind, parent)
    if kind.__name__.startswith(("Budget", "Global", "UnknownEngine", "Governor")):
        assert not issubclass(kind, RegionError)
    assert kind.__doc__


# Errors as the library raises them


def unknown_slot(path: Path) -> None:
    with OverflowRegion.open(path, initial_capacity=4096) as region:
        region.read(42)


def freed_slot(path: Path) -> None:
    with OverflowRegion.open(path, initial_capacity=4096) as region:
        region.write(b"0", 0)
        region.free(region.write(b"1", 0))
        region.read(1)


def too_large(path: Path) -> None:
    with OverflowRegion.open_with_config(path, 600, 1000) as region:
        region.write(bytes(1001), 0)


def closed(path: Path) -> None:
    region = OverflowRegion.open(path, initial_capacity=4096)
    region.close()
    region.read(0)


def busy(path: Path) -> None:
    with OverflowRegion.open(path, initial_capacity=4096):
        OverflowRegion.open(path)


def system(path: Path) -> None:
    OverflowRegion.open(path / "missing" / "region")


def other_thread(path: Path) -> None:
    caught: list[BaseException] = []

    def intrude() -> None:
        try:
            region.stats()
        except WrongThreadError as error:
            caught.append(error)

    with OverflowRegion.open(path, initial_capacity=4096) as region:
        thread = threading.Thread(target=intrude)
        thread.start()
        thread.join()
    raise caught[0]


RAISED: dict[Callable[[Path], None], tuple[type[MemError], tuple[str, ...]]] = {
    unknown_slot: (InvalidSlotError, ("slot",)),
    freed_slot: (InvalidSlotError, ("slot",)),
    too_large: (CapacityExceededError, ("required", "max_capacity")),
    closed: (RegionClosedError, ()),
    busy: (RegionBusyError, ("path", "holders")),
    system: (RegionIOError, ("errno", "strerror", "filename")),
    other_thread: (WrongThreadError, ()),
}


def travel_by(protocol: int) -> Callable[[Any], Any]:
    return lambda error: pickle.loads(pickle.dumps(error, protocol))


@pytest.mark.parametrize("travel", [*map(travel_by, range(6)), copy.copy, copy.deepcopy])
@pytest.mark.parametrize(("cause", "expected"), RAISED.items(), ids=lambda value: getattr(value, "__name__", None))
def test_raised_errors_travel_whole(
    tmp_path: Path, cause: Callable[[Path], None], expected: tuple[type[MemError], tuple[str, ...]], travel: Any
) -> None:
    kind, attributes = expected
    with pytest.raises(kind) as caught:
        cause(tmp_path / "region")
    error = caught.value.with_traceback(None)
    twin = travel(error)
    assert type(twin) is type(error) is kind
    assert str(twin) == str(error) != ""
    assert repr(twin) == repr(error)
    assert twin.args == error.args
    assert [getattr(twin, name) for name in attributes] == [getattr(error, name) for name in attributes]


HOLDERS = ((EngineId.QUERY, 3000), (EngineId.VECTOR, 2000), (200, 1))
BUILT = [
    (BudgetExhaustedError, {"engine": EngineId.VECTOR, "requested": 1234, "available": 99, "limit": 5678}),
    (BudgetExhaustedError, {"engine": 7, "requested": 1234, "available": 99, "limit": 5678, "holders": HOLDERS}),
    (GlobalCeilingExceededError, {"allocated": 1234, "ceiling": 5678, "requested": 910}),
    (GlobalCeilingExceededError, {"allocated": 1234, "ceiling": 5678, "requested": 910, "holders": HOLDERS}),
    (UnknownEngineError, {"engine": 78}),
    (UnknownEngineError, {"engine": EngineId.WAL, "holders": HOLDERS}),
    (InvalidSlotError, {"slot": 17}),
    (RepeatedSlotError, {"slot": 17}),
    (CapacityExceededError, {"required": 1001, "max_capacity": 1000}),
    (RegionBusyError, {"path": "/somewhere/region", "holders": (123, 456)}),
    (RegionBusyError, {"path": "/somewhere/region", "holders": (), "readers": (123, 456)}),
]


@pytest.mark.parametrize("travel", [lambda error: error, *map(travel_by, range(6)), copy.copy])
@pytest.mark.parametrize(("kind", "attributes"), BUILT, ids=lambda value: getattr(value, "__name__", None))
def test_errors_carry_their_figures_and_say_them(kind: Any, attributes: dict[str, Any], travel: Any) -> None:
    error = travel(kind(**attributes))
    for name, value in attributes.items():
        assert getattr(error, name) == value
        for part in value if isinstance(value, tuple) else (value,):
            shown = f"{part[0]}: {part[1]}" if isinstance(part, tuple) else str(part)
            assert shown in str(error)


@pytest.mark.parametrize("kind", [StaleSlotError, WrongThreadError, RegionClosedError])
def test_plain_errors_travel(kind: type[MemError]) -> None:
    twin = pickle.loads(pickle.dumps(kind("why")))
    assert type(twin) is kind
    assert str(twin) == "why"


# Messages and attributes


def test_a_slot_that_never_existed_is_told_from_a_freed_one(new_region: NewRegion) -> None:
    region = new_region()
    region.write(b"0", 0)
    freed = region.write(b"1", 0)
    region.free(freed)
    for use in (region.read, region.read_bytes, region.free, lambda slot: region.read_into(slot, bytearray(9))):
        with pytest.raises(InvalidSlotError, match="freed") as caught:
            use(freed)
        assert caught.value.slot == freed
        assert str(freed) in str(caught.value)
        with pytest.raises(InvalidSlotError, match="never") as caught:
            use(7654)
        assert caught.value.slot == 7654
        assert "7654" in str(caught.value)
        assert "freed" not in str(caught.value)
    assert (region.slot_count, len(region)) == (2, 1)


@pytest.mark.parametrize("slot", [-1, 1, 2, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, 1 << 64, 1 << 70, -(1 << 70)])
def test_a_number_that_never_was_a_slot_is_an_invalid_slot(new_region: NewRegion, slot: int) -> None:
    region = new_region()
    region.write(b"0", 0)
    for use in (
        region.read,
        region.read_bytes,
        region.free,
        region.slot,
        lambda number: region.read_into(number, bytearray(9)),
    ):
        with pytest.raises(InvalidSlotError) as caught:
            use(slot)
        assert caught.value.slot == slot
        assert str(slot) in str(caught.value)
    assert region.read(0) == b"0"


@pytest.mark.parametrize("slot", ["0", 0.0, None, b"0", [0], 1j])
def test_what_is_no_number_is_a_type_error(new_region: NewRegion, slot: Any) -> None:
    region = new_region()
    region.write(b"0", 0)
    for use in (
        region.read,
        region.read_bytes,
        region.free,
        region.slot,
        lambda number: region.read_into(number, bytearray(9)),
    ):
        with pytest.raises(TypeError):
            use(slot)
    assert region.read(0) == b"0"


def test_a_numpy_float_is_no_slot(new_region: NewRegion) -> None:
    # It converts to an int, and would silently name a slot.
    np = pytest.importorskip("numpy")
    region = new_region()
    region.write(b"0", 0)
    for number in (np.float32(0.7), np.float64(0.7)):
        for use in (region.read, region.read_bytes, region.free, region.slot):
            with pytest.raises(TypeError):
                use(number)
        assert number not in region
    assert region.read(0) == b"0"


def test_a_system_error_is_an_oserror_with_all_its_parts(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "region"
    with pytest.raises(OSError, match="No such file") as caught:
        OverflowRegion.open(path)
    error = caught.value
    assert type(error) is RegionIOError
    assert (error.errno, error.filename) == (errno.ENOENT, str(path))
    assert os.strerror(errno.ENOENT) in str(error)
    assert str(path) in str(error)


def test_a_slot_freed_twice_in_a_batch_is_named(new_region: NewRegion) -> None:
    region = new_region()
    slots = [region.write(b"x", 0) for _ in range(5)]
    with pytest.raises(RepeatedSlotError, match="slot 3 is listed twice") as caught:
        region.free_many([slots[2], slots[3], slots[4], slots[3], slots[2]])
    assert caught.value.slot == slots[3]
    assert len(region) == 5


def test_an_invalid_slot_is_a_lookup_error(new_region: NewRegion) -> None:
    with pytest.raises(LookupError):
        new_region().read(0)


def test_the_last_error_belongs_to_its_thread(new_region: NewRegion) -> None:
    # Two threads fail at once, in different ways, over and over.
    wrong: list[object] = []

    def fail(name: str, size: int) -> None:
        with OverflowRegion.open(name, initial_capacity=64, max_capacity=128) as mine:
            for number in range(300):
                try:
                    mine.write(bytes(size + number), 0)
                except CapacityExceededError as error:
                    if (error.required, error.max_capacity) != (size + number, 128):
                        wrong.append(error)
                try:
                    mine.read(number)
                except InvalidSlotError as error:
                    if error.slot != number:
                        wrong.append(error)

    directory = Path(str(new_region().path)).parent
    threads = [
        threading.Thread(target=fail, args=(str(directory / f"mine{size}"), size)) for size in (1000, 2000, 3000)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
