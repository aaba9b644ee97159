"""What each verb costs a value as the values grow many.

    make bench-scale [ARGS=--quick]
    python benchmarks/scale.py [--quick] [--directory DIR] [--output DIR] [--native PROGRAM]

Each case runs in a process of its own: a C program that calls the core and nothing else. The cases take turns, round by
round; a figure is the median over the rounds. The full form needs 20 GB of disk and 8 GB of RAM, page cache included.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_region import MIB, clean
from pages import bullets, digits, empty_directory, environment, parse, picture, save, table, verdict

PROGRAM = Path(__file__).parent.parent / "build" / "bench" / "scale"
GOAL = 2.0  # most growth of a cost from the least to the most values, in RAM
NO_LIMIT, LIMIT = -1, 256 * MIB

STEPS = {
    "write": "write: `ndm_region_write` into a new region, growth of the file and of the tables included",
    "read": "read: `ndm_region_read_into` at random, of at most 2,000,000 small or 512 large values",
    "memcpy": "memcpy: the same copies out of a mapping of the file, without the region; what the machine itself costs",
    "free": "free: `ndm_region_free` of half of the values, at random",
    "rewrite": "rewrite: as many writes into the space that became free",
    "compact": "compact: half of the values are freed at random, then one call without a budget; a value that lives",
    "close": "close: `ndm_region_destroy`; a value that lives",
    "recover": "recover: opening with `recover` set, after the close; a value that lives",
    "reader": "reader, µs: a reader's opening, its first look, and its close, in microseconds, not a value",
    "bookkeeping": "bookkeeping, bytes: private memory and the slot table's blocks, after the writes",
}
FREE_OF_GOAL = ("memcpy", "reader", "bookkeeping")  # the machine's, not by value, bytes


@dataclass
class Case:
    """A region of so many values: for each step a figure a round."""

    label: str
    size: int
    count: int
    limit: int
    rounds: dict[str, list[float]] = field(default_factory=dict)

    def run(self, program: Path, directory: Path) -> None:
        command = [program, directory, str(self.size), str(self.count), str(self.limit)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        for line in done.stdout.splitlines():
            step, figure = line.split()
            self.rounds.setdefault(step, []).append(float(figure))
        clean(directory)

    def median(self, step: str) -> float:
        return statistics.median(self.rounds[step])


def cases(quick: bool, only: str | None) -> dict[str, list[Case]]:
    """Small values without a limit, so that all stay in RAM, and large ones under the default limit."""
    share = 32 if quick else 1
    families = {
        "Values of 100 bytes, no cache limit": [
            Case(f"{millions / share:.3g} M", 100, millions * 1_000_000 // share, NO_LIMIT) for millions in (1, 8, 32)
        ],
        "Values of 1 MiB, cache limit of 256 MiB": [
            Case(f"{1024 * gib // share} MiB", MIB, 1024 * gib // share, LIMIT) for gib in (1, 4, 16)
        ],
    }
    wanted = {"small": 100, "large": MIB}.get(only or "")
    return {title: family for title, family in families.items() if wanted in (None, family[0].size)}


def rows(family: list[Case], goal: bool) -> list[list[str]]:
    """A row for each step; the last column is the growth from the first case to the last."""
    found = [["ns a value", *(case.label for case in family), "growth"]]
    for step, meaning in STEPS.items():
        if step not in family[0].rounds:
            continue
        medians = [case.median(step) for case in family]
        growth = medians[-1] / medians[0] if medians[0] else 1.0
        text = f"{growth:.2f}"
        if goal and step not in FREE_OF_GOAL:
            text = verdict(text, f"{GOAL:g}", growth <= GOAL)
        found.append([meaning.partition(":")[0], *map(digits, medians), text])
    return found


def page(results: dict[str, list[Case]], facts: dict[str, str], rounds: int, quick: bool) -> list[str]:
    """Lay everything out in Markdown."""
    command = f"make bench-scale{' ARGS=--quick' if quick else ''}"
    parts = [
        "# Cost against count",
        f"Nanoseconds a value, medians of {rounds} rounds; `{command}`. Growth: the most values over the least.",
        bullets(facts),
    ]
    for title, family in results.items():
        parts += [f"## {title}", table(rows(family, goal=family[0].limit == NO_LIMIT))]
    return [*parts, "\n".join(f"- {meaning}" for meaning in STEPS.values())]


def plot(results: dict[str, list[Case]], stem: Path) -> None:
    """Draw the cost over the count, a panel for each size."""
    with picture(stem, 1, len(results), (12, 5)) as (figure, panels):
        for panel, (title, family) in zip(panels, results.items(), strict=True):
            for step in STEPS:
                if step not in ("reader", "bookkeeping") and step in family[0].rounds:
                    dashed = {"linestyle": ":", "color": "grey"} if step == "memcpy" else {}
                    costs = [case.median(step) for case in family]
                    panel.plot([case.count for case in family], costs, marker="o", label=step, **dashed)
            panel.set(xscale="log", yscale="log", title=title, xlabel="values", ylabel="ns a value")
            panel.set_xticks([case.count for case in family], [case.label for case in family])
            panel.xaxis.minorticks_off()
            panel.grid(alpha=0.3)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False)


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what each verb costs as the values grow many.")
    parser.add_argument("--native", type=Path, default=PROGRAM, help="the C program (default: %(default)s)")
    parser.add_argument("--only", choices=("small", "large"), help="the small values alone, or the large ones")
    options = parse(parser, "scale", rounds=3, quick=1)
    if not options.native.exists():
        sys.exit(f"{options.native} is not there: run `make bench-scale`, which builds it")
    results = cases(options.quick, options.only)
    with empty_directory(options.directory) as directory:
        facts = environment(directory)
        for _ in range(options.rounds):
            for family in results.values():
                for case in family:
                    print(f"{case.count} values of {case.size} bytes", file=sys.stderr)
                    case.run(options.native, directory)
    figures: dict[str, Any] = {
        title: {case.label: {"bytes": case.size, "values": case.count} | case.rounds for case in family}
        for title, family in results.items()
    }
    text = save(
        options.stem,
        page(results, facts, options.rounds, options.quick),
        {"environment": facts, "rounds": options.rounds} | figures,
    )
    plot(results, options.stem)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
