"""A matrix that two Dask workers cannot hold in RAM is used three times: with Dask's spill files, and with regions.

pip install nodedb-mem[dask] numpy
python examples/dask_spill.py [--blocks N] [--memory BYTES] [--directory DIR]
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time

import dask
import dask.array as da
from distributed import Client, LocalCluster, wait

BLOCK = 16 << 20  # bytes


def work(blocks: int) -> tuple[float, float]:
    """Keep a matrix on the workers, and use it three times. Give the seconds, and what came out."""
    start = time.perf_counter()
    matrix = da.ones((blocks, BLOCK // 8), chunks=(1, BLOCK // 8)).cumsum(axis=1).persist()
    wait(matrix)
    found = sum(float((matrix * factor).max(axis=1).sum().compute()) for factor in (1, 2, 3))
    return time.perf_counter() - start, found


def main() -> None:
    """Do the work with both kinds of storage."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--blocks", type=int, default=64, help="of 16 MiB each")
    parser.add_argument("--memory", type=int, default=500_000_000, help="bytes of each of two workers")
    parser.add_argument("--directory", help="where the workers spill: a folder on a disk")
    options = parser.parse_args()
    expected = 6.0 * options.blocks * (BLOCK // 8)
    for name, preload in (("files", []), ("regions", ["nodedb_mem.dask"])):
        with (
            tempfile.TemporaryDirectory(dir=options.directory) as folder,
            dask.config.set({"temporary-directory": folder, "distributed.worker.preload": preload}),
            LocalCluster(
                n_workers=2,
                threads_per_worker=1,
                memory_limit=options.memory,
                dashboard_address=None,
                silence_logs=logging.ERROR,
            ) as cluster,
            Client(cluster) as client,
        ):
            seconds, found = work(options.blocks)
            counts = client.run(lambda dask_worker: dict(dask_worker.data.cumulative_metrics)).values()
            written = sum(each.get(("disk-write", "bytes"), 0) for each in counts) / 1e6
            assert found == expected, found
            print(f"{name:8} {seconds:6.2f} s  {written:6.0f} MB written")


if __name__ == "__main__":
    main()
