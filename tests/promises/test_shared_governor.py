"""One governor for several processes: one ceiling, claims that die with their process, requests to the others."""

from __future__ import annotations

import errno
import gc
import os
import random
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kit import environment, let_others_in, raw_fork, sound, system
from nodedb_mem import (
    BudgetExhaustedError,
    EngineId,
    GlobalCeilingExceededError,
    GovernorIOError,
    MemoryGovernor,
    PressureThresholds,
)

MIB = 1 << 20
V, Q = EngineId.VECTOR, EngineId.QUERY
LIMITS = {V: 40 * MIB, Q: 20 * MIB}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "governor"


def open_it(path: Path) -> MemoryGovernor:
    return MemoryGovernor.shared(path, 64 * MIB, LIMITS)


@contextmanager
def child(script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """An interpreter that says a line when it is ready, and goes on when it is told a line."""
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    with subprocess.Popen(
        command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


HOLDS = """
    import sys
    from nodedb_mem import MemoryGovernor
    governor = MemoryGovernor.shared(sys.argv[1])
    held = governor.reserve(0, int(sys.argv[2]) << 20)
    print("held", flush=True)
    sys.stdin.readline()
    held.release()
    print("released", flush=True)
    sys.stdin.readline()
    """


def test_all_live_under_one_ceiling(path: Path) -> None:
    governor = open_it(path)
    with child(HOLDS, path, 30) as other:
        assert line(other) == "held"
        shot = governor.snapshot()
        assert shot.path == str(path) and shot.engines[V].allocated == 30 * MIB
        assert {process.pid: process.allocated for process in shot.processes} == {os.getpid(): 0, other.pid: 30 * MIB}
        with pytest.raises(BudgetExhaustedError) as caught:
            governor.reserve(V, 11 * MIB)
        assert caught.value.available == 10 * MIB and caught.value.holders == ((V, 30 * MIB),)
        with governor.reserve(V, 10 * MIB), governor.reserve(Q, 20 * MIB):
            pass
        governor.set_ceiling(40 * MIB)
        with pytest.raises(GlobalCeilingExceededError):
            governor.reserve(Q, 11 * MIB)
        tell(other)
        assert line(other) == "released"
        governor.reserve(Q, 20 * MIB).release()
        sound(governor)


def test_a_release_elsewhere_lets_a_waiter_in(path: Path) -> None:
    governor = open_it(path)
    with child(HOLDS, path, 40) as other:
        assert line(other) == "held"
        tell(other)
        governor.reserve(V, 40 * MIB, timeout=60).release()


def test_what_a_killed_process_held_is_given_back(path: Path) -> None:
    governor = open_it(path)
    with child(HOLDS, path, 40) as other:
        assert line(other) == "held"
        assert governor.try_reserve(V, MIB) is None
        other.send_signal(signal.SIGKILL)
        governor.reserve(V, 40 * MIB, timeout=60).release()
        assert len(governor.snapshot().processes) == 1
        sound(governor)


def test_requests_reach_the_reclaimers_of_other_processes(path: Path) -> None:
    governor = open_it(path)
    script = """
        import sys
        from nodedb_mem import MemoryGovernor
        governor = MemoryGovernor.shared(sys.argv[1])
        held = [governor.reserve(0, 1 << 20) for _ in range(40)]

        def spill(wanted):
            freed = 0
            while held and freed < wanted:
                freed += held[-1].size
                held.pop().release()
            return freed

        governor.add_reclaimer(0, spill)
        if sys.argv[2] == "watch":
            watch = governor.watch(0.01)
        print("held", flush=True)
        sys.stdin.readline()
        governor.reserve(4, 1).release()  # its next call sees the request
        print(len(held), flush=True)
        sys.stdin.readline()
        for each in held:
            each.release()
        """
    for how in ("watch", "call"):
        with child(script, path, how) as other:
            assert line(other) == "held"
            if how == "watch":
                governor.reserve(V, 5 * MIB, timeout=60).release()
            else:
                assert governor.try_reserve(V, 5 * MIB) is None
            tell(other)
            assert line(other) == "35"
            governor.reserve(V, 5 * MIB).release()
    # The first may have been killed before it had counted what it freed.
    assert governor.snapshot().engines[V].reclaimed in (5 * MIB, 10 * MIB)


def test_the_first_decides_and_the_others_agree(path: Path) -> None:
    governor = open_it(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = MemoryGovernor.shared(path)
    assert again.snapshot().ceiling == 64 * MIB and again.thresholds == PressureThresholds()
    for wrong in (
        lambda: MemoryGovernor.shared(path, 65 * MIB),
        lambda: MemoryGovernor.shared(path, 64 * MIB, headroom=1),
        lambda: MemoryGovernor.shared(path, 64 * MIB, thresholds=PressureThresholds(1, 2, 3)),
        lambda: MemoryGovernor.shared(path, limits={V: 41 * MIB}),
        lambda: MemoryGovernor.shared(path, limits={3: 5 * MIB}),
        lambda: MemoryGovernor.shared(path, limits={3: MIB, V: MIB}),
        lambda: MemoryGovernor.shared(path, limits={3: MIB, 256: MIB}),
    ):
        with pytest.raises(ValueError):
            wrong()
    assert governor.snapshot().engines.keys() == {V, Q}  # nothing of them was done
    MemoryGovernor.shared(path, limits={3: 4 * MIB})
    assert governor.snapshot().engines[3].limit == 4 * MIB
    assert len(governor.snapshot().processes) == 2  # this one and `again`: the others are gone
    del governor, again
    assert MemoryGovernor.shared(path, 10, {V: 10}).snapshot().engines.keys() == {V}


def test_looking_needs_a_file_and_claims_nothing(path: Path) -> None:
    with pytest.raises(GovernorIOError) as caught:
        MemoryGovernor.look(path)
    assert caught.value.errno == errno.ENOENT and caught.value.filename == str(path)
    governor = open_it(path)
    looking = MemoryGovernor.look(path)
    assert len(looking.snapshot().processes) == 1 and repr(looking) == f"<MemoryGovernor {path}: 0 of {64 * MIB} bytes>"
    looking.reserve(V, 5).release()
    assert len(governor.snapshot().processes) == 2
    del looking
    assert len(governor.snapshot().processes) == 1


@pytest.mark.parametrize(
    ("contents", "code", "message"),
    [
        (b"a file of somebody's", errno.EINVAL, "not the file of a governor"),
        (bytes(1 << 20), errno.EINVAL, "not the file of a governor"),
        (b"NDMGOVRN" + bytes(1 << 20), errno.EINVAL, "another version"),
    ],
)
def test_what_is_no_governor_is_refused_untouched(path: Path, contents: bytes, code: int, message: str) -> None:
    path.write_bytes(contents)
    for opened in (open_it, MemoryGovernor.look):
        with pytest.raises(GovernorIOError, match=message) as caught:
            opened(path)
        assert (caught.value.errno, caught.value.filename) == (code, str(path))
    assert path.read_bytes() == contents
    path.unlink()
    path.symlink_to("elsewhere")
    with pytest.raises(GovernorIOError):
        open_it(path)


def test_a_file_that_was_damaged_is_a_typed_error(path: Path) -> None:
    def made() -> bytes:
        path.unlink(missing_ok=True)
        governor = open_it(path)
        governor.reserve(V, 5).release()
        del governor
        return path.read_bytes()

    whole = made()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(GovernorIOError) as caught:
        open_it(path)
    assert caught.value.errno == errno.EUCLEAN
    chance = random.Random(5)
    outcomes = set()
    for _ in range(150):  # whatever was overwritten: an error, or a governor that works
        at = chance.choice([chance.randrange(64), chance.randrange(30_000), chance.randrange(len(whole) - 64)])
        size = chance.choice([1, 8, 64])
        path.write_bytes(whole[:at] + chance.randbytes(size) + whole[at + size :])
        try:
            governor = MemoryGovernor.shared(path, 64 * MIB)
            governor.add_engine(V, 40 * MIB)
            with governor.reserve(V, MIB):
                governor.snapshot()
            sound(governor)
            outcomes.add("sound")
        except (GovernorIOError, ValueError) as error:
            outcomes.add(type(error).__name__)
    assert {"sound", "GovernorIOError"} <= outcomes


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_the_file_of_another_user_is_refused(path: Path) -> None:
    open_it(path)
    os.chown(path, 65534, -1)
    let_others_in(path.parent)
    with pytest.raises(GovernorIOError) as caught:
        open_it(path)
    assert caught.value.errno == errno.EPERM
    os.chown(path, 0, -1)


@pytest.mark.parametrize("fork", [os.fork, raw_fork])
def test_a_forked_child_has_a_claim_of_its_own(path: Path, fork: Callable[[], int]) -> None:
    governor = open_it(path)
    held = governor.reserve(V, 30 * MIB)
    pid = fork()
    if pid == 0:
        status = 1
        try:
            held.release()  # the parent's
            assert governor.snapshot().allocated == 30 * MIB
            assert governor.try_reserve(V, 11 * MIB) is None
            mine = governor.reserve(V, 10 * MIB)
            assert len(governor.snapshot().processes) == 2 and mine.size == 10 * MIB
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert held.size == 30 * MIB
    shot = governor.snapshot()
    assert shot.allocated == 30 * MIB and len(shot.processes) == 1 and not shot.forked
    held.release()
    sound(governor)


def test_a_child_that_lives_on_keeps_no_claim_of_its_parent(path: Path, run_python: Callable[..., str]) -> None:
    open_it(path)
    script = """
    import os, signal, sys, time
    from nodedb_mem import MemoryGovernor
    keeper = MemoryGovernor.look(sys.argv[1])
    parent = os.fork()
    if parent == 0:
        governor = MemoryGovernor.shared(sys.argv[1], 64 << 20, {0: 40 << 20})
        held = governor.reserve(0, 30 << 20)
        child = os.fork()
        if child == 0:
            os.close(1)
            os.close(2)
            time.sleep(60)
            os._exit(0)
        print(child, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(parent, 0)
    for _ in range(5000):  # the child lets go before fork() returns there, which may take a moment
        shot = keeper.snapshot()
        if not shot.processes:
            break
        time.sleep(0.001)
    print(shot.allocated, len(shot.processes))
    """
    child, figures = run_python(script, path).strip().splitlines()
    os.kill(int(child), signal.SIGKILL)
    assert figures == "0 0"


WORKS = """
    import random, sys
    from nodedb_mem import GlobalCeilingExceededError, BudgetExhaustedError, MemoryGovernor
    governor = MemoryGovernor.shared(sys.argv[1], 64 << 20, {0: 40 << 20, 4: 20 << 20})
    chance = random.Random(int(sys.argv[2]))
    held = []
    print("ready", flush=True)
    while True:
        if held and chance.random() < 0.5:
            held.pop(chance.randrange(len(held))).release()
        try:
            size = chance.choice([1, 1000, 1 << 16, 1 << 20, 5 << 20])
            held.append(governor.reserve(chance.choice([0, 4]), size, timeout=chance.choice([0, 0, 0.001])))
        except (GlobalCeilingExceededError, BudgetExhaustedError):
            for each in held[::2]:
                each.release()
            del held[::2]
    """


@pytest.mark.parametrize("kills", [8, system(200)])
def test_processes_that_are_killed_at_random_leave_books_of_zero(path: Path, kills: int) -> None:
    governor = open_it(path)
    chance = random.Random(kills)
    workers: list[subprocess.Popen[str]] = []

    def start() -> None:
        command = [sys.executable, "-c", textwrap.dedent(WORKS), str(path), str(chance.random().hex().__hash__())]
        workers.append(subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True))

    def end(worker: subprocess.Popen[str]) -> None:
        worker.kill()
        worker.wait()
        assert worker.stdout is not None
        worker.stdout.close()

    try:
        for _ in range(4):
            start()
        for _ in range(kills):
            for worker in workers:
                if worker.stdout is not None and not hasattr(worker, "is_ready"):
                    assert line(worker) == "ready"
                    worker.is_ready = True  # type: ignore[attr-defined]
            end_of_round = time.monotonic() + chance.random() * 0.03
            while time.monotonic() < end_of_round:
                shot = governor.snapshot()
                assert shot.allocated <= 64 * MIB and shot.peak <= 64 * MIB
                assert all(budget.allocated <= budget.limit for budget in shot.engines.values())
            sound(governor)
            end(workers.pop(chance.randrange(len(workers))))
            start()
    finally:
        for worker in workers:
            end(worker)
    shot = governor.snapshot()
    assert shot.allocated == 0 and shot.waiting == 0 and len(shot.processes) == 1
    sound(governor)
    for engine, limit in LIMITS.items():
        governor.reserve(engine, limit).release()
    gc.collect()
