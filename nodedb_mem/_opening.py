"""How a region is opened: its settings are checked, and the core is asked for it."""

from __future__ import annotations

import os
import sys
import warnings
from operator import index
from typing import TYPE_CHECKING

from nodedb_mem import _memory
from nodedb_mem._core import ffi, lib

if TYPE_CHECKING:
    from nodedb_mem._memory import Holder
    from nodedb_mem.errors import Where

_UNLIMITED = (1 << 64) - 1
_PACKAGE = __name__.partition(".")[0]


def region_options(
    initial_capacity: int,
    max_capacity: int,
    alignment: int,
    cache_limit: int | None,
    *,
    recover: bool,
    keep_mapped: bool,
) -> memoryview:
    """Check settings of a region, and give them as the bytes of an `ndm_options`.

    Raises
    ------
    ValueError
        A size is negative, or 2**63 and more.
    """
    sizes = [index(initial_capacity), index(max_capacity), index(alignment)]
    if not all(0 <= size < 1 << 63 for size in sizes):
        raise ValueError("capacities and alignment must be positive and below 2**63")
    limit = _UNLIMITED if cache_limit is None else index(cache_limit)
    if limit < 0:
        raise ValueError("cache_limit must not be negative")
    options = [*sizes, min(limit, _UNLIMITED), bool(recover), bool(keep_mapped)]
    return memoryview(ffi.buffer(ffi.new("ndm_options *", options)))


def open_region(place: str, options: memoryview, where: Where, *, temporary: bool) -> Holder:
    """Open the file at `place`; or an unnamed one in that folder, if `temporary`.

    Warns
    -----
    ResourceWarning
        The file is on tmpfs.
    """
    name = os.fsencode(place)
    if b"\0" in name:
        raise ValueError("embedded null byte in the path")
    if lib.ndm_path_in_memory(name):
        message = f"{where[1]} is on tmpfs: what is spilled there stays in RAM"
        warnings.warn(message, ResourceWarning, stacklevel=_outside_stacklevel())
    return _memory.open_region(name, temporary, options, where)


def _outside_stacklevel() -> int:
    """How many frames up the caller of this package stands."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
        level, frame = level + 1, frame.f_back
    return level
