"""What a spill leaves in RAM, how it does where RAM is short, and how fast cold values come back.

    make bench-ram [ARGS=--quick]
    python benchmarks/ram.py [--quick] [--directory DIR] [--output DIR]

Each spill runs in a process of its own, which this one watches: RSS beyond what the process had before the first
write, plus the pages of the file that are in RAM. A mapped page counts twice, so the sum errs on the high side. The
rivals take turns in random order; a figure is the median over the rounds, a ratio the median of the ratios within
each round. Needs Linux 6.5 (cachestat).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from bench_region import MIB, clean
from pages import bullets, empty_directory, environment, median_ratio, parse, picture, save, table, verdict
from write_path import Figures, warm_up

from nodedb_mem import EngineId, OverflowRegion

TOTAL = 2048 * MIB
VALUE = MIB
LIMIT = 64 * MIB
GROUP_LIMIT = 384 * MIB
RESTORED = 512  # values
SAMPLE_EVERY = 0.002  # seconds

# What is spilled by: a region with this limit, or slices of a mapping of a sparse file.
LIMITED, UNLIMITED, MMAP = "cache_limit=64 MiB", "cache_limit=None", "mmap"


# ---- the process that spills -------------------------------------------------------------------------------------


def spill(way: str, path: Path, group: str) -> None:
    """Write TOTAL bytes, and print how long it took. Enters the cgroup first, so that all of it counts there."""
    if group:
        Path(group, "cgroup.procs").write_text(str(os.getpid()))
    data, count = random.Random(0).randbytes(VALUE), TOTAL // VALUE
    latencies = []
    write = _writer(way, path, data)
    print(_rss(os.getpid()), flush=True)
    sys.stdin.readline()
    begin = last = time.perf_counter_ns()
    for i in range(count):
        write(i)
        now = time.perf_counter_ns()
        latencies.append((now - last) / 1e6)
        last = now
    print(json.dumps({"seconds": (last - begin) / 1e9, "worst": max(latencies)}), flush=True)
    sys.stdin.readline()


def _writer(way: str, path: Path, data: bytes) -> Callable[[int], Any]:
    if way == MMAP:
        with path.open("w+b") as file:
            file.truncate(TOTAL)
            mapping = mmap.mmap(file.fileno(), TOTAL)

        def store(i: int) -> None:
            mapping[i * VALUE : (i + 1) * VALUE] = data

        return store
    region = OverflowRegion.open(path, max_capacity=TOTAL, cache_limit=LIMIT if way == LIMITED else None)
    return lambda _: region.write(data, EngineId.VECTOR)


def _rss(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * mmap.PAGESIZE


# ---- watching it -------------------------------------------------------------------------------------------------


@dataclass
class Spill:
    """One spill: seconds, milliseconds of the longest write, and (seconds, bytes in RAM) over time."""

    status: int
    seconds: float = 0.0
    worst: float = 0.0
    samples: list[tuple[float, int]] = field(default_factory=list)

    @property
    def peak(self) -> int:
        return max(size for _, size in self.samples)


def _cached(fd: int) -> int:
    """Bytes of a file in the page cache."""
    extent, counts = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()  # length 0: to the end
    if ctypes.CDLL(None, use_errno=True).syscall(451, fd, extent, counts, 0) != 0:
        raise OSError(ctypes.get_errno(), "cachestat")
    return int(counts[0]) * mmap.PAGESIZE


def run(way: str, directory: Path, group: str = "", *, watch: bool = True) -> Spill:
    """Spill in a process of its own."""
    path = directory / "spill"
    arguments = [sys.executable, __file__, "--spill", way, path, group]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin and child.stdout
        before = child.stdout.readline()
        if not before:
            return Spill(child.wait())
        fd = os.open(path, os.O_RDONLY)
        samples = []
        child.stdin.write("\n")
        child.stdin.flush()
        begin = time.perf_counter()
        os.set_blocking(child.stdout.fileno(), not watch)
        line = ""
        while not line and child.poll() is None:
            try:
                samples.append((time.perf_counter() - begin, _rss(child.pid) - int(before) + _cached(fd)))
            except (OSError, IndexError):  # it has just ended
                break
            line = child.stdout.readline()
            if watch:
                time.sleep(SAMPLE_EVERY)
        os.close(fd)
        child.stdin.close()
        status = child.wait()
    clean(directory)
    return Spill(status, **json.loads(line), samples=samples) if line else Spill(status)


def spills(directory: Path, rounds: int) -> dict[str, list[Spill]]:
    """With and without a limit, in turns."""
    results: dict[str, list[Spill]] = {LIMITED: [], UNLIMITED: []}
    for _ in range(rounds):
        for way in random.sample(list(results), len(results)):
            warm_up()  # what was not needed for a while may have been taken from the machine
            results[way].append(run(way, directory))
    return results


# ---- where RAM is short ------------------------------------------------------------------------------------------


@contextmanager
def memory_group() -> Iterator[str]:
    """Yield a cgroup with a limit of GROUP_LIMIT; an exception that tells why not."""
    name = f"nodedb-mem-bench-{os.getpid()}"
    old, new = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    if (old / "memory.limit_in_bytes").exists():
        group, limit = old / name, "memory.limit_in_bytes"
    elif "memory" in (new / "cgroup.subtree_control").read_text().split():
        group, limit = new / name, "memory.max"
    else:
        raise OSError("neither a v1 memory controller nor one of v2 that is passed on to child groups")
    group.mkdir()
    try:
        (group / limit).write_text(str(GROUP_LIMIT))
        swap = group / "memory.swap.max"
        if swap.exists():
            swap.write_text("0")
        yield str(group)
    finally:
        for _ in range(100):
            try:
                group.rmdir()
                break
            except OSError:  # pages of the last process are still being uncharged
                time.sleep(0.05)


def short_of_ram(directory: Path, rounds: int) -> dict[str, list[Spill]]:
    """The same spill in a small memory cgroup, and a plain mapping there, in turns; a new group for each."""
    results: dict[str, list[Spill]] = {LIMITED: [], UNLIMITED: [], MMAP: []}
    for _ in range(rounds):
        for way in random.sample(list(results), len(results)):
            warm_up()
            with memory_group() as group:
                results[way].append(run(way, directory, group, watch=False))
    return results


# ---- bringing values back ----------------------------------------------------------------------------------------


def restores(directory: Path, rounds: int) -> Figures:
    """Cold values in random order, every byte touched; pread into a ready buffer, with and without touching it."""
    path, order = directory / "restore", list(range(RESTORED))
    buffer = bytearray(VALUE)
    result = Figures("1 MiB, random order", "µs", "read, touched", {"pread": 1.5})
    with OverflowRegion.open(path, max_capacity=RESTORED * VALUE, cache_limit=None) as region:
        for i in range(RESTORED):
            region.write(random.Random(i).randbytes(VALUE), EngineId.VECTOR)
        fd = os.open(path, os.O_RDONLY)

        def read(slot: int) -> None:
            np.frombuffer(region.read(slot), np.uint64).sum()

        def pread(slot: int) -> None:
            os.preadv(fd, [buffer], region.slot(slot).offset)

        def touched_pread(slot: int) -> None:
            os.preadv(fd, [buffer], region.slot(slot).offset)
            np.frombuffer(buffer, np.uint64).sum()

        ways = {"read, touched": read, "pread": pread, "pread, touched": touched_pread}
        result.samples |= {name: [] for name in ways}
        names = list(ways)
        for number in range(rounds + 1):
            random.shuffle(order)
            random.shuffle(names)
            for name in names:
                region.evict()
                assert region.stats().resident_bytes < MIB
                way = ways[name]
                begin = time.perf_counter_ns()
                for slot in order:
                    way(slot)
                if number:
                    result.samples[name].append((time.perf_counter_ns() - begin) / 1e3 / RESTORED)
        os.close(fd)
    clean(directory)
    return result


# ---- the report --------------------------------------------------------------------------------------------------


def _speed_ratio(mine: list[Spill], theirs: list[Spill]) -> float:
    return median_ratio((each.seconds for each in theirs), (each.seconds for each in mine))


def spill_rows(results: dict[str, list[Spill]]) -> list[list[str]]:
    """Figures of the spills, and their goals."""
    rows = [["", "MiB/s", "peak in RAM, MiB: median, most", "longest write, ms: median, most", "speed, ratio"]]
    for way, runs in results.items():
        speed = statistics.median(TOTAL / MIB / each.seconds for each in runs)
        peaks, worst = [each.peak / MIB for each in runs], [each.worst for each in runs]
        peak = f"{statistics.median(peaks):.0f}, {max(peaks):.0f}"
        longest = f"{statistics.median(worst):.1f}, {max(worst):.1f}"
        ratio = _speed_ratio(runs, results[UNLIMITED])
        share = f"{ratio:.2f}"
        if way == LIMITED:
            peak = verdict(peak, "128", max(peaks) <= 128)
            longest = verdict(longest, "50", max(worst) < 50)
            share = verdict(share, "at least 0.6", ratio >= 0.6)
        rows.append([way, f"{speed:.0f}", peak, longest, share])
    return rows


def group_rows(results: dict[str, list[Spill]]) -> list[list[str]]:
    """Figures of the spills in the cgroup; a killed one has none."""
    rows = [["", "killed", "MiB/s", "longest write, ms: median, most", "speed, of mmap's"]]
    for way, runs in results.items():
        killed = f"{sum(each.status != 0 for each in runs)} of {len(runs)}"
        pairs = [(a, b) for a, b in zip(runs, results[MMAP], strict=True) if a.status == b.status == 0]
        done = [each for each in runs if each.status == 0]
        if not done:
            rows.append([way, killed, "", "", ""])
            continue
        speed = statistics.median(TOTAL / MIB / each.seconds for each in done)
        worst = [each.worst for each in done]
        share = "" if not pairs else f"{(ratio := _speed_ratio(*map(list, zip(*pairs, strict=True)))):.2f}"
        if way == LIMITED:
            killed = verdict(killed, "0", len(done) == len(runs))
            if pairs:
                share = verdict(share, "at least 1.3", ratio >= 1.3)
        rows.append([way, killed, f"{speed:.0f}", f"{statistics.median(worst):.1f}, {max(worst):.1f}", share])
    return rows


def plot(results: dict[str, list[Spill]], stem: Path) -> None:
    """Draw RAM over time, every run."""
    with picture(stem, 1, 1, (8, 4.5)) as (_, (panel,)):
        for (way, runs), colour in zip(results.items(), ("C0", "C1"), strict=True):
            for number, each in enumerate(runs):
                times, sizes = zip(*each.samples, strict=True)
                label = way if number == 0 else None
                panel.plot(times, [size / MIB for size in sizes], color=colour, alpha=0.6, linewidth=1, label=label)
        panel.axhline(128, color="grey", linestyle=":", label="128 MiB")
        panel.set(title="Spilling 2 GiB", xlabel="seconds", ylabel="RSS growth + resident file pages, MiB")
        panel.set_yscale("log")
        panel.set_ylim(bottom=8)
        panel.legend()


def main() -> int:
    if sys.argv[1:2] == ["--spill"]:
        way, path, group = sys.argv[2:]
        spill(way, Path(path), group)
        return 0
    options = parse(argparse.ArgumentParser(description="Measure RAM."), "ram", rounds=15, quick=5)
    rounds = options.rounds

    warm_up()
    group: dict[str, list[Spill]] = {}
    reason = ""
    with empty_directory(options.directory) as directory:
        facts = environment(directory)
        back = restores(directory, rounds)
        free = spills(directory, rounds)
        try:
            group = short_of_ram(directory, rounds)
        except OSError as error:
            reason = str(error)

    parts = [
        "# RAM",
        f"Medians of {rounds} interleaved rounds; `make bench-ram{' ARGS=--quick' if options.quick else ''}`.",
        bullets(facts),
        "## Spilling 2 GiB in values of 1 MiB",
        table(spill_rows(free)),
        "## The same in a memory cgroup of 384 MiB, beside slices of a mapping of a sparse file",
        table(group_rows(group)) if group else f"Skipped: {reason}.",
        "## Cold values back into RAM",
        table([back.header(), back.cells()]),
    ]
    figures = {
        "environment": facts,
        "rounds": rounds,
        "spill": {way: [_as_json(each) for each in runs] for way, runs in free.items()},
        "cgroup": {way: [_as_json(each) for each in runs] for way, runs in group.items()} or f"skipped: {reason}",
        "restore": back.as_json(),
    }
    text = save(options.stem, parts, figures)
    plot(free, options.stem)
    print(text)
    return 0


def _as_json(each: Spill) -> dict[str, float]:
    facts = {"status": each.status, "seconds": round(each.seconds, 4), "longest_write_ms": round(each.worst, 2)}
    return facts | ({"peak_bytes": each.peak} if each.samples else {})


if __name__ == "__main__":
    sys.exit(main())
