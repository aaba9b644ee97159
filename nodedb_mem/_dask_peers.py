"""What a worker sends to its peers: spilled values from where they lie, and to peers on its machine by reference.

A worker asks a peer once whether it can read this worker's region, by a reference to a value there. Until the peer has
answered that it can, and if it cannot, values go through the socket. A value that was sent by reference is leased by
the peer before it confirms, and until then the slot is not freed.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
from typing import TYPE_CHECKING, Any

from distributed.comm import get_address_host
from distributed.protocol.serialize import register_serialization_family

from nodedb_mem._dask_buffer import BY_REFERENCE, FAMILY, Peer, for_peer
from nodedb_mem._dask_store import load, split
from nodedb_mem.objects import private_view

if TYPE_CHECKING:
    from distributed import Worker

_log = logging.getLogger("distributed.nodedb_mem")

_NAMES = ("tcp://", "tls://")  # connections that carry frames
_HEAD = 64  # bytes of a value that a peer has to read


def _fetch(header: dict[str, Any], frames: list[Any]) -> object:
    """Make a value that was sent by reference."""
    return load(split(private_view(pickle.loads(frames[0])), header["alignment"]))


async def reads(ref: bytes, head: bytes) -> bool:
    """Tell a peer whether its values can be read here."""
    try:
        return bytes(private_view(pickle.loads(ref))[: len(head)]) == head
    except Exception:
        return False


class Sender:
    """Answers the peers of a worker that ask for values."""

    def __init__(self, worker: Worker) -> None:
        register_serialization_family(FAMILY, None, _fetch)
        self._worker = worker
        self._stock = worker.handlers["get_data"]
        self._known: dict[str, bool] = {}
        self._questions: set[asyncio.Task[None]] = set()
        worker.handlers["get_data"] = self.get_data
        worker.handlers["nodedb_mem_reads"] = reads

    async def get_data(self, comm: Any, *args: Any, who: Any = None, serializers: Any = None, **more: Any) -> Any:
        """Send values."""
        peer = None
        if comm.peer_address.startswith(_NAMES) and (serializers is None or {"dask", "pickle"} <= set(serializers)):
            peer = Peer(reads=serializers is None and self._known.get(who, False))
        token = for_peer.set(peer)
        try:
            return await self._stock(comm, *args, who=who, serializers=serializers, **more)
        finally:
            for_peer.reset(token)
            if peer is not None:
                for ref in peer.lent:
                    self._worker.data.store.take_back(ref)
                self._ask(who)

    def _ask(self, who: Any) -> None:
        """Ask a peer on this machine, once, whether it reads this worker's values."""
        worker = self._worker
        if not isinstance(who, str) or who in self._known or not who.startswith(_NAMES):
            return
        if who == worker.scheduler.address or get_address_host(who) != get_address_host(worker.address):
            return
        question = asyncio.create_task(self._question(who))
        self._questions.add(question)
        question.add_done_callback(self._questions.discard)

    async def _question(self, who: str) -> None:
        store = self._worker.data.store
        sample = store.sample(BY_REFERENCE)
        if sample is None:
            return
        self._known[who] = False
        ref = store.lend(sample)
        try:
            head = store.head(sample, _HEAD)
            self._known[who] = await self._worker.rpc(who).nodedb_mem_reads(ref=pickle.dumps(ref), head=head) is True
        except Exception:
            _log.debug("%s could not be asked whether it reads this worker's values", who, exc_info=True)
        finally:
            store.take_back(ref)
