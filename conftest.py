"""Runs the Python blocks of README.md and docs/*.md as tests, each page from top to bottom in a folder of its own."""

import contextlib
import os
import tempfile
from importlib.util import find_spec
from typing import Any
from unittest import mock

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser


def _start(namespace: dict[str, Any]) -> None:
    """Give a page an empty directory to work in, and `missing` for the blocks that need a package."""
    page = contextlib.ExitStack()
    folder = page.enter_context(tempfile.TemporaryDirectory())
    page.enter_context(contextlib.chdir(folder))
    page.enter_context(mock.patch.dict(os.environ, TMPDIR=folder))  # for processes that a block starts
    page.enter_context(mock.patch.object(tempfile, "tempdir", folder))
    namespace |= {"__name__": "__main__", "_page": page, "missing": lambda package: find_spec(package) is None}


def _end(namespace: dict[str, Any]) -> None:
    page = namespace["_page"]
    namespace.clear()  # regions and views end with the page
    page.close()


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/*.md"],
    setup=_start,
    teardown=_end,
).pytest()
