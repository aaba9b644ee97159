"""What a governor promises whatever happens: against a model, with many threads, in forked children."""

from __future__ import annotations

import gc
import os
import random
import threading
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kit import raw_fork, sound, system
from nodedb_mem import BudgetExhaustedError, EngineId, GlobalCeilingExceededError, MemoryGovernor, Reservation

MIB = 1 << 20
V = EngineId.VECTOR
ENGINES = st.integers(0, 3)
SIZES = st.one_of(st.integers(0, 3000), st.sampled_from([1, 1000, 10_000, 40_000, 1 << 40]))
SPILLABLE = (True, True, False, True)


class GovernorMachine(RuleBasedStateMachine):
    """A governor beside sums of plain numbers."""

    @initialize(ceiling=st.integers(1000, 100_000), headroom=st.integers(0, 1000), shares=st.tuples(*[SIZES] * 4))
    def start(self, ceiling: int, headroom: int, shares: tuple[int, ...]) -> None:
        self.ceiling, self.headroom = ceiling, headroom
        self.limits = [min(share, ceiling // 4) for share in shares]
        self.governor = MemoryGovernor(ceiling, headroom=headroom)
        for engine, limit in enumerate(self.limits):
            self.governor.add_engine(engine, limit, spillable=SPILLABLE[engine])
        self.held: list[tuple[int, int, Reservation]] = []  # engine, size
        self.rejections, self.peaks, self.peak = [0] * 4, [0] * 4, 0

    def used(self, engine: int) -> int:
        return sum(size for other, size, _ in self.held if other == engine)

    def note(self) -> None:
        self.peaks = [max(peak, self.used(engine)) for engine, peak in enumerate(self.peaks)]
        self.peak = max(self.peak, sum(map(self.used, range(4))))

    def expected(self, engine: int, size: int) -> type[Exception] | None:
        spillable = sum(self.used(other) for other in range(4) if SPILLABLE[other])
        if self.used(engine) + size > self.limits[engine]:
            return BudgetExhaustedError
        if sum(map(self.used, range(4))) + size > self.ceiling:
            return GlobalCeilingExceededError
        if SPILLABLE[engine] and spillable + size > self.ceiling - self.headroom:
            return GlobalCeilingExceededError
        return None

    def refusal(self, engine: int, size: int, error: Exception) -> None:
        assert type(error) is self.expected(engine, size)
        if isinstance(error, BudgetExhaustedError):
            left = max(0, self.limits[engine] - self.used(engine))
            assert (error.engine, error.requested, error.available, error.limit) == (
                engine,
                size,
                left,
                self.limits[engine],
            )
        self.rejections[engine] += 1

    @rule(engine=ENGINES, size=SIZES)
    def reserve(self, engine: int, size: int) -> None:
        try:
            reservation = self.governor.reserve(engine, size)
        except (BudgetExhaustedError, GlobalCeilingExceededError) as error:
            self.refusal(engine, size, error)
        else:
            assert size == 0 or self.expected(engine, size) is None
            self.held.append((engine, size, reservation))
            self.note()

    @rule(engine=ENGINES, size=st.integers(0, 50_000))
    def charge(self, engine: int, size: int) -> None:
        self.held.append((engine, size, self.governor.charge(engine, size)))
        self.note()

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0), again=st.booleans())
    def release(self, which: int, again: bool) -> None:
        _, _, reservation = self.held.pop(which % len(self.held))
        reservation.release()
        if again:
            reservation.release()

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0), size=SIZES)
    def resize(self, which: int, size: int) -> None:
        place = which % len(self.held)
        engine, before, reservation = self.held[place]
        try:
            reservation.resize(size)
        except (BudgetExhaustedError, GlobalCeilingExceededError) as error:
            self.refusal(engine, size - before, error)
            assert reservation.size == before
        else:
            assert size <= before or self.expected(engine, size - before) is None
            self.held[place] = engine, size, reservation
            self.note()

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0), part=st.floats(0, 1))
    def split(self, which: int, part: float) -> None:
        place = which % len(self.held)
        engine, size, reservation = self.held[place]
        piece = reservation.split(int(size * part))
        self.held[place] = engine, reservation.size, reservation
        self.held.append((engine, piece.size, piece))
        assert reservation.size + piece.size == size

    @rule(engine=ENGINES, limit=st.integers(0, 30_000))
    def set_limit(self, engine: int, limit: int) -> None:
        total = sum(self.limits) - self.limits[engine] + limit
        if limit > self.limits[engine] and total > self.ceiling:
            with pytest.raises(ValueError):
                self.governor.set_limit(engine, limit)
        else:
            self.governor.set_limit(engine, limit)
            self.limits[engine] = limit

    @rule(ceiling=st.integers(1000, 100_000), headroom=st.integers(0, 1000))
    def set_ceiling(self, ceiling: int, headroom: int) -> None:
        self.governor.set_ceiling(ceiling, headroom=headroom)
        self.ceiling, self.headroom = ceiling, headroom

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "governor"):
            return
        sound(self.governor)
        shot = self.governor.snapshot()
        for engine, budget in shot.engines.items():
            assert (budget.allocated, budget.limit) == (self.used(engine), self.limits[engine])
            assert (budget.peak, budget.rejections) == (self.peaks[engine], self.rejections[engine])
        assert (shot.allocated, shot.peak) == (sum(map(self.used, range(4))), self.peak)
        assert (shot.ceiling, shot.headroom) == (self.ceiling, self.headroom)
        assert shot.overcommitted == max(0, shot.allocated - self.ceiling)

    def teardown(self) -> None:
        for _, _, reservation in getattr(self, "held", ()):
            reservation.release()


TestGovernorMachine = GovernorMachine.TestCase
TestGovernorMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("steps", [5000, system(100_000)])
def test_eight_threads_never_pass_a_limit(steps: int) -> None:
    """100,000 steps each, while a thread samples what is reserved."""
    ceiling, limits = 400_000, {0: 200_000, 1: 150_000, 2: 50_000}
    governor = MemoryGovernor(ceiling, limits)
    done = threading.Event()
    samples = 0

    def sample() -> None:
        nonlocal samples
        while not done.is_set():
            sound(governor)
            shot = governor.snapshot()
            assert shot.allocated <= ceiling and shot.peak <= ceiling
            for engine, limit in limits.items():
                assert shot.engines[engine].allocated <= limit and shot.engines[engine].peak <= limit
            samples += 1

    def work(seed: int) -> None:
        chance = random.Random(seed)
        held: list[Reservation] = []
        for _ in range(steps):
            if len(held) > 6 or (held and chance.random() < 0.4):
                held.pop(chance.randrange(len(held))).release()
                continue
            reservation = governor.try_reserve(chance.randrange(3), chance.choice([1, 500, 20_000]))
            if reservation is not None:
                held.append(reservation)
        for reservation in held:
            reservation.release()

    failed: list[BaseException] = []

    def guarded(function: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                function()
            except BaseException as error:
                failed.append(error)

        return run

    sampler = threading.Thread(target=guarded(sample))
    workers = [threading.Thread(target=guarded(lambda seed=seed: work(seed))) for seed in range(8)]  # type: ignore[misc]
    for thread in (sampler, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    done.set()
    sampler.join()
    assert not failed and samples > 0
    shot = governor.snapshot()
    assert shot.allocated == 0 and sum(budget.rejections for budget in shot.engines.values()) > 0
    sound(governor)


@pytest.mark.parametrize("fork", [os.fork, raw_fork])
def test_a_forked_child_starts_with_nothing_reserved_and_says_so(fork: Callable[[], int]) -> None:
    governor = MemoryGovernor(64 * MIB, {V: 32 * MIB})
    held, dropped = governor.reserve(V, 20 * MIB), governor.reserve(V, 10 * MIB)
    assert not governor.snapshot().forked
    pid = fork()
    if pid == 0:
        status = 1
        try:
            shot = governor.snapshot()
            assert shot.forked and shot.allocated == 0 and "forked child" in repr(governor)
            assert shot.engines[V].limit == 32 * MIB and shot.processes[0].pid == os.getpid()
            held.release()  # stands for nothing here
            held.release()
            del dropped  # without a warning
            gc.collect()
            mine = governor.reserve(V, 32 * MIB)
            assert governor.try_reserve(V, 1) is None
            mine.release()
            sound(governor)
            assert governor.snapshot().allocated == 0 and governor.snapshot().unreleased == 0
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert governor.snapshot().allocated == 30 * MIB and not governor.snapshot().forked
    held.release()
    dropped.release()
    sound(governor)


def test_a_child_of_a_busy_parent_is_not_stuck(run_python: Callable[..., str]) -> None:
    """Other threads are inside locks, reclaimers and waits when it is forked."""
    script = """
    import os, threading
    from nodedb_mem import MemoryGovernor
    governor = MemoryGovernor(1 << 20, {0: 1 << 20})
    governor.add_reclaimer(0, lambda wanted: 0)
    governor.on_pressure(lambda *_: None)
    stop = threading.Event()

    def work():
        while not stop.is_set():
            with governor.reserve(0, 700_000, timeout=10):
                governor.snapshot()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(30):
        pid = os.fork()
        if pid == 0:
            with governor.reserve(0, 1 << 20):
                os._exit(0 if governor.try_reserve(0, 1) is None and governor.snapshot().forked else 1)
        assert os.waitpid(pid, 0)[1] == 0
    stop.set()
    for thread in threads:
        thread.join()
    print(governor.snapshot().allocated)
    """
    assert run_python(script).strip() == "0"
