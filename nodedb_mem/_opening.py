"""How a region is opened: its settings are checked, and the core is asked for it."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from operator import index
from typing import TYPE_CHECKING

from nodedb_mem import _memory
from nodedb_mem._core import ffi, lib
from nodedb_mem.errors import RegionIOError, RegionSizeError

if TYPE_CHECKING:
    from nodedb_mem._memory import Holder
    from nodedb_mem.errors import Where

UNLIMITED = (1 << 64) - 1
_PATH_MAX = 4096  # of a system call, with its null byte
_LONGEST_ENDING = ".leases"
_IN_RAM = {
    lib.NDM_MEDIUM_TMPFS: "tmpfs",
    lib.NDM_MEDIUM_RAMFS: "ramfs",
    lib.NDM_MEDIUM_OVERLAY: "an overlay that writes to tmpfs or ramfs",
}
_OWNERSHIP = {"thread": lib.NDM_OWNED_BY_THREAD, "process": lib.NDM_OWNED_BY_PROCESS}
_PACKAGE = __name__.partition(".")[0]


def region_options(
    initial_capacity: int,
    max_capacity: int,
    alignment: int,
    cache_limit: int | None,
    *,
    recover: bool,
    keep_mapped: bool,
    ownership: str,
) -> memoryview:
    """Check settings of a region, and give them as the bytes of an `ndm_options`.

    Raises
    ------
    RegionSizeError
        A size is negative, or 2**63 and more.
    ValueError
        `ownership` is neither "thread" nor "process".
    """
    if ownership not in _OWNERSHIP:
        raise ValueError(f"ownership must be 'thread' or 'process', not {ownership!r}")
    sizes = [index(initial_capacity), index(max_capacity), index(alignment)]
    if not all(0 <= size < 1 << 63 for size in sizes):
        raise RegionSizeError("capacities and alignment must be positive and below 2**63")
    limit = UNLIMITED if cache_limit is None else index(cache_limit)
    if limit < 0:
        raise RegionSizeError("cache_limit must not be negative")
    options = [*sizes, min(limit, UNLIMITED), bool(recover), bool(keep_mapped), _OWNERSHIP[ownership]]
    return memoryview(ffi.buffer(ffi.new("ndm_options *", options)))


def absolute(name: str) -> str:
    """Where a path leads, whatever becomes of the current directory.

    A path stays relative where the current directory was removed, is deeper than a path may be, or may not be asked
    for: the system may still find the file.
    """
    if not name or os.path.isabs(name):
        return name
    try:
        place = os.path.join(os.getcwd(), name)
    except OSError:
        return name
    return place if len(os.fsencode(place + _LONGEST_ENDING)) < _PATH_MAX else name


def temporary_folder() -> str:
    """Find the folder for temporary files.

    Raises
    ------
    RegionIOError
        None can be written to.
    """
    try:
        return tempfile.gettempdir()
    except OSError as error:
        message = f"no folder for temporary files can be written to: {error.strerror}"
        raise RegionIOError(error.errno, message) from error


def open_region(place: str, options: memoryview, where: Where, *, temporary: bool) -> Holder:
    """Open the file at `place`; or an unnamed one in that folder, if `temporary`.

    Warns
    -----
    ResourceWarning
        The file is on tmpfs or ramfs, or on an overlay that writes to one of these. Or there is a cache limit, and what
        this process maps is locked in RAM.
    """
    name = os.fsencode(place)
    if b"\0" in name:
        raise ValueError("embedded null byte in the path")
    if medium := _IN_RAM.get(lib.ndm_path_medium(name)):
        message = f"{where[1]} is on {medium}: what is spilled there stays in RAM"
        warnings.warn(message, ResourceWarning, stacklevel=_outside_stacklevel())
    if ffi.from_buffer("ndm_options *", options).cache_limit != UNLIMITED and lib.ndm_mappings_are_locked():
        warn_of_locking(where)
    return _memory.open_region(name, temporary, options, where)


def warn_of_locking(where: Where) -> None:
    """Warn that nothing of a region can leave RAM."""
    message = (
        f"{where[1]} is mapped where mlockall() keeps all in RAM: neither evict nor cache_limit can drop any of it"
    )
    warnings.warn(message, ResourceWarning, stacklevel=_outside_stacklevel())


def _outside_stacklevel() -> int:
    """How many frames up the caller of this package stands."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
        level, frame = level + 1, frame.f_back
    return level
