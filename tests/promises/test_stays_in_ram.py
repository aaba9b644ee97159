"""Where nothing can leave RAM, a warning says so: file systems in RAM, overlays on them, locked mappings."""

from __future__ import annotations

import os
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kit import Mount, blob
from nodedb_mem import OverflowRegion


@contextmanager
def mounted(target: Path, kind: str, *options: str) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    target.mkdir()
    done = subprocess.run(["mount", "-t", kind, *options, "none", str(target)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no {kind} can be mounted here: {done.stderr.strip()}")
    try:
        yield target
    finally:
        subprocess.run(["umount", str(target)], check=True)


def said(place: Path) -> list[str]:
    """Open a named and an unnamed region, and work there. Gives the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for region in (OverflowRegion(place / "region", cache_limit=0), OverflowRegion.temporary(place)):
            with region:
                slots = [region.write(blob(100_000, number), 0) for number in range(30)]
                region.free_many(slots[::2])
                region.evict()
                region.trim()
                region.compact()
                assert all(region.read(slots[number]) == blob(100_000, number) for number in range(1, 30, 2))
        with OverflowRegion(place / "region", recover=True) as region:
            assert len(region) == 15
    assert all(warning.category is ResourceWarning and warning.filename == __file__ for warning in caught)
    return [str(warning.message) for warning in caught]


@pytest.mark.system
def test_ramfs_is_warned_of(tmp_path: Path) -> None:
    with mounted(tmp_path / "ram", "ramfs") as place:
        messages = said(place)
        assert len(messages) == 3 and all(
            "is on ramfs: what is spilled there stays in RAM" in text for text in messages
        )


@pytest.mark.system
@pytest.mark.parametrize("kind", ["tmpfs", "ramfs", "ext4"])
@pytest.mark.parametrize("upper", ["upper", "an upper folder"])
def test_an_overlay_is_warned_of_by_what_it_writes_to(tmp_path: Path, mount: Mount, kind: str, upper: str) -> None:
    lower = tmp_path / "lower"
    lower.mkdir()
    OverflowRegion(lower / "below", initial_capacity=4096).close()

    def try_on(store: Path) -> None:
        (store / upper).mkdir()
        (store / "work").mkdir()
        options = f"lowerdir={lower},upperdir={store / upper},workdir={store / 'work'}"
        with mounted(tmp_path / "over", "overlay", "-o", options) as place:
            messages = said(place)
            assert len(messages) == (0 if kind == "ext4" else 3)
            assert all("is on an overlay that writes to tmpfs or ramfs" in text for text in messages)

    if kind == "ramfs":
        with mounted(tmp_path / "ram", "ramfs") as store:
            try_on(store)
    else:
        try_on(mount(kind, 64))


LOCKED = """
    import ctypes, sys, warnings
    from nodedb_mem import OverflowRegion

    libc, (current, future, on_fault) = ctypes.CDLL(None, use_errno=True), (1, 2, 4)
    warnings.simplefilter("always")

    def lock(flags):
        if libc.mlockall(flags) != 0:
            print("no rights"); sys.exit()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with OverflowRegion.temporary(sys.argv[1], initial_capacity=1 << 20, max_capacity=1 << 21) as region:
            slot = region.write(bytes(100_000), 0)
            region.evict()
            print(len(caught), "before", end=" ")
            lock(current)
            region.evict()
            region.evict([slot])
            print(len(caught), "at the first evict", end=" ")
            assert libc.munlockall() == 0
        for flags in (future, future | on_fault):
            lock(flags)
            with OverflowRegion.temporary(sys.argv[1], initial_capacity=1 << 20, max_capacity=1 << 21) as region:
                region.evict()
            print(len(caught), "at open", end=" ")
            with OverflowRegion.temporary(
                sys.argv[1], initial_capacity=1 << 20, max_capacity=1 << 21, cache_limit=None
            ) as region:
                print(len(caught), "without a limit", end=" ")
                region.evict()
            print(len(caught), "at its evict", end=" ")
            assert libc.munlockall() == 0
        with OverflowRegion.temporary(sys.argv[1], initial_capacity=1 << 20, max_capacity=1 << 21) as region:
            region.evict()
        print(len(caught), "unlocked")
        assert all("mlockall" in str(warning.message) and warning.category is ResourceWarning for warning in caught)
        assert all(warning.filename == "<string>" or warning.filename.endswith(".py") for warning in caught)
"""


def test_locked_mappings_are_warned_of_once(run_python: Callable[..., str], sanitized: bool) -> None:
    if sanitized:
        pytest.skip("AddressSanitizer makes mlockall() do nothing")
    out = run_python(LOCKED, "/var/tmp").strip()
    if out.endswith("no rights"):
        pytest.skip("mlockall needs rights")
    assert out == (
        "0 before 1 at the first evict 2 at open 2 without a limit 3 at its evict "
        "4 at open 4 without a limit 5 at its evict 5 unlocked"
    )
