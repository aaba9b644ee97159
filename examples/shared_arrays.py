"""Many tasks on one array, in worker processes: by reference, by pickle, by joblib's memory maps, by shared memory.

    pip install nodedb-mem numpy joblib
    python examples/shared_arrays.py [--size BYTES] [--tasks N] [--workers N]

Each task adds up its part of the array. The array is handed to each task: as a reference to where it lies, as a pickle,
as a memory map of a file that joblib writes, or by the name of a block of shared memory. The time counts from the array
in RAM to the sum of all results.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import joblib
import numpy as np

from nodedb_mem import ObjectRef, OverflowMap, OverflowRegion

Task = tuple[Any, int, int]


def part(array: np.ndarray, number: int, tasks: int) -> float:
    """Add up one part of the array."""
    return float(np.array_split(array, tasks)[number].sum())


def by_reference(task: tuple[ObjectRef, int, int]) -> float:
    """Get the array where it lies."""
    ref, number, tasks = task
    return part(ref.get(), number, tasks)


def by_pickle(task: tuple[np.ndarray, int, int]) -> float:
    """Get the array along with the task."""
    return part(*task)


def by_name(task: tuple[tuple[str, int], int, int]) -> float:
    """Get the array from shared memory."""
    (name, count), number, tasks = task
    block = SharedMemory(name)
    result = part(np.ndarray(count, np.float64, block.buf), number, tasks)
    block.close()
    return result


def main() -> int:
    """Run the tasks in each way, and print the times."""
    parser = argparse.ArgumentParser(description="Many tasks on one array.")
    parser.add_argument("--size", type=int, default=1 << 30, help="bytes of the array")
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--directory", default=tempfile.gettempdir(), help="where the region lies")
    options = parser.parse_args()
    array = np.arange(options.size // 8, dtype=np.float64)
    expected = part(array, 0, 1)
    numbers = range(options.tasks)

    def tasks(handle: Any) -> list[Task]:
        return [(handle, number, options.tasks) for number in numbers]

    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        pool.map(abs, range(100))  # everyone is there

        def reference() -> list[float]:
            with OverflowRegion.temporary(options.directory, max_capacity=2 * options.size + (64 << 20)) as region:
                mapping: OverflowMap[str, np.ndarray] = OverflowMap(region)
                mapping["array"] = array
                return pool.map(by_reference, tasks(mapping.share("array")), 1)

        def shared_memory() -> list[float]:
            block = SharedMemory(create=True, size=array.nbytes)
            try:
                np.ndarray(array.size, np.float64, block.buf)[:] = array
                return pool.map(by_name, tasks((block.name, array.size)), 1)
            finally:
                block.close()
                block.unlink()

        def memmapping() -> list[float]:
            with joblib.Parallel(options.workers, temp_folder=options.directory) as parallel:
                return list(parallel(joblib.delayed(part)(*task) for task in tasks(array)))

        ways: dict[str, Callable[[], list[float]]] = {
            "by reference": reference,
            "shared memory": shared_memory,
            "joblib": memmapping,
            "pickle": lambda: pool.map(by_pickle, tasks(array), 1),
        }
        for name, way in ways.items():
            begin = time.perf_counter()
            found = way()
            seconds = time.perf_counter() - begin
            assert np.isclose(sum(found), expected)
            print(f"{name:14} {seconds:8.3f} s")
        pool.close()
        pool.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
