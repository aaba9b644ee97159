"""The league table: the region beside what a Python user would otherwise pick.

    python benchmarks/league.py [--quick] [--directory DIR] [--output DIR] [--only NAME] [--sizes LABEL]

Every measurement runs in a child of its own, forked from a process that has done nothing but import the packages and
make the data: nobody inherits another's heap, mappings or open files, and peak RSS is counted from where the child
started. The subjects take turns (`rivals.py` says how each is set), and what one has left is deleted before the next
one starts. A figure is the median over the rounds; a ratio is the median of the ratios within each round.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # a process with threads does not fork well

import argparse
import gc
import itertools
import pickle
import statistics
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pages import bullets, empty_directory, environment, hundredths, median_ratio, parse, picture, save, table, versions
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rivals import (
    KIB,
    MIB,
    SUBJECTS,
    Case,
    Region,
    RegionBatched,
    RegionLimited,
    Subject,
    Touch,
    dbm_module,
    random_pool,
    shuffled,
)

SIZES = {"64 B": 64, "4 KiB": 4 * KIB, "64 KiB": 64 * KIB, "1 MiB": MIB, "64 MiB": 64 * MIB}
COUNTS = {64: 200_000, 4 * KIB: 50_000, 64 * KIB: 8_000, MIB: 1_000, 64 * MIB: 16}
WORDS = np.dtype(np.uint64)
_add = np.add.reduce
QUICK = 10  # the quick form has a tenth of the values
FORMS = {"bytes": "`bytes`", "numpy": "NumPy arrays"}
PHASES = ("store", "read", "delete")
PACKAGES = ("nodedb-mem", "cffi", "numpy", "zict", "lmdb", "diskcache", "rocksdict", "pyarrow")
CACHE_LIMIT = 256 * MIB  # the region's default
METHOD = """\
Store all values; read all back, in random order, and touch every byte of each; delete all, in that order. Touching is
`zlib.adler32` for `bytes` of 64 B, else the sum of the 8-byte words by NumPy, value by value; it is part of the time of
a read. Values are random bytes. Each measurement has a process of its own and an empty directory, and has written a
file of that size just before, because a virtual machine may get pages from its host slowly. Peak RSS is above
what that process had when the values were made, and includes mapped pages of files, which the kernel can drop;
anonymous is the part that it cannot. Nobody syncs: the files are in the page cache, but for what `region, 256 MiB` has
dropped. Disk is taken when all is stored. Where fewer values are given than for the others, the full number would take
minutes: compare the rates."""
OURS = (Region.name, RegionBatched.name, RegionLimited.name)


@dataclass(frozen=True)
class Run:
    """One child's figures."""

    seconds: dict[str, float]  # by phase
    cpu_seconds: dict[str, float]  # of all threads of the process
    peak_rss: int  # bytes above those at the start, mapped file pages included
    anonymous: int  # of RAM that only swap could free: the most at the end of a phase
    disk: int  # bytes on disk when all is stored


@dataclass(frozen=True)
class Row:
    """One subject at one size and form, over the rounds."""

    subject: str
    case: Case
    runs: list[Run] = field(default_factory=list)

    def seconds(self, phase: str) -> float:
        """Median time of one operation."""
        return statistics.median(self._each(phase))

    def ratio(self, other: Row, phase: str) -> float:
        """Time of one operation in units of the other's: below 1 this one is faster."""
        return median_ratio(self._each(phase), other._each(phase))

    def _each(self, phase: str) -> list[float]:
        return [run.seconds[phase] / self.case.count for run in self.runs]

    def median(self, figure: str) -> float:
        """Median of a figure of `Run`."""
        return statistics.median(getattr(run, figure) for run in self.runs)

    @property
    def disk_per_byte(self) -> float:
        """Bytes on disk for each byte stored."""
        return self.median("disk") / self.case.total

    def as_json(self) -> dict[str, Any]:
        """Return the row as the JSON file has it."""
        return {
            "subject": self.subject,
            "bytes": self.case.size,
            "form": self.case.form,
            "values": self.case.count,
            "operations_per_second": {phase: round(1 / self.seconds(phase), 2) for phase in PHASES},
            "gigabytes_per_second": {
                phase: float(f"{self.case.size / self.seconds(phase) / 1e9:.4g}") for phase in PHASES
            },
            "peak_rss_bytes": int(self.median("peak_rss")),
            "anonymous_bytes": int(self.median("anonymous")),
            "disk_bytes_per_byte": round(self.disk_per_byte, 4),
            "rounds_seconds": [{phase: round(run.seconds[phase], 6) for phase in PHASES} for run in self.runs],
            "rounds_cpu_seconds": [{phase: round(run.cpu_seconds[phase], 6) for phase in PHASES} for run in self.runs],
        }


# --- measuring -------------------------------------------------------------------------------------------------------


def touch_words(value: Any) -> object:
    """Add up a value's 8-byte words."""
    return _add(np.frombuffer(value, WORDS))


def touch_of(case: Case) -> Touch:
    """What reads every byte, the same for everybody: the cheapest that Python has for such a value."""
    return zlib.adler32 if case.form == "bytes" and case.size < 1 * KIB else touch_words


def memory(*names: str) -> int:
    """Sum of figures of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    facts = dict(line.split(":", 1) for line in lines)
    return sum(int(facts[name].split()[0]) * KIB for name in names)


def disk_bytes(directory: Path) -> int:
    """Blocks that the files below a directory hold, and the directories themselves."""
    paths = [Path(root) / name for root, folders, files in os.walk(directory) for name in (*folders, *files)]
    return sum(path.lstat().st_blocks * 512 for path in paths)


def warm_ram(size: int, pool: np.ndarray, directory: Path) -> None:
    """Have free pages that the host of a virtual machine has already given: a first touch may cost ten times more.

    By a file, because its pages are given out again for the next one. Anonymous memory does not do: measured on a
    virtual machine, 8 of 12 stores of 384 MiB were then still five to ten times slower than the others, after a file
    none of 12.
    """
    data = memoryview(pool).cast("B")
    with tempfile.TemporaryFile(dir=directory) as file:
        while size > 0:
            size -= file.write(data[: min(size, len(data))])


def measure(kind: type[Subject], case: Case, pool: np.ndarray, directory: Path) -> Run:
    """Store, read and delete, in this process."""
    values = case.values(pool)
    order = shuffled(case.count)
    touch = touch_of(case)
    warm_ram(case.total + case.total // 4 + 64 * MIB, pool, directory)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    start, start_anonymous = memory("VmRSS"), memory("RssAnon")
    seconds: dict[str, float] = {}
    cpu_seconds: dict[str, float] = {}
    anonymous = [0]
    subject = kind(directory, case)

    def timed(phase: str, play: Any, *arguments: Any) -> None:
        begin, begin_cpu = time.perf_counter(), time.process_time()
        play(*arguments)
        seconds[phase], cpu_seconds[phase] = time.perf_counter() - begin, time.process_time() - begin_cpu
        anonymous.append(memory("RssAnon") - start_anonymous)

    timed("store", subject.store, values)
    disk = disk_bytes(directory)
    stored = list(subject.keys)
    subject.shuffle(order)
    timed("read", subject.read, touch)
    for i in (order[0], order[-1]):
        if bytes(subject.get(stored[i])) != bytes(values[i]):
            raise AssertionError(f"{kind.name}: value {i} of {case} came back different")
    timed("delete", subject.delete)
    peak = memory("VmHWM") - start
    subject.close()
    return Run(seconds, cpu_seconds, peak, max(anonymous), disk)


def measure_in_child(kind: type[Subject], case: Case, pool: np.ndarray, parent: Path) -> Run:
    """Fork, measure, clean up."""
    with tempfile.TemporaryDirectory(dir=parent) as directory:
        source, target = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(source)
                result: Any = measure(kind, case, pool, Path(directory))
            except BaseException:
                result = traceback.format_exc()
            with open(target, "wb") as pipe:
                pickle.dump(result, pipe)
            os._exit(0)
        os.close(target)
        with open(source, "rb") as pipe:
            answer = pipe.read()
        os.waitpid(child, 0)
    result = pickle.loads(answer) if answer else "the child died"
    if not isinstance(result, Run):
        raise RuntimeError(f"{kind.name}, {case}:\n{result}")
    return result


def plan(counts: dict[int, int], names: list[str]) -> dict[tuple[int, str], list[type[Subject]]]:
    """Who is measured at which size and form; the limited region only where it has something to drop."""
    kinds = [kind for kind in SUBJECTS if kind.name in names]
    return {
        (size, form): [kind for kind in kinds if kind is not RegionLimited or counts[size] * size > CACHE_LIMIT]
        for size in counts
        for form in FORMS
    }


def play(
    names: list[str], sizes: list[int], rounds: int, divisor: int, directory: Path
) -> Iterator[tuple[int, list[Row]]]:
    """Run all measurements, the subjects in turn; yield the rows so far after each round."""
    pool = random_pool()
    gc.disable()  # in the children; here nothing but a list of figures grows
    counts = {size: max(2, COUNTS[size] // divisor) for size in sizes}
    groups = plan(counts, names)
    rows: dict[tuple[int, str, str], Row] = {}
    jobs = [
        (number, kind, Case(size, kind.count(size, counts[size], divisor), form))
        for number in range(rounds)
        for (size, form), kinds in groups.items()
        for kind in kinds[number % len(kinds) :] + kinds[: number % len(kinds)]
    ]
    last = {number: index for index, (number, _, _) in enumerate(jobs)}
    for index, (number, kind, case) in enumerate(_progress(jobs)):
        row = rows.setdefault((case.size, case.form, kind.name), Row(kind.name, case))
        row.runs.append(measure_in_child(kind, case, pool, directory))
        if index == last[number]:
            yield number + 1, [rows[size, form, kind.name] for (size, form), kinds in groups.items() for kind in kinds]


def _progress(jobs: list[tuple[int, type[Subject], Case]]) -> Iterator[tuple[int, type[Subject], Case]]:
    """Show a bar on a terminal; it is drawn between the jobs, because a thread of its own would be forked."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from jobs
        return
    columns = (TextColumn("{task.description:34}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        task = progress.add_task("", total=len(jobs))
        for number, kind, case in jobs:
            progress.update(task, description=f"{kind.name}, {label(case.size)}, {case.form}", refresh=True)
            yield number, kind, case
            progress.advance(task)


# --- the tables ------------------------------------------------------------------------------------------------------


def label(size: int) -> str:
    """Write a size as the table does."""
    return next(name for name, value in SIZES.items() if value == size)


def best(rows: Iterable[Row], phase: str) -> Row:
    """Return the fastest."""
    return min(rows, key=lambda row: row.seconds(phase))


def short_table(rows: list[Row]) -> Iterator[str]:
    """The region against the best rival of each discipline."""
    header = ["size", "", "", "region", "batched", "best rival", "", "region/rival", "batched/rival"]
    body = []
    for size, form, group in grouped(rows):
        by_name = {row.subject: row for row in group}
        others = [row for row in group if row.subject not in OURS]
        ours = [by_name[name] for name in OURS[:2] if name in by_name]
        if len(ours) < 2 or not others:
            continue
        for phase in PHASES:
            rival = best(others, phase)
            body.append(
                [
                    label(size),
                    form,
                    phase,
                    *(speed(row, phase) for row in ours),
                    rival.subject,
                    speed(rival, phase),
                    *(_emphasis(hundredths(row.ratio(rival, phase)), row.ratio(rival, phase) < 1) for row in ours),
                ]
            )
    if body:
        yield table([header, *body], left=(0, 1, 2, 5))


def full_tables(rows: list[Row]) -> Iterator[str]:
    """Everybody, size by size; the fastest in bold."""
    header = ["", "values"]
    for phase in PHASES:
        header += [f"{phase}, ops/s", "GB/s"]
    header += ["peak RSS, MiB", "anonymous, MiB", "disk/byte"]
    for size, form, group in grouped(rows):
        fastest = {phase: best((row for row in group), phase) for phase in PHASES}
        body = []
        for row in group:
            line = [row.subject, f"{row.case.count:,}"]
            for phase in PHASES:
                operations = 1 / row.seconds(phase)
                line.append(_emphasis(_operations(operations), row is fastest[phase]))
                line.append(_gigabytes(operations * size))
            line += [_mebibytes(row.median("peak_rss")), _mebibytes(row.median("anonymous"))]
            body.append([*line, f"{row.disk_per_byte:.2f}"])
        yield from (f"### {label(size)}, {FORMS[form]}", table([header, *body]))


def grouped(rows: list[Row]) -> Iterator[tuple[int, str, list[Row]]]:
    """Rows of one size and form, in the order they were measured."""
    for size, form in dict.fromkeys((row.case.size, row.case.form) for row in rows):
        yield size, form, [row for row in rows if (row.case.size, row.case.form) == (size, form)]


def speed(row: Row, phase: str) -> str:
    """Write what matters: bytes from 4 KiB up, operations below and for deletions."""
    operations = 1 / row.seconds(phase)
    if phase == "delete" or row.case.size < 4 * KIB:
        return f"{_operations(operations)} op/s"
    return f"{_gigabytes(operations * row.case.size)} GB/s"


def _operations(figure: float) -> str:
    if figure >= 1e6:
        return f"{figure / 1e6:.3g} M"
    return f"{figure / 1e3:.3g} k" if figure >= 1e3 else f"{figure:.3g}"


def _gigabytes(bytes_per_second: float) -> str:
    figure = bytes_per_second / 1e9
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:#.3g}".rstrip(".")


def _mebibytes(size: float) -> str:
    return f"{max(size, 0.0) / MIB:.0f}"


def _emphasis(text: str, when: bool) -> str:
    return f"**{text}**" if when else text


def facts_of(directory: Path) -> dict[str, str]:
    """What the figures depend on."""
    import sqlite3

    facts = environment(directory)
    facts["packages"] = versions(*PACKAGES)
    facts["standard library"] = f"SQLite {sqlite3.sqlite_version}, shelve over {dbm_module()}"
    facts["RAM"] = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / (1 << 30):.0f} GiB"
    return facts


def document(rows: list[Row], facts: dict[str, str], rounds: str) -> list[str]:
    """Lay everything out in Markdown."""
    measured = {row.subject for row in rows}
    kinds = [f"- {kind.name}: {' '.join((kind.__doc__ or '').split())}" for kind in SUBJECTS if kind.name in measured]
    return [
        "# The league table",
        bullets(facts | {"rounds": f"{rounds}, interleaved; medians"}),
        "## In short",
        "The fastest rival of each discipline beside the region. A ratio of times below 1: the region is faster.",
        *short_table(rows),
        "## How it is measured",
        METHOD,
        "\n".join(kinds),
        "## All figures",
        *full_tables(rows),
    ]


# --- the picture -----------------------------------------------------------------------------------------------------


def plot(rows: list[Row], stem: Path) -> None:
    """Draw the rates over the sizes: a row of panels for each form, a panel for each phase."""
    measured = {row.subject for row in rows}
    names = [name for name in dict.fromkeys((*OURS, *(kind.name for kind in SUBJECTS))) if name in measured]
    sizes = sorted({row.case.size for row in rows})
    rivals = [name for name in names if name not in OURS]
    with picture(stem, len(FORMS), len(PHASES), (12, 8.6)) as (figure, panels):
        for panel, (form, phase) in zip(panels, itertools.product(FORMS, PHASES), strict=True):
            deleting = phase == "delete"
            for name in names:
                mine = [row for row in rows if (row.subject, row.case.form) == (name, form)]
                rates = [1 / row.seconds(phase) * (1 if deleting else row.case.size / 1e9) for row in mine]
                panel.plot([row.case.size for row in mine], rates, label=name, **line_style(name, rivals))
            panel.set(xscale="log", yscale="log", title=f"{phase}, {form}")
            panel.set_ylabel("values/s" if deleting else "GB/s")
            panel.set_xticks(sizes, [label(size) for size in sizes], fontsize=9)
            panel.minorticks_off()
            panel.grid(alpha=0.3)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False)
        figure.suptitle("Store, read back with every byte touched, delete: rates by size of a value; higher is better")


def line_style(name: str, rivals: list[str]) -> dict[str, Any]:
    """Give the region thick red lines, and each rival a thin one of another colour."""
    if name in OURS:
        place = OURS.index(name)
        colour = ("#b2182b", "#ef6548", "#fc9272")[place]
        return {"color": colour, "marker": "os^"[place], "linewidth": 2.6, "zorder": 3}
    place = rivals.index(name)
    colour = f"C{(place, place + 1)[place >= 3] % 10}"  # C3 is red
    return {"color": colour, "marker": ".", "linewidth": 1.1, "linestyle": ("-", "--")[place >= 9]}


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Compare the region with what one would otherwise pick. The short form has a tenth of the values."
    )
    parser.add_argument("--only", action="append", metavar="NAME", help="this subject (may be repeated)")
    parser.add_argument("--sizes", action="append", metavar="LABEL", help="this size, like '4 KiB' (may be repeated)")
    options = parse(parser, "league", rounds=3, quick=1)
    names = [kind.name for kind in SUBJECTS]
    if unknown := set(options.only or ()) - set(names):
        parser.error(f"--only: no {sorted(unknown)}; there are {names}")
    if unknown := set(options.sizes or ()) - set(SIZES):
        parser.error(f"--sizes: no {sorted(unknown)}; there are {list(SIZES)}")
    sizes = [size for name, size in SIZES.items() if not options.sizes or name in options.sizes]

    rounds, stem = options.rounds, options.stem
    text = ""
    with empty_directory(options.directory) as directory:
        facts = facts_of(directory)
        divisor = QUICK if options.quick else 1
        for done, rows in play(options.only or names, sizes, rounds, divisor, directory):
            # Written after each round: a long run that is stopped leaves what it has, and says how much that is.
            figures = {"environment": facts, "rounds": done, "rows": [row.as_json() for row in rows]}
            text = save(stem, document(rows, facts, f"{done}" if done == rounds else f"{done} of {rounds}"), figures)
            plot(rows, stem)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
