"""Buffers of int64: what the batch verbs take and give."""

from __future__ import annotations

from array import array
from operator import index
from typing import TYPE_CHECKING

from nodedb_mem import _memory
from nodedb_mem.errors import InvalidSlotError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from typing_extensions import Buffer

    Slots = Iterable[int] | Buffer  # slot numbers, or a buffer of int64

_INT64 = frozenset({"q", "l", "<q", "<l"})  # ctypes names the byte order


def int64_copy(data: Buffer) -> memoryview:
    """Copy a buffer of int64: the core reads it more than once, and another thread may write to `data` meanwhile.

    Raises
    ------
    TypeError
        `data` is no buffer of int64, or a masked array.
    """
    _memory.check_contents(data)
    try:
        view = memoryview(data)
    except TypeError:
        raise TypeError(f"a buffer of int64 is needed, not {type(data).__name__!r}") from None
    with view:
        if view.format not in _INT64 or view.itemsize != 8:
            raise TypeError(f"a buffer of int64 is needed, not of {view.format!r}")
        return memoryview(view.tobytes()).cast("q")


def slot_numbers(slots: Slots) -> array[int] | memoryview:
    """Return slot numbers as int64, in a buffer that nobody else has.

    Raises
    ------
    TypeError
        `slots` is neither an iterable of integers nor a buffer of int64.
    InvalidSlotError
        One of them is beyond int64, so that no slot ever had it.
    """
    if isinstance(slots, list | tuple):
        numbers = slots
    else:
        try:
            return int64_copy(slots)  # type: ignore[arg-type]
        except TypeError:
            if isinstance(slots, bytes | bytearray | memoryview) or not hasattr(slots, "__iter__"):
                raise
            numbers = list(slots)  # type: ignore[arg-type]
    values = list(map(index, numbers))
    try:
        return array("q", values)
    except OverflowError:
        raise InvalidSlotError(max(values, key=abs)) from None


def int64_room(count: int) -> memoryview:
    """Make a buffer of `count` zeros, to be filled in."""
    return memoryview(bytearray(8 * count)).cast("q")
