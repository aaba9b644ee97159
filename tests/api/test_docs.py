"""README.md and docs/: links lead somewhere, and native examples compile. The root's conftest.py runs Python blocks."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import nodedb_mem

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def test_the_pages_are_found() -> None:
    names = {page.stem for page in PAGES}
    assert names >= {"README", "guide", "readers", "native", "performance", "limits"}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    relative = [target for target in targets if "://" not in target]
    assert [target for target in relative if not (page.parent / target).exists()] == []
    if page.stem == "README":
        assert {f"docs/{other.name}" for other in PAGES[1:]} <= set(relative)


def test_no_c_or_cython_block_stands_where_nobody_compiles_it() -> None:
    found = {
        (page.stem, language)
        for page in PAGES
        for language in ("c", "cython", r"c\+\+", "cpp")
        if _blocks(page, language)
    }
    assert found == {("native", "c"), ("native", "cython")}


def test_the_c_program_compiles_and_runs(tmp_path: Path, sanitized: bool) -> None:
    if sanitized:
        pytest.skip("native programs are linked against an ordinary build")
    (program,) = _blocks(ROOT / "docs/native.md", "c")
    (tmp_path / "app.c").write_text(program)
    (libraries,) = nodedb_mem.get_library_dirs()
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{nodedb_mem.get_include()}"]
    link = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", *(f"-l{name}" for name in nodedb_mem.get_libraries())]
    subprocess.run(["gcc", *flags, "app.c", *link, "-o", "app"], cwd=tmp_path, check=True)
    subprocess.run([tmp_path / "app"], cwd=tmp_path, check=True)


def test_the_cython_example_compiles(tmp_path: Path) -> None:
    pytest.importorskip("Cython", reason="the extra native-test is not installed")
    (module,) = _blocks(ROOT / "docs/native.md", "cython")
    (tmp_path / "mine.pyx").write_text(module)
    home = Path(nodedb_mem.__file__).parents[1]
    subprocess.run([sys.executable, "-m", "cython", "-3", "-I", home, "mine.pyx"], cwd=tmp_path, check=True)
    assert "ndm_h_write" in (tmp_path / "mine.c").read_text()
