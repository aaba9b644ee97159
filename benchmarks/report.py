"""Compare the region with its rivals, interleaved, and write a table.

    python benchmarks/report.py [--quick] [--directory DIR] [--output DIR]

The rivals take turns, pass by pass in one process, so that what else the machine does hits all of them. A figure is
the median over the rounds; a ratio is the median of the ratios within each round.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_region import OPERATIONS, RIVALS, WORKLOADS, Operation, Workload, cells, clean, start
from pages import bullets, empty_directory, environment, hundredths, median_ratio, parse, picture, save, table
from rich.console import Console
from rich.progress import track

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
        return median_ratio(self.rounds[UNDER_TEST], self.rounds[rival])

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
        for operation in (each for each in OPERATIONS if each.count(workload) > 0):
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


def page(results: list[Cell], facts: dict[str, str], rounds: int) -> list[str]:
    """Lay the figures out in Markdown."""
    others = [rival for rival in RIVALS if rival != UNDER_TEST]
    header = ["operation", "size", *RIVALS, *(f"{UNDER_TEST}/{rival}" for rival in others)]
    rows = [
        [
            cell.operation.label,
            cell.workload.label,
            *(_figure(cell, rival) for rival in RIVALS),
            *(hundredths(cell.ratio(rival)) for rival in others),
        ]
        for cell in results
    ]
    notes = [
        *(f"- {operation.label}: {operation.meaning}" for operation in OPERATIONS),
        "- region: `cache_limit=None, keep_mapped=True`, as the others have no limit; limited: the default of 256 MiB",
        "- twin: `benchmarks/twin.py`, the same promises in pure Python; mmap: slices of a mapping, no promises",
    ]
    return [
        "# Region, twin and bare mmap",
        f"Time per operation, medians of {rounds} interleaved rounds. A ratio below 1: the region is faster.",
        bullets(facts),
        table([header, *rows]),
        "\n".join(notes),
    ]


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


def plot(results: list[Cell], stem: Path) -> None:
    """Draw the time of an operation over the size, a panel for each operation."""
    operations = list(dict.fromkeys(cell.operation for cell in results))
    with picture(stem, 2, (len(operations) + 1) // 2, (12, 7)) as (figure, panels):
        for panel, operation in zip(panels, operations, strict=False):
            mine = [cell for cell in results if cell.operation == operation]
            for rival in RIVALS:
                times = [cell.median(rival) / 1e3 for cell in mine]
                width = 2.4 if rival == UNDER_TEST else 1.2
                panel.plot([cell.workload.size for cell in mine], times, marker="o", linewidth=width, label=rival)
            panel.set(xscale="log", yscale="log", title=operation.label, ylabel="µs")
            panel.set_xticks([cell.workload.size for cell in mine], [cell.workload.label for cell in mine], fontsize=8)
            panel.xaxis.minorticks_off()
            panel.grid(alpha=0.3)
        for panel in panels[len(operations) :]:
            panel.set_visible(False)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        figure.suptitle("Time of an operation by size of the value; lower is better")


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the region with a pure-Python twin and with bare mmap.")
    options = parse(parser, "region", rounds=45, quick=9)
    with empty_directory(options.directory) as directory:
        facts = environment(directory)
        results = measure(options.rounds, directory)
    figures = {"environment": facts, "rounds": options.rounds, "cells": [cell.as_json() for cell in results]}
    print(save(options.stem, page(results, facts, options.rounds), figures))
    plot(results, options.stem)
    return 0


if __name__ == "__main__":
    sys.exit(main())
