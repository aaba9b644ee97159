"""References go through a Dask scheduler: tasks in worker processes read what the client's region holds."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import pytest

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(find_spec("distributed") is None, reason="needs dask and distributed"),
]

# In an interpreter of its own: a cluster keeps threads and descriptors for its process.
_CLIENT = """
    import logging, os, sys, zlib
    from random import Random

    import dask
    from distributed import Client, LocalCluster

    from nodedb_mem import OverflowRegion, StaleSlotError

    def checksum(ref):
        import os, zlib
        from nodedb_mem import OverflowReader
        with OverflowReader(ref) as reader, reader.borrow(ref) as view:
            return zlib.crc32(view), zlib.crc32(reader.read_bytes(ref)), os.getpid()

    def main(path):
        values = [Random(i).randbytes(size) for i, size in enumerate((0, 1, 5000, 300_000, 2_000_000))]
        options = dict(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None)
        options |= dict(silence_logs=logging.CRITICAL)  # workers log the errors of tasks
        dask.config.set({"temporary-directory": os.getcwd()})
        with (
            LocalCluster(**options) as cluster,
            Client(cluster) as client,
            OverflowRegion(path, initial_capacity=1 << 20) as region,
        ):
            refs = [region.share(region.write(value, 0)) for value in values]
            seen = client.gather(client.map(checksum, refs * 4, pure=False))
            assert [found[:2] for found in seen] == [(zlib.crc32(value),) * 2 for value in values] * 4
            assert os.getpid() not in {process for _, _, process in seen}
            workers = sorted(client.scheduler_info()["workers"])
            assert len(workers) == 2
            for worker in workers:  # each of them can
                assert client.submit(checksum, refs[3], workers=[worker], pure=False).result()[0] == seen[3][0]
            region.free(refs[3].slot)
            region.write(bytes(300_000), 0)  # takes the number, and the bytes
            for worker in workers:
                error = client.submit(checksum, refs[3], workers=[worker], pure=False).exception()
                assert type(error) is StaleSlotError and path in str(error), error
            assert client.submit(checksum, refs[4]).result()[0] == zlib.crc32(values[4])
        print("done")

    if __name__ == "__main__":
        main(sys.argv[1])
"""


def test_references_go_through_a_dask_scheduler(run_python: Callable[..., str]) -> None:
    assert run_python(_CLIENT, "region") == "done\n"


def test_references_go_through_dasks_process_pool(run_python: Callable[..., str]) -> None:
    script = """
        import zlib

        import dask

        from nodedb_mem import OverflowRegion, StaleSlotError

        def checksum(ref):
            import zlib
            from nodedb_mem import OverflowReader
            with OverflowReader(ref) as reader:
                return zlib.crc32(reader.read(ref))

        with OverflowRegion("region", initial_capacity=1 << 20) as region:
            values = [bytes([i]) * 100_000 for i in range(6)]
            refs = [region.share(region.write(value, 0)) for value in values]
            tasks = [dask.delayed(checksum)(ref) for ref in refs]
            found = dask.compute(*tasks, scheduler="processes", num_workers=2)
            assert found == tuple(zlib.crc32(value) for value in values), found
            region.free(refs[2].slot)
            try:
                dask.compute(tasks[2], scheduler="processes", num_workers=2)
            except StaleSlotError:
                print("stale")
        """
    assert run_python(script) == "stale\n"
