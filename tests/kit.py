"""What the tests share: regions that are checked and closed, a leak detector, interpreters to kill, disks to fill."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import pty
import random
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy  # noqa: F401  (imported here, so that no test is blamed for its threads)
import pyarrow  # noqa: F401
import pytest

import nodedb_mem
from nodedb_mem import MemoryGovernor, OverflowRegion
from nodedb_mem._core import lib
from nodedb_mem.tools import cli

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs this in the background has it ignored

# The types of the fixtures below.
NewRegion = Callable[..., OverflowRegion]
Check = Callable[[OverflowRegion], None]
Mount = Callable[[str, int], Path]
RunPython = Callable[..., str]
Unchanged = Callable[[OverflowRegion], AbstractContextManager[None]]
StartPython = Callable[..., Any]
RunToEnd = Callable[..., None]
Terminal = Callable[[], AbstractContextManager[tuple[int, bytearray]]]
Run = Callable[..., tuple[int, str, str]]
Footprint = Callable[[Path], tuple[int, int]]
Verb = Callable[[OverflowRegion, int], object]


def _raise_ceiling(region: OverflowRegion, slot: int) -> None:
    region.max_capacity = 1 << 31


def blob(size: int, seed: int = 0) -> bytes:
    """Return random bytes, the same for the same seed."""
    return random.Random(seed).randbytes(size)


def in_thread(function: Callable[[], object]) -> Any:
    """What `function` returns, or the exception it raises, on a thread of its own."""
    results: list[object] = []

    def run() -> None:
        try:
            results.append(function())
        except Exception as error:
            results.append(error.with_traceback(None))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return results[0]


def raw_fork() -> int:
    """Fork behind the back of Python and of the C library: no handlers run, no cached ids are renewed."""
    call = ctypes.PyDLL(None, use_errno=True).syscall  # PyDLL: the GIL stays held, so the child has it
    number = {"x86_64": 56, "aarch64": 220}[platform.machine()]  # clone
    pid = int(call(number, ctypes.c_long(signal.SIGCHLD), None, None, None, None))
    if pid < 0:
        raise OSError(ctypes.get_errno(), "clone")
    return pid


def let_others_in(folder: Path) -> None:
    """Let every user enter a folder of the tests: pytest makes its folders private."""
    while not folder.stat().st_mode & stat.S_IXOTH:
        folder.chmod(0o755)
        folder = folder.parent


def system(*values: object) -> Any:
    """Mark the values of a parameter whose proof `make test` leaves to `make test-system`."""
    return pytest.param(*values, marks=pytest.mark.system)


# Everything that only the owner may do to an open region. `close` is tested apart, for it may be repeated.
VERBS: dict[str, Verb] = {
    "write": lambda region, slot: region.write(b"intruder", 0),
    "write_empty": lambda region, slot: region.write(b"", 0),
    "read": lambda region, slot: region.read(slot),
    "read_bytes": lambda region, slot: region.read_bytes(slot),
    "read_into": lambda region, slot: region.read_into(slot, bytearray(4096)),
    "read_unknown": lambda region, slot: region.read(10_000),
    "free": lambda region, slot: region.free(slot),
    "free_unknown": lambda region, slot: region.free(10_000),
    "slot": lambda region, slot: region.slot(slot),
    "stats": lambda region, slot: region.stats(),
    "len": lambda region, slot: len(region),
    "contains": lambda region, slot: slot in region,
    "capacity": lambda region, slot: region.capacity,
    "handle": lambda region, slot: region.handle,
    "max_capacity": lambda region, slot: region.max_capacity,
    "used_bytes": lambda region, slot: region.used_bytes,
    "live_bytes": lambda region, slot: region.live_bytes,
    "slot_count": lambda region, slot: region.slot_count,
    "raise_max_capacity": _raise_ceiling,
    "evict": lambda region, slot: region.evict(),
    "evict_slots": lambda region, slot: region.evict([slot]),
    "prefetch": lambda region, slot: region.prefetch([slot]),
    "flush": lambda region, slot: region.flush(),
    "trim": lambda region, slot: region.trim(),
    "compact": lambda region, slot: region.compact(),
    "compact_nothing": lambda region, slot: region.compact(0),
    "write_many": lambda region, slot: region.write_many([b"intruder"] * 3, 0),
    "write_many_buffers": lambda region, slot: region.write_many([bytearray(9)] * 3, 0),
    "write_many_lengths": lambda region, slot: region.write_many(b"intruder", 0, lengths=array("q", [3, 5])),
    "write_vectored": lambda region, slot: region.write_vectored([b"in", b"truder"], 0, aligned=True),
    "parts": lambda region, slot: region.parts(slot),
    "read_many": lambda region, slot: region.read_many([slot]),
    "read_many_array": lambda region, slot: region.read_many(array("q", [slot, slot])),
    "read_none": lambda region, slot: region.read_many([]),
    "read_many_into": lambda region, slot: region.read_many_into([slot], bytearray(4096)),
    "free_many": lambda region, slot: region.free_many([slot]),
    "free_none": lambda region, slot: region.free_many([]),
    "allocate": lambda region, slot: region.allocate(64, 0),
    "allocate_empty": lambda region, slot: region.allocate(0, 0),
    "commit": lambda region, slot: region.commit(slot),
    "restore": lambda region, slot: region.restore(slot),
}

REPORT: pytest.StashKey[pytest.TestReport] = pytest.StashKey()


def _descriptors() -> Counter[str]:
    links: Counter[str] = Counter()
    for fd in os.listdir("/proc/self/fd"):
        try:
            links[os.readlink(f"/proc/self/fd/{fd}")] += 1
        except FileNotFoundError:
            pass  # the descriptor that listed the directory
    return links


def _mappings(root: str) -> Counter[str]:
    """Mapped files below `root`, and unlinked ones wherever they were."""
    found: Counter[str] = Counter()
    with open("/proc/self/maps") as maps:
        for line in maps:
            if root in line or line.endswith(" (deleted)\n"):
                found[line.rstrip("\n").split(maxsplit=5)[5]] += 1
    return found


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail a test that leaves a descriptor, a mapping of a region, or a thread behind."""
    root = str(tmp_path_factory.getbasetemp())
    descriptors, mappings, threads = _descriptors(), _mappings(root), set(os.listdir("/proc/self/task"))
    python_threads = set(threading.enumerate())
    yield
    report = request.node.stash.get(REPORT, None)
    if report is not None and report.failed:
        return  # its traceback keeps objects alive
    gc.collect()
    gc.freeze()  # what is alive now stays, most likely: the next test need not walk it
    assert not set(threading.enumerate()) - python_threads, "threads left running"
    deadline = time.monotonic() + 10  # a joined thread may need a moment to leave the kernel
    while set(os.listdir("/proc/self/task")) - threads and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not set(os.listdir("/proc/self/task")) - threads, "native threads left running"
    assert not _descriptors() - descriptors, "descriptors left open"
    assert not _mappings(root) - mappings, "mappings left"


@pytest.fixture
def footprint() -> Callable[[Path | str], tuple[int, int]]:
    """How many descriptors and how many mapped bytes this process holds of the files whose name starts so."""

    def measure(path: Path | str) -> tuple[int, int]:
        prefix = str(path)
        descriptors = sum(n for link, n in _descriptors().items() if link.startswith(prefix))
        mapped = 0
        with open("/proc/self/maps") as maps:
            for line in maps:
                fields = line.rstrip("\n").split(maxsplit=5)
                if len(fields) == 6 and fields[5].startswith(prefix):
                    start, end = (int(address, 16) for address in fields[0].split("-"))
                    mapped += end - start
        return descriptors, mapped

    return measure


@pytest.fixture
def mapped_kib() -> Callable[[Path | str], int]:
    """How many KiB of a file's mappings are in this process's RSS."""

    def measure(path: Path | str) -> int:
        total, ours = 0, False
        with open("/proc/self/smaps") as maps:
            for line in maps:
                fields = line.split(maxsplit=5)
                if "-" in fields[0]:
                    ours = len(fields) == 6 and fields[5].rstrip("\n").removesuffix(" (deleted)") == str(path)
                elif ours and fields[0] == "Rss:":
                    total += int(fields[1])
        return total

    return measure


@pytest.fixture
def check() -> Callable[[OverflowRegion], None]:
    """Assert that the region's bookkeeping is sound."""

    def assert_sound(region: OverflowRegion) -> None:
        assert lib.ndm_region_check(region._handle) == 0

    return assert_sound


def sound(governor: MemoryGovernor) -> None:
    """Assert that a governor's books are sound."""
    assert lib.ndm_governor_check(governor._handle) == 0


@pytest.fixture
def unchanged(
    check: Callable[[OverflowRegion], None],
) -> Callable[[OverflowRegion], AbstractContextManager[None]]:
    """Assert that a block leaves an open region as it was: figures, the file's size, slots and values."""

    def state(region: OverflowRegion) -> object:
        size = None if region.path is None else os.stat(region.path).st_size
        slots = [region.slot(slot) for slot in range(region.slot_count)]
        values = [region.read_bytes(slot) for slot in range(region.slot_count) if slot in region]
        return region.stats(), region.used_bytes, len(region), size, slots, values

    @contextmanager
    def block(region: OverflowRegion) -> Iterator[None]:
        before = state(region)
        yield
        check(region)
        assert state(region) == before

    return block


@pytest.fixture
def new_region(tmp_path: Path, check: Callable[[OverflowRegion], None]) -> Iterator[NewRegion]:
    """Make regions below tmp_path; afterwards check the open ones and close them."""
    made: list[OverflowRegion] = []

    def make(name: Path | str = "region", **options: Any) -> OverflowRegion:
        options.setdefault("initial_capacity", 1 << 16)
        options.setdefault("max_capacity", 1 << 24)
        made.append(OverflowRegion.open(tmp_path / name, **options))
        return made[-1]

    yield make
    for region in made:
        if not region.closed:
            check(region)
            region.close()


def environment() -> dict[str, str]:
    """Return what an interpreter needs to find the package under test."""
    home = str(Path(nodedb_mem.__file__).resolve().parents[1])
    path = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": home if not path else home + os.pathsep + path}


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command ``nodedb-mem`` in this process; gives status, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = int(end.code or 0)
        return status, *capfd.readouterr()

    return run


@pytest.fixture
def terminal() -> Callable[[], AbstractContextManager[tuple[int, bytearray]]]:
    """Open a terminal: a descriptor to write to, and what was shown, complete when the block has ended."""

    @contextmanager
    def opened() -> Iterator[tuple[int, bytearray]]:
        master, slave = pty.openpty()
        shown = bytearray()

        def drain() -> None:
            with suppress(OSError):  # EIO: the other end is closed
                while part := os.read(master, 65536):
                    shown.extend(part)

        reader = threading.Thread(target=drain)
        reader.start()
        try:
            yield slave, shown
        finally:
            os.close(slave)
            reader.join()
            os.close(master)

    return opened


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., str]:
    """Run a script in a fresh interpreter; it must exit with 0 and write nothing to stderr. Returns its output."""

    def run(script: str, *arguments: object, timeout: float = 120) -> str:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
            cwd=tmp_path,
            env=environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert (done.returncode, done.stderr) == (0, ""), f"status {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    return run


# What the scripts about faults share.
_PRELUDE = """
import errno, os, resource, sys
from nodedb_mem import OverflowRegion, RegionIOError
from nodedb_mem._core import lib

def value(number, size):
    return (number.to_bytes(4, "little") * (size // 4 + 1))[:size]

def write_until_refused(region, size, start=0):
    written = {}
    for number in range(start, start + 200_000):
        try:
            slot = region.write(value(number, size), 0)
        except RegionIOError as error:
            return written, error
        written[slot] = value(number, size)
    raise AssertionError("never refused")

def assert_intact(region, written):
    assert lib.ndm_region_check(region._handle) == 0
    for slot, expected in written.items():
        assert region.read(slot) == expected, slot
    assert len(region) == len(written)

def fill_disk(path):
    with open(path, "wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    assert file.write(bytes(size)) > 0
            except OSError as error:
                assert error.errno == errno.ENOSPC
        os.fsync(file.fileno())
"""


@pytest.fixture
def run_to_end(run_python: Callable[..., str]) -> Callable[..., None]:
    """Run a script about faults after the prelude, in a process of its own: it must get to its end."""

    def run(script: str, *arguments: object) -> None:
        assert run_python(f"{_PRELUDE}{script}\nprint('done')", *arguments) == "done\n"

    return run


@pytest.fixture
def start_python(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a script that talks over pipes. What it forks should end when its standard input does."""
    started: list[subprocess.Popen[str]] = []

    def start(script: str, *arguments: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
            cwd=tmp_path,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def _run_tool(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip(f"{command[0]} is not installed")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"{command[0]} refused: {error.stderr.strip()}")


# What makes a file system in an image, and the smallest image that it takes, in MiB.
_MAKERS = {
    "ext2": (("mkfs.ext2", "-q", "-F"), 1),
    "ext4": (("mkfs.ext4", "-q", "-F"), 1),
    "btrfs": (("mkfs.btrfs", "-q", "-f"), 128),
    "xfs": (("mkfs.xfs", "-q", "-f"), 300),
}
# btrfs and xfs give blocks back some time after the file is gone, so each test gets a file system of its own.
_SHARED = ("tmpfs", "ext2", "ext4")


def _make_mount(target: Path, kind: str, size: int) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    target.mkdir()
    if kind == "tmpfs":
        _run_tool("mount", "-t", "tmpfs", "-o", f"size={size}m", "none", str(target))
        return
    command, least = _MAKERS[kind]
    image = target.with_suffix(".image")
    with open(image, "wb") as file:
        file.truncate(max(size, least) << 20)
    try:
        _run_tool(*command, str(image))
        _run_tool("mount", "-o", "loop", str(image), str(target))
    finally:
        image.unlink()  # the loop device keeps it


def _unmount(target: Path) -> bool:
    """Unmount; return whether nobody had a file open there."""
    if subprocess.run(["umount", str(target)], capture_output=True).returncode == 0:
        return True
    subprocess.run(["umount", "-l", str(target)], capture_output=True)
    return False


def free_bytes(directory: Path) -> int:
    """How much is free on a file system, once it has done all that was asked of it."""
    fd = os.open(directory, os.O_RDONLY)
    ctypes.CDLL(None).syncfs(fd)
    os.close(fd)
    figures = os.statvfs(directory)
    return figures.f_bfree * figures.f_frsize


@pytest.fixture(scope="session")
def _shared_mounts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, int], tuple[Path, int]]]:
    """File systems that last as long as the session: the mounted folder, and the bytes free while it is empty."""
    made: dict[tuple[str, int], tuple[Path, int]] = {}
    new_namespace = 0x20000  # CLONE_NEWNS: what is mounted from here on ends with this process, even if that is killed
    if ctypes.CDLL(None).unshare(new_namespace) == 0:
        _run_tool("mount", "--make-rprivate", "/")

    def get(kind: str, size: int) -> tuple[Path, int]:
        if (kind, size) not in made:
            target = tmp_path_factory.getbasetemp() / f"{kind}-{size}"
            _make_mount(target, kind, size)
            made[kind, size] = target, free_bytes(target)
        return made[kind, size]

    yield get
    for target, _ in made.values():
        _unmount(target)


@pytest.fixture
def mount(
    tmp_path: Path, _shared_mounts: Callable[[str, int], tuple[Path, int]]
) -> Iterator[Callable[[str, int], Path]]:
    """Give a small, empty file system: kind is tmpfs or (on a loop device) ext2, ext4, btrfs or xfs; size in MiB.

    Two tests that want the same get the same, emptied in between. btrfs and xfs get at least the 128 and 300 MiB that
    they want.
    """
    own: list[Path] = []
    shared: dict[Path, int] = {}

    def give(kind: str, size: int) -> Path:
        if kind in _SHARED:
            target, free = _shared_mounts(kind, size)
            shared[target] = free
        else:
            target = tmp_path / f"mount{len(own)}"
            _make_mount(target, kind, size)
            own.append(target)
        return target

    yield give
    gc.collect()
    busy = [target for target in reversed(own) if not _unmount(target)]
    for target, free in shared.items():
        for path in target.iterdir():
            if path.name != "lost+found":
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if free_bytes(target) != free:
            busy.append(target)
    assert not busy, "files left open on a mounted file system"


@pytest.fixture(scope="session")
def sanitized() -> bool:
    """Whether AddressSanitizer is in this process: it reserves address space by the terabyte."""
    with open("/proc/self/maps") as maps:
        return "libasan" in maps.read()
