"""Cold and warm writes beside plain copies, from C and from Python, and the price of opening a region.

    make bench-write [ARGS=--quick]
    python benchmarks/write_path.py [--quick] [--directory DIR] [--output DIR] [--native PROGRAM]

The rivals take turns, pass by pass on fresh files. A figure is the median over the rounds; a ratio is the median of
the ratios within each round. A goal that is missed is marked as such.
"""

from __future__ import annotations

import argparse
import gc
import mmap
import os
import random
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_region import KIB, MIB, MmapSubject, RegionSubject, Workload, clean
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
from twin import TwinRegion

from nodedb_mem import OverflowRegion

PROGRAM = Path(__file__).parent.parent / "build" / "bench" / "region_writes"
WARM_UP = 6 << 30  # bytes

WORKLOADS = tuple(
    Workload(label, size, values=min(64 * MIB // size, 65_536), live=1, views=1, copies=1)
    for label, size in (
        ("64 B", 64),
        ("4 KiB", 4 * KIB),
        ("16 KiB", 16 * KIB),
        ("64 KiB", 64 * KIB),
        ("1 MiB", MIB),
        ("16 MiB", 16 * MIB),
    )
)
LABELS = {workload.size: workload.label for workload in WORKLOADS}


@dataclass
class Figures:
    """Samples of one figure: a list for each rival, a sample a round."""

    title: str
    unit: str
    under_test: str
    goals: dict[str, float] = field(default_factory=dict)  # most time, in units of the rival's
    samples: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def median(self, rival: str) -> float:
        return statistics.median(self.samples[rival])

    def ratio(self, rival: str) -> float:
        """Time of the subject in units of the rival's: below 1 it is faster."""
        return median_ratio(self.samples[self.under_test], self.samples[rival])

    @property
    def rivals(self) -> list[str]:
        return [rival for rival in self.samples if rival != self.under_test]

    def as_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "unit": self.unit,
            "medians": {name: round(self.median(name), 3) for name in self.samples},
            "ratio_to": {rival: round(self.ratio(rival), 3) for rival in self.rivals},
            "goals": self.goals,
            "samples": {name: [round(sample, 3) for sample in samples] for name, samples in self.samples.items()},
        }

    def cells(self) -> list[str]:
        """Title, medians, ratios with their goals: a row of a table."""
        ratios = []
        for rival in self.rivals:
            text = f"{self.ratio(rival):.2f}"
            if rival in self.goals:
                text = verdict(text, f"{self.goals[rival]:g}", self.ratio(rival) <= self.goals[rival])
            ratios.append(text)
        return [self.title, *(digits(self.median(name)) for name in (self.under_test, *self.rivals)), *ratios]

    def header(self) -> list[str]:
        names = (self.under_test, *self.rivals)
        return ["", *(f"{name}, {self.unit}" for name in names), *(f"{self.under_test}/{r}" for r in self.rivals)]


def warm_up() -> None:
    """Touch memory: the first touch of a virtual machine's page is slow, and would count as the first rival's."""
    with mmap.mmap(-1, WARM_UP) as area:
        area[:: mmap.PAGESIZE] = bytes(WARM_UP // mmap.PAGESIZE)


# ---- from C -----------------------------------------------------------------------------------------------------


def from_c(program: Path, directory: Path, rounds: int) -> dict[str, list[Figures]]:
    """Run the C program, and sort its samples."""
    if not program.exists():
        sys.exit(f"{program} is not there: run `make bench-write`, which builds it")
    found: dict[tuple[str, int], Figures] = {}
    run = subprocess.run([program, directory, str(rounds)], check=True, capture_output=True, text=True)
    for line in run.stdout.splitlines():
        what, size, rival, figure = line.split()
        key = what, int(size)
        if key not in found:
            found[key] = _figures_of_c(*key)
        found[key].samples[rival].append(float(figure))
    return {
        "cold": [figures for (what, _), figures in found.items() if what == "cold"],
        "warm": [figures for (what, _), figures in found.items() if what == "warm"],
        "price": [figures for (what, _), figures in found.items() if what not in ("cold", "warm")],
    }


def _figures_of_c(what: str, size: int) -> Figures:
    if what == "cold":
        return Figures(LABELS[size], "µs/MiB", "region", {"memcpy": 0.5})
    if what == "warm":
        goal = 0.75 if "avx512f" in Path("/proc/cpuinfo").read_text() else 1.0
        return Figures(LABELS[size], "µs/MiB", "region", {"memcpy": goal} if size == MIB else {})
    titles = {"open": "open", "first": "first write of 64 B", "second": "second write of 64 B", "close": "close"}
    return Figures(titles[what], "µs", "region")


# ---- from Python ------------------------------------------------------------------------------------------------


class SparseSubject(MmapSubject):
    """Slice assignment to a mapping of a file whose blocks come as they are touched."""

    extend = staticmethod(os.ftruncate)


SUBJECTS: dict[str, Callable[[Path, Workload], Any]] = {
    "region": lambda directory, workload: RegionSubject(OverflowRegion, directory, workload),
    "twin": lambda directory, workload: RegionSubject(TwinRegion, directory, workload),
    "mmap": SparseSubject,
    "mmap, allocated": MmapSubject,
}


def from_python(directory: Path, rounds: int) -> list[Figures]:
    """Cold writes: a pass fills a fresh file with values of one size; what opens it is not timed."""
    goals = {workload: {"twin": 1.0} | ({"mmap": 0.6} if workload.size >= 4 * KIB else {}) for workload in WORKLOADS}
    results = {w: Figures(w.label, "µs/MiB", "region", goals[w]) for w in WORKLOADS}
    for workload in WORKLOADS:
        for rival in SUBJECTS:
            results[workload].samples[rival] = []
    names = list(SUBJECTS)
    for number in range(rounds + 1):
        for workload in WORKLOADS:
            random.shuffle(names)  # each meets what any other leaves behind, free pages in large or small pieces
            for name in names:
                subject = SUBJECTS[name](directory, workload)
                gc.collect()
                gc.disable()
                begin = time.perf_counter_ns()
                subject.write()
                elapsed = time.perf_counter_ns() - begin
                gc.enable()
                subject.close()
                clean(directory)
                if number:
                    results[workload].samples[name].append(elapsed / 1e3 / (workload.total / MIB))
    return list(results.values())


def prices(directory: Path, rounds: int) -> list[Figures]:
    """Open, write 64 B, close: a new region each time, and one on a file that is there."""
    steps = ("open", "first write of 64 B", "second write of 64 B", "close")
    results = [Figures(step, "µs", "region") for step in steps]
    path, data = directory / "price", random.randbytes(64)

    def play(kind: type[Any]) -> Iterator[int]:
        yield time.perf_counter_ns()
        region = kind.open(path)
        yield time.perf_counter_ns()
        region.write(data, 1)
        yield time.perf_counter_ns()
        region.write(data, 1)
        yield time.perf_counter_ns()
        region.close()
        yield time.perf_counter_ns()

    for number in range(20 * rounds + 1):
        for name, kind in (("region", OverflowRegion), ("twin", TwinRegion)):
            moments = list(play(kind))
            clean(directory)
            for i, figures in enumerate(results):
                if number:
                    figures.samples[name].append((moments[i + 1] - moments[i]) / 1e3)
    return results


# ---- the report -------------------------------------------------------------------------------------------------

SECTIONS = {
    "cold": "Cold writes from C: `ndm_region_write` and memcpy into a fresh sparse shared mapping",
    "python": "Cold writes from Python: the region, the twin, slices of a sparse and of an allocated mapping",
    "warm": "Warm writes from C: free and write again, and memcpy between two warm buffers of 256 MiB",
    "price": "The price, from C: a new region, and a new sparse file with its mapping",
    "python price": "The price, from Python: a new region, and a new twin",
}


def page(results: dict[str, list[Figures]], facts: dict[str, str], rounds: int) -> list[str]:
    """Lay everything out in Markdown."""
    parts = [
        "# The write path",
        f"Medians of {rounds} interleaved rounds; `benchmarks/write_path.py`. A ratio below 1: the region is faster.",
        bullets(facts),
    ]
    for key, title in SECTIONS.items():
        rows = [results[key][0].header(), *(figures.cells() for figures in results[key])]
        parts += [f"## {title}", table(rows)]
    return parts


def plot(results: dict[str, list[Figures]], stem: Path) -> None:
    """Draw the cold writes, C above Python."""
    with picture(stem, 2, 1, (8, 7)) as (_, panels):
        for panel, key, where in zip(panels, ("cold", "python"), ("C", "Python"), strict=True):
            first = results[key][0]
            names = (first.under_test, *first.rivals)
            medians = {name: [each.median(name) for each in results[key]] for name in names}
            grouped_bars(panel, [each.title for each in results[key]], medians)
            panel.set(title=f"Cold writes from {where}", ylabel="µs per MiB, log scale", yscale="log")
            panel.legend()


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the ways into a region.")
    parser.add_argument("--native", type=Path, default=PROGRAM, help="the C program (default: %(default)s)")
    options = parse(parser, "write-path", rounds=31, quick=9)
    rounds = options.rounds

    warm_up()
    with empty_directory(options.directory) as directory:
        facts = environment(directory)
        results = from_c(options.native, directory, rounds)
        results["python"] = from_python(directory, rounds)
        results["python price"] = prices(directory, rounds)

    figures = {key: [each.as_json() for each in results[key]] for key in SECTIONS}
    text = save(options.stem, page(results, facts, rounds), {"environment": facts, "rounds": rounds} | figures)
    plot(results, options.stem)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
