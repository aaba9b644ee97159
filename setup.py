"""Build: the cffi extension, one abi3 wheel, and the C header inside the package."""

from __future__ import annotations

import gzip
import importlib.util
import os
import sys
import tarfile
from pathlib import Path
from types import ModuleType

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist
from setuptools.errors import PlatformError

BUILD_SCRIPT = "nodedb_mem/_build.py"
HEADER = "csrc/nodedb_mem.h"


def load_build_script() -> ModuleType:
    """Run the build script by its path: the package itself cannot be imported before it is built."""
    spec = importlib.util.spec_from_file_location("_build", BUILD_SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildExtension(build_ext):
    """Compile on Linux only, and always: a left-over module may have been built with other flags."""

    def finalize_options(self) -> None:
        if not sys.platform.startswith("linux"):
            raise PlatformError(f"nodedb_mem builds on Linux only (this is {sys.platform})")
        super().finalize_options()
        self.force = True


class BuildPython(build_py):
    """Ship the C header as nodedb_mem/include/nodedb_mem.h."""

    def _shipped_header(self, root: str) -> str:
        return os.path.join(root, "nodedb_mem", "include", os.path.basename(HEADER))

    def run(self) -> None:
        super().run()
        target = self._shipped_header(os.curdir if self.editable_mode else self.build_lib)
        self.mkpath(os.path.dirname(target))
        self.copy_file(HEADER, target, preserve_mode=False)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), self._shipped_header(self.build_lib)]

    def get_output_mapping(self) -> dict[str, str]:
        return {**super().get_output_mapping(), self._shipped_header(self.build_lib): HEADER}


class SourceDistribution(sdist):
    """Where SOURCE_DATE_EPOCH is set, pack the same files into the same archive (wheels do it already)."""

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, owner=None, group=None):
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        if epoch is None or format != "gztar":
            return super().make_archive(base_name, format, root_dir, base_dir, owner, group)
        name = f"{base_name}.tar.gz"
        top = Path(root_dir or os.curdir)

        def normalize(member: tarfile.TarInfo) -> tarfile.TarInfo:
            member.mtime = int(epoch)
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            return member

        with (
            open(name, "wb") as raw,
            gzip.GzipFile("", "wb", mtime=int(epoch), fileobj=raw) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            # tarfile adds the entries of a folder in sorted order.
            archive.add(top / base_dir, arcname=base_dir, filter=normalize)
        return name


build = load_build_script()

setup(
    version=build.version(),
    cffi_modules=[f"{BUILD_SCRIPT}:make_ffi"],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPython, "sdist": SourceDistribution},
    options={"bdist_wheel": {"py_limited_api": build.ABI3_TAG}} if build.uses_limited_api() else {},
)
