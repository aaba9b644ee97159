"""What stands for a value outside its region: a reference for readers, and where its parts lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer


class SlotRef(NamedTuple):
    """A reference to one value, made by `OverflowRegion.share`; small, picklable, and good in any process.

    Attributes
    ----------
    path : str
        The region's file; for a temporary region, where /proc shows it while its owner lives.
    incarnation : int
        Which opening of the region the value belongs to.
    slot, generation : int
        Which value.
    size : int
        In bytes.
    slots_path, leases_path : str
        The region's other files.
    """

    path: str
    incarnation: int
    slot: int
    generation: int
    size: int
    slots_path: str
    leases_path: str


@dataclass(frozen=True)
class SlotParts:
    """Offsets and sizes of a value's parts, in bytes from the value's start."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def layout(cls, sizes: Sequence[int], alignment: int) -> Self:
        """Lay parts out one after the other, each at the next multiple of `alignment` bytes."""
        offsets = []
        end = 0
        for size in sizes:
            start = -(-end // alignment) * alignment
            offsets.append(start)
            end = start + size
        return cls(tuple(offsets), tuple(sizes))

    def split(self, buffer: Buffer) -> list[memoryview]:
        """Cut a view of the value, or a copy, into views of its parts, without another copy.

        Raises
        ------
        ValueError
            The buffer has not the value's size.
        """
        view = memoryview(buffer).cast("B")
        size = self.offsets[-1] + self.sizes[-1] if self.sizes else 0
        if view.nbytes != size:
            raise ValueError(f"the value has {size} bytes, the buffer {view.nbytes}")
        return [view[start : start + size] for start, size in zip(self.offsets, self.sizes, strict=True)]
