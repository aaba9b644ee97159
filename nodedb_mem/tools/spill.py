"""The job behind ``nodedb-mem spill``: files in, cold buffers out to overflow regions, every buffer checked.

Each thread owns one temporary region and an equal share of the budget. It takes the next piece of a file,
keeps it in an LRU mapping of its share, and spills what falls out. When no piece is left it reads its own
buffers back in random order, the spilled ones through zero-copy views, and compares their digests with those
of the source bytes. Nothing is pulled back into the LRU, so the budget holds to the end: the buffers in RAM
are at most the budget and a chunk a thread. Of what is spilled as much again may stay in RAM (`cache_limit`), and
the bookkeeping, some hundred bytes a chunk, comes on top.

With readers, processes of their own check each spilled buffer too, as soon as it is spilled and while the owners
write on: a reference goes over, a zero-copy view is digested there.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import signal
import stat
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields
from hashlib import blake2b
from time import perf_counter
from typing import NamedTuple, Protocol

import zict

from nodedb_mem import EngineId, OverflowReader, OverflowRegion, SlotRef, StaleSlotError

_INITIAL_CAPACITY = 64 << 20  # bytes of each region's file at first, if the input is not smaller
_SLACK = 4096  # bytes of ceiling that a value may need beyond its size: the largest alignment


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

    `write_bytes_per_s` is spilled bytes over the time inside ``region.write``. `read_bytes_per_s` is the
    bytes of all buffers, spilled or held, over the time of reading back and digesting them. Both times are
    summed over the threads: these are speeds of one thread. `peak_rss_bytes` counts mapped file pages too.
    `verified_chunks` came back equal; `chunks` is their number plus `mismatched_chunks`. A chunk that differed for a
    reader is a mismatched one; `verified_by_readers` counts those that were equal there.
    """

    bytes_in: int
    bytes_spilled: int
    chunks: int
    regions: int
    growths: int
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
        A region could not be opened, written or read. The other threads have stopped.
    ChildProcessError
        A reading process has died.
    """
    return _Job(files, options, watcher).run()


@dataclass
class _Tally:
    bytes_in: int = 0
    bytes_spilled: int = 0
    growths: int = 0
    verified: int = 0
    mismatched: int = 0
    verified_by_readers: int = 0
    write_seconds: float = 0.0
    read_seconds: float = 0.0


class _Spilled:
    """The buffers that one thread has spilled, by key, and what the readers will say of them."""

    def __init__(
        self,
        region: OverflowRegion,
        tally: _Tally,
        sources: list[tuple[Piece, bytes]],
        readers: ProcessPoolExecutor | None,
    ) -> None:
        self.region = region
        self.tally = tally
        self.sources = sources
        self.readers = readers
        self.slots: dict[int, int] = {}
        self.checks: dict[int, Future[bool]] = {}

    def put(self, key: int, data: bytes) -> None:
        start = perf_counter()
        self.slots[key] = self.region.write(data, EngineId.QUERY)
        self.tally.write_seconds += perf_counter() - start
        self.tally.bytes_spilled += len(data)
        if self.readers is not None:
            ref = self.region.share(self.slots[key])
            try:
                self.checks[key] = self.readers.submit(_check, ref, self.sources[key][1])
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
        self.tally.verified_by_readers += equal
        return equal

    def digest(self, key: int) -> bytes:
        with self.region.read(self.slots[key]) as view:
            return _digest(view)


_readers: dict[str, OverflowReader] = {}  # a reading process's, by path


def _check(ref: SlotRef, expected: bytes) -> bool:
    """Compare a value in another process, without a copy."""
    if (reader := _readers.get(ref.path)) is None:
        reader = _readers[ref.path] = OverflowReader(ref)
    try:
        with reader.borrow(ref) as view:
            return _digest(view) == expected
    except StaleSlotError:  # nothing is freed here, so that is wrong too
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
        self.skipped: set[str] = set()
        self.lock = threading.Lock()  # for the two above
        self.stop = threading.Event()
        self.readers: ProcessPoolExecutor | None = None

    def run(self) -> Report:
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
        initializer = _block_interrupts if self.readers else None
        with ThreadPoolExecutor(self.threads, "nodedb-mem-spill", initializer) as pool:
            try:
                futures = [pool.submit(self.work) for _ in range(self.threads)]
                tallies = [future.result() for future in as_completed(futures)]
            except BaseException:
                self.stop.set()
                raise
        total = _Tally(*(sum(getattr(tally, field.name) for tally in tallies) for field in fields(_Tally)))
        return Report(
            bytes_in=total.bytes_in,
            bytes_spilled=total.bytes_spilled,
            chunks=total.verified + total.mismatched,
            regions=len(tallies),
            growths=total.growths,
            write_bytes_per_s=_rate(total.bytes_spilled, total.write_seconds),
            read_bytes_per_s=_rate(total.bytes_in, total.read_seconds),
            peak_rss_bytes=_peak_rss(),
            verified_chunks=total.verified,
            mismatched_chunks=total.mismatched,
            seconds=perf_counter() - start,
            verified_by_readers=total.verified_by_readers if self.readers else None,
        )

    def work(self) -> _Tally:
        """One thread's part; the thread owns its region from open to close."""
        tally = _Tally()
        initial = min(_INITIAL_CAPACITY, self.max_capacity)
        share = self.options.budget // self.threads
        with OverflowRegion.temporary(
            self.options.directory, initial_capacity=initial, max_capacity=self.max_capacity, cache_limit=share
        ) as region:
            sources: list[tuple[Piece, bytes]] = []
            spilled = _Spilled(region, tally, sources, self.readers)
            held: zict.LRU[int, bytes] = zict.LRU(
                share,
                {},
                on_evict=spilled.put,
                weight=lambda key, data: len(data),
            )
            self.fill(held, sources, tally)
            self.verify(sources, held, spilled, tally)
            tally.growths = region.stats().growths
        return tally

    def fill(self, held: zict.LRU[int, bytes], sources: list[tuple[Piece, bytes]], tally: _Tally) -> None:
        """Take pieces until none is left; add them and their digests to `sources`, placed by their keys in `held`."""
        while (piece := self.next_piece()) is not None:
            if data := self.read(piece):
                sources.append((piece, _digest(data)))
                held[len(sources) - 1] = data
                tally.bytes_in += len(data)
            self.watcher.advance("spill", piece.size)

    def verify(
        self, sources: list[tuple[Piece, bytes]], held: zict.LRU[int, bytes], spilled: _Spilled, tally: _Tally
    ) -> None:
        for key in random.sample(range(len(sources)), len(sources)):
            if self.stop.is_set():
                return
            piece, expected = sources[key]
            start = perf_counter()
            digest = spilled.digest(key) if key in spilled.slots else _digest(held[key])
            tally.read_seconds += perf_counter() - start
            if spilled.is_equal_elsewhere(key) and digest == expected:
                tally.verified += 1
            else:
                tally.mismatched += 1
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
