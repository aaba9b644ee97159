"""What shows a governor, and what uses it natively: the command, the Prometheus collectors, numba."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from kit import NewRegion, Run, environment, in_thread
from nodedb_mem import EngineId, MemoryGovernor
from nodedb_mem.metrics import GovernorCollector, RegionCollector

MIB = 1 << 20
V, Q = EngineId.VECTOR, EngineId.QUERY


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "governor"


def test_the_command_shows_engines_and_processes(run: Run, path: Path) -> None:
    governor = MemoryGovernor.shared(path, 64 * MIB, {V: 32 * MIB, Q: 16 * MIB, 99: 16 * MIB}, headroom=MIB)
    with governor.reserve(V, 29 * MIB), governor.charge(Q, 40 * MIB):
        status, out, err = run("governor", path)
        assert (status, err) == (0, "")
        plain = " ".join(out.split())
        for part in ("72.4 MB of 67.1 MB", "vector", "30.4 MB 33.6 MB", "critical", "emergency", "over-committed"):
            assert part in plain, part
        assert str(os.getpid()) in plain and "unknown" in plain and "99" in plain
        assert len(governor.snapshot().processes) == 1  # it has claimed nothing


def test_the_command_prints_json(run: Run, path: Path) -> None:
    governor = MemoryGovernor.shared(path, 64 * MIB, {V: 32 * MIB})
    with governor.reserve(V, 16 * MIB):
        status, out, err = run("governor", "--json", path)
        assert (status, err) == (0, "")
        told = json.loads(out)
        here = governor.snapshot().as_json()
        assert {name: told[name] for name in ("ceiling", "allocated", "engines", "processes")} == {
            name: here[name] for name in ("ceiling", "allocated", "engines", "processes")
        }


def test_what_is_no_governor_is_status_2(run: Run, path: Path) -> None:
    status, out, err = run("governor", path)
    assert (status, out) == (2, "") and "No such file" in err and str(path) in err
    path.write_bytes(b"something")
    status, out, err = run("governor", "--json", path)
    assert (status, out) == (2, "") and err.count("\n") == 1


def test_the_command_watches_until_it_is_interrupted(path: Path) -> None:
    governor = MemoryGovernor.shared(path, 64 * MIB, {V: 32 * MIB})
    command = [sys.executable, "-m", "nodedb_mem", "governor", "--json", "--watch", str(path)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["allocated"] == 0
        with governor.reserve(V, 7):
            while json.loads(process.stdout.readline())["allocated"] != 7:
                pass
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait() == 0


def metrics(collector: object) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(collector)  # type: ignore[arg-type]
    lines = generate_latest(registry).decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_a_governor_is_collected() -> None:
    governor = MemoryGovernor(64 * MIB, {V: 32 * MIB, Q: 16 * MIB})
    with governor.reserve(V, 30 * MIB):
        assert governor.try_reserve(V, 3 * MIB) is None
        found = in_thread(lambda: metrics(GovernorCollector(governor, "main")))
    assert found['nodedb_mem_governor_ceiling_bytes{governor="main"}'] == 64 * MIB
    assert found['nodedb_mem_governor_allocated_bytes{governor="main"}'] == 30 * MIB
    assert found['nodedb_mem_engine_limit_bytes{engine="query",governor="main"}'] == 16 * MIB
    assert found['nodedb_mem_engine_rejections_total{engine="vector",governor="main"}'] == 1
    assert found['nodedb_mem_governor_pressure{governor="main"}'] == 0
    assert found[f'nodedb_mem_process_allocated_bytes{{governor="main",pid="{os.getpid()}"}}'] == 30 * MIB


def test_a_region_is_collected_as_its_owner_last_said(new_region: NewRegion) -> None:
    region = new_region()
    collector = RegionCollector(region, "spill")
    region.write(bytes(1000), V)
    assert metrics(collector)['nodedb_mem_region_live_bytes{region="spill"}'] == 0
    collector.update()
    found = in_thread(lambda: metrics(collector))
    assert found['nodedb_mem_region_live_bytes{region="spill"}'] == 1000
    assert found['nodedb_mem_region_engine_live_bytes{engine="vector",region="spill"}'] == 1000
    assert 'nodedb_mem_region_growths_total{region="spill"}' in found
    assert str(region.path) in next(iter(metrics(RegionCollector(region))))


def test_a_handle_stands_for_its_governor(run_python: Callable[..., str]) -> None:
    script = """
    from nodedb_mem import MemoryGovernor
    from nodedb_mem._core import lib
    governor = MemoryGovernor(100, {0: 100})
    handle = governor.handle
    assert handle == governor.handle and 0 < handle < 1 << 63
    assert lib.ndm_g_reserve(handle, 0, 60) == 0 and governor.snapshot().allocated == 60
    assert lib.ndm_g_reserve(handle, 0, 41) == lib.NDM_ERR_BUDGET
    assert lib.ndm_g_pressure(handle, 0) == 0 and lib.ndm_g_allocated(handle, -1) == 60
    assert lib.ndm_g_release(handle, 0, 60) == 0 and lib.ndm_g_release(handle, 0, 1) == lib.NDM_ERR_ARGUMENT
    del governor
    assert lib.ndm_g_reserve(handle, 0, 1) == lib.NDM_ERR_CLOSED
    """
    assert run_python(script) == ""


@pytest.mark.system
def test_compiled_loops_reserve(tmp_path: Path) -> None:
    pytest.importorskip("numba", reason="the extra native-test is not installed")
    script = """
    import numba
    import numpy as np
    from nodedb_mem import BudgetExhaustedError, MemoryGovernor
    from nodedb_mem import numba as native

    @numba.njit(parallel=True, nogil=True)
    def work(handle, count, refused):
        for i in numba.prange(count):
            if native.reserve(handle, 0, 1000) == 0:
                native.release(handle, 0, 1000)
            else:
                refused[i] = 1

    @numba.njit
    def take(handle, size):
        return native.reserve(handle, 0, size)

    @numba.njit
    def look(handle):
        return native.charge(handle, 0, 950), native.pressure(handle, 0), native.allocated(handle, -1)

    governor = MemoryGovernor(1_000_000, {0: 1000})
    refused = np.zeros(100_000, np.int64)
    work(governor.handle, len(refused), refused)
    assert governor.snapshot().allocated == 0 and governor.snapshot().engines[0].peak == 1000
    try:
        native.check(take(governor.handle, 1001))
    except BudgetExhaustedError as error:
        assert (error.requested, error.limit, error.available) == (1001, 1000, 1000)
    else:
        raise AssertionError
    assert look(governor.handle) == (0, 3, 950)
    assert native.reserve(governor.handle, 0, 50) == 0 == native.release(governor.handle, 0, 1000)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    subprocess.run(command, env=environment(), cwd=tmp_path, check=True)


def test_the_compiled_names_are_those_of_plain_python() -> None:
    source = Path(MemoryGovernor.__init__.__code__.co_filename).with_name("numba.py").read_text()
    overloaded = set(re.findall(r"@overload\((\w+)", source))
    assert {"reserve", "release", "charge", "pressure", "allocated"} <= overloaded
