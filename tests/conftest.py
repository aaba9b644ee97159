"""The hooks of the test suite, and the fixtures of kit.py for every test below."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest

pytest.register_assert_rewrite("kit")

from kit import (  # noqa: E402, F401
    REPORT,
    _shared_mounts,
    check,
    footprint,
    mapped_kib,
    mount,
    new_region,
    no_leaks,
    run,
    run_python,
    run_to_end,
    sanitized,
    start_python,
    terminal,
    unchanged,
)


def pytest_configure(config: pytest.Config) -> None:
    # An exception in a finalizer or a thread is a failure of the test during which it appeared.
    for warning in ("PytestUnraisableExceptionWarning", "PytestUnhandledThreadExceptionWarning"):
        config.addinivalue_line("filterwarnings", f"error::pytest.{warning}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.suffix == ".md":  # each block of a page goes on where the one before ended: one process runs them
            item.add_marker(pytest.mark.xdist_group(item.path.name))


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.collect()
    gc.freeze()  # what exists by now stays: no need to walk it after each test


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    if report.when == "call":
        item.stash[REPORT] = report
