"""The subjects of the league table: each stores values of one size, reads them back and deletes them.

Every subject has the setting that is best for it here, as a user who has read its manual would choose; its docstring
is the line that the table prints. A store ends when the bytes have left this process's heap: what a rival buffers is
flushed. Nobody waits for the disk; all work in the page cache, but for `region, 256 MiB`, which drops the oldest.
"""

from __future__ import annotations

import os
import random
import shelve
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import diskcache
import lmdb
import numpy as np
import pyarrow as pa
import rocksdict
import zict
from twin import TwinRegion

from nodedb_mem import EngineId, OverflowRegion

KIB, MIB = 1 << 10, 1 << 20
POOL_BYTES = 64 * MIB  # the values are cut from that many random bytes, in turn
BATCH_VALUES = 1000

# Rivals that would take minutes get fewer values: their rates say the same.
FEWER = {64: 3_000, 4 * KIB: 3_000, 64 * KIB: 1_000, MIB: 125, 64 * MIB: 4}

Touch = Callable[[Any], object]


@dataclass(frozen=True)
class Case:
    """How many values of one size, and whether they are `bytes` or NumPy arrays."""

    size: int
    count: int
    form: str

    @property
    def total(self) -> int:
        """Bytes stored."""
        return self.size * self.count

    @property
    def batch(self) -> int:
        """Values in a call, where a subject takes many: 64 MiB at most."""
        return min(BATCH_VALUES, max(1, POOL_BYTES // self.size))

    @property
    def distinct(self) -> int:
        """Different values: what the pool has of whole batches."""
        return min(self.count, POOL_BYTES // self.size // self.batch * self.batch)

    def values(self, pool: np.ndarray) -> list[Any]:
        """Return the values to store; there are `distinct` of them, then they repeat."""
        words = self.size // 8
        arrays: list[Any] = [pool[i * words : (i + 1) * words] for i in range(self.distinct)]
        if self.form == "bytes":
            arrays = [array.tobytes() for array in arrays]
        return [arrays[i % self.distinct] for i in range(self.count)]


class Subject:
    """One rival on a fresh directory. `store`, `read` and `delete` are timed, once each and in this order."""

    name: ClassVar[str]
    limits: ClassVar[dict[int, int]] = {}  # most values, by size

    def __init__(self, directory: Path, case: Case) -> None:
        self.case = case
        self.keys: list[Any] = list(range(case.count))
        self.open(directory)

    @classmethod
    def count(cls, size: int, full: int, divisor: int) -> int:
        """How many values of a size it is given, when the others get `full` and the run is shortened by `divisor`."""
        return min(full, max(2, cls.limits.get(size, full * divisor) // divisor))

    def open(self, directory: Path) -> None:
        raise NotImplementedError

    def store(self, values: list[Any]) -> None:
        raise NotImplementedError

    def get(self, key: Any) -> Any:
        raise NotImplementedError

    def read(self, touch: Touch) -> None:
        get = self.get
        for key in self.keys:
            touch(get(key))

    def delete(self) -> None:
        raise NotImplementedError

    def shuffle(self, order: Sequence[int]) -> None:
        """Read and delete in another order than that of storing: spilled values come back as they are needed."""
        self.keys = [self.keys[i] for i in order]

    def close(self) -> None:
        pass


# --- regions ---------------------------------------------------------------------------------------------------------


class Region(Subject):
    """one by one; no cache limit, like its rivals, and `keep_mapped=True`; otherwise defaults"""

    name = "region"
    cache: ClassVar[dict[str, Any]] = {"cache_limit": None, "keep_mapped": True}

    def open(self, directory: Path) -> None:
        self.region = OverflowRegion.open(
            directory / "region", max_capacity=2 * self.case.total + 64 * MIB, **self.cache
        )
        self.get = self.region.read if self.case.size >= 4 * KIB else self.region.read_bytes

    def store(self, values: list[Any]) -> None:
        write, engine = self.region.write, EngineId.VECTOR
        self.keys = [write(value, engine) for value in values]

    def delete(self) -> None:
        free = self.region.free
        for slot in self.keys:
            free(slot)

    def close(self) -> None:
        self.region.close()


class RegionBatched(Region):
    """`write_many`, `free_many` of up to 1,000 values or 64 MiB a call; arrays by `lengths=`; below 64 KiB read back by
    `read_many_into`, else `read_many`"""

    name = "region, batched"

    def store(self, values: list[Any]) -> None:
        write, engine, batch = self.region.write_many, EngineId.VECTOR, self.case.batch
        keys: list[Any] = []
        if self.case.form == "bytes":
            for start in range(0, len(values), batch):
                keys += write(values[start : start + batch], engine)
        else:
            pool, words = values[0].base, self.case.size // 8
            for start in range(0, len(values), batch):
                count = min(batch, len(values) - start)
                first = start % self.case.distinct * words
                lengths = np.full(count, self.case.size, np.int64)
                keys += write(pool[first : first + count * words], engine, lengths=lengths)
        self.keys = keys

    def shuffle(self, order: Sequence[int]) -> None:
        slots = np.array(self.keys)[np.array(order)]
        self.batches = [slots[i : i + self.case.batch] for i in range(0, len(slots), self.case.batch)]

    def read(self, touch: Touch) -> None:
        size = self.case.size
        if size >= 64 * KIB:
            for slots in self.batches:
                for view in self.region.read_many(slots):
                    touch(view)
            return
        room = np.empty((self.case.batch, size // 8), np.uint64)
        view = memoryview(room).cast("B")
        for slots in self.batches:
            self.region.read_many_into(slots, room)
            if self.case.form == "bytes":
                for offset in range(0, len(slots) * size, size):
                    touch(view[offset : offset + size])
            else:
                room[: len(slots)].sum(axis=1)

    def delete(self) -> None:
        free = self.region.free_many
        for slots in self.batches:
            free(slots)


class RegionLimited(Region):
    """one by one; the default: of the file at most 256 MiB stay in RAM, the rest is on disk"""

    name = "region, 256 MiB"
    cache: ClassVar[dict[str, Any]] = {}


class Twin(Region):
    """the same promises in pure Python, one by one (`benchmarks/twin.py`)"""

    name = "twin"

    def open(self, directory: Path) -> None:
        self.region = TwinRegion.open(directory / "twin", max_capacity=2 * self.case.total + 64 * MIB)
        self.get = self.region.read if self.case.size >= 4 * KIB else self.region.read_bytes


# --- a file a value --------------------------------------------------------------------------------------------------


class Files(Subject):
    """a file a value, unbuffered; arrays read by `numpy.fromfile`"""

    name = "dict of files"
    limits: ClassVar[dict[int, int]] = FEWER

    def open(self, directory: Path) -> None:
        self.keys = [f"{directory}/{i}" for i in range(self.case.count)]

    def store(self, values: list[Any]) -> None:
        for path, value in zip(self.keys, values, strict=True):
            with open(path, "wb", buffering=0) as file:
                file.write(value)

    def get(self, key: str) -> Any:
        if self.case.form == "numpy":
            return np.fromfile(key, np.uint64)
        with open(key, "rb", buffering=0) as file:
            return file.read()

    def delete(self) -> None:
        for path in self.keys:
            os.unlink(path)


class NumpyFiles(Files):
    """`numpy.save`, `numpy.load(mmap_mode="r")`, a file a value; bytes as arrays of uint8"""

    name = "numpy.save"

    def store(self, values: list[Any]) -> None:
        for path, value in zip(self.keys, values, strict=True):
            with open(path, "wb", buffering=0) as file:
                np.save(file, np.frombuffer(value, np.uint8) if type(value) is bytes else value)

    def get(self, key: str) -> np.ndarray:
        return np.load(key, mmap_mode="r")


class Arrow(Files):
    """an IPC tensor message, a file a value, read by `memory_map`"""

    name = "pyarrow IPC"

    def store(self, values: list[Any]) -> None:
        for path, value in zip(self.keys, values, strict=True):
            tensor = pa.Tensor.from_numpy(np.frombuffer(value, np.uint8) if type(value) is bytes else value)
            with pa.OSFile(path, "wb") as file:
                pa.ipc.write_tensor(tensor, file)

    def get(self, key: str) -> np.ndarray:
        return pa.ipc.read_tensor(pa.memory_map(key)).to_numpy()


class ZictFile(Subject):
    """`zict.File`, a file a value; arrays stored as memoryviews"""

    name = "zict.File"
    limits: ClassVar[dict[int, int]] = FEWER
    memmap: ClassVar[bool] = False

    def open(self, directory: Path) -> None:
        self.mapping = zict.File(directory / "zict", memmap=self.memmap)
        self.get = self.mapping.__getitem__
        self.keys = [str(i) for i in range(self.case.count)]

    def store(self, values: list[Any]) -> None:
        mapping = self.mapping
        if self.case.form == "bytes":
            for key, value in zip(self.keys, values, strict=True):
                mapping[key] = value
        else:
            for key, value in zip(self.keys, values, strict=True):
                mapping[key] = value.data

    def delete(self) -> None:
        mapping = self.mapping
        for key in self.keys:
            del mapping[key]


class ZictMemmap(ZictFile):
    """`zict.File(memmap=True)`, otherwise the same"""

    name = "zict memmap"
    memmap: ClassVar[bool] = True


# --- databases -------------------------------------------------------------------------------------------------------


class Lmdb(Subject):
    """`sync=False, writemap=True, map_async=True, meminit=False, lock=False`, native integer keys; one `putmulti`
    with `append=True`, one transaction for reads (`buffers=True`), one for deletions"""

    name = "LMDB"

    def open(self, directory: Path) -> None:
        self.env = lmdb.open(
            str(directory / "lmdb"),
            map_size=self.case.count * (2 * self.case.size + 4 * KIB) + 64 * MIB,
            max_dbs=1,
            sync=False,
            metasync=False,
            writemap=True,
            map_async=True,
            meminit=False,
            lock=False,
        )
        self.db = self.env.open_db(b"values", integerkey=True)
        self.keys = [i.to_bytes(8, "little") for i in range(self.case.count)]

    def store(self, values: list[Any]) -> None:
        with self.env.begin(db=self.db, write=True) as transaction:
            transaction.cursor().putmulti(zip(self.keys, values, strict=True), append=True)

    def read(self, touch: Touch) -> None:
        with self.env.begin(db=self.db, buffers=True) as transaction:
            get = transaction.get
            for key in self.keys:
                touch(get(key))

    def get(self, key: bytes) -> bytes:
        with self.env.begin(db=self.db) as transaction:
            return transaction.get(key)

    def delete(self) -> None:
        with self.env.begin(db=self.db, write=True) as transaction:
            delete = transaction.delete
            for key in self.keys:
                delete(key)

    def close(self) -> None:
        self.env.close()


class Sqlite(Subject):
    """BLOBs under an INTEGER PRIMARY KEY; `synchronous=OFF, journal_mode=OFF, locking_mode=EXCLUSIVE`, mapped reads,
    pages of 64 KiB for values of that size and more; one `executemany` in one transaction to store, one to delete"""

    name = "SQLite"
    limits: ClassVar[dict[int, int]] = {size: FEWER[size] for size in (64 * KIB, MIB, 64 * MIB)}

    def open(self, directory: Path) -> None:
        self.connection = sqlite3.connect(directory / "sqlite", isolation_level=None)
        execute = self.connection.execute
        execute(f"PRAGMA page_size={64 * KIB if self.case.size >= 64 * KIB else 4 * KIB}")
        execute("PRAGMA journal_mode=OFF")
        execute("PRAGMA synchronous=OFF")
        execute("PRAGMA locking_mode=EXCLUSIVE")
        execute(f"PRAGMA mmap_size={1 << 40}")
        execute("CREATE TABLE slots (slot INTEGER PRIMARY KEY, value BLOB)")
        self.cursor = self.connection.cursor()

    def store(self, values: list[Any]) -> None:
        self.cursor.execute("BEGIN")
        self.cursor.executemany("INSERT INTO slots VALUES (?, ?)", zip(self.keys, values, strict=True))
        self.cursor.execute("COMMIT")

    def get(self, key: int) -> bytes:
        return self.cursor.execute("SELECT value FROM slots WHERE slot = ?", (key,)).fetchone()[0]

    def delete(self) -> None:
        self.cursor.execute("BEGIN")
        self.cursor.executemany("DELETE FROM slots WHERE slot = ?", ((key,) for key in self.keys))
        self.cursor.execute("COMMIT")

    def close(self) -> None:
        self.connection.close()


class DiskCache(Subject):
    """`eviction_policy="none", cull_limit=0, sqlite_synchronous=0`, mapped SQLite; one transaction to store, one to
    delete; arrays as bytes"""

    name = "diskcache"
    limits: ClassVar[dict[int, int]] = FEWER

    def open(self, directory: Path) -> None:
        self.cache = diskcache.Cache(
            str(directory / "diskcache"),
            eviction_policy="none",
            cull_limit=0,
            size_limit=1 << 50,
            sqlite_synchronous=0,
            sqlite_mmap_size=1 << 31,
        )
        self.get = self.cache.__getitem__

    def store(self, values: list[Any]) -> None:
        cache, arrays = self.cache, self.case.form == "numpy"
        with cache.transact():
            for key, value in zip(self.keys, values, strict=True):
                cache[key] = value.tobytes() if arrays else value

    def delete(self) -> None:
        cache = self.cache
        with cache.transact():
            for key in self.keys:
                del cache[key]

    def close(self) -> None:
        self.cache.close()


class RocksDict(Subject):
    """raw mode, no log, no compression, mapped reads, blob files from 4 KiB; write batches of up to 1,000 values or
    64 MiB, then a flush; arrays as bytes"""

    name = "rocksdict"
    limits: ClassVar[dict[int, int]] = {size: FEWER[size] for size in (64 * KIB, MIB, 64 * MIB)}

    def open(self, directory: Path) -> None:
        options = rocksdict.Options(raw_mode=True)
        options.create_if_missing(True)
        options.set_compression_type(rocksdict.DBCompressionType.none())
        options.set_allow_mmap_reads(True)
        options.set_enable_blob_files(True)
        options.set_min_blob_size(4 * KIB)
        options.set_stats_dump_period_sec(0)
        self.db = rocksdict.Rdict(str(directory / "rocksdict"), options)
        unlogged = rocksdict.WriteOptions()
        unlogged.disable_wal = True
        self.db.set_write_options(unlogged)
        self.unlogged = unlogged
        self.get = self.db.__getitem__
        self.keys = [i.to_bytes(8, "big") for i in range(self.case.count)]

    def store(self, values: list[Any]) -> None:
        arrays = self.case.form == "numpy"
        for pairs in self._batches(list(zip(self.keys, values, strict=True))):
            batch = rocksdict.WriteBatch(raw_mode=True)
            for key, value in pairs:
                batch.put(key, value.tobytes() if arrays else value)
            self.db.write(batch, self.unlogged)
        self.db.flush()

    def _batches(self, items: list[Any]) -> Iterator[list[Any]]:
        for start in range(0, len(items), self.case.batch):
            yield items[start : start + self.case.batch]

    def delete(self) -> None:
        for keys in self._batches(self.keys):
            batch = rocksdict.WriteBatch(raw_mode=True)
            for key in keys:
                batch.delete(key)
            self.db.write(batch, self.unlogged)

    def close(self) -> None:
        self.db.close()


class Shelve(Subject):
    """pickle protocol 5, over the best `dbm` module that this Python has"""

    name = "shelve"
    limits: ClassVar[dict[int, int]] = FEWER | {64: 1_000, 4 * KIB: 1_000}

    def open(self, directory: Path) -> None:
        try:
            import dbm.gnu  # noqa: F401

            flag = "nf"
        except ImportError:
            flag = "n"
        self.shelf = shelve.open(str(directory / "shelf"), flag, protocol=5)  # noqa: SIM115
        self.get = self.shelf.__getitem__
        self.keys = [str(i) for i in range(self.case.count)]

    def store(self, values: list[Any]) -> None:
        shelf = self.shelf
        for key, value in zip(self.keys, values, strict=True):
            shelf[key] = value
        shelf.sync()

    def delete(self) -> None:
        shelf = self.shelf
        for key in self.keys:
            del shelf[key]

    def close(self) -> None:
        self.shelf.close()


SUBJECTS: tuple[type[Subject], ...] = (
    Region,
    RegionBatched,
    RegionLimited,
    Twin,
    Files,
    ZictFile,
    ZictMemmap,
    Lmdb,
    Sqlite,
    DiskCache,
    RocksDict,
    Shelve,
    NumpyFiles,
    Arrow,
)


def random_pool() -> np.ndarray:
    """The bytes that all values are cut from; random, so that nobody profits from compressing."""
    return np.random.default_rng(0).integers(0, 1 << 64, POOL_BYTES // 8, np.uint64)


def shuffled(count: int) -> list[int]:
    """Return the order of reading and deleting, the same for everybody."""
    return random.Random(count).sample(range(count), count)


def dbm_module() -> str:
    """Name the module that `shelve` stands on here."""
    import dbm
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/probe"
        with closing(dbm.open(path, "n")):
            pass
        return dbm.whichdb(path) or "unknown"
