"""Runs the Python blocks of README.md and docs/*.md as tests.

A page runs whole, from top to bottom, in an interpreter and a folder of its own. So it leaves no files, threads or
clusters to the tests, and the processes of pytest-xdist may share its blocks out as they like. Each block is a test.
"""

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from unittest import SkipTest

import pytest
from sybil import Sybil
from sybil.integration.pytest import SybilFile, SybilItem
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

PAGES = Sybil(parsers=[PythonCodeBlockParser(), SkipParser()], patterns=["README.md", "docs/*.md"])
WARNINGS = ("-Werror", "-Wignore::ResourceWarning")  # the folder may be on tmpfs


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Take the pages for tests."""
    return Page.from_parent(parent, path=file_path, sybils=[PAGES]) if PAGES.should_parse(file_path) else None


class Page(SybilFile):
    """A page with its blocks."""

    def collect(self) -> Iterator[SybilItem]:
        """Find the blocks."""
        for item in super().collect():
            item.__class__ = Block
            if self.config.pluginmanager.has_plugin("xdist"):
                item.add_marker(pytest.mark.xdist_group(self.name))  # with --dist loadgroup, a page runs once
            yield item

    def setup(self) -> None:
        """Run the page in a process of its own, and keep what became of each block."""
        with tempfile.TemporaryDirectory() as folder:
            outcomes = Path(folder, "outcomes.json")
            subprocess.run(
                [sys.executable, *WARNINGS, __file__, self.path, outcomes],
                cwd=folder,
                env=os.environ | {"TMPDIR": folder},
                stdin=subprocess.DEVNULL,
                check=True,
            )
            self.outcomes: dict[str, tuple[str, str]] = json.loads(outcomes.read_text())


class Block(SybilItem):
    """A block, which has run with its page."""

    def setup(self) -> None:
        """Need nothing of its own."""

    def runtest(self) -> None:
        """Report what became of the block."""
        outcome, text = self.parent.outcomes[str(self.example.line)]
        if outcome == "skipped":
            pytest.skip(text)
        elif outcome == "failed":
            pytest.fail(text, pytrace=False)


def run(page: Path) -> dict[str, tuple[str, str]]:
    """Run the blocks of a page; by its line, what became of each, and why."""
    outcomes = {}
    document = PAGES.parse(page)
    document.namespace |= {"__name__": "__main__", "missing": lambda package: find_spec(package) is None}
    for example in document.examples():
        outcome = "passed", ""
        try:
            example.evaluate()
        except SkipTest as reason:
            outcome = "skipped", str(reason)
        except Exception:
            outcome = "failed", traceback.format_exc()
        outcomes[str(example.line)] = outcome
    return outcomes


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(run(Path(sys.argv[1]))))
