"""Work that outgrows two Dask workers, with Dask's spill files and with regions.

    make bench-dask [ARGS=--quick]
    python benchmarks/dask_spill.py [--quick] [--directory DIR] [--output DIR] [--only NAME ...]

Each run has a cluster of its own, two workers of 600 MB with one thread each, in a process of its own. The two kinds of
storage take turns; a figure is the median over the rounds, a ratio the median of the ratios within each round: above 1
regions are faster. The time is that of the work, without the start of the cluster.
"""

from __future__ import annotations

import argparse
import json
import logging
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

MIB = 1 << 20
LIMIT = 600_000_000  # bytes of a worker
# Dask's own are 1 GiB and 100 MiB, which is more than a worker has.
# Dask has 1 GiB and 100 MiB, which is more than a worker has.
P2P = {"distributed.p2p.comm.buffer": "64 MiB", "distributed.p2p.storage.buffer": "32 MiB"}
STORAGE = ("files", "regions")
PATIENCE = 150  # seconds that a run may take
NOTE = (
    "Written and read are what the storage counts, over both workers. The peak is of one worker. Restarts are counted"
    " over all rounds. The ratio is the time with files over the time with regions."
)
COLUMNS = ("seconds", "written_mib", "read_mib", "peak_mib", "restarts")

# ---- the work ----------------------------------------------------------------------------------------------------


def reuse() -> object:
    """96 blocks of 16 MiB, kept and used three times: 2.6 times what the workers may hold in RAM."""
    import dask.array as da

    x = kept(da.random.default_rng(1).random((96, 2 * MIB), chunks=(1, 2 * MIB)))
    return [float((x + i).sum().compute()) for i in range(3)]


def transpose() -> object:
    """x + x.T of a matrix of 14,000 x 14,000, kept."""
    import dask.array as da

    x = kept(da.random.default_rng(1).random((14_000, 14_000), chunks=(2000, 2000)))
    return float((x + x.T).sum().compute())


def rechunk() -> object:
    """Rows to columns of a matrix of 10,000 x 10,000, by tasks; both are kept."""
    import dask.array as da

    x = kept(da.random.default_rng(1).random((10_000, 10_000), chunks=(500, 10_000)))
    y = kept(x.rechunk((10_000, 500), method="tasks"))
    return float((y.max(axis=0) + y.sum(axis=0)).sum().compute())


def merge_tasks() -> object:
    """Two tables of 3 million rows with strings, kept, merged and sorted, by tasks."""
    return _merge("tasks")


def merge_p2p() -> object:
    """The same, by Dask's p2p."""
    return _merge("p2p")


def _table(number: int, rows: int) -> Any:
    import numpy as np
    import pandas as pd

    random = np.random.default_rng(number)
    keys = random.integers(0, 3_000_000, rows)
    words = np.array([f"word {i:05} of a text" for i in range(10_000)])
    return pd.DataFrame({"key": keys, "text": words[random.integers(0, 10_000, rows)], "x": random.random(rows)})


def _merge(method: str) -> float:
    import dask
    import dask.dataframe as dd

    with dask.config.set({"dataframe.shuffle.method": method}):
        left = kept(dd.from_map(_table, range(24), rows=125_000))
        right = kept(dd.from_map(_table, range(100, 124), rows=125_000))
        both = kept(left.merge(right, on="key"))
        return float(both.sort_values("x_x").x_y.cumsum().tail(1).sum())


def sliding_mean() -> object:
    """Anomalies of a climate of 1.5 GB that is kept, and the squares of their means over a sliding window."""
    import dask.array as da

    def means(block: Any) -> Any:
        return sum(block[i : len(block) - 4 + i] for i in range(5)) / 5

    x = kept(da.random.default_rng(1).random((1440, 360, 360), chunks=(16, 360, 360)))
    anomalies = x - x.mean(axis=0)
    slid = anomalies.map_overlap(means, depth={0: 2}, boundary="reflect", trim=False)
    return float((slid**2).sum().compute()) + float(x.std().compute())


def tall_qr() -> object:
    """QR of a matrix of 1,000,000 x 160 that is kept, and the product checked."""
    import dask.array as da

    x = kept(da.random.default_rng(1).random((1_000_000, 160), chunks=(25_000, 160)))
    q, r = da.linalg.qr(x)
    q = kept(q)
    return float(abs(q.dot(r) - x).max().compute())


WORK: dict[str, Callable[[], object]] = {
    each.__name__.replace("_", " "): each
    for each in (reuse, transpose, rechunk, merge_tasks, merge_p2p, sliding_mean, tall_qr)
}


def kept(collection: Any) -> Any:
    """Compute a collection and keep it on the workers."""
    from distributed import wait

    collection = collection.persist()
    wait(collection)
    return collection


# ---- one run -----------------------------------------------------------------------------------------------------


def run_here(name: str, storage: str, folder: str) -> dict[str, float]:
    """Do one piece of work in a cluster of its own."""
    import dask
    from distributed import Client, LocalCluster

    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    dask.config.set({"temporary-directory": folder, **P2P})
    if storage == "regions":
        dask.config.set({"distributed.worker.preload": ["nodedb_mem.dask"]})
    options: dict[str, Any] = {"n_workers": 2, "threads_per_worker": 1, "memory_limit": LIMIT}
    with LocalCluster(**options, dashboard_address=None) as cluster, Client(cluster) as client:
        kinds = set(client.run(lambda dask_worker: type(dask_worker.data).__name__).values())
        assert kinds == {"RegionBuffer" if storage == "regions" else "SpillBuffer"}, kinds
        watch = Watch(cluster)
        start = time.perf_counter()
        answer = WORK[name]()
        seconds = time.perf_counter() - start
        watch.stop()
        metrics = client.run(lambda dask_worker: dict(dask_worker.data.cumulative_metrics)).values()

        def total(label: str) -> float:
            return sum(each.get((label, "bytes"), 0) for each in metrics) / MIB

        restarts = len(client.get_events("worker-restart-memory"))
    figures = (seconds, total("disk-write"), total("disk-read"), watch.peak / MIB, float(restarts))
    return dict(zip(COLUMNS, figures, strict=True)) | {"answer": repr(answer)}  # type: ignore[dict-item]


class Watch:
    """Looks at the RSS of the workers; the peak is that of one of them."""

    def __init__(self, cluster: Any) -> None:
        self.cluster = cluster
        self.peak = 0
        self.ends = threading.Event()
        self.thread = threading.Thread(target=self._look)
        self.thread.start()

    def _look(self) -> None:
        import psutil

        while not self.ends.wait(0.02):
            for nanny in list(self.cluster.workers.values()):
                try:
                    self.peak = max(self.peak, psutil.Process(nanny.process.pid).memory_info().rss)
                except (psutil.Error, AttributeError, TypeError):  # between two processes
                    continue

    def stop(self) -> None:
        self.ends.set()
        self.thread.join()


def run(name: str, storage: str, folder: Path) -> dict[str, Any] | None:
    """Do one piece of work in a process of its own. None if it does not end, or fails."""
    command = [sys.executable, "-W", "ignore", __file__, "--one", name, storage, str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    except (subprocess.TimeoutExpired, IndexError, ValueError) as error:
        print(f"{name}, {storage}: {error}", file=sys.stderr)
        return None


# ---- the page ----------------------------------------------------------------------------------------------------


def measure(names: list[str], rounds: int, directory: Path) -> dict[str, dict[str, list[dict[str, Any] | None]]]:
    """Let the two kinds of storage take turns."""
    found: dict[str, dict[str, list[dict[str, Any] | None]]] = {name: {each: [] for each in STORAGE} for name in names}
    for number in range(rounds):
        for name in names:
            for storage in STORAGE[:: 1 if number % 2 else -1]:
                with empty_directory(directory) as folder:
                    outcome = run(name, storage, folder)
                found[name][storage].append(outcome)
                shown = outcome and {key: round(value, 2) for key, value in outcome.items() if key != "answer"}
                print(f"round {number + 1}, {name}, {storage}: {shown}", file=sys.stderr)
    return found


def summary(found: dict[str, dict[str, list[dict[str, Any] | None]]]) -> tuple[list[list[str]], dict[str, float]]:
    """Make the rows of the table, and the ratios of times."""
    rows = [["work", "storage", "time s", "written MiB", "read MiB", "peak RSS MiB", "restarts", "ratio"]]
    ratios = {}
    for name, by_storage in found.items():
        pairs = [
            (files, regions)
            for files, regions in zip(by_storage["files"], by_storage["regions"], strict=True)
            if files and regions
        ]
        if pairs:
            ratios[name] = median_ratio([a["seconds"] for a, _ in pairs], [b["seconds"] for _, b in pairs])
        for storage in STORAGE:
            ended = [each for each in by_storage[storage] if each]
            rounds = len(by_storage[storage])
            label = name if len(pairs) == rounds else f"{name} ({len(pairs)} of {rounds} rounds)"
            row = [label if storage == "files" else "", storage]
            if not ended:
                rows.append([*row, "did not end", "", "", "", "", ""])
                continue
            row += [digits(statistics.median(each[column] for each in ended)) for column in COLUMNS[:-1]]
            row.append(str(int(sum(each["restarts"] for each in ended))))
            rows.append([*row, f"{ratios[name]:.2f}" if storage == "regions" and name in ratios else ""])
    return rows, ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", choices=list(WORK), default=list(WORK), help="some of the work")
    if "--one" in sys.argv:
        print(json.dumps(run_here(*parser.parse_args().one)))
        return
    options = parse(parser, "dask", rounds=3, quick=1)
    found = measure(options.only, options.rounds, options.directory)
    rows, ratios = summary(found)
    middle = statistics.median(ratios.values())
    least = min(ratios.values())
    facts = environment(options.directory) | {
        "Dask": versions("dask", "distributed", "zict", "numpy", "pandas", "pyarrow"),
        "cluster": "2 workers of 600 MB and one thread each",
        "settings": "Dask's own, but p2p has buffers of 96 MiB, not of 1.1 GiB, which is more than a worker has",
        "rounds": str(options.rounds),
        "median ratio": verdict(f"{middle:.2f}", 2, middle >= 2),
        "least ratio": verdict(f"{least:.2f}", 1.3, least >= 1.3),
    }
    parts = [
        "# Dask workers that spill",
        bullets(facts),
        NOTE,
        table(rows, left=(0, 1)),
        bullets({name: (WORK[name].__doc__ or "").strip() for name in found}),
    ]
    with picture(options.stem, 1, 1, (10, 4)) as (_, (panel,)):
        heights = {
            storage: [
                statistics.median([each["seconds"] for each in found[name][storage] if each] or [0.0]) for name in found
            ]
            for storage in STORAGE
        }
        grouped_bars(panel, [name.replace(" ", "\n") for name in found], heights)
        panel.set_ylabel("seconds")
        panel.set_title("Work on two Dask workers of 600 MB")
        panel.legend()
    print(save(options.stem, parts, {"found": found}))


if __name__ == "__main__":
    main()
