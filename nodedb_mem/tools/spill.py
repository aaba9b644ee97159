"""The job behind ``nodedb-mem spill``: files in, cold buffers out to an overflow region, every buffer checked.

The threads share one `SpillMapping` of the budget, under a governor. Each takes the next piece of a file and puts its
bytes into the mapping, which spills what was not used for longest. When no piece is left, the threads take the buffers
in random order, which brings them back, and compare their digests with those of the source bytes. The buffers in RAM
are at most the budget and a chunk a thread. Of what is spilled as much again may stay in RAM (`cache_limit`), and the
bookkeeping, some hundred bytes a chunk, comes on top.

With readers, processes of their own check each buffer too, as soon as it is there and while the threads go on: a
reference goes over, and the bytes are read there.
"""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import random
import signal
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from hashlib import blake2b
from time import perf_counter
from typing import NamedTuple, Protocol

from nodedb_mem import (
    EngineId,
    MemoryGovernor,
    ObjectRef,
    PressureLevel,
    SpillMapping,
    StaleSlotError,
    UndecodableError,
)

_SLACK = 4096  # bytes of ceiling that a value may need beyond its size


class Piece(NamedTuple):
    """A range of a file: its path, where the range starts, and its length, in bytes."""

    path: str
    offset: int
    size: int


class Watcher(Protocol):
    """Who is told how the job goes; its methods are called from any thread."""

    def advance(self, phase: str, size: int) -> None:
        """Count `size` more bytes as done in `phase`, which is ``"spill"`` or ``"verify"``."""

    def skipped(self, error: OSError) -> None:
        """Note that the rest of a file or folder, ``error.filename``, is left out."""

    def mismatched(self, piece: Piece) -> None:
        """Note that a buffer came back different."""


@dataclass(frozen=True)
class Options:
    """Sizes in bytes; the budget is that of all threads; `directory` None is the region's own default.

    `readers` is a number of processes, 0 for none.
    """

    budget: int = 256 << 20
    chunk: int = 1 << 20
    directory: str | None = None
    threads: int = 1
    readers: int = 0


@dataclass(frozen=True)
class Report:
    """What was done; the fields are the keys of the JSON output, those that are None left out.

    `bytes_spilled` were not in RAM when everything had been read in. `evictions` counts buffers that went out, to the
    end; `writes_saved` those of them that were in the region already. `pressure` is the highest level that the governor
    of the budget has seen. `write_bytes_per_s` is what was written over the time in which buffers went out.
    `read_bytes_per_s` is the bytes of all buffers over the time of getting them back and digesting them, summed over
    the threads: it is the speed of one thread. `peak_rss_bytes` counts mapped file pages too. `verified_chunks` came
    back equal; `chunks` is their number plus `mismatched_chunks`. A chunk that differed for a reader is a mismatched
    one; `verified_by_readers` counts those that were equal there.
    """

    bytes_in: int
    bytes_spilled: int
    chunks: int
    evictions: int
    writes_saved: int
    pressure: str
    write_bytes_per_s: float
    read_bytes_per_s: float
    peak_rss_bytes: int
    verified_chunks: int
    mismatched_chunks: int
    seconds: float
    verified_by_readers: int | None = None


def find_files(paths: Iterable[str], watcher: Watcher) -> list[Piece]:
    """List the regular files at and below `paths`, each as one piece.

    A symbolic link is followed where it is one of `paths`, not inside a folder. What cannot be looked at
    inside a folder is skipped.

    Raises
    ------
    OSError
        One of `paths` itself is missing, not readable, or neither a regular file nor a folder.
    """
    found: list[Piece] = []
    for top in paths:
        mode = os.stat(top).st_mode
        if stat.S_ISREG(mode):
            with open(top, "rb") as file:
                found.append(Piece(top, 0, os.fstat(file.fileno()).st_size))
        elif stat.S_ISDIR(mode):
            os.scandir(top).close()
            found.extend(_files_below(top, watcher))
        else:
            raise OSError(errno.EINVAL, "Neither a regular file nor a folder", top)
    return found


def _files_below(top: str, watcher: Watcher) -> Iterator[Piece]:
    folders = [top]
    while folders:
        try:
            with os.scandir(folders.pop()) as listing:
                entries = list(listing)
        except OSError as error:
            watcher.skipped(error)
            continue
        for entry in entries:
            try:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    yield Piece(entry.path, 0, entry.stat(follow_symlinks=False).st_size)
            except OSError as error:
                watcher.skipped(error)


def run(files: list[Piece], options: Options, watcher: Watcher) -> Report:
    """Spill `files` (from `find_files`), read everything back, and report.

    An empty file has no buffers. A file that cannot be read any more, or has become shorter, is skipped; what
    was read of it before takes part. No more threads than chunks are started, and at least one.

    Raises
    ------
    MemError
        The region could not be opened, written or read. The other threads have stopped.
    ChildProcessError
        A reading process has died.
    """
    return _Job(files, options, watcher).run()


def _check(ref: ObjectRef, expected: bytes) -> bool:
    """Compare a buffer in another process."""
    try:
        return _digest(ref.get()) == expected
    except (StaleSlotError, UndecodableError):  # nothing is freed here, so that is wrong too
        return False


def _end_with_parent() -> None:
    """For a reading process: end when the one that started it has ended, however that was.

    The parent's death closes a pipe that only the parent may write to. A death signal of the kernel would come too
    early: it follows the thread that started the process.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="nodedb-mem-parent", daemon=True).start()


def _block_interrupts() -> None:
    """For a thread that starts processes, which inherit it: Ctrl-C is for the main thread alone."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


class _Job:
    def __init__(self, files: list[Piece], options: Options, watcher: Watcher) -> None:
        step = options.chunk
        chunks = sum(-(-file.size // step) for file in files)
        self.options, self.watcher = options, watcher
        self.threads = max(1, min(options.threads, chunks))
        self.max_capacity = sum(file.size for file in files) + _SLACK * (chunks + 1)
        self.pieces = (
            Piece(file.path, at, min(step, file.size - at)) for file in files for at in range(0, file.size, step)
        )
        self.sources: dict[int, tuple[Piece, bytes]] = {}  # what was read, and its digest, by the mapping's key
        self.skipped: set[str] = set()
        self.lock = threading.Lock()  # for the three above, and the figures
        self.stop = threading.Event()
        self.readers: ProcessPoolExecutor | None = None
        self.checks: dict[int, Future[bool]] = {}
        self.pressure = PressureLevel.NORMAL
        self.verified = self.mismatched = self.verified_by_readers = 0
        self.read_seconds = 0.0

    def run(self) -> Report:
        logging.getLogger("nodedb_mem").addHandler(logging.NullHandler())  # what failed is told by an exception, too
        if not self.options.readers:
            return self.run_threads()
        # Spawned, not forked: there are threads.
        spawn = multiprocessing.get_context("spawn")
        self.readers = ProcessPoolExecutor(self.options.readers, spawn, _end_with_parent)
        try:
            return self.run_threads()
        finally:
            self.readers.shutdown(cancel_futures=True)

    def run_threads(self) -> Report:
        start = perf_counter()
        budget = self.options.budget
        governor = MemoryGovernor(max(1, budget), {EngineId.QUERY: max(1, budget)})
        governor.on_pressure(self.note_pressure)
        with SpillMapping[int, bytes](
            budget,
            self.options.directory,
            governor=governor,
            max_capacity=self.max_capacity,
            cache_limit=budget,
            weight=len,
        ) as held:
            initializer = _block_interrupts if self.readers else None
            with ThreadPoolExecutor(self.threads, "nodedb-mem-spill", initializer) as pool:
                self.on_all(pool, lambda number: self.fill(held))
                bytes_in = sum(piece.size for piece, _ in self.sources.values())
                spilled = bytes_in - held.stats().bytes_in_ram
                keys = random.sample(list(self.sources), len(self.sources))
                self.on_all(pool, lambda number: self.verify(keys[number :: self.threads], held))
            stats = held.stats()
        return Report(
            bytes_in=bytes_in,
            bytes_spilled=spilled,
            chunks=len(self.sources),
            evictions=stats.evictions,
            writes_saved=stats.writes_saved,
            pressure=self.pressure.name.lower(),
            write_bytes_per_s=_rate(stats.bytes_written, stats.write_seconds),
            read_bytes_per_s=_rate(bytes_in, self.read_seconds),
            peak_rss_bytes=_peak_rss(),
            verified_chunks=self.verified,
            mismatched_chunks=self.mismatched,
            seconds=perf_counter() - start,
            verified_by_readers=self.verified_by_readers if self.readers else None,
        )

    def on_all(self, pool: ThreadPoolExecutor, work: Callable[[int], None]) -> None:
        """Do a part of the work on each thread; where one fails, the others stop."""
        try:
            for future in as_completed([pool.submit(work, number) for number in range(self.threads)]):
                future.result()
        except BaseException:
            self.stop.set()
            raise

    def note_pressure(self, engine: int | None, level: PressureLevel) -> None:
        self.pressure = max(self.pressure, level)

    def fill(self, held: SpillMapping[int, bytes]) -> None:
        """Take pieces until none is left."""
        while (piece := self.next_piece()) is not None:
            if data := self.read(piece):
                digest = _digest(data)
                with self.lock:
                    key = len(self.sources)
                    self.sources[key] = piece._replace(size=len(data)), digest
                held[key] = data
                del data
                if self.readers is not None:
                    self.show(key, held)
            self.watcher.advance("spill", piece.size)

    def show(self, key: int, held: SpillMapping[int, bytes]) -> None:
        """Have a reader check a buffer."""
        assert self.readers is not None
        try:
            self.checks[key] = self.readers.submit(_check, held.share(key), self.sources[key][1])
        except BrokenProcessPool:
            raise ChildProcessError("a reading process has died") from None

    def is_equal_elsewhere(self, key: int) -> bool:
        """Wait for what a reader says of a buffer; true where none is asked."""
        if (check := self.checks.pop(key, None)) is None:
            return True
        try:
            equal = check.result()
        except BrokenProcessPool:
            raise ChildProcessError("a reading process has died") from None
        with self.lock:
            self.verified_by_readers += equal
        return equal

    def verify(self, keys: list[int], held: SpillMapping[int, bytes]) -> None:
        for key in keys:
            if self.stop.is_set():
                return
            piece, expected = self.sources[key]
            start = perf_counter()
            digest = _digest(held[key])
            seconds = perf_counter() - start
            equal = self.is_equal_elsewhere(key) and digest == expected
            with self.lock:
                self.read_seconds += seconds
                self.verified += equal
                self.mismatched += not equal
            if not equal:
                self.watcher.mismatched(piece)
            self.watcher.advance("verify", piece.size)

    def next_piece(self) -> Piece | None:
        with self.lock:
            return None if self.stop.is_set() else next(self.pieces, None)

    def read(self, piece: Piece) -> bytes:
        data = b""
        try:
            with open(piece.path, "rb") as file:
                file.seek(piece.offset)
                data = file.read(piece.size)
            if len(data) < piece.size:
                raise OSError(errno.EIO, "Shorter than when it was listed", piece.path)
        except OSError as error:
            with self.lock:
                first = piece.path not in self.skipped
                self.skipped.add(piece.path)
            if first:
                self.watcher.skipped(OSError(error.errno, error.strerror, piece.path))
        return data


def _digest(data: bytes | memoryview) -> bytes:
    return blake2b(data, digest_size=32).digest()


def _peak_rss() -> int:
    # Not getrusage: its figure begins with what the process that started this one had.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


def _rate(amount: int, seconds: float) -> float:
    return amount / seconds if seconds else 0.0
