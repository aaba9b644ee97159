"""Build script of the extension module ``nodedb_mem._core``.

setup.py runs this file by its path, before the package can be imported. Everything is read from the public
header: the declarations for cffi (its marked block) and the version.

Environment variables, for developers; a release build sets none:

``NODEDB_MEM_SANITIZE=address,undefined``
    Build with these sanitizers; any finding ends the process. Assertions are on.
``NODEDB_MEM_DEBUG=1``
    Debug symbols, assertions, and ``NDM_DEBUG`` defined.
``NODEDB_MEM_WERROR=1``
    ``-Wall -Wextra -Werror``.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import sysconfig
from pathlib import Path

from cffi import FFI

# Relative to the project's folder, where setuptools runs: it refuses absolute source names.
_CSRC = Path("csrc")
_HEADER = Path(__file__).resolve().parent.parent / _CSRC / "nodedb_mem.h"

#: Oldest CPython whose limited API the module is built for, as in the wheel tag.
ABI3_TAG = "cp311"
_ABI3_HEX = "0x030B0000"


def version() -> str:
    """Return the version in the header (``NDM_VERSION``)."""
    text = _HEADER.read_text(encoding="utf-8")
    found = re.search(r'^#define\s+NDM_VERSION\s+"([^"]+)"', text, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"no NDM_VERSION in {_HEADER}")
    return found[1]


def uses_limited_api() -> bool:
    """Tell whether this interpreter can build the abi3 module: no PyPy, free-threaded or debug build can."""
    return (
        platform.python_implementation() == "CPython"
        and not sysconfig.get_config_var("Py_GIL_DISABLED")
        and not hasattr(sys, "gettotalrefcount")
    )


def _declarations() -> str:
    """Return the header's marked block, without the lines that hold the marks."""
    lines = _HEADER.read_text(encoding="utf-8").splitlines()
    first = [number for number, line in enumerate(lines) if "[cdef:" in line]
    last = [number for number, line in enumerate(lines) if "[/cdef]" in line]
    if len(first) != 1 or len(last) != 1 or first > last:
        raise RuntimeError(f"{_HEADER} needs one [cdef: line and one [/cdef] line after it")
    return "\n".join(lines[first[0] + 1 : last[0]])


def _is_on(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


def _compile_arguments() -> list[str]:
    # These follow the interpreter's own flags on the command line, so each has to undo what it contradicts.
    arguments = ["-std=c11", "-fvisibility=hidden", "-pthread"]
    sanitizers = os.environ.get("NODEDB_MEM_SANITIZE", "")
    if sanitizers or _is_on("NODEDB_MEM_DEBUG"):
        arguments += ["-O1", "-g", "-UNDEBUG", "-fno-omit-frame-pointer"]
    else:
        arguments += ["-O2", "-g0", "-DNDEBUG"]  # debug information would hold build paths
    if _is_on("NODEDB_MEM_DEBUG"):
        arguments.append("-DNDM_DEBUG")
    if sanitizers:
        # Python is built with -fwrapv, which would hide our overflows.
        arguments += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-fno-wrapv"]
    if _is_on("NODEDB_MEM_WERROR"):
        # cffi's own generated functions leave parameters unused.
        arguments += ["-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
    return arguments


def _link_arguments() -> list[str]:
    sanitizers = os.environ.get("NODEDB_MEM_SANITIZE", "")
    return ["-pthread", *([f"-fsanitize={sanitizers}"] if sanitizers else [])]


def make_ffi() -> FFI:
    """Return the cffi builder of ``nodedb_mem._core``."""
    limited = uses_limited_api()
    ffi = FFI()
    ffi.cdef(_declarations())
    ffi.cdef("static const char *const NDM_VERSION;")  # a macro, which C has no declaration for
    ffi.set_source(
        "nodedb_mem._core",
        '#include "nodedb_mem.h"',
        sources=sorted(path.as_posix() for path in _CSRC.glob("*.c")),
        depends=sorted(path.as_posix() for path in _CSRC.glob("*.h")),
        include_dirs=[_CSRC.as_posix()],
        define_macros=[("Py_LIMITED_API", _ABI3_HEX)] if limited else [],
        extra_compile_args=_compile_arguments(),
        extra_link_args=_link_arguments(),
        py_limited_api=limited,
    )
    return ffi
