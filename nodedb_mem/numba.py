"""Regions and governors in numba's nopython code: functions that compiled loops call directly. Needs numba.

Each takes `OverflowRegion.handle`. The owner rule holds: compiled code has to run on the region's own thread (not in
``prange``). Nothing is raised in compiled code: a negative number is an ``ndm_status`` of ``nodedb_mem.h``, and `check`
turns it into the exception, back in Python on the same thread::

    from nodedb_mem import numba as spill

    @numba.njit
    def write_rows(handle, rows, slots):
        for i in range(len(rows)):
            slots[i] = spill.write(handle, rows[i], 0)
            if slots[i] < 0:
                return slots[i]
        return 0

    spill.check(write_rows(region.handle, rows, slots))

`reserve`, `release`, `charge`, `pressure` and `allocated` take `MemoryGovernor.handle`. Any thread may call these, in
``prange`` too. A reservation that compiled code has made is released by the same size, or goes with the governor.

The region object has to stay alive meanwhile; if it does not, the calls give ``NDM_ERR_CLOSED``. Code cached with
``cache=True`` works: it finds the core by name.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from llvmlite import binding
from numba import carray, types
from numba.core.errors import TypingError
from numba.core.imputils import impl_ret_borrowed
from numba.extending import intrinsic, overload

from nodedb_mem._core import ffi, lib
from nodedb_mem.errors import raise_status
from nodedb_mem.native import get_library_dirs

__all__ = [
    "allocated",
    "charge",
    "check",
    "contains",
    "free",
    "pin",
    "pressure",
    "read_into",
    "release",
    "reserve",
    "size",
    "unpin",
    "write",
]

# The same file that the Python side has loaded, so the same core.
_LIBRARY = os.path.join(get_library_dirs()[0], f"libnodedb_mem.so.{lib.NDM_ABI_VERSION}")
binding.load_library_permanently(_LIBRARY)

_HANDLE, _SLOT, _DATA, _SIZE = types.uint64, types.int64, types.voidptr, types.uint64
_write = types.ExternalFunction("ndm_h_write", types.int64(_HANDLE, _DATA, _SIZE, types.int64))
_read_into = types.ExternalFunction("ndm_h_read_into", types.int64(_HANDLE, _SLOT, _DATA, _SIZE))
_size = types.ExternalFunction("ndm_h_size", types.int64(_HANDLE, _SLOT))
_free = types.ExternalFunction("ndm_h_free", types.int32(_HANDLE, _SLOT))
_contains = types.ExternalFunction("ndm_h_contains", types.int32(_HANDLE, _SLOT))
_pin = types.ExternalFunction("ndm_h_pin", types.uintp(_HANDLE, _SLOT, types.uintp))
_unpin = types.ExternalFunction("ndm_region_unpin", types.void(_DATA))

_budget = types.int32(_HANDLE, types.int64, types.uint64)
_reserve = types.ExternalFunction("ndm_g_reserve", _budget)
_release = types.ExternalFunction("ndm_g_release", _budget)
_charge = types.ExternalFunction("ndm_g_charge", _budget)
_pressure = types.ExternalFunction("ndm_g_pressure", types.int32(_HANDLE, types.int64))
_allocated = types.ExternalFunction("ndm_g_allocated", types.int64(_HANDLE, types.int64))

_ERR_MEMORY = lib.NDM_ERR_MEMORY
_BYTES = types.Array(types.uint8, 1, "C", readonly=True)


def check(status: int) -> int:
    """Return `status`, or raise what it stands for if it is negative. Not for compiled code.

    To be called on the thread of the call that gave the status, before the next failure there.
    """
    if status < 0:
        raise_status(status)
    return status


# The bodies below run where numba is switched off (NUMBA_DISABLE_JIT), and for calls from plain Python.


def write(handle: int, data: Any, engine: int) -> int:
    """Copy the bytes of a C-contiguous array into a new slot; returns its number."""
    return int(lib.ndm_h_write(handle, ffi.from_buffer("uint8_t[]", data), data.nbytes, engine))


def read_into(handle: int, slot: int, out: Any) -> int:
    """Copy a value to the start of a writable C-contiguous array; returns the value's bytes.

    If that is more than the array holds, nothing is copied: the number is the room that is needed.
    """
    return int(lib.ndm_h_read_into(handle, slot, ffi.from_buffer("uint8_t[]", out, True), out.nbytes))


def size(handle: int, slot: int) -> int:
    """Return the bytes of the value in a live slot."""
    return int(lib.ndm_h_size(handle, slot))


def free(handle: int, slot: int) -> int:
    """Free a slot; returns 0."""
    return int(lib.ndm_h_free(handle, slot))


def contains(handle: int, slot: int) -> int:
    """Return 1 if the slot is live, 0 if not."""
    return int(lib.ndm_h_contains(handle, slot))


def pin(handle: int, slot: int) -> tuple[int, Any]:
    """View a value in place: its bytes, or a negative status, and a read-only array of uint8 that shows it.

    The array is good until it, not a part of it, is given to `unpin`; it does not keep itself alive. Use
    ``array.view(dtype)`` for other types.
    """
    length = int(lib.ndm_h_size(handle, slot))
    if length < 0:
        return length, np.empty(0, np.uint8)
    address = lib.ndm_h_pin(handle, slot, ffi.NULL)
    if not address:
        return int(lib.ndm_last_error().status), np.empty(0, np.uint8)
    data = np.frombuffer(ffi.buffer(address, length), np.uint8)
    data.flags.writeable = False
    return length, data


def unpin(data: Any) -> None:
    """End a pin, given the array that `pin` returned."""
    lib.ndm_region_unpin(ffi.cast("uint8_t *", data.ctypes.data))


def reserve(handle: int, engine: int, size: int) -> int:
    """Reserve bytes for an engine; returns 0. No reclaimer is asked, and nothing waits."""
    return int(lib.ndm_g_reserve(handle, engine, size))


def release(handle: int, engine: int, size: int) -> int:
    """Give reserved bytes back; returns 0."""
    return int(lib.ndm_g_release(handle, engine, size))


def charge(handle: int, engine: int, size: int) -> int:
    """Count bytes that are taken already; returns 0."""
    return int(lib.ndm_g_charge(handle, engine, size))


def pressure(handle: int, engine: int) -> int:
    """Return the level of an engine's pressure, or with -1 that of all: 0 to 3."""
    return int(lib.ndm_g_pressure(handle, engine))


def allocated(handle: int, engine: int) -> int:
    """Return the bytes that an engine, or with -1 all, have reserved."""
    return int(lib.ndm_g_allocated(handle, engine))


def _need_array(array: Any, *, writable: bool = False) -> None:
    if not isinstance(array, types.Array) or array.layout != "C":
        raise TypingError(f"a C-contiguous array is needed, not {array}")
    if writable and not array.mutable:
        raise TypingError("the array is read-only")


@intrinsic
def _pointer(_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.uintp), generate


@intrinsic
def _read_only(_context: Any, array: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return impl_ret_borrowed(context, builder, signature.return_type, arguments[0])

    return _BYTES(array), generate


@overload(write, strict=False)
def _compile_write(handle: Any, data: Any, engine: Any) -> Any:
    _need_array(data)
    return lambda handle, data, engine: _write(handle, data.ctypes, data.nbytes, engine)


@overload(read_into, strict=False)
def _compile_read_into(handle: Any, slot: Any, out: Any) -> Any:
    _need_array(out, writable=True)
    return lambda handle, slot, out: _read_into(handle, slot, out.ctypes, out.nbytes)


@overload(size, strict=False)
def _compile_size(handle: Any, slot: Any) -> Any:
    return lambda handle, slot: _size(handle, slot)


@overload(free, strict=False)
def _compile_free(handle: Any, slot: Any) -> Any:
    return lambda handle, slot: np.int64(_free(handle, slot))


@overload(contains, strict=False)
def _compile_contains(handle: Any, slot: Any) -> Any:
    return lambda handle, slot: np.int64(_contains(handle, slot))


@overload(pin, strict=False)
def _compile_pin(handle: Any, slot: Any) -> Any:
    def implementation(handle: Any, slot: Any) -> Any:
        length = _size(handle, slot)
        if length >= 0:
            address = _pin(handle, slot, 0)
            if address != 0:
                return length, _read_only(carray(_pointer(address), length, np.uint8))
            length = np.int64(_ERR_MEMORY)
        return length, _read_only(np.empty(0, np.uint8))

    return implementation


@overload(unpin, strict=False)
def _compile_unpin(data: Any) -> Any:
    _need_array(data)
    return lambda data: _unpin(data.ctypes)


@overload(reserve, strict=False)
def _compile_reserve(handle: Any, engine: Any, size: Any) -> Any:
    return lambda handle, engine, size: np.int64(_reserve(handle, engine, size))


@overload(release, strict=False)
def _compile_release(handle: Any, engine: Any, size: Any) -> Any:
    return lambda handle, engine, size: np.int64(_release(handle, engine, size))


@overload(charge, strict=False)
def _compile_charge(handle: Any, engine: Any, size: Any) -> Any:
    return lambda handle, engine, size: np.int64(_charge(handle, engine, size))


@overload(pressure, strict=False)
def _compile_pressure(handle: Any, engine: Any) -> Any:
    return lambda handle, engine: np.int64(_pressure(handle, engine))


@overload(allocated, strict=False)
def _compile_allocated(handle: Any, engine: Any) -> Any:
    return lambda handle, engine: _allocated(handle, engine)
