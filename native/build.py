"""Build script of the C core: ``libnodedb_mem``, the extension modules on it, what linkers need.

setup.py runs this file by its path, before the package can be imported. Everything is read from the public
header: the declarations for cffi and Cython (its marked block) and the versions.

The core is compiled once. ``nodedb_mem/lib`` gets it as ``libnodedb_mem.so.N`` (N is the ABI version) and as
``libnodedb_mem.a``; the extension modules link against the shared one, so that a process has one core, whoever uses it.

Environment variables, for developers; a release build sets none:

``NODEDB_MEM_SANITIZE=address,undefined``
    Build with these sanitizers; any finding ends the process. Assertions are on.
``NODEDB_MEM_DEBUG=1``
    Debug symbols and assertions. The code knows no other debug mode.
``NODEDB_MEM_WERROR=1``
    ``-Wall -Wextra -Werror``.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import sys
import sysconfig
from pathlib import Path
from typing import Any

from cffi import FFI
from setuptools import Extension

# Relative to the project's folder, where setuptools runs: it refuses absolute source names.
_CSRC = Path("csrc")
_NATIVE = Path("native")
_CONTROL = Path(__file__).resolve().parent.parent / _CSRC / "python" / "control.h"
_HEADER = Path(__file__).resolve().parent.parent / _CSRC / "nodedb_mem.h"
_HEADERS = (_HEADER, _HEADER.with_name("nodedb_mem_governor.h"))

#: Oldest CPython whose limited API the module is built for, as in the wheel tag.
ABI3_TAG = "cp311"
_ABI3_HEX = "0x030B0000"


def version() -> str:
    """Return the version in the header (``NDM_VERSION``)."""
    text = _macro("NDM_VERSION").strip('"')
    number = 0
    for part in text.split("."):
        number = number * 100 + int(part)
    if number != int(_macro("NDM_VERSION_NUMBER")):
        raise RuntimeError("NDM_VERSION and NDM_VERSION_NUMBER differ")
    return text


def soname() -> str:
    """Return the name of the shared library, which tells its ABI version."""
    return f"libnodedb_mem.so.{_macro('NDM_ABI_VERSION')}"


def _macro(name: str) -> str:
    found = re.search(rf"^#define\s+{name}\s+(\S+)", _HEADER.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"no {name} in {_HEADER}")
    return found[1]


def uses_limited_api() -> bool:
    """Tell whether this interpreter can build the abi3 module: no PyPy, free-threaded or debug build can."""
    return (
        platform.python_implementation() == "CPython"
        and not sysconfig.get_config_var("Py_GIL_DISABLED")
        and not hasattr(sys, "gettotalrefcount")
    )


def _public() -> str:
    """Return the declarations of the public headers."""
    return "\n".join(map(_declarations, _HEADERS))


def _declarations(header: Path, mark: str = "cdef") -> str:
    """Return a header's marked block, without the lines that hold the marks."""
    lines = header.read_text(encoding="utf-8").splitlines()
    first = [number for number, line in enumerate(lines) if f"[{mark}:" in line]
    last = [number for number, line in enumerate(lines) if f"[/{mark}]" in line]
    if len(first) != 1 or len(last) != 1 or first > last:
        raise RuntimeError(f"{header} needs one [{mark}: line and one [/{mark}] line after it")
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
    if sanitizers:
        # Python is built with -fwrapv, which would hide our overflows.
        arguments += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-fno-wrapv"]
    if _is_on("NODEDB_MEM_WERROR"):
        # cffi's own generated functions leave parameters unused.
        arguments += ["-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
    return arguments


def _link_arguments() -> list[str]:
    sanitizers = os.environ.get("NODEDB_MEM_SANITIZE", "")
    # nodelete: a thread that owned a region runs code of the core when it ends, whoever has called dlclose() by then.
    return ["-pthread", "-Wl,-z,nodelete", *([f"-fsanitize={sanitizers}"] if sanitizers else [])]


def without_rpath(command: list[str]) -> list[str]:
    """Return a link command without the library paths that this interpreter's own build left in it."""
    inherited = (sysconfig.get_config_var("LDSHARED") or "").split()
    return [word for word in command if not (word.startswith("-Wl,-rpath") and word in inherited)]


def make_core(compiler: Any, temporary: Path, target: Path) -> Path:
    """Compile the core and make both libraries in the folder `target`; return the path of the shared one."""
    objects = compiler.compile(
        sorted(path.as_posix() for path in _CSRC.rglob("*.c") if path.parent.name != "python"),
        output_dir=str(temporary),
        include_dirs=[_CSRC.as_posix()],
        extra_postargs=[*_compile_arguments(), "-fno-semantic-interposition"],
    )
    shared, static = target / soname(), target / "libnodedb_mem.a"
    script = _NATIVE / "libnodedb_mem.map"
    link = [f"-Wl,-soname,{soname()}", f"-Wl,--version-script,{script}", "-Wl,-Bsymbolic-functions"]
    compiler.link_shared_object(objects, str(shared), extra_postargs=[*link, *_link_arguments()])
    static.unlink(missing_ok=True)
    archiver = os.environ.get("AR") or "ar"
    compiler.spawn([*archiver.split(), "rcsD", str(static), *objects])  # D: no dates, no owners
    return shared


def native_files() -> dict[str, str]:
    """Return what else native code needs, as text by path in the package."""
    values = {"@VERSION@": version(), "@ABI@": _macro("NDM_ABI_VERSION"), "@SONAME@": soname()}

    def filled(name: str) -> str:
        text = (_NATIVE / f"{name}.in").read_text(encoding="utf-8")
        for key, value in values.items():
            text = text.replace(key, value)
        return text

    spec = importlib.util.spec_from_file_location("_pxd", _NATIVE / "pxd.py")
    assert spec is not None
    assert spec.loader is not None
    translator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(translator)
    return {
        **{f"include/{header.name}": header.read_text(encoding="utf-8") for header in _HEADERS},
        "lib/libnodedb_mem.so": filled("libnodedb_mem.so"),
        "lib/pkgconfig/nodedb_mem.pc": filled("nodedb_mem.pc"),
        "lib/cmake/nodedb_mem/nodedb_mem-config.cmake": filled("nodedb_mem-config.cmake"),
        "lib/cmake/nodedb_mem/nodedb_mem-config-version.cmake": filled("nodedb_mem-config-version.cmake"),
        "__init__.pxd": translator.pxd(_public()),
    }


def _extension() -> dict[str, Any]:
    """How an extension module is compiled, whichever; setup.py links both with what `make_core` made."""
    limited = uses_limited_api()
    return {
        "depends": sorted(path.as_posix() for path in _CSRC.rglob("*.h")),
        "include_dirs": [_CSRC.as_posix()],
        "define_macros": [("Py_LIMITED_API", _ABI3_HEX)] if limited else [],
        "extra_compile_args": _compile_arguments(),
        "extra_link_args": _link_arguments(),
        "runtime_library_dirs": ["$ORIGIN/lib"],
        "py_limited_api": limited,
    }


def make_ffi() -> FFI:
    """Return the cffi builder of ``nodedb_mem._core``: declarations of the whole header, used for the control plane."""
    ffi = FFI()
    ffi.cdef(_public())
    # Macros, which C has no declaration for.
    ffi.cdef("static const char *const NDM_VERSION; static const int NDM_VERSION_NUMBER, NDM_ABI_VERSION;")
    ffi.cdef(_declarations(_CONTROL, "control"))
    ffi.set_source("nodedb_mem._core", '#include "python/control.h"', **_extension())
    return ffi


def make_objects() -> Extension:
    """Return ``nodedb_mem._memory``, the data plane: what a value's bytes or slot number pass through."""
    return Extension("nodedb_mem._memory", sorted(path.as_posix() for path in _CSRC.glob("python/*.c")), **_extension())
