"""What a reservation costs, beside counters behind a lock: one thread, eight threads, two processes, and from C.

    python benchmarks/governor.py [--quick] [--directory DIR] [--output DIR]

The rivals take turns, round by round in one process. Needs gcc.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pages import (
    bullets,
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

import nodedb_mem
from nodedb_mem import EngineId, MemoryGovernor

PAIRS = 20_000
THREADS = 8
SIZE = 4096
LIMIT = 1 << 28
SNAPSHOTS = 500

Pair = Callable[[], object]


class Naive:
    """A counter behind a lock."""

    def __init__(self) -> None:
        self.lock, self.used, self.limit = threading.Lock(), 0, LIMIT

    def reserve(self, size: int) -> bool:
        with self.lock:
            if self.used + size <= self.limit:
                self.used += size
                return True
        return False

    def release(self, size: int) -> None:
        with self.lock:
            self.used -= size


class NaiveShared(Naive):
    """The same for several processes: `multiprocessing.Value`."""

    def __init__(self) -> None:
        self.value, self.limit = multiprocessing.Value("q", 0), LIMIT

    def reserve(self, size: int) -> bool:
        value = self.value
        with value.get_lock():
            if value.value + size <= self.limit:
                value.value += size
                return True
        return False

    def release(self, size: int) -> None:
        with self.value.get_lock():
            self.value.value -= size


def pairs_of(directory: Path) -> dict[str, Pair]:
    limits = dict.fromkeys((EngineId.VECTOR, EngineId.QUERY, EngineId.WAL), LIMIT)
    private = MemoryGovernor(4 * LIMIT, limits)
    shared = MemoryGovernor.shared(directory / "governor", 4 * LIMIT, limits)
    naive, naive_shared = Naive(), NaiveShared()

    def governed(governor: MemoryGovernor) -> Pair:
        def pair() -> None:
            reserve = governor.reserve
            for _ in range(PAIRS):
                reserve(EngineId.VECTOR, SIZE).release()

        return pair

    def locked(rival: Naive) -> Pair:
        def pair() -> None:
            reserve, release = rival.reserve, rival.release
            for _ in range(PAIRS):
                reserve(SIZE)
                release(SIZE)

        return pair

    def snapshots() -> None:
        for _ in range(SNAPSHOTS):
            private.snapshot()

    return {
        "governor": governed(private),
        "lock": locked(naive),
        "governor, shared": governed(shared),
        "multiprocessing.Value": locked(naive_shared),
        "snapshot": snapshots,
    }


def alone(pair: Pair, clock: Callable[[], int] = time.perf_counter_ns) -> float:
    start = clock()
    pair()
    return (clock() - start) / PAIRS


def in_processor_time(pair: Pair) -> float:
    return alone(pair, time.thread_time_ns)


def together(pair: Pair) -> float:
    """Nanoseconds a pair, by all threads."""
    barrier = threading.Barrier(THREADS + 1)

    def run() -> None:
        barrier.wait()
        pair()

    threads = [threading.Thread(target=run) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    barrier.wait()
    start = time.perf_counter_ns()
    for thread in threads:
        thread.join()
    return (time.perf_counter_ns() - start) / PAIRS / THREADS


def measure(rounds: int, directory: Path) -> dict[str, dict[str, list[float]]]:
    """Nanoseconds a pair, for each way and rival a figure a round."""
    pairs = pairs_of(directory)
    figures: dict[str, dict[str, list[float]]] = {
        "one thread": {name: [] for name in pairs},
        "eight threads": {name: [] for name in ("governor", "lock")},
    }
    ways = {"one thread": alone, "eight threads": together}
    for number in range(-1, rounds):  # one to warm up
        turns = [(way, name) for way, rivals in figures.items() for name in rivals]
        random.Random(number).shuffle(turns)
        for way, name in turns:
            is_snapshot = name == "snapshot"
            taken = in_processor_time(pairs[name]) * PAIRS / SNAPSHOTS if is_snapshot else ways[way](pairs[name])
            if number >= 0:
                figures[way][name].append(taken)
    return figures


def from_c(directory: Path, pairs: int) -> dict[str, float]:
    """Nanoseconds a pair, as governor_pairs.c prints them: medians of seven rounds."""
    program = directory / "governor_pairs"
    (libraries,) = nodedb_mem.get_library_dirs()
    source = Path(__file__).parent / "native" / "governor_pairs.c"
    flags = ["-O2", f"-I{nodedb_mem.get_include()}", f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-pthread"]
    names = [f"-l{name}" for name in nodedb_mem.get_libraries()]
    subprocess.run(["gcc", "-std=c11", str(source), *flags, *names, "-o", str(program)], check=True)
    command = [str(program), str(directory / "pairs"), str(pairs)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return {name: float(figure) for name, figure in (line.split() for line in done.stdout.splitlines())}


def page(figures: dict[str, Any], native: dict[str, float], facts: dict[str, str], rounds: int) -> list[str]:
    """Lay everything out in Markdown."""
    one, eight = figures["one thread"], figures["eight threads"]
    rows = [["reserve and release, from Python", "ns a pair", "rival's ns", "ratio of times"]]
    for label, mine, rival, by, goal in (
        ("one thread, beside a lock", "governor", "lock", one, 1.0),
        ("eight threads, beside a lock", "governor", "lock", eight, 0.5),
        ("shared, beside multiprocessing.Value", "governor, shared", "multiprocessing.Value", one, None),
    ):
        ratio = median_ratio(by[mine], by[rival])
        shown = f"{ratio:.2f}" if goal is None else verdict(f"{ratio:.2f}", f"at most {goal}", ratio <= goal)
        rows.append([label, f"{statistics.median(by[mine]):.0f}", f"{statistics.median(by[rival]):.0f}", shown])
    c_rows = [["reserve and release, from C", "ns a pair"]]
    for name, goal in (("private", 60), ("private-1MiB", 60), ("shared", 120)):
        c_rows.append([name, verdict(f"{native[name]:.1f}", f"at most {goal}", native[name] <= goal)])
    for name in ("two-processes-one-engine", "two-processes-two-engines"):
        rate = native["shared"] / native[name]
        each = verdict(f"each has {rate:.2f} of one process's rate", "at least 0.5", rate >= 0.5)
        c_rows.append([name, f"{native[name]:.1f}; {each}"])
    snapshot = statistics.median(one["snapshot"]) / 1000
    shot = verdict(f"{snapshot:.1f} µs", "at most 20", snapshot <= 20)
    rival = (
        "The lock is the rival of one layer: `with lock: if used + size <= limit: used += size`, and the same for the "
        "release. The governor checks the engine's limit, the ceiling and the headroom, keeps peaks, and returns an "
        "object that gives the bytes back by itself."
    )
    how = (
        f"Medians of {rounds} interleaved rounds of {PAIRS} pairs of {SIZE} bytes each, from Python. Medians of seven "
        "rounds from C, in processor time, which other programs on the machine do not change."
    )
    return [
        "# What a reservation costs",
        how,
        bullets(facts),
        table(rows),
        table(c_rows),
        f"A snapshot of three engines takes {shot}, in processor time.",
        rival,
    ]


def plot(figures: dict[str, Any], native: dict[str, float], stem: Path) -> None:
    """Draw a bar for each rival, and the figures from C."""
    with picture(stem, 1, 2, (10, 3.6)) as (figure, (python, c)):
        places = list(figures)
        grouped_bars(
            python,
            places,
            {name: [statistics.median(figures[way][name]) for way in places] for name in ("governor", "lock")},
        )
        python.legend(frameon=False)
        python.set(ylabel="ns a pair", title="from Python")
        grouped_bars(c, [name.replace("-", "\n") for name in native], {"governor": list(native.values())})
        c.tick_params(axis="x", labelsize=7)
        c.set_title("from C")
        figure.suptitle("Reserve and release; lower is better")


def main() -> int:
    parser = argparse.ArgumentParser(description="What a reservation costs, beside counters behind a lock.")
    options = parse(parser, "governor", rounds=31, quick=7)
    with empty_directory(options.directory) as directory:
        facts = environment(directory)
        figures = measure(options.rounds, directory)
        native = from_c(directory, 200_000 if options.quick else 2_000_000)
    raw = {"environment": facts, "rounds": options.rounds, "python_ns": figures, "c_ns": native}
    print(save(options.stem, page(figures, native, facts, options.rounds), raw))
    plot(figures, native, options.stem)
    return 0


if __name__ == "__main__":
    sys.exit(main())
