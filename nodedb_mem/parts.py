"""Where the parts of a gathered value lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Sequence


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

    def split(self, view: memoryview) -> list[memoryview]:
        """Cut a view of the value into views of its parts, without a copy."""
        return [view[start : start + size] for start, size in zip(self.offsets, self.sizes, strict=True)]
