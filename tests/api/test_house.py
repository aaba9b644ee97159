"""The house of the C core: files call downward only, and no two of them each other."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
BUILT = CSRC.parent / "build" / "native" / "csrc"  # by `make test-native`, which `make test` runs first
#: Each room may call those that stand before it in its row. Region and governor do not know each other.
ROOMS = ("os", "store", "region", "native", "python"), ("os", "governor", "native", "python")

Calls = dict[str, set[str]]

pytestmark = pytest.mark.xdist_group("house")  # the objects are made once


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Calls:
    """By file, the files that define what it uses."""
    if shutil.which("gcc") is None or shutil.which("nm") is None:
        pytest.skip("needs gcc and nm")
    folder = tmp_path_factory.mktemp("objects")
    sources = sorted(CSRC.glob("*/*.c"))
    last_change = max(path.stat().st_mtime for path in CSRC.rglob("*.[ch]"))
    flags = ["-std=c11", "-O0", f"-I{CSRC}", "-isystem", sysconfig.get_path("include")]
    for room in sorted({source.parent for source in sources}):
        own = [source for source in sources if source.parent == room]
        ready = [BUILT / room.name / f"{source.stem}.o" for source in own]
        if all(path.exists() and path.stat().st_mtime > last_change for path in ready):
            (folder / room.name).symlink_to(BUILT / room.name)
            continue
        (folder / room.name).mkdir()
        subprocess.run(["gcc", *flags, "-c", *own], cwd=folder / room.name, check=True)
    homes: dict[str, str] = {}
    wanted: dict[str, list[str]] = {}
    for source in sources:
        name = str(source.relative_to(CSRC))
        command = ["nm", "--extern-only", "--format=posix", folder / source.parent.name / f"{source.stem}.o"]
        wanted[name] = []
        for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
            symbol, kind = line.split()[:2]
            if kind == "U":
                wanted[name].append(symbol)
            else:
                assert homes.setdefault(symbol, name) == name
    return {name: {homes[symbol] for symbol in symbols if symbol in homes} for name, symbols in wanted.items()}


def circles(calls: Calls) -> Iterator[set[str]]:
    """Files that reach each other (Tarjan's strongly connected components of two files and more)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    path: list[str] = []

    def visit(name: str) -> Iterator[set[str]]:
        number[name] = low[name] = len(number)
        path.append(name)
        for other in sorted(calls[name]):
            if other not in number:
                yield from visit(other)
                low[name] = min(low[name], low[other])
            elif other in path:
                low[name] = min(low[name], number[other])
        if low[name] == number[name]:
            circle = set(path[path.index(name) :])
            del path[path.index(name) :]
            if len(circle) > 1:
                yield circle

    for name in calls:
        if name not in number:
            yield from visit(name)


def test_circles_are_found() -> None:
    assert list(circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a", "d"}})) == [{"b", "c"}]
    assert list(circles({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == [{"a", "b", "c"}]
    assert not list(circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}))


def test_no_file_calls_in_a_circle(calls: Calls) -> None:
    assert len(calls) > 60 and calls["region/write.c"]
    assert [sorted(circle) for circle in circles(calls)] == []


def test_rooms_call_downward_only(calls: Calls) -> None:
    def may_call(room: str, other: str) -> bool:
        return any(other in row and room in row and row.index(other) <= row.index(room) for row in ROOMS)

    upward = [
        (name, other)
        for name, others in calls.items()
        for other in sorted(others)
        if not may_call(os.path.dirname(name), os.path.dirname(other))
    ]
    assert upward == []


def test_files_are_short() -> None:
    sources = [*CSRC.glob("*/*.[ch]"), *(CSRC.parent / "nodedb_mem").glob("**/*.py")]
    lengths = {str(path.relative_to(CSRC.parent)): path.read_text().count("\n") for path in sources}
    assert {name: lines for name, lines in lengths.items() if lines >= 500} == {}
