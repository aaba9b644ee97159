"""Dask's buffer on a region, in this process: what it stores, counts, keeps, and what it does when it cannot."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

dask = pytest.importorskip("dask")
pytest.importorskip("distributed")

import distributed  # noqa: E402
from distributed import Client, Scheduler, Worker, wait  # noqa: E402
from distributed.protocol import serialize_bytelist  # noqa: E402
from distributed.protocol.serialize import Serialized  # noqa: E402
from distributed.spill import SpillBuffer  # noqa: E402
from distributed.utils import RateLimiterFilter, nbytes  # noqa: E402

import nodedb_mem.dask  # noqa: E402
from kit import Mount, blob, in_thread  # noqa: E402
from nodedb_mem import OverflowRegion, RegionIOError  # noqa: E402
from nodedb_mem._dask_buffer import Peer, RegionBuffer, for_peer, take_over  # noqa: E402

NewBuffer = Callable[..., Any]

distributed.utils._offload_executor.submit(int).result()  # a thread for the whole process: no test is blamed for it

FRAME = pd.DataFrame({"n": np.arange(5000), "x": np.linspace(0, 1, 5000), "s": [f"text {i}" for i in range(5000)]})
VALUES: dict[str, object] = {
    "array": np.arange(10_000.0),
    "short": np.arange(3),
    "empty": np.zeros((0, 3)),
    "scalar": np.array(5.5),
    "fortran": np.asfortranarray(np.arange(60_000.0).reshape(200, 300)),
    "strided": np.arange(60_000.0)[::3],
    "broadcast": np.broadcast_to(np.arange(500.0), (100, 500)),
    "records": np.zeros(3000, dtype=[("a", "i4"), ("b", "f8")]),
    "dates": np.arange(5000).astype("M8[s]"),
    "objects": np.array([1, "two", None], dtype=object),
    "masked": np.ma.masked_array(np.arange(5000), mask=np.arange(5000) % 2 == 0),
    "frame": FRAME,
    "series": FRAME["s"],
    "index": pd.Index(np.arange(5000)),
    "bytes": blob(50_000),
    "text": "text" * 20_000,
    "list": [np.arange(3000.0), np.arange(7), b"bytes", {"k": np.zeros(4000)}],
    "dict": {"a": np.arange(20_000), "b": "text", (1, 2): None},
    "tuple": (1, 2.5, None),
    "set": {1, 2, 3},
}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return (
            type(one) is type(other)
            and one.dtype == other.dtype
            and one.shape == other.shape
            and one.tolist() == other.tolist()
        )
    if isinstance(one, pd.DataFrame | pd.Series | pd.Index):
        return bool(one.equals(other))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


@pytest.fixture
def new_buffer(tmp_path: Path) -> Iterator[NewBuffer]:
    """Make buffers of Dask's that spill to regions; with `stock`, one that does not."""
    made = []

    def make(target: int, max_spill: int | bool = False, *, stock: bool = False, **options: Any) -> Any:
        RateLimiterFilter.reset_timer("distributed.spill")
        buffer: Any = SpillBuffer(str(tmp_path / f"storage{len(made)}"), target=target, max_spill=max_spill)
        if not stock:
            settings = {"initial_capacity": 1 << 20, "max_capacity": 1 << 30, "cache_limit": None} | options
            take_over(buffer, OverflowRegion.temporary(tmp_path, ownership="process", **settings))
            assert type(buffer) is RegionBuffer
        made.append(buffer)
        return buffer

    yield make
    for buffer in made:
        buffer.close()
    made.clear()
    gc.collect()


def metric(buffer: Any, label: str, unit: str = "count") -> float:
    return float(buffer.cumulative_metrics.get((label, unit), 0))


# -- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VALUES)
def test_a_value_comes_back_as_it_was(new_buffer: NewBuffer, name: str) -> None:
    buffer = new_buffer(1 << 30)
    buffer["key"] = VALUES[name]
    assert buffer.evict() >= 0 and set(buffer.disk) == {"key"} and not buffer.memory
    gc.collect()
    buffer.slow.cache.clear()  # else Dask finds the value that this module holds
    found = buffer["key"]
    assert found is not VALUES[name] and same(VALUES[name], found)
    assert set(buffer.memory) == {"key"} and not buffer.disk


@pytest.mark.parametrize("alignment", [64, 4096])
@pytest.mark.parametrize("size", [100, 5000, 1_000_000])
def test_arrays_are_writable_and_aligned(new_buffer: NewBuffer, size: int, alignment: int) -> None:
    buffer = new_buffer(1 << 30, alignment=alignment)
    buffer["key"] = [np.arange(size), np.arange(size + 3.0)]
    buffer.evict()
    for array in buffer["key"]:
        assert array.flags.writeable and array.ctypes.data % 64 == 0
        array[0] = 7
    assert same(buffer["key"][0][:3], np.array([7, 1, 2]))


def test_an_array_that_was_read_only_stays_so(new_buffer: NewBuffer) -> None:
    buffer = new_buffer(1 << 30)
    array = np.arange(10_000)
    array.flags.writeable = False
    buffer["key"] = array
    del array
    buffer.evict()
    assert not buffer["key"].flags.writeable


def test_large_arrays_come_back_without_a_copy(new_buffer: NewBuffer, tmp_path: Path) -> None:
    buffer = new_buffer(1 << 30)
    buffer["key"] = np.zeros(4_000_000)
    buffer.evict()
    found = buffer["key"]
    with open("/proc/self/maps") as maps:
        areas = [line.split(maxsplit=5) for line in maps]
    address = found.ctypes.data
    (name,) = [
        area[5]
        for area in areas
        if len(area) == 6 and address in range(*(int(each, 16) for each in area[0].split("-")))
    ]
    assert name.startswith(str(tmp_path))  # the region's own file


def test_a_compressed_value_is_compressed_in_the_region(new_buffer: NewBuffer) -> None:
    with dask.config.set({"distributed.worker.memory.spill-compression": "zlib"}):
        buffer = new_buffer(1 << 30)
    buffer["key"] = np.zeros(1_000_000)
    buffer.evict()
    assert buffer.store.stats().live_bytes < 100_000
    assert not buffer["key"].any() and buffer["key"].flags.writeable


# -- the same as stock ---------------------------------------------------------------------------------------------


def test_accounting_and_metrics_are_those_of_stock(new_buffer: NewBuffer) -> None:
    ours, stock = new_buffer(100_000), new_buffer(100_000, stock=True)
    chance = random.Random(5)
    kinds = [
        lambda: blob(chance.randrange(30_000), 3),
        lambda: np.full(chance.randrange(9000), 7.0),
        lambda: "x" * chance.randrange(120_000),
    ]
    for step in range(400):
        action, key = chance.random(), f"key {chance.randrange(30)}"
        if action < 0.5 and key not in stock:
            state = chance.getstate()
            for buffer in (ours, stock):
                chance.setstate(state)
                buffer[key] = chance.choice(kinds)()
        elif action < 0.75 and key in stock:
            assert same(ours[key], stock[key])
        elif action < 0.9 and key in stock:
            del ours[key], stock[key]
        elif stock.fast:
            assert ours.evict() == stock.evict()
        assert list(ours.fast.order) == list(stock.fast.order), step
        assert set(ours.disk) == set(stock.disk) and set(ours) == set(stock) and len(ours) == len(stock)
        assert ours.spilled_total == stock.spilled_total and ours.fast.weights == stock.fast.weights
        assert ours._slow_uncached.weight_by_key == stock._slow_uncached.weight_by_key
    for unit in ("count", "bytes"):
        assert metric(ours, "disk-read", unit) == metric(stock, "disk-read", unit) > 0
        assert metric(ours, "memory-read", unit) == metric(stock, "memory-read", unit) > 0
        assert 0 < metric(ours, "disk-write", unit) < metric(stock, "disk-write", unit)  # what is there stays
    assert set(ours.cumulative_metrics) == set(stock.cumulative_metrics)


def test_a_value_in_use_comes_back_as_the_same_object(new_buffer: NewBuffer) -> None:
    buffer = new_buffer(1 << 30)
    value = np.arange(10_000)
    buffer["key"] = value
    buffer.evict()
    value[3] = 77  # by the task that has it
    assert buffer["key"] is value and metric(buffer, "disk-read") == 0
    buffer.evict()
    del value
    gc.collect()
    assert buffer["key"][3] == 77


def test_a_value_heavier_than_the_target_stays_out(new_buffer: NewBuffer) -> None:
    buffer = new_buffer(1000)
    buffer["key"] = np.arange(10_000)
    assert set(buffer.disk) == {"key"}
    assert buffer["key"][9999] == 9999 and set(buffer.disk) == {"key"} and not buffer.store.kept


# -- never written twice -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["array", "short", "fortran", "records", "frame", "bytes", "list", "dict", "masked"])
def test_what_comes_back_and_goes_out_unchanged_is_not_written(new_buffer: NewBuffer, name: str) -> None:
    buffer = new_buffer(1 << 30)
    buffer["key"] = VALUES[name]
    buffer.evict()
    buffer.slow.cache.clear()
    size = buffer.spilled_total
    for _ in range(3):
        assert same(VALUES[name], buffer["key"])
        assert buffer.spilled_total == (0, 0)
        assert buffer.evict() > 0
        assert buffer.spilled_total.disk == size.disk and set(buffer.disk) == {"key"}
        buffer.slow.cache.clear()
    assert metric(buffer, "disk-write") == 1 and metric(buffer, "disk-read") == 3
    assert buffer.store.stats().live_slots == 1


@pytest.mark.parametrize("size", [10, 4000, 1_000_000])
@pytest.mark.parametrize("place", [0, -1])
def test_what_was_changed_is_written(new_buffer: NewBuffer, size: int, place: int) -> None:
    buffer = new_buffer(1 << 30)
    buffer["key"] = np.arange(size)
    buffer.evict()
    for change in (70, 80):
        buffer["key"][place] = change
        buffer.evict()
        assert buffer["key"][place] == change
    assert metric(buffer, "disk-write") == 3 and buffer.store.stats().live_slots == 1


def test_a_key_that_is_assigned_or_removed_gives_up_its_slot(new_buffer: NewBuffer) -> None:
    buffer = new_buffer(1 << 30)
    for remove in (True, False):
        buffer["key"] = np.zeros(100_000)
        buffer.evict()
        assert not buffer["key"].any() and len(buffer.store.kept) == 1
        if remove:
            del buffer["key"]
        else:
            buffer["key"] = np.ones(5)
        assert not buffer.store.kept and buffer.store.stats().live_slots == 0


def test_nothing_stays_mapped(new_buffer: NewBuffer, tmp_path: Path) -> None:
    def resident() -> int:
        total, ours = 0, False
        with open("/proc/self/smaps") as maps:
            for line in maps:
                fields = line.split(maxsplit=5)
                if "-" in fields[0]:
                    ours = len(fields) == 6 and fields[5].startswith(str(tmp_path)) and ".slots" not in fields[5]
                elif ours and fields[0] == "Rss:":
                    total += int(fields[1])
        return total

    buffer = new_buffer(1 << 30)
    for number in range(8):
        buffer[number] = np.full(250_000, number)
        buffer.evict()
    assert resident() < 500
    for number in range(8):
        assert buffer[number].sum() == number * 250_000
    assert resident() > 15_000
    while buffer.fast:
        assert buffer.evict() > 0
    assert resident() < 500 and metric(buffer, "disk-write") == 8
    for number in range(8):
        buffer[number][5] = 1
        del buffer[number]
    assert resident() < 500 and buffer.store.stats().live_bytes == 0


# -- no room -------------------------------------------------------------------------------------------------------


def test_max_spill_keeps_its_meaning(new_buffer: NewBuffer, caplog: pytest.LogCaptureFixture) -> None:
    buffer = new_buffer(1 << 30, 1_000_000)
    for number in range(4):
        buffer[number] = np.full(50_000, number)
    assert buffer.evict() > 0 and buffer.evict() > 0
    for _ in range(3):
        assert buffer.evict() == -1
    assert set(buffer.memory) == {2, 3} and buffer.store.stats().live_slots == 2
    assert [each.message for each in caplog.records] == ["Spill file on disk reached capacity; keeping data in memory"]
    assert buffer[0][5] == 0
    assert buffer.evict() > 0  # 2 takes the place


def test_a_region_at_its_ceiling_refuses_as_max_spill_does(
    new_buffer: NewBuffer, caplog: pytest.LogCaptureFixture
) -> None:
    buffer = new_buffer(1 << 30, max_capacity=1 << 20)
    for number in range(4):
        buffer[number] = np.full(50_000, number)
    assert buffer.evict() > 0 and buffer.evict() > 0
    assert buffer.evict() == -1 == buffer.evict()
    assert set(buffer.memory) == {2, 3} and [each.levelname for each in caplog.records] == ["WARNING"]
    del buffer[0]
    assert buffer.evict() > 0 and set(buffer.disk) == {1, 2}
    for number in range(1, 4):
        assert buffer[number][49_999] == number


def test_with_max_spill_the_file_holds_no_more_than_what_is_out(new_buffer: NewBuffer) -> None:
    buffer = new_buffer(1 << 30, 850_000, max_capacity=1 << 20)
    for number in range(4):
        buffer[number] = np.full(50_000, number)
    for _ in range(3):
        assert buffer.evict() > 0 and buffer.evict() > 0 and buffer.evict() == -1
        back = sorted(buffer.disk)
        assert [buffer[number][5] for number in back] == back and len(buffer.store.kept) == 2
    assert buffer.store.stats().capacity <= 1 << 20


def test_a_value_that_cannot_be_pickled_is_refused_as_by_stock(
    new_buffer: NewBuffer, caplog: pytest.LogCaptureFixture
) -> None:
    class Bad:
        def __sizeof__(self) -> int:
            return 1000

        def __reduce__(self) -> Any:
            raise RuntimeError("no pickle")

    buffer = new_buffer(5000)
    buffer["bad"] = bad = Bad()
    for _ in range(2):
        assert buffer.evict() == -1
    assert buffer["bad"] is bad and len([each for each in caplog.records if "Failed to pickle" in each.message]) == 1
    Bad.__sizeof__ = lambda self: 10_000  # type: ignore[method-assign]
    with pytest.raises(TypeError):
        buffer["worse"] = Bad()
    assert set(buffer) == {"bad"} and buffer.store.stats().live_slots == 0


def test_frames_that_are_no_host_memory_go_to_the_files_of_stock(new_buffer: NewBuffer) -> None:
    buffer = new_buffer(1 << 30)
    store = buffer.store
    kept: dict[Any, Any] = {}
    store._files = kept
    store["device"] = frames = [b"lengths", b"header", object()]
    assert kept == {"device": frames} and store.stats().live_slots == 0
    assert (
        store["device"] is frames and "device" in store and list(store) == ["device"] and store.peek("device") is None
    )
    del store["device"]
    assert not kept and not len(store)


# -- a buffer in use is taken over ---------------------------------------------------------------------------------


def test_what_was_spilled_before_stays_in_its_file_until_it_is_read(new_buffer: NewBuffer, tmp_path: Path) -> None:
    buffer = new_buffer(1 << 30, stock=True)
    for number in range(4):
        buffer[number] = np.full(10_000, number)
    buffer.evict(), buffer.evict()
    folder = tmp_path / "storage0"
    before = buffer.spilled_total
    take_over(buffer, OverflowRegion.temporary(tmp_path, max_capacity=1 << 28, ownership="process"))
    assert set(buffer.memory) == {2, 3} and set(buffer.disk) == {0, 1} and buffer.spilled_total == before
    assert len(list(folder.iterdir())) == 2
    gc.collect()
    assert buffer[0][5] == 0 and len(list(folder.iterdir())) == 1
    del buffer[1]
    assert not list(folder.iterdir())
    while buffer.fast:
        assert buffer.evict() > 0
    assert not list(folder.iterdir()) and buffer.store.stats().live_slots == 3
    assert [buffer[number][7] for number in (0, 2, 3)] == [0, 2, 3]


@pytest.mark.parametrize("kind", ["dict", "subclass", "slow"])
def test_a_buffer_of_another_kind_is_left_alone(new_buffer: NewBuffer, tmp_path: Path, kind: str) -> None:
    buffer: Any = {} if kind == "dict" else new_buffer(1000, stock=True)
    if kind == "subclass":
        buffer.__class__ = type("Other", (SpillBuffer,), {})
    elif kind == "slow":
        buffer.slow.data = {}
    with (
        OverflowRegion.temporary(tmp_path, initial_capacity=4096, max_capacity=4096) as region,
        pytest.raises(TypeError, match="plain"),
    ):
        take_over(buffer, region)


# -- peers, threads, housekeeping, the end -------------------------------------------------------------------------


def test_a_peer_gets_the_frames_where_they_lie(new_buffer: NewBuffer) -> None:
    buffer = new_buffer(1 << 30)
    value = np.arange(100_000.0)
    buffer["out"], buffer["in"] = value.copy(), 5
    buffer.fast.evict("out")
    token = for_peer.set(Peer(reads=False))
    try:
        found, other = buffer["out"], buffer["in"]
    finally:
        for_peer.reset(token)
    assert type(found) is Serialized and other == 5
    assert set(buffer.disk) == {"out"} and metric(buffer, "disk-read") == 1
    (frame,) = found.frames
    assert memoryview(frame).readonly and bytes(frame) == value.tobytes()
    sent = distributed.protocol.dumps({"x": distributed.protocol.to_serialize(found)})
    assert same(distributed.protocol.loads([bytes(each) for each in sent])["x"], value)
    assert metric(buffer, "disk-read", "bytes") == sum(map(nbytes, serialize_bytelist(value, compression=None)))


def test_every_thread_may_use_it(new_buffer: NewBuffer) -> None:
    buffer = new_buffer(1 << 30)

    def work() -> bool:
        buffer["there"] = np.arange(50_000)
        buffer.evict()
        return bool(buffer["there"][49_999] == 49_999)

    assert in_thread(work) is True
    assert buffer.evict() > 0
    assert in_thread(lambda: buffer["there"].sum()) == 50_000 * 49_999 // 2
    del buffer["there"]


def tidy_up(store: Any) -> None:
    """Do all the housekeeping that there is, a step of some milliseconds after the other."""
    while store._freed >= 1 << 20:
        store.tidy()


def test_disk_is_given_back_in_pieces_when_values_go(new_buffer: NewBuffer) -> None:
    buffer = new_buffer(1 << 30)
    for number in range(32):
        buffer[number] = np.full(125_000, number)
        buffer.evict()
    for number in range(0, 32, 2):
        del buffer[number]
    store = buffer.store
    store.tidy()  # values went out a moment ago, what is free is for the next
    assert store.stats().disk_bytes >= 31_000_000
    tidy_up(store)
    assert store.stats().disk_bytes < 18_000_000
    for number in range(1, 32, 2):
        assert buffer[number][124_999] == number
        del buffer[number]
    tidy_up(store)
    assert store.stats().disk_bytes < 2_000_000


def test_housekeeping_that_the_disk_refuses_is_left_for_later(
    new_buffer: NewBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = new_buffer(1 << 30)
    for number in range(8):
        buffer[number] = np.full(500_000, number)
        buffer.evict()
    store = buffer.store
    store.tidy()

    def refuse(self: OverflowRegion, budget: int) -> None:
        raise RegionIOError(28, "no room", "here")

    with monkeypatch.context() as patch:
        patch.setattr(OverflowRegion, "compact", refuse)
        del buffer[0]
        store.tidy()
    del buffer[1]
    tidy_up(store)
    assert store.stats().disk_bytes < 27_000_000 and buffer[7][5] == 7


def test_closing_drops_what_is_out_and_leaves_what_is_in_use(new_buffer: NewBuffer) -> None:
    buffer = new_buffer(1 << 30)
    buffer["out"], buffer["back"] = np.arange(100_000), np.arange(50_000)
    buffer.evict(), buffer.evict()
    back = buffer["back"]
    buffer.close()
    buffer.close()
    assert back[49_999] == 49_999 and set(buffer) == {"back"} and "out" not in buffer
    buffer.store.tidy()


# -- workers in this process ---------------------------------------------------------------------------------------


OPTIONS: dict[str, Any] = {"memory_limit": 40_000_000, "dashboard_address": ":0"}


def run_cluster(work: Callable[[Client, Worker, Worker], Any], folder: Path, **config: Any) -> None:
    """Run a coroutine on a cluster of two workers of 40 MB in this thread's event loop."""

    async def main() -> None:
        options = OPTIONS | {"local_directory": str(folder)}
        async with (
            Scheduler(port=0, dashboard_address=":0", host="127.0.0.1") as scheduler,
            Worker(scheduler.address, nthreads=1, **options) as one,
            Worker(scheduler.address, nthreads=1, **options) as other,
            Client(scheduler.address, asynchronous=True) as client,
        ):
            await work(client, one, other)

    off = {f"distributed.worker.memory.{each}": False for each in ("spill", "pause", "terminate")}
    with dask.config.set({"distributed.worker.profile.enabled": False, **off, **config}):
        asyncio.run(main())
    gc.collect()


def big(number: int) -> Any:
    return np.full(1_000_000, number, dtype="f8")


PRELOAD = {"distributed.worker.preload": ["nodedb_mem.dask"]}


def test_workers_spill_to_regions_by_configuration(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def work(client: Client, one: Worker, other: Worker) -> None:
        assert type(one.data) is type(other.data) is RegionBuffer
        assert one.data is one.state.data is one.memory_manager.data
        values = client.map(big, range(8), workers=[one.address])
        await wait(values)
        out = set(one.data.disk)
        assert len(out) >= 4
        stats = one.data.store.stats()
        assert stats.live_slots == len(out) and stats.max_capacity == 100_000_000
        one.data.slow.cache.clear()  # of values that are still in use, which come back for nothing
        # The other worker, and the client, take them from where they lie.
        sums = await client.gather(client.map(lambda value: float(value[7]), values, workers=[other.address]))
        assert sums == [float(number) for number in range(8)] and set(one.data.disk) == out & set(one.data)
        assert (await client.gather(values))[7][3] == 7 and set(one.data.disk) == out & set(one.data)
        assert one.data.cumulative_metrics["disk-read", "count"] >= len(out)
        del values
        while one.data:
            await asyncio.sleep(0.01)
        while one.data.store.stats().disk_bytes > 5_000_000:
            await asyncio.sleep(0.01)

    run_cluster(work, tmp_path, **PRELOAD, **{"nodedb-mem": {"max-capacity": "100 MB", "cache-limit": "16 MiB"}})
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]


def test_peers_on_one_machine_take_spilled_values_by_reference(tmp_path: Path) -> None:
    async def work(client: Client, one: Worker, other: Worker) -> None:
        sender = one.handlers["get_data"].__self__
        first = client.map(big, range(8), workers=[one.address])
        await wait(first)
        one.data.slow.cache.clear()
        out = list(one.data.disk)
        there = [each for each in first if each.key in out]

        async def add(number: int) -> float:
            """Sum values on the other worker, which has to get them."""
            sums = client.map(lambda value, n: float(value.sum()) + n, there, n=number, workers=[other.address])
            total = sum(await client.gather(sums))
            await client.cancel(sums)
            return total

        expected = sum(range(8)) if len(there) == 8 else sum(first.index(each) for each in there)
        assert await add(0) == expected * 1e6
        while other.address not in sender._known:  # the first answer goes through the socket, and asks
            await asyncio.sleep(0.01)
        while not sender._known[other.address]:
            await asyncio.sleep(0.01)

        again = client.map(lambda value: value + 100, there, workers=[one.address])
        await wait(again)
        one.data.slow.cache.clear()
        (key, *_) = [each.key for each in again if each.key in one.data.disk]
        (future,) = [each for each in again if each.key == key]

        def change(value: Any) -> Any:
            value[0] = 5  # nobody else sees it
            return value

        changed = client.submit(change, future, workers=[other.address])
        assert float((await changed)[0]) == 5
        held = other.data[changed.key]
        assert held.flags.writeable and not held.flags.owndata and held.ctypes.data % 64 == 0
        with open("/proc/self/maps") as maps:
            (name,) = [
                area[5]
                for area in (line.split(maxsplit=5) for line in maps)
                if held.ctypes.data in range(*(int(each, 16) for each in area[0].split("-"))) and len(area) == 6
            ]
        assert name.startswith(one.local_directory)  # no copy: it is in the sender's region
        assert float(one.data[key][0]) >= 100
        # The sender lets go of the value. Who has it keeps its bytes.
        value = float(held[7])
        keys = {each.key for each in again}
        del again, future, there, first
        while keys & one.data.keys():
            await asyncio.sleep(0.01)
        more = client.map(big, range(20, 28), workers=[one.address])
        await wait(more)
        assert float(held[7]) == value and float(held[-1]) == value
        assert not one.data.store._lent and not one.data.store._unwanted

    run_cluster(work, tmp_path, **PRELOAD)


def test_a_slot_that_is_lent_is_freed_when_it_is_given_back(new_buffer: NewBuffer) -> None:
    buffer = new_buffer(1 << 30)
    buffer["key"] = np.zeros(100_000)
    buffer.evict()
    store = buffer.store
    refs = [store.lend("key"), store.lend("key")]
    del buffer["key"]
    assert store.stats().live_slots == 1
    store.take_back(refs[0])
    assert store.stats().live_slots == 1
    store.take_back(refs[1])
    assert store.stats().live_slots == 0


def test_a_peer_that_cannot_read_the_files_is_sent_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(client: Client, one: Worker, other: Worker) -> None:
        async def no(ref: bytes, head: bytes) -> bool:
            return False

        other.handlers["nodedb_mem_reads"] = no
        values = client.map(big, range(8), workers=[one.address])
        await wait(values)
        for number in range(3):
            sums = client.map(lambda value, n: float(value[3]) + n, values, n=number, workers=[other.address])
            assert await client.gather(sums) == [float(each + number) for each in range(8)]
        assert one.handlers["get_data"].__self__._known == {other.address: False}

    run_cluster(work, tmp_path, **PRELOAD)


def test_a_running_cluster_is_switched(tmp_path: Path) -> None:
    async def work(client: Client, one: Worker, other: Worker) -> None:
        values = client.map(big, range(8), workers=[one.address])
        await wait(values)
        assert type(one.data) is SpillBuffer and len(one.data.disk) >= 4
        await nodedb_mem.dask.install(client, max_capacity=200_000_000)
        await nodedb_mem.dask.install(client)  # once more does nothing
        assert type(one.data) is type(other.data) is RegionBuffer
        more = client.map(lambda value: value + 1, values, workers=[one.address])
        sums = await client.gather(client.map(lambda value: float(value[9]), more))
        assert sums == [number + 1.0 for number in range(8)]
        assert one.data.store.stats().live_slots > 0 and one.data.store.stats().max_capacity == 200_000_000
        async with Worker(client.scheduler.address, **OPTIONS, local_directory=str(tmp_path)) as late:
            assert type(late.data) is RegionBuffer
        await client.unregister_worker_plugin("nodedb-mem")
        assert float((await client.gather(more))[3][0]) == 4  # what is out is still there

    run_cluster(work, tmp_path)


@pytest.mark.parametrize("fault", ["storage", "import", "trial", "region", "directory"])
def test_a_worker_that_is_not_as_expected_spills_as_before(
    tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {}
    if fault == "storage":
        monkeypatch.setattr(distributed.worker_memory, "SpillBuffer", type("Newer", (SpillBuffer,), {}))
    elif fault == "import":
        monkeypatch.setitem(__import__("sys").modules, "nodedb_mem._dask_buffer", None)
        monkeypatch.delattr(nodedb_mem, "_dask_buffer")
    elif fault == "trial":
        monkeypatch.setattr(RegionBuffer, "slow_to_fast", lambda self, key: None)
    elif fault == "region":
        settings = {"nodedb-mem": {"alignment": 3}}
    else:
        settings = {"nodedb-mem": {"directory": str(tmp_path / "missing")}}
    nodedb_mem.dask._probe.cache_clear()

    async def work(client: Client, one: Worker, other: Worker) -> None:
        assert isinstance(one.data, SpillBuffer) and type(one.data) is not RegionBuffer
        values = client.map(big, range(6), workers=[one.address])
        await wait(values)
        assert len(one.data.disk) >= 2 and float((await client.gather(values))[2][0]) == 2

    with caplog.at_level(logging.WARNING):
        run_cluster(work, tmp_path, **PRELOAD, **settings)
    nodedb_mem.dask._probe.cache_clear()
    messages = [each.message for each in caplog.records if each.name == "distributed.nodedb_mem"]
    assert messages == ["Cannot spill to a region; spilling stays as it is"] * 2


def test_a_directory_that_stays_in_ram_is_warned_of(mount: Mount, caplog: pytest.LogCaptureFixture) -> None:
    folder = mount("tmpfs", 64)

    async def work(client: Client, one: Worker, other: Worker) -> None:
        assert type(one.data) is RegionBuffer

    with caplog.at_level(logging.WARNING):
        run_cluster(work, folder, **PRELOAD)
    messages = [each.message for each in caplog.records if each.name == "distributed.nodedb_mem"]
    assert len(messages) == 2 and all("is on tmpfs" in each for each in messages)


def test_a_worker_without_a_limit_is_left_alone(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            Scheduler(port=0, dashboard_address=":0", host="127.0.0.1") as scheduler,
            Worker(scheduler.address, memory_limit=0, local_directory=str(tmp_path), dashboard_address=":0") as worker,
        ):
            assert type(worker.data) is dict

    with dask.config.set(PRELOAD):
        asyncio.run(main())


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(TypeError, match="cache-limits"):
        nodedb_mem.dask.SpillPlugin(cache_limits=5)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_capacity": "nonsense"},
        {"max_capacity": True},
        {"max_capacity": 10},
        {"cache_limit": [1]},
        {"alignment": 8},
    ],
)
def test_wrong_settings_are_refused_at_the_client(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings)).replace("_", "-")):
        nodedb_mem.dask.SpillPlugin(**settings)


def test_settings_may_come_from_the_environment(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def work(client: Client, one: Worker, other: Worker) -> None:
        assert one.data.store.stats().max_capacity == 50_000_000

    # as Dask reads DASK_NODEDB_MEM__MAX_CAPACITY
    run_cluster(work, tmp_path, **PRELOAD, **{"nodedb-mem": {"max_capacity": "50 MB", "max-capcity": 5}})
    assert "max-capcity" in caplog.text
