"""Native code against an installed wheel: C, C++, CMake, pkg-config, Cython, numba; versions; exported symbols.

The wheel is built once and installed in an environment of its own, outside the tree. The programs are those of
examples/native.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

# One process runs them all: the wheel is built once.
pytestmark = [pytest.mark.system, pytest.mark.xdist_group("native")]

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "native"
RECORDS = 400
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Werror", "-O1"]
STANDARDS = {"c": ["gcc", "-std=c11"], "cpp": ["g++", "-std=c++17"]}
LEFT_OUT = shutil.ignore_patterns("*.so", "lib", "include", "__pycache__", "__init__.pxd")


def run(*command: object, cwd: Path, **environment: str) -> str:
    """Run a program that must succeed, with nothing of this build's environment; return its output."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("NODEDB_MEM_", "PYTHON", "LD_"))}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=keep | environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, f"{command}: status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Installed:
    """The environment with the wheel."""

    home: Path
    wheel: Path

    @property
    def python(self) -> Path:
        return self.home / "bin" / "python"

    @property
    def package(self) -> Path:
        return Path(run(self.python, "-c", "import nodedb_mem; print(nodedb_mem.__path__[0])", cwd=self.home).strip())

    @property
    def library(self) -> Path:
        (path,) = (self.package / "lib").glob("libnodedb_mem.so.[0-9]*")
        return path

    def config(self, *flags: str) -> list[str]:
        return shlex.split(run(self.home / "bin" / "nodedb-mem", "config", *flags, cwd=self.home))


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory, sanitized: bool) -> Installed:
    """Build the wheel and install it. Other packages come from the environment that runs the tests."""
    if sanitized:
        pytest.skip("native programs are linked against an ordinary build")
    pytest.importorskip("setuptools", "77", reason="the extra native-test is not installed")
    scratch = tmp_path_factory.mktemp("installed")
    tree, home = scratch / "tree", scratch / "venv"
    for folder in ("csrc", "native", "nodedb_mem"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=LEFT_OUT if folder == "nodedb_mem" else None)
    for name in ("LICENSE", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tree)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    run(*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", scratch, tree, cwd=scratch)
    (wheel,) = scratch.glob("*.whl")
    shutil.rmtree(tree)
    venv.create(home, symlinks=True)
    run(*pip, "--python", home, "install", *offline, wheel, cwd=scratch)
    (site,) = home.glob("lib/python3*/site-packages")
    # A .pth line adds a folder, not the .pth files in it: an editable nodedb_mem stays out.
    (site / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    found = Installed(home, wheel)
    assert found.package.is_relative_to(site)
    return found


def need(*tools: str) -> None:
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")


# ---- C and C++ ---------------------------------------------------------------------------------------------------


def read_while_it_runs(program: Path, installed: Installed, directory: Path) -> None:
    """Run a writer, and read its records in Python while it has the region open."""
    path = directory / "stream.spill"
    writer = subprocess.Popen([program, path, str(RECORDS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        reader = [installed.python, EXAMPLES / "read_stream.py", path, str(RECORDS)]
        done = subprocess.run(reader, stdin=writer.stdout, capture_output=True, text=True, timeout=60)
        total = sum(number * 37 % 5000 for number in range(RECORDS))
        assert done.stdout == f"{RECORDS} records, {total} bytes: all as written\n", done.stderr
        assert writer.poll() is None
        writer.communicate(timeout=60)
        assert writer.returncode == 0
    finally:
        writer.kill()
        writer.communicate()


def pkg_config(installed: Installed, *flags: str) -> list[str]:
    (folder,) = installed.config("--pkgconfigdir")
    return shlex.split(run("pkg-config", *flags, "nodedb_mem", cwd=installed.home, PKG_CONFIG_PATH=folder))


@pytest.mark.parametrize("language", STANDARDS)
def test_a_program_builds_with_pkg_config(installed: Installed, tmp_path: Path, language: str) -> None:
    need("pkg-config", STANDARDS[language][0])
    source, program = EXAMPLES / f"spill_stream.{language}", tmp_path / "program"
    flags = pkg_config(installed, "--cflags", "--libs")
    run(*STANDARDS[language], *WARNINGS, source, *flags, "-o", program, cwd=tmp_path)
    read_while_it_runs(program, installed, tmp_path)


@pytest.mark.parametrize("language", STANDARDS)
def test_a_program_builds_with_the_flags_of_config(installed: Installed, tmp_path: Path, language: str) -> None:
    need(STANDARDS[language][0])
    source, program = EXAMPLES / f"spill_stream.{language}", tmp_path / "program"
    flags = installed.config("--cflags", "--libs")
    run(*STANDARDS[language], *WARNINGS, source, *flags, "-o", program, cwd=tmp_path)
    read_while_it_runs(program, installed, tmp_path)


def test_a_static_program_needs_no_library(installed: Installed, tmp_path: Path) -> None:
    need("gcc", "readelf")
    program = tmp_path / "program"
    flags = installed.config("--cflags", "--libs", "--static")
    run("gcc", "-std=c11", *WARNINGS, EXAMPLES / "spill_stream.c", *flags, "-o", program, cwd=tmp_path)
    assert "libnodedb_mem" not in run("readelf", "-d", program, cwd=tmp_path)
    read_while_it_runs(program, installed, tmp_path)


def test_programs_build_with_cmake(installed: Installed, tmp_path: Path) -> None:
    need("cmake", "g++", "gcc", "make")
    (folder,) = installed.config("--cmakedir")
    build = ["-B", tmp_path, f"-Dnodedb_mem_DIR={folder}", "-G", "Unix Makefiles"]
    run("cmake", "-S", EXAMPLES, *build, cwd=tmp_path)
    run("cmake", "--build", tmp_path, cwd=tmp_path)
    for number, name in enumerate(("spill_stream_c", "spill_stream_cpp", "spill_stream_static")):
        directory = tmp_path / f"run{number}"
        directory.mkdir()
        read_while_it_runs(tmp_path / name, installed, directory)


def test_cmake_finds_a_moved_package_and_refuses_a_newer_version(installed: Installed, tmp_path: Path) -> None:
    need("cmake", "gcc")
    moved = tmp_path / "moved to"
    shutil.copytree(installed.package, moved)
    project = tmp_path / "project"
    project.mkdir()
    lists = project / "CMakeLists.txt"
    text = "cmake_minimum_required(VERSION 3.18)\nproject(p C)\nfind_package(nodedb_mem {} QUIET)\n"
    text += 'message("found=${{nodedb_mem_FOUND}}")\n'
    text += "if(nodedb_mem_FOUND)\nget_target_property(at nodedb_mem::nodedb_mem IMPORTED_LOCATION)\n"
    text += 'message("at=${{at}}")\nendif()\n'
    for version, answer in (("", f"found=1\nat={moved}/lib/"), ("99", "found=0\n")):
        lists.write_text(text.format(version))
        build = ["-B", tmp_path / f"build{version}", f"-DCMAKE_PREFIX_PATH={moved}"]
        done = subprocess.run(["cmake", "-S", project, *build], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and answer in done.stderr, done.stdout + done.stderr


# ---- Cython and numba --------------------------------------------------------------------------------------------

CYTHON_SCRIPT = """
import sys
import numpy as np
import nodedb_mem, pipeline
from nodedb_mem import InvalidSlotError, OverflowRegion, RegionClosedError

rows = np.random.default_rng(3).random((500, 33))
slots = np.empty(len(rows), np.int64)
with OverflowRegion.temporary(sys.argv[1]) as region:
    handle = region.handle
    pipeline.spill_rows(handle, rows, 5, slots)
    for row, slot in zip(rows, slots):
        assert np.array_equal(np.frombuffer(region.read(int(slot))), row)
        assert np.isclose(pipeline.sum_row(handle, slot), row.sum())
    assert region.slot(0).engine == 5
    region.free(7)
    try:
        pipeline.sum_row(handle, 7)
    except InvalidSlotError:
        pass
    else:
        sys.exit("a freed slot was read")
try:
    pipeline.spill_rows(handle, rows, 5, slots)
except RegionClosedError:
    pass
else:
    sys.exit("a closed region was written to")
with open("/proc/self/maps") as maps:
    cores = {line.split()[-1] for line in maps if "libnodedb_mem" in line}
assert len(cores) == 1, cores
"""


def test_a_cython_extension_cimports_the_package(installed: Installed, tmp_path: Path) -> None:
    pytest.importorskip("Cython", reason="the extra native-test is not installed")
    for name in ("pipeline.pyx", "setup.py"):
        shutil.copy(EXAMPLES / "cython" / name, tmp_path)
    run(installed.python, "setup.py", "-q", "build_ext", "--inplace", cwd=tmp_path, CFLAGS="-O0")
    run(installed.python, "-c", CYTHON_SCRIPT, tmp_path, cwd=tmp_path)


def test_a_module_without_an_rpath_finds_the_loaded_core(installed: Installed, tmp_path: Path) -> None:
    pytest.importorskip("Cython", reason="the extra native-test is not installed")
    shutil.copy(EXAMPLES / "cython" / "pipeline.pyx", tmp_path)
    setup = (EXAMPLES / "cython" / "setup.py").read_text()
    without = re.sub(r"\n *runtime_library_dirs=.*", "", setup)
    assert without != setup
    (tmp_path / "setup.py").write_text(without)
    run(installed.python, "setup.py", "-q", "build_ext", "--inplace", cwd=tmp_path, CFLAGS="-O0")
    run(installed.python, "-c", CYTHON_SCRIPT, tmp_path, cwd=tmp_path)


def test_a_numba_loop_agrees_with_python(installed: Installed, tmp_path: Path) -> None:
    pytest.importorskip("numba", reason="the extra native-test is not installed")
    printed = run(installed.python, EXAMPLES / "numba_loop.py", tmp_path, cwd=tmp_path)
    assert printed == "1000 rows: all as written\n"


NUMBA_SCRIPT = """
import sys, threading
import numba
import numpy as np
from numba.core.errors import TypingError
from nodedb_mem import InvalidSlotError, OverflowRegion, RegionClosedError, WrongThreadError
from nodedb_mem import numba as spill

@numba.njit(nogil=True)
def all_verbs(handle, value, out):
    slot = spill.write(handle, value, 9)
    if slot < 0:
        return slot
    if spill.size(handle, slot) != value.nbytes or spill.contains(handle, slot) != 1:
        return -100
    if spill.read_into(handle, slot, out[:1]) != value.nbytes or spill.read_into(handle, slot, out) != value.nbytes:
        return -101
    size, data = spill.pin(handle, slot)
    if size != value.nbytes or spill.free(handle, slot) != 0 or spill.contains(handle, slot) != 0:
        return -102
    equal = np.all(data.view(np.int32) == value)
    spill.unpin(data)
    if not equal or spill.size(handle, slot) != -3:
        return -103
    size, data = spill.pin(handle, slot)
    return 0 if size == -3 and len(data) == 0 else -104

@numba.njit
def write_column(handle, values):
    return spill.write(handle, values[:, 0], 0)

@numba.njit
def scribble(handle):
    size, data = spill.pin(handle, 0)
    data[0] = 1

value, out = np.arange(1000, dtype=np.int32), np.zeros(1000, np.int32)
region = OverflowRegion.temporary(sys.argv[1])
handle = region.handle
assert all_verbs(handle, value, out) == 0
assert np.array_equal(out, value) and len(region) == 0

for wrong in (lambda: write_column(handle, np.zeros((3, 3))), lambda: scribble(handle)):
    try:
        wrong()
    except TypingError:
        continue
    sys.exit("should not compile")

@numba.njit
def free(handle, slot):
    return spill.free(handle, slot)

slots = [region.write(value, 0) for _ in range(5)]
assert spill.check(free(handle, slots[3])) == 0
try:
    spill.check(free(handle, slots[3]))
    sys.exit("freed twice")
except InvalidSlotError as error:
    assert error.slot == slots[3] and f"slot {slots[3]} has been freed" == str(error), error
region.free_many([slots[0], slots[1], slots[2], slots[4]])

statuses = []
thread = threading.Thread(target=lambda: statuses.append(all_verbs(handle, value, out)))
thread.start()
thread.join()
assert statuses == [-5]
region.close()
del region
try:
    spill.check(all_verbs(handle, value, out))
except RegionClosedError:
    print("closed")
"""


@pytest.mark.parametrize("jit", ["0", "1"], ids=["compiled", "plain"])
def test_numba_functions_report_what_python_raises(installed: Installed, tmp_path: Path, jit: str) -> None:
    pytest.importorskip("numba", reason="the extra native-test is not installed")
    script = NUMBA_SCRIPT
    if jit == "1":  # nothing is compiled, so nothing fails to compile
        script = re.sub(r"for wrong in .*?\n\n", "", script, flags=re.DOTALL)
    assert run(installed.python, "-c", script, tmp_path, cwd=tmp_path, NUMBA_DISABLE_JIT=jit) == "closed\n"


# ---- what the wheel holds ----------------------------------------------------------------------------------------


def exported(path: Path, cwd: Path) -> set[str]:
    return {line.split()[-1] for line in run("nm", "-D", "--defined-only", path, cwd=cwd).splitlines()}


def test_only_the_functions_of_the_header_are_exported(installed: Installed, tmp_path: Path) -> None:
    need("nm")
    headers = [path.read_text() for path in sorted((installed.package / "include").iterdir())]
    header = re.sub(r"/\*.*?\*/", "", "".join(headers), flags=re.DOTALL)
    declared = set(re.findall(r"\b(ndm_\w+)\(", header.split("#define NDM_CHECK_ABI", 1)[1].split("\n", 1)[1]))
    assert exported(installed.library, tmp_path) == declared
    (extension,) = installed.package.glob("_core.*.so")
    assert exported(extension, tmp_path) == {"PyInit__core"}


def test_the_extension_module_uses_the_library_beside_it(installed: Installed, tmp_path: Path) -> None:
    need("readelf")
    (extension,) = installed.package.glob("_core.*.so")
    needs = run("readelf", "-d", extension, cwd=tmp_path)
    assert f"[{installed.library.name}]" in needs and "runpath: [$ORIGIN/lib]" in needs
    library = run("readelf", "-d", installed.library, cwd=tmp_path)
    assert f"soname: [{installed.library.name}]" in library and "runpath" not in library


def test_the_wheel_holds_what_native_users_need(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as wheel:
        names = {name.removeprefix("nodedb_mem/") for name in wheel.namelist()}
    assert {
        "include/nodedb_mem.h",
        "include/nodedb_mem_governor.h",
        f"lib/{installed.library.name}",
        "lib/libnodedb_mem.so",
        "lib/libnodedb_mem.a",
        "lib/pkgconfig/nodedb_mem.pc",
        "lib/cmake/nodedb_mem/nodedb_mem-config.cmake",
        "lib/cmake/nodedb_mem/nodedb_mem-config-version.cmake",
        "__init__.pxd",
    } <= names


# ---- versions ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def other_abi(installed: Installed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a library under the same name whose header says ABI 77."""
    need("gcc")
    scratch = tmp_path_factory.mktemp("other")
    shutil.copytree(ROOT / "csrc", scratch / "csrc")
    header = scratch / "csrc" / "nodedb_mem.h"
    text = re.sub(r"(#define NDM_ABI_VERSION) \d+", r"\1 77", header.read_text())
    header.write_text(re.sub(r'(#define NDM_VERSION) ".*"', r'\1 "9.8.7"', text))
    name = installed.library.name
    flags = ["-std=c11", "-shared", "-fPIC", "-pthread", "-fvisibility=hidden", f"-Wl,-soname,{name}"]
    sources = [path for path in (scratch / "csrc").rglob("*.c") if path.parent.name != "python"]
    run("gcc", *flags, f"-I{scratch / 'csrc'}", *sources, "-o", scratch / name, cwd=scratch)
    return scratch


def failing(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stderr


def test_python_refuses_a_library_of_another_abi(installed: Installed, other_abi: Path, tmp_path: Path) -> None:
    said = failing(installed.python, "-c", "import nodedb_mem", cwd=tmp_path, LD_LIBRARY_PATH=str(other_abi))
    last = said.rstrip().splitlines()[-1]
    assert last.startswith("ImportError: the C core in this process is not the one that nodedb_mem was built for: ")
    assert f"{other_abi / installed.library.name} has ABI 77 and version 9.8.7, needed are ABI " in last


def test_python_refuses_a_library_that_lacks_functions(installed: Installed, tmp_path: Path) -> None:
    need("gcc")
    (tmp_path / "empty.c").write_text("const char *ndm_version(void) { return 0; }\n")
    run("gcc", "-shared", "-fPIC", "empty.c", "-o", installed.library.name, cwd=tmp_path)
    said = failing(installed.python, "-c", "import nodedb_mem", cwd=tmp_path, LD_LIBRARY_PATH=str(tmp_path))
    assert "ImportError: the C core in this process is not the one" in said and "undefined symbol: ndm_" in said


def test_a_program_refuses_a_library_of_another_abi(installed: Installed, other_abi: Path, tmp_path: Path) -> None:
    program = tmp_path / "program"
    flags = installed.config("--cflags", "--libs")
    run("gcc", "-std=c11", EXAMPLES / "spill_stream.c", *flags, "-o", program, cwd=tmp_path)
    said = failing(program, tmp_path / "region", "1", cwd=tmp_path, LD_LIBRARY_PATH=str(other_abi))
    assert said == "spill_stream: wrong library: libnodedb_mem has another ABI than the header of the caller\n"
    assert not (tmp_path / "region").exists()
