"""What native code gets of the package under test: flags that link, and the check of the ABI. More in tests/system."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import nodedb_mem
from kit import environment

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "examples" / "native" / "spill_stream.c"

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")


@pytest.fixture(autouse=True)
def ordinary(sanitized: bool) -> None:
    if sanitized:
        pytest.skip("native programs are linked against an ordinary build")


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """The example, built as the README says."""
    flags = [sys.executable, "-m", "nodedb_mem", "config", "--cflags", "--libs"]
    found = subprocess.run(flags, env=environment(), capture_output=True, text=True, check=True).stdout.split()
    subprocess.run(["gcc", "-std=c11", str(SOURCE), *found, "-o", str(tmp_path / "program")], check=True)
    return tmp_path / "program"


@pytest.fixture
def other_abi(tmp_path: Path) -> Path:
    """A folder with the core under its name, but with ABI 77."""
    (folder,) = map(Path, nodedb_mem.get_library_dirs())
    (library,) = folder.glob("libnodedb_mem.so.[0-9]*")
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    header = tmp_path / "csrc" / "nodedb_mem.h"
    header.write_text(re.sub(r"(#define NDM_ABI_VERSION) \d+", r"\1 77", header.read_text()))
    sources = [path for path in (tmp_path / "csrc").rglob("*.c") if path.parent.name != "python"]
    flags = ["-std=c11", "-shared", "-fPIC", "-pthread", f"-Wl,-soname,{library.name}", f"-I{tmp_path / 'csrc'}"]
    subprocess.run(["gcc", *flags, *map(str, sources), "-o", str(tmp_path / library.name)], check=True)
    return tmp_path


def test_a_program_links_with_the_flags_of_config(program: Path, tmp_path: Path) -> None:
    done = subprocess.run([program, tmp_path / "region", "5"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "region.slots").is_file()


def test_a_core_of_another_abi_is_refused(program: Path, other_abi: Path, tmp_path: Path) -> None:
    other = environment() | {"LD_LIBRARY_PATH": str(other_abi)}
    native = subprocess.run([program, tmp_path / "region", "1"], env=other, capture_output=True, text=True)
    assert native.returncode == 1
    assert "libnodedb_mem has another ABI than the header of the caller" in native.stderr
    assert not (tmp_path / "region").exists()
    python = subprocess.run([sys.executable, "-c", "import nodedb_mem"], env=other, capture_output=True, text=True)
    assert python.returncode == 1
    assert "ImportError: the C core in this process is not the one that nodedb_mem was built for: " in python.stderr
    assert "has ABI 77 and version" in python.stderr


UNLOAD = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <nodedb_mem.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

static void *library;
static const char *folder;
static pthread_barrier_t owned, unloaded;

static void *own(void *unused)
{
    ndm_region *(*open_region)(const char *, const ndm_options *) = dlsym(library, "ndm_region_open_temporary");
    void (*destroy)(ndm_region *) = dlsym(library, "ndm_region_destroy");
    ndm_options options = {.initial_capacity = 1 << 20, .max_capacity = 1 << 20, .alignment = 64};
    ndm_region *region = open_region(folder, &options);
    if (!region)
        _exit(2);
    destroy(region);
    pthread_barrier_wait(&owned);
    pthread_barrier_wait(&unloaded);
    return unused; /* and ends */
}

int main(int count, char **arguments)
{
    pthread_t thread;
    folder = arguments[2];
    library = count == 3 ? dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL) : NULL;
    pthread_barrier_init(&owned, NULL, 2);
    pthread_barrier_init(&unloaded, NULL, 2);
    if (!library || pthread_create(&thread, NULL, own, NULL) != 0)
        return 3;
    pthread_barrier_wait(&owned);
    dlclose(library);
    pthread_barrier_wait(&unloaded);
    pthread_join(thread, NULL);
    if (fork() == 0) /* no handler of what is gone is called */
        _exit(0);
    return 0;
}
"""


@pytest.mark.parametrize("kind", ["shared", "static in a plugin"])
def test_a_thread_that_owned_a_region_ends_after_dlclose(tmp_path: Path, kind: str) -> None:
    (folder,) = map(Path, nodedb_mem.get_library_dirs())
    (library,) = folder.glob("libnodedb_mem.so.[0-9]*")
    if kind != "shared":
        library = tmp_path / "plugin.so"
        archive = ["-Wl,--whole-archive", str(folder / "libnodedb_mem.a"), "-Wl,--no-whole-archive"]
        subprocess.run(["gcc", "-shared", "-fPIC", "-pthread", *archive, "-o", str(library)], check=True)
    source, program = tmp_path / "unload.c", tmp_path / "unload"
    source.write_text(UNLOAD)
    header = f"-I{nodedb_mem.get_include()}"
    subprocess.run(["gcc", "-pthread", header, str(source), "-ldl", "-o", str(program)], check=True)
    assert subprocess.run([program, library, tmp_path]).returncode == 0
