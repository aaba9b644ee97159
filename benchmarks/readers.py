"""Reading in another process through a `SlotRef`, beside the other ways there; and what busy readers cost the owner.

    make bench-readers [ARGS=--quick]
    python benchmarks/readers.py [--quick] [--directory DIR] [--output DIR]

One process owns the values, another reads them. All that can be opened beforehand is: files, mappings, segments,
environments. The rivals take turns in random order; a figure is the median over the rounds, a ratio the median of the
ratios within each round, in units of the region's time: above 1 the region is faster.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pyarrow as pa
from bench_region import KIB, MIB
from pages import (
    bullets,
    digits,
    empty_directory,
    environment,
    grouped_bars,
    median_ratio,
    parse,
    picture,
    save,
    table,
    verdict,
)

from nodedb_mem import EngineId, OverflowReader, OverflowRegion, SlotRef

SIZES = {4 * KIB: "4 KiB", MIB: "1 MiB", 64 * MIB: "64 MiB"}
VALUES = {4 * KIB: 16, MIB: 16, 64 * MIB: 2}
REPEATS = {4 * KIB: 200, MIB: 40, 64 * MIB: 4}
HANDOVERS = {4 * KIB: 40, MIB: 10, 64 * MIB: 2}
RIVALS = ("region", "queue", "shared_memory", "pyarrow", "lmdb")
UNDER_TEST = RIVALS[0]
SPAWN = multiprocessing.get_context("spawn")

READERS = 4
WRITES = {4 * KIB: 20_000, MIB: 400}
LIVE = 64  # MiB that the readers read

Samples = dict[str, dict[int, dict[str, list[float]]]]  # section, size, rival
Write = dict[int, dict[str, list[float]]]


# ---- the process that reads --------------------------------------------------------------------------------------


class Openers:
    """Gives a view of a value by its handle, and keeps open what it needs for that."""

    def __init__(self, keep: ExitStack) -> None:
        self.keep = keep
        self.opened: dict[Any, Any] = {}

    def once(self, key: Any, opener: Callable[[], Any]) -> Any:
        if key not in self.opened:
            self.opened[key] = opener()
        return self.opened[key]

    def region(self, ref: SlotRef, use: Callable[[Any], None]) -> None:
        use(self.once(ref.path, lambda: self.keep.enter_context(OverflowReader(ref))).read(ref))

    def shared_memory(self, handle: tuple[str, int], use: Callable[[Any], None]) -> None:
        name, size = handle
        use(self.once(name, lambda: SharedMemory(name)).buf[:size])

    def pyarrow(self, handle: tuple[str, int, int], use: Callable[[Any], None]) -> None:
        path, offset, size = handle
        file = self.once(path, lambda: self.keep.enter_context(pa.memory_map(path)))
        file.seek(offset)
        use(file.read_buffer(size))

    def lmdb(self, handle: tuple[str, bytes], use: Callable[[Any], None]) -> None:
        path, key = handle
        opened = self.once(path, lambda: self.keep.enter_context(lmdb.open(path, readonly=True, lock=True)))
        with opened.begin(buffers=True) as transaction:
            use(transaction.get(key))

    def queue(self, data: bytes, use: Callable[[Any], None]) -> None:
        use(data)


def touch(view: Any) -> None:
    np.frombuffer(view, np.uint64).sum()


def ignore(view: Any) -> None:
    pass


def read_values(pipe: Any, queue: Any) -> None:
    """Do what the owner asks for; tell it nanoseconds per value."""
    with ExitStack() as keep:
        openers = Openers(keep)
        while (request := pipe.recv()) is not None:
            rival, touched, handles, count = request
            view, use = getattr(openers, rival), touch if touched else ignore
            if handles is None:  # they come one by one, on request
                begin = time.perf_counter_ns()
                for _ in range(count):
                    pipe.send(None)
                    view(queue.get(), use)
            else:
                for handle in handles:
                    view(handle, touch)
                begin = time.perf_counter_ns()
                for i in range(count):
                    view(handles[i % len(handles)], use)
            pipe.send((time.perf_counter_ns() - begin) / count)
        for opened in openers.opened.values():
            if isinstance(opened, SharedMemory):
                opened.close()


# ---- the process that owns ---------------------------------------------------------------------------------------


def store(directory: Path, keep: ExitStack) -> dict[str, dict[int, list[Any]]]:
    """Put the same values into each rival; handles by rival and size. The queue's handle is the value."""
    handles: dict[str, dict[int, list[Any]]] = {rival: defaultdict(list) for rival in RIVALS}
    region = keep.enter_context(OverflowRegion.open(directory / "region", cache_limit=None))
    database = keep.enter_context(lmdb.open(str(directory / "lmdb"), map_size=1 << 30, sync=False))
    source = random.Random(0)
    for size, count in VALUES.items():
        path = directory / f"arrow-{size}"
        with path.open("wb") as file:
            for i in range(count):
                data = source.randbytes(size)
                handles["queue"][size].append(data)
                handles["region"][size].append(region.share(region.write(data, EngineId.QUERY)))
                handles["pyarrow"][size].append((str(path), file.tell(), size))
                file.write(data)
                key = f"{size}-{i}".encode()
                with database.begin(write=True) as transaction:
                    transaction.put(key, data)
                handles["lmdb"][size].append((str(directory / "lmdb"), key))
                segment = SharedMemory(create=True, size=size)
                keep.callback(segment.unlink)
                keep.callback(segment.close)
                segment.buf[:size] = data
                handles["shared_memory"][size].append((segment.name, size))
    return handles


def measure_reads(directory: Path, rounds: int) -> Samples:
    """Views taken, values touched, values handed over: microseconds per value."""
    samples: Samples = {name: {size: {r: [] for r in RIVALS} for size in SIZES} for name in SECTIONS}
    pipe, far_end = SPAWN.Pipe()
    queue = SPAWN.Queue()
    with ExitStack() as keep:
        handles = store(directory, keep)
        reader = SPAWN.Process(target=read_values, args=(far_end, queue))
        reader.start()

        def ask(rival: str, size: int, touched: bool) -> float:
            pipe.send((rival, touched, handles[rival][size], REPEATS[size]))
            return float(pipe.recv()) / 1e3

        def hand_over(rival: str, size: int, touched: bool) -> float:
            pipe.send((rival, touched, None, HANDOVERS[size]))
            served = 0
            while (answer := pipe.recv()) is None:
                queue.put(handles[rival][size][served % VALUES[size]])
                served += 1
            return float(answer) / 1e3

        for number in range(rounds + 1):
            for size in SIZES:
                for rival in random.sample(RIVALS, len(RIVALS)):
                    known = hand_over if rival == "queue" else ask
                    figures = {
                        "view": known(rival, size, False),
                        "touched": known(rival, size, True),
                        "handed over": hand_over(rival, size, True),
                    }
                    if number:
                        for section, figure in figures.items():
                            samples[section][size][rival].append(figure)
        pipe.send(None)
        reader.join()
    return samples


# ---- what the owner pays -----------------------------------------------------------------------------------------


def keep_reading(refs: list[SlotRef], own: bool) -> None:
    """Read and digest until killed: the region's values, or as many bytes of this process's own."""
    if own:
        mine = [os.urandom(ref.size) for ref in refs]
        while True:
            for data in mine:
                touch(data)
    with OverflowReader(refs[0]) as reader:
        while True:
            for ref in refs:
                with reader.borrow(ref) as view:
                    touch(view)


@contextmanager
def busy(processes: list[Any]) -> Any:
    """Let stopped processes run."""
    for process in processes:
        os.kill(process.pid, signal.SIGCONT)
    time.sleep(0.02)
    try:
        yield
    finally:
        for process in processes:
            os.kill(process.pid, signal.SIGSTOP)


def measure_writes(directory: Path, rounds: int) -> tuple[Write, Write]:
    """The owner writes and frees beside readers, beside processes that read their own memory, and alone.

    MiB per second, of the clock and of the owner's CPU time.
    """
    conditions = ("no readers", f"{READERS} readers", f"{READERS} other busy processes")
    clock: Write = {size: {name: [] for name in conditions} for size in WRITES}
    cpu: Write = {size: {name: [] for name in conditions} for size in WRITES}
    with OverflowRegion.open(directory / "written", cache_limit=None) as region:
        refs = [region.share(region.write(os.urandom(MIB), EngineId.QUERY)) for _ in range(LIVE)]
        groups = [
            [],
            *([SPAWN.Process(target=keep_reading, args=(refs, own)) for _ in range(READERS)] for own in (False, True)),
        ]
        everyone = [process for group in groups for process in group]
        for process in everyone:
            process.start()
        time.sleep(6)  # until they are at it
        try:
            for process in everyone:
                os.kill(process.pid, signal.SIGSTOP)
            plays = list(zip(conditions, groups, strict=True))
            for number in range(rounds + 1):
                for size, count in WRITES.items():
                    data = os.urandom(size)
                    for name, group in random.sample(plays, len(plays)):
                        with busy(group):
                            seconds = _write_and_free(region, data, count)
                        if number:
                            amount = size * count / MIB
                            clock[size][name].append(amount / seconds[0])
                            cpu[size][name].append(amount / seconds[1])
        finally:
            for process in everyone:
                process.kill()
            for process in everyone:
                process.join()
    return clock, cpu


def _write_and_free(region: OverflowRegion, data: bytes, count: int) -> tuple[float, float]:
    waiting: list[int] = []
    begin, begin_cpu = time.perf_counter(), time.thread_time()
    for _ in range(count):
        waiting.append(region.write(data, EngineId.QUERY))
        if len(waiting) == 16:
            for slot in waiting:
                region.free(slot)
            waiting.clear()
    seconds = time.perf_counter() - begin, time.thread_time() - begin_cpu
    for slot in waiting:
        region.free(slot)
    return seconds


# ---- the report --------------------------------------------------------------------------------------------------

SECTIONS = {
    "view": "A view of the value, its handle being there (queue: the value itself, on request)",
    "touched": "The same, and every byte read",
    "handed over": "The handle, or the value, asked for and sent over one queue; then every byte read",
}


def read_rows(cells: dict[int, dict[str, list[float]]]) -> list[list[str]]:
    others = RIVALS[1:]
    rows = [["µs", *RIVALS, *(f"{rival}/region" for rival in others)]]
    for size, samples in cells.items():
        ratios = (digits(median_ratio(samples[rival], samples[UNDER_TEST])) for rival in others)
        rows.append([SIZES[size], *(digits(statistics.median(samples[rival])) for rival in RIVALS), *ratios])
    return rows


def write_rows(clock: Write, cpu: Write) -> list[list[str]]:
    names = list(next(iter(clock.values())))
    rows = [["MiB/s", *names, f"{names[1]}/none", f"{names[1]}/others"]]
    for what, figures in (("of the clock", clock), ("of the owner's CPU time", cpu)):
        for size, samples in figures.items():
            against = (f"{median_ratio(samples[names[1]], samples[other]):.2f}" for other in (names[0], names[2]))
            medians = (digits(statistics.median(samples[name])) for name in names)
            rows.append([f"{SIZES[size]}, {what}", *medians, *against])
    return rows


def page(reads: Samples, clock: Write, cpu: Write, facts: dict[str, str], rounds: int) -> list[str]:
    """Lay everything out in Markdown."""
    cores = len(os.sched_getaffinity(0))
    against = {
        name: median_ratio(cells[64 * MIB]["queue"], cells[64 * MIB][UNDER_TEST]) for name, cells in reads.items()
    }
    view, touched, handed_over = (digits(against[name]) for name in SECTIONS)
    fast = verdict(f"{view} times as fast", 100, against["view"] >= 100)
    told = (
        f"Medians of {rounds} interleaved rounds; `benchmarks/readers.py`. A ratio is the rival's time in units of the "
        "region's: above 1 the region is faster. All run in one more process, which keeps open what it has opened."
    )
    large = (
        f"64 MiB beside the queue: the view {fast}, with every byte read {touched} times, handed over {handed_over} "
        "times."
    )
    busy_ones = (
        f"The readers read {LIVE} MiB of the region over and over; the other busy processes as much memory of their "
        f"own. {READERS + 1} processes share {cores} cores: where these are fewer, the clock shows the scheduler's "
        "share, the CPU time what the readers cost. The goal is 0.9 of the speed without readers."
    )
    parts = ["# Readers in another process", told, bullets(facts)]
    for name, title in SECTIONS.items():
        parts += [f"## {title}", table(read_rows(reads[name]))]
    heading = f"## The owner writes and frees, beside {READERS} busy readers, on {cores} cores"
    return [*parts, large, heading, table(write_rows(clock, cpu)), busy_ones]


def plot(reads: Samples, stem: Path) -> None:
    """Draw the medians, a panel for each way to read."""
    titles = {"view": "a view", "touched": "every byte read", "handed over": "handed over, every byte read"}
    with picture(stem, 1, len(titles), (12, 4.2)) as (figure, panels):
        for panel, (section, title) in zip(panels, titles.items(), strict=True):
            medians = {r: [statistics.median(reads[section][size][r]) for size in SIZES] for r in RIVALS}
            grouped_bars(panel, list(SIZES.values()), medians)
            panel.set(title=title, yscale="log")
        panels[0].set_ylabel("µs, log scale")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
        figure.suptitle("Reading a value in another process; lower is better")


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure reading in another process.")
    options = parse(parser, "readers", rounds=21, quick=7)
    rounds = options.rounds
    with empty_directory(options.directory) as directory:
        facts = environment(directory)
        facts["rivals"] = f"pyarrow {pa.__version__}, lmdb {lmdb.__version__}"
        reads = measure_reads(directory, rounds)
        clock, cpu = measure_writes(directory, rounds)

    def as_json(samples: dict[int, dict[str, list[float]]]) -> dict[str, Any]:
        return {
            SIZES[size]: {rival: [round(figure, 3) for figure in figures] for rival, figures in rivals.items()}
            for size, rivals in samples.items()
        }

    figures = {
        "environment": facts,
        "rounds": rounds,
        "microseconds": {section: as_json(samples) for section, samples in reads.items()},
        "owner_MiB_per_s": as_json(clock),
        "owner_MiB_per_cpu_s": as_json(cpu),
    }
    print(save(options.stem, page(reads, clock, cpu, facts, rounds), figures))
    plot(reads, options.stem)
    return 0


if __name__ == "__main__":
    sys.exit(main())
