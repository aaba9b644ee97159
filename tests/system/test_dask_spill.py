"""Dask clusters of several processes that spill into regions: each way in, what stays behind, and a network."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from kit import environment

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(find_spec("distributed") is None, reason="needs dask and distributed"),
]


@pytest.fixture(autouse=True)
def not_sanitized(sanitized: bool) -> None:
    """Workers are judged by their RSS, of which AddressSanitizer has a multiple of its own."""
    if sanitized:
        pytest.skip("AddressSanitizer's own memory counts towards the limit of a worker")


MB = 1_000_000
SHARED = """
    import logging, os, sys, time

    import dask
    import dask.array as da
    import numpy as np
    from distributed import Client, LocalCluster, wait

    dask.config.set({"temporary-directory": os.getcwd()})
    MIB = 1 << 20

    def kind(dask_worker):
        return type(dask_worker.data).__name__

    def region(dask_worker):
        return dask_worker.data.store.stats()

    def totals(client, label, unit):
        found = client.run(lambda dask_worker: dict(dask_worker.data.cumulative_metrics))
        return sum(each.get((label, unit), 0) for each in found.values())

    def use(client, blocks, times=2):
        # blocks of 8 MiB that are kept, added up so often
        x = da.ones((blocks, MIB), chunks=(1, MIB)).cumsum(axis=1).persist()
        wait(x)
        expected = blocks * MIB * (MIB + 1) / 2
        for number in range(times):
            assert float((x + number).sum().compute()) == expected + number * blocks * MIB
        return x

    def cluster(limit, **options):
        return LocalCluster(
            n_workers=2, threads_per_worker=1, memory_limit=limit, dashboard_address=None, silence_logs=logging.ERROR,
            **options
        )
"""


def run_script(script: str, folder: Path, *arguments: object, prefix: tuple[str, ...] = ()) -> str:
    """Run a script in an interpreter of its own. It has to end well; the logs of workers go to its stderr."""
    file = folder / "script.py"
    main = "\nif __name__ == '__main__':\n    main(*sys.argv[1:])\n    print('done')\n"
    file.write_text(textwrap.dedent(SHARED) + textwrap.dedent(script) + main)
    done = subprocess.run(
        [*prefix, sys.executable, "-W", "ignore", file, *map(str, arguments)],
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert (done.returncode, done.stdout[-5:]) == (0, "done\n"), done.stdout + done.stderr
    return done.stderr


def running_in(folder: Path) -> list[str]:
    """Processes that have a file below a folder open, or work in it."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and process.name != str(os.getpid()):
            with suppress(OSError):
                links = [process / "cwd", *(process / "fd").iterdir()]
                if any(os.readlink(link).startswith(str(folder)) for link in links):
                    found.append(process.name)
    return found


def left_in(folder: Path) -> list[Path]:
    """Files that take up room below a folder, other than scripts and logs."""
    mine = {"script.py"}
    return [
        each
        for each in folder.rglob("*")
        if each.is_file() and each.stat().st_size > 1 and each.name not in mine and each.suffix not in (".log", ".json")
    ]


def assert_nothing_left(folder: Path) -> None:
    deadline = time.monotonic() + 20
    while running_in(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running_in(folder) and not left_in(folder)


@pytest.mark.parametrize("times", [2, 4])
def test_a_local_cluster_does_work_of_several_times_its_limit(tmp_path: Path, times: int) -> None:
    script = """
        def main(times):
            dask.config.set({"distributed.worker.preload": ["nodedb_mem.dask"]})
            limit = 400_000_000
            with cluster(limit) as workers, Client(workers) as client:
                assert set(client.run(kind).values()) == {"RegionBuffer"}
                blocks = int(times) * 2 * limit // (8 * MIB)
                x = use(client, blocks)
                assert not client.get_events("worker-restart-memory")
                spilled = sum(each.live_bytes for each in client.run(region).values())
                assert spilled > (int(times) - 1) * 2 * limit * 0.9
                # Written once, though each block went out several times.
                assert totals(client, "disk-write", "count") < 2.5 * blocks
                for rss in client.run(lambda dask_worker: dask_worker.monitor.get_process_memory()).values():
                    assert rss < limit
                del x
                deadline = time.monotonic() + 30
                while sum(each.disk_bytes for each in client.run(region).values()) > 8 * MIB:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
        """
    run_script(script, tmp_path, times)
    assert_nothing_left(tmp_path)


def test_a_running_cluster_is_switched_and_so_are_workers_that_join(tmp_path: Path) -> None:
    script = """
        import nodedb_mem.dask

        def main():
            with cluster(300_000_000) as workers, Client(workers) as client:
                x = use(client, 60, times=1)
                assert set(client.run(kind).values()) == {"SpillBuffer"}
                nodedb_mem.dask.install(client, max_capacity="2 GB", cache_limit="64 MiB")
                assert set(client.run(kind).values()) == {"RegionBuffer"}
                use(client, 60)
                assert float(x[:, -1].sum().compute()) == 60 * MIB
                workers.scale(3)
                client.wait_for_workers(3)
                assert list(client.run(kind).values()) == ["RegionBuffer"] * 3
                assert {each.max_capacity for each in client.run(region).values()} == {2_000_000_000}
                assert not client.get_events("worker-restart-memory")
        """
    run_script(script, tmp_path)
    assert_nothing_left(tmp_path)


def test_nothing_is_left_of_a_worker_that_is_killed_or_restarted(tmp_path: Path) -> None:
    script = """
        def disk(folder):
            usage = os.statvfs(folder)
            return (usage.f_blocks - usage.f_bfree) * usage.f_frsize

        def main():
            dask.config.set({"distributed.worker.preload": ["nodedb_mem.dask"]})
            with cluster(300_000_000) as workers, Client(workers) as client:
                x = use(client, 60, times=1)
                pids = client.run(os.getpid)
                assert sum(each.disk_bytes for each in client.run(region).values()) > 50 * MIB
                os.kill(min(pids.values()), 9)
                # What it had is computed again, by a new process that spills as well.
                assert float(x[:, -1].sum().compute()) == 60 * MIB
                client.wait_for_workers(2)
                assert set(client.run(kind).values()) == {"RegionBuffer"}
                assert set(client.run(os.getpid).values()) != set(pids.values())
                client.restart()
                client.wait_for_workers(2)
                assert set(client.run(kind).values()) == {"RegionBuffer"}
                assert sum(each.live_slots for each in client.run(region).values()) == 0
                use(client, 50, times=1)
        """
    run_script(script, tmp_path)
    assert_nothing_left(tmp_path)


def test_a_worker_on_a_full_disk_keeps_what_finds_no_room(tmp_path: Path, mount: Any) -> None:
    small = mount("ext4", 64)
    script = """
        def main(small):
            dask.config.set({
                "distributed.worker.preload": ["nodedb_mem.dask"],
                "nodedb-mem.directory": small,
                "distributed.worker.memory.pause": False,
                "distributed.worker.memory.terminate": False,
            })
            with cluster(200_000_000) as workers, Client(workers) as client:
                assert set(client.run(kind).values()) == {"RegionBuffer"}
                use(client, 50)
                assert 0 < sum(each.live_bytes for each in client.run(region).values()) < 60 * MIB
        """
    logs = run_script(script, tmp_path, small)
    assert "Traceback" not in logs.replace("Spill to disk failed; keeping data in memory\nTraceback", "")
    assert not [each for each in small.iterdir() if each.name != "lost+found"]


# -- as a deployment: each part of the cluster a command of its own --------------------------------------------------


@contextmanager
def started(command: list[Any], folder: Path, log: str) -> Iterator[subprocess.Popen[bytes]]:
    with open(folder / f"{log}.log", "wb") as out:
        process = subprocess.Popen(
            list(map(str, command)), cwd=folder, env=environment(), stdin=subprocess.DEVNULL, stdout=out, stderr=out
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


DEPLOYED = """
    def main(address, *hosts):
        with Client(address, timeout=60) as client:
            client.wait_for_workers(2, timeout=60)
            assert set(client.run(kind).values()) == {"RegionBuffer"}
            assert {each.split(":")[1].strip("/") for each in client.scheduler_info()["workers"]} == set(hosts)
            x = use(client, 90)
            sums = x.sum(axis=1).compute()
            assert sums.shape == (90,) and (sums == sums[0]).all()
            # Each worker gets the other's blocks, which lie in that one's region.
            for worker in client.scheduler_info()["workers"]:
                with dask.annotate(workers=[worker], allow_other_workers=False):
                    assert float((x + 1)[:, 0].sum().compute(optimize_graph=False)) == 180
            assert totals(client, "disk-read", "count") > 40 and totals(client, "disk-write", "count") > 20
            assert not client.get_events("worker-restart-memory")
"""


def deploy(folder: Path, prefixes: list[list[str]], hosts: list[str]) -> None:
    """Start a scheduler and two workers with folders of their own, and let a client of theirs work."""
    dask = [sys.executable, "-W", "ignore", "-m", "dask"]
    address = f"tcp://{hosts[0]}:8790"
    with ExitStack() as stack:
        scheduler = [*dask, "scheduler", "--host", hosts[0], "--port", 8790, "--no-dashboard"]
        stack.enter_context(started([*prefixes[0], *scheduler], folder, "scheduler"))
        for number in (1, 2):
            mine = folder / f"worker{number}"
            mine.mkdir()
            worker = [*dask, "worker", address, "--host", hosts[number], "--nthreads", 1, "--memory-limit", 450 * MB]
            worker += ["--local-directory", mine, "--no-dashboard", "--preload", "nodedb_mem.dask"]
            stack.enter_context(started([*prefixes[number], *worker], folder, f"worker{number}"))
        try:
            run_script(DEPLOYED, folder, address, *hosts[1:], prefix=tuple(prefixes[0]))
        except AssertionError as error:
            logs = [each.read_text() for each in folder.glob("*.log")]
            raise AssertionError("\n".join([str(error), *logs])) from None
    for number in (1, 2):
        assert f"Spilling to a region in {folder}/worker{number}/" in (folder / f"worker{number}.log").read_text()
    assert_nothing_left(folder)


@pytest.mark.xdist_group("port 8790")
def test_commands_on_addresses_of_their_own(tmp_path: Path) -> None:
    deploy(tmp_path, [[], [], []], ["127.0.0.1", "127.0.0.2", "127.0.0.3"])


def ip(*arguments: object) -> None:
    subprocess.run(["ip", *map(str, arguments)], check=True, capture_output=True, timeout=30)


@pytest.fixture
def network() -> Iterator[tuple[list[list[str]], list[str]]]:
    """Three network namespaces, on one bridge: how to enter them, and their addresses."""
    if os.geteuid() != 0 or not hasattr(ctypes.CDLL(None), "setns"):
        pytest.skip("network namespaces need root")
    tag = f"ndm{os.getpid() % 100_000}"
    names = [f"{tag}-{number}" for number in range(3)]
    try:
        try:
            ip("link", "add", f"{tag}b", "type", "bridge")
            ip("link", "set", f"{tag}b", "up")
            for number, name in enumerate(names):
                ip("netns", "add", name)
                ip("link", "add", f"{tag}v{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
                ip("link", "set", f"{tag}v{number}", "master", f"{tag}b")
                ip("link", "set", f"{tag}v{number}", "up")
                ip("-n", name, "addr", "add", f"10.213.7.{number + 1}/24", "dev", "eth0")
                ip("-n", name, "link", "set", "eth0", "up")
                ip("-n", name, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {error}")
        yield [["ip", "netns", "exec", name] for name in names], [f"10.213.7.{number}" for number in (1, 2, 3)]
    finally:
        for name in names:
            with suppress(OSError, subprocess.CalledProcessError):
                ip("netns", "del", name)
        with suppress(OSError, subprocess.CalledProcessError):
            ip("link", "del", f"{tag}b")


@pytest.mark.xdist_group("port 8790")
def test_commands_in_networks_of_their_own(tmp_path: Path, network: tuple[list[list[str]], list[str]]) -> None:
    deploy(tmp_path, *network)
