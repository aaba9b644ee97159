"""Options and fixtures of the benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pages import empty_directory


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("nodedb_mem benchmarks")
    group.addoption("--quick", action="store_true", help="fewer rounds")
    group.addoption(
        "--directory",
        type=Path,
        default=Path(),
        help="where the files are made: its file system is what is measured (default: the current directory)",
    )


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether the short form was asked for."""
    return bool(request.config.getoption("--quick"))


@pytest.fixture(scope="session")
def bench_directory(request: pytest.FixtureRequest) -> Iterator[Path]:
    """An empty directory on the file system to measure."""
    with empty_directory(request.config.getoption("--directory")) as path:
        yield path
