"""The two tiers of a `SpillMapping`: values in RAM, in the order of their last use, and values in slots of a region.

An entry is one value and the keys that name it. It is hot, its value in RAM, or cold, its value in a slot. A hot entry
that was cold before keeps its slot: if the value goes out unchanged, nothing is written.

A value goes out only if nobody else holds it (`nodedb_mem._held`): what a holder changes in place must be seen under
its key, and the holder would keep it in RAM anyway. Such a value counts as just used, and is looked at again when its
turn comes. What is inside of a value and still held by others then, say a configuration that many values share, stays
in RAM as it is, and the value goes out without it.

All of this is for one thread at a time. Other threads may take the value of a hot entry
meanwhile: it is taken off the entry before anyone looks who holds it.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from time import perf_counter
from typing import TYPE_CHECKING, Any

from nodedb_mem._changes import PageMap
from nodedb_mem._held import holders, is_atom, is_plain_array, is_referred_to, known_references
from nodedb_mem._sizeof import sizeof
from nodedb_mem._stored import Stored, encode_for, get, is_unchanged, put
from nodedb_mem.codec import ALIGNMENT
from nodedb_mem.errors import RegionIOError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import FrameType

    from typing_extensions import Buffer

    from nodedb_mem._held import Memory, Shared, Span
    from nodedb_mem._memory import Reservation
    from nodedb_mem.codec import Encoded
    from nodedb_mem.objects import ObjectRef
    from nodedb_mem.region import OverflowRegion

_MOST_MAPPINGS = 16_384  # of the 65,530 that a process may have; beyond it values come back as copies
_TIDY = 64 << 20  # bytes freed in the region between two looks at its holes
_HOLES = 256 << 20  # bytes of holes that are worth the work, if they are more than the values, too
_TRIM = 32 << 20  # bytes of values put out between two requests to the C library to return what is free

_MAPPED = 32 << 20  # bytes that the C library maps by themselves, at the latest

_malloc_trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none

COLD: Any = type("_Cold", (), {"__repr__": lambda self: "<cold>"})()


class Entry:
    """A value and the keys that name it.

    `value` is `COLD` when it is in its slot only. `stored` is where it was last written; `view` is the private mapping
    that it came back in, `memory` what it was made on. `kept` is what its pickle names.
    """

    __slots__ = (
        "held",
        "kept",
        "keys",
        "memory",
        "pins",
        "reservation",
        "shares",
        "stored",
        "stuck",
        "value",
        "view",
        "weight",
    )

    def __init__(self, key: Any, weight: int) -> None:
        self.keys = [key]
        self.value: Any = COLD
        self.weight = weight
        self.stored: Stored | None = None
        self.view: Buffer | None = None
        self.memory: Memory | None = None
        self.kept: list[Any] = []
        self.pins = 0
        self.reservation: Reservation | None = None  # of its weight, while it is hot
        self.held = False  # others held what is inside of it when its turn came last
        self.stuck = False  # it cannot be pickled
        # Arrays, by id(), that it has views of: how many, and where they lie. Known until the value is asked for.
        self.shares: dict[int, tuple[int, list[Span]]] = {}


class Tiers:
    """Which entries are hot, and how they move."""

    def __init__(self, region: OverflowRegion, engine: int, weigh: Callable[[Any], int]) -> None:
        self.region = region
        self.closed = False
        self.engine = engine
        self.weigh = weigh
        self.hot: OrderedDict[Entry, None] = OrderedDict()
        self.by_value: dict[int, Entry] = {}  # the hot ones, by the id() of their values
        self.pages = PageMap()
        self.sharers: dict[int, set[Entry]] = {}  # by the id() of an array
        self.moving: Entry | None = None
        self.transit: tuple[Entry, list[Any]] | None = None  # an entry whose value is on its way out, and the value
        self.unsettled = False  # an exception now, of a signal, would leave the books as they are
        self.mappings = self.freed = self.untrimmed = 0
        self.bytes = self.bytes_out = 0
        self.hits = self.misses = self.evictions = self.writes_saved = self.bytes_saved = 0
        self.bytes_written = self.bytes_read = self.passed_over = self.failures = 0
        self.write_seconds = self.read_seconds = 0.0

    def abandon(self) -> None:
        """Let go of what no collector sees: descriptors and reservations."""
        self.pages.close()
        for entry in self.hot:
            if entry.reservation is not None:
                entry.reservation.release()

    def close(self) -> None:
        """Let go of everything."""
        self.abandon()
        self.hot.clear()
        self.by_value.clear()
        self.sharers.clear()
        self.region.close()
        self.closed = True

    def mend(self, entries: Mapping[Any, Entry]) -> None:
        """Make the books anew, after an exception came between, such as KeyboardInterrupt. No value is lost by it."""
        if self.transit is not None:
            entry, box = self.transit
            if box and entry.value is COLD:
                entry.value = box.pop()
        self.moving = self.transit = None
        known = dict.fromkeys(entries.values())
        for entry in known.keys() | self.hot.keys():
            entry.keys, entry.shares = [], {}
            if entry not in known or entry.value is COLD:
                entry.view = entry.memory = None
                if entry.reservation is not None:
                    entry.reservation.release()
                    entry.reservation = None
        for key, entry in entries.items():
            entry.keys.append(key)
        hot = {entry: None for entry in known if entry.value is not COLD}
        self.hot = OrderedDict({entry: None for entry in self.hot if entry in hot} | hot)
        self.by_value = {id(entry.value): entry for entry in self.hot}
        self.sharers.clear()
        self.bytes = sum(entry.weight for entry in self.hot)
        self.mappings = sum(entry.view is not None for entry in self.hot)
        self.bytes_out = sum(entry.stored.size for entry in known if entry not in hot and entry.stored is not None)
        used = {entry.stored.slot for entry in known if entry.stored is not None}
        for slot in range(self.region.slot_count):
            if slot not in used and slot in self.region:
                self.region.free(slot)
        self.unsettled = False

    # -- up -------------------------------------------------------------------------------------------------------

    def add(
        self, entry: Entry, value: Any, view: Buffer | None = None, *, reservation: Reservation | None = None
    ) -> None:
        """Make an entry hot."""
        self.unsettled = True
        entry.reservation = reservation
        entry.view = view
        self.mappings += view is not None
        self.by_value[id(value)] = entry
        self.hot[entry] = None
        self.bytes += entry.weight
        entry.value = value

    def bring_back(self, entry: Entry, reservation: Reservation | None = None) -> Any:
        """Make a cold entry hot, and give its value."""
        self._refuse_moving(entry)
        assert entry.stored is not None
        start = perf_counter()
        value, view, entry.memory = get(self.region, entry.stored, entry.kept, may_map=self.mappings < _MOST_MAPPINGS)
        if entry.memory is not None:
            entry.memory.settle()
        self.unsettled = True
        self.misses += 1
        self.bytes_read += entry.stored.size
        self.bytes_out -= entry.stored.size
        self.add(entry, value, view, reservation=reservation)
        self.read_seconds += perf_counter() - start
        return value

    def weigh_again(self, entry: Entry, weight: int, reservation: Reservation | None) -> None:
        """Note the weight of a hot entry that was assigned again."""
        self.unsettled = True
        if entry.reservation is not None:
            entry.reservation.release()
        entry.reservation = reservation
        self.bytes += weight - entry.weight
        entry.weight = weight
        entry.stuck = False
        self.hot.move_to_end(entry)

    def share(self, entry: Entry) -> ObjectRef:
        """Make a reference to a value as it is now, which is in its slot afterwards, too."""
        self._refuse_moving(entry)
        if entry.value is COLD and entry.kept:  # others could not make the kept ones
            self.bring_back(entry)
        if entry.value is not COLD and self._store(entry, encode_for(entry.keys[0], entry.value, ALIGNMENT)):
            self.mappings -= entry.view is not None
            entry.view = None  # what it tells of is no longer what is stored
        assert entry.stored is not None
        return self.region.share_object(entry.stored.slot)

    # -- away -----------------------------------------------------------------------------------------------------

    def forget(self, entry: Entry, key: Any) -> None:
        """Take a key off its entry. The last one takes the value along."""
        self._refuse_moving(entry)
        self.unsettled = True
        entry.keys.remove(key)
        if entry.keys:
            return
        if entry in self.hot:
            value, entry.value = entry.value, COLD
            self._leave(entry, id(value))
        elif entry.stored is not None:
            self.bytes_out -= entry.stored.size
        self._free(entry)

    def _leave(self, entry: Entry, value_id: int) -> None:
        """Count the entry as hot no longer; its value has been taken off."""
        self.mappings -= entry.view is not None
        entry.view = entry.memory = None
        self._unshare(entry)
        del self.by_value[value_id]
        del self.hot[entry]
        self.bytes -= entry.weight
        if entry.reservation is not None:
            reservation, entry.reservation = entry.reservation, None
            reservation.release()

    def _free(self, entry: Entry) -> None:
        if entry.stored is not None:
            stored, entry.stored = entry.stored, None
            self.region.free(stored.slot)
            self.freed += stored.size

    def _refuse_moving(self, entry: Entry) -> None:
        """Refuse what a value's own pickling, or a finalizer on the way, asks for."""
        if entry is self.moving:
            raise RuntimeError(f"the value of {entry.keys[0]!r} is on its way out")

    # -- down -----------------------------------------------------------------------------------------------------

    def shrink(self, target: int, most_held: int, *, own: Entry | None = None, caller: FrameType | None = None) -> None:
        """Put the coldest values out until those in RAM weigh no more than `target`.

        Gives up where `most_held` have been passed over, because they are in use, and each at most once. `own` is being
        assigned by `caller`.
        """
        passed = 0
        most = min(most_held, len(self.hot))
        while self.bytes > target and self.hot and passed < most:
            entry = self._coldest()
            known = known_references(caller) if entry is own and caller is not None else 0
            if entry.pins or entry.stuck or not self.put_out(entry, known):
                self.hot.move_to_end(entry)
                passed += 1
        self._trim()

    def _trim(self) -> None:
        if self.untrimmed >= _TRIM and _malloc_trim is not None:
            self.untrimmed = 0
            _malloc_trim(0)

    def tidy(self) -> None:
        """Return memory to the system; and close the holes of the region, once in so many bytes that were freed."""
        self._trim()
        if self.freed > _TIDY:
            self.freed = 0
            live = self.region.live_bytes
            if self.region.used_bytes - live > max(_HOLES, live):
                with suppress(RegionIOError):  # no room to move in: the holes stay until there is
                    self.region.compact(_TIDY)
                    self.region.trim()

    def _coldest(self) -> Entry:
        while True:
            try:
                return next(iter(self.hot))
            except RuntimeError:  # a hit on another thread came between
                continue

    def put_out(self, entry: Entry, known: int = 0) -> bool:
        """Move a value to the region. False if it is in use; where it fails, it stays in RAM."""
        self._refuse_moving(entry)
        start = perf_counter()
        box = [entry.value]
        value_id = id(entry.value)
        self.transit = entry, box
        self.moving = entry
        self.unsettled = True
        entry.value = COLD  # from here on no other thread comes by it
        out = False
        try:
            held = holders(box, known, memory=entry.memory, view=entry.view)
            has_had_chance, entry.held = entry.held, bool(held.inside)
            if held.shared:
                self._share(entry, held.shared)
            if not held.itself and (has_had_chance or not held.inside):
                mine = {id(each.base) for each in held.shared if self._is_among_us(entry, each)}
                out = self._write(entry, box, [each for each in held.inside if id(each) not in mine])
                out = out and not is_referred_to(box, known)  # a weak reference may have become a strong one meanwhile
            del held
        except BaseException as error:
            self.failures += 1
            entry.stuck = isinstance(error, TypeError)
            raise
        finally:
            self.moving = None
            if not out:
                entry.value = box.pop()  # a traceback should not hold it
                self.transit = None
                self.unsettled = False
        if not out:
            self.passed_over += 1
            return False
        if entry.view is None and (entry.weight < _MAPPED or not is_plain_array(box[0])):
            self.untrimmed += entry.weight  # a mapping leaves by itself
        self._leave(entry, value_id)
        self.evictions += 1
        assert entry.stored is not None
        self.bytes_out += entry.stored.size
        if self.weigh is sizeof:  # what has grown in place weighs more when it comes back
            entry.weight = max(entry.weight, entry.stored.size)
        self.transit = None
        box.clear()  # the memory goes now
        self.write_seconds += perf_counter() - start
        return True

    # -- views of one array in several values ---------------------------------------------------------------------

    def _share(self, entry: Entry, shared: list[Shared]) -> None:
        """Note which arrays a value has views of."""
        self._unshare(entry)
        entry.shares = {id(each.base): (each.inside, each.spans) for each in shared}
        for number in entry.shares:
            self.sharers.setdefault(number, set()).add(entry)

    def _unshare(self, entry: Entry) -> None:
        for number in entry.shares:
            sharers = self.sharers.get(number, set())
            sharers.discard(entry)
            if not sharers:
                self.sharers.pop(number, None)
        entry.shares = {}

    def _is_among_us(self, entry: Entry, shared: Shared) -> bool:
        """Whether none but values here refer to an array, and this one's part of it is its own.

        What was noted of the others is true: nobody has asked for them since, and nobody else has them.
        """
        number = id(shared.base)
        noted = [
            other.shares[number]
            for other in self.sharers.get(number, ())
            if other is not entry and number in other.shares and not other.pins
        ]
        return shared.outside == sum(count for count, _ in noted) and all(
            mine.is_apart(theirs) for _, spans in noted for theirs in spans for mine in shared.spans
        )

    def _write(self, entry: Entry, box: list[Any], kept: list[Any]) -> bool:
        """Store a value, unless it is stored already. False if it is in use."""
        stored = entry.stored
        if stored is not None and is_atom(box[0]):
            return self._save(stored)
        encoded = encode_for(entry.keys[0], box[0], ALIGNMENT, kept)
        if any(type(each) is not object for number, each in enumerate(kept) if number not in encoded.named):
            return False  # the pickle has another object in the place of one that others hold
        if not self._store(entry, encoded, kept):
            assert stored is not None
            self._save(stored)
        return True

    def _store(self, entry: Entry, encoded: Encoded, kept: Sequence[Any] = ()) -> bool:
        """Write an encoded value; false, and nothing is done, if it is what is stored."""
        stored = entry.stored
        bound = bool(encoded.named or entry.kept)
        if stored is not None and not bound and is_unchanged(stored, encoded, self._read, entry.view, self.pages):
            return False
        fresh = put(self.region, entry.keys[0], encoded, self.engine)
        self._free(entry)
        entry.stored = fresh
        entry.kept = []
        if encoded.named:
            entry.kept = [each if number in encoded.named else None for number, each in enumerate(kept)]
        self.bytes_written += fresh.size
        return True

    def _read(self, slot: int) -> memoryview:
        return self.region.read(slot)

    def _save(self, stored: Stored) -> bool:
        """Count a write that was not needed."""
        self.writes_saved += 1
        self.bytes_saved += stored.size
        return True
