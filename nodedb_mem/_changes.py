"""Whether bytes have changed: by the pages of a private mapping, or by comparing them."""

from __future__ import annotations

import ctypes
import os
from fcntl import ioctl
from struct import Struct
from typing import TYPE_CHECKING

from nodedb_mem._core import ffi

if TYPE_CHECKING:
    from typing_extensions import Buffer

_PAGE = os.sysconf("SC_PAGE_SIZE")

# From linux/fs.h: struct pm_scan_arg, and which pages are wanted.
_SCAN = 0xC0606610
_ARGUMENT = Struct("12Q")
_IS_FILE, _IS_PRESENT, _IS_SWAPPED = 1 << 2, 1 << 3, 1 << 4
_REGION_WORDS = 3

# Of an entry of /proc/self/pagemap, which older kernels have, too.
_ENTRY = 8
_PRESENT, _SWAPPED, _FILE = 1 << 63, 1 << 62, 1 << 61
_ENTRIES_AT_ONCE = 8192

_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t


def address_of(buffer: Buffer) -> int:
    """Where a buffer lies."""
    return int(ffi.cast("uintptr_t", ffi.from_buffer(buffer)))


def is_same(one: Buffer, other: Buffer, size: int) -> bool:
    """Whether the first `size` bytes of two buffers are equal."""
    return size == 0 or not _memcmp(address_of(one), address_of(other), size)


class PageMap:
    """Tells which pages of private mappings of a file were stored to: the kernel has given these pages a copy.

    It looks into the process that made it. `close` it in the end.
    """

    def __init__(self) -> None:
        self._found = (ctypes.c_uint64 * _REGION_WORDS)()
        self._scans = True
        try:
            self._file = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._file = -1

    def close(self) -> None:
        """Let go of the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def has_changed(self, address: int, size: int) -> bool:
        """Tell whether a page of the range was stored to. True where the kernel does not say."""
        first = address - address % _PAGE
        end = -(-(address + size) // _PAGE) * _PAGE
        if self._file < 0:
            return True
        if self._scans:
            try:
                return self._scan(first, end)
            except OSError:  # before Linux 6.7
                self._scans = False
        try:
            return self._look(first, end)
        except OSError:
            return True

    def _scan(self, first: int, end: int) -> bool:
        """Ask for one page that is in RAM or swap, and is not the file's."""
        where = ctypes.addressof(self._found)
        anyone = _IS_PRESENT | _IS_SWAPPED
        argument = _ARGUMENT.pack(_ARGUMENT.size, 0, first, end, 0, where, 1, 1, _IS_FILE, _IS_FILE, anyone, _IS_FILE)
        return bool(ioctl(self._file, _SCAN, bytearray(argument)) > 0)

    def _look(self, first: int, end: int) -> bool:
        for page in range(first // _PAGE, end // _PAGE, _ENTRIES_AT_ONCE):
            count = min(_ENTRIES_AT_ONCE, end // _PAGE - page)
            entries = os.pread(self._file, count * _ENTRY, page * _ENTRY)
            if len(entries) < count * _ENTRY:
                return True
            for entry in memoryview(entries).cast("Q"):
                if entry & (_PRESENT | _SWAPPED) and not entry & _FILE:
                    return True
        return False
