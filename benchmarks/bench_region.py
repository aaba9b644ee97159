"""Speed of the region's verbs beside a pure-Python twin and bare mmap.

    pytest benchmarks/bench_region.py [--quick] [--directory DIR]

This file defines the workloads. pytest-benchmark runs rival after rival, and its figures are milliseconds for a
whole pass over the values; `report.py` runs the same passes with the rivals interleaved and gives nanoseconds per
operation and ratios.
"""

from __future__ import annotations

import gc
import mmap
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
from twin import TwinRegion

from nodedb_mem import EngineId, OverflowRegion

KIB, MIB = 1 << 10, 1 << 20
BATCH = 1000


@dataclass(frozen=True)
class Workload:
    """How many operations on values of one size make a pass."""

    label: str
    size: int  # bytes of a value
    values: int  # stored in a fresh region, 64 MiB at most
    live: int  # of these, how many the steady passes work on
    views: int  # reads in a steady pass
    copies: int  # copying operations in a steady pass

    @property
    def total(self) -> int:
        """Bytes stored."""
        return self.size * self.values

    def order(self, count: int) -> list[int]:
        """Return `count` indexes of live values, each as often as the next, in an order that repeats."""
        shuffled = random.Random(self.size).sample(range(self.live), self.live)
        return [shuffled[i % self.live] for i in range(count)]


WORKLOADS = (
    Workload("64 B", 64, values=20_000, live=1_000, views=10_000, copies=10_000),
    Workload("4 KiB", 4 * KIB, values=8_192, live=1_000, views=10_000, copies=5_000),
    Workload("64 KiB", 64 * KIB, values=1_024, live=1_000, views=10_000, copies=1_000),
    Workload("1 MiB", MIB, values=64, live=64, views=10_000, copies=64),
    Workload("16 MiB", 16 * MIB, values=4, live=4, views=10_000, copies=4),
)


class Subject(Protocol):
    """One rival on a fresh file. Each method but `close` is one pass; `write` comes first, and once."""

    def write(self) -> None: ...
    def first_read(self) -> None: ...
    def read(self) -> None: ...
    def read_bytes(self) -> None: ...
    def free_write(self) -> None: ...
    def write_many(self) -> None: ...
    def close(self) -> None: ...


class RegionSubject:
    """An overflow region, or its twin: they are called in the same way."""

    def __init__(self, kind: type[Any], directory: Path, workload: Workload, **options: Any) -> None:
        self.region = kind.open(
            directory / "-".join([kind.__name__, *options]),
            initial_capacity=workload.total,
            max_capacity=2 * workload.total,
            **options,
        )
        self.data = random.Random(0).randbytes(workload.size)
        self.values = workload.values
        self.slots: list[int] = []
        self.order = workload.order
        self.view_order = workload.order(workload.views)
        self.copy_order = workload.order(workload.copies)

    def write(self) -> None:
        write, data, engine = self.region.write, self.data, EngineId.VECTOR
        self.slots = [write(data, engine) for _ in range(self.values)]

    def first_read(self) -> None:
        read = self.region.read
        for slot in self.slots:
            read(slot)

    def read(self) -> None:
        read, slots = self.region.read, self.slots
        for i in self.view_order:
            read(slots[i])

    def read_bytes(self) -> None:
        read_bytes, slots = self.region.read_bytes, self.slots
        for i in self.copy_order:
            read_bytes(slots[i])

    def free_write(self) -> None:
        free, write, data, engine = self.region.free, self.region.write, self.data, EngineId.VECTOR
        slots = self.slots
        for i in self.copy_order:
            free(slots[i])
            slots[i] = write(data, engine)

    def write_many(self) -> None:
        engine, values = EngineId.VECTOR, [self.data] * BATCH
        if isinstance(self.region, OverflowRegion):
            write_many = self.region.write_many
            for start in range(0, self.values, BATCH):
                write_many(values[: self.values - start], engine)
        else:
            write = self.region.write
            for start in range(0, self.values, BATCH):
                for data in values[: self.values - start]:
                    write(data, engine)

    def close(self) -> None:
        self.region.close()


class MmapSubject:
    """Slice assignment to a mapping, at offsets known beforehand: no bookkeeping, no check, no pin."""

    def __init__(self, directory: Path, workload: Workload) -> None:
        fd = os.open(directory / "mmap", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self.extend(fd, workload.total)
            self.mapping = mmap.mmap(fd, workload.total)
        finally:
            os.close(fd)
        self.data = random.Random(0).randbytes(workload.size)
        self.size = workload.size
        self.offsets = [i * workload.size for i in range(workload.values)]
        self.view_order = workload.order(workload.views)
        self.copy_order = workload.order(workload.copies)

    @staticmethod
    def extend(fd: int, size: int) -> None:
        os.posix_fallocate(fd, 0, size)  # faster to fill than a sparse file

    def write(self) -> None:
        mapping, data, size = self.mapping, self.data, self.size
        for offset in self.offsets:
            mapping[offset : offset + size] = data

    def first_read(self) -> None:
        size = self.size
        with memoryview(self.mapping) as view:
            for offset in self.offsets:
                view[offset : offset + size]

    def read(self) -> None:
        offsets, size = self.offsets, self.size
        with memoryview(self.mapping) as view:
            for i in self.view_order:
                offset = offsets[i]
                view[offset : offset + size]

    def read_bytes(self) -> None:
        mapping, offsets, size = self.mapping, self.offsets, self.size
        for i in self.copy_order:
            offset = offsets[i]
            mapping[offset : offset + size]

    def free_write(self) -> None:
        mapping, data, offsets, size = self.mapping, self.data, self.offsets, self.size
        for i in self.copy_order:
            offset = offsets[i]
            mapping[offset : offset + size] = data

    def write_many(self) -> None:
        self.write()

    def close(self) -> None:
        self.mapping.close()


RIVALS: dict[str, Callable[[Path, Workload], Subject]] = {
    "region": lambda directory, workload: RegionSubject(
        OverflowRegion, directory, workload, cache_limit=None, keep_mapped=True
    ),
    "limited": lambda directory, workload: RegionSubject(OverflowRegion, directory, workload),
    "twin": lambda directory, workload: RegionSubject(TwinRegion, directory, workload),
    "mmap": MmapSubject,
}


@dataclass(frozen=True)
class Operation:
    """A pass, and what it measures."""

    label: str
    method: str
    count: Callable[[Workload], int]  # operations in a pass
    copies: bool  # every byte of the value
    fresh: bool  # measurable once on each file
    meaning: str


OPERATIONS = (
    Operation("write", "write", lambda w: w.values, True, True, "into file space never touched before"),
    Operation("first read", "first_read", lambda w: w.values, False, True, "a view of a value not read before"),
    Operation("read", "read", lambda w: w.views, False, False, "a view of a value read before"),
    Operation("read_bytes", "read_bytes", lambda w: w.copies, True, False, "a copy as bytes"),
    Operation("free+write", "free_write", lambda w: w.copies, True, False, "free a value, write one of the same size"),
    Operation(
        "write_many",
        "write_many",
        lambda w: w.values if w.size <= 4 * KIB else 0,
        True,
        True,
        f"a value, of lists of {BATCH:,}, into fresh space; the others one by one, mmap into warm space",
    ),
)


def cells() -> Iterator[tuple[Operation, Workload]]:
    """Every operation at every size; a pass of a few calls that copy nothing would measure the timer."""
    for operation in OPERATIONS:
        for workload in WORKLOADS:
            count = operation.count(workload)
            if count >= 64 or (operation.copies and count > 0):
                yield operation, workload


def start(rival: str, directory: Path, workload: Workload) -> Subject:
    """Open a rival on a fresh file in `directory`, which should have been cleaned."""
    return RIVALS[rival](directory, workload)


def clean(directory: Path) -> None:
    """Remove what a closed rival left: old dirty pages would be written back during the next pass."""
    for path in directory.iterdir():
        path.unlink()


@pytest.fixture
def subjects(bench_directory: Path) -> Iterator[Callable[[str, Workload], Subject]]:
    """Open one rival after another, closing the one before."""
    current: list[Subject] = []

    def close() -> None:
        while current:
            current.pop().close()
        clean(bench_directory)
        gc.collect()

    def fresh(rival: str, workload: Workload) -> Subject:
        close()
        current.append(start(rival, bench_directory, workload))
        return current[0]

    yield fresh
    close()


def cases() -> Iterator[Any]:
    """Every cell of the table, rivals next to each other."""
    for operation, workload in cells():
        for rival in RIVALS:
            name = f"{operation.method}-{workload.label.replace(' ', '')}-{rival}"
            marks = pytest.mark.benchmark(group=f"{operation.label}, {workload.label}")
            yield pytest.param(operation, workload, rival, id=name, marks=marks)


@pytest.mark.parametrize(("operation", "workload", "rival"), list(cases()))
def test_speed(
    benchmark: Any,
    subjects: Callable[[str, Workload], Subject],
    quick: bool,
    operation: Operation,
    workload: Workload,
    rival: str,
) -> None:
    benchmark.extra_info["operations_per_pass"] = operation.count(workload)
    benchmark.extra_info["bytes_per_operation"] = workload.size
    rounds = 3 if quick else 15

    def prepare() -> Subject:
        subject = subjects(rival, workload)
        if operation.method != "write":
            subject.write()
        return subject

    if operation.fresh:
        benchmark.pedantic(
            lambda subject: getattr(subject, operation.method)(),
            setup=lambda: ((prepare(),), {}),
            rounds=rounds,
        )
    else:
        benchmark.pedantic(getattr(prepare(), operation.method), rounds=rounds, warmup_rounds=1)
