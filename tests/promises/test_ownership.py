"""One owner (rule 7) and one region per file (rule 8): threads, forks of both kinds, other processes, kill -9."""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit import VERBS, Check, NewRegion, StartPython, blob, in_thread, raw_fork
from nodedb_mem import (
    CapacityExceededError,
    OverflowRegion,
    RegionBusyError,
    RegionClosedError,
    RegionError,
    WrongThreadError,
)

MIB = 1 << 20


def wait_for_end(pid: int) -> None:
    """Wait until a process that is no child of ours has closed its files: it is a zombie then, or gone."""
    try:
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
            time.sleep(0.001)
    except (FileNotFoundError, ProcessLookupError):
        pass


Fork = Callable[[], int]
forks = pytest.mark.parametrize("fork", [os.fork, raw_fork])


def in_child(fork: Fork, function: Callable[[], object]) -> Any:
    """What `function` returns, or the exception it raises, in a forked child, which ends without cleaning up."""
    reader, writer = os.pipe()
    pid = fork()
    if pid == 0:
        try:
            try:
                result = function()
            except BaseException as error:
                result = error
            os.write(writer, pickle.dumps(result))
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        sent = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return pickle.loads(sent)


# Threads


def test_every_verb_of_another_thread_is_refused_and_changes_nothing(new_region: NewRegion, check: Check) -> None:
    region = new_region()
    slot = region.write(blob(1000), 0)
    before = region.stats()
    for name, verb in VERBS.items():
        for number in (slot, 12345):
            assert type(in_thread(lambda: verb(region, number))) is WrongThreadError, name  # noqa: B023
            assert region.stats() == before, name
    assert region.read(slot) == blob(1000)
    check(region)


def test_closing_from_another_thread_is_refused(new_region: NewRegion) -> None:
    region = new_region()
    slot = region.write(b"x", 0)
    assert type(in_thread(region.close)) is WrongThreadError
    assert in_thread(lambda: region.__exit__(None, None, None)) is None  # it leaves the region alone
    assert not region.closed
    assert not region.closed
    assert region.read(slot) == b"x"


def test_what_any_thread_may_ask(new_region: NewRegion) -> None:
    region = new_region()
    path, closed, text = in_thread(lambda: (region.path, region.closed, repr(region)))
    assert (path, closed) == (region.path, False)
    assert str(region.path) in text


def test_a_refused_write_does_not_read_its_data_or_judge_it(new_region: NewRegion) -> None:
    region = new_region(max_capacity=1 << 16)
    assert type(in_thread(lambda: region.write(bytes(1 << 20), 0))) is WrongThreadError
    buffer = bytearray(8)
    region.write(b"12345678", 0)
    assert type(in_thread(lambda: region.read_into(0, buffer))) is WrongThreadError
    assert buffer == bytes(8)


def test_a_refused_write_teaches_the_region_no_engine(new_region: NewRegion) -> None:
    class Mine(IntEnum):
        SPILL = 77

    class Theirs(IntEnum):
        OTHER = 77

    region = new_region(max_capacity=1 << 16)
    slot = region.write(b"x", Mine.SPILL)
    writes: list[Callable[[], object]] = [
        lambda: region.write(b"y", Theirs.OTHER),
        lambda: region.write_vectored([b"y"], Theirs.OTHER),
        lambda: region.write_many([b"y"], Theirs.OTHER),
        lambda: region.write_many(b"y", Theirs.OTHER, lengths=array("q", [1])),
        lambda: region.allocate(1, Theirs.OTHER),
    ]
    for write in writes:
        assert type(in_thread(write)) is WrongThreadError
        assert region.slot(slot).engine is Mine.SPILL
    with pytest.raises(CapacityExceededError):
        region.write(bytes(1 << 20), Theirs.OTHER)
    assert region.slot(slot).engine is Mine.SPILL

    def while_writing() -> Iterator[bytes]:
        region.write(b"z", Theirs.OTHER)
        yield b"y"

    region.write_many(while_writing(), 5)
    assert region.slot(slot).engine is Theirs.OTHER
    for write in writes:
        region.write(b"x", Mine.SPILL)
        write()
        assert region.slot(slot).engine is Theirs.OTHER


def test_a_region_belongs_to_the_thread_that_opened_it(tmp_path: Path) -> None:
    region = in_thread(lambda: OverflowRegion.open(tmp_path / "region", initial_capacity=4096))
    assert isinstance(region, OverflowRegion)
    with pytest.raises(WrongThreadError):
        region.write(b"x", 0)
    with pytest.raises(WrongThreadError):
        region.close()
    # The system gives a new thread the address and often the id of the one that ended.
    for _ in range(20):
        assert type(in_thread(lambda: region.write(b"x", 0))) is WrongThreadError
    with pytest.raises(RegionBusyError):
        OverflowRegion.open(tmp_path / "region")
    del region
    gc.collect()
    OverflowRegion.open(tmp_path / "region").close()


def test_each_thread_may_own_regions(tmp_path: Path, check: Check) -> None:
    results: dict[int, bool] = {}

    def work(number: int) -> None:
        with OverflowRegion.open(tmp_path / f"region{number}", initial_capacity=4096) as region:
            model = {region.write(blob(2000, number * 1000 + n), number): number * 1000 + n for n in range(200)}
            check(region)
            results[number] = all(region.read(slot) == blob(2000, seed) for slot, seed in model.items())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(4), True)


# Forked children


@forks
def test_every_verb_of_a_forked_child_is_refused_and_changes_nothing(
    new_region: NewRegion, check: Check, fork: Fork
) -> None:
    region = new_region()
    slot = region.write(blob(1000), 0)
    before = region.stats()

    def try_all() -> dict[str, object]:
        outcome: dict[str, object] = {}
        for name, verb in VERBS.items():
            try:
                verb(region, slot)
                outcome[name] = "done"
            except Exception as error:
                outcome[name] = type(error)
        return outcome

    assert in_child(fork, try_all) == dict.fromkeys(VERBS, WrongThreadError)
    assert region.stats() == before
    assert region.read(slot) == blob(1000)
    check(region)


@forks
def test_a_forked_child_cannot_close(new_region: NewRegion, fork: Fork) -> None:
    region = new_region()
    slot = region.write(blob(100), 0)
    assert type(in_child(fork, region.close)) is WrongThreadError
    assert region.read(slot) == blob(100)
    assert not region.closed


@forks
def test_a_thread_and_a_child_of_a_child_are_refused_too(new_region: NewRegion, fork: Fork) -> None:
    region = new_region()
    region.write(blob(100), 0)

    def grandchild() -> object:
        return in_child(fork, lambda: region.read_bytes(0))

    assert type(in_child(fork, grandchild)) is WrongThreadError


def test_a_child_forked_off_another_thread_is_refused(new_region: NewRegion) -> None:
    region = new_region()
    region.write(blob(100), 0)
    assert type(in_thread(lambda: in_child(os.fork, lambda: region.read_bytes(0)))) is WrongThreadError


@forks
def test_what_a_forked_child_may_ask(new_region: NewRegion, fork: Fork) -> None:
    region, closed = new_region("open"), new_region("closed")
    closed.close()
    asked = in_child(fork, lambda: (region.path, region.closed, closed.closed, closed.close(), repr(region)))
    assert asked[:4] == (region.path, False, True, None)
    assert str(region.path) in asked[4]


@forks
def test_a_forked_child_of_a_closed_region_sees_it_closed(new_region: NewRegion, fork: Fork) -> None:
    region = new_region()
    region.close()
    assert isinstance(in_child(fork, lambda: region.read(0)), (RegionClosedError, WrongThreadError))


@forks
def test_views_taken_before_the_fork_are_readable_in_the_child(new_region: NewRegion, fork: Fork) -> None:
    region = new_region()
    slot = region.write(blob(3000), 0)
    view = region.read(slot)
    array = np.frombuffer(view, np.uint8)
    assert in_child(fork, lambda: (bytes(view), bytes(view[5:10]), array.tobytes())) == (
        blob(3000),
        blob(3000)[5:10],
        blob(3000),
    )


@forks
def test_dropping_views_and_the_region_in_the_child_touches_nothing_of_the_parent(
    new_region: NewRegion, check: Check, fork: Fork, tmp_path: Path
) -> None:
    region = OverflowRegion.open(tmp_path / "region", initial_capacity=65536)
    slot = region.write(blob(3000), 0)
    box: list[Any] = [region, region.read(slot), np.frombuffer(region.read(slot)[:80], np.uint8)]
    del region
    box[0].free(slot)

    def drop() -> str:
        box.clear()
        gc.collect()
        return "dropped"

    assert in_child(fork, drop) == "dropped"
    region = box[0]
    for _ in range(5):
        assert region.slot(region.write(b"\xff" * 3000, 0)).offset > 0
    assert box[1] == blob(3000)
    assert box[2].tobytes() == blob(3000)[:80]
    check(region)
    with pytest.raises(RegionBusyError):
        OverflowRegion.open(tmp_path / "region")
    region.close()


@forks
def test_a_forked_child_may_open_regions_of_its_own(new_region: NewRegion, tmp_path: Path, fork: Fork) -> None:
    region = new_region()
    slot = region.write(blob(100, 1), 0)

    def work() -> bytes:
        with OverflowRegion.open(tmp_path / "mine", initial_capacity=4096) as mine:
            mine.write(b"first", 0)
            view = mine.read(mine.write(blob(9000, 2), 0))
            mine.free(1)
            mine.write(b"\xff" * 9000, 0)
            grandchild = in_child(os.fork, lambda: mine.read(0))
            assert type(grandchild) is WrongThreadError, grandchild
            return bytes(view)

    assert in_child(fork, work) == blob(9000, 2)
    assert region.read(slot) == blob(100, 1)
    with OverflowRegion.open(tmp_path / "mine") as mine:
        assert mine.slot_count == 0


@forks
def test_a_forked_child_with_a_region_of_its_own_may_drop_views_of_its_parent(
    new_region: NewRegion, tmp_path: Path, fork: Fork
) -> None:
    region = new_region()
    slot = region.write(blob(3000, 1), 0)
    box = [region.read(slot)]
    region.free(slot)

    def work() -> bytes:
        with OverflowRegion.open(tmp_path / "mine", initial_capacity=4096) as mine:
            view = mine.read(mine.write(blob(3000, 2), 0))
            box.clear()
            gc.collect()
            mine.free(0)
            mine.write(b"\xff" * 3000, 0)
            return bytes(view)

    assert in_child(fork, work) == blob(3000, 2)
    assert region.slot(region.write(b"\xff" * 3000, 0)).offset > 0
    assert box == [blob(3000, 1)]


@forks
def test_a_forked_child_cannot_open_the_file_of_its_parent(new_region: NewRegion, fork: Fork) -> None:
    region = new_region()
    slot = region.write(blob(100), 0)
    refused = in_child(fork, lambda: OverflowRegion.open(str(region.path)))
    assert type(refused) is RegionBusyError
    assert os.getpid() in refused.holders
    assert region.read(slot) == blob(100)


@forks
def test_a_living_child_does_not_keep_a_closed_file_locked(new_region: NewRegion, fork: Fork) -> None:
    region = new_region()
    region.write(b"x", 0)
    reader, writer = os.pipe()
    pid = fork()
    if pid == 0:
        os.close(writer)
        os.read(reader, 1)  # until the parent lets go
        os._exit(0)
    try:
        region.close()
        again = new_region()
        assert again.read(again.write(b"y", 0)) == b"y"
    finally:
        os.close(writer)
        os.close(reader)
        os.waitpid(pid, 0)


def test_a_child_that_exits_the_ordinary_way_leaves_its_parent_unharmed(
    run_python: Callable[..., str], tmp_path: Path
) -> None:
    script = """
    import os, sys
    import numpy as np
    from nodedb_mem import OverflowRegion, WrongThreadError
    from nodedb_mem._core import lib

    region = OverflowRegion.open(sys.argv[1], initial_capacity=4096, max_capacity=1 << 24)
    temporary = OverflowRegion.temporary(initial_capacity=4096)
    slots = [region.write(bytes([n]) * 3000, 0) for n in range(20)]
    views = [region.read(slot) for slot in slots]
    array = np.frombuffer(views[3], np.uint8)
    orphan = temporary.read(temporary.write(b"orphan", 0))
    region.free(slots[3])
    before = region.stats()
    for _ in range(3):
        if os.fork() == 0:
            try:
                region.write(b"x", 0)
            except WrongThreadError:
                sys.exit(7)  # with finalizers, and with everything above alive
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
        assert region.stats() == before
    for n in range(20):
        slots.append(region.write(b"\\xff" * 3000, 0))
    assert [view[0] for view in views] == list(range(20)) and (array == 3).all() and orphan == b"orphan"
    assert lib.ndm_region_check(region._handle) == 0
    region.close()
    temporary.close()
    print("unharmed")
    """
    assert run_python(script, tmp_path / "region") == "unharmed\n"


def test_multiprocessing_by_fork_leaves_the_parent_unharmed(run_python: Callable[..., str], tmp_path: Path) -> None:
    script = """
    import multiprocessing, sys
    from nodedb_mem import OverflowRegion, WrongThreadError

    region = OverflowRegion.open(sys.argv[1], initial_capacity=4096)
    view = region.read(region.write(b"before" * 100, 0))

    def work(number):
        try:
            region.write(b"x", 0)
        except WrongThreadError:
            return bytes(view[:6])

    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert pool.map(work, range(30)) == [b"before"] * 30
    assert region.slot_count == 1
    region.write(bytes(100_000), 0)
    assert view == b"before" * 100
    print("unharmed")
    """
    assert run_python(script, tmp_path / "region") == "unharmed\n"


# Locks


OWNER = """
import sys
from nodedb_mem import OverflowRegion
region = OverflowRegion.open(sys.argv[1], initial_capacity=65536)
slot = region.write(b"owner" * 1000, 0)
print("ready", flush=True)
sys.stdin.readline()
assert region.read(slot) == b"owner" * 1000
print("intact", flush=True)
"""


def test_a_second_open_in_this_process_is_refused(new_region: NewRegion, tmp_path: Path) -> None:
    region = new_region()
    slot = region.write(blob(100), 0)
    for _ in range(3):
        with pytest.raises(RegionBusyError) as caught:
            OverflowRegion.open(tmp_path / "region")
        assert caught.value.path == str(tmp_path / "region")
        assert caught.value.holders == (os.getpid(),)
        assert str(os.getpid()) in str(caught.value)
        assert str(tmp_path / "region") in str(caught.value)
    assert region.read(slot) == blob(100)


READER = """
import sys
from nodedb_mem import OverflowReader
with OverflowReader(sys.argv[1]):
    print("ready", flush=True)
    sys.stdin.readline()
"""


def test_readers_are_not_taken_for_holders(new_region: NewRegion, tmp_path: Path, start_python: StartPython) -> None:
    region = new_region()
    reader = start_python(READER, region.path)
    assert reader.stdout is not None and reader.stdout.readline() == "ready\n"
    with pytest.raises(RegionBusyError) as caught:
        OverflowRegion.open(tmp_path / "region")
    assert (caught.value.holders, caught.value.readers) == ((os.getpid(),), (reader.pid,))
    assert str(reader.pid) not in str(caught.value)
    reader.communicate("\n")


def test_a_second_open_on_another_thread_is_refused(new_region: NewRegion, tmp_path: Path) -> None:
    region = new_region()
    slot = region.write(blob(100), 0)
    assert type(in_thread(lambda: OverflowRegion.open(tmp_path / "region"))) is RegionBusyError
    assert region.read(slot) == blob(100)


def test_another_name_of_the_same_file_is_refused_too(
    new_region: NewRegion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    region = new_region()
    slot = region.write(blob(100), 0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "directory").symlink_to(tmp_path)
    for name in ("region", "./region", "directory/region", "directory/../" + tmp_path.name + "/region"):
        with pytest.raises(RegionBusyError):
            OverflowRegion.open(name)
    os.link("region", "twin")
    with pytest.raises(RegionError):
        OverflowRegion.open("twin")
    assert region.read(slot) == blob(100)


def test_a_second_open_in_another_process_is_refused(start_python: StartPython, tmp_path: Path) -> None:
    owner = start_python(OWNER, tmp_path / "region")
    assert owner.stdout is not None
    assert owner.stdout.readline() == "ready\n"
    with pytest.raises(RegionBusyError) as caught:
        OverflowRegion.open(tmp_path / "region")
    assert caught.value.holders == (owner.pid,)
    assert str(owner.pid) in str(caught.value)
    assert owner.communicate("\n") == ("intact\n", None)
    assert owner.returncode == 0
    OverflowRegion.open(tmp_path / "region").close()


def test_a_refused_open_changes_no_byte(new_region: NewRegion, tmp_path: Path) -> None:
    region = new_region()
    slots = [region.write(blob(1000, seed), 0) for seed in range(20)]

    def contents() -> dict[str, bytes]:
        return {name: (tmp_path / name).read_bytes() for name in sorted(os.listdir(tmp_path))}

    before = contents()
    for options in ({}, {"initial_capacity": 4096, "max_capacity": 4096}, {"initial_capacity": 1 << 20}):
        with pytest.raises(RegionBusyError):
            OverflowRegion.open(tmp_path / "region", **options)
    assert contents() == before
    assert [region.read(slot) for slot in slots] == [blob(1000, seed) for seed in range(20)]


def test_after_kill_of_the_owner_the_file_opens_again(start_python: StartPython, tmp_path: Path) -> None:
    for _ in range(3):
        owner = start_python(OWNER, tmp_path / "region")
        assert owner.stdout is not None
        assert owner.stdout.readline() == "ready\n"
        owner.kill()
        owner.wait()
        with OverflowRegion.open(tmp_path / "region") as region:
            assert (region.capacity, region.slot_count, region.used_bytes) == (65536, 0, 0)
            assert region.read(region.write(blob(5000), 0)) == blob(5000)


def test_a_file_opens_again_whatever_its_owner_was_doing_when_it_was_killed(
    start_python: StartPython, tmp_path: Path
) -> None:
    script = """
    import os, random, sys
    from nodedb_mem import OverflowRegion
    print("ready", flush=True)
    while True:
        with OverflowRegion.open(sys.argv[1], initial_capacity=4096, max_capacity=1 << 24) as region:
            rng = random.Random()
            slots = []
            for _ in range(rng.randrange(300)):
                slots.append(region.write(rng.randbytes(rng.choice([0, 10, 1000, 50_000])), 0))
                if len(slots) > 50:
                    region.free(slots.pop(rng.randrange(50)))
        print("round", flush=True)
        if rng.random() < 0.3:
            os.unlink(sys.argv[1])
    """
    for rounds in (0, 1, 2, 3, 5, 8):
        owner = start_python(script, tmp_path / "region")
        assert owner.stdout is not None
        for _ in range(1 + rounds):
            owner.stdout.readline()
        owner.kill()
        owner.wait()
        with OverflowRegion.open(tmp_path / "region", initial_capacity=4096, max_capacity=1 << 24) as region:
            assert region.slot_count == 0
            assert region.read(region.write(blob(5000), 0)) == blob(5000)


def test_a_forked_child_of_a_killed_owner_is_named_as_the_holder(start_python: StartPython, tmp_path: Path) -> None:
    owner = start_python(
        """
        import os, sys
        from nodedb_mem import OverflowRegion
        region = OverflowRegion.open(sys.argv[1], initial_capacity=65536)
        view = region.read(region.write(b"owner" * 1000, 0))
        pid = os.fork()
        if pid == 0:
            sys.stdin.readline()
            assert view == b"owner" * 1000
            print("readable", flush=True)
            os._exit(0)
        print(pid, flush=True)
        sys.stdin.readline()
        """,
        tmp_path / "region",
    )
    assert owner.stdin is not None
    assert owner.stdout is not None
    child = int(owner.stdout.readline())
    with pytest.raises(RegionBusyError) as caught:
        OverflowRegion.open(tmp_path / "region")
    assert owner.pid in caught.value.holders
    owner.kill()
    owner.wait()
    with pytest.raises(RegionBusyError) as caught:
        OverflowRegion.open(tmp_path / "region")
    assert caught.value.holders == (child,)
    assert str(child) in str(caught.value)
    owner.stdin.write("\n")
    owner.stdin.flush()
    assert owner.stdout.read() == "readable\n"  # and then the end of the pipe: the child is gone
    wait_for_end(child)
    OverflowRegion.open(tmp_path / "region").close()


def test_descriptors_do_not_reach_other_programs(new_region: NewRegion, tmp_path: Path) -> None:
    region = new_region()
    with OverflowRegion.temporary(tmp_path, initial_capacity=4096) as temporary:
        region.write(b"x", 0)
        temporary.write(b"x", 0)
        listed = subprocess.run(
            ["ls", "-l", "/proc/self/fd"], close_fds=False, capture_output=True, text=True, check=True
        ).stdout
    assert "0 -> " in listed
    assert str(tmp_path) not in listed


def test_a_file_deleted_under_its_region_leaves_the_region_whole(
    new_region: NewRegion, tmp_path: Path, check: Check
) -> None:
    region = new_region()
    slots = [region.write(blob(1000, seed), 0) for seed in range(10)]
    view = region.read(slots[0])
    (tmp_path / "region").unlink()
    try:
        second = new_region()
    except RegionBusyError:
        pass
    else:
        second.write(b"\xff" * 30_000, 0)
    slots.extend(region.write(blob(1000, seed), 0) for seed in range(10, 100))
    check(region)
    assert [region.read(slot) for slot in slots] == [blob(1000, seed) for seed in range(100)]
    assert view == blob(1000, 0)


# Temporary regions


TEMPORARY_OWNER = """
import os, sys
from nodedb_mem import OverflowRegion
region = OverflowRegion.temporary(sys.argv[1], initial_capacity=4096)
views = [region.read(region.write(os.urandom(100_000), 0)) for _ in range(20)]
print("ready", flush=True)
sys.stdin.readline()
"""


def test_a_killed_owner_of_a_temporary_region_leaves_no_file(start_python: StartPython, tmp_path: Path) -> None:
    directory = tmp_path / "directory"
    directory.mkdir()
    owner = start_python(TEMPORARY_OWNER, directory)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "ready\n"
    owner.kill()
    owner.wait()
    assert os.listdir(directory) == []


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
@pytest.mark.parametrize("how", ["kill", "exit"])
def test_a_temporary_region_leaves_no_disk_blocks(
    start_python: StartPython, mount: Callable[..., Path], kind: str, how: str
) -> None:
    directory = mount(kind, 16)

    def free_bytes() -> int:
        subprocess.run(["sync", "-f", directory], check=True)
        figures = os.statvfs(directory)
        return figures.f_bfree * figures.f_frsize

    before = free_bytes()
    owner = start_python(TEMPORARY_OWNER, directory)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "ready\n"
    assert free_bytes() <= before - 2_000_000
    if how == "kill":
        owner.kill()
        owner.wait()
    else:
        owner.communicate("\n")
        assert owner.returncode == 0
    assert free_bytes() == before
    assert [name for name in os.listdir(directory) if name != "lost+found"] == []


def test_a_closed_temporary_region_leaves_no_disk_blocks(mount: Callable[..., Path]) -> None:
    directory = mount("tmpfs", 16)
    before = os.statvfs(directory).f_bfree
    region = OverflowRegion.temporary(directory, initial_capacity=4096)
    view = region.read(region.write(blob(5 * MIB), 0))
    region.close()
    assert os.statvfs(directory).f_bfree < before
    assert view == blob(5 * MIB)
    del view
    assert os.statvfs(directory).f_bfree == before
