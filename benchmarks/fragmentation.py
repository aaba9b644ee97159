"""How much space a region needs beyond its live values, and what a free + write pair costs.

    python benchmarks/fragmentation.py [--quick] [--as-published] [--jobs N] [--output DIR]

The workloads are those of Stephen M. Rumble, Ankita Kejriwal and John Ousterhout, "Log-structured Memory for
DRAM-based Storage", FAST '14, Table 1. What could be confirmed: the paper itself could not be fetched. All eight rows
agree with the restatement in PMDK's test obj_fragmentation.c, which cites the paper ("before", share deleted, "after",
for W1 nothing after). That test and a published summary of the paper both say that phase 1 and phase 3 *each* write
five times the live bytes; here 5 L are written in all, of which the fill is the first L. `--as-published` writes 5 L
in each phase.

benchmarks/native/replay.c replays the same trace on each allocator and explains what is measured. jemalloc is Debian's
libjemalloc2, preloaded into the same program; it is left out, with a note, where the library is not installed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pages import add_output, bullets, kernel, picture, save, stem_of, table

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
SEED = 1
GOAL = 1.10


@dataclass(frozen=True)
class Workload:
    """Sizes in bytes, both ends included; `delete` in per cent of the values."""

    name: str
    before: tuple[int, int]
    delete: int
    after: tuple[int, int]

    def __str__(self) -> str:
        if self.before == self.after:
            return f"{self.name}: {_sizes(self.before)}"
        return f"{self.name}: {_sizes(self.before)}, {self.delete}%, {_sizes(self.after)}"


def _sizes(ends: tuple[int, int]) -> str:
    return str(ends[0]) if ends[0] == ends[1] else f"{ends[0]}-{ends[1]}"


WORKLOADS = (
    Workload("W1", (100, 100), 0, (100, 100)),
    Workload("W2", (100, 100), 0, (130, 130)),
    Workload("W3", (100, 100), 90, (130, 130)),
    Workload("W4", (100, 150), 0, (200, 250)),
    Workload("W5", (100, 150), 90, (200, 250)),
    Workload("W6", (100, 200), 50, (1000, 2000)),
    Workload("W7", (1000, 2000), 90, (1500, 2500)),
    Workload("W8", (50, 150), 90, (5000, 15000)),
)
ALIGNMENTS = (1, 64)
# Smallest and largest size, alignment: the free + write pairs.
PAIRS = ((64, 1024, 64), (64, 1024, 1), (64, 16384, 64), (64, 16384, 1))
HOLES, HOLES_QUICK = (100, 10_000, 1_000_000), (100, 10_000)


@dataclass(frozen=True)
class Allocator:
    """A way to run the replay program."""

    name: str
    mode: str
    environment: dict[str, str]


def allocators() -> tuple[list[Allocator], str]:
    """All that can be run here, and why one cannot (or nothing)."""
    here = [Allocator("region", "region", {}), Allocator("region, compact", "compact", {})]
    here += [Allocator("naive slots", "naive", {}), Allocator("glibc malloc", "malloc", {})]
    libraries = sorted(Path("/usr/lib").glob("*/libjemalloc.so.2"))
    if not libraries:
        return here, "jemalloc was left out: Debian's package libjemalloc2 is not installed."
    preload = {"LD_PRELOAD": str(libraries[0])}
    best = preload | {"MALLOC_CONF": "dirty_decay_ms:0,muzzy_decay_ms:0,narenas:1"}
    return [*here, Allocator("jemalloc", "malloc", preload), Allocator("jemalloc, no decay", "malloc", best)], ""


def build(program: str, directory: Path) -> Path:
    """Compile a program of benchmarks/native with the C core."""
    target = directory / program
    core = sorted(path for path in (ROOT / "csrc").rglob("*.c") if path.parent.name != "python")
    sources = [ROOT / "benchmarks/native" / f"{program}.c", *core]
    command = [os.environ.get("CC", "gcc"), "-std=c11", "-O2", "-DNDEBUG", "-pthread", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, "-o", target, *sources, "-lm", "-ldl"], check=True)
    return target


def run(program: Path, *arguments: object, **environment: str) -> dict[str, Any]:
    """Run a program and return the line of JSON that it prints."""
    done = subprocess.run(
        [program, *map(str, arguments)], env=os.environ | environment, check=True, capture_output=True, text=True
    )
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def replay_all(program: Path, rivals: list[Allocator], live: int, published: bool, jobs: int) -> list[dict[str, Any]]:
    """One record for each alignment, workload and allocator. Space, not time: several may run at once."""
    fill, total = (5 * live, 10 * live) if published else (live, 5 * live)

    def replay(cell: tuple[int, Workload, Allocator]) -> dict[str, Any]:
        alignment, workload, rival = cell
        trace = (*workload.before, workload.delete, *workload.after, live, fill, total, alignment, SEED)
        figures = run(program, rival.mode, *trace, **rival.environment)
        return {"workload": workload.name, "alignment": alignment, "allocator": rival.name, **figures}

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(replay, itertools.product(ALIGNMENTS, WORKLOADS, rivals)))


def pair_costs(program: Path, holes: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    for smallest, largest, alignment in PAIRS:
        for count in holes:
            figures = run(program, smallest, largest, alignment, count)
            yield {"sizes": f"{smallest}-{largest}", "alignment": alignment, "asked": count, **figures}


# ---- tables and plot -------------------------------------------------------------------------------------------


def peak_table(records: list[dict[str, Any]], rivals: list[Allocator], live: int, alignment: int) -> str:
    """Peak of the space in units of the live bytes."""
    rows = [["workload", "floor", *(rival.name for rival in rivals), "moved/written", "metadata"]]
    for workload in WORKLOADS:
        by = {r["allocator"]: r for r in records if (r["workload"], r["alignment"]) == (workload.name, alignment)}
        mine = by["region, compact"]
        peaks = [f"{by[rival.name]['peak'] / live:.2f}" for rival in rivals]
        moved = mine["moved"] / mine["written"]
        rows.append(
            [str(workload), f"{mine['floor'] / live:.2f}", *peaks, f"{moved:.2f}", f"{mine['metadata'] / live:.2f}"]
        )
    return table(rows)


def span_table(records: list[dict[str, Any]], rivals: list[Allocator], live: int) -> str:
    names = [rival.name for rival in rivals if rival.mode == "malloc"]
    rows = [["workload", *(f"{name}, {a}" for a in ALIGNMENTS for name in names)]]
    for workload in WORKLOADS:
        by = {(r["allocator"], r["alignment"]): r for r in records if r["workload"] == workload.name}
        rows.append([workload.name, *(f"{by[name, a]['span'] / live:.2f}" for a in ALIGNMENTS for name in names)])
    return table(rows)


def pair_table(costs: list[dict[str, Any]]) -> str:
    rows = [
        ["sizes, alignment", "free extents", "pair", "p10", "p90", "of it copying", "of it bookkeeping", "one read"]
    ]
    for cost in costs:
        figures = [
            f"{cost[key]:.0f} ns" for key in ("pair_ns", "pair_p10_ns", "pair_p90_ns", "copy_ns", "book_ns", "read_ns")
        ]
        rows.append([f"{cost['sizes']} B, {cost['alignment']}", f"{cost['holes']:,}", *figures])
    return table(rows)


def _met(reached: bool) -> str:
    return "met" if reached else "MISSED"


def pair_goals(costs: list[dict[str, Any]]) -> list[str]:
    """Do the same for the free + write pairs."""
    slowest = max(costs, key=lambda cost: cost["pair_ns"])
    book = max(cost["book_ns"] for cost in costs)
    by_sizes: dict[tuple[str, int], list[float]] = {}
    for cost in costs:
        by_sizes.setdefault((cost["sizes"], cost["alignment"]), []).append(cost["book_ns"])
    factor = max(max(figures) / min(figures) for figures in by_sizes.values())
    return [
        (
            f"- A free + write pair under 1 us: {_met(slowest['pair_ns'] < 1000)}, the slowest takes "
            f"{slowest['pair_ns']:.0f} ns; without the copying {_met(book < 1000)}, {book:.0f} ns."
        ),
        (
            f"- Within 2x of the cheapest, whatever the number of free extents: {_met(factor <= 2)}, the factor is "
            f"{factor:.1f} for the bookkeeping."
        ),
    ]


def goals(records: list[dict[str, Any]]) -> list[str]:
    """Say for each goal whether it was met, and by the worst case."""
    peak = {(r["workload"], r["alignment"], r["allocator"]): r["peak"] for r in records}
    floor = {(r["workload"], r["alignment"]): r["floor"] for r in records}
    cells = list(floor)
    worst = max(cells, key=lambda cell: peak[*cell, "region, compact"] / floor[cell])
    figure = peak[*worst, "region, compact"] / floor[worst]
    lines = [
        (
            f"- With compaction never above {GOAL:.2f} of the floor: {_met(figure <= GOAL)}, the worst is "
            f"{figure:.3f} ({worst[0]}, alignment {worst[1]})."
        )
    ]
    others = {name for _, _, name in peak if name.startswith("jemalloc")}
    if others:
        ratios = {cell: peak[*cell, "region"] / min(peak[*cell, name] for name in others) for cell in cells}
        worst = max(cells, key=lambda cell: ratios[cell])
        lines.append(
            f"- Without it never worse than jemalloc at its best: {_met(ratios[worst] <= 1)}, "
            f"the closest is {ratios[worst]:.2f} of jemalloc's space ({worst[0]}, alignment {worst[1]})."
        )
        gross = {
            (r["workload"], r["alignment"]): r["peak"] + r["metadata"] for r in records if r["allocator"] == "region"
        }
        over = [cell for cell in cells if gross[cell] > min(peak[*cell, name] for name in others)]
        lines.append(
            "- With the region's metadata counted in (64 bytes for each value of 100), jemalloc needs less in "
            + (", ".join(f"{name} at {alignment}" for name, alignment in over) or "no workload")
            + "."
        )
    return lines


# The kinds of space, by the names of the tables.
LEGEND = bullets(
    {
        "region, naive slots": (
            "`used_bytes`, the end of the furthest byte ever used. malloc: growth of the process's resident memory,"
            " every byte written, transparent huge pages off."
        ),
        "floor": (
            "the live values, each rounded up to the alignment. At alignment 64 all use `aligned_alloc(64, ...)`."
        ),
        "compact": (
            "`ndm_region_compact()` after each 64 KiB written, its budget the bytes written since; moved/written is"
            " what it used of that."
        ),
        "metadata": (
            "what the region keeps in RAM beside the file, 24 bytes a slot and 40 an extent, not part of its peak. The"
            " mallocs' own (headers, bitmaps) is part of theirs. It matters for values of 100 bytes."
        ),
        "jemalloc": "gives pages back by a clock (10 s), `no decay` at once, with one arena: its best for space.",
    }
)


def page(figures: dict[str, Any], rivals: list[Allocator], note: str) -> list[str]:
    """Lay everything out in Markdown."""
    live, records = figures["live_bytes"], figures["peaks"]
    phases = "5 L in each phase" if figures["as_published"] else "5 L in all"
    reached = goals(records)
    if figures["pairs"]:
        reached += pair_goals(figures["pairs"])
    if note:
        reached.append(f"- {note}")
    parts = [
        "# Fragmentation",
        (
            f"Workloads of Rumble et al., FAST '14, Table 1: sizes before (bytes), share deleted, sizes after. L = "
            f"{live // MIB} MiB live, {phases}, seed {SEED}. {figures['kernel']}."
        ),
        "\n".join(reached),
    ]
    for alignment in ALIGNMENTS:
        parts += [f"## Peak space / L, alignment {alignment}", peak_table(records, rivals, live, alignment)]
    parts += [
        LEGEND,
        "## Address space that malloc held at its peak / L, at alignment 1 and 64",
        span_table(records, rivals, live),
        "glibc: `arena + hblkhd` of `mallinfo2()`; jemalloc: `stats.mapped`.",
    ]
    if figures["pairs"]:
        parts += [
            "## A free + write pair in the C core",
            (
                f"Load average of the machine when it began: {figures['load']}, on {os.cpu_count()} CPUs. One read: a"
                " dependent read at random among as many cache lines as there are free extents, at the same time."
            ),
            pair_table(figures["pairs"]),
            (
                "Medians over batches of 500 pairs, region in memory. Copying: the same sizes, to random values,"
                " through pointers. See `benchmarks/native/bench_free_write.c`."
            ),
        ]
    return parts


def plot(figures: dict[str, Any], rivals: list[Allocator], stem: Path) -> None:
    """Draw one dot for each allocator and workload, a panel for each alignment."""
    styles = ("#0b6e4f D", "#08a045 o", "#999999 x", "#e07a1f s", "#3366cc ^", "#7aa5e8 v")
    live = figures["live_bytes"]
    with picture(stem, 1, len(ALIGNMENTS), (11, 4.4)) as (figure, panels):
        for panel, alignment in zip(panels, ALIGNMENTS, strict=True):
            records = [r for r in figures["peaks"] if r["alignment"] == alignment]
            floors = [next(r["floor"] for r in records if r["workload"] == w.name) / live for w in WORKLOADS]
            ends = zip(*((x - 0.4, x + 0.4) for x in range(len(floors))), strict=True)
            panel.hlines(floors, *ends, color="black", label="floor")
            for place, (rival, style) in enumerate(zip(rivals, styles, strict=False)):
                peaks = [r["peak"] / live for r in records if r["allocator"] == rival.name]
                color, marker = style.split()
                shift = (place - (len(rivals) - 1) / 2) * 0.13
                spots = [x + shift for x in range(len(peaks))]
                panel.scatter(spots, peaks, color=color, marker=marker, s=34, label=rival.name, zorder=3)
            panel.set_title(f"alignment {alignment}")
            panel.set_xticks(range(len(WORKLOADS)), [w.name for w in WORKLOADS])
            panel.set_ylim(0.9, 3.1)
            panel.grid(axis="y", alpha=0.3)
        panels[0].set_ylabel("peak space / live bytes")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=9)
        figure.suptitle("Space needed for the workloads of Rumble et al., FAST '14; lower is better", fontsize=11)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Peak space on the workloads of Rumble et al., and free + write costs."
    )
    parser.add_argument("--quick", action="store_true", help="16 MiB live instead of 64, no million free extents")
    parser.add_argument("--as-published", action="store_true", help="write 5 L in each phase, as the paper does")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="replays that run at once")
    add_output(parser)
    options = parser.parse_args()
    if shutil.which(os.environ.get("CC", "gcc")) is None:
        parser.error("a C compiler is needed (CC)")
    rivals, note = allocators()
    with tempfile.TemporaryDirectory() as name:
        live = (16 if options.quick else 64) * MIB
        replay = build("replay", Path(name))
        peaks = replay_all(replay, rivals, live, options.as_published, options.jobs)
        holes = HOLES_QUICK if options.quick else HOLES
        load = os.getloadavg()[0]
        pairs = [] if options.as_published else list(pair_costs(build("bench_free_write", Path(name)), holes))
    figures = {
        "kernel": kernel(),
        "live_bytes": live,
        "as_published": options.as_published,
        "load": round(load, 1),
        "peaks": peaks,
        "pairs": pairs,
    }
    stem = stem_of(options, "fragmentation" + ("-as-published" if options.as_published else ""))
    text = save(stem, page(figures, rivals, note), figures)
    plot(figures, rivals, stem)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
