"""Leases: values that a reader keeps in place, and what ends that."""

from __future__ import annotations

import gc
import os
import random
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit import NewRegion, StartPython, let_others_in, system
from nodedb_mem import (
    CapacityExceededError,
    InvalidSlotError,
    OverflowReader,
    OverflowRegion,
    RegionIOError,
    StaleSlotError,
    WrongThreadError,
)
from nodedb_mem._core import lib

KIB, MIB = 1 << 10, 1 << 20
SIZE = 100_000

# Leases the values that it is told of, and keeps them until it is killed.
_HOLDER = """
import sys
from nodedb_mem import OverflowReader
reader = OverflowReader(sys.argv[1])
leases = [reader.lease(int(slot)) for slot in sys.argv[2:]]
print(*(bytes(lease.view[:4]).hex() for lease in leases), flush=True)
sys.stdin.read()
"""


def blob(seed: int, size: int = SIZE) -> bytes:
    return random.Random(seed).randbytes(size)


def shared_region(new_region: NewRegion, count: int = 3, **options: Any) -> tuple[OverflowRegion, list[int]]:
    region = new_region(**options)
    slots = [region.write(blob(i), 0) for i in range(count)]
    region.share(slots[0])
    return region, slots


def churn(region: OverflowRegion) -> None:
    """Do what would overwrite a place that nobody keeps."""
    slots = [region.write(b"\xff" * SIZE, 0) for _ in range(4)]
    region.compact()
    region.trim()
    for slot in slots:
        region.free(slot)
    region.compact()


def test_a_lease_keeps_the_bytes_through_everything(new_region: NewRegion) -> None:
    region, slots = shared_region(new_region)
    with OverflowReader(region.path) as reader:
        lease = reader.lease(slots[1])
        assert lease.view.readonly
        region.free(slots[0])  # what follows would slide down
        place = region.slot(slots[1]).offset
        region.compact()
        assert region.slot(slots[1]).offset == place
        region.free(slots[1])
        assert region.stats().pinned_bytes >= SIZE
        churn(region)
        region.write(blob(9, 3 * MIB), 0)
        assert bytes(lease.view) == blob(1)
        lease.release()
        lease.release()
        assert region.stats().pinned_bytes == 0


@pytest.mark.parametrize("ending", ["release", "with", "gc", "close", "reader gone"])
def test_how_a_lease_ends(new_region: NewRegion, ending: str) -> None:
    region, slots = shared_region(new_region)
    reader = OverflowReader(region.path)
    lease = reader.lease(slots[1])
    region.free(slots[1])
    assert region.stats().pinned_bytes > 0
    match ending:
        case "release":
            lease.release()
        case "with":
            with lease as view:
                assert bytes(view) == blob(1)
            del view
        case "gc":
            del lease
            gc.collect()
        case "close":
            reader.close()
        case "reader gone":
            del reader, lease
            gc.collect()
    assert region.stats().pinned_bytes == 0  # at once: nothing had to be reaped


def test_a_view_of_a_lease_holds_it(new_region: NewRegion) -> None:
    region, slots = shared_region(new_region)
    with OverflowReader(region.path) as reader:
        part = np.frombuffer(reader.lease(slots[1]).view, np.uint8)[10:20]
        region.free(slots[1])
        gc.collect()
        assert region.stats().pinned_bytes > 0
        churn(region)
        assert part.tobytes() == blob(1)[10:20]
        del part
        assert region.stats().pinned_bytes == 0


def test_the_view_of_a_lease_outlives_the_reader(new_region: NewRegion) -> None:
    region, slots = shared_region(new_region)
    with OverflowReader(region.path) as reader:
        view = reader.lease(slots[1]).view
    assert bytes(view) == blob(1)
    del view


def test_two_readers_lease_one_value(new_region: NewRegion) -> None:
    region, slots = shared_region(new_region)
    with OverflowReader(region.path) as one, OverflowReader(region.path) as two:
        first, second, third = one.lease(slots[1]), two.lease(slots[1]), one.lease(slots[1])
        assert one.stats().leases == 3
        region.free(slots[1])
        first.release()
        third.release()
        churn(region)
        assert region.stats().pinned_bytes > 0 and bytes(second.view) == blob(1)
        second.release()
        assert region.stats().pinned_bytes == 0
        assert two.stats().leases == 0


def test_the_owners_view_and_a_lease_keep_a_value_together(new_region: NewRegion) -> None:
    region, slots = shared_region(new_region)
    with OverflowReader(region.path) as reader:
        view, lease = region.read(slots[1]), reader.lease(slots[1])
        region.free(slots[1])
        lease.release()
        churn(region)
        assert bytes(view) == blob(1)
        view.release()
        del view
        assert region.stats().pinned_bytes == 0


@pytest.mark.parametrize("freed", [False, True])
def test_a_process_that_was_killed(new_region: NewRegion, start_python: StartPython, freed: bool) -> None:
    region, slots = shared_region(new_region, count=2)
    child = start_python(_HOLDER, region.path, slots[1])
    assert child.stdout.readline().strip() == blob(1)[:4].hex()
    place = region.slot(slots[1]).offset
    region.free(slots[0])
    if freed:
        region.free(slots[1])
    region.compact()
    assert region.slot(slots[1]).offset == place
    child.kill()
    child.wait()
    if freed:
        region.trim()
        assert region.stats().pinned_bytes == 0
    else:
        region.compact()
        assert region.slot(slots[1]).offset < place and region.read_bytes(slots[1]) == blob(1)
    with OverflowReader(region.path) as reader:
        reader.lease(region.write(b"value", 0)).release()
        assert reader.stats().leases == 0


def test_growth_reaps_what_a_killed_process_held(new_region: NewRegion, start_python: StartPython) -> None:
    region, slots = shared_region(new_region, count=8)
    child = start_python(_HOLDER, region.path, *slots)
    child.stdout.readline()
    for slot in slots:
        region.free(slot)
    child.kill()
    child.wait()
    for i in range(200):  # for ever, if the space were lost
        region.free(region.write(blob(i, 700_000), 0))
    assert region.capacity < 4 * MIB
    region.write(blob(1, region.capacity), 0)
    assert region.stats().pinned_bytes == 0


@pytest.mark.parametrize("way", ["write", "allocate", "write_many", "write_vectored"])
def test_at_the_ceiling_what_a_killed_process_held_is_room(
    new_region: NewRegion, start_python: StartPython, way: str
) -> None:
    region = new_region(initial_capacity=1 << 20, max_capacity=1 << 20)
    slot = region.write(bytes(900_000), 0)
    region.share(slot)
    child = start_python(_HOLDER, region.path, slot)
    child.stdout.readline()
    region.free(slot)
    write = {
        "write": lambda: region.write(bytes(800_000), 0),
        "allocate": lambda: region.allocate(800_000, 0),
        "write_many": lambda: region.write_many([bytes(400_000)] * 2, 0),
        "write_vectored": lambda: region.write_vectored([bytes(400_000)] * 2, 0),
    }[way]
    with pytest.raises(CapacityExceededError):
        write()
    assert len(region) == 0
    child.kill()
    child.wait()
    write()


def test_a_reader_takes_over_what_the_dead_held(new_region: NewRegion, start_python: StartPython) -> None:
    region, slots = shared_region(new_region)
    child = start_python(_HOLDER, region.path, *[slots[0]] * 2000)
    child.stdout.readline()
    with OverflowReader(region.path) as reader:
        with pytest.raises(RegionIOError, match="all leases are taken") as caught:
            reader.lease(slots[1])
        assert caught.value.filename == f"{region.path}.leases"
        assert reader.read_bytes(slots[1]) == blob(1)
        child.kill()
        child.wait()
        with reader.lease(slots[1]) as view:
            assert bytes(view) == blob(1)
            region.free(slots[1])
            churn(region)
            assert bytes(view) == blob(1)
        assert reader.stats().leases == 0


def test_all_leases_taken_by_one_reader(new_region: NewRegion) -> None:
    region, slots = shared_region(new_region)
    with OverflowReader(region.path) as reader:
        leases = [reader.lease(slots[0]) for _ in range(2000)]
        with pytest.raises(RegionIOError, match="all leases are taken"):
            reader.lease(slots[1])
        leases.pop(1000).release()
        leases.append(reader.lease(slots[1]))
    with OverflowReader(region.path) as reader:
        reader.lease(slots[0])


def test_a_fork_does_not_keep_leases_alive(new_region: NewRegion) -> None:
    region, slots = shared_region(new_region)
    reader = OverflowReader(region.path)
    lease = reader.lease(slots[1])
    go, stop = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(stop)
        os.read(go, 1)
        with suppress(WrongThreadError):
            lease.release()  # not the child's to end
            os._exit(1)
        reader.close()
        os._exit(0)
    region.free(slots[1])
    reader.close()
    assert region.stats().pinned_bytes == 0
    with OverflowReader(region.path) as again, again.lease(slots[0]):
        os.close(stop)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert again.stats().leases == 1
    os.close(go)


def test_a_lease_in_a_temporary_region(tmp_path: Path, start_python: StartPython) -> None:
    with OverflowRegion.temporary(tmp_path, initial_capacity=1 << 16) as region:
        ref = region.share(region.write(blob(1), 0))
        child = start_python(
            """
            import ast, sys
            from nodedb_mem import OverflowReader, SlotRef
            ref = SlotRef(*ast.literal_eval(sys.argv[1]))
            reader = OverflowReader(ref)
            lease = reader.lease(ref)
            print(reader.stats().leases, flush=True)
            sys.stdin.readline()
            print(bytes(lease.view[:4]).hex(), flush=True)
            sys.stdin.read()
            """,
            tuple(ref),
        )
        assert child.stdout.readline() == "1\n"
        region.free(ref.slot)
        churn(region)
        assert region.stats().pinned_bytes >= SIZE
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.readline() == blob(1)[:4].hex() + "\n"
        child.kill()
        child.wait()
        region.trim()
        assert region.stats().pinned_bytes == 0


def test_no_leases_before_the_first_share(new_region: NewRegion) -> None:
    region = new_region()
    slot = region.write(b"value", 0)
    with OverflowReader(region.path) as reader:
        with pytest.raises(RegionIOError, match="leases file: No such file") as caught:
            reader.lease(slot)
        assert caught.value.errno == 2 and caught.value.filename == f"{region.path}.leases"
        region.share(slot)
        with reader.lease(slot) as view:
            assert bytes(view) == b"value"


def test_a_file_that_holds_no_leases(new_region: NewRegion, tmp_path: Path) -> None:
    region = new_region()
    slot = region.write(b"value", 0)
    (tmp_path / "region.leases").write_bytes(b"something else")
    with pytest.raises(RegionIOError, match="leases"):
        region.share(slot)
    with OverflowReader(region.path) as reader, pytest.raises(RegionIOError, match="leases"):
        reader.lease(slot)
    assert (tmp_path / "region.leases").read_bytes() == b"something else"


def test_stale_values_are_not_leased(new_region: NewRegion) -> None:
    region, slots = shared_region(new_region)
    ref = region.share(slots[1])
    region.free(slots[1])
    with OverflowReader(region.path) as reader:
        with pytest.raises(StaleSlotError):
            reader.lease(ref)
        with pytest.raises(InvalidSlotError):
            reader.lease(slots[1])
        assert reader.stats().leases == 0


def test_a_reader_that_may_not_lease(new_region: NewRegion, start_python: StartPython, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to be somebody else")
    region, slots = shared_region(new_region)
    let_others_in(tmp_path)
    os.chmod(region.path, 0o644)
    os.chmod(f"{region.path}.slots", 0o644)
    child = start_python(
        """
        import os, sys
        from nodedb_mem import OverflowReader, RegionIOError
        os.setgid(65534)
        os.setuid(65534)
        with OverflowReader(sys.argv[1]) as reader:
            print(len(reader.read_bytes(int(sys.argv[2]))))
            try:
                reader.lease(int(sys.argv[2]))
            except RegionIOError as error:
                print(error.errno, error.filename)
        """,
        region.path,
        slots[0],
    )
    assert child.stdout.read() == f"{SIZE}\n13 {region.path}.leases\n"


def test_leases_of_an_earlier_opening_count_no_more(new_region: NewRegion) -> None:
    region, slots = shared_region(new_region)
    with OverflowReader(region.path) as old:
        leases = [old.lease(slot) for slot in slots]
        region.close()
        again, slots = shared_region(new_region)
        region = again
        with OverflowReader(region.path) as reader:
            lease = reader.lease(slots[1])
            for stale in leases:
                stale.release()
            old.close()
            assert reader.stats().leases == 1
            region.free(slots[1])
            churn(region)
            assert bytes(lease.view) == blob(1)
            lease.release()
        del lease, leases, stale
        assert region.stats().pinned_bytes == 0


def test_leases_outlast_the_owner(new_region: NewRegion) -> None:
    region, slots = shared_region(new_region)
    with OverflowReader(region.path) as reader:
        lease = reader.lease(slots[1])
        region.close()
        again = new_region(recover=True)
        place = again.slot(slots[1]).offset
        again.free(slots[0])
        again.compact()
        assert again.slot(slots[1]).offset == place
        again.free(slots[1])
        churn(again)
        assert bytes(lease.view) == blob(1)
        lease.release()
        assert again.stats().pinned_bytes == 0


def test_leases_come_and_go_at_random(new_region: NewRegion, check: Callable[[OverflowRegion], None]) -> None:
    chance = random.Random(3)
    region = new_region()
    live: dict[int, int] = {region.write(blob(0, 1000), 0): 0}
    region.share(next(iter(live)))
    held: list[tuple[Any, int]] = []
    with OverflowReader(region.path) as one, OverflowReader(region.path) as two:
        for step in range(1, 2000):
            match chance.randrange(8):
                case 0 | 1:
                    live[region.write(blob(step, 1000 + step), 0)] = step
                case 2 | 3 if live:
                    slot = chance.choice(list(live))
                    del live[slot]
                    region.free(slot)
                case 4 | 5 if live:
                    slot = chance.choice(list(live))
                    held.append((chance.choice([one, two]).lease(slot), live[slot]))
                case 6 if held:
                    lease, seed = held.pop(chance.randrange(len(held)))
                    assert bytes(lease.view) == (blob(seed, 1000 + seed))
                    lease.release()
                case 7:
                    chance.choice([region.compact, region.trim])()
            if step % 100 == 0:
                check(region)
        for lease, seed in held:
            assert bytes(lease.view) == blob(seed, 1000 + seed)
    del held, lease
    assert region.stats().pinned_bytes == 0
    assert lib.ndm_region_check(region._handle) == 0


# ---- freed values that wait ------------------------------------------------------------------------------------


def test_the_space_of_freed_values_is_used_again(
    new_region: NewRegion, check: Callable[[OverflowRegion], None]
) -> None:
    """Where readers may lease, some freed values wait until the owner has asked for all of them: no more than some."""
    region, slots = shared_region(new_region)
    used = region.used_bytes
    for size in (64, 5000, 70_000, 400_000):
        for _ in range(1000 if size < 10_000 else 50):
            region.free(region.write(b"x" * size, 0))
        assert region.used_bytes <= used + max(256 * KIB, size) + 2 * size
    check(region)
    region.compact()
    region.trim()
    assert region.used_bytes == used and region.stats().free_bytes == 0
    assert [region.read_bytes(slot) for slot in slots] == [blob(i) for i in range(3)]


def test_figures_know_of_all_that_was_freed(new_region: NewRegion) -> None:
    region, slots = shared_region(new_region, count=10)
    with OverflowReader(region.path) as reader, reader.lease(slots[3]):
        for slot in slots[:5]:
            region.free(slot)
        stats = region.stats()
        length = -(-SIZE // 64) * 64
        assert stats.pinned_bytes == length and stats.free_bytes == 4 * length
        assert reader.stats().pinned_bytes == length


def test_a_leased_value_among_many_that_are_freed(new_region: NewRegion) -> None:
    region = new_region()
    slots = region.write_many([blob(i, 300) for i in range(1000)], 0)
    region.share(slots[0])
    chance = random.Random(4)
    kept = chance.sample(range(1000), 60)
    with OverflowReader(region.path) as reader:
        leases = {i: reader.lease(slots[i]) for i in kept}
        order = list(range(1000))
        chance.shuffle(order)
        for i in order:
            region.free(slots[i])
            region.write(b"\xff" * 300, 0)
        assert all(bytes(lease.view) == blob(i, 300) for i, lease in leases.items())
        assert region.stats().pinned_bytes == 60 * 320
        for lease in leases.values():
            lease.release()
        for _ in range(1000):  # the owner need not be asked
            region.free(region.write(b"y", 0))
        assert reader.stats().pinned_bytes <= 64 * 64


def test_a_process_that_was_killed_frees_its_space_in_time(new_region: NewRegion, start_python: StartPython) -> None:
    region, slots = shared_region(new_region)
    child = start_python(_HOLDER, region.path, slots[0])
    child.stdout.readline()
    region.free(slots[0])
    assert region.stats().pinned_bytes > 0
    child.kill()
    child.wait()
    for _ in range(200):
        region.read(slots[1])
    with OverflowReader(region.path) as reader:
        assert reader.stats().pinned_bytes == 0


# ---- the owner dies -------------------------------------------------------------------------------------------

# Writes what `blob` gives, then frees the slots that it is told of; it ends by being killed.
_OWNER = """
import random, sys
from nodedb_mem import OverflowRegion
path, count, recover = sys.argv[1], int(sys.argv[2]), len(sys.argv) > 3
region = OverflowRegion(path, initial_capacity=1 << 16, max_capacity=1 << 24, recover=recover)
for seed in range(count):
    region.share(region.write(random.Random(seed).randbytes(100_000), 0))
print("ready", flush=True)
for line in sys.stdin:
    region.free(int(line))
    print("freed", flush=True)
"""


def killed_after_freeing(owner: Any, *slots: int) -> None:
    for slot in slots:
        owner.stdin.write(f"{slot}\n")
        owner.stdin.flush()
        assert owner.stdout.readline() == "freed\n"
    owner.kill()
    owner.wait()


def fields(region: OverflowRegion, which: str = "slots", offset: int = 48, count: int = 1) -> tuple[int, ...]:
    """Words of a file; of the slot table's, the incarnation."""
    with open(f"{region.path}.{which}", "rb") as file:
        file.seek(offset)
        return struct.unpack(f"={count}Q", file.read(8 * count))


def patch_entry(path: Path, number: int, *words: int) -> None:
    with open(path, "r+b") as file:
        file.seek(32 + 32 * number)
        file.write(struct.pack(f"={len(words)}Q", *words))


@pytest.mark.parametrize("again", [False, True], ids=["killed once", "killed twice"])
def test_recovery_keeps_what_was_freed_but_leased(
    new_region: NewRegion,
    start_python: StartPython,
    tmp_path: Path,
    check: Callable[[OverflowRegion], None],
    again: bool,
) -> None:
    owner = start_python(_OWNER, tmp_path / "region", 4)
    assert owner.stdout.readline() == "ready\n"
    with OverflowReader(tmp_path / "region") as reader, OverflowReader(tmp_path / "region") as other:
        lease, twice, last = reader.lease(1), other.lease(1), reader.lease(3)
        killed_after_freeing(owner, 1, 3)
        if again:
            owner = start_python(_OWNER, tmp_path / "region", 0, "recover")
            assert owner.stdout.readline() == "ready\n"
            killed_after_freeing(owner, 0)
        region = new_region(recover=True)
        check(region)
        assert region.stats().pinned_bytes >= 2 * SIZE and region.used_bytes >= 4 * SIZE
        slots = [region.write(b"\xff" * SIZE, 0) for _ in range(8)]
        assert {1, 3} <= set(slots)  # the numbers are used again, the bytes are not
        for slot in slots:
            region.free(slot)
        churn(region)
        region.compact()
        check(region)
        for view in (lease.view, twice.view):
            assert bytes(view) == blob(1)
        assert bytes(last.view) == blob(3)
        assert region.read_bytes(2) == blob(2)
        lease.release()
        last.release()
        assert region.stats().pinned_bytes < 2 * SIZE
        churn(region)
        assert bytes(twice.view) == blob(1)
        twice.release()
        assert region.stats().pinned_bytes == 0
        region.compact()
        assert region.slot(2).offset <= region.slot(2).size * 2
        check(region)


def test_recovery_leaves_what_the_dead_had_leased(
    new_region: NewRegion, start_python: StartPython, tmp_path: Path
) -> None:
    owner = start_python(_OWNER, tmp_path / "region", 3)
    assert owner.stdout.readline() == "ready\n"
    holder = start_python(_HOLDER, tmp_path / "region", 1)
    assert holder.stdout.readline().strip() == blob(1)[:4].hex()
    killed_after_freeing(owner, 1)
    region = new_region(recover=True)
    assert region.stats().pinned_bytes >= SIZE
    holder.kill()
    holder.wait()
    region.trim()
    assert region.stats().pinned_bytes == 0
    region.close()
    region = new_region(recover=True)
    assert region.stats().pinned_bytes == 0


# Writes, frees and moves values as fast as it can, until it is killed.
_BUSY_OWNER = """
import random, sys
from nodedb_mem import OverflowRegion
path, turn, recover = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
chance = random.Random(turn)
region = OverflowRegion(path, initial_capacity=1 << 16, max_capacity=1 << 25, recover=recover)
live = [slot for slot in range(region.slot_count) if slot in region]
while len(live) < 30:
    live.append(region.write(chance.randbytes(chance.choice([100, 5000, 70_000, 300_000])), 0))
region.share(live[0])
print("ready", flush=True)
while True:
    for _ in range(10):
        region.free(live.pop(chance.randrange(len(live))))
    for _ in range(10):
        live.append(region.write(chance.randbytes(chance.choice([100, 5000, 70_000, 300_000])), 0))
    region.compact(chance.choice([None, 400_000]))
"""


@pytest.mark.parametrize("turns", [4, system(24)])
def test_leases_hold_while_owners_come_and_are_killed(
    new_region: NewRegion,
    start_python: StartPython,
    tmp_path: Path,
    check: Callable[[OverflowRegion], None],
    turns: int,
) -> None:
    chance = random.Random(6)
    held: list[tuple[Any, bytes]] = []
    path = tmp_path / "region"
    owner = start_python(_BUSY_OWNER, path, 0, False)
    assert owner.stdout.readline() == "ready\n"
    with OverflowReader(path) as one, OverflowReader(path) as two:
        for turn in range(1, turns + 1):
            for _ in range(200):
                try:
                    lease = chance.choice([one, two]).lease(chance.randrange(30))
                except (InvalidSlotError, StaleSlotError):
                    continue
                held.append((lease, bytes(lease.view)))
                if len(held) > 12:
                    lease, value = held.pop(chance.randrange(len(held)))
                    assert bytes(lease.view) == value
                    lease.release()
            owner.kill()
            owner.wait()
            if turn % 4 == 0:
                region = new_region(recover=True, max_capacity=1 << 25)
                check(region)
                churn(region)
                check(region)
                region.close()
            owner = start_python(_BUSY_OWNER, path, turn, True)
            assert owner.stdout.readline() == "ready\n"
            for lease, value in held:
                assert bytes(lease.view) == value
        owner.kill()
        owner.wait()
        region = new_region(recover=True, max_capacity=1 << 25)
        check(region)
        for lease, value in held:
            assert bytes(lease.view) == value
            lease.release()
        assert region.stats().pinned_bytes == 0
        check(region)


def test_a_move_that_had_not_begun_when_the_value_was_leased(
    new_region: NewRegion, check: Callable[[OverflowRegion], None]
) -> None:
    """The owner says that it moves the value, sees the lease, and dies before it says that it does not."""
    region, slots = shared_region(new_region)
    with OverflowReader(region.path) as reader, reader.lease(slots[1]) as view:
        place = region.slot(slots[1]).offset
        region.free(slots[0])
        region.close()
        with open(f"{region.path}.slots", "r+b") as table:
            table.seek(4096 + 24 * slots[1] + 15)
            table.write(b"\4")  # MOVING
            table.seek(104)
            table.write(struct.pack("=4Q", slots[1] + 1, place, 0, 0))
        region = new_region(recover=True)
        check(region)
        assert region.slot(slots[1]).offset == place
        churn(region)
        assert bytes(view) == region.read_bytes(slots[1]) == blob(1)


LIES: dict[str, tuple[int, int]] = {
    "past the end": (1 << 40, 64),
    "longer than the file": (0, 1 << 63),
    "wrapping": ((1 << 64) - 64, 128),
    "wrapping to 0": (64, (1 << 64) - 64),
    "a live value's bytes": (200_064 + 64, 64),
    "all": (0, 1 << 19),
    "the end of a live value": (300_000, 4096),
    "crooked": (100_131, 3),
    "the last byte of the file": ((1 << 19) - 1, 1),
    "around the leased": (90_000, 110_000),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_recovery_believes_no_entry_at_the_cost_of_a_value(
    new_region: NewRegion, tmp_path: Path, check: Callable[[OverflowRegion], None], lie: tuple[int, int]
) -> None:
    region, slots = shared_region(new_region, count=4)
    with OverflowReader(region.path) as honest, OverflowReader(region.path) as liar:
        lease, lying, lying_too = honest.lease(slots[1]), liar.lease(slots[3]), liar.lease(slots[3])
        patch_entry(tmp_path / "region.leases", 1, 4, 99, *lie)
        patch_entry(tmp_path / "region.leases", 2, (1 << 64) - 1, 0, *lie)
        region.free(slots[0])
        region.free(slots[1])
        assert region.capacity == 1 << 19
        region.close()
        region = new_region(recover=True)
        check(region)
        assert region.read_bytes(slots[2]) == blob(2) and region.read_bytes(slots[3]) == blob(3)
        churn(region)
        region.compact()
        region.trim()
        check(region)
        assert region.read_bytes(slots[2]) == blob(2) and region.read_bytes(slots[3]) == blob(3)
        assert bytes(lease.view) == blob(1)
        lying.release()
        lying_too.release()
        assert bytes(lease.view) == blob(1)
        lease.release()
        assert region.stats().pinned_bytes == 0
        check(region)


def test_entries_of_nobody_keep_nothing(new_region: NewRegion, tmp_path: Path) -> None:
    region, slots = shared_region(new_region)
    place = region.slot(slots[1]).offset
    region.free(slots[1])
    region.close()
    patch_entry(tmp_path / "region.leases", 5, 2, fields(region)[0], place, SIZE)
    region = new_region(recover=True)
    assert region.stats().pinned_bytes == 0
    assert fields(region, "leases", 32 + 5 * 32) == (0,)


# ---- a default open ends the values ---------------------------------------------------------------------------


@pytest.mark.parametrize("freed", [False, True], ids=["live", "freed"])
@pytest.mark.parametrize("alignment", [1, 64, 4096])
def test_a_default_open_ends_a_lease_but_not_its_bytes(
    new_region: NewRegion, check: Callable[[OverflowRegion], None], freed: bool, alignment: int
) -> None:
    region, slots = shared_region(new_region, alignment=16)
    ref, other = region.share(slots[1]), region.share(slots[2])
    with OverflowReader(ref) as reader:
        lease, second = reader.lease(ref), reader.lease(other)
        if freed:
            region.free(slots[1])
        region.close()
        region = new_region(alignment=alignment)
        check(region)
        assert len(region) == 0 and region.live_bytes == 0 and region.stats().pinned_bytes >= 2 * SIZE
        for verb in (reader.read, reader.read_bytes, reader.lease):
            with pytest.raises(StaleSlotError):
                verb(ref)
        with pytest.raises(StaleSlotError), reader.borrow(ref):
            pass
        slots = [region.write(b"\xff" * SIZE, 0) for _ in range(6)]
        region.share(slots[0])
        for slot in slots:
            region.free(slot)
        churn(region)
        assert bytes(lease.view) == blob(1) and bytes(second.view) == blob(2)
        region.close()
        region = new_region(recover=True)
        check(region)
        churn(region)
        assert bytes(lease.view) == blob(1) and bytes(second.view) == blob(2)
        lease.release()
        assert region.stats().pinned_bytes > 0
        second.release()
        assert region.stats().pinned_bytes == 0
    with OverflowReader(region.path) as reader:
        assert reader.stats().leases == 0


def test_a_default_open_finds_no_lease_of_the_same_number(new_region: NewRegion) -> None:
    region, slots = shared_region(new_region)
    with OverflowReader(region.path) as reader:
        lease = reader.lease(slots[0])
        region.close()
        region, slots = shared_region(new_region)
        pinned = region.stats().pinned_bytes
        region.free(slots[0])  # the same number and generation, but nobody's lease
        assert region.stats().pinned_bytes == pinned > 0
        assert bytes(lease.view) == blob(0)
        lease.release()


def test_a_default_open_without_leases_is_empty_to_the_last_byte(new_region: NewRegion) -> None:
    region, slots = shared_region(new_region)
    with OverflowReader(region.path) as reader:
        reader.lease(slots[1]).release()
        region.close()
        region = new_region()
        assert (region.used_bytes, region.stats().pinned_bytes) == (0, 0)


# ---- the file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recover", [False, True])
@pytest.mark.parametrize("kind", ["first version", "later version"])
def test_a_leases_file_of_another_version_makes_room(
    new_region: NewRegion, tmp_path: Path, recover: bool, kind: str
) -> None:
    region, slots = shared_region(new_region)
    region.close()
    file = tmp_path / "region.leases"
    if kind == "first version":
        file.write_bytes(b"NDMLEASE" + struct.pack("=2Q", 1, 0) + bytes(16_000))
    else:
        file.write_bytes(b"NDMLEASE" + struct.pack("=Q", 77) + file.read_bytes()[16:])
    before = file.read_bytes()
    with open(file, "rb") as old:
        region = new_region(recover=recover)
        slot = slots[1] if recover else region.write(blob(1), 0)
        with OverflowReader(region.path) as reader:
            with pytest.raises(RegionIOError, match="version") as caught:
                reader.lease(slot)
            assert caught.value.filename == f"{region.path}.leases" and reader.stats().leases is None
            region.share(slot)
            with reader.lease(slot) as view:
                region.free(slot)
                churn(region)
                assert bytes(view) == blob(1)
                assert reader.stats().leases == 1
        assert old.read() == before  # for those who still have it open


def test_readers_count_leases_with_read_permission_alone(
    new_region: NewRegion, start_python: StartPython, tmp_path: Path
) -> None:
    region, slots = shared_region(new_region)
    with OverflowReader(region.path) as one, OverflowReader(region.path) as two:
        assert two.stats().leases == 0 and two.leased() == []
        first, second = one.lease(slots[1]), one.lease(slots[1])
        place = region.slot(slots[1]).offset
        assert one.stats().leases == two.stats().leases == 2  # though `two` has never leased
        assert two.leased() == [(place, SIZE)] * 2
        child = start_python(_HOLDER, region.path, slots[2])
        child.stdout.readline()
        assert two.stats().leases == 3
        child.kill()
        child.wait()
        assert two.stats().leases == 2  # before anybody has reaped
        if os.geteuid() == 0:
            let_others_in(tmp_path)
            for name in ("region", "region.slots", "region.leases"):
                (tmp_path / name).chmod(0o644)
            script = """
                import os, sys
                from nodedb_mem import OverflowReader, RegionIOError
                os.setgid(65534)
                os.setuid(65534)
                with OverflowReader(sys.argv[1]) as reader:
                    try:
                        count = len(reader.leased())
                    except RegionIOError as error:
                        count = error.errno
                    print(reader.stats().leases, count)
                """
            assert start_python(script, region.path).stdout.read() == "2 2\n"
            (tmp_path / "region.leases").chmod(0o600)
            assert start_python(script, region.path).stdout.read() == "None 13\n"
        first.release()
        second.release()
        assert two.stats().leases == 0
