"""What regions and readers show: slots, statistics, compaction."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class OverflowSlot:
    """What a slot number stands for. `offset` and `size` are bytes; after a free they describe the freed value."""

    offset: int
    size: int
    engine: int
    occupied: bool


@dataclass(frozen=True)
class EngineUsage:
    """What one engine has in a region: bytes and slots, live ones only."""

    live_bytes: int
    live_slots: int


@dataclass(frozen=True)
class Compaction:
    """What a call of `compact` did.

    Attributes
    ----------
    moved_bytes
        Bytes of values that were moved.
    remaining_bytes
        Bytes of holes that further calls with the same budget may close; 0 when nothing is left to do.
    """

    moved_bytes: int
    remaining_bytes: int


@dataclass(frozen=True)
class RegionStats:
    """Figures of a region; all sizes in bytes. Those of disk and RAM, which change by themselves, don't compare.

    Attributes
    ----------
    capacity
        The file's size.
    max_capacity
        The ceiling of its growth.
    used_bytes
        End of the furthest byte ever allocated: the high-water mark.
    live_bytes
        Sum of the sizes of live values.
    free_bytes
        Space below the high-water mark that is ready for reuse.
    pinned_bytes
        Space that is freed, but waits for a view or a lease to end.
    largest_free_bytes
        The longest free extent.
    slot_count, live_slots
        Entries of the slot table: all, and those that hold a value.
    growths
        Times the file was extended.
    moved_bytes
        Bytes that `compact` has moved so far.
    disk_bytes
        Disk space that the file system has given to the file.
    resident_bytes
        Bytes of the file that are in RAM now, page cache and RSS together.
    unwritten_bytes
        Those of them that are not yet on disk. 0 before Linux 6.5, which does not count them.
    written_back_bytes
        Bytes whose write-back the background writer has started so far.
    can_punch
        False once the file system has refused to punch holes: `trim` then only shortens the file.
    engines
        What each engine holds, by engine; only those that hold something.
    """

    capacity: int
    max_capacity: int
    used_bytes: int
    live_bytes: int
    free_bytes: int
    pinned_bytes: int
    largest_free_bytes: int
    slot_count: int
    live_slots: int
    growths: int
    moved_bytes: int
    disk_bytes: int = field(compare=False)
    resident_bytes: int = field(compare=False)
    unwritten_bytes: int = field(compare=False)
    written_back_bytes: int = field(compare=False)
    can_punch: bool
    engines: dict[int, EngineUsage]

    @property
    def fragmentation(self) -> float:
        """Share of the free bytes outside the longest free extent: 0 when free space is in one piece, or none."""
        return 1 - self.largest_free_bytes / self.free_bytes if self.free_bytes else 0.0


@dataclass(frozen=True)
class ReaderSlot:
    """A live slot as a reader sees it; `offset` and `size` are bytes."""

    slot: int
    offset: int
    size: int
    engine: int
    generation: int


@dataclass(frozen=True)
class ReaderStats:
    """Figures of a region as its owner last published them; sizes in bytes.

    `owner` is the process id of the owner, None if no owner lives. `pinned_bytes` are freed, but wait for a view of
    the owner's or a lease to end, or for the owner to ask whether they are leased. `resident_bytes` counts the file's
    bytes in RAM; None where the kernel hides it, to users who neither own the file nor may write to it. `leases` counts
    those that living processes hold, this one and others; None where the leases file may not be read.
    """

    incarnation: int
    capacity: int
    max_capacity: int
    used_bytes: int
    live_bytes: int
    slot_count: int
    alignment: int
    resident_bytes: int | None
    pinned_bytes: int
    leases: int | None
    owner: int | None
