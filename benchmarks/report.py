"""Compare the region with its rivals, interleaved, and write a table.

    python benchmarks/report.py [--quick] [--directory DIR] [--output DIR]

The rivals take turns, pass by pass in one process, so that what else the machine does hits all of them. A figure is
the median over the rounds; a ratio is the median of the ratios within each round.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from bench_region import OPERATIONS, RIVALS, WORKLOADS, Operation, Workload, cells, clean, start
from rich.console import Console
from rich.progress import track

ROUNDS, ROUNDS_QUICK = 45, 9
UNDER_TEST = "region"


@dataclass(frozen=True)
class Cell:
    """One operation at one size: nanoseconds per operation, for each rival a figure a round."""

    workload: Workload
    operation: Operation
    rounds: dict[str, list[float]]

    def median(self, rival: str) -> float:
        """Nanoseconds per operation."""
        return statistics.median(self.rounds[rival])

    def ratio(self, rival: str) -> float:
        """Time of the region in units of the rival's: below 1 the region is faster."""
        pairs = zip(self.rounds[UNDER_TEST], self.rounds[rival], strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    def as_json(self) -> dict[str, Any]:
        """Return the cell as the JSON file has it."""
        return {
            "operation": self.operation.label,
            "bytes": self.workload.size,
            "operations_per_pass": self.operation.count(self.workload),
            "ns_per_operation": {rival: round(self.median(rival), 1) for rival in RIVALS},
            "ratio_to": {rival: round(self.ratio(rival), 3) for rival in RIVALS if rival != UNDER_TEST},
            "rounds_ns_per_operation": {
                rival: [round(figure, 1) for figure in figures] for rival, figures in self.rounds.items()
            },
        }


def measure(rounds: int, directory: Path) -> list[Cell]:
    """Run all passes; one round more than asked for, whose figures are dropped."""
    results = {
        (operation, workload): Cell(workload, operation, {rival: [] for rival in RIVALS})
        for operation, workload in cells()
    }
    rivals = list(RIVALS)
    for number in _progress(range(rounds + 1)):
        for workload in WORKLOADS:
            for rival, operation, nanoseconds in _play(rivals, directory, workload):
                if number and (operation, workload) in results:
                    results[operation, workload].rounds[rival].append(nanoseconds)
        rivals.append(rivals.pop(0))  # each goes first in turn
    return list(results.values())


def _play(rivals: list[str], directory: Path, workload: Workload) -> Iterator[tuple[str, Operation, float]]:
    """One round: each rival on a fresh file of its own, operation by operation."""
    subjects = {rival: start(rival, directory, workload) for rival in rivals}
    try:
        for operation in OPERATIONS:
            for rival, subject in subjects.items():
                play = getattr(subject, operation.method)
                gc.collect()
                gc.disable()
                try:
                    begin = time.perf_counter_ns()
                    play()
                    elapsed = time.perf_counter_ns() - begin
                finally:
                    gc.enable()
                yield rival, operation, elapsed / operation.count(workload)
    finally:
        for subject in subjects.values():
            subject.close()
        clean(directory)


def _progress(rounds: Iterable[int]) -> Iterable[int]:
    console = Console(stderr=True)
    return track(rounds, "rounds", console=console) if console.is_terminal else rounds


def environment(directory: Path) -> dict[str, str]:
    """What the figures depend on."""
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("nodedb-mem", "cffi"))
    return {
        "kernel": f"{platform.system()} {platform.release()}",
        "file system": _file_system(directory),
        "CPU": f"{_processor()}, {len(os.sched_getaffinity(0))} usable",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": packages,
    }


def _file_system(directory: Path) -> str:
    """Type of the file system that holds a directory."""
    best = ("", "unknown")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        where, _, what = line.partition(" - ")
        point = where.split()[4]
        if directory.resolve().is_relative_to(point) and len(point) >= len(best[0]):
            best = (point, what.split()[0])
    return best[1]


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def table(results: list[Cell], facts: dict[str, str], rounds: int) -> str:
    """Lay the figures out in Markdown."""
    others = [rival for rival in RIVALS if rival != UNDER_TEST]
    header = ["operation", "size", *RIVALS, *(f"{UNDER_TEST}/{rival}" for rival in others)]
    rows = [
        [
            cell.operation.label,
            cell.workload.label,
            *(_figure(cell, rival) for rival in RIVALS),
            *(_ratio(cell.ratio(rival)) for rival in others),
        ]
        for cell in results
    ]
    lines = [
        "# Region, twin and bare mmap",
        "",
        f"Time per operation, medians of {rounds} interleaved rounds. A ratio below 1: the region is faster.",
        "",
        *(f"- {name}: {fact}" for name, fact in facts.items()),
        "",
        *_aligned([header, *rows]),
        "",
        *(f"- {operation.label}: {operation.meaning}" for operation in OPERATIONS),
        "- region: `cache_limit=None`, as the others have no limit; limited: the default of 256 MiB",
        "- twin: `benchmarks/twin.py`, the same promises in pure Python; mmap: slices of a mapping, no promises",
        "",
    ]
    return "\n".join(lines)


def _figure(cell: Cell, rival: str) -> str:
    nanoseconds = cell.median(rival)
    for unit, scale in (("ms", 1e6), ("µs", 1e3), ("ns", 1.0)):
        if nanoseconds >= scale or unit == "ns":
            figure = nanoseconds / scale
            break
    text = f"{figure:.{0 if figure >= 100 or unit == 'ns' else 1 if figure >= 10 else 2}f} {unit}"
    if cell.operation.copies and cell.workload.size >= 4096:
        text += f" ({cell.workload.size / nanoseconds:.1f} GB/s)"
    return text


def _ratio(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def _aligned(rows: list[list[str]]) -> Iterator[str]:
    """Rows of a Markdown table, the first one its header; figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, row in enumerate(rows):
        padded = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield f"| {' | '.join(padded)} |"
        if number == 0:
            rules = ("-" * width if column == 0 else "-" * (width - 1) + ":" for column, width in enumerate(widths))
            yield f"| {' | '.join(rules)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the region with a pure-Python twin and with bare mmap.")
    parser.add_argument("--quick", action="store_true", help=f"{ROUNDS_QUICK} rounds instead of {ROUNDS}")
    parser.add_argument("--rounds", type=int, help="rounds to take the medians of")
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path(),
        help="where the files are made: its file system is what is measured (default: the current directory)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder for the table (Markdown) and the figures (JSON)",
    )
    options = parser.parse_args()
    rounds = options.rounds or (ROUNDS_QUICK if options.quick else ROUNDS)
    if rounds < 1:
        parser.error("--rounds must be positive")
    if not options.directory.is_dir():
        parser.error(f"--directory: {options.directory} is not a directory")

    with tempfile.TemporaryDirectory(dir=options.directory.resolve(), prefix=".bench-") as name:
        directory = Path(name)
        facts = environment(directory)
        results = measure(rounds, directory)
    text = table(results, facts, rounds)
    figures = {"environment": facts, "rounds": rounds, "cells": [cell.as_json() for cell in results]}

    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / ("region-quick" if options.quick else "region")
    stem.with_suffix(".md").write_text(text)
    stem.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
