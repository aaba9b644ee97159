"""How much RAM an object holds, as far as its buffers tell."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from nodedb_mem.codec import Encoded


def sizeof(value: object) -> int:
    """Estimate how many bytes of RAM an object holds.

    NumPy arrays, pandas frames, series and indexes, Arrow arrays and tables, SciPy sparse matrices and arrays and torch
    tensors tell it themselves. Other objects are as large as their pickle, their buffers included.

    Raises
    ------
    TypeError
        The object cannot be pickled.
    """
    kind = type(value)
    if kind in _PLAIN:
        return sys.getsizeof(value)
    known = _KNOWN.get(kind.__module__.partition(".")[0])
    size = known(value) if known is not None else None
    return _pickled_size(value) if size is None else size


_PLAIN = frozenset({bytes, bytearray, str, int, float, complex, bool, type(None)})


def _pickled_size(value: object) -> int:
    from nodedb_mem.codec import encode

    encoded: Encoded = encode(value)
    return encoded.size


def _numpy(value: Any) -> int | None:
    dtype = getattr(value, "dtype", None)
    if dtype is None or dtype.hasobject or dtype.kind == "T" or not hasattr(value, "nbytes"):
        return None
    mask = getattr(value, "_mask", None)
    return int(value.nbytes) + int(getattr(mask, "nbytes", 0)) + _OBJECT


def _pandas(value: Any) -> int | None:
    """Ask for the memory, the objects' too."""
    if hasattr(value, "memory_usage"):
        used = value.memory_usage(deep=True)
        return int(used.sum() if hasattr(used, "sum") else used) + _OBJECT
    return None


def _arrow(value: Any) -> int | None:
    size = value.get_total_buffer_size() if hasattr(value, "get_total_buffer_size") else getattr(value, "nbytes", None)
    if size is None:
        size = getattr(value, "size", None)  # a Buffer
    return None if size is None else int(size) + _OBJECT


def _scipy(value: Any) -> int | None:
    """Add up the arrays that a sparse matrix is made of."""
    if not hasattr(value, "format") or not hasattr(value, "nnz"):
        return None
    arrays = [getattr(value, name, None) for name in ("data", "indices", "indptr", "row", "col", "offsets", "coords")]
    flat = [each for array in arrays for each in (array if isinstance(array, tuple) else (array,))]
    sizes = [int(array.nbytes) for array in flat if hasattr(array, "nbytes")]
    return sum(sizes) + _OBJECT if sizes and value.format not in ("lil", "dok") else None


def _torch(value: Any) -> int | None:
    if not hasattr(value, "element_size") or value.device.type != "cpu" or value.is_sparse:
        return None
    return int(value.element_size() * value.nelement()) + _OBJECT


_OBJECT = 128  # the object around the buffers
_KNOWN: dict[str, Callable[[Any], int | None]] = {
    "numpy": _numpy,
    "pandas": _pandas,
    "pyarrow": _arrow,
    "scipy": _scipy,
    "torch": _torch,
}
