"""Values out of RAM and back by `SpillMapping`, beside zict, diskcache, shelve and joblib.

    make bench-spilling [ARGS=--quick]
    python benchmarks/spilling.py [--quick] [--directory DIR] [--output DIR]

The rivals take turns in random order; a figure is the median over the rounds, a ratio the median of the ratios within
each round, in units of the mapping's time: above 1 the mapping is faster. The mixed load runs each rival in a process
of its own, whose peak RSS it tells.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shelve
import shutil
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diskcache
import joblib
import numpy as np
import pandas as pd
import zict
from distributed.protocol import deserialize_bytes
from distributed.protocol.serialize import serialize_bytelist
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
    versions,
)

from nodedb_mem import SpillMapping

KIB, MIB = 1 << 10, 1 << 20
SPAWN = multiprocessing.get_context("spawn")

# ---- the values --------------------------------------------------------------------------------------------------


def array(size: int, seed: int) -> np.ndarray:
    return np.full(size // 8, float(seed))


def frame(seed: int) -> pd.DataFrame:
    rows = 35_000
    return pd.DataFrame({"n": np.arange(rows) + seed, "s": [f"text {i % 1000} {seed}" for i in range(rows)]})


def record(seed: int) -> dict[str, Any]:
    return {f"field {i}": seed + i * 1.5 for i in range(50)}


CASES: dict[str, tuple[Callable[[int], Any], int]] = {  # how to make one, how many in a round
    "array 64 KiB": (lambda seed: array(64 * KIB, seed), 64),
    "array 1 MiB": (lambda seed: array(MIB, seed), 24),
    "array 64 MiB": (lambda seed: array(64 * MIB, seed), 2),
    "frame 1 MiB": (frame, 12),
    "dict 1 KiB": (record, 100),
}


def touch(value: Any) -> None:
    """Read every byte."""
    if isinstance(value, np.ndarray):
        value.sum()
    elif isinstance(value, pd.DataFrame):
        value["n"].to_numpy().sum()


# ---- the rivals --------------------------------------------------------------------------------------------------


class Spill:
    """`SpillMapping`; `evict([key])` puts out"""

    name = "mapping"

    def __init__(self, folder: Path, budget: int) -> None:
        self.map: Any = SpillMapping(budget, folder)
        self.hold = self.map.__setitem__
        self.get = self.map.__getitem__
        self.drop = self.map.__delitem__

    def evict(self, key: str) -> None:
        self.map.evict([key])

    def close(self) -> None:
        self.map.close()


class Zict:
    """`zict.Buffer` over `zict.File`, by Dask's serialization; `fast.evict(key)` puts out"""

    name = "zict"
    memmap = False

    def __init__(self, folder: Path, budget: int) -> None:
        def dumps(value: Any) -> Any:
            return serialize_bytelist(value, on_error="raise")

        slow = zict.Func(dumps, deserialize_bytes, zict.File(folder / self.name, memmap=self.memmap))
        self.map: Any = zict.Buffer({}, slow, budget, weight=lambda key, value: getattr(value, "nbytes", 1000))
        self.hold = self.map.__setitem__
        self.get = self.map.__getitem__
        self.drop = self.map.__delitem__
        self.evict = self.map.fast.evict

    def close(self) -> None:
        self.map.close()


class ZictMemmap(Zict):
    """the same with `memmap=True`"""

    name = "zict memmap"
    memmap = True


class _Store:
    """What keeps nothing in RAM: putting out is storing, and what was held is let go."""

    def __init__(self) -> None:
        self.held: dict[str, Any] = {}
        self.hold = self.held.__setitem__

    def evict(self, key: str) -> None:
        self.store(key, self.held.pop(key))

    def store(self, key: str, value: Any) -> None:
        raise NotImplementedError


class DiskCache(_Store):
    """`diskcache.Cache`, `eviction_policy="none", cull_limit=0, sqlite_synchronous=0`, mapped SQLite"""

    name = "diskcache"

    def __init__(self, folder: Path, budget: int) -> None:
        super().__init__()
        self.cache = diskcache.Cache(
            str(folder / "diskcache"),
            eviction_policy="none",
            cull_limit=0,
            size_limit=1 << 50,
            sqlite_synchronous=0,
            sqlite_mmap_size=1 << 31,
        )
        self.store = self.cache.__setitem__
        self.get = self.cache.__getitem__
        self.drop = self.cache.__delitem__

    def close(self) -> None:
        self.cache.close()


class Shelve(_Store):
    """`shelve`, pickle protocol 5"""

    name = "shelve"

    def __init__(self, folder: Path, budget: int) -> None:
        super().__init__()
        self.shelf = shelve.open(str(folder / "shelf"), "n", protocol=5)  # noqa: SIM115
        self.store = self.shelf.__setitem__
        self.get = self.shelf.__getitem__
        self.drop = self.shelf.__delitem__

    def close(self) -> None:
        self.shelf.close()


class Joblib(_Store):
    """`joblib.dump` and `joblib.load(mmap_mode="c")`, which `joblib.Memory` uses"""

    name = "joblib"

    def __init__(self, folder: Path, budget: int) -> None:
        super().__init__()
        self.folder = folder / "joblib"
        self.folder.mkdir()

    def store(self, key: str, value: Any) -> None:
        joblib.dump(value, self.folder / key)

    def get(self, key: str) -> Any:
        return joblib.load(self.folder / key, mmap_mode="c")

    def drop(self, key: str) -> None:
        (self.folder / key).unlink()

    def close(self) -> None:
        shutil.rmtree(self.folder)


class Pwrite(_Store):
    """No rival, but the least that a copy costs: one `os.pwrite` into a file whose pages are in RAM, and freeing."""

    name = "one pwrite"

    def __init__(self, folder: Path, budget: int) -> None:
        super().__init__()
        self.file = os.open(folder / "plain", os.O_RDWR | os.O_CREAT)
        self.places: dict[str, int] = {}

    def store(self, key: str, value: Any) -> None:
        os.pwrite(self.file, value, self.places.setdefault(key, len(self.places) * value.nbytes))

    def get(self, key: str) -> None:
        """Nothing comes back."""

    def drop(self, key: str) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        os.close(self.file)


RIVALS: tuple[Any, ...] = (Spill, Zict, ZictMemmap, DiskCache, Shelve, Joblib)
UNDER_TEST = Spill.name
OTHERS = [rival.name for rival in RIVALS[1:]]
MEASURES = {
    "evict": "Out of RAM",
    "get": "Back",
    "touched": "Back, and every byte read",
    "again": "Out again, unchanged",
    "hit": "A hit in RAM",
}

# Rivals that keep nothing in RAM have no hit, and nothing goes out again.
Samples = dict[str, dict[str, dict[str, list[float]]]]  # measure, case, rival

# ---- one value after the other -----------------------------------------------------------------------------------


def measure_once(rival: Any, make: Callable[[int], Any], count: int) -> dict[str, float]:
    """Microseconds of each step, the median over the values."""
    times: dict[str, list[float]] = defaultdict(list)
    keys = [f"key-{number}" for number in range(count)]

    def timed(what: str, step: Callable[[str], Any]) -> None:
        for key in keys:
            begin = time.perf_counter_ns()
            step(key)
            times[what].append((time.perf_counter_ns() - begin) / 1000)

    for turn in range(2):  # the second finds files and room that the first has made
        for number, key in enumerate(keys):
            rival.hold(key, make(number + turn))
        times.pop("evict", None)
        timed("evict", rival.evict)
    is_mapping = not isinstance(rival, _Store)
    timed("get", rival.get)
    if is_mapping:
        timed("hit", rival.get)
        timed("again", rival.evict)
    timed("touched", lambda key: touch(rival.get(key)))
    for key in keys:
        rival.drop(key)
    return {what: statistics.median(each) for what, each in times.items()}


def measure(directory: Path, rounds: int) -> Samples:
    samples: Samples = {what: {case: defaultdict(list) for case in CASES} for what in MEASURES}
    for number in range(rounds + 1):
        for case, (make, count) in CASES.items():
            kinds = (*RIVALS, Pwrite) if case.startswith("array") else RIVALS
            for kind in random.sample(kinds, len(kinds)):
                with empty_directory(directory) as folder:
                    rival = kind(folder, 1 << 40)
                    found = measure_once(rival, make, count)
                    rival.close()
                if number:
                    for what, figure in found.items():
                        samples[what][case][kind.name].append(figure)
    return samples


# ---- a mixed load ------------------------------------------------------------------------------------------------

BUDGET, VALUE, TIMES = 64 * MIB, 256 * KIB, 4
MIXED: tuple[Any, ...] = (Spill, Zict, ZictMemmap)


def mixed_load(kind: Any, folder: Path, operations: int, pipe: Any) -> None:
    """Zipf keys, nine gets and an assignment of ten, at four times the budget; in a process of its own."""
    count = TIMES * BUDGET // VALUE
    keys = [f"key-{number}" for number in range(count)]
    draw = np.random.default_rng(1)
    picked = draw.permutation(count)[np.minimum(draw.zipf(1.2, operations), count) - 1].tolist()
    sets = (draw.random(operations) < 0.1).tolist()
    rival = kind(folder, BUDGET)
    before = _memory("VmRSS")
    for number, key in enumerate(keys):
        rival.hold(key, array(VALUE, number))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    begin = time.perf_counter()
    for number, assigns in zip(picked, sets, strict=True):
        if assigns:
            rival.hold(keys[number], array(VALUE, number))
        else:
            touch(rival.get(keys[number]))
    seconds = time.perf_counter() - begin
    pipe.send((operations / seconds, (_memory("VmHWM") - before) / MIB))
    rival.close()


def _memory(name: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))


def measure_mixed(directory: Path, rounds: int, operations: int) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for _ in range(rounds):
        for kind in random.sample(MIXED, len(MIXED)):
            with empty_directory(directory) as folder:
                mine, other = SPAWN.Pipe()
                process = SPAWN.Process(target=mixed_load, args=(kind, folder, operations, other))
                process.start()
                found[kind.name].append(mine.recv())
                process.join()
    return found


# ---- the report --------------------------------------------------------------------------------------------------

GOALS: dict[tuple[str, str], float] = {  # against zict
    **{("evict", case): 4 for case in ("array 64 KiB", "array 1 MiB", "array 64 MiB")},
    ("get", "array 64 KiB"): 3,
    ("get", "array 1 MiB"): 5,
    ("get", "array 64 MiB"): 5,
    **{("touched", case): 2 for case in ("array 64 KiB", "array 1 MiB", "array 64 MiB", "frame 1 MiB")},
    ("evict", "frame 1 MiB"): 4,
    ("get", "frame 1 MiB"): 5,
    ("evict", "dict 1 KiB"): 5,
    ("get", "dict 1 KiB"): 5,
}


def rows_of(cells: dict[str, dict[str, list[float]]], what: str) -> list[list[str]]:
    names = [name for name in (UNDER_TEST, *OTHERS) if all(name in each for each in cells.values())]
    rows = [["µs", *names, *(f"{name}/{UNDER_TEST}" for name in names[1:]), "goal beside zict"]]
    for case, each in cells.items():
        ratios = [median_ratio(each[name], each[UNDER_TEST]) for name in names[1:]]
        goal = GOALS.get((what, case))
        met = "" if goal is None else f"{goal:g}" + ("" if ratios[0] >= goal else ", MISSED")
        rows.append([case, *(digits(statistics.median(each[name])) for name in names), *map(digits, ratios), met])
    return rows


def bound(cells: dict[str, dict[str, list[float]]]) -> list[list[str]]:
    """How far the mapping is from what a copy costs at least, and what that would be beside zict."""
    rows = [["µs", UNDER_TEST, Pwrite.name, f"{UNDER_TEST}/{Pwrite.name}", f"zict/{Pwrite.name}"]]
    for case, each in cells.items():
        if least := each.get(Pwrite.name):
            medians = [digits(statistics.median(each[name])) for name in (UNDER_TEST, Pwrite.name)]
            ratios = [digits(median_ratio(each[name], least)) for name in (UNDER_TEST, "zict")]
            rows.append([case, *medians, *ratios])
    return rows


def page(
    samples: Samples, mixed: dict[str, list[tuple[float, float]]], facts: dict[str, str], rounds: int
) -> list[str]:
    told = (
        f"Medians of {rounds} interleaved rounds; `benchmarks/spilling.py`. A ratio is the rival's time in units of "
        "the mapping's: above 1 the mapping is faster."
    )
    parts = ["# Mappings that spill", told, bullets(facts)]
    for what, title in MEASURES.items():
        parts += [f"## {title}", table(rows_of(samples[what], what))]
        if what == "evict":
            told_bound = (
                "What leaves RAM is copied to the page cache of the file first. `one pwrite` is the least that this "
                "costs, with the file's pages in RAM already, and freeing the value: the last column is the most that "
                "any copy could be faster than zict here."
            )
            parts += [told_bound, table(bound(samples[what]))]
    again = statistics.median(samples["again"]["array 1 MiB"][UNDER_TEST])
    hit = median_ratio(samples["hit"]["array 1 MiB"][UNDER_TEST], samples["hit"]["array 1 MiB"]["zict"])
    parts.append(
        f"An unchanged array of 1 MiB goes out again in {verdict(f'{digits(again)} µs', 5, again <= 5)}; a hit in RAM "
        f"takes {verdict(f'{digits(hit)} of the time of zict', 1.2, hit <= 1.2)}."
    )
    rates = {name: statistics.median(rate for rate, _ in each) for name, each in mixed.items()}
    rows = [["mixed load", *rates], ["operations/s", *map(digits, rates.values())]]
    rows.append(["peak RSS, MiB", *(digits(statistics.median(peak for _, peak in each)) for each in mixed.values())])
    ratio = rates[UNDER_TEST] / rates["zict"]
    told_mixed = (
        f"Zipf keys, 90 % gets of which every byte is read, arrays of {VALUE // KIB} KiB, a budget of "
        f"{BUDGET // MIB} MiB. The RSS is what came on top since before the load."
    )
    parts += [
        "## A mixed load at four times the budget",
        told_mixed,
        table(rows),
        f"Beside zict: {verdict(f'{digits(ratio)} times the operations', 3, ratio >= 3)}.",
    ]
    return parts


def plot(samples: Samples, stem: Path) -> None:
    titles = {"evict": "out of RAM", "get": "back", "touched": "back, every byte read"}
    with picture(stem, 1, len(titles), (13, 4.4)) as (figure, panels):
        for panel, (what, title) in zip(panels, titles.items(), strict=True):
            heights = {
                name: [statistics.median(samples[what][case][name]) for case in CASES] for name in (UNDER_TEST, *OTHERS)
            }
            grouped_bars(panel, [case.replace(" ", "\n", 1) for case in CASES], heights)
            panel.set(title=title, yscale="log")
        panels[0].set_ylabel("µs, log scale")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
        figure.suptitle("A value out of RAM and back; lower is better")


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure mappings that spill.")
    options = parse(parser, "spilling", rounds=15, quick=3)
    with empty_directory(options.directory) as directory:
        facts = environment(directory)
        facts["rivals"] = (
            versions("zict", "distributed", "diskcache", "joblib")
            + "; "
            + "; ".join(f"{rival.name}: {rival.__doc__}" for rival in RIVALS)
        )
        facts["load"] = f"{os.getloadavg()[0]:.1f} at the start"
        samples = measure(directory, options.rounds)
        mixed = measure_mixed(directory, min(options.rounds, 5), 4_000 if options.quick else 20_000)
    figures = {"environment": facts, "microseconds": samples, "mixed": mixed}
    print(save(options.stem, page(samples, mixed, facts, options.rounds), figures))
    plot(samples, options.stem)
    return 0


if __name__ == "__main__":
    sys.exit(main())
