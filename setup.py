"""Build: the C libraries, the two extensions on them, what linkers need inside the package, one abi3 wheel."""

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

BUILD_SCRIPT = "native/build.py"
PACKAGE = "nodedb_mem"


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

    def build_extensions(self) -> None:
        folder = Path(self.build_lib, PACKAGE, "lib")
        folder.mkdir(parents=True, exist_ok=True)
        self.compiler.linker_so = build.without_rpath(self.compiler.linker_so)
        shared = build.make_core(self.compiler, Path(self.build_temp), folder)
        for extension in self.extensions:
            extension.extra_objects = [str(shared)]
        super().build_extensions()

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        self.mkpath(os.path.join(PACKAGE, "lib"))
        for built, source in self._libraries().items():
            self.copy_file(built, source)

    def _libraries(self) -> dict[str, str]:
        names = [os.path.join(PACKAGE, "lib", name) for name in (build.soname(), "libnodedb_mem.a")]
        return {os.path.join(self.build_lib, name): name for name in names}

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), *self._libraries()]

    def get_output_mapping(self) -> dict[str, str]:
        return {**super().get_output_mapping(), **(self._libraries() if self.inplace else {})}


class BuildPython(build_py):
    """Ship the header, and what pkg-config, CMake, Cython and linkers look for."""

    def run(self) -> None:
        super().run()
        root = os.curdir if self.editable_mode else self.build_lib
        for name, text in build.native_files().items():
            target = Path(root, PACKAGE, name)
            self.mkpath(str(target.parent))
            target.write_text(text, encoding="utf-8")

    def _native_files(self) -> list[str]:
        return [os.path.join(self.build_lib, PACKAGE, name) for name in build.native_files()]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *self._native_files()]

    def get_output_mapping(self) -> dict[str, str]:
        made = {path: os.path.relpath(path, self.build_lib) for path in self._native_files()}
        return {**super().get_output_mapping(), **made}


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
    ext_modules=[build.make_objects()],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPython, "sdist": SourceDistribution},
    options={"bdist_wheel": {"py_limited_api": build.ABI3_TAG}} if build.uses_limited_api() else {},
)
