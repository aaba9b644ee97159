"""Settings that a service hands to its regions."""

from dataclasses import dataclass

MIB = 1 << 20
GIB = 1 << 30

DEFAULT_INITIAL_CAPACITY = 64 * MIB
DEFAULT_MAX_CAPACITY = GIB
DEFAULT_ALIGNMENT = 64
DEFAULT_CACHE_LIMIT = 256 * MIB


@dataclass(frozen=True)
class MemoryTuning:
    """Sizes of an overflow region.

    Parameters
    ----------
    overflow_initial_bytes
        Size of a new region's file, in bytes.
    overflow_max_bytes
        Ceiling of the file's growth, in bytes.
    """

    overflow_initial_bytes: int = DEFAULT_INITIAL_CAPACITY
    overflow_max_bytes: int = DEFAULT_MAX_CAPACITY
