"""Subclasses of the region: each way of opening runs their `__init__`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nodedb_mem import MemoryTuning, OverflowRegion


class Named(OverflowRegion):
    def __init__(self, path: Any, **options: Any) -> None:
        super().__init__(path, **options)
        self.names: dict[str, int] = {}


class Plain(OverflowRegion):
    """Hands nothing on but the path."""

    def __init__(self, path: Any) -> None:
        super().__init__(path)


WAYS: dict[str, Callable[[type[OverflowRegion], Path], OverflowRegion]] = {
    "the class": lambda kind, folder: kind(folder / "region"),
    "open": lambda kind, folder: kind.open(folder / "region"),
    "open_with_capacity": lambda kind, folder: kind.open_with_capacity(folder / "region", 4096),
    "open_with_config": lambda kind, folder: kind.open_with_config(folder / "region", 4096, 8192),
    "open_with_tuning": lambda kind, folder: kind.open_with_tuning(folder / "region", MemoryTuning()),
    "temporary": lambda kind, folder: kind.temporary(folder),
    "temporary anywhere": lambda kind, folder: kind.temporary(),
}


@pytest.mark.filterwarnings("ignore:.*tmpfs:ResourceWarning")
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_each_way_of_opening_runs_the_init_of_a_subclass(
    tmp_path: Path, way: Callable[[type[OverflowRegion], Path], OverflowRegion]
) -> None:
    with way(Named, tmp_path) as region:
        assert type(region) is Named and region.names == {}
        assert (region.path is None) == (not (tmp_path / "region").exists())
        region.names["x"] = region.write(b"x", 0)


def test_a_subclass_that_takes_no_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        Plain.temporary(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_neither_a_path_nor_a_folder_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="a path is needed"):
        OverflowRegion(None)


def test_no_path_is_an_unnamed_file(tmp_path: Path) -> None:
    with OverflowRegion(None, directory=tmp_path, initial_capacity=4096) as region:
        assert region.path is None and region.capacity == 4096 and list(tmp_path.iterdir()) == []
        assert str(tmp_path) in repr(region)


def test_a_folder_is_for_unnamed_files_and_these_have_nothing_to_recover(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="path must be None"):
        OverflowRegion(tmp_path / "region", directory=tmp_path)
    with pytest.raises(ValueError, match="nothing to recover"):
        OverflowRegion(None, directory=tmp_path, recover=True)
    assert list(tmp_path.iterdir()) == []
