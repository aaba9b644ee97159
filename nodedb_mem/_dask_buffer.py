"""A worker's `SpillBuffer` with its slow half in a region. Accounting, logging and metrics are Dask's own."""

from __future__ import annotations

import pickle
import sys
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import zict
from distributed.metrics import context_meter
from distributed.protocol import serialize_bytelist
from distributed.protocol.compression import get_compression_settings
from distributed.protocol.serialize import Serialized
from distributed.sizeof import safe_sizeof
from distributed.spill import HandledError, MaxSpillExceeded, PickleError, Slow, SpillBuffer, SpilledSize
from distributed.utils import nbytes

from nodedb_mem._dask_store import FrameStore, load, unpack_header

if TYPE_CHECKING:
    from collections.abc import Hashable

    from nodedb_mem.refs import SlotRef
    from nodedb_mem.region import OverflowRegion

#: Bytes from which on a reference, which costs a peer some system calls, is faster than a socket.
BY_REFERENCE = 256 << 10
#: The name of references among Dask's serializers.
FAMILY = "nodedb-mem"


class Peer:
    """Who has asked a worker for values. Those that are out are sent from where they lie, or by reference."""

    def __init__(self, *, reads: bool) -> None:
        self.reads = reads  # this machine's files
        self.lent: list[SlotRef] = []


#: Set while a worker collects what a peer has asked for.
for_peer: ContextVar[Peer | None] = ContextVar("for_peer", default=None)


class RegionSlow(Slow):
    """The slow half of a buffer: Dask's, but the frames go to a region. What it had in files stays there."""

    d: FrameStore

    def __init__(self, before: Slow, region: OverflowRegion) -> None:
        compression = get_compression_settings("distributed.worker.memory.spill-compression")
        # Dask cuts frames into shards of 64 MiB for its compressors. Whole ones need not be put together again.
        shard = None if compression else sys.maxsize
        dump = partial(serialize_bytelist, compression=compression, on_error="raise", size=shard)
        zict.Func.__init__(self, dump, load, FrameStore(region, before.d, maps=before.max_weight is False))
        self.max_weight = before.max_weight
        self.weight_by_key = before.weight_by_key
        self.total_weight = before.total_weight

    def __setitem__(self, key: Hashable, value: object) -> None:
        """Write a value, unless its slot was kept and still holds it. Raises as Dask's."""
        if key in self.d.kept:
            if self._revive(key, value):
                return
            self.d.forget(key)
        super().__setitem__(key, value)

    def _revive(self, key: Hashable, value: object) -> bool:
        try:
            frames = self.dump(value)
        except Exception as error:
            raise PickleError(key) from error
        if not self.d.is_unchanged(key, frames):
            return False
        size = SpilledSize(safe_sizeof(value), sum(map(nbytes, frames)))
        if self.max_weight is not False and self.total_weight.disk + size.disk > self.max_weight:
            raise MaxSpillExceeded(key)
        self.d.revive(key)
        self.weight_by_key[key] = size
        self.total_weight += size
        return True


class RegionBuffer(SpillBuffer):
    """Dask's buffer, which keeps the slot of a key that it has brought back."""

    def slow_to_fast(self, key: Hashable) -> object:
        """Bring a value back. If others should make room for it and cannot, that is logged, and the value is given."""
        try:
            with self._handle_errors(None), self.store.restoring(key):
                return super().slow_to_fast(key)
        except HandledError as error:
            if key in self.fast:
                return self.fast[key]
            raise error.__context__ or error from None

    def __setitem__(self, key: Hashable, value: object) -> None:
        """Store a value, as Dask's does."""
        self.store.forget(key)
        super().__setitem__(key, value)

    def __delitem__(self, key: Hashable) -> None:
        """Remove a key, and what was kept for it."""
        super().__delitem__(key)
        self.store.forget(key)

    def __getitem__(self, key: Hashable) -> object:
        """Give a value. One that is out comes back, unless it is for a peer: that gets the frames where they lie."""
        peer = for_peer.get()
        if peer is not None and key not in self.fast and key not in self.slow.cache:
            frames = self._frames(key, peer)
            if frames is not None:
                return frames
        return super().__getitem__(key)

    def _frames(self, key: Hashable, peer: Peer) -> Serialized | None:
        """Give a value that is out as a message of Dask's carries it, if it is in a form that a message can carry."""
        with self._capture_metrics():
            with context_meter.meter("disk-read", "seconds"):
                found = self.store.peek(key)
            if found is None:
                return None
            header = unpack_header(found.header)
            if peer.reads and self.store.maps and found.size >= BY_REFERENCE:
                ref = self.store.lend(key)
                peer.lent.append(ref)
                sent = Serialized({"serializer": FAMILY, "alignment": self.store.alignment}, [pickle.dumps(ref)])
            elif all(count == 1 for count in header["split-num-sub-frames"]):
                sent = Serialized(header, found.frames)
            else:  # compressed by shards
                return None
            context_meter.digest_metric("disk-read", 1, "count")
            context_meter.digest_metric("disk-read", found.size, "bytes")
        return sent

    @property
    def store(self) -> FrameStore:
        """Where the frames are."""
        return cast("RegionSlow", self._slow_uncached).d


def take_over(buffer: Any, region: OverflowRegion) -> None:
    """Make a worker's buffer spill to a region from now on, which it closes. Every reference to the buffer stays good.

    Raises
    ------
    TypeError
        It is not what Dask makes, or not what this code knows.
    """
    if type(buffer) is not SpillBuffer or type(buffer.slow) is not zict.Cache or type(buffer.slow.data) is not Slow:
        region.close()
        raise TypeError(f"the worker's data is no plain {SpillBuffer.__name__}")
    slow = RegionSlow(buffer.slow.data, region)
    buffer.slow.data = slow
    buffer.__class__ = RegionBuffer
