"""What native code needs to build against this package: where the header and the libraries are.

Importing this module also makes sure that the C core in this process is one that the Python side was built for.
"""

from __future__ import annotations

import os
from typing import NoReturn

_HERE = os.path.dirname(os.path.abspath(__file__))


def get_include() -> str:
    """Return the folder of ``nodedb_mem.h``."""
    return os.path.join(_HERE, "include")


def get_library_dirs() -> list[str]:
    """Return the folders of the libraries, for the linker and, as rpath, for the loader.

    The shared library is the one that this package itself uses, so that a process has one core: a region opened in
    Python and used by native code has the same owner, pins and fork checks. A module that is loaded after
    ``import nodedb_mem`` finds it without an rpath.
    """
    return [os.path.join(_HERE, "lib")]


def get_libraries() -> list[str]:
    """Return the names of the libraries to link with."""
    return ["nodedb_mem"]


def get_cmake_dir() -> str:
    """Return the folder of ``nodedb_mem-config.cmake``, for ``nodedb_mem_DIR``."""
    return os.path.join(_HERE, "lib", "cmake", "nodedb_mem")


def get_pkgconfig_dir() -> str:
    """Return the folder of ``nodedb_mem.pc``, for ``PKG_CONFIG_PATH``."""
    return os.path.join(_HERE, "lib", "pkgconfig")


def _loaded_core() -> str:
    """Return the path of the shared library in this process, as the kernel has it."""
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            fields = line.rstrip("\n").split(maxsplit=5)
            if len(fields) == 6 and os.path.basename(fields[5]).startswith("libnodedb_mem.so."):
                return fields[5]
    return "libnodedb_mem"


def _refuse(found: str) -> NoReturn:
    raise ImportError(
        f"the C core in this process is not the one that nodedb_mem was built for: {found} "
        f"(another installation? LD_LIBRARY_PATH, LD_PRELOAD, or a program that had loaded its own before)",
        name="nodedb_mem",
        path=_loaded_core(),
    )


try:
    from nodedb_mem._core import ffi as _ffi
    from nodedb_mem._core import lib as _lib
except ImportError as _error:
    if "ndm_" not in str(_error):  # as in "undefined symbol: ndm_h_write"
        raise
    _refuse(str(_error))

if _lib.ndm_check_abi(_lib.NDM_ABI_VERSION, _lib.NDM_VERSION_NUMBER) < 0:
    _refuse(
        f"{_loaded_core()} has ABI {_lib.ndm_abi_version()} and version {_ffi.string(_lib.ndm_version()).decode()}, "
        f"needed are ABI {_lib.NDM_ABI_VERSION} and version {_ffi.string(_lib.NDM_VERSION).decode()} or newer"
    )
